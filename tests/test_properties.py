"""Random small attention modules: what the pass decides agrees with an oracle that knows how the module was made, and
the result, where everything is kept, with the module as it is. No module makes the pass fail."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fg_inductor.testing_passes import run_pass

MIN_SEQ = 12
HEADS, DIM = 2, 8
WIDTH = HEADS * DIM

SOURCES = ("self", "fused", "joint", "one stream", "cross", "text of equal length", "folded frames")
SPELLINGS = ("sdpa", "sdpa by keyword", "operators", "einsum", "baddbmm", "sdpa of folded heads", "float32 scores")
SCALES = ("default", "on q", "number", "on both")
MASKS = ("none", "keys", "keys, added", "keys and queries", "causal", "each head its own", "full")
AROUND = ("nothing", "norm", "rotation", "low rank", "in place")
USES = ("output", "map", "view")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a module is made."""

    source: str
    spelling: str
    scale: str
    mask: str
    around: str
    use: str
    batch: int
    length: int
    text: int
    seed: int

    @property
    def by_hand(self) -> bool:
        return not self.spelling.startswith("sdpa")

    @property
    def queries(self) -> int:
        return self.length + (self.text if self.source in ("joint", "one stream") else 0)

    def rewritten(self) -> bool:
        """The oracle."""
        if self.source in ("cross", "text of equal length", "folded frames"):
            return False
        if self.queries < MIN_SEQ or self.mask in ("causal", "each head its own", "full"):
            return False
        if self.mask == "keys and queries" and self.spelling == "float32 scores":
            return False  # added to the scores there: rows of masked queries are no longer zero
        return not (self.use == "map" and self.by_hand)


plans = st.builds(
    Plan,
    source=st.sampled_from(SOURCES),
    spelling=st.sampled_from(SPELLINGS),
    scale=st.sampled_from(SCALES),
    mask=st.sampled_from(MASKS),
    around=st.sampled_from(AROUND),
    use=st.sampled_from(USES),
    batch=st.integers(1, 3),
    length=st.integers(3, 40),
    text=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)


class Module(nn.Module):
    """The module of a plan: [B, S, C] and [B, T, C] -> [B, S or S + T, C]."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        self.q, self.k, self.v, self.text, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)
        self.norm = nn.LayerNorm(DIM)
        self.register_buffer("angles", torch.rand(64, DIM // 2) * 6)

    def forward(self, x, text, valid):
        plan = self.plan
        q, k, v = (self.around(t) if i < 2 else t for i, t in enumerate(self.project(x, text)))
        scale = {"default": 1 / math.sqrt(DIM), "number": 0.5}.get(plan.scale, 1.0)
        if plan.scale == "on q":
            q = q * 0.4
        elif plan.scale == "on both":
            q, k = q / 2, k * 0.7
        out = self.attend(q, k, v, scale, self.mask(valid, q, k))
        out = out.transpose(1, 2)
        return self.out(out.contiguous().view(*out.shape[:2], WIDTH) if plan.use == "view" else out.flatten(2))

    def project(self, x, text):
        source = self.plan.source
        if source == "folded frames":
            x = x.unflatten(1, (2, -1)).flatten(0, 1)
        if source == "one stream":
            x = torch.cat([text, x], 1)
        if source == "fused":
            return self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0)
        if source == "text of equal length":
            text = F.pad(text, (0, 0, 0, x.shape[1]))[:, : x.shape[1]]
        if source in ("cross", "text of equal length"):
            q, k, v = self.q(x), self.k(text), self.v(text)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        if source == "joint":
            q, k, v = (torch.cat([t, self.text(text)], 1) for t in (q, k, v))
        if self.plan.around == "low rank":
            q = q + (self.up(self.down(x)) if source != "joint" else 0)
        return (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (q, k, v))

    def around(self, t):
        if self.plan.around == "norm":
            return self.norm(t)
        if self.plan.around == "rotation":
            a, b = t.unflatten(-1, (-1, 2)).unbind(-1)
            c = self.angles[: t.shape[2]]
            return torch.stack([a * c.cos() - b * c.sin(), a * c.sin() + b * c.cos()], -1).flatten(-2)
        if self.plan.around == "in place":
            rotated = torch.empty_like(t)
            rotated[..., : DIM // 2] = t[..., : DIM // 2] * 0.5
            rotated[..., DIM // 2 :] = t[..., DIM // 2 :]
            return rotated
        return t

    def mask(self, valid, q, k):
        """bool or float, broadcast to [B, H, Sq, Sk]; None."""
        kind = self.plan.mask
        if kind == "none":
            return None
        if kind == "keys":
            return valid[:, None, None]
        if kind == "keys, added":
            return torch.where(valid, 0.0, -10000.0)[:, None].repeat_interleave(HEADS, 0).view(-1, HEADS, 1, k.shape[2])
        if kind == "keys and queries":
            rows = valid[:, None, None].repeat(1, 1, q.shape[2], 1)
            queries = torch.ones_like(rows) if q.shape[2] != k.shape[2] else rows.transpose(2, 3)
            return rows & queries
        if kind == "causal":
            return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        if kind == "each head its own":
            return valid[:, None, None] | (torch.arange(HEADS) == 0)[:, None, None]
        return torch.rand(q.shape[2], k.shape[2]) if self.plan.by_hand else torch.zeros(q.shape[2], k.shape[2])

    def attend(self, q, k, v, scale, mask):
        plan = self.plan
        if plan.spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        if plan.spelling == "sdpa by keyword":
            return F.scaled_dot_product_attention(value=v, key=k, query=q, attn_mask=mask, scale=scale, dropout_p=0.0)
        if plan.spelling == "sdpa of folded heads":
            shape = q.shape
            if mask is not None:
                mask = mask.expand(shape[0], HEADS, *mask.shape[-2:]).reshape(-1, *mask.shape[-2:])
            q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).view(shape)
        return self.attend_by_hand(q, k, v, scale, mask)

    def attend_by_hand(self, q, k, v, scale, mask):
        spelling = self.plan.spelling
        if spelling == "baddbmm":
            shape = (q.shape[0] * HEADS, q.shape[2], k.shape[2])
            folded = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
            scores = torch.baddbmm(q.new_empty(shape), folded[0], folded[1].mT, beta=0, alpha=scale)
            scores = scores.view(q.shape[0], HEADS, *shape[1:])
        elif spelling == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
        elif spelling == "float32 scores":
            scores = q.float() @ k.float().transpose(-1, -2) * scale
        else:
            scores = q @ k.transpose(2, 3) * scale
        if mask is not None and mask.dtype == torch.bool:
            if spelling == "float32 scores":
                scores = scores + torch.where(mask, 0.0, -10000.0)
            else:
                scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1).to(v.dtype)
        if spelling == "baddbmm":
            weights = F.dropout(weights, 0.3, training=False)
            out = torch.bmm(weights.view(-1, *weights.shape[2:]), v.reshape(-1, *v.shape[2:])).view(q.shape)
        else:
            out = torch.einsum("bhij,bhjd->bhid", weights, v) if spelling == "einsum" else weights @ v
        return out + weights.mean() if self.plan.use == "map" else out


def check(plan: Plan) -> None:
    torch._dynamo.reset()
    torch.manual_seed(plan.seed)
    length = 2 * plan.length if plan.source == "folded frames" else plan.length
    model = Module(plan).double()
    keys = {"cross": plan.text}.get(plan.source, plan.queries)
    batch = plan.batch * 2 if plan.source == "folded frames" else plan.batch
    # The first half of the keys is valid everywhere, so that no row of any mask is empty but those of masked queries.
    valid = (torch.rand(batch, keys) < 0.7) | (torch.arange(keys) <= keys // 2)
    x, text = torch.randn(plan.batch, length, WIDTH).double(), torch.randn(plan.batch, plan.text, WIDTH).double()
    torch.manual_seed(plan.seed)
    done = run_pass(model, (x, text, valid), density=1.0, min_seq=MIN_SEQ, strict=True)
    torch.manual_seed(plan.seed)
    expected = model(x, text, valid)
    assert [site.rewritten for site in done.sites] == [plan.rewritten()], (plan, done.sites)
    assert done.sites[0].reason != "error in the pass"
    if plan.by_hand and plan.mask == "keys and queries" and done.sites[0].rewritten:
        expected = torch.where(expected.isnan(), done.result, expected)  # rows without a key: 0 in place of NaN
        assert not done.result.isnan().any()
    torch.testing.assert_close(done.result, expected, equal_nan=not done.sites[0].rewritten)


QUIET = {
    "deadline": None, "derandomize": True, "database": None, "print_blob": False,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}  # fmt: skip


@settings(max_examples=200, **QUIET)
@given(plan=plans)
def test_random_modules(plan, one_thread):
    check(plan)


@pytest.mark.full
@settings(max_examples=2000, **{**QUIET, "derandomize": False})
@given(plan=plans)
def test_many_random_modules(plan, one_thread):
    check(plan)
