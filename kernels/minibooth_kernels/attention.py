"""Exact softmax attention, forward and backward, without the N_q × N_k matrix in memory.

    S = scale · Q Kᵀ        P = softmax(S)        O = P V

for each of B samples and H heads: N_q queries, N_k keys and values, all of head dimension d.

The FlashAttention recurrences (Dao et al. 2022, algorithm 1; Dao 2023, algorithms 1 and 2):
a program owns a block of queries, walks over the keys and keeps the running maximum m and sum l
of each row. The backward recomputes P from L = m + log l, the log of the softmax's denominator:

    dP = dO Vᵀ     delta = rowsum(dO ∘ O)     dS = P ∘ (dP − delta)
    dV = Pᵀ dO     dQ = scale · dS K          dK = scale · dSᵀ Q

Every gradient has one program that adds it up in a fixed order: no atomics, equal bits every run.

- Exponentials are base 2 (the hardware's): S is scaled by scale · log2 e, and L is in base 2 too.
- A head dimension d is cut into two widths Triton has tiles for: 80 = 64 + 16, 160 = 128 + 32;
  what d does not fill is zero. Variables end in 1 and 2; with D2 = 0 the second is unused.
- Up to 128 keys (the 77 of a prompt) take kernels of their own: all keys stay in the program while
  the queries pass by.
- Strides and d reach the kernels divided by 8, so that Triton knows that they are multiples of 8
  and reads 16 bytes at a time.
"""

import math

import torch
import triton
import triton.language as tl

from . import card

SHORT = 128  # keys that fit one block
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 512, 256  # of the short path: chunks of queries × heads
STRIDES = [f"stride_{x}{axis}" for x in "qkv" for axis in "bhn"]
INTEGERS = [*STRIDES, "H", "N_q", "N_k", "d8", "chunk"]  # one compilation serves all their values


def reference(q, k, v, scale=None):
    """The same in PyTorch, what the kernels are compared with."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S = scale * q @ k.transpose(-1, -2)
    return torch.softmax(S, dim=-1) @ v


@triton.jit
def _tile(X, rows, n_rows, stride, d, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    mask = (rows < n_rows)[:, None] & (columns < d)[None, :]
    return X + rows[:, None] * stride + columns[None, :], mask


@triton.jit
def _load(X, rows, n_rows, stride, d, D1: tl.constexpr, D2: tl.constexpr):
    """Rows of a (n_rows, d) matrix as (rows, D1) and (rows, D2); zero outside."""
    pointers, mask = _tile(X, rows, n_rows, stride, d, 0, D1)
    x1 = tl.load(pointers, mask=mask, other=0.0)
    x2 = x1
    if D2:
        pointers, mask = _tile(X, rows, n_rows, stride, d, D1, D2)
        x2 = tl.load(pointers, mask=mask, other=0.0)
    return x1, x2


@triton.jit
def _store(X, x1, x2, rows, n_rows, stride, d, D1: tl.constexpr, D2: tl.constexpr):
    pointers, mask = _tile(X, rows, n_rows, stride, d, 0, D1)
    tl.store(pointers, x1, mask=mask)
    if D2:
        pointers, mask = _tile(X, rows, n_rows, stride, d, D1, D2)
        tl.store(pointers, x2, mask=mask)


@triton.jit
def _zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    x1 = tl.zeros([ROWS, D1], tl.float32)
    x2 = x1
    if D2:
        x2 = tl.zeros([ROWS, D2], tl.float32)
    return x1, x2


@triton.jit
def _product(a1, a2, b1, b2, D2: tl.constexpr):
    """A Bᵀ, summed over the head dimension."""
    product = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if D2:
        product = tl.dot(a2, tl.trans(b2), product, input_precision="ieee")
    return product


@triton.jit
def _add_product(acc1, acc2, a, b1, b2, D2: tl.constexpr):
    """acc + A B, where the columns of B are the head dimension."""
    acc1 = tl.dot(a.to(b1.dtype), b1, acc1, input_precision="ieee")
    if D2:
        acc2 = tl.dot(a.to(b2.dtype), b2, acc2, input_precision="ieee")
    return acc1, acc2


@triton.jit
def _head(X, b, h, stride_b, stride_h):
    return X + b.to(tl.int64) * stride_b * 8 + h.to(tl.int64) * stride_h * 8


@triton.jit
def _packed_head(X, b, h, N, H, d):
    """Head h of a contiguous (B, N, H, d) tensor; its rows are H·d apart."""
    return X + (b.to(tl.int64) * N * H + h) * d


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
):  # fmt: skip
    d = d8 * 8
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    K = _head(K, b, h, stride_kb, stride_kh)
    V = _head(V, b, h, stride_vb, stride_vh)
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    Q = _head(Q, b, h, stride_qb, stride_qh)
    q1, q2 = _load(Q, queries, N_q, stride_qn * 8, d, D1, D2)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc1, acc2 = _zeros(BLOCK_M, D1, D2)
    if PREFETCH:
        k1, k2 = _load(K, tl.arange(0, BLOCK_N), N_k, stride_kn * 8, d, D1, D2)
        S_next = _product(q1, q2, k1, k2, D2)
    for start in range(0, N_k, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        if PREFETCH:
            S = S_next
            k1, k2 = _load(K, keys + BLOCK_N, N_k, stride_kn * 8, d, D1, D2)
            S_next = _product(q1, q2, k1, k2, D2)
        else:
            k1, k2 = _load(K, keys, N_k, stride_kn * 8, d, D1, D2)
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
        v1, v2 = _load(V, keys, N_k, stride_vn * 8, d, D1, D2)
        acc1, acc2 = _add_product(acc1, acc2, P, v1, v2, D2)

    Out = _packed_head(Out, b, h, N_q, H, d)
    _store(Out, acc1 / l_i[:, None], acc2 / l_i[:, None], queries, N_q, H * d, d, D1, D2)
    tl.store(L + tl.program_id(1) * N_q + queries, m_i + tl.log2(l_i), mask=queries < N_q)


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


@triton.jit
def _row_dot(a1, a2, b1, b2, D2: tl.constexpr):
    """rowsum(A ∘ B) in fp32."""
    total = tl.sum(a1.to(tl.float32) * b1.to(tl.float32), axis=1)
    if D2:
        total += tl.sum(a2.to(tl.float32) * b2.to(tl.float32), axis=1)
    return total


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
        k1, k2 = _load(K, keys, N_k, stride_kn * 8, d, D1, D2)
        v1, v2 = _load(V, keys, N_k, stride_vn * 8, d, D1, D2)
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
):  # fmt: skip
    d = d8 * 8
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k1, k2 = _load(_head(K, b, h, stride_kb, stride_kh), keys, N_k, stride_kn * 8, d, D1, D2)
    v1, v2 = _load(_head(V, b, h, stride_vb, stride_vh), keys, N_k, stride_vn * 8, d, D1, D2)
    Q = _head(Q, b, h, stride_qb, stride_qh)
    dO = _packed_head(dO, b, h, N_q, H, d)

    dk1, dk2 = _zeros(BLOCK_N, D1, D2)
    dv1, dv2 = _zeros(BLOCK_N, D1, D2)
    for start in range(0, N_q, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        rows = tl.program_id(1) * N_q + queries
        L_i = tl.load(L + rows, mask=queries < N_q, other=float("inf"))  # P = 0 beyond N_q
        delta = tl.load(Delta + rows, mask=queries < N_q, other=0.0)
        q1, q2 = _load(Q, queries, N_q, stride_qn * 8, d, D1, D2)
        do1, do2 = _load(dO, queries, N_q, H * d, d, D1, D2)
        # Transposed, keys × queries: Pᵀ and dSᵀ are left operands as they are. Rows of keys beyond
        # N_k hold nonsense, which no other row sees and nothing stores.
        S_T = _product(k1, k2, q1, q2, D2)
        P_T = tl.exp2(S_T * scale_log2 - L_i[None, :])
        dv1, dv2 = _add_product(dv1, dv2, P_T, do1, do2, D2)
        dP_T = _product(v1, v2, do1, do2, D2)
        dS_T = P_T * (dP_T - delta[None, :])
        dk1, dk2 = _add_product(dk1, dk2, dS_T, q1, q2, D2)
    dK = _packed_head(dK, b, h, N_k, H, d)
    dV = _packed_head(dV, b, h, N_k, H, d)
    _store(dK, dk1 * scale, dk2 * scale, keys, N_k, H * d, d, D1, D2)
    _store(dV, dv1, dv2, keys, N_k, H * d, d, D1, D2)


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
        P_T = tl.exp2(S_T * scale_log2 - L_i[None, :])
        P_T = tl.where((keys < N_k)[:, None], P_T, 0.0)  # dQ sums over the keys
        dv1, dv2 = _add_product(dv1, dv2, P_T, do1, do2, D2)
        dP_T = _product(v1, v2, do1, do2, D2)
        dS_T = P_T * (dP_T - delta[None, :])
        dk1, dk2 = _add_product(dk1, dk2, dS_T, q1, q2, D2)
        dq1, dq2 = _zeros(BLOCK_M, D1, D2)
        dq1, dq2 = _add_product(dq1, dq2, tl.trans(dS_T.to(k1.dtype)), k1, k2, D2)
        _store(dQ, dq1 * scale, dq2 * scale, queries, N_q, H * d, d, D1, D2)
    dK = _packed_head(dKV, tl.program_id(0) * 2 * B + b, h, N_k, H, d)
    dV = _packed_head(dKV, (tl.program_id(0) * 2 + 1) * B + b, h, N_k, H, d)
    _store(dK, dk1 * scale, dk2 * scale, keys, N_k, H * d, d, D1, D2)
    _store(dV, dv1, dv2, keys, N_k, H * d, d, D1, D2)


# ---- launches -----------------------------------------------------------------------------------


def split(d: int) -> tuple[int, int]:
    """d as the sum of one or two widths (powers of two from 16), the second 0 if not needed."""
    D1 = max(16, 1 << (d.bit_length() - 1))
    if d <= D1:
        return D1, 0
    D2 = max(16, D1 // 4, triton.next_power_of_2(d - D1))
    return (D1, D2) if 2 * D2 <= D1 else (2 * D1, 0)


# Tiles by kernel: (head dimensions up to, BLOCK_M, BLOCK_N, warps, stages), the first row that
# fits. They were chosen among what compiles without spills: kernels/results/ has the costs.
AMPERE = {  # compute capability 8.x and 12.x: mma.sync, and an RTX card's 99 KB of shared memory
    "forward": ((64, 64, 64, 4, 3), (80, 64, 64, 4, 2), (160, 64, 32, 4, 2), (512, 64, 16, 8, 1)),
    "short_forward": ((80, 64, 128, 4, 2),),
    "backward_dq": ((64, 64, 64, 4, 2), (96, 64, 32, 4, 2), (160, 128, 16, 8, 2)),
    "backward_dkv": ((48, 64, 64, 4, 2), (96, 16, 64, 4, 2), (160, 32, 16, 4, 2)),
    "short_backward": ((64, 32, 128, 8, 2),),
}
HOPPER = {  # 9.0: wgmma, which runs while other instructions do
    "forward": ((96, 64, 64, 4, 3), (160, 64, 64, 4, 2), (512, 64, 32, 8, 2)),
    "short_forward": ((80, 64, 128, 4, 2),),
    "backward_dq": ((96, 64, 64, 4, 2), (160, 64, 32, 4, 2)),
    "backward_dkv": ((96, 64, 64, 4, 2), (160, 64, 64, 8, 2)),
    "short_backward": ((64, 64, 128, 8, 2), (80, 64, 128, 8, 1)),
}
BLACKWELL = {  # 10.x: tcgen05, whose accumulators lie in tensor memory
    "forward": ((160, 128, 64, 8, 2), (512, 64, 32, 8, 2)),
    "short_forward": ((80, 64, 128, 4, 1),),
    "backward_dq": ((64, 128, 64, 8, 2), (96, 64, 64, 4, 2), (160, 128, 64, 8, 2)),
    "backward_dkv": ((96, 64, 128, 8, 2), (160, 32, 128, 8, 2)),
    "short_backward": ((80, 64, 128, 8, 1),),
}
FLOAT32 = {  # no tensor cores
    "forward": ((48, 32, 16, 4, 1), (160, 32, 16, 8, 1), (512, 16, 16, 8, 1)),
    "short_forward": (),
    "backward_dq": ((160, 16, 16, 8, 1),),
    "backward_dkv": ((32, 16, 32, 8, 1), (160, 16, 32, 4, 1)),
    "short_backward": (),
}
FLOAT32_BLACKWELL = FLOAT32 | {  # on 10.x the rows above spill
    "forward": ((48, 32, 16, 4, 1), (160, 16, 16, 8, 1), (512, 16, 16, 8, 1)),
    "backward_dq": ((80, 16, 16, 8, 1), (96, 16, 16, 4, 1), (160, 16, 16, 8, 1)),
    "backward_dkv": ((32, 16, 32, 8, 1), (160, 16, 32, 8, 1)),
}


def config(kernel: str, q: torch.Tensor, N_k: int) -> dict | None:
    """Constants and launch options of a kernel; None if this case is not its own.

    Reads the dtype and head dimension of q and the card it is on.
    """
    d = q.shape[-1]
    major = card.capability(q.device) // 10
    tables = {8: AMPERE, 9: HOPPER, 10: BLACKWELL, 12: AMPERE}
    if q.dtype == torch.float32:
        tables = dict.fromkeys(tables, FLOAT32) | {10: FLOAT32_BLACKWELL}
    table = tables[major]
    row = next((row for row in table[kernel] if d <= row[0]), None)
    if row is None or (kernel.startswith("short") and N_k > SHORT):
        return None
    _, block_m, block_n, warps, stages = row
    D1, D2 = split(d)
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    if kernel == "forward":
        options["PREFETCH"] = table is HOPPER and d <= 64
        if options["PREFETCH"]:  # S in one product: two in flight, and ptxas serializes them all
            D1, D2 = max(16, triton.next_power_of_2(d)), 0
    if kernel in ("forward", "backward_dq"):
        options["EVEN"] = N_k % block_n == 0
    return {"D1": D1, "D2": D2, **options}


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x itself if its rows start at multiples of 16 bytes, as every projection's output does."""
    regular = x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1])
    if regular and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _arguments(q, k, v):
    """What every kernel gets: the strides, then the sizes."""
    strides = [s // 8 for x in (q, k, v) for s in x.stride()[:3]]
    return *strides, q.shape[1], q.shape[2], k.shape[2], q.shape[3] // 8


def _chunk(N_q, heads, block, programs):
    """Queries per program, whole blocks, so that there are about so many programs."""
    return max(1, triton.cdiv(N_q, block) * heads // programs) * block


@torch.library.custom_op("minibooth::attention", mutates_args=())
@card.launched_where_its_input_is
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (_aligned(x) for x in (q, k, v))
    B, H, N_q, d = q.shape
    N_k = k.shape[2]
    out = q.new_empty(B, N_q, H, d)
    L = q.new_empty(B, H, N_q, dtype=torch.float32)
    arguments = (q, k, v, out, L, *_arguments(q, k, v), scale * math.log2(math.e))
    if options := config("short_forward", q, N_k):
        chunk = _chunk(N_q, B * H, options["BLOCK_M"], FORWARD_PROGRAMS)
        _short_forward[(triton.cdiv(N_q, chunk), B * H)](*arguments, chunk, **options)
    else:
        options = config("forward", q, N_k)
        _forward[(triton.cdiv(N_q, options["BLOCK_M"]), B * H)](*arguments, **options)
    return out.transpose(1, 2), L


@_attention.register_fake
def _(q, k, v, scale):
    B, H, N_q, d = q.shape
    return q.new_empty(B, N_q, H, d).transpose(1, 2), q.new_empty(B, H, N_q, dtype=torch.float32)


@torch.library.custom_op("minibooth::attention_backward", mutates_args=())
@card.launched_where_its_input_is
def _attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    L: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (_aligned(x) for x in (q, k, v))
    o, do = o.transpose(1, 2), do.transpose(1, 2).contiguous()
    B, H, N_q, d = q.shape
    N_k = k.shape[2]
    dq = torch.empty_like(o)
    common = (*_arguments(q, k, v), scale, scale * math.log2(math.e))
    if options := config("short_backward", q, N_k):
        chunk = _chunk(N_q, B * H, options["BLOCK_M"], BACKWARD_PROGRAMS)
        grid = (triton.cdiv(N_q, chunk), B * H)
        partial = q.new_empty(grid[0], 2, B, N_k, H, d, dtype=torch.float32)
        _short_backward[grid](q, k, v, o, do, L, dq, partial, *common, chunk, **options)
        dkv = partial.sum(0).to(k.dtype)
    else:
        dkv = k.new_empty(2, B, N_k, H, d)
        delta = torch.empty_like(L)
        options = config("backward_dq", q, N_k)
        grid = (triton.cdiv(N_q, options["BLOCK_M"]), B * H)
        _backward_dq[grid](q, k, v, o, do, L, dq, delta, *common, **options)
        options = config("backward_dkv", q, N_k)
        grid = (triton.cdiv(N_k, options["BLOCK_N"]), B * H)
        _backward_dkv[grid](q, k, v, do, L, delta, *dkv, *common, **options)
    return dq.transpose(1, 2), dkv.transpose(2, 3)  # dK and dV in one tensor (2, B, H, N_k, d)


@_attention_backward.register_fake
def _(do, q, k, v, o, L, scale):
    B, H, N_q, d = q.shape
    dkv = k.new_empty(2, B, k.shape[2], H, d)
    return q.new_empty(B, N_q, H, d).transpose(1, 2), dkv.transpose(2, 3)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # no zeros for L, which has no gradient
    ctx.save_for_backward(q, k, v, *output)


def _autograd_backward(ctx, do, _):
    q, k, v, o, L = ctx.saved_tensors
    if q.shape[-1] > 160:
        raise NotImplementedError("the attention kernel's backward takes head dimensions up to 160")
    dq, (dk, dv) = _attention_backward(do, q, k, v, o, L, ctx.scale)
    return dq, dk, dv, None


_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


def unsupported(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> str | None:
    """Why the kernels cannot take these arguments, in one line; None if they can."""
    if reason := card.unsupported(q):
        return reason
    if any(x.ndim != 4 or x.dtype != q.dtype or x.device != q.device for x in (q, k, v)):
        return "q, k, v must be (B, H, N, d), of one dtype, on one device"
    B, H, _, d = q.shape
    if k.shape != v.shape or (k.shape[:2], k.shape[3]) != ((B, H), d) or k.numel() == 0:
        return f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}"
    if d % 8 or (d > 160 and d != 512):
        return f"the head dimension is a multiple of 8 up to 160, or 512, not {d}"
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if d > 160 and gradients:
        return f"there is no backward for head dimension {d}, only for up to 160"
    if scale is not None and scale <= 0:
        return f"the scale must be positive, not {scale}"  # the kernels scale the row maximum
    return None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v, one differentiable operator.

    q: (B, H, N_q, d); k, v: (B, H, N_k, d), fp16, bf16 or fp32. d is a multiple of 8 up to 160, or
    512 without gradients. Any strides: a view of a projection's output is read where it lies.
    scale: positive, 1/sqrt(d) by default.
    Returns (B, H, N_q, d), a view of (B, N_q, H, d). Two runs give equal bits, gradients included.
    Raises ValueError for what the kernels cannot take.
    """
    if reason := unsupported(q, k, v, scale):
        raise ValueError(reason)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _attention(q, k, v, scale)[0]
