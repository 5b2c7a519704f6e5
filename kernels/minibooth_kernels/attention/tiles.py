"""Which tile each attention kernel takes, by card, dtype and head dimension."""

import torch
import triton

from .. import card

SHORT = 128  # keys that fit one block

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


def split(d: int) -> tuple[int, int]:
    """d as the sum of one or two widths (powers of two from 16), the second 0 if not needed."""
    D1 = max(16, 1 << (d.bit_length() - 1))
    if d <= D1:
        return D1, 0
    D2 = max(16, D1 // 4, triton.next_power_of_2(d - D1))
    return (D1, D2) if 2 * D2 <= D1 else (2 * D1, 0)


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
