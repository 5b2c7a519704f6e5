"""AdamW (Loshchilov & Hutter 2019, algorithm 2) of all weights that train, and the gradients' norm.

    g = gradient / scale        w ← w − lr λ w
    m ← β1 m + (1 − β1) g       v ← β2 v + (1 − β2) g²
    w ← w − lr m̂ / (√v̂ + ε)     m̂ = m / (1 − β1ᵗ)       v̂ = v / (1 − β2ᵗ)

w, m and v are fp32. A network that computes in 16 bits has a copy of w in 16 bits, and its gradient
is in 16 bits; the pass over w writes the copy anew. For each weight 12 bytes are read and 12 are
written, the gradient is 2 and the copy 2, and the norm, which must be known before, reads 2: 30
bytes. With copies that each forward pass makes for itself and gradients in fp32 it is 48.

There are hundreds of weights, each in a place of its own; one launch does them all, and another the
norm. On the card there is a table of where each of them lies. Where the gradients lie is written
into it in every step, by a kernel whose arguments they are: the backward pass puts them where there
is room, and a CUDA graph where they were when it was recorded. Nothing here waits for the card.
"""

import torch
import triton
import triton.language as tl

from . import card

BETA1, BETA2, EPS = tl.constexpr(0.9), tl.constexpr(0.999), tl.constexpr(1e-8)  # torch's AdamW's
# Rows of the table: addresses, but for the number of elements and the group, which has its own lr.
WEIGHT, FIRST, SECOND, COPY, GRADIENT, SIZE, GROUP = (tl.constexpr(row) for row in range(7))
CHUNK = 32_768  # elements of one weight that a program does
BLOCK = 1024  # of these at a time: eight per thread
NOTED = 256  # gradients that are arguments of one launch: a kernel's arguments have 4 KB
TRITON = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def reference(w, m, v, gradient, scale, lr, decay, t):
    """The same of one weight in PyTorch, what the kernel is compared with; returns w, m and v."""
    b1, b2 = BETA1.value, BETA2.value
    g = gradient.to(w.dtype) / scale
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.square()
    m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
    return w - lr * decay * w - lr * m_hat / (v_hat.sqrt() + EPS.value), m, v


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def _note_gradients(
    Row,  # (N,) int64 out: of the table
    gradients,  # N tensors
    N: tl.constexpr,
):
    for i in tl.static_range(N):
        tl.store(Row + i, gradients[i].to(tl.int64))


@triton.jit
def _pointer(address, dtype: tl.constexpr):
    """To what begins at a multiple of 16 bytes, so that loads are wide."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _place(Table, Chunks, tensors, CHUNK: tl.constexpr):
    """Of this program: its tensor; its first element, and the one after its last."""
    i = tl.load(Chunks + 2 * tl.program_id(0))
    start = tl.load(Chunks + 2 * tl.program_id(0) + 1) * CHUNK
    size = tl.load(Table + SIZE * tensors + i).to(tl.int32)
    return i, start, tl.minimum(start + CHUNK, size)


@triton.jit
def _load_gradient(address, is_half, offsets, mask, HALF: tl.constexpr):
    """In fp32, from either dtype."""
    if is_half:
        g = tl.load(_pointer(address, HALF) + offsets, mask=mask).to(tl.float32)
    else:
        g = tl.load(_pointer(address, tl.float32) + offsets, mask=mask)
    return g


@triton.jit
def _sum_of_squares(
    Table,  # (7, tensors) int64
    Chunks,  # (P, 2) int32: of each program the tensor, and which of its chunks
    Sums,  # (P,) fp32 out
    tensors,
    HALF: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, start, end = _place(Table, Chunks, tensors, CHUNK)
    is_half = tl.load(Table + COPY * tensors + i) != 0
    gradient = tl.load(Table + GRADIENT * tensors + i)
    squares = tl.zeros([BLOCK], tl.float32)
    whole = start + (end - start) // BLOCK * BLOCK
    for at in range(start, whole, BLOCK):
        offsets = tl.multiple_of(at, BLOCK) + tl.arange(0, BLOCK)
        g = _load_gradient(gradient, is_half, offsets, None, HALF)
        squares += g * g
    if whole < end:
        offsets = tl.multiple_of(whole, BLOCK) + tl.arange(0, BLOCK)
        g = _load_gradient(gradient, is_half, offsets, offsets < end, HALF)
        squares += tl.where(offsets < end, g * g, 0.0)
    tl.store(Sums + tl.program_id(0), tl.sum(squares))


@triton.jit
def _update(
    weight, first, second, copy, gradient, is_half, offsets, mask,
    scale, lr, decay, step_size, root2, HALF: tl.constexpr,
):  # fmt: skip
    """A block of a weight. root2: √(1 − β2ᵗ)."""
    w = tl.load(weight + offsets, mask=mask)
    m = tl.load(first + offsets, mask=mask)
    v = tl.load(second + offsets, mask=mask)
    g = _load_gradient(gradient, is_half, offsets, mask, HALF) / scale
    m += (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    w -= lr * decay * w
    w -= step_size * m / (tl.sqrt(v) / root2 + EPS)
    tl.store(weight + offsets, w, mask=mask)
    tl.store(first + offsets, m, mask=mask)
    tl.store(second + offsets, v, mask=mask)
    if is_half:
        tl.store(copy + offsets, w.to(HALF), mask=mask)


@triton.jit
def _adamw(
    Table,  # (7, tensors) int64
    Chunks,  # (P, 2) int32: of each program the tensor, and which of its chunks
    Rates,  # (groups,) fp32
    Scale,  # () fp32: what gradients are divided by
    Skip,  # () fp32: where it is not 0, nothing is done
    Corrections,  # (2,) fp64: 1 − β1ᵗ, 1 − β2ᵗ
    tensors, decay,
    HALF: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(Skip) == 0:
        i, start, end = _place(Table, Chunks, tensors, CHUNK)
        weight = _pointer(tl.load(Table + WEIGHT * tensors + i), tl.float32)
        first = _pointer(tl.load(Table + FIRST * tensors + i), tl.float32)
        second = _pointer(tl.load(Table + SECOND * tensors + i), tl.float32)
        copy = tl.load(Table + COPY * tensors + i)
        is_half, copy = copy != 0, _pointer(copy, HALF)
        gradient = tl.load(Table + GRADIENT * tensors + i)
        scale = tl.load(Scale)
        lr = tl.load(Rates + tl.load(Table + GROUP * tensors + i))
        step_size = lr / tl.load(Corrections).to(tl.float32)
        root2 = tl.sqrt(tl.load(Corrections + 1).to(tl.float32))
        whole = start + (end - start) // BLOCK * BLOCK
        for at in range(start, whole, BLOCK):
            offsets = tl.multiple_of(at, BLOCK) + tl.arange(0, BLOCK)
            _update(weight, first, second, copy, gradient, is_half, offsets, None,
                    scale, lr, decay, step_size, root2, HALF)  # fmt: skip
        if whole < end:
            offsets = tl.multiple_of(whole, BLOCK) + tl.arange(0, BLOCK)
            _update(weight, first, second, copy, gradient, is_half, offsets, offsets < end,
                    scale, lr, decay, step_size, root2, HALF)  # fmt: skip


# ---- operators ---------------------------------------------------------------------------------


@torch.library.custom_op("minibooth::adamw_squares", mutates_args=("table",))
@card.launched_where_its_input_is
def _adamw_squares(
    table: torch.Tensor, chunks: torch.Tensor, gradients: list[torch.Tensor], half: torch.dtype
) -> torch.Tensor:
    for first in range(0, len(gradients), NOTED):
        part = tuple(gradients[first : first + NOTED])
        _note_gradients[(1,)](table[GRADIENT.value, first:], part, len(part))
    sums = table.new_empty(len(chunks), dtype=torch.float32)
    options = {"HALF": TRITON[half], "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": 4}
    _sum_of_squares[(len(chunks),)](table, chunks, sums, table.shape[1], **options)
    return sums


@_adamw_squares.register_fake
def _(table, chunks, gradients, half):
    return table.new_empty(len(chunks), dtype=torch.float32)


@torch.library.custom_op("minibooth::adamw_step", mutates_args=("weights", "averages", "copies"))
@card.launched_where_its_input_is
def _adamw_step(
    table: torch.Tensor,
    chunks: torch.Tensor,
    gradients: list[torch.Tensor],
    weights: list[torch.Tensor],
    averages: list[torch.Tensor],
    copies: list[torch.Tensor],
    rates: torch.Tensor,
    scale: torch.Tensor,
    skip: torch.Tensor,
    corrections: torch.Tensor,
    decay: float,
    half: torch.dtype,
) -> None:
    arguments = (table, chunks, rates, scale, skip, corrections, table.shape[1], decay)
    options = {"HALF": TRITON[half], "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": 4}
    _adamw[(len(chunks),)](*arguments, **options)


def unsupported(weight: torch.Tensor) -> str | None:
    """Why the kernel cannot update such a weight, in one line; None if it can."""
    if reason := card.unsupported(weight):
        return reason
    if weight.numel() >= 2**31 - CHUNK:
        return "the kernel counts a weight's elements in 32 bits"
    return None


class Table:
    """Some weights, their averages and copies, and on their device where all of that lies.

    Every tensor must stay where it is, dense, each in the memory layout of its weight.
    """

    def __init__(
        self,
        weights: list[torch.Tensor],
        averages: tuple[list[torch.Tensor], list[torch.Tensor]],
        copies: list[torch.Tensor | None],
        groups: list[int],
    ):
        """weights and averages: fp32. copies: in 16 bits, or None where there is none; their
        weights' gradients are in 16 bits then. groups: which of the learning rates is a weight's.
        """
        self.weights, self.averages = weights, [*averages[0], *averages[1]]
        self.copies = [copy for copy in copies if copy is not None]
        self.half = self.copies[0].dtype if self.copies else torch.float32
        device = weights[0].device
        rows = [[x.data_ptr() for x in tensors] for tensors in (weights, *averages)]
        rows.append([0 if copy is None else copy.data_ptr() for copy in copies])
        rows += [[0] * len(weights), [w.numel() for w in weights], groups]
        self.addresses = torch.tensor(rows).to(device)  # (7, tensors)
        counts = [triton.cdiv(w.numel(), CHUNK) for w in weights]
        chunks = [(i, n) for i, count in enumerate(counts) for n in range(count)]
        self.chunks = torch.tensor(chunks, dtype=torch.int32).to(device)  # (programs, 2)
        # What 1 − βᵗ is worked out from: in fp64, as torch does it.
        betas = [BETA1.value, BETA2.value]
        self.betas = torch.tensor(betas, dtype=torch.float64).to(device)

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """‖gradients‖, (), of one for each weight, in its copy's dtype."""
        self.gradients = [aligned(g) for g in gradients]  # for `update`: they must live until then
        sums = _adamw_squares(self.addresses, self.chunks, self.gradients, self.half)
        return sums.sum().sqrt()

    def update(
        self,
        rates: torch.Tensor,
        scale: torch.Tensor,
        skip: torch.Tensor,
        t: torch.Tensor,
        decay: float,
    ) -> None:
        """Weights, averages and copies after step t, by the gradients whose norm came before.

        rates: (groups,) fp32; scale: () what the gradients are divided by; skip: () 1 for no
        update, else 0; t: () the number of this update, from 1; decay: λ.
        """
        tensors = self.weights, self.averages, self.copies
        numbers = rates, scale, skip, 1 - self.betas**t
        _adamw_step(
            self.addresses, self.chunks, self.gradients, *tensors, *numbers, decay, self.half
        )
        del self.gradients


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x itself if it begins at a multiple of 16 bytes, as what is allocated does; else a copy."""
    return x if x.storage_offset() * x.element_size() % 16 == 0 else x.clone()
