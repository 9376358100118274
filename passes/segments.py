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
    """The place of the video. A size that only run time knows is a count of valid text tokens."""
    return max(range(len(segments)), key=lambda i: (hint(segments[i].size) or 0, -i))


def text_indices(segments: Segments) -> list[int]:
    """The places of the text."""
    if not segments:
        return []
    video = hint(segments[video_index(segments)].size) or 0
    return [i for i, x in enumerate(segments) if (hint(x.size) or 0) <= TEXT_SHARE * video]


def text_ranges(graph: Graph, segments: Segments, origin: Node) -> list[int | Node]:
    """Arguments [start, end, ...] of the text; none where ``graph`` cannot read the sizes."""
    text = text_indices(segments)
    if not text or not all(x.readable(graph) for x in segments[: text[-1] + 1]):
        return []
    ranges, position = [], 0
    for i, segment in enumerate(segments[: text[-1] + 1]):
        end = add(graph, position, segment.read(graph, origin), origin)
        if i in text and i - 1 in text:
            ranges[-1] = end
        elif i in text:
            ranges += [position, end]
        position = end
    return ranges


def ranges_text(segments: Segments) -> str:
    """``60:67``, several joined by commas; symbolic sizes as expressions."""
    starts = [sum((x.size for x in segments[:i]), 0) for i in range(len(segments))]
    return ", ".join(f"{starts[i]}:{starts[i] + segments[i].size}" for i in text_indices(segments))
