"""Which way a group norm goes and which tile it takes: by the size of a group and the layout."""

import math

import triton

# One program per group: (elements of the tile, warps), the smallest that fits is taken, for
# channels_last (True) or not. The backward holds x, dy and what is between them, so it stops at a
# quarter of the size; contiguous tensors spill a step earlier.
FORWARD_TILES = {True: ((4096, 4), (16384, 8), (32768, 16)), False: ((4096, 4), (16384, 8))}
BACKWARD_TILES = {True: ((2048, 8), (4096, 4), (8192, 8)), False: ((4096, 8),)}
COMBINE = {"BLOCK_CHUNKS": 128, "BLOCK_C": 16, "num_warps": 4}
PROGRAMS = 1024  # that leave partial results: some eight per multiprocessor of a large card


def _one_pass(R, group_channels, tiles, channels_last):
    """Constants and warps for one program per group, or None if the group is too large."""
    block_c = max(16, triton.next_power_of_2(group_channels))
    for elements, warps in tiles[channels_last]:
        if block_c <= 128 and R * block_c <= elements:
            tile = {"BLOCK_R": elements // block_c, "BLOCK_C": block_c, "num_warps": warps}
            return {"UNIT": math.gcd(group_channels, 8) if channels_last else 1, **tile}
    return None


def _two_pass(N, R, C, channels_last):
    """Grid of tiles; grid and rows of partial results; the tile, 32 elements a thread."""
    block_r, block_c = (64, 64) if channels_last else (1024, 4)
    tiles = (triton.cdiv(R, block_r), triton.cdiv(C, block_c), N)
    chunk_rows = max(1, math.prod(tiles) // PROGRAMS) * block_r
    partial = (triton.cdiv(R, chunk_rows), *tiles[1:])
    return tiles, partial, chunk_rows, {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": 4}
