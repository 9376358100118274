"""The attention kernels against float64: one table of cases for both; the portable one in Triton's interpreter where
there is no GPU, the one for Hopper on a Hopper GPU only."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch

from fg_inductor.kernels import attention_forward, column_lists, work_order
from fg_inductor.kernels.mask import GROUPS, SLICES, group_count, pack, unpack, word_count
from fg_inductor.testing import assert_as_accurate
from fg_inductor.testing_cases import CASES, Case, make_groups, reference_result

CUDA = torch.cuda.is_available()
# The interpreter's dot does not know bfloat16.
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float32,)


HOPPER_DTYPES = (torch.bfloat16, torch.float16)


def portable(*arguments):
    return attention_forward.launch(*arguments)


def hopper(*arguments, **override):
    from fg_inductor.kernels import attention_forward_hopper

    return attention_forward_hopper.launch(*arguments, **override)


needs_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA and torch.cuda.get_device_capability() == (9, 0)), reason="needs a Hopper GPU"),
]
KERNELS = [pytest.param(portable, id="portable"), pytest.param(hopper, id="hopper", marks=needs_hopper)]


def dtype_of(launch) -> torch.dtype:
    return torch.bfloat16 if launch is hopper else torch.float32


def of_both(cases, dtypes):
    """Every (launcher, case, dtype) that the launcher is for."""
    rows = [pytest.param(portable, case, dtype, id=f"portable-{dtype}-{case}") for case in cases for dtype in dtypes]
    hoppers = [(case, dtype) for case in cases if case.dim <= 128 for dtype in HOPPER_DTYPES]
    return rows + [pytest.param(hopper, *row, id=f"hopper-{row[1]}-{row[0]}", marks=needs_hopper) for row in hoppers]


def check(launch, case: Case, dtype: torch.dtype, device: str) -> None:
    expected = reference_result(case, dtype, device)
    out, lse = launch(*expected.arguments)
    assert out.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
    assert_as_accurate(out, expected.plain_out, expected.exact_out, "out")
    assert_as_accurate(lse, expected.plain_lse, expected.exact_lse, "lse")


@pytest.mark.parametrize(("launch", "case", "dtype"), of_both(CASES, DTYPES))
def test_cases(launch, case, dtype, device, poison):
    check(launch, case, dtype, device)


@pytest.mark.parametrize("launch", [KERNELS[1]])
@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("case", [c for c in CASES if c.m < 64 and c.dim <= 128], ids=str)
def test_matched_or_not(case, matched, launch, device, poison):
    """Which slices share a tile is no matter of the result, with a query order or without."""
    check(functools.partial(launch, ALIKE=matched), case, torch.bfloat16, device)


@pytest.mark.parametrize("case", [c for c in CASES if c.id in ("dim-128", "tail-n8", "ordered")], ids=str)
def test_half_precision(case, device, poison):
    check(portable, case, torch.float16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("launch", KERNELS)
@pytest.mark.parametrize("tail", ["none", "pooled"])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("n", GROUPS)
@pytest.mark.parametrize("m", SLICES)
def test_every_slice_shape(m, n, dim, tail, launch, device, poison):
    case = Case(f"{m}x{n}", m=m, n=n, dim=dim, tail=tail, queries=1000, keys=1100, ordered=True)
    check(launch, case, torch.bfloat16, device)


@pytest.mark.parametrize("launch", [KERNELS[1]])
@pytest.mark.parametrize("m", SLICES)
@pytest.mark.parametrize("n", [1, 16])  # keys one by one, and boxes of them
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 129), (129, 63), (32761, 2049)])
def test_lengths(launch, queries, keys, n, m, device, poison):
    check(launch, Case("", m=m, n=n, queries=queries, keys=keys, dim=128, density=0.5), torch.bfloat16, device)


@pytest.mark.parametrize("launch", [KERNELS[1]])
@pytest.mark.parametrize("m", SLICES)
@pytest.mark.parametrize("n", [1, 8, 128])
def test_repeats_are_identical(launch, n, m, device):
    """Many CTAs, each with tiles enough to fill the pipeline several times over: no run may differ in a bit."""
    case = Case("", m=m, n=n, heads=4, kv_heads=2, queries=4500, keys=5000, dim=128, tail="pooled", ordered=True)
    arguments = reference_result(case, torch.bfloat16, device).arguments
    first = launch(*arguments)
    different = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(200):
        for a, b in zip(launch(*arguments), first, strict=True):
            different += (a != b).sum()
    assert different.item() == 0


@pytest.mark.parametrize("launch", KERNELS)
def test_heads_in_chunks(launch, device, poison, monkeypatch):
    """A workspace for one head at a time must not change what a head reads or writes."""
    case = next(c for c in CASES if c.id == "ordered-batch-2")
    monkeypatch.setattr(attention_forward, "LIST_BYTES", 1)
    check(launch, case, dtype_of(launch), device)
    check(launch, replace(case, m=16, ordered=False, tail="pooled"), dtype_of(launch), device)  # matched, head by head


def test_offsets_beyond_32_bits(device, monkeypatch):
    """The int64 path gives the same bits as the int32 path."""
    expected = reference_result(CASES[0], torch.float32, device)
    plain, _ = attention_forward.launch(*expected.arguments)
    wide, _ = attention_forward.launch(*expected.arguments, WIDE=True)
    assert torch.equal(plain, wide)


@pytest.mark.parametrize("n", [8, 64])
@pytest.mark.parametrize("token", [67, 69])  # 69: the key that lanes past the end of the list read again
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("launch", KERNELS)
def test_not_finite(launch, where, value, token, n, device, poison):
    """At density 1.0 NaN and Inf come out where dense attention has them, and nowhere hang or fault."""
    case = Case("full", m=32, n=n, keep="full", queries=70, keys=70, layout="contiguous")
    expected = reference_result(case, dtype_of(launch), device)
    q, k, v, *rest = expected.arguments
    {"q": q, "k": k, "v": v}[where][0, 1, token, 3] = value
    out, _ = launch(q, k, v, *rest)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=expected.scale)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=expected.scale)
    assert_as_accurate(out, dense, exact)


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("case", [c for c in CASES if c.id in ("bias-padding", "bias-float", "tail-padding")], ids=str)
@pytest.mark.parametrize("launch", KERNELS)
def test_masked_keys_have_no_say(launch, case, where, device, poison):
    """Padding may hold anything, NaN too, also where it shares a kept group with keys that are visible."""
    expected = reference_result(case, dtype_of(launch), device)
    q, k, v, mask, key_bias, *rest = expected.arguments
    k, v = k.clone(), v.clone()
    masked = ~key_bias if key_bias.dtype == torch.bool else key_bias == -torch.inf
    {"k": k, "v": v}[where].transpose(1, 2)[masked] = torch.nan
    out, lse = launch(q, k, v, mask, key_bias, *rest)
    assert_as_accurate(out, expected.plain_out, expected.exact_out, "out")
    assert_as_accurate(lse, expected.plain_lse, expected.exact_lse, "lse")


@pytest.mark.parametrize("tail", ["none", "pooled"])
@pytest.mark.parametrize("launch", KERNELS)
def test_dropped_keys_are_not_read(launch, tail, device, poison):
    """NaN in keys that no slice keeps cannot reach the result without a tail, and only through means with one."""
    case = Case("dropped", m=32, n=8, queries=70, keys=300, tail=tail, layout="contiguous")
    expected = reference_result(case, dtype_of(launch), device)
    q, k, v, mask, *rest = expected.arguments
    keep = torch.ones(1, 2, 3, group_count(300, 8), dtype=torch.bool)
    keep[..., 4] = False
    mask = pack(keep, word_count(300, 8)).to(device)
    k[:, :, 32:40] = v[:, :, 32:40] = torch.nan
    out, _ = launch(q, k, v, mask, *rest)
    assert out.isnan().any().item() == (tail == "pooled")


@pytest.mark.parametrize("launch", KERNELS)
def test_heads_that_share_keys_by_a_stride_of_0(launch, device, poison):
    """What the copy engine can't be told of gives the same as a copy of it."""
    case = Case("", m=64, n=16, heads=3, kv_heads=3, queries=140, keys=200, dim=128)
    q, k, v, *rest = reference_result(case, dtype_of(launch), device).arguments
    k, v = (x[:, :1].expand(-1, 3, -1, -1) for x in (k, v))
    for a, b in zip(launch(q, k, v, *rest), launch(q, k.contiguous(), v.contiguous(), *rest), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 8, 128])
@pytest.mark.parametrize("keep", ["random", "full", "none", "single"])
@pytest.mark.parametrize("sub", [1, 4])
@pytest.mark.parametrize("matched", [False, True])
def test_column_lists(matched, sub, keep, n, device, poison):
    """Ascending ids of what any slice of a tile keeps, and which slices keep it; 18 slices are no multiple of 4."""
    case = Case(keep, m=16, n=n, queries=280, keys=2100 if n > 1 else 9000, keep=keep, density=0.02)
    groups = make_groups(case)
    mask = pack(groups, word_count(case.keys, n)).to(device)
    alike = None
    if matched:  # another permutation for each head
        alike = torch.rand(groups.shape[:3], generator=torch.Generator().manual_seed(2)).argsort(-1)
        groups = groups.take_along_dim(alike[..., None], 2)
        alike = alike.to(device, torch.int32)
    lists, kept, clean, _ = column_lists.launch(mask, case.keys, n, sub, alike=alike)
    assert torch.equal(kept, clean)
    tiles = torch.nn.functional.pad(groups, (0, 0, 0, -groups.shape[2] % sub)).unflatten(2, (-1, sub))
    size = torch.full((groups.shape[-1],), n)
    size[-1] = case.keys - n * (groups.shape[-1] - 1)
    assert torch.equal(kept.cpu().long(), (tiles.any(3) * size).sum(-1))
    for row, tile in zip(lists.cpu().flatten(0, 2), tiles.flatten(0, 2), strict=True):
        ids = tile.any(0).nonzero()[:, 0]
        bits = (tile[:, ids] << torch.arange(24, 24 + sub)[:, None]).sum(0) if sub > 1 else 0
        assert torch.equal(row[: len(ids)].long(), ids + bits)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [1, 8])
def test_tail_of_matched_slices(n, bias, device, poison):
    """What each slice dropped, in the order of the tiles: as without one, each at its new place."""
    mask = pack(torch.rand(2, 2, 18, group_count(700, n)) < 0.4, word_count(700, n)).to(device)
    alike = torch.rand(2, 2, 18).argsort(-1).to(device, torch.int32)
    key_bias = torch.randn(2, 700, device=device) if bias else None
    plain = column_lists.launch(mask, 700, n, 8, tail=True, bias=key_bias).tail_bias
    moved = column_lists.launch(mask, 700, n, 8, tail=True, bias=key_bias, alike=alike).tail_bias
    assert torch.equal(moved, plain.take_along_dim(alike.long()[..., None], 2))


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize(("n", "keys"), [(1, 5000), (8, 5003), (128, 700)])
def test_column_lists_under_a_key_bias(n, keys, padding, device, poison):
    """Groups without a masked key first, mixed ones (the ragged last one too) behind them, masked ones nowhere."""
    case = Case("", m=32, n=n, batch=2, queries=70, keys=keys, density=0.5)
    groups = make_groups(case)
    visible = torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) < 0.97
    visible[:, 300:440] = False
    visible[1, :200] = True
    bias = torch.zeros(2, keys).masked_fill(~visible, -torch.inf).to(device)
    mask = pack(groups, word_count(keys, n)).to(device)
    made = column_lists.launch(mask, keys, n, bias=bias, padding=padding)
    members = torch.nn.functional.pad(visible, (0, -keys % n)).unflatten(1, (-1, n))
    size = torch.full((groups.shape[-1],), n)
    size[-1] = keys - n * (groups.shape[-1] - 1)
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).tolist():
        kept = groups[b, h, t] & members[b].any(-1)
        clean = kept & members[b].all(-1) & padding
        ids = torch.cat([clean.nonzero()[:, 0], (kept & ~clean).nonzero()[:, 0]])
        assert made.lists[b, h, t, : len(ids)].tolist() == ids.tolist()
        assert made.keys[b, h, t] == size[kept].sum() and made.clean[b, h, t] == clean.sum() * n


def test_mask_of_strided_heads(device):
    """A slice of the mask's heads is expanded without a copy."""
    groups = torch.rand(2, 3, 2, 300) < 0.4
    mask = pack(groups, word_count(300, 1)).to(device)
    lists, kept, *_ = column_lists.launch(mask[:, 1:], 300, 1)
    rebuilt = torch.zeros(2, 2, 2, 300, dtype=torch.bool)
    for index in torch.cartesian_prod(*map(torch.arange, (2, 2, 2))).tolist():
        rebuilt[tuple(index)][lists[tuple(index)][: kept[tuple(index)]].long().cpu()] = True
    assert torch.equal(rebuilt, groups[:, 1:])
    assert torch.equal(unpack(mask, 300).cpu(), groups)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 3, 700)])
def test_work_order(shape, device, poison):
    """Heads by what they keep in all, tiles of a head by what they keep; equal ones by index."""
    keys = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    keys[..., 0, :] = 3
    clean = torch.arange(keys.numel(), dtype=torch.int32).view(shape)
    work = work_order.launch(keys.to(device), clean.to(device)).cpu().long()
    heads = keys.flatten(0, 1).long()
    ranked = sorted(range(len(heads)), key=lambda h: -heads[h].sum())
    expected = [(h * shape[2] + x, heads[h, x]) for h in ranked for x in heads[h].sort(descending=True, stable=True)[1]]
    assert work[:-1, :3].tolist() == [[int(index), int(kept), int(index)] for index, kept in expected]
    assert work[-1, 0] == 0


# What the copy engine is told


def test_boxes_make_up_a_tile():
    """Boxes are whole groups or parts of one, repeat the swizzle of 8 rows, and 1 key at a time makes none."""
    from fg_inductor.kernels.attention_forward_hopper import configuration

    for m, n, d in itertools.product(SLICES, GROUPS, (64, 96, 128)):
        config = configuration(d, m, n)
        rows = config["BOX"]
        if n < 8:
            assert rows == 0 and config["PRODUCER_WARPS"] == 4
        else:
            assert config["BLOCK_N"] % rows == 0 and rows % 8 == 0 and config["PRODUCER_WARPS"] == 1
            assert n % rows == 0


def test_descriptors():
    """Strides of dimensions of size 1 mean nothing and may be odd; what repeats or is empty has no descriptor."""
    from fg_inductor.kernels.attention_forward_hopper import boxes, loadable

    fused = torch.zeros(2, 40, 3, 4, 64, dtype=torch.bfloat16)  # B, S, q k v, H, D
    k = fused[:, :, 1].transpose(1, 2)
    assert loadable(k)
    made = boxes(k, 16)
    assert (
        made.shape == [2, 4, 40, 64] and made.strides == [40 * 768, 64, 768, 1] and made.block_shape == [1, 1, 16, 64]
    )
    assert made.base.data_ptr() == k.data_ptr()
    one = torch.zeros(40 * 64, dtype=torch.bfloat16).as_strided((1, 1, 40, 64), (7, 3, 64, 1))
    assert loadable(one) and boxes(one, 8).strides == [16, 16, 64, 1]
    assert not loadable(k[:, :1].expand(-1, 4, -1, -1)) and not loadable(k[:, :, :0])
    assert boxes(None, 8) is None
