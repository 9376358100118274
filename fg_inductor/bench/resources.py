"""What the compiler makes of each kernel for sm_90, read without a GPU.

    python -m fg_inductor bench resources

Registers and stack of a thread, shared memory of a program, and what its hottest loop holds: tensor-core instructions
(HGMMA: Hopper's own; HMMA: the older), waits for them, 16-byte asynchronous copies, and loads from spilled registers.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from fg_inductor.bench.common import save, show
from fg_inductor.kernels import (
    alike_slices,
    attention_backward_hopper,
    attention_backward_keys,
    attention_backward_slices,
    attention_forward,
    attention_forward_hopper,
    backward_hopper_sums,
    column_lists,
    drift,
    group_means,
    hopper_loader,
    observe,
    observe_heads,
    order_spread,
    select_cut,
    select_cut_packed,
    select_scores,
    work_order,
)

COLUMNS = ["kernel", "variant", "registers", "stack", "shared", "HGMMA", "HMMA", "waits", "copies", "spill loads"]
POINTERS = {
    "lists_ptr": "*i32", "work_ptr": "*i32", "keys_ptr": "*i32", "clean_keys_ptr": "*i32", "clean_ptr": "*i32",
    "mixed_ptr": "*i32", "order_ptr": "*i32", "mask_ptr": "*i32", "limit_ptr": "*i32", "counts_ptr": "*i32",
    "lse_ptr": "*fp32", "bias_ptr": "*fp32", "score_ptr": "*fp16", "row_ptr": "*i32", "tail_bias_ptr": "*fp32",
    "refresh_ptr": "*i1", "due_ptr": "*i1", "flag_ptr": "*i1", "mass_ptr": "*fp32", "part_ptr": "*fp32",
    "group_keys_ptr": "*fp32", "block_keys_ptr": "*fp32", "block_bias_ptr": "*fp32",
    "statistics_ptr": "*fp32", "dk_sum_ptr": "*fp32", "dv_sum_ptr": "*fp32", "dtail_k_ptr": "*fp32",
    "dtail_v_ptr": "*fp32", "slots_ptr": "*i32", "joined_ptr": "*fp32", "orders_ptr": "*i32",
    "alike_ptr": "*i32", "slices_ptr": "*i32",
}  # fmt: skip
TUPLES = {"shares": ("fp32",) * 3}
BOXES = {"k_desc": "BOX", "v_desc": "BOX", "tail_k_desc": "BLOCK_N", "tail_v_desc": "BLOCK_N"}
FLOATS = ("margin", "scale", "qk_scale", "last_bias", "top_p", "alpha", "gamma", "bound", "reach", "density")


def compile_for_hopper(kernel, constants: dict, **options):
    """The kernel compiled for sm_90; sizes as int32, strides and pointers divisible by 16, tensors bfloat16."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in TUPLES:
            signature[name] = TUPLES[name]
        elif name in BOXES:
            rows = constants[BOXES[name]]
            signature[name] = f"tensordesc<bf16[1, 1, {rows}, 64],{hopper_loader.BOX_SHARED.value!r}>"
        elif name.endswith("_desc"):
            signature[name] = f"tensordesc<fp32[64, 32],{backward_hopper_sums.PIECE_SHARED.value!r}>"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*bf16")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if signature[name][0] == "*" or name.startswith("stride_"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    source = language(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def _cuobjdump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def hottest_loop(sass: str) -> list[str]:
    """Instructions of the innermost loop with the most tensor-core work (of equal ones the shortest: it masks nothing),
    else of the longest loop; loops end in backward branches."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    code = [(int(address, 16), text) for address, text in found]
    spans = []
    for address, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    spans = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    loops = [[x for a, x in code if first <= a <= last] for first, last in spans] or [[]]

    def heat(body):
        products = sum("MMA" in x for x in body)
        return products, -len(body) if products else len(body)

    return max(loops, key=heat)


def resources(kernel, variant: str, constants: dict, **options) -> dict:
    """A row of the table."""
    compiled = compile_for_hopper(kernel, constants, **options)
    usage = _cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    loop = hottest_loop(_cuobjdump(compiled.asm["cubin"], "--dump-sass"))
    return {
        "kernel": kernel.__name__,
        "variant": variant,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "HGMMA": sum("HGMMA" in x for x in loop),
        "HMMA": sum(bool(re.search(r"\bHMMA", x)) for x in loop),
        "waits": sum("WARPGROUP.DEPBAR" in x for x in loop),
        "copies": sum("LDGSTS" in x and ".128" in x for x in loop),
        "spill loads": sum("LDL" in x for x in loop),
    }


def _words(**flags: bool) -> str:
    """The names of the flags that are on, each behind a space."""
    return "".join(f" {name}" for name, on in flags.items() if on)


def _absent(**there: bool) -> dict:
    """The pointers to what is not there: None."""
    return {name: None for name, it_is in there.items() if not it_is}


def _inputs(bias: bool, order: bool, tail: bool) -> dict:
    """What an attention kernel is told of its optional inputs."""
    absent = _absent(bias_ptr=bias, order_ptr=order, tail_k_ptr=tail, tail_v_ptr=tail, tail_bias_ptr=tail)
    return dict(HAS_BIAS=bias, HAS_ORDER=order, TAIL=tail) | absent


def _gradients(sums: bool, tail: bool) -> dict:
    """What a backward kernel is told of its results: dq, and where ``sums`` what adds up to dk and dv."""
    of_tail = sums and tail
    absent = _absent(dk_sum_ptr=sums, dv_sum_ptr=sums, dtail_k_ptr=of_tail, dtail_v_ptr=of_tail)
    return dict(WANT_Q=True, WANT_K=sums, WANT_V=sums) | absent


def attention(m: int, n: int, d: int, *, bias=False, order=False, tail=False) -> dict:
    """``attention_forward`` as its launcher configures it."""
    config = attention_forward.configuration(torch.bfloat16, d, m)
    warps = config.pop("num_warps")
    constants = dict(D=d, BLOCK_D=triton.next_power_of_2(d), M=m, N=n, WIDE=False, PRECISION="tf32", **config)
    constants |= _inputs(bias, order, tail)
    flags = _words(bias=bias, order=order, tail=tail)
    return resources(attention_forward._attention_fwd, f"{m}x{n} D {d}{flags}", constants, num_warps=warps)


def hopper(m: int, n: int, d: int, *, bias=False, order=False, tail=False) -> dict:
    """``attention_forward_hopper`` as its launcher configures it."""
    config = attention_forward_hopper.configuration(d, m, 1 if bias else n)
    registers = config.pop("maxnreg")
    constants = dict(D=d, BLOCK_D=triton.next_power_of_2(d), M=m, N=n, WIDE=False, NEGATIVE=False, **config)
    boxes, alike = config["BOX"] > 0, m < 64 and not order
    constants["ALIKE"] = alike
    constants |= _inputs(bias, order, tail) | _absent(k_desc=boxes, v_desc=boxes)
    constants |= _absent(tail_k_desc=boxes and tail, tail_v_desc=boxes and tail, alike_ptr=alike)
    flags = _words(bias=bias, order=order, tail=tail)
    kernel = attention_forward_hopper._attention_fwd_hopper
    return resources(kernel, f"{m}x{n} D {d}{flags}", constants, num_warps=4, maxnreg=registers)


def backward_by_slices(m: int, n: int, d: int, *, bias=False, order=False, tail=False, sums=True) -> dict:
    """``attention_backward_slices`` as its launcher configures it; without ``sums`` for dq alone."""
    config = attention_backward_slices.configuration(torch.bfloat16, d, m, sums)
    warps = config.pop("num_warps")
    constants = dict(D=d, BLOCK_D=triton.next_power_of_2(d), M=m, N=n, WIDE=False, PRECISION="tf32")
    constants |= _inputs(bias, order, tail) | _gradients(sums, tail) | config
    variant = f"{m}x{n} D {d}{_words(bias=bias, order=order, tail=tail, dq=not sums)}"
    return resources(attention_backward_slices._attention_bwd_slices, variant, constants, num_warps=warps)


def backward_hopper(m: int, n: int, d: int, *, bias=False, order=False, tail=False, sums=True, bulk=False) -> dict:
    """``attention_backward_hopper`` as its launcher configures it; without ``sums`` for dq alone."""
    config = attention_backward_hopper.configuration(d, m, bulk)
    registers = config.pop("maxnreg")
    constants = dict(D=d, BLOCK_D=triton.next_power_of_2(d), N=n, WIDE=False, **config)
    constants |= _inputs(bias, order, tail) | _gradients(sums, tail)
    constants |= _absent(dk_desc=bulk, dv_desc=bulk)
    variant = f"{m}x{n} D {d}{_words(bias=bias, order=order, tail=tail, bulk=bulk, dq=not sums)}"
    kernel = attention_backward_hopper._attention_bwd_hopper
    return resources(kernel, variant, constants, num_warps=4, maxnreg=registers)


def backward_by_keys(m: int, n: int, d: int) -> dict:
    """``attention_backward_keys`` as its launcher configures it."""
    config = attention_backward_keys.configuration(torch.bfloat16, d, m)
    warps = config.pop("num_warps")
    constants = dict(D=d, BLOCK_D=triton.next_power_of_2(d), M=m, N=n, PRECISION="tf32", WANT_K=True, WANT_V=True)
    constants |= dict(HAS_BIAS=False, HAS_ORDER=False, SUMMARIES=False, **config)
    constants |= dict.fromkeys(("bias_ptr", "order_ptr", "tail_bias_ptr"))
    return resources(attention_backward_keys._attention_bwd_keys, f"{m}x{n} D {d}", constants, num_warps=warps)


def observing(m: int, n: int, d: int, *, bias=False, order=False, reduce="sum") -> dict:
    """``observe._column_mass`` as its launcher configures it."""
    config = observe.configuration(torch.bfloat16, d, n)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    constants = dict(D=d, BLOCK_D=triton.next_power_of_2(d), M=m, N=n, PRECISION="tf32", MAX=reduce == "max", **config)
    constants |= dict(HAS_BIAS=bias, HAS_ORDER=order)
    constants |= _absent(bias_ptr=bias, order_ptr=order)
    flags = _words(bias=bias, order=order, max=reduce == "max")
    return resources(observe._column_mass, f"{m}x{n} D {d}{flags}", constants, **options)


def sampling(n: int, d: int) -> dict:
    """``drift._sample`` as its launcher configures it."""
    options = drift.configuration(torch.bfloat16, d)
    constants = dict(D=d, BLOCK_D=triton.next_power_of_2(d), M=128, N=n, PRECISION="tf32", UNLESS=1)
    constants |= dict(SAMPLES=drift.SAMPLES, KEYS=drift.KEYS, HAS_BIAS=False, HAS_ORDER=True, bias_ptr=None)
    constants |= dict(HAS_SLOTS=False, slots_ptr=None)
    return resources(drift._sample, f"128x{n} D {d} order", constants, **options)


def sharing(heads: int) -> list[dict]:
    """The kernels of ``observe_heads`` as their launcher configures them."""
    constants = observe_heads.configuration(heads)
    warps, side = constants.pop("num_warps"), constants["TILE"] * constants["TILES"]
    return [
        resources(observe_heads._agreement, f"{heads} heads", constants, num_warps=warps),
        resources(observe_heads._merge, f"{heads} heads", dict(SIDE=side), num_warps=4 if side < 64 else side // 8),
    ]


def table() -> list[dict]:
    """Every kernel in the variants that matter."""
    rows = [attention(m, 8, 128) for m in (128, 64, 32, 16)]
    rows += [attention(128, 1, 128), attention(128, 8, 64), attention(128, 8, 96)]
    rows += [attention(128, 8, 128, **{flag: True}) for flag in ("bias", "order", "tail")]
    rows += [backward_by_slices(m, 8, 128) for m in (128, 64, 32, 16)]
    rows += [backward_by_slices(128, 1, 128), backward_by_slices(128, 8, 64), backward_by_slices(128, 8, 96)]
    rows += [backward_by_slices(128, 8, 128, **{flag: True}) for flag in ("bias", "order", "tail")]
    rows += [backward_by_slices(128, 64, 128, sums=False), backward_by_slices(128, 8, 256)]
    rows += [backward_by_keys(128, 64, 128), backward_by_keys(128, 8, 128), backward_by_keys(128, 128, 256)]
    rows += [hopper(128, 1, 128), hopper(64, 8, 128), hopper(16, 8, 128), hopper(128, 8, 64), hopper(128, 8, 96)]
    rows += [hopper(128, 8, 128, bias=True), hopper(128, 8, 128, order=True, tail=True)]
    rows += [hopper(128, 16, 128), hopper(64, 128, 128), hopper(16, 64, 96, tail=True)]
    rows += [backward_hopper(128, 1, 128), backward_hopper(64, 8, 128), backward_hopper(128, 8, 96)]
    rows += [backward_hopper(128, 8, 128, bias=True), backward_hopper(128, 8, 128, order=True, tail=True)]
    rows.append(backward_hopper(128, 64, 128, sums=False))
    rows += [backward_hopper(128, 64, d, bulk=True) for d in (128, 96, 64)]
    rows.append(backward_hopper(128, 64, 128, bias=True, order=True, tail=True, bulk=True))
    lists = dict(N=8, SUB=1, BLOCK=column_lists.BLOCK, BLOCK_W=128, SUMMARY=128, TAIL=False, HAS_BIAS=False)
    absent = dict.fromkeys(("clean_ptr", "mixed_ptr", "group_keys_ptr", "block_keys_ptr", "block_bias_ptr"))
    alone = lists | absent | {"alike_ptr": None}
    rows.append(resources(column_lists._column_lists, "N 8", alone | {"tail_bias_ptr": None}))
    rows.append(resources(column_lists._column_lists, "N 1 tail", alone | {"N": 1, "TAIL": True}))
    shared = lists | absent | {"SUB": 8, "BLOCK": column_lists.block_of(8), "TAIL": True}
    rows.append(resources(column_lists._column_lists, "N 8 of 8 slices tail", shared))
    filling = dict(SUB=8, STEP=1, WINDOW=alike_slices.WINDOW, WORDS=alike_slices.WORDS)
    filling["COMPARED"] = alike_slices.COMPARED
    rows.append(resources(alike_slices._alike_slices, "tiles of 8", filling, **alike_slices.OPTIONS))
    order = dict(BLOCK=work_order.BLOCK, BLOCK_H=16, BLOCK_X=256)
    rows.append(resources(work_order._work_order, "", order, num_warps=4))
    rows += [sampling(8, 128), sampling(1, 128)]
    rows += [observing(128, 8, 128), observing(128, 1, 128), observing(32, 8, 128), observing(128, 8, 64)]
    rows += [observing(128, 8, 128, bias=True, order=True, reduce="max"), observing(128, 128, 256)]
    rows += [*sharing(12), *sharing(40), resources(observe_heads._join, "", dict(BLOCK=observe_heads.JOINED))]
    rows.append(resources(order_spread._spread, "D 128", dict(D=128, M=128, COLUMNS=order_spread.COLUMNS)))
    choosing = dict(C=3, BLOCK_C=4, BLOCK_S=32, HEADS=64, COPIED=order_spread.COPIED)
    rows.append(resources(order_spread._take, "", choosing))
    means = dict(D=128, BLOCK_D=128, POOL=16, BLOCK_R=8, N=8, BLOCK_G=16)
    means |= dict(HAS_ORDER=True, HAS_BIAS=False, BOOL=False, bias_ptr=None)
    for name, joined in (("", (0, 0)), (" gamma", (8, 1))):
        constants = means | dict(zip(("Q_JOINED", "K_JOINED"), joined, strict=True))
        rows.append(resources(group_means._group_means, f"pool 16 order, N 8{name}", constants))
    scoring = dict(D=128, BLOCK_D=128, HAS_BIAS=False, PRECISION="tf32", bias_ptr=None)
    config = select_scores.row_lse_configuration(torch.bfloat16, 128)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    rows.append(resources(select_scores._row_lse, "D 128", scoring | config, **options))
    for p, name in ((8, ""), (1, ""), (8, " max"), (1, " ranked")):
        config = select_scores.scores_configuration(torch.bfloat16, 128, p)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in config}
        constants = scoring | config | dict(P=p, SPLITS=2, WIDE=False, MAX=name == " max", RANKED=name == " ranked")
        constants |= _absent(lse_ptr=name != " ranked")
        rows.append(resources(select_scores._scores, f"D 128 P {p}{name}", constants, **options))
    choice = dict(M=128, N=8, HAS_BIAS=False, HAS_ORDER=False, HAS_FORCED=False, HAS_DENSE=False)
    choice |= dict(order_ptr=None, dense_keys=(), dense_queries=(), refresh_ptr=None, HAS_REFRESH=False, BY_HEAD=False)
    for groups in (4095, 32_760, 75_600):
        words = (groups + 127) // 128 * 4
        for name, mass, alpha in (("top-p", True, False), ("alpha", False, True)):
            config = select_cut.configuration(words, wide=False)
            warps = config.pop("num_warps")
            constants = choice | config | dict(WIDE=False, COUNT=False, MASS=mass, ALPHA=alpha)
            rows.append(resources(select_cut._cut, f"{groups} groups {name}", constants, num_warps=warps))
        config = select_cut_packed.configuration(words)
        warps = config.pop("num_warps")
        kernel = select_cut_packed._cut_packed
        rows.append(resources(kernel, f"{groups} groups density", choice | config, num_warps=warps))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fg_inductor bench resources", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", help="a JSON file for the rows")
    args = parser.parse_args(argv)
    rows = table()
    show(rows, COLUMNS)
    save(rows, args.out)


if __name__ == "__main__":
    main()
