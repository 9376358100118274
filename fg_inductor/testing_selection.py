"""What tests of the operators that choose masks share: a case, its inputs, how far a mask may be from the exact one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fg_inductor.testing import Problem, make_key_bias, make_qkv


@dataclass(frozen=True)
class SelectionCase(Problem):
    """One selection problem."""

    keys: int = 300
    reduce: str = "sum"
    top_p: float = 0.7
    density: float | tuple[float, ...] | None = None  # one number, or one for each head
    max_density: float = 1.0
    dense_keys: tuple = ()
    dense_queries: tuple = ()

    @property
    def selection(self) -> tuple:
        """(top_p, density, max_density, dense_keys, dense_queries)."""
        density = list(self.density) if isinstance(self.density, tuple) else self.density
        return self.top_p, density, self.max_density, list(self.dense_keys), list(self.dense_queries)

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(q, k, key_bias, order)."""
        q, k, _ = make_qkv(
            self.batch, self.heads, self.kv_heads, self.queries, self.keys, self.dim,
            dtype=dtype, device=device, spread=self.spread,
        )  # fmt: skip
        bias, order = make_key_bias(self.bias, self.batch, self.keys, dtype), None
        if self.ordered:
            order = torch.randperm(self.queries, generator=torch.Generator().manual_seed(1)).to(device, torch.int32)
        return q, k, bias if bias is None else bias.to(device), order


def assert_differs_at_the_cut_only(keep: Tensor, exact_keep: Tensor, score: Tensor, budget: Tensor) -> Tensor:
    """Which groups two masks disagree on, bool [B, H, T, G]: those alone whose score is within ``budget`` of a cut."""
    differ = keep != exact_keep
    cut = torch.where(exact_keep, score, torch.inf).amin(-1, keepdim=True)
    above = torch.where(exact_keep, -torch.inf, score).amax(-1, keepdim=True)
    far = ((score - cut).abs() > budget) & ((score - above).abs() > budget)
    assert not (differ & far).any(), f"{(differ & far).sum()} groups differ that are not at the cut"
    return differ
