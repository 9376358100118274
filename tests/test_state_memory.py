"""Observed masks in host memory: the same results, bit for bit, as with the masks on the device."""

# ruff: noqa: E501  (a line of the text of a graph is a node, however long)

import copy
import dataclasses

import pytest
import torch
from denoising_loops import OBSERVED, Guided, compile_blocks, compile_whole, denoise, totals
from expecttest import TestCase
from test_fetch import Transfers
from torch._dynamo.utils import counters

import fg_inductor
from fg_inductor import forms, state
from fg_inductor.kernels import fetch, host_memory, reference_observed
from fg_inductor.kernels.fetch import Prefetcher
from fg_inductor.kernels.host_memory import Block
from fg_inductor.passes import density, sdpa
from fg_inductor.passes.printer import graph_text
from fg_inductor.passes.state import add_state
from fg_inductor.passes.variant import copy_graph
from fg_inductor.settings import Settings
from fg_inductor.toy_models import Stack, tokens

MASK = 2 * 8 * 4 * 4  # heads, slices, words, bytes
STEPS = 8


class Memory(Block):
    """A block that lies in the memory of the CPU."""

    name = ""


@pytest.fixture
def prefetching(monkeypatch):
    """On a CPU masks are fetched as on a GPU, the next one ahead: what is read too early, or not waited for, shows."""
    prefetcher, blocks = Prefetcher(Transfers()), []

    def zeros(shape, device):
        mask = torch.zeros(shape, dtype=torch.int32, device=device)
        blocks.append(Memory(mask.detach(), device))
        host_memory.blocks[mask.data_ptr()] = blocks[-1]
        return mask

    plain = reference_observed.put_back

    def put_back(mask, staged, due):
        plain(mask, staged, due)
        fetch.wrote(mask)

    monkeypatch.setattr(host_memory, "zeros", zeros)
    monkeypatch.setattr(fetch, "_prefetcher", lambda device: prefetcher)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(reference_observed, "fetch", lambda mask: fetch.launch(mask, ahead=True))
    monkeypatch.setattr(reference_observed, "put_back", put_back)
    return prefetcher


def results(compiled, model, options, memory, after=lambda i: None, **loop):
    """What a loop gives, and the masks that it ends with."""
    run_model = compiled(copy.deepcopy(model), {**options, "fgattn.state_memory": memory})
    loop = {"steps": STEPS, **loop}
    with torch.no_grad(), fg_inductor.denoising(run_model, steps=STEPS) as run:
        found = denoise([run_model], after=lambda i: (run.step(), after(i)), **loop)
    masks = [entry.mask.clone() for entry in state._entries.values()]
    made = totals()
    fg_inductor.reset(run_model)
    return found, masks, made


CASES = {
    "every": {"fgattn.refresh": "every 3"},
    "drift": {"fgattn.refresh": "drift 0.01", "fgattn.dense_first": 0.1},
    "once-tail-stats": {"fgattn.refresh": [], "fgattn.tail": "pooled", "fgattn.stats": True},
    "density-by-steps": {"fgattn.density": {0: 0.5, 0.5: 0.25}, "fgattn.refresh": "every 2"},
    "shared": {"fgattn.heads_per_mask": 2, "fgattn.refresh": "every 3", "fgattn.stats": True},
    "shared-drift": {"fgattn.heads_per_mask": 2, "fgattn.refresh": "drift 0.02"},
    "ordered": {"fgattn.token_grid": (2, 8, 8), "fgattn.refresh": "every 3"},
}


@pytest.mark.parametrize("compiled", [compile_whole, compile_blocks])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equals_masks_on_the_device(options, compiled, prefetching):
    model, options = Guided(3), {**OBSERVED, **options}
    expected, masks, made = results(compiled, model, options, "device")
    density = [row.density for row in fg_inductor.report()]
    torch._dynamo.reset()
    counters.clear()
    found, others, again = results(compiled, model, options, "host")
    assert torch.equal(found, expected)
    assert made == again and made["made"] == 6  # 3 layers, 2 branches
    assert len(masks) == 6 and all(torch.equal(a, b) for a, b in zip(masks, others, strict=True))
    assert [row.density for row in fg_inductor.report()] == density
    steps = STEPS - ("fgattn.dense_first" in options)
    # All but those of the first step, and the first of the second, whose place in the order is not known before.
    assert counters["fgattn"]["fetched ahead"] == 6 * steps - 7
    assert counters["fgattn"]["fetched when needed"] == 7


@pytest.mark.parametrize("compiled", [compile_whole, compile_blocks])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_compilers_change_nothing(inner, compiled, prefetching):
    """The copy is updated where it lies, and no layer's is made before its turn."""
    model, options = Guided(3), {**OBSERVED, "fgattn.inner": inner, "fgattn.refresh": "every 3"}
    expected, masks, _ = results(compiled, model, options, "device")
    torch._dynamo.reset()
    counters.clear()
    found, others, _ = results(compiled, model, options, "host")
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(masks, others, strict=True))
    # "aot_eager" copies masks that are to be written: what is put back is not seen.
    assert counters["fgattn"]["fetched ahead"] == (6 * STEPS - 7 if inner == "inductor" else 0)


def test_symbolic_length(prefetching):
    model, options = Guided(2), {**OBSERVED, "fgattn.inner": "aot_eager", "fgattn.refresh": "every 3"}
    for length in (160, 112):
        expected, *_ = results(compile_whole, model, options, "device", length=length, mark=1)
        found, *_ = results(compile_whole, model, options, "host", length=length, mark=1)
        assert torch.equal(found, expected)


def test_another_video_and_another_model(prefetching):
    """The copy that is under way between them is of no use, and does no harm."""
    options = {**OBSERVED, "fgattn.refresh": []}
    for model in (Guided(2), Guided(3)):
        results_ = {}
        for memory in ("device", "host"):
            compiled = compile_blocks(copy.deepcopy(model), {**options, "fgattn.state_memory": memory})
            videos = []
            for known in (False, True):
                with torch.no_grad(), fg_inductor.denoising(compiled) as run:
                    videos.append(denoise([compiled], after=lambda i, run=run: run.step(), known=known))
            results_[memory] = torch.stack(videos)
        assert torch.equal(results_["device"], results_["host"])


def test_reset_lets_the_copy_go(monkeypatch):
    forgotten = []
    monkeypatch.setattr(fetch, "forget", lambda: forgotten.append(len(state._entries)))
    model = compile_whole(Guided(), {**OBSERVED, "fgattn.state_memory": "host"})
    with torch.no_grad(), fg_inductor.denoising(model) as run:
        denoise([model], steps=2, after=lambda i: run.step())
    forgotten.clear()
    fg_inductor.reset(model)
    fg_inductor.reset()
    assert len(forgotten) == 2


def test_state_bytes_bound_the_device():
    """Masks in host memory are as fine as they were asked for, and no form for coarser ones is made."""
    options = {**OBSERVED, "fgattn.state_bytes": 100, "fgattn.state_memory": "host"}
    assert len(Settings.parse(options).levels) == 1
    model = compile_blocks(Guided(3), options)
    with torch.no_grad(), fg_inductor.denoising(model) as run:
        denoise([model], after=lambda i: run.step())
    (row,) = fg_inductor.report()
    assert row.held == state.Held(MASK * 3 * 2, 8, 3 * 2, heads=2, masks=2, in_host_memory=True)
    assert "masks held in host memory: 0.00154 MB at 16x8, 6 refreshes" in str(fg_inductor.report())
    assert row.to_dict()["settings"]["state_memory"] == "host"


@pytest.mark.parametrize(("memory", "mode", "told"), [
    ("device", "default", (False, True)), ("host", "default", (True, True)), ("host", "reduce-overhead", (True, False)),
])  # fmt: skip
def test_nothing_is_copied_ahead_where_cuda_graphs_replay(memory, mode, told, monkeypatch):
    seen = []
    monkeypatch.setattr(forms, "add_state", lambda *args: seen.append(args[4:]) or add_state(*args))
    model = compile_whole(Guided(1), {**OBSERVED, "mode": mode, "fgattn.state_memory": memory})
    with torch.no_grad(), fg_inductor.denoising(model):
        model(tokens(), tokens(1))
    assert seen == [told]


def test_memory_that_can_not_be_had_is_an_error(monkeypatch):
    def fail(shape, device):
        raise RuntimeError("fgattn: no memory")

    monkeypatch.setattr(host_memory, "zeros", fail)
    model = compile_whole(Guided(), {**OBSERVED, "fgattn.state_memory": "host"})
    with torch.no_grad(), fg_inductor.denoising(model), pytest.raises(RuntimeError, match="fgattn: no memory"):
        model(tokens(), tokens(1))


class TestGraph(TestCase):
    def text(self, bound=None, stats=False, **how):
        """The graph of one layer. in5 is its mask; what it drifts by and the flag are behind it."""
        texts = []

        def backend(gm, example_inputs):
            copied = copy_graph(gm)
            sdpa.rewrite(copied, Settings(mask="observed", density=0.25, slice="16x8", min_seq=1, when="always"))
            if stats:
                density.add_outputs(copied)
            texts.append(graph_text(add_state(copied, example_inputs, bound, **how).gm))
            return gm.forward

        with torch.no_grad():
            torch.compile(Stack(1), backend=backend, fullgraph=True)(tokens())
        return texts[0]

    def test_copies_around_a_site(self):
        self.assertExpectedInline(
            self.text(host=True),
            """\
%0 = linear(in0, in1, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in0, in2, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = linear(in0, in3, None)
%7 = .unflatten(%6, -1, (2, -1))
%8 = .transpose(%7, 1, 2)
%9 = fgattn.fetch.default(in5, True)
%10 = fgattn.begin_observed_.default(%2, %5, %9, None, None, 0.125, 16, 8, 0, in6, None, None, None)
%11 = fgattn.attention.default(%2, %5, %8, %9, None, None, 0.125, 16, 8, 'none', 0, 'auto')
%12 = getitem(%11, 1)
%13 = fgattn.update_observed_.default(%2, %5, %12, %9, None, None, 0.125, 16, 8, 'sum', 1.0, 0.25, 1.0, (), (), 0, %10, None, None, None)
%14 = fgattn.put_back_.default(in5, %9, %10)
%15 = getitem(%11, 0)
%16 = .transpose(%15, 1, 2)
%17 = .flatten(%16, 2)
%18 = linear(%17, in4, None)
return (%18)""",
        )

    def test_replayed_and_drifting(self):
        self.assertExpectedInline(
            self.text(bound=0.1, stats=True, host=True, ahead=False),
            """\
%0 = linear(in0, in1, None)
%1 = .unflatten(%0, -1, (2, -1))
%2 = .transpose(%1, 1, 2)
%3 = linear(in0, in2, None)
%4 = .unflatten(%3, -1, (2, -1))
%5 = .transpose(%4, 1, 2)
%6 = linear(in0, in3, None)
%7 = .unflatten(%6, -1, (2, -1))
%8 = .transpose(%7, 1, 2)
%9 = fgattn.fetch.default(in5, False)
%10 = fgattn.begin_observed_.default(%2, %5, %9, None, None, 0.125, 16, 8, 0, in7, in6, 0.1, None)
%11 = fgattn.attention.default(%2, %5, %8, %9, None, None, 0.125, 16, 8, 'none', 0, 'auto')
%12 = getitem(%11, 1)
%13 = fgattn.update_observed_.default(%2, %5, %12, %9, None, None, 0.125, 16, 8, 'sum', 1.0, 0.25, 1.0, (), (), 0, %10, in6, None, None)
%14 = fgattn.put_back_.default(in5, %9, %10)
%15 = getitem(%11, 0)
%16 = .transpose(%15, 1, 2)
%17 = .flatten(%16, 2)
%18 = linear(%17, in4, None)
%19 = fgattn.kept_density.default(in5, None, 128, 128, 16, 8)
return (%18, %19)""",
        )


# On a GPU


def gpu_results(compiled, memory, mode, **options):
    """Ten steps of a model in bfloat16, and how many bytes its masks take of the GPU."""
    torch.manual_seed(0)
    model = Guided(4).to("cuda", torch.bfloat16)
    options = {**OBSERVED, "fgattn.inner": "inductor", "mode": mode, "fgattn.state_memory": memory, **options}
    run_model = compiled(model, options)
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randn(1, 1, 128, generator=generator).to("cuda", torch.bfloat16) for _ in range(2)]
    x, found = torch.randn(1, 4096, 128, generator=generator).to("cuda", torch.bfloat16), []
    with torch.no_grad(), fg_inductor.denoising(run_model, steps=10) as run:
        for i in range(10):
            noise = 0
            for branch, text in enumerate(texts):
                torch.compiler.cudagraph_mark_step_begin()
                given = x.clone()
                with run.branch(branch), torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
                    noise = noise + run_model(given, text).clone() / 2
            x = x - 0.3 * noise
            found.append(x)
            run.step()
    masks = [entry.mask for entry in state._entries.values()]
    held = sum(mask.nbytes for mask in masks)
    copies = [(mask + 0).cpu() for mask in masks]
    rows = [row.held for row in fg_inductor.report()]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    del masks
    fg_inductor.reset(run_model)
    freed = before - torch.cuda.memory_allocated()
    torch._dynamo.reset()
    return torch.stack(found), copies, held, freed, rows


@pytest.mark.gpu
@pytest.mark.parametrize("refresh", ["every 3", "drift 0.02"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("compiled", [compile_whole, compile_blocks])
def test_equals_masks_on_the_gpu(compiled, mode, refresh):
    expected, masks, held, freed, rows = gpu_results(compiled, "device", mode, **{"fgattn.refresh": refresh})
    assert held > 0 and (freed >= held or mode != "default")  # CUDA graphs may hold on to what they read
    counters.clear()
    found, others, again, freed, other_rows = gpu_results(compiled, "host", mode, **{"fgattn.refresh": refresh})
    assert torch.equal(found, expected)
    assert len(masks) == 8 and all(torch.equal(a, b) for a, b in zip(masks, others, strict=True))
    assert again == held and other_rows == [dataclasses.replace(row, in_host_memory=True) for row in rows]
    assert freed <= 2 * held / 8  # no more than the copy that is under way, and small change
    if mode == "default":
        assert counters["fgattn"]["fetched ahead"] == 8 * 10 - 9
        assert counters["fgattn"]["fetched when needed"] == 9
    else:
        assert "fetched ahead" not in counters["fgattn"]
        assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [compile_whole, compile_blocks])
def test_what_fits_nowhere_on_a_gpu_moves_to_host_memory(compiled):
    """As fine as it was asked for: the results are those of masks on the GPU."""
    expected, *_ = gpu_results(compiled, "device", "default")
    found, _, _, _, rows = gpu_results(compiled, "device", "default", **{"fgattn.state_bytes": 1})
    assert torch.equal(found, expected)
    assert all(row.in_host_memory and row.n == 8 for row in rows)
