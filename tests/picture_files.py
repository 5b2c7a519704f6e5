"""Pictures in files for the tests of reading them."""

import numpy as np
import pytest
import torch
from PIL import Image

from minibooth.common.errors import UserError

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def error_of(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """(H, W, 3) in 0…255 → (3, H, W) in [-1, 1]."""
    return torch.tensor(array.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1


def box_of(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of all that has exactly this colour."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(axis=-1))
    return xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1
