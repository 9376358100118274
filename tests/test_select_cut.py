"""The cut against ``reference_select.best_groups``, on scores made for it: the mask is the same in every bit."""

import pytest
import torch

from fg_inductor.kernels import reference_select, select_cut, select_cut_packed
from fg_inductor.kernels.mask import unpack, word_count

NAN = float("nan")


def lognormal(*shape, spread=1.0, seed=0):
    x = (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).exp()
    return x / x.sum(-1, keepdim=True) * 2.0**15


def some(*shape, share=0.1, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def scores(kind: str, rows: int, groups: int) -> torch.Tensor:
    """[rows, groups] float32 that float16 rounds; -1 is masked."""
    x = lognormal(rows, groups)
    if kind == "near":  # random q and k, one key a group: many are the same float16
        x = lognormal(rows, groups, spread=0.03)
    elif kind == "wide":  # seven orders: most are denormal
        x = lognormal(rows, groups, spread=6.0)
    elif kind == "equal":
        x = torch.full((rows, groups), 0.7)
    elif kind == "two":  # the cut lies between two values
        x = torch.where(some(rows, groups, share=0.5), 0.5, 3.0)
    elif kind == "zero":
        x = torch.zeros(rows, groups)
    elif kind == "largest":
        x = torch.where(some(rows, groups, share=0.4), 65504.0, x)
    elif kind == "infinite":
        x = torch.where(some(rows, groups, share=0.4), torch.inf, x)
    elif kind == "nan":  # fewer, and more, than the limit; of both signs
        x = torch.where(some(rows, groups, share=torch.linspace(0.05, 0.5, rows)[:, None]), NAN, x)
        x = torch.where(some(rows, groups, share=0.5, seed=2) & x.isnan(), -x, x)
    elif kind == "all-nan":
        x = torch.full((rows, groups), NAN)
    elif kind == "zeros-and-few":
        x = torch.where(some(rows, groups, share=0.05), x, 0.0)
    return x


def long(*kinds):
    """Kinds of scores that take minutes in the interpreter and repeat what the others show."""
    return [pytest.param(kind, marks=pytest.mark.full) for kind in kinds]


KINDS = (
    "lognormal", "near", "wide", "equal", "two", "zero", "largest", "infinite", "nan", "all-nan", "zeros-and-few",
)  # fmt: skip


def launch(score, groups, share, *, m=16, masked=False, dense_keys=(), dense_queries=(), n=1, mass=None, order=None):
    """The mask of scores [B, H, T, G] float16, padded as ``select_scores`` leaves them."""
    B, H, T, _ = score.shape
    words = word_count(groups * n, n)
    padded = torch.full((B * H, T, words * 32), -1.0, dtype=score.dtype, device=score.device)
    padded[..., :groups] = score.flatten(0, 1)
    mask = torch.empty(B, H, T, words, dtype=torch.int32, device=score.device)
    select_cut.launch(
        padded, mask, 0, H, groups, m, n, m * T, groups * n, order, mass, share, None, m,
        masked, list(dense_keys), list(dense_queries),
    )  # fmt: skip
    return mask


def expected(score, groups, share, *, mass=None, valid=None, m=16, dense_keys=(), dense_queries=(), n=1):
    valid = torch.ones(score.shape[0], groups, dtype=torch.bool, device=score.device) if valid is None else valid
    exact = score.double()
    exact = torch.where(exact == torch.inf, 1e9, exact)  # it takes +inf for NaN's like; a score has an order
    tokens = torch.arange(score.shape[2] * m, device=score.device)
    share = share if isinstance(share, list) else float(share)
    return reference_select.best_groups(
        exact.masked_fill(~valid[:, None, None], 0), valid, tokens, groups * n, m, n, mass or 1.0,
        share if mass is None else None, 1.0 if mass is None else share, list(dense_keys), list(dense_queries),
    )  # fmt: skip


def check(score, groups, share, device, *, dtype=torch.float16, **more):
    score = score.to(device, dtype)
    valid = more.pop("valid", None)
    if valid is not None:
        valid = valid.to(device)
        more["masked"] = True
    given = score if valid is None else score.masked_fill(~valid[:, None, None], -1)
    mask = launch(given, groups, share, **more)
    more.pop("masked", None)
    exact = expected(score, groups, share, valid=valid, **more)
    assert torch.equal(mask, exact), f"{(unpack(mask, groups) != unpack(exact, groups)).sum()} groups differ"


# One group; a row that ends in a word; two tiles (128 words and 3).
@pytest.mark.parametrize("groups", [1, 700, 4170])
@pytest.mark.parametrize("kind", KINDS)
def test_density(kind, groups, device, poison):
    score = scores(kind, 2, groups).view(1, 2, 1, groups)
    for share in (1e-9, 0.3, 0.999):
        check(score, groups, share, device)


@pytest.mark.parametrize("bits", [0x7C01, 0x7FFF, -1], ids=hex)
def test_every_nan(bits, device, poison):
    """The least and the largest, of both signs."""
    nan = torch.tensor(bits, dtype=torch.int16).view(torch.float16)
    score = torch.where(some(1, 1, 2, 100, share=0.5), nan, scores("lognormal", 2, 100).half())
    for share in (0.02, 0.9):
        check(score, 100, share, device)


@pytest.mark.parametrize("kind", ["equal", "nan", *long("lognormal", "zero")])
def test_masked_and_forced(kind, device, poison):
    groups = 300
    score = scores(kind, 8, groups).view(2, 2, 2, groups)
    valid = some(2, groups, share=0.6, seed=4)
    ranges = {"dense_keys": (0, 3, 31, 34, 170, 171), "dense_queries": (20, 21)}
    for share in (1e-9, 0.3, [0.1, 1.0]):
        check(score, groups, share, device, **ranges)
        check(score, groups, share, device, valid=valid, **ranges)
        check(score, groups, share, device, valid=valid & torch.tensor([[True], [False]]))  # none of the second batch
        check(score, groups, share, device, dense_keys=(40, 90), n=4)


def whole(kind: str, rows: int, groups: int) -> torch.Tensor:
    """Small whole numbers: float32 sums them exactly, in any order."""
    x = scores("lognormal" if kind == "few" else kind, rows, groups)
    x = (x / x.nan_to_num(0).mean(-1, keepdim=True).clamp_min(1e-3) * 8).round().clamp(max=600)
    return torch.where(some(rows, groups, share=0.97), 0.0, x) if kind == "few" else x


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["lognormal", "equal", "few", *long("near", "two", "zero", "zeros-and-few")])
def test_mass(kind, dtype, device, poison):
    groups = 300
    score = whole(kind, 4, groups).view(2, 2, 1, groups)
    # Shares of which no whole number of groups is on the edge.
    for mass, share in ((3073 / 4096, 1.0), (4001 / 4096, 1.0), (3001 / 4096, 0.2)):
        check(score, groups, share, device, mass=mass, dtype=dtype)
        check(
            score, groups, share, device, mass=mass, dtype=dtype,
            valid=some(2, groups, share=0.6, seed=4), dense_keys=(0, 3, 170, 171), dense_queries=(20, 21),
        )  # fmt: skip


def test_mass_that_is_hardly_enough(device, poison):
    """Half a score above what is wanted is enough, with scores below that could still be dropped."""
    score = torch.tensor([3.0] * 10 + [1.0, 0.25] + [0.125] * 8).view(1, 1, 1, -1)
    check(score, 20, 1.0, device, mass=30.5 / 32.25)


@pytest.mark.parametrize("lean", [False, True], ids=["float32", "lean"])
def test_mass_in_tiles(lean, device, poison, monkeypatch):
    rows = {"WORDS": 4, "REST": 2, "LOOP": True, "LEAN": lean, "num_warps": 1}
    monkeypatch.setattr(select_cut, "configuration", lambda words, wide: rows)
    for kind in ("lognormal", "equal", "few"):
        score = whole(kind, 2, 400).view(1, 1, 2, 400)
        check(score, 400, 1.0, device, mass=3073 / 4096)
        check(score, 400, 1.0, device, mass=3073 / 4096, dense_keys=(30, 35, 399, 400), dense_queries=(0, 1))
        check(score, 400, 0.3, device, mass=3901 / 4096, valid=some(1, 400, share=0.7))


@pytest.mark.parametrize("kind", ["lognormal", "equal", *long("near", "nan")])
@pytest.mark.parametrize("words, rest, loop", [(4, 2, True), (16, 4, False), (8, 8, True)])
def test_rows_in_tiles(kind, words, rest, loop, device, poison, monkeypatch):
    """Tiles of which some are read again; ties go on from one to the next."""
    rows = {"WORDS": words, "REST": rest, "LOOP": loop, "BASE": 2, "num_warps": 1}
    monkeypatch.setattr(select_cut_packed, "configuration", lambda words: rows)
    groups = 32 * (words + rest) + (200 if loop else -40)
    score = scores(kind, 2, groups).view(1, 1, 2, groups)
    for share in (0.3, 0.9):
        check(score, groups, share, device)
        check(score, groups, share, device, valid=some(1, groups, share=0.7), dense_keys=(30, 35, groups - 1, groups))


def test_longest_row_in_registers(device, poison):
    """Tiles of 2,048 and 512 words; the second holds a part of the words that are equal, and no half overflows."""
    check(scores("near", 1, 75_600).view(1, 1, 1, -1), 75_600, 0.3, device)
    check(scores("equal", 1, 75_600).view(1, 1, 1, -1), 75_600, 0.95, device)


@pytest.mark.parametrize("words", [1, 3, 127, 128, 129, 192, 193, 1024, 1025, 2363, 4000])
def test_configuration(words):
    """A row is covered, by tiles that a block of words divides; what threads hold leaves room for two programs."""
    config = select_cut_packed.configuration(words)
    held = config["WORDS"] + config["REST"]
    assert config["LOOP"] == (held < words)
    assert config["WORDS"] % config["BASE"] == 0 and config["REST"] % config["BASE"] == 0
    assert held * 16 < 65_536, "the count of a half would overflow"
    assert held * 16 // (32 * config["num_warps"]) <= (64 if words <= 2048 else 80)


@pytest.mark.parametrize("kind", ["lognormal", "near", "wide"])
def test_any_beginning(kind, device, poison, monkeypatch):
    """The typical score is where the search begins, not what it finds."""
    for bits in (0, 1, 0x3C00, 0x7BFF):
        monkeypatch.setattr(select_cut_packed, "typical_bits", lambda mass, bits=bits: bits)
        check(scores(kind, 2, 500).view(1, 1, 2, 500), 500, 0.3, device)
