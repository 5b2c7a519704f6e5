"""Part 7 of tutorial.md. Fill in, then: python exercises/check.py kernels"""

import torch
from torch import Tensor


def online_attention(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """softmax(q kᵀ/√d) v without ever having a whole row of scores. q: (N, d); k, v: (M, d).

    Go over the keys `block` at a time. Keep per row the maximum so far, the sum of exponentials and
    the sum of values; when the maximum rises, what was summed has to shrink.
    """
    raise NotImplementedError


def merge(n: int, mean: float, M2: float, n_b: int, mean_b: float, M2_b: float) -> tuple:
    """Count, mean and sum of squared deviations of two sets together, from those of each."""
    raise NotImplementedError


# ---- checks: no need to read on ----------------------------------------------------------------


def check_online_attention():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 8, generator=g) for n in (5, 77, 77))
    for factor in (1.0, 100.0):
        want = torch.softmax(factor * q @ k.T / 8**0.5, dim=-1) @ v
        found = online_attention(factor * q, k, v, block=16)
        assert found.isfinite().all(), "large scores overflow: subtract the maximum"
        assert torch.allclose(found, want, atol=1e-4), f"scores times {factor:g}: it differs"


def check_merge():
    x = torch.tensor([1.0, 2.0, 4.0, 4096.0, 4098.0]).double()
    for at in (1, 3):
        parts = [
            v for s in (x[:at], x[at:]) for v in (len(s), s.mean(), (s - s.mean()).pow(2).sum())
        ]
        count, mean, M2 = merge(*parts)
        assert count == 5 and abs(mean - x.mean()) < 1e-9, "count or mean is wrong"
        want = (x - x.mean()).pow(2).sum()
        assert abs(M2 - want) < 1e-6 * want, f"M2 is {M2:.1f}, not {want:.1f}"
