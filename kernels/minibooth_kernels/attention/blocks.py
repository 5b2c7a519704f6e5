"""What the attention kernels share: blocks of matrices in two widths of the head dimension.

- A head dimension d is cut into two widths Triton has tiles for: 80 = 64 + 16, 160 = 128 + 32;
  what d does not fill is zero. Variables end in 1 and 2; with D2 = 0 the second is unused.
- EVEN, a constant: the rows of the loop's matrix are whole blocks. Otherwise each copy of 16 bytes
  into shared memory needs some nine integer instructions that compare its row with the length;
  columns are compared once, before the loop.
- Strides and d reach the kernels divided by 8, so that Triton knows that they are multiples of 8
  and reads 16 bytes at a time.
"""

import triton
import triton.language as tl

STRIDES = [f"stride_{x}{axis}" for x in "qkv" for axis in "bhn"]
INTEGERS = [*STRIDES, "H", "N_q", "N_k", "d8", "chunk"]  # one compilation serves all their values


@triton.jit
def _tile(X, rows, n_rows, stride, d, FIRST: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    mask = (columns < d)[None, :]  # the same for every block of rows: no work in a loop
    if not EVEN:
        mask = (rows < n_rows)[:, None] & mask
    return X + rows[:, None] * stride + columns[None, :], mask


@triton.jit
def _load(
    X, rows, n_rows, stride, d, D1: tl.constexpr, D2: tl.constexpr, EVEN: tl.constexpr = False
):
    """Rows of a (n_rows, d) matrix as (rows, D1) and (rows, D2); zero outside. EVEN: no row is."""
    pointers, mask = _tile(X, rows, n_rows, stride, d, 0, D1, EVEN)
    x1 = tl.load(pointers, mask=mask, other=0.0)
    x2 = x1
    if D2:
        pointers, mask = _tile(X, rows, n_rows, stride, d, D1, D2, EVEN)
        x2 = tl.load(pointers, mask=mask, other=0.0)
    return x1, x2


@triton.jit
def _load_vector(X, rows, n_rows, beyond, EVEN: tl.constexpr):
    """Elements of a vector of n_rows, `beyond` outside."""
    if EVEN:
        x = tl.load(X + rows)
    else:
        x = tl.load(X + rows, mask=rows < n_rows, other=beyond)
    return x


@triton.jit
def _store(X, x1, x2, rows, n_rows, stride, d, D1: tl.constexpr, D2: tl.constexpr):
    pointers, mask = _tile(X, rows, n_rows, stride, d, 0, D1, False)
    tl.store(pointers, x1, mask=mask)
    if D2:
        pointers, mask = _tile(X, rows, n_rows, stride, d, D1, D2, False)
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


@triton.jit
def _row_dot(a1, a2, b1, b2, D2: tl.constexpr):
    """rowsum(A ∘ B) in fp32."""
    total = tl.sum(a1.to(tl.float32) * b1.to(tl.float32), axis=1)
    if D2:
        total += tl.sum(a2.to(tl.float32) * b2.to(tl.float32), axis=1)
    return total
