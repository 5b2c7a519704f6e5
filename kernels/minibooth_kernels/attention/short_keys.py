"""Attention to few keys, the 77 of a prompt: all keys stay in the program, the queries pass by.

The formulas are those of forward.py and backward.py. With all keys at hand the softmax needs no
running maximum, and one kernel gives all three gradients: dQ as the queries pass, dK and dV added
up over them; what each chunk of queries adds is summed afterwards, in a fixed order.
"""

import triton
import triton.language as tl

from .blocks import (
    INTEGERS,
    _add_product,
    _head,
    _load,
    _packed_head,
    _product,
    _row_dot,
    _store,
    _zeros,
)


@triton.jit(do_not_specialize=INTEGERS)
def _short_forward(
    Q,  # (B, H, N_q, d) in, any strides
    K,  # (B, H, N_k, d), N_k <= BLOCK_N
    V,  # (B, H, N_k, d)
    Out,  # (B, N_q, H, d) out
    L,  # (B, H, N_q) fp32 out
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    H, N_q, N_k, d8, scale_log2,
    chunk,  # queries of a program
    D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    d = d8 * 8
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    keys = tl.arange(0, BLOCK_N)
    k1, k2 = _load(_head(K, b, h, stride_kb, stride_kh), keys, N_k, stride_kn * 8, d, D1, D2)
    v1, v2 = _load(_head(V, b, h, stride_vb, stride_vh), keys, N_k, stride_vn * 8, d, D1, D2)
    Q = _head(Q, b, h, stride_qb, stride_qh)
    Out = _packed_head(Out, b, h, N_q, H, d)

    first = tl.program_id(0) * chunk
    for start in range(first, tl.minimum(first + chunk, N_q), BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        q1, q2 = _load(Q, queries, N_q, stride_qn * 8, d, D1, D2)
        S = _product(q1, q2, k1, k2, D2)
        S = tl.where((keys < N_k)[None, :], S, float("-inf"))
        m_i = tl.max(S, axis=1) * scale_log2
        P = tl.exp2(S * scale_log2 - m_i[:, None])
        l_i = tl.sum(P, axis=1)
        o1, o2 = _zeros(BLOCK_M, D1, D2)
        o1, o2 = _add_product(o1, o2, P, v1, v2, D2)
        _store(Out, o1 / l_i[:, None], o2 / l_i[:, None], queries, N_q, H * d, d, D1, D2)
        tl.store(L + tl.program_id(1) * N_q + queries, m_i + tl.log2(l_i), mask=queries < N_q)


@triton.jit(do_not_specialize=INTEGERS)
def _short_backward(
    Q,  # (B, H, N_q, d) in, any strides
    K,  # (B, H, N_k, d), N_k <= BLOCK_N
    V,  # (B, H, N_k, d)
    Out,  # (B, N_q, H, d)
    dO,  # (B, N_q, H, d)
    L,  # (B, H, N_q) fp32
    dQ,  # (B, N_q, H, d) out
    dKV,  # (chunks, 2, B, N_k, H, d) fp32 out: what this chunk of queries adds to dK and dV
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    H, N_q, N_k, d8, scale, scale_log2, chunk,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    d = d8 * 8
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    B = tl.num_programs(1) // H
    keys = tl.arange(0, BLOCK_N)
    k1, k2 = _load(_head(K, b, h, stride_kb, stride_kh), keys, N_k, stride_kn * 8, d, D1, D2)
    v1, v2 = _load(_head(V, b, h, stride_vb, stride_vh), keys, N_k, stride_vn * 8, d, D1, D2)
    Q = _head(Q, b, h, stride_qb, stride_qh)
    Out = _packed_head(Out, b, h, N_q, H, d)
    dO = _packed_head(dO, b, h, N_q, H, d)
    dQ = _packed_head(dQ, b, h, N_q, H, d)

    dk1, dk2 = _zeros(BLOCK_N, D1, D2)
    dv1, dv2 = _zeros(BLOCK_N, D1, D2)
    first = tl.program_id(0) * chunk
    for start in range(first, tl.minimum(first + chunk, N_q), BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        q1, q2 = _load(Q, queries, N_q, stride_qn * 8, d, D1, D2)
        do1, do2 = _load(dO, queries, N_q, H * d, d, D1, D2)
        o1, o2 = _load(Out, queries, N_q, H * d, d, D1, D2)
        delta = _row_dot(o1, o2, do1, do2, D2)
        rows = tl.program_id(1) * N_q + queries
        L_i = tl.load(L + rows, mask=queries < N_q, other=float("inf"))
        S_T = _product(k1, k2, q1, q2, D2)
        dP_T = _product(v1, v2, do1, do2, D2)  # beside S, as in _backward_dkv
        P_T = tl.exp2(S_T * scale_log2 - L_i[None, :])
        P_T = tl.where((keys < N_k)[:, None], P_T, 0.0)  # dQ sums over the keys
        dv1, dv2 = _add_product(dv1, dv2, P_T, do1, do2, D2)
        dS_T = P_T * (dP_T - delta[None, :])
        dk1, dk2 = _add_product(dk1, dk2, dS_T, q1, q2, D2)
        dq1, dq2 = _zeros(BLOCK_M, D1, D2)
        dq1, dq2 = _add_product(dq1, dq2, tl.trans(dS_T.to(k1.dtype)), k1, k2, D2)
        _store(dQ, dq1 * scale, dq2 * scale, queries, N_q, H * d, d, D1, D2)
    dK = _packed_head(dKV, tl.program_id(0) * 2 * B + b, h, N_k, H, d)
    dV = _packed_head(dKV, (tl.program_id(0) * 2 + 1) * B + b, h, N_k, H, d)
    _store(dK, dk1 * scale, dk2 * scale, keys, N_k, H * d, d, D1, D2)
    _store(dV, dv1, dv2, keys, N_k, H * d, d, D1, D2)
