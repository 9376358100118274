"""What tests of attention written by hand share: a module that calls it, and its inputs."""

import torch
from torch import nn

BATCH, HEADS, LENGTH, DIM = 2, 2, 40, 32
SCALE = DIM**-0.5


class Attention(nn.Module):
    """[B, S, C] -> [B, S, C]; ``attend(m, q, k, v)`` gets [B, H, S, D] each and gives the same."""

    def __init__(self, attend, **kwargs):
        super().__init__()
        self.attend, self.options = attend, kwargs
        width = HEADS * DIM
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.null = nn.Parameter(torch.randn(1, HEADS, 2, DIM))
        self.bias = nn.Parameter(torch.randn(1, HEADS, LENGTH, LENGTH))
        self.mix = nn.Parameter(torch.randn(HEADS, HEADS))
        self.dropout = nn.Dropout(0.5)
        for linear in (self.to_q, self.to_k, self.to_v):
            nn.init.normal_(linear.weight, std=0.3)  # far from uniform attention: a lost scale shows

    def forward(self, x, **kwargs):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out(self.attend(self, q, k, v, **kwargs).transpose(1, 2).flatten(2))


def tokens(batch=BATCH, length=LENGTH, dtype=torch.float32):
    return torch.randn(batch, length, HEADS * DIM, dtype=dtype)


def valid_keys(x, length=LENGTH):
    return torch.arange(length) < torch.tensor([length, length - 11])[: x.shape[0], None]
