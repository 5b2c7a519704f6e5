"""Which tile each attention kernel takes, by card, dtype and head dimension."""

import torch
import triton

from .. import card

SHORT = 128  # keys that fit one block
SLICE = 128  # columns of V for a program where d = 512: the sums of all would fill the registers

# Tiles by kernel, in rows: (head dimensions up to, tile, candidates …), the first row that fits. A
# tile is (BLOCK_M, BLOCK_N, warps, stages). All were chosen among what compiles without spills. The
# first of a row is the default; the others are what a model of the card cannot tell from it.
# kernels/README.md has its figures, kernels/results/ the costs. Stages are the blocks of the loop's
# operands in shared memory at once: with two, a block is requested shortly before it is used, with
# three a whole iteration earlier.
AHEAD = "S one block ahead"  # of the forward
WHOLE = "whole blocks only"  # of dK/dV: the masks of a rest would spill

AMPERE = {  # compute capability 8.x: mma.sync, and an RTX card's 99 KB of shared memory
    "forward": (
        (16, (64, 64, 4, 2)),
        (64, (64, 64, 4, 3)),
        (80, (64, 64, 4, 2)),
        (128, (128, 64, 8, 2)),
        (160, (64, 32, 4, 2)),
        (512, (64, 32, 4, 1)),
    ),
    "short_forward": ((80, (64, 128, 4, 2)),),
    "backward_dq": (
        (64, (64, 64, 4, 2)),
        (96, (64, 32, 4, 2)),
        (128, (128, 32, 8, 2)),
        (160, (64, 32, 4, 2)),
    ),
    "backward_dkv": (
        (48, (64, 64, 4, 2)),
        (64, (64, 64, 4, 2), (32, 64, 4, 2)),
        (80, (32, 64, 4, 2)),
        (96, (16, 64, 4, 2)),
        (128, (32, 128, 8, 2)),
        (160, (32, 16, 4, 2)),
    ),
    "short_backward": ((48, (32, 128, 4, 2)), (64, (32, 128, 8, 2))),
}
RTX_BLACKWELL = {  # 12.x, where some of the rows above spill
    **AMPERE,
    "backward_dq": (*AMPERE["backward_dq"][:-1], (160, (128, 16, 8, 2))),
    "backward_dkv": (
        (48, (64, 64, 4, 2, WHOLE), (32, 64, 4, 2)),
        (64, (64, 64, 4, 2), (32, 64, 4, 2)),
        (96, (16, 64, 4, 2)),
        (128, (16, 128, 8, 2)),
        (160, (32, 16, 4, 2)),
    ),
}
HOPPER = {  # 9.0: wgmma, which runs while other instructions do
    "forward": (
        (64, (64, 64, 4, 3), (64, 64, 4, 3, AHEAD), (128, 64, 8, 3)),
        (96, (64, 64, 4, 3)),
        (128, (64, 64, 4, 3), (128, 64, 8, 3)),
        (160, (64, 64, 4, 3), (64, 64, 4, 2)),
        (512, (128, 64, 8, 1)),
    ),
    "short_forward": ((80, (64, 128, 4, 2)),),
    "backward_dq": (
        (64, (128, 64, 8, 3), (64, 64, 4, 3)),
        (96, (128, 64, 8, 3), (64, 64, 4, 2)),
        (128, (128, 64, 8, 3)),
        (160, (64, 32, 4, 3), (128, 32, 8, 3)),
    ),
    "backward_dkv": (
        (48, (64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 8, 3)),
        (64, (64, 64, 4, 3, WHOLE), (32, 64, 4, 3), (64, 128, 8, 3, WHOLE)),
        (80, (64, 64, 4, 3)),
        (96, (32, 64, 4, 3)),
        (128, (32, 128, 8, 3)),
        (160, (32, 128, 8, 3), (16, 64, 4, 3)),
    ),
    "short_backward": ((48, (64, 128, 8, 3)), (64, (64, 128, 8, 2)), (80, (64, 128, 8, 1))),
}
BLACKWELL = {  # 10.x: tcgen05, whose accumulators lie in tensor memory
    "forward": ((160, (128, 64, 8, 2)), (512, (128, 64, 8, 1))),
    "short_forward": ((80, (64, 128, 4, 1)),),
    "backward_dq": ((64, (128, 64, 8, 2)), (96, (64, 64, 4, 2)), (160, (128, 64, 8, 2))),
    "backward_dkv": ((96, (64, 128, 8, 2)), (160, (32, 128, 8, 2))),
    "short_backward": ((80, (64, 128, 8, 1)),),
}
FLOAT32 = {  # no tensor cores
    "forward": ((48, (32, 16, 4, 1)), (160, (32, 16, 8, 1)), (512, (16, 16, 8, 1))),
    "short_forward": (),
    "backward_dq": ((160, (16, 16, 8, 1)),),
    "backward_dkv": (
        (32, (16, 32, 8, 1)),
        (64, (16, 32, 4, 1)),
        (80, (16, 16, 4, 1)),  # with 32 it spills on 8.0
        (160, (16, 32, 4, 1)),
    ),
    "short_backward": (),
}
FLOAT32_BLACKWELL = FLOAT32 | {  # on 10.x the rows above spill
    "forward": ((48, (32, 16, 4, 1)), (160, (16, 16, 8, 1)), (512, (16, 16, 8, 1))),
    "backward_dq": ((80, (16, 16, 8, 1)), (96, (16, 16, 4, 1)), (160, (16, 16, 8, 1))),
    "backward_dkv": ((32, (16, 32, 8, 1)), (160, (16, 32, 8, 1))),
}


def split(d: int) -> tuple[int, int]:
    """d as the sum of one or two widths (powers of two from 16), the second 0 if not needed."""
    D1 = max(16, 1 << (d.bit_length() - 1))
    if d <= D1:
        return D1, 0
    D2 = max(16, D1 // 4, triton.next_power_of_2(d - D1))
    return (D1, D2) if 2 * D2 <= D1 else (2 * D1, 0)


def tiles_of(kernel: str, q: torch.Tensor, N_k: int) -> list[tuple]:
    """Its candidates, none if this case is not its own."""
    major = card.capability(q.device) // 10
    tables = {8: AMPERE, 9: HOPPER, 10: BLACKWELL, 12: RTX_BLACKWELL}
    if q.dtype == torch.float32:
        tables = dict.fromkeys(tables, FLOAT32) | {10: FLOAT32_BLACKWELL}
    row = next((row for row in tables[major][kernel] if q.shape[-1] <= row[0]), None)
    if row is None or (kernel.startswith("short") and N_k > SHORT):
        return []
    return [t for t in row[1:] if WHOLE not in t or q.shape[2] % t[0] == 0]


def config(kernel: str, q: torch.Tensor, N_k: int, choice: int = 0) -> dict | None:
    """Constants and launch options of a kernel; None if this case is not its own.

    Reads the dtype, length and head dimension of q and the card it is on. choice: which of the
    candidates; the first where there are fewer.
    """
    if not (tiles := tiles_of(kernel, q, N_k)):
        return None
    d = q.shape[-1]
    block_m, block_n, warps, stages, *special = tiles[choice if choice < len(tiles) else 0]
    D1, D2 = split(d)
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    if kernel == "forward":
        options["PREFETCH"] = AHEAD in special
        if AHEAD in special:  # S in one product: two in flight, and ptxas serializes them all
            D1, D2 = max(16, triton.next_power_of_2(d)), 0
        options["DV"] = SLICE if d > 160 else D1
    if kernel in ("forward", "backward_dq"):
        options["EVEN"] = N_k % block_n == 0
    if kernel == "backward_dkv":
        options["EVEN"] = q.shape[2] % block_m == 0
    return {"D1": D1, "D2": D2, **options}
