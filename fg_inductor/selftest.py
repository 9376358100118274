"""Does it work on this machine, and what does it gain? ``python -m fg_inductor selftest``, in under two minutes.

A table of checks: the attention kernels that this device has, on a choice of the cases that tests use (error against
float64 within twice that of PyTorch's own attention in the same dtype); the selector on keys whose answer is known; the
gradients; a compiled module against eager PyTorch. Then the time of one attention call, dense and sparse. Where a check
fails, the exit code is 1 and its message is printed in full.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate

from fg_inductor import device_constants
from fg_inductor.kernels import choice, ops
from fg_inductor.kernels.mask import unpack
from fg_inductor.passes.selector import order_of_calls
from fg_inductor.settings import Settings
from fg_inductor.testing import assert_as_accurate, poison
from fg_inductor.testing_cases import CASES, Case, reference_gradients, reference_result

# Both default and single-key slices, masks, orders, tails, grouped heads, slices that keep nothing.
CHOSEN = ("dim-128", "full", "gqa-4-2", "bias-padding", "ordered-batch-2", "empty-slices", "tail-n8", "tail-padding")
# Heads, token grid and head dim of the call that is timed: Wan 2.1 1.3B at 480p, 81 frames; on a CPU a piece of that.
TIMED = {"cuda": (12, (21, 30, 52), 128), "cpu": (2, (8, 20, 24), 128)}
DENSITIES = (0.3, 0.15)


class Check(NamedTuple):
    """A row of the table. error: why it failed, None where it passed."""

    name: str
    kernel: str
    error: str | None
    seconds: float


def checks(device: str) -> Iterator[Check]:
    """Run all checks, one by one."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for kernel in kernels(device):
        for case in CASES:
            if case.id in CHOSEN:
                yield _run(f"attention, {case}", kernel, lambda c=case, k=kernel: _attention(c, k, dtype, device))
    own = "portable" if device == "cuda" else "reference"
    yield _run("selection finds what was planted", own, lambda: _selection(dtype, device))
    yield _run("query order is a permutation", own, lambda: _order(device))
    yield _run("gradients", "as chosen", lambda: _gradients(device))
    yield _run("a compiled module", "as chosen", lambda: _compiled(device))


def kernels(device: str) -> list[str]:
    """The attention kernels that this device has, the one that is chosen first."""
    if device == "cpu":
        return ["reference"]
    hopper = choice._hopper(torch.device(device, torch.cuda.current_device()))
    return ["portable"] if isinstance(hopper, str) else ["hopper", "portable"]


def why_not_hopper(device: str) -> str:
    """Why the kernel for Hopper is not among them; empty where it is."""
    if device == "cpu":
        return ""
    found = choice._hopper(torch.device(device, torch.cuda.current_device()))
    return found if isinstance(found, str) else ""


def _run(name: str, kernel: str, check: Callable[[], None]) -> Check:
    start = time.perf_counter()
    try:
        with poison():
            check()
        error = None
    except Exception as failed:  # whatever it is, it is a row of the table, and the exit code
        error = f"{type(failed).__name__}: {failed}"
    return Check(name, kernel, error, time.perf_counter() - start)


def _attention(case: Case, kernel: str, dtype: torch.dtype, device: str) -> None:
    expected = reference_result(case, dtype, device)
    forced = "auto" if kernel == "reference" else kernel
    out, lse = ops.attention(*expected.arguments, 0, forced)
    assert_as_accurate(out, expected.plain_out, expected.exact_out, "out")
    assert_as_accurate(lse, expected.plain_lse, expected.exact_lse, "lse")


def _selection(dtype: torch.dtype, device: str) -> None:
    """Each slice's queries point to two groups of keys of its own: a density of two groups keeps these."""
    m, n, slices, dim = 128, 8, 4, 64
    groups = 2 * slices
    axes = 8 * torch.eye(dim)[:groups]
    k = axes.repeat_interleave(n, 0).view(1, 1, groups * n, dim).to(device, dtype)
    q = (axes[::2] + axes[1::2]).repeat_interleave(m, 0).view(1, 1, slices * m, dim).to(device, dtype)
    mask = ops.select_pooled(q, k, None, None, dim**-0.5, m, n, 16, 0.9, 2 / groups, 1.0, [], [], 0)
    keep = torch.eye(slices, dtype=torch.bool).repeat_interleave(2, 1)[None, None]
    if not torch.equal(unpack(mask.cpu(), groups), keep):
        raise AssertionError(f"kept groups {unpack(mask.cpu(), groups)[0, 0].int().tolist()}, not two a slice in turn")
    density = ops.kept_density(mask, None, slices * m, groups * n, m, n).item()
    if abs(density - 2 / groups) > 1e-6:
        raise AssertionError(f"kept density {density}, not {2 / groups}")


def _order(device: str) -> None:
    order, on_cpu = (ops.query_order(5, 14, 22, 3, 7, 128, torch.device(on)).cpu() for on in (device, "cpu"))
    if not torch.equal(order.sort().values, torch.arange(len(order), dtype=torch.int32)):
        raise AssertionError("a query is missing, or twice in it")
    if not torch.equal(order, on_cpu):
        raise AssertionError("it differs from that of the CPU")


def _gradients(device: str) -> None:
    """In float32 and of a case with grouped heads, a tail and a float bias."""
    case = next(c for c in CASES if c.id == "tail-float-gqa")
    expected = reference_result(case, torch.float32, device)
    qkv = [x.detach().requires_grad_() for x in expected.arguments[:3]]
    out = ops.attention(*qkv, *expected.arguments[3:], 0)[0]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    exact, plain = reference_gradients(expected.arguments, dout)
    for name, *values in zip(("dq", "dk", "dv"), torch.autograd.grad(out, qkv, dout), plain, exact, strict=True):
        assert_as_accurate(*values, name)


@torch.no_grad()
def _compiled(device: str) -> None:
    """With everything kept, a module compiled by Inductor and fgattn is as accurate as in eager mode."""
    import fg_inductor
    from fg_inductor.toy_models import Stack, tokens

    torch.manual_seed(0)
    model, x = Stack(2).to(device), tokens(300).to(device)
    options = {"fgattn.density": 1.0, "fgattn.min_seq": 1, "fgattn.when": "always", "fgattn.quiet": True}
    before = fg_inductor.report().rewritten
    actual = torch.compile(model, backend="fgattn", options=options)(x)
    if fg_inductor.report().rewritten != before + 2:
        raise AssertionError(f"its two attention sites were not rewritten:\n{fg_inductor.report()}")
    assert_as_accurate(actual, model(x), Stack.forward(model.double(), x.double()))


# Speed


@torch.no_grad()
def speed(device: str) -> list[dict]:
    """One attention call of ``TIMED``: milliseconds dense, and sparse with selection, by the backend's defaults."""
    heads, grid, dim = TIMED[device]
    tokens, dtype = grid[0] * grid[1] * grid[2], torch.bfloat16 if device == "cuda" else torch.float32
    on, settings = torch.device(device), Settings().with_order(True)
    q, k, v = device_constants._random(heads, tokens, dim, dtype, on)
    scale, m, n = dim**-0.5, settings.m, settings.n
    order_of = order_of_calls(settings, grid, on)

    def attend():
        return F.scaled_dot_product_attention(q, k, v)

    dense, _ = device_constants.device_and_host_ms(attend, on, attend)
    found = []
    for density in DENSITIES:
        choose = (scale, m, n, settings.queries_per_mean, 0.9, density, 1.0, [], [], 0)

        def run(choose=choose):
            order = order_of(q)
            keys, values = (ops.reorder(x, order) for x in (k, v))
            mask = ops.select_pooled(q, keys, None, order, *choose)
            return ops.attention(q, keys, values, mask, None, order, scale, m, n, settings.tail_kind, 0)

        sparse, _ = device_constants.device_and_host_ms(run, on, attend)
        found.append({"density": density, "dense_ms": dense, "sparse_ms": sparse, "ratio": dense / sparse})
    return found


def main(device: str | None = None) -> int:
    """Print the tables; returns the exit code."""
    from fg_inductor.bench.common import environment

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    start, env = time.perf_counter(), environment()
    print(", ".join(f"{name} {env[name]}" for name in ("card", "torch", "triton", "cudnn", "commit")))
    available = kernels(device)
    print(f"attention kernels: {', '.join(available)}; chosen where a call allows: {available[0]}")
    if why := why_not_hopper(device):
        print(f"the kernel for Hopper can't run: {why}")
    found = []
    for check in checks(device):  # each line as soon as it is known: compilation takes its time
        found.append(check)
        result = "ok" if check.error is None else "FAILED"
        print(f"{check.name:38} {check.kernel:9} {result:6} {check.seconds:5.1f} s", flush=True)
    failed = [c for c in found if c.error is not None]
    for check in failed:
        print(f"\n{check.name} ({check.kernel}): {check.error}")
    if not failed:
        heads, grid, dim = TIMED[device]
        rows = speed(device)
        print(f"\none attention call, {heads} heads, {grid[0] * grid[1] * grid[2]:,} tokens, head dim {dim}:")
        print(tabulate(rows, headers="keys", floatfmt=".3g"))
        if device == "cuda" and rows[0]["ratio"] < 1:
            print("Sparse attention is slower than dense at 0.3 here; 'fgattn.when' leaves such sites dense.")
    print(f"{len(found) - len(failed)} of {len(found)} checks passed in {time.perf_counter() - start:.0f} s")
    return int(bool(failed))
