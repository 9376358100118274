"""The segments of a token sequence: which are text, where they lie, and the arguments that say so to the operators.

The longest segment is the video. Text is short beside it, and what it says matters to every token: as keys and as
queries it stays dense. A segment that is not that short holds video too (history or reference frames).
"""

from torch.fx import Graph, Node

from fg_inductor.passes.graph import Extent, add, hint, same

# Text is at most this share of the video. Text encoders give 128 to 2,000 tokens, videos that are worth the rewrite
# have 7,000 and more; a reference video beside a video has a share of about 1.
TEXT_SHARE = 0.25

Segments = tuple[Extent, ...]


def without_empty(segments: Segments) -> Segments:
    """The segments that hold tokens; none if that is a single one."""
    segments = tuple(x for x in segments if not same(x.size, 0))
    return segments if len(segments) > 1 else ()


def video_index(segments: Segments) -> int:
    """The place of the video. A size that only run time knows is a number of valid text tokens."""
    return max(range(len(segments)), key=lambda i: (hint(segments[i].size) or 0, -i))


def _text_runs(segments: Segments) -> list[tuple[int, int]]:
    """Places [first, last) of the text, neighbours together."""
    runs: list[tuple[int, int]] = []
    video = hint(segments[video_index(segments)].size) or 0 if segments else 0
    for i, segment in enumerate(segments):
        if (hint(segment.size) or 0) <= TEXT_SHARE * video:
            first = runs.pop()[0] if runs and runs[-1][1] == i else i
            runs.append((first, i + 1))
    return runs


def text_ranges(graph: Graph, segments: Segments, origin: Node, video_first: bool = False) -> list[int | Node]:
    """Arguments [start, end, ...] of the text; none where ``graph`` cannot read the sizes.

    ``video_first``: places in query order, where what lies before the video comes behind it.
    """
    runs = _text_runs(segments)
    at = video_index(segments) if runs and video_first else 0
    needed = segments[: max(runs[-1][1], at + 1)] if runs else ()
    if not all(x.readable(graph) for x in needed):
        return []
    ends: list[int | Node] = [0]
    for segment in needed:
        ends.append(add(graph, ends[-1], segment.read(graph, origin), origin))

    def place(run: tuple[int, int], end: int | Node) -> int | Node:
        return add(graph, end, segments[at].read(graph, origin), origin) if run[0] < at else end

    return [place(run, ends[edge]) for run in runs for edge in run]


def ranges_text(segments: Segments) -> str:
    """``60:67``, several joined by commas; symbolic sizes as expressions."""
    ends = [0]
    for segment in segments:
        ends.append(ends[-1] + segment.size)
    return ", ".join(f"{ends[first]}:{ends[last]}" for first, last in _text_runs(segments))
