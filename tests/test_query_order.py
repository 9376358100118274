"""Query order: slices, and the runs of 16 in them, are compact in space and time on every grid."""

import itertools
import math

import pytest
import torch

from fg_inductor.kernels import ops
from fg_inductor.kernels import query_order as module
from fg_inductor.kernels.mask import SLICES
from fg_inductor.kernels.query_order import ALONE, TIME, cross_section, query_order, rows_of_runs

GRIDS = (  # t, h, w
    (21, 30, 52),  # Wan, 480p: divides by no cube
    (21, 45, 80),  # Wan, 720p
    (13, 30, 45),  # CogVideoX
    (17, 32, 32),
    (33, 45, 80),  # HunyuanVideo, 720p
    (21, 52, 30),  # upright
)


def spread(video, grid, size):
    """Squared distance from the centre, mean over the tokens of each run of ``size``; a step in time counts as TIME."""
    _, h, w = grid
    place = torch.stack([video // (h * w) * TIME, video // w % h, video % w], 1).double()
    return torch.stack([(x - x.mean(0)).pow(2).sum(1).mean() for x in place.split(size)])


def of_box(box):
    return sum((edge**2 - 1) / 12 * weight**2 for edge, weight in zip(box, (TIME, 1, 1), strict=True))


def most_compact(m):
    """The box of m tokens with the least spread; slices of 32 and 16 stay in one frame."""
    edges = [2**i for i in range(m.bit_length())]
    boxes = [box for box in itertools.product(edges, repeat=3) if math.prod(box) == m and (m >= ALONE or box[0] == 1)]
    return min(boxes, key=of_box)


def of_runs(grid, m):
    """Spread of the runs of 16 in endless thin rods as thick and high as those that the grid's blocks are cut into."""
    total, (edge, rod) = 0.0, cross_section(*grid, m)
    layers = cut_twice(grid[0], edge, edge), cut_twice(grid[1], rod, rows_of_runs(m))
    for (frames, thick), (rows, high) in itertools.product(*layers):
        column = thick * high
        index = torch.arange(math.lcm(16, column))
        video = index // high % thick * high * len(index) + index % high * len(index) + index // column
        total += frames * rows * spread(video, (thick, high, len(index)), 16).mean().item()
    return total / math.prod(grid[:2])


def cut(size, edge):
    blocks = math.ceil(size / edge)
    ends = [math.ceil(i * size / blocks) for i in range(blocks + 1)]
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def cut_twice(size, edge, thin_edge):
    """(how many tokens, in layers of which size): blocks that are cut into layers themselves."""
    layers = [len(layer) for block in cut(size, edge) for layer in cut(len(block), thin_edge)]
    return [(layer * layers.count(layer), layer) for layer in set(layers)]


def order_of(grid, m, before=0, after=0, time=TIME):
    return query_order(*grid, before, after, m, torch.device("cpu"), "rods", time)


def by_walking(grid, m, time=TIME):
    """The order, made by walking along the rods token by token."""
    t, h, w = grid

    def snake(ranges, back):
        return ranges[::-1] if back else ranges

    columns, walk, rod = range(w), [], 0
    edges = cross_section(t, h, w, m, time)
    for i, frames in enumerate(cut(t, edges[0])):
        for rows in snake(cut(h, edges[1]), i % 2):
            walk += [(rod, frames, rows, (a, b, c)) for c in snake(columns, rod % 2) for a in frames for b in rows]
            rod += 1
    order = []
    for start in range(0, len(walk), m):

        def key(item):
            rod, _, rows, (a, b, c) = item
            run = next(i for i, part in enumerate(cut(len(rows), rows_of_runs(m))) if b - rows[0] in part)
            return rod, run, w - 1 - c if run % 2 else c, a, b

        order += [a * h * w + b * w + c for *_, (a, b, c) in sorted(walk[start : start + m], key=key)]
    return order if m >= ALONE else through_time(order, grid, m, cut(h, edges[1]))


def through_time(order, grid, m, rods):
    """The whole slices of an order sorted by where their middle token is in a walk along the rods of one frame."""
    _, h, w = grid
    walk = [(b, c) for j, rows in enumerate(rods) for c in (range(w)[::-1] if j % 2 else range(w)) for b in rows]
    place = {token: i // m for i, token in enumerate(walk)}

    def key(tokens):
        a, rest = divmod(tokens[m // 2], h * w)
        p = place[divmod(rest, w)]
        return p, -a if p % 2 else a

    slices = [order[i : i + m] for i in range(0, len(order) - m + 1, m)]
    return [*itertools.chain(*sorted(slices, key=key)), *order[len(slices) * m :]]


@pytest.mark.parametrize("m", SLICES)
@pytest.mark.parametrize("grid", [(1, 1, 5), (3, 5, 7), (2, 8, 8), (5, 13, 6), (9, 4, 11), (1, 30, 3)], ids=str)
def test_order_is_the_walk(grid, m):
    assert order_of(grid, m).tolist() == by_walking(grid, m)


@pytest.mark.parametrize("m", [64, 128])
@pytest.mark.parametrize("time", [0.1, 3.0])
@pytest.mark.parametrize("grid", [(5, 13, 6), (9, 4, 11), (17, 5, 9)], ids=str)
def test_the_walk_by_what_a_step_in_time_counts_as(grid, time, m):
    assert order_of(grid, m, time=time).tolist() == by_walking(grid, m, time)


def test_rods_reach_as_far_in_time_as_it_counts():
    edges = [cross_section(21, 30, 52, 128, time)[0] for time in (4.0, 1.0, TIME, 0.25, 0.1)]
    assert edges == sorted(edges) and edges[0] < edges[2] < edges[-1] == 21
    # Slices within a frame have no time.
    assert order_of((5, 14, 22), 16, time=0.1).equal(order_of((5, 14, 22), 16, time=4.0))


@pytest.mark.parametrize("before, after", [(0, 11), (3, 0), (100, 77)])
def test_text_comes_after_the_video(before, after):
    grid, video = (3, 5, 7), 105
    order = order_of(grid, 16, before, after)
    assert order.dtype == torch.int32
    assert torch.equal(order[:video], order_of(grid, 16) + before)
    assert order[video:].tolist() == [*range(before), *range(before + video, before + video + after)]


@pytest.mark.parametrize("m", SLICES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_slices_are_compact(grid, m):
    """Nearly as compact as in a grid without edges; cut from cubes, slices of 128 have 2 to 12 times that."""
    video = order_of(grid, m).long()
    assert torch.equal(video.sort().values, torch.arange(math.prod(grid)))
    assert spread(video, grid, m).mean() < 1.25 * of_box(most_compact(m))
    assert spread(video, grid, m).max() < 5 * of_box(most_compact(m))  # none joins opposite edges
    # A box is no measure of runs: 3 rows are cut into rods of 2 and 1, and 16 tokens are no whole number of columns of
    # 7x2. So the ideal is cut like that too.
    assert spread(video, grid, 16).mean() < 1.4 * of_runs(grid, m)


@pytest.mark.parametrize("m, boxes", [(64, (1, 4, 6)), (64, (1, 8, 8)), (128, (1, 4, 6)), (128, (2, 8, 8))], ids=str)
def test_a_grid_that_divides_is_cut_into_boxes(m, boxes):
    box = most_compact(m)
    grid = tuple(edge * count for edge, count in zip(box, boxes, strict=True))
    video = order_of(grid, m).long()
    assert (spread(video, grid, m) <= of_box(box)).all()
    thick, high = box[0], min(rows_of_runs(m), 16 // box[0])
    run = of_box((thick, high, 16 // (thick * high)))
    assert torch.equal(spread(video, grid, 16), torch.full((len(video) // 16,), run, dtype=torch.double))


@pytest.mark.parametrize("m", SLICES)
@pytest.mark.parametrize("grid", [GRIDS[0], *GRIDS[2:4], (1, 45, 80), (5, 16, 16)], ids=str)
def test_the_estimate_chooses_well(grid, m, monkeypatch):
    """The chosen cross-section is within a tenth of the best that there is."""
    found = {}
    thickest, step = min(grid[0], 24) if m >= ALONE else 1, rows_of_runs(m)
    for edges in [(a, b) for a in range(1, thickest + 1) for b in range(step, min(m // a, 24) + 1, step)]:
        monkeypatch.setattr("fg_inductor.kernels.query_order.cross_section", lambda *_, edges=edges: edges)
        found[edges] = spread(order_of(grid, m).long(), grid, m).mean().item()
    chosen = cross_section(*grid, m)
    assert found[chosen] <= 1.1 * min(found.values()), (chosen, found)


def keys_of_a_place(order, grid, m, reach):
    """bool [T, keys]: slices keep keys within ``reach`` tokens of their middle in height and width, at all times: what
    many heads of a trained model do. Every 16th key stands for its neighbours, at one time for all."""
    _, h, w = grid
    middle = order.long()[: len(order) // m * m].view(-1, m)[:, m // 2] % (h * w)
    key = torch.arange(0, h * w, 16)
    return ((middle[:, None] // w - key // w).abs() <= reach) & ((middle[:, None] % w - key % w).abs() <= reach)


@pytest.mark.parametrize("m", [16, 32])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_slices_of_a_tile_agree(grid, m):
    """128 queries hold slices of one place in the frames: the union of their keys is little more than those of one.
    In the sequence of the rods it was 1.8 to 2.9 times as much."""
    keep = keys_of_a_place(order_of(grid, m), grid, m, reach=6)
    slices = 128 // m
    tiles = keep[: len(keep) // slices * slices].unflatten(0, (-1, slices))
    assert tiles.any(1).sum() * slices < 1.6 * tiles.sum()


@pytest.mark.parametrize("m", [16, 32])
def test_tokens_behind_the_last_whole_slice_stay_there(m):
    order = order_of((3, 5, 7), m, before=4, after=2)
    rest = 105 % m
    assert order[105:].tolist() == [0, 1, 2, 3, 109, 110]
    # The walk along the rods ends in the last frame.
    assert all(token >= 4 + 70 for token in order[105 - rest : 105].tolist())


# The operator


@pytest.fixture
def made(monkeypatch):
    """The orders that are made, not kept from before."""
    found = []

    def noted(*args):
        found.append(args)
        return query_order(*args)

    monkeypatch.setattr(module, "query_order", noted)
    monkeypatch.setattr(module, "_kept", {})
    return found


def test_the_operator_makes_an_order_once(made):
    cpu = torch.device("cpu")
    arguments = [
        (3, 5, 7, 0, 0, 128),
        (3, 5, 7, 2, 0, 128),
        (3, 5, 7, 0, 2, 128),
        (3, 7, 5, 0, 0, 128),
        (3, 5, 7, 0, 0, 64),
    ]
    options = [("rods", TIME), ("rods", 0.1), ("hilbert", TIME)]
    for sizes, option in [(sizes, options[0]) for sizes in arguments] + [(arguments[0], x) for x in options[1:]]:
        for _ in range(2):
            assert torch.equal(ops.query_order(*sizes, cpu, *option), query_order(*sizes, cpu, *option))
    assert len(made) == len(arguments) + 2


def test_what_is_kept_is_nobody_elses(made):
    first = ops.query_order(3, 5, 7, 0, 0, 128, torch.device("cpu"))
    expected = first.clone()
    first.zero_()
    assert torch.equal(ops.query_order(3, 5, 7, 0, 0, 128, torch.device("cpu")), expected) and len(made) == 1


@pytest.mark.gpu
def test_an_order_in_a_cuda_graph(made):
    """One that is kept is copied at each replay; one that is not is made by the graph."""
    device = torch.device("cuda")
    ops.query_order(3, 5, 7, 0, 0, 128, device)
    graph, orders = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        orders += [ops.query_order(3, 5, width, 0, 0, 128, device) for width in (7, 9)]
    for order in orders:
        order.zero_()
    graph.replay()
    for order, width in zip(orders, (7, 9), strict=True):
        assert order.tolist() == order_of((3, 5, width), 128).tolist()


@pytest.mark.parametrize("time", [0.0, -1.0, math.inf, math.nan])
def test_time_counts(time):
    with pytest.raises(ValueError, match="more than none"):
        ops.query_order(3, 5, 7, 0, 0, 128, torch.device("cpu"), "rods", time)


def test_query_order_compiles():
    def order(x, h):
        return x[:, ops.query_order(x.shape[0], h, 6, 1, 2, 16, x.device)]

    compiled = torch.compile(order, fullgraph=True, backend="aot_eager", dynamic=True)
    for t, h in ((2, 4), (3, 5)):
        x = torch.randn(t, t * h * 6 + 3)
        assert torch.equal(compiled(x, h), order(x, h))


@pytest.mark.parametrize(
    "changes, message",
    [({"m": 8}, "m=8 queries a slice"), ({"h": 0}, r"token grid \(2, 0, 3\)"), ({"before": -1}, "-1 tokens before")],
    ids=str,
)
def test_query_order_error(changes, message):
    arguments = {"t": 2, "h": 3, "w": 3, "before": 0, "after": 0, "m": 16, "device": torch.device("cpu")}
    with pytest.raises(ValueError, match=f"fgattn::query_order: .*{message}"):
        ops.query_order(**arguments | changes)
