"""Attention backward: FlashAttention-2, algorithm 2 (Dao 2023), beside the formula in PyTorch.

P is computed again from L = log₂ Σ 2^S, the log of the softmax's denominator. Two kernels, one for
dQ and one for dK and dV: every gradient has one program that adds it up in a fixed order, so there
are no atomics, and two runs give equal bits.
"""

import torch
import triton
import triton.language as tl

from .blocks import (
    INTEGERS,
    _add_product,
    _head,
    _load,
    _load_vector,
    _packed_head,
    _product,
    _row_dot,
    _store,
    _zeros,
)


def reference_backward(q, k, v, do, scale=None):
    """dQ, dK and dV in PyTorch, from dO: what the backward kernels are compared with."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    P = torch.softmax(scale * q @ k.transpose(-1, -2), dim=-1)
    dP = do @ v.transpose(-1, -2)
    delta = (P * dP).sum(-1, keepdim=True)  # = rowsum(dO ∘ O)
    dS = P * (dP - delta)
    return scale * dS @ k, scale * dS.transpose(-1, -2) @ q, P.transpose(-1, -2) @ do


@triton.jit(do_not_specialize=INTEGERS)
def _backward_dq(
    Q,  # (B, H, N_q, d) in, any strides
    K,  # (B, H, N_k, d)
    V,  # (B, H, N_k, d)
    Out,  # (B, N_q, H, d)
    dO,  # (B, N_q, H, d)
    L,  # (B, H, N_q) fp32
    dQ,  # (B, N_q, H, d) out
    Delta,  # (B, H, N_q) fp32 out, for _backward_dkv
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    H, N_q, N_k, d8, scale, scale_log2,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    d = d8 * 8
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    K = _head(K, b, h, stride_kb, stride_kh)
    V = _head(V, b, h, stride_vb, stride_vh)
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    Q = _head(Q, b, h, stride_qb, stride_qh)
    q1, q2 = _load(Q, queries, N_q, stride_qn * 8, d, D1, D2)
    o1, o2 = _load(_packed_head(Out, b, h, N_q, H, d), queries, N_q, H * d, d, D1, D2)
    do1, do2 = _load(_packed_head(dO, b, h, N_q, H, d), queries, N_q, H * d, d, D1, D2)
    delta = _row_dot(o1, o2, do1, do2, D2)
    rows = tl.program_id(1) * N_q + queries
    tl.store(Delta + rows, delta, mask=queries < N_q)
    L_i = tl.load(L + rows, mask=queries < N_q, other=0.0)

    dq1, dq2 = _zeros(BLOCK_M, D1, D2)
    for start in range(0, N_k, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k1, k2 = _load(K, keys, N_k, stride_kn * 8, d, D1, D2, EVEN)
        v1, v2 = _load(V, keys, N_k, stride_vn * 8, d, D1, D2, EVEN)
        S = _product(q1, q2, k1, k2, D2)
        P = tl.exp2(S * scale_log2 - L_i[:, None])
        if not EVEN:  # S is 0 there, and exp2(0 − L) may be infinite
            P = tl.where((keys < N_k)[None, :], P, 0.0)
        dP = _product(do1, do2, v1, v2, D2)
        dS = P * (dP - delta[:, None])
        dq1, dq2 = _add_product(dq1, dq2, dS, k1, k2, D2)
    dQ = _packed_head(dQ, b, h, N_q, H, d)
    _store(dQ, dq1 * scale, dq2 * scale, queries, N_q, H * d, d, D1, D2)


@triton.jit(do_not_specialize=INTEGERS)
def _backward_dkv(
    Q,  # (B, H, N_q, d) in, any strides
    K,  # (B, H, N_k, d)
    V,  # (B, H, N_k, d)
    dO,  # (B, N_q, H, d)
    L,  # (B, H, N_q) fp32
    Delta,  # (B, H, N_q) fp32
    dK,  # (B, N_k, H, d) out
    dV,  # (B, N_k, H, d) out
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    H, N_q, N_k, d8, scale, scale_log2,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,  # N_q is a multiple of BLOCK_M
):  # fmt: skip
    d = d8 * 8
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k1, k2 = _load(_head(K, b, h, stride_kb, stride_kh), keys, N_k, stride_kn * 8, d, D1, D2)
    v1, v2 = _load(_head(V, b, h, stride_vb, stride_vh), keys, N_k, stride_vn * 8, d, D1, D2)
    Q = _head(Q, b, h, stride_qb, stride_qh)
    dO = _packed_head(dO, b, h, N_q, H, d)
    L += tl.program_id(1) * N_q
    Delta += tl.program_id(1) * N_q

    dk1, dk2 = _zeros(BLOCK_N, D1, D2)
    dv1, dv2 = _zeros(BLOCK_N, D1, D2)
    for start in range(0, N_q, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        L_i = _load_vector(L, queries, N_q, float("inf"), EVEN)  # P = 0 beyond N_q
        delta = _load_vector(Delta, queries, N_q, 0.0, EVEN)
        q1, q2 = _load(Q, queries, N_q, stride_qn * 8, d, D1, D2, EVEN)
        do1, do2 = _load(dO, queries, N_q, H * d, d, D1, D2, EVEN)
        # Transposed, keys × queries: Pᵀ and dSᵀ are left operands as they are. Rows of keys beyond
        # N_k hold nonsense, which no other row sees and nothing stores.
        S_T = _product(k1, k2, q1, q2, D2)
        dP_T = _product(v1, v2, do1, do2, D2)  # needs no P: Hopper multiplies while P is computed
        P_T = tl.exp2(S_T * scale_log2 - L_i[None, :])
        dv1, dv2 = _add_product(dv1, dv2, P_T, do1, do2, D2)
        dS_T = P_T * (dP_T - delta[None, :])
        dk1, dk2 = _add_product(dk1, dk2, dS_T, q1, q2, D2)
    dK = _packed_head(dK, b, h, N_k, H, d)
    dV = _packed_head(dV, b, h, N_k, H, d)
    _store(dK, dk1 * scale, dk2 * scale, keys, N_k, H * d, d, D1, D2)
    _store(dV, dv1, dv2, keys, N_k, H * d, d, D1, D2)
