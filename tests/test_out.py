"""What leaves the editor, read back by other means: masks, code, files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lib.widgets.pixels import loops_around, outlines, run_lengths, to_pixels

# --------------------------------------------------------------------------------- cells and pixels

grids = arrays.arrays(bool, st.tuples(st.integers(1, 7), st.integers(1, 7)))
sizes = st.tuples(st.integers(8, 40), st.integers(8, 40))
RING = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]], dtype=bool)


def of_run_lengths(rle):
    """A mask from COCO's uncompressed RLE, as its own decoder reads it: runs down the columns."""
    height, width = rle["size"]
    mask, at, value = [0] * (height * width), 0, 0
    for count in rle["counts"]:
        for _ in range(count):
            mask[at] = value
            at += 1
        value = 1 - value
    assert at == height * width
    return np.array([[mask[x * height + y] for x in range(width)] for y in range(height)], bool)


def inside(polygon, height, width):
    """Which pixels have their middle in a polygon: a ray to the right crosses it an odd time."""
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    y, x = np.mgrid[:height, :width] + 0.5
    odd = np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            odd ^= (
                (min(y0, y1) < y) & (y < max(y0, y1)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
            )
    return odd


@given(grids, sizes)
@example(RING, (16, 16))
def test_masks_are_read_back_as_they_were(cells, size):
    pixels = to_pixels(cells, size)
    rle = run_lengths(pixels)
    assert (of_run_lengths(rle) == pixels).all()
    assert all(count > 0 for count in rle["counts"][1:])
    found = [inside(polygon, *size) for polygon in outlines(cells, size)]
    assert (np.sum(found, axis=0) == pixels).all()  # each pixel in one polygon, and no other in any
    assert all(len(polygon) >= 8 for polygon in outlines(cells, size))


def test_masks_by_hand():
    cells = np.array([[1, 0], [1, 1]], dtype=bool)
    assert run_lengths(cells) == {"size": [2, 2], "counts": [0, 2, 1, 1]}
    assert outlines(cells, (4, 6)) == [[0, 0, 3, 0, 3, 2, 6, 2, 6, 4, 0, 4]]
    assert run_lengths(~cells)["counts"] == [2, 1, 1]
    assert outlines(~RING & False, (16, 16)) == []
    # one piece, two holes that meet in a corner; cut where the upper one begins
    assert len(outlines(RING, (16, 16))) == 2
    assert len(loops_around({(0, 0), (1, 1)})) == 2


@given(grids, st.integers(1, 4))
def test_a_map_at_a_multiple_of_its_size_repeats_its_cells(cells, times):
    size = (cells.shape[0] * times, cells.shape[1] * times)
    assert (to_pixels(cells, size) == cells.repeat(times, 0).repeat(times, 1)).all()
