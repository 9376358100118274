"""The order that the queries choose: the one in whose slices they differ least."""

import pytest
import torch
import torch.nn.functional as F

import fg_inductor
from fg_inductor.kernels import choose_order as module
from fg_inductor.kernels import ops
from fg_inductor.kernels.choose_order import TIMES, candidates, choose_order
from fg_inductor.kernels.query_order import TIME, cross_section, query_order
from fg_inductor.passes.selector import order_of_calls
from fg_inductor.settings import Settings
from fg_inductor.testing_passes import run_pass

GRID, M = (16, 16, 16), 64
TOKENS = 16**3
CPU = torch.device("cpu")


def queries(speed, heads=2, seed=0):
    """[1, H, S, 32] that change with the place, ``speed`` times as fast in time as in height and width."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in GRID), indexing="ij")
    place = torch.stack(axes, -1).flatten(0, 2) * torch.tensor([speed, 1.0, 1.0])
    phase = place @ (torch.randn(heads, 3, 16, generator=generator) / 12)
    return torch.cat([phase.cos(), phase.sin()], -1)[None]


def time_of(order, before=0, after=0):
    """Which of TIMES made an order."""
    (found,) = [time for time in TIMES if torch.equal(order, query_order(*GRID, before, after, M, CPU, "rods", time))]
    return found


@pytest.mark.parametrize(("speed", "time"), [(0.1, 0.125), (0.5, TIME), (2.5, 2.0)])
def test_reaches_as_far_in_time_as_the_queries_stay_alike(speed, time):
    assert candidates(*GRID, M) == TIMES
    assert time_of(choose_order(queries(speed), *GRID, 0, 0, M)) == time


def test_text_has_no_say():
    video = queries(0.1)
    q = torch.cat([100 * torch.randn(1, 2, 3, 32), video, 100 * torch.randn(1, 2, 40, 32)], 2)
    assert time_of(choose_order(q, *GRID, 3, 40, M), 3, 40) == 0.125


def test_heads_have_the_same_say():
    """Not by their norms: eight heads that stay alike in time against one that does not."""
    q = torch.cat([queries(0.1, heads=8, seed=1), 1000 * queries(2.5, heads=1)], 1)
    assert time_of(choose_order(q, *GRID, 0, 0, M)) == 0.125


@pytest.mark.parametrize(
    "q", [torch.zeros(1, 2, TOKENS, 32), torch.full((1, 2, TOKENS, 32), float("nan"))], ids=["0", "nan"]
)
def test_the_usual_order_where_queries_say_nothing(q):
    assert time_of(choose_order(q, *GRID, 0, 0, M)) == TIME


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_head_that_says_nothing_does_not_silence_the_others(value):
    q = torch.cat([torch.full((1, 1, TOKENS, 32), value), queries(0.1)], 1)
    assert time_of(choose_order(q, *GRID, 0, 0, M)) == 0.125


def test_a_little_is_left_to_chance(monkeypatch):
    monkeypatch.setattr(module, "MARGIN", 100.0)
    assert time_of(choose_order(queries(0.1), *GRID, 0, 0, M)) == TIME


@pytest.mark.parametrize(
    ("grid", "m", "times"),
    [(GRID, 16, (TIME,)), ((1, 45, 80), 128, (TIME,)), ((21, 45, 80), 128, TIMES), ((17, 32, 32), 128, TIMES)],
)
def test_candidates_make_different_rods(grid, m, times):
    assert candidates(*grid, m) == times
    assert len({cross_section(*grid, m, time) for time in times}) == len(times)


@pytest.mark.parametrize("sizes", [(1, 5, 7), (3, 4, 5)])
def test_less_than_a_slice(sizes):
    t, h, w = sizes
    order = choose_order(torch.randn(1, 1, t * h * w, 32), *sizes, 0, 0, 128)
    assert torch.equal(order, query_order(*sizes, 0, 0, 128, CPU))


@pytest.mark.parametrize("sizes", [(4, 5, 6, 0, 0), (4, 5, 6, -1, 8), (0, 5, 6, 127, 0)])
def test_sizes_are_those_of_the_queries(sizes):
    with pytest.raises(ValueError, match=r"fgattn::choose_order: token grid .* for 127 queries; give the sizes"):
        ops.choose_order(torch.randn(1, 1, 127, 16), *sizes, 64)


def test_calls_outside_of_a_graph_have_its_order():
    """Chosen in each, or one for all."""
    settings = Settings.parse({"slice": f"{M}x8"})
    order_of = order_of_calls(settings, GRID, CPU)
    assert [time_of(order_of(queries(speed))) for speed in (0.1, 2.5)] == [0.125, 2.0]
    order_of = order_of_calls(Settings.parse({"slice": f"{M}x8", "time_step": 2}), GRID, CPU)
    assert order_of(queries(0.1)) is order_of(queries(2.5)) and time_of(order_of(None)) == 2.0


class Sites(torch.nn.Module):
    def forward(self, a, b):
        return F.scaled_dot_product_attention(a, a, a) + F.scaled_dot_product_attention(b, a, b)


def test_each_site_of_the_pass_chooses():
    a, b = torch.randn(1, 2, 256, 32), torch.randn(1, 2, 256, 32)
    done = run_pass(Sites(), (a, b), token_grid=(4, 8, 8), slice="64x8", density=1.0)
    orders = done.calls(ops.choose_order)
    assert [node.args[1:] for node in orders] == [(4, 8, 8, 0, 0, 64)] * 2 and not done.calls(ops.query_order)
    assert [x["order"] for x in done.attention()] == orders
    assert [node.args[1] for node in done.calls(ops.reorder)] == [orders[0]] * 2 + [orders[1]] * 2
    assert [site.details["order"] for site in done.sites] == ["by the queries"] * 2
    torch.testing.assert_close(done.result, Sites()(a, b))


@pytest.mark.parametrize(("grid", "m"), [((4, 8, 8), 16), ((1, 16, 16), 64)])
def test_sites_share_an_order_that_leaves_no_choice(grid, m):
    x = torch.randn(1, 2, 256, 32)
    done = run_pass(Sites(), (x, x), token_grid=grid, slice=f"{m}x8")
    (order,) = done.calls(ops.query_order)
    assert order.args == (*grid, 0, 0, m, CPU) and not done.calls(ops.choose_order)
    assert ["order" in site.details for site in done.sites] == [False] * 2


def test_a_grid_known_at_run_time_leaves_the_choice_to_it():
    conv = torch.nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))

    def model(video):
        grid = conv(video)
        q = F.avg_pool3d(video, (1, 2, 2)).flatten(2).transpose(1, 2)[:, None].repeat(1, 2, 1, 8)
        return F.scaled_dot_product_attention(q, q, q) + grid.sum()

    video = torch.randn(1, 4, 4, 16, 12)
    for dim in (2, 3, 4):
        torch._dynamo.mark_dynamic(video, dim)
    done = run_pass(model, (video,), slice="64x8", density=1.0)
    assert len(done.calls(ops.choose_order)) == 1 and not done.calls(ops.query_order)
    torch.testing.assert_close(done.result, model(video))


@pytest.mark.parametrize("mask", ["observed", "dfs"])
def test_masks_that_stay_have_an_order_that_stays(mask):
    x = torch.randn(1, 2, 256, 32)
    done = run_pass(Sites(), (x, x), token_grid=(4, 8, 8), slice="64x8", mask=mask)
    assert not done.calls(ops.choose_order) and len(done.calls(ops.query_order)) == 1


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_training(inner):
    """Gradients are those of dense attention where everything is kept, whatever the order."""
    q = queries(0.1).requires_grad_()
    k, v = torch.randn(1, 2, TOKENS, 32), torch.randn(1, 2, TOKENS, 32)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    options = {"fgattn.inner": inner, "fgattn.token_grid": GRID, "fgattn.slice": f"{M}x8", "fgattn.density": 1.0}
    options |= {"fgattn.time_step": "auto", "fgattn.min_seq": 1, "fgattn.when": "always", "fgattn.quiet": True}
    out = torch.compile(attend, backend="fgattn", options=options, fullgraph=True)(q, k, v)
    (grad,) = torch.autograd.grad(out.square().sum(), q)
    exact = attend(q, k, v)
    (expected,) = torch.autograd.grad(exact.square().sum(), q)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    assert [row.site.details["order"] for row in fg_inductor.report()] == ["by the queries"]


@pytest.mark.gpu
def test_choice_on_a_gpu_and_in_a_cuda_graph():
    for speed, time in ((0.1, 0.125), (2.5, 2.0)):
        q = queries(speed).to("cuda", torch.bfloat16)
        order = ops.choose_order(q, *GRID, 0, 0, M)
        assert time_of(order.cpu()) == time
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = ops.choose_order(q, *GRID, 0, 0, M)
        q.copy_(queries(2.6 - speed).to(q))  # the other choice, by a replay
        graph.replay()
        assert time_of(again.cpu()) == 2.125 - time
