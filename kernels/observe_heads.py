"""One observed mask for heads that agree: which share one, and their masses together (portable Triton).

    agreement[a, b] = sum over sampled slices t and groups g of sqrt(mass[a, t, g] * mass[b, t, g])
    slots           = clusters of heads, the two with the largest mean agreement merged until K are left
    joined[s, t, g] = sum of mass[h, t, g] over the heads h with slots[h] = s
    mask[s]         = the best groups by joined[s], as ``observe`` chooses them by mass

q, k, lse, order, bias, due   as in ``observe``
mass    [B * Hq, slices, W * 32]  float32 workspace: all heads, and as many slices as fit MASS_BYTES; -1 where masked
joined  [B * K, slices, W * 32]   likewise
parts   [B, chunks, H', H']       float32 workspace, H' heads in whole tiles: the agreement by parts of CHUNK masses
slots   [B, Hq]                   int32, written in place, numbered by the lowest head of each
mask    [B, K, T, W]              int32, written in place

Grids: ``_agreement`` (chunks, tiles of pairs of heads, B), ``_merge`` (B), ``_join`` (slices, blocks of groups, B * K).
Which heads agree is a function of the masses alone: sums have a fixed order, nothing is added by atomics, and of equal
agreements that of the lowest heads is taken. Where ``due`` is False every program ends at once. A sixteenth of the
masses is computed twice, for the sample and again when the heads are known to share. All is float32. Meaning:
``reference_heads``. Measured by ``python -m fg_inductor bench resources``.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fg_inductor.kernels import observe, select_cut
from fg_inductor.kernels.mask import group_count
from fg_inductor.kernels.reference_heads import SAMPLED_BLOCK, sampled_blocks
from fg_inductor.kernels.select_cut import MASKED
from fg_inductor.kernels.sizes import cdiv, next_power_of_2

CHUNK = 8192  # masses of a head in one program of ``_agreement``
JOINED = 1024  # groups in one program of ``_join``

assert SAMPLED_BLOCK == observe.ROWS


@triton.jit
def _roots(mass_ptr, head, H, x, X):
    """Square roots of the masses x [BLOCK] of the heads [TILE]; 0 where masked, not finite or not there."""
    pointers = mass_ptr + head.to(tl.int64)[:, None] * X + x[None, :]
    mass = tl.load(pointers, mask=(head < H)[:, None] & (x < X)[None, :], other=0.0)
    return tl.sqrt(tl.where((mass > 0.0) & (mass < float("inf")), mass, 0.0))


@triton.jit
def _agreement(
    due_ptr, mass_ptr, part_ptr, H, X, first_chunk, chunks,
    TILE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    a = tl.program_id(1) // TILES * TILE
    b = tl.program_id(1) % TILES * TILE
    if (tl.load(due_ptr) == 0) | (b < a):  # each pair once
        return
    entry = tl.program_id(2).to(tl.int64)
    mass_ptr += entry * H * X
    tile = tl.arange(0, TILE)
    total = tl.zeros([TILE, TILE], tl.float32)
    start = tl.program_id(0).to(tl.int64) * CHUNK
    for first in range(0, tl.minimum(X - start, CHUNK).to(tl.int32), BLOCK):
        x = start + first + tl.arange(0, BLOCK)
        total += tl.dot(
            _roots(mass_ptr, a + tile, H, x, X), tl.trans(_roots(mass_ptr, b + tile, H, x, X)), input_precision="ieee"
        )
    side: tl.constexpr = TILE * TILES
    part_ptr += (entry * chunks + first_chunk + tl.program_id(0)) * side * side
    tl.store(part_ptr + ((a + tile)[:, None] * side + (b + tile)[None, :]), total)


@triton.jit
def _merge(due_ptr, part_ptr, slots_ptr, stride_sb, H, K, chunks, SIDE: tl.constexpr):
    if tl.load(due_ptr) == 0:
        return
    entry = tl.program_id(0).to(tl.int64)
    part_ptr += entry * chunks * SIDE * SIDE
    head = tl.arange(0, SIDE)
    a = head[:, None]
    b = head[None, :]
    pair = (a < b) & (b < H)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for i in range(chunks):
        total += tl.load(part_ptr + tl.cast(i, tl.int64) * SIDE * SIDE + a * SIDE + b, mask=pair, other=0.0)
    total += tl.trans(total)

    size = tl.where(head < H, 1.0, 0.0)  # heads of the cluster whose lowest head this is
    owner = head  # the lowest head of the cluster of this one
    for _merged in range(H - K):
        there = pair & (size[:, None] > 0.0) & (size[None, :] > 0.0)
        # Rounded as IEEE says, so that equal means are equal, whatever their clusters' sizes.
        mean = tl.where(there, tl.div_rn(total, tl.maximum(size[:, None] * size[None, :], 1.0)), -1.0)
        i = tl.argmax(tl.max(mean, 1), 0)
        j = tl.argmax(tl.sum(tl.where(a == i, mean, 0.0), 0), 0)
        row = tl.sum(tl.where(a == j, total, 0.0), 0)
        column = tl.sum(tl.where(b == j, total, 0.0), 1)
        total += tl.where(a == i, row[None, :], 0.0) + tl.where(b == i, column[:, None], 0.0)
        grown = tl.sum(tl.where((head == i) | (head == j), size, 0.0), 0)
        size = tl.where(head == i, grown, tl.where(head == j, 0.0, size))
        owner = tl.where(owner == j, i, owner)
    lower = (b < owner[:, None]) & (size[None, :] > 0.0)
    tl.store(slots_ptr + entry * stride_sb + head, tl.sum(lower.to(tl.int32), 1), mask=head < H)


@triton.jit
def _join(due_ptr, mass_ptr, joined_ptr, slots_ptr, stride_sb, H, K, X, row_size, BLOCK: tl.constexpr):
    if tl.load(due_ptr) == 0:
        return
    entry = (tl.program_id(2) // K).to(tl.int64)
    slot = tl.program_id(2) % K
    slots_ptr += entry * stride_sb
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = x < row_size
    x += tl.program_id(0) * row_size
    mass_ptr += entry * H * X
    total = tl.zeros([BLOCK], tl.float32)
    masked = there & (x < 0)
    for h in range(H):
        if tl.load(slots_ptr + h) == slot:
            mass = tl.load(mass_ptr + tl.cast(h, tl.int64) * X + x, mask=there, other=0.0)
            masked = masked | (mass == MASKED)
            total += tl.where(mass == MASKED, 0.0, mass)
    tl.store(joined_ptr + tl.program_id(2).to(tl.int64) * X + x, tl.where(masked, MASKED, total), mask=there)


def configuration(heads: int) -> dict:
    """Heads in a tile of ``_agreement`` and tiles that cover all, masses of a step."""
    tile = max(16, min(32, next_power_of_2(heads)))
    return {"TILE": tile, "TILES": next_power_of_2(cdiv(heads, tile)), "BLOCK": 64, "CHUNK": CHUNK, "num_warps": 4}


def agreement_of(
    column_mass: Callable, mass: Tensor, samples: list[range], B: int, H: int, in_block: int, due: Tensor
) -> Tensor:
    """[B, chunks, H', H']: how much heads agree in these blocks of queries, a list for each filling of ``mass``; the
    sum over the chunks says it, above the diagonal."""
    config, row = configuration(H), mass.shape[2]
    chunks = [cdiv(len(blocks) * in_block * row, CHUNK) for blocks in samples]
    side = config["TILE"] * config["TILES"]
    parts = torch.empty(B, sum(chunks), side, side, dtype=torch.float32, device=mass.device)
    for i, blocks in enumerate(samples):
        slices = len(blocks) * in_block
        column_mass(mass, blocks, 0, H, slices)
        _agreement[(chunks[i], config["TILES"] ** 2, B)](
            due, mass, parts, H, slices * row, sum(chunks[:i]), sum(chunks), **config
        )
    return parts


def launch_merge(parts: Tensor, slots: Tensor, masks: int, due: Tensor) -> None:
    """Writes ``slots``, where ``due`` says so, from what ``agreement_of`` returns."""
    (B, chunks, side, _), H = parts.shape, slots.shape[1]
    _merge[(B,)](
        due, parts, slots, slots.stride(0), H, masks, chunks, SIDE=side, num_warps=4 if side < 64 else side // 8
    )


def launch(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor,
    key_bias: Tensor | None,
    order: Tensor | None,
    scale: float,
    m: int,
    n: int,
    reduce: str,
    top_p: float,
    density: float | None,
    max_density: float,
    dense_keys: list[int],
    dense_queries: list[int],
    due: Tensor,
    slots: Tensor,
) -> None:
    """Writes ``slots`` and ``mask`` where ``due`` says so; arguments as in ``kernels.ops``."""
    (B, K, T, W), H, Sq, Sk = mask.shape, q.shape[1], q.shape[2], k.shape[2]
    blocks, in_block, row = cdiv(Sq, observe.ROWS), observe.ROWS // m, W * 32
    at_once = max(1, min(blocks, observe.MASS_BYTES // (4 * B * (H + K) * in_block * row)))
    new = {"dtype": torch.float32, "device": q.device}
    mass = torch.empty(B * H, at_once * in_block, row, **new)
    joined = torch.empty(B * K, at_once * in_block, row, **new)
    column_mass = observe.prepare(q, k, lse, key_bias, order, scale, m, n, reduce, due)

    sample = sampled_blocks(Sq)
    samples = [sample[i : i + at_once] for i in range(0, len(sample), at_once)]
    launch_merge(agreement_of(column_mass, mass, samples, B, H, in_block, due), slots, K, due)
    for first in range(0, blocks, at_once):
        part = range(first, min(first + at_once, blocks))
        slices = min(len(part) * in_block, T - first * in_block)
        column_mass(mass, part, 0, H, slices)
        _join[(slices, cdiv(row, JOINED), B * K)](
            due, mass, joined, slots, slots.stride(0), H, K, slices * row, row, BLOCK=JOINED
        )
        select_cut.launch(
            joined, mask, 0, K, group_count(Sk, n), m, n, Sq, Sk, order,
            top_p if density is None and top_p < 1 else None, max_density if density is None else density,
            None, 1, key_bias is not None, dense_keys, dense_queries, due, first * in_block, slices,
        )  # fmt: skip
