"""Sheets of pictures: where cells, labels and headings stand."""

import numpy as np
import pytest
from picture_files import BLUE, GREEN, RED, YELLOW, box_of
from PIL import Image

from minibooth.common.sheets import grid


def flat_cells(size: int) -> list[list[Image.Image]]:
    return [
        [Image.new("RGB", (size, size), colour) for colour in row]
        for row in ((RED, GREEN), (BLUE, YELLOW))
    ]


@pytest.mark.parametrize("texts", [{}, {"labels": ["one", "two"], "headings": ["before", "after"]}])
def test_grid_places_whole_cells_in_rows_and_columns(texts):
    sheet = grid(flat_cells(64), **texts, title="a title" if texts else None)
    red, green, blue, yellow = (box_of(sheet, colour) for colour in (RED, GREEN, BLUE, YELLOW))
    assert all(box[2:] == (64, 64) for box in (red, green, blue, yellow))
    assert red[0] == blue[0] < red[0] + 64 < green[0] == yellow[0]
    assert red[1] == green[1] < red[1] + 64 < blue[1] == yellow[1]


def test_grid_writes_labels_left_of_rows_headings_above_columns_and_the_title_above_all():
    def ink(**texts):
        sheet = grid(flat_cells(64), **texts)
        left, top, _, _ = box_of(sheet, RED)
        dark = np.asarray(sheet.convert("L")) < 128
        colours = np.ptp(np.asarray(sheet).astype(int), axis=-1) > 60  # the cells are no ink
        ys, xs = np.nonzero(dark & ~colours)
        return ys - top, xs - left

    assert len(ink()[0]) == 0
    ys, xs = ink(labels=["one", "two"])
    assert xs.max() < -8
    assert {0, 1} == {int(y > 64) for y in ys}
    ys, xs = ink(labels=["one", ""])
    assert 0 < ys.min() <= ys.max() < 64
    ys, xs = ink(headings=["", "after"])
    assert ys.max() < 0
    assert xs.min() > 64
    ys, xs = ink(title="what this shows")
    assert ys.max() < 0


def test_long_texts_are_wrapped_and_cut_without_moving_the_rows():
    prompt = "a photo of a sks dog in the snow " * 300
    sheet = grid(flat_cells(64), ["x", prompt], ["name" * 500, prompt], prompt)
    assert sheet.height < 64 * 2 + 6 * 13 * 1.4 + 64
    assert sheet.width < 64 * 2 + 160 + 64
    assert (np.asarray(sheet)[:, :8] > 200).all(), "text runs over the margin"
    assert (np.asarray(sheet)[:, -8:] > 200).all(), "text runs over the margin"
    assert box_of(sheet, BLUE)[1] - box_of(sheet, RED)[1] == 64 + 4
    for start in range(16):  # 160 for labels, 2 · 64 + 4 for cells, 3 margins of 12
        assert grid(flat_cells(64), ["x", prompt[start:]]).width <= 160 + 132 + 36


def test_rows_of_different_length_leave_gaps_and_odd_sizes_are_refused():
    (red, green), (blue, _) = flat_cells(32)
    sheet = grid([[red], [blue, green]])
    assert box_of(sheet, GREEN)[0] > box_of(sheet, BLUE)[0] == box_of(sheet, RED)[0]
    with pytest.raises(ValueError, match="one size"):
        grid([[red, Image.new("RGB", (33, 32))]])
    with pytest.raises(ValueError, match="one size"):
        grid([])
    with pytest.raises(ValueError):
        grid([[red], [blue]], labels=["only one"])
