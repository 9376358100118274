"""The block mask's layout: against Python integers, bit by bit."""

import math

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fg_inductor.kernels import mask as block_mask
from fg_inductor.testing import dense_mask, random_groups, random_mask

WORDS = [  # keys, n -> words
    (1, 1, 4),
    (128, 1, 4),  # 128 groups fill exactly 16 bytes
    (129, 1, 8),
    (1024, 8, 4),
    (1025, 8, 8),
    (128 * 128, 128, 4),
    (128 * 128 + 1, 128, 8),
    (32760, 1, 1024),
    (0, 8, 0),
]


@pytest.mark.parametrize("keys, n, words", WORDS)
def test_word_count(keys, n, words):
    assert block_mask.word_count(keys, n) == words
    assert block_mask.group_count(keys, n) == math.ceil(keys / n)
    assert block_mask.slice_count(keys, n) == math.ceil(keys / n)


PATTERNS = {
    "ones": lambda groups: torch.ones(groups, dtype=torch.bool),
    "none": lambda groups: torch.zeros(groups, dtype=torch.bool),
    "last": lambda groups: torch.arange(groups) == groups - 1,  # 32 groups: bit 31 alone, the sign of the word
    "every-32nd": lambda groups: torch.arange(groups) % 32 == 31,
    "random": lambda groups: random_groups((2, 3, 5, groups), 0.5),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("groups", [1, 31, 32, 33, 64, 128, 129, 300])
def test_pack_against_integers(pattern, groups):
    keep = PATTERNS[pattern](groups)
    words = block_mask.word_count(groups, 1)
    packed = block_mask.pack(keep, words)
    assert packed.dtype == torch.int32 and packed.shape == (*keep.shape[:-1], words)
    for row, bits in zip(packed.flatten(0, -2) if keep.dim() > 1 else [packed], keep.reshape(-1, groups), strict=True):
        number = sum(1 << g for g, bit in enumerate(bits.tolist()) if bit)  # unused bits of the row must be 0
        assert b"".join(w.to_bytes(4, "little", signed=True) for w in row.tolist()) == number.to_bytes(
            words * 4, "little"
        )
    assert torch.equal(block_mask.unpack(packed, groups), keep)


def test_recipe_in_docstring():
    m, n, queries, keys = 64, 16, 200, 1100
    q, k = torch.empty(1, 2, queries, 8), torch.empty(1, 2, keys, 8)
    mask = random_mask(q, k, m, n, 0.4)
    dense = dense_mask(mask, None, queries, keys, m, n)
    b, h, t = 0, 1, 3
    words = mask[b, h, t]
    groups = (words[:, None] >> torch.arange(32)) & 1
    kept = groups.flatten()[: math.ceil(keys / n)].repeat_interleave(n)[:keys].bool()
    assert torch.equal(dense[b, h, t * m : (t + 1) * m], kept.expand(queries - t * m, keys))


@pytest.mark.parametrize("n", block_mask.GROUPS)
def test_counts_are_symbolic_without_guards(n):
    env = ShapeEnv()
    size = env.create_unbacked_symint()  # any comparison of it would raise
    counts = block_mask.slice_count(size, n), block_mask.group_count(size, n), block_mask.word_count(size, n)
    assert not env.guards
    for keys in (1, 127, 128, 129, 5000):
        values = [int(count.node.expr.subs({size.node.expr: keys})) for count in counts]
        assert values == [math.ceil(keys / n), math.ceil(keys / n), math.ceil(math.ceil(keys / n) / 128) * 4]
