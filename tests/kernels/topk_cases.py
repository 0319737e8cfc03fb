"""Rows for top-k, and a slow independent top-k of them."""

import math

import torch


def naive_topk(x: torch.Tensor, k: int) -> list[list[int]]:
    """By Python's sort of (−value, index), row by row; F where a row has NaN."""
    width, result = x.shape[1], []
    for row in x.double().tolist():
        if any(math.isnan(value) for value in row):
            result.append([width] * k)
        else:
            result.append(sorted(range(width), key=lambda i: (-row[i], i))[:k])
    return result


def hostile_rows(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Ties everywhere, all equal, signed zeros, infinities, NaN, and plain rows."""
    generator = torch.Generator().manual_seed(width)
    few = torch.randint(-3, 4, (6, width), generator=generator).float()
    zeros = torch.where(torch.arange(width) % 2 == 0, -0.0, 0.0)
    low = torch.full((width,), float("-inf"))
    one = low.clone()
    one[width // 2] = 1.0
    high = few[0].clone()
    high[:: max(1, width // 3)] = float("inf")
    bad = few[1].clone()
    bad[-1] = float("nan")
    all_bad = torch.full((width,), float("nan"))
    mixed = torch.stack([few[2] * 0, zeros, low, one, high, bad, all_bad])
    plain = torch.randn(8, width, generator=generator)
    return torch.cat([few, mixed, plain]).to(dtype)
