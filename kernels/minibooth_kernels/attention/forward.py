"""Attention forward: FlashAttention-2, algorithm 1 (Dao 2023), beside the formula in PyTorch.

A program owns a block of queries, walks over the keys and keeps the running maximum m and sum l of
each row: the N_q × N_k matrix is never in memory.
"""

import torch
import triton
import triton.language as tl

from .blocks import INTEGERS, _add_product, _head, _load, _packed_head, _product, _store, _zeros


def reference(q, k, v, scale=None):
    """The same in PyTorch, what the kernels are compared with."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S = scale * q @ k.transpose(-1, -2)
    return torch.softmax(S, dim=-1) @ v


@triton.jit(do_not_specialize=INTEGERS)
def _forward(
    Q,  # (B, H, N_q, d) in, any strides
    K,  # (B, H, N_k, d)
    V,  # (B, H, N_k, d)
    Out,  # (B, N_q, H, d) out
    L,  # (B, H, N_q) fp32 out
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    H, N_q, N_k, d8, scale_log2,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,  # N_k is a multiple of BLOCK_N
    PREFETCH: tl.constexpr,  # compute the next S before the softmax of this one
    DV: tl.constexpr,  # columns of V and Out for a program: all D1, or a slice of d = 512
):  # fmt: skip
    d = d8 * 8
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    K = _head(K, b, h, stride_kb, stride_kh)
    V = _head(V, b, h, stride_vb, stride_vh)
    if DV < D1:  # one of several slices, each of which computes all of P
        V += tl.program_id(2) * DV
        Out += tl.program_id(2) * DV
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    Q = _head(Q, b, h, stride_qb, stride_qh)
    q1, q2 = _load(Q, queries, N_q, stride_qn * 8, d, D1, D2)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc1, acc2 = _zeros(BLOCK_M, DV, D2)
    if PREFETCH:
        k1, k2 = _load(K, tl.arange(0, BLOCK_N), N_k, stride_kn * 8, d, D1, D2)
        S_next = _product(q1, q2, k1, k2, D2)
    for start in range(0, N_k, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        if PREFETCH:
            S = S_next
            # After the last block the first again: some product has to be in flight, unused.
            following = tl.where(start + BLOCK_N < N_k, keys + BLOCK_N, keys - start)
            k1, k2 = _load(K, following, N_k, stride_kn * 8, d, D1, D2, EVEN)
            S_next = _product(q1, q2, k1, k2, D2)
        else:
            k1, k2 = _load(K, keys, N_k, stride_kn * 8, d, D1, D2, EVEN)
            S = _product(q1, q2, k1, k2, D2)
        if not EVEN:
            S = tl.where((keys < N_k)[None, :], S, float("-inf"))
        m_next = tl.maximum(m_i, tl.max(S, axis=1) * scale_log2)
        P = tl.exp2(S * scale_log2 - m_next[:, None])
        alpha = tl.exp2(m_i - m_next)
        m_i = m_next
        l_i = l_i * alpha + tl.sum(P, axis=1)
        acc1 = acc1 * alpha[:, None]
        if D2:
            acc2 = acc2 * alpha[:, None]
        v1, v2 = _load(V, keys, N_k, stride_vn * 8, d, DV, D2, EVEN)
        acc1, acc2 = _add_product(acc1, acc2, P, v1, v2, D2)

    Out = _packed_head(Out, b, h, N_q, H, d)
    _store(Out, acc1 / l_i[:, None], acc2 / l_i[:, None], queries, N_q, H * d, d, DV, D2)
    tl.store(L + tl.program_id(1) * N_q + queries, m_i + tl.log2(l_i), mask=queries < N_q)
