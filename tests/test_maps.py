"""Fixations to maps: against loops, against scipy, and on the real gaze where it is present."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from lib.data.cub import read_fixations
from lib.data.maps import (
    Box,
    MapError,
    Painted,
    Recording,
    _refuse_other_geometry,
    box_map,
    fixation_counts,
    fixation_map,
    human_map,
    read_map,
    to_grid,
)
from lib.data.pictures import picture_size, read_picture

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "CUB_GHA" / "data_5runs"

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
sizes = st.tuples(st.integers(20, 400), st.integers(20, 400))
unit = st.floats(-0.2, 1.2)
looks = st.lists(st.tuples(unit, unit, st.floats(1, 2000)), max_size=8)


def scaled(points, size):
    """Unit positions to a fixation array in pixels of a frame."""
    array = np.array(points, np.float32).reshape(-1, 3)
    return array * np.array([size[1], size[0], 1], np.float32)


def in_frame(fixations, size):
    return [(x, y, d) for x, y, d in fixations if 0 <= x < size[1] and 0 <= y < size[0]]


def loop_map(fixations, size, grid, sigma, weight, truncate=3.0):
    """The definition, cell by cell."""
    out = np.zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            for x, y, duration in in_frame(fixations, size):
                dy = i + 0.5 - float(y) * grid[0] / size[0]
                dx = j + 0.5 - float(x) * grid[1] / size[1]
                if np.hypot(dx, dy) <= truncate * sigma:
                    mass = duration if weight == "duration" else 1
                    out[i, j] += mass * np.exp(-(dx * dx + dy * dy) / (2 * sigma**2))
    return out / out.max() if out.max() > 0 else out


# ------------------------------------------------------------------------------------------- maps


@settings(max_examples=80, deadline=None)
@given(looks, sizes, grids, st.floats(0.5, 4), st.sampled_from(["count", "duration"]))
def test_map_is_the_sum_of_truncated_gaussians(points, size, grid, sigma, weight):
    fixations = scaled(points, size)
    found = fixation_map(fixations, size, grid, sigma, weight)
    assert found.dtype == np.float32 and found.shape == grid
    np.testing.assert_allclose(found, loop_map(fixations, size, grid, sigma, weight), atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(looks, sizes, grids, st.floats(0.25, 30))
def test_map_lies_between_0_and_1_and_reaches_1(points, size, grid, sigma):
    fixations = scaled(points, size)
    found = fixation_map(fixations, size, grid, sigma)
    assert found.min() >= 0
    assert found.max() == (1 if in_frame(fixations, size) else 0)


def test_map_agrees_with_scipy_at_cell_centres():
    # Fixations in the middle of cells: then blurring the counts is the same thing.
    grid, size = (12, 16), (120, 320)
    cells = np.array([[5, 6], [5, 7], [8, 2], [11, 15]])
    fixations = np.stack(
        [cells[:, 1] * 20 + 10, cells[:, 0] * 10 + 5, [100, 400, 250, 30]], axis=1
    ).astype(np.float32)
    blurred = gaussian_filter(
        fixation_counts(fixations, size, grid, "duration"), 1.5, mode="constant", truncate=9
    )
    found = fixation_map(fixations, size, grid, sigma=1.5, truncate=9)
    np.testing.assert_allclose(found, blurred / blurred.max(), atol=1e-5)


def test_cells_beyond_the_truncation_are_exactly_0():
    found = fixation_map(np.array([[70, 70, 500]]), (140, 140), (14, 14), sigma=1.0)
    row, column = np.mgrid[:14, :14] + 0.5
    far = np.hypot(row - 7, column - 7) > 3
    assert (found[far] == 0).all() and (found[~far] > 0).all() and far.any()


def test_a_flipped_frame_gives_a_flipped_map():
    rng = np.random.default_rng(0)
    fixations = (rng.random((9, 3)) * [300, 200, 900]).astype(np.float32)
    mirrored = fixations * [-1, 1, 1] + [300, 0, 0]
    found = fixation_map(fixations, (200, 300), (7, 9))
    np.testing.assert_allclose(
        fixation_map(mirrored, (200, 300), (7, 9)), found[:, ::-1], atol=1e-5
    )


def test_weights_differ_and_unknown_ones_are_refused():
    fixations = np.array([[5, 5, 100], [95, 5, 1000]])
    by_count = fixation_map(fixations, (10, 100), (1, 10), weight="count")
    by_duration = fixation_map(fixations, (10, 100), (1, 10), weight="duration")
    assert by_count[0, 0] == pytest.approx(1) and by_duration[0, 0] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="weight is 'time'; use 'count' or 'duration'"):
        fixation_map(fixations, (10, 100), (1, 10), weight="time")


@pytest.mark.parametrize("sigma", [0.0, 0.2, -1.0, float("nan")])
def test_a_sigma_that_loses_fixations_is_refused(sigma):
    with pytest.raises(ValueError, match="use a larger sigma"):
        fixation_map(np.array([[0, 0, 1]]), (10, 10), (5, 5), sigma=sigma)


@settings(max_examples=80, deadline=None)
@given(looks, sizes, grids)
def test_counts_are_those_of_a_histogram(points, size, grid):
    fixations = scaled(points, size)
    expected = np.zeros(grid)
    for x, y, _ in in_frame(fixations, size):
        row, column = float(y) * grid[0] / size[0], float(x) * grid[1] / size[1]
        expected[int(row), int(column)] += 1
    found = fixation_counts(fixations, size, grid)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_counts_at_the_borders():
    edge = np.nextafter(np.float32(500), np.float32(0))
    fixations = np.array([[edge, 0, 7], [500, 0, 7], [-0.1, 0, 7], [0, np.nan, 7]], np.float32)
    found = fixation_counts(fixations, (375, 500), (14, 14), "duration")
    assert found[0, 13] == 7 and found.sum() == 7


# ------------------------------------------------------------------------------------------ boxes


@settings(max_examples=60, deadline=None)
@given(st.tuples(unit, unit, unit, unit), grids)
def test_box_map_is_the_share_of_fine_pixels(corners, grid):
    # A box on whole pixels of a frame of 12 pixels a cell: counting pixels is exact.
    size = (grid[0] * 12, grid[1] * 12)
    x0, x1 = sorted(round(corners[k] * size[1]) for k in (0, 2))
    y0, y1 = sorted(round(corners[k] * size[0]) for k in (1, 3))
    pixels = np.zeros(size)
    pixels[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = 1
    expected = pixels.reshape(grid[0], 12, grid[1], 12).mean(axis=(1, 3))
    np.testing.assert_allclose(box_map((x0, y0, x1, y1), size, grid), expected, atol=1e-6)


def test_box_of_nan_covers_nothing_and_a_reversed_one_is_refused():
    assert box_map((np.nan,) * 4, (64, 64), (8, 8)).sum() == 0
    with pytest.raises(ValueError, match="ends before it starts"):
        box_map((30, 0, 20, 10), (64, 64), (8, 8))


# ---------------------------------------------------------------------------------------- to_grid


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), grids, st.integers(0, 2**31 - 1))
def test_to_grid_is_the_area_mean_of_the_valid_part(height, width, grid, seed):
    # Reference: repeat every pixel so often that pixels and cells both divide the raster.
    rng = np.random.default_rng(seed)
    dense = rng.random((height, width)).astype(np.float32)
    known = rng.random((height, width)) < 0.6
    big = np.kron(dense * known, np.ones(grid))
    big_known = np.kron(known, np.ones(grid))
    cells = (grid[0], height, grid[1], width)
    share = big_known.reshape(cells).mean(axis=(1, 3))
    total = big.reshape(cells).mean(axis=(1, 3))
    expected = np.where(share >= 0.5 - 1e-9, total / np.maximum(share, 1e-9), 0)

    found, valid = to_grid(torch.from_numpy(dense), torch.from_numpy(known), grid)
    assert found.dtype == torch.float32 and valid.dtype == torch.bool
    np.testing.assert_array_equal(valid.numpy(), share >= 0.5 - 1e-9)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_to_grid_ignores_what_invalid_pixels_hold():
    dense = torch.tensor([[0.25, float("nan")], [0.75, float("inf")]])
    known = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found, valid = to_grid(dense, known, (1, 2))
    assert found.tolist() == [[0.5, 0.0]] and valid.tolist() == [[True, False]]


# ----------------------------------------------------------------------------------------- reading


def write(tmp_path, text):
    path = tmp_path / "Fixation_run1.txt"
    path.write_text(text)
    return path


def test_read_joins_lines_of_one_image_and_skips_blank_ones(tmp_path):
    found = read_fixations(write(tmp_path, "7,500,375,10,20,150\n\n9,50,40\n7,500,375,1,2,300\n"))
    assert found[7].fixations.tolist() == [[10, 20, 150], [1, 2, 300]]
    assert (found[7].width, found[7].height, found[7].image_id) == (500, 375, 7)
    assert found[9].fixations.shape == (0, 3) and found[9].fixations.dtype == np.float32


def test_read_converts_screen_pixels_of_the_long_header(tmp_path):
    # A 500 x 400 picture shown at 1000 x 800 with its corner at (460, 140).
    found = read_fixations(write(tmp_path, "3,500,400,1000,800,460,140,460,140,90,960,540,200\n"))
    assert found[3].fixations.tolist() == [[0, 0, 90], [250, 200, 200]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,50,40,3,4,5\n1,50,4x,3,4,5\n", "line 2 has '4x' where a number is expected"),
        ("1,50,40,3,nan,5\n", "line 1 has 'nan' where a number"),
        ("1,50,40,3,4,\n", "line 1 has '' where a number"),
        ("1,50\n", "line 1 has 2 values"),
        ("1,50,40,3,4\n", "line 1 has 5 values"),
        ("1,50,40,3,4,5\n2,50,40,3,4,5,6\n", "line 2 has 7 values.*as in line 1"),
        ("1,50,0,3,4,5\n", "line 1 has height 0"),
        ("1.5,50,40,3,4,5\n", "line 1 has image_id 1.5"),
        ("1,50,40,3,4,-5\n", "line 1 has the duration -5 ms"),
        ("1,50,40,3,4,5\n1,51,40,3,4,5\n", "line 2 gives image 1 the size 51 x 40"),
        ("1,50,40,0,80,5,5,9,9,9\n", "line 1 has the size on screen 0 x 80"),
    ],
)
def test_a_malformed_line_is_one_sentence_with_file_line_value_and_remedy(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_fixations(path)
    sentence = str(caught.value)
    assert str(path) in sentence and "restore" in sentence and "\n" not in sentence


def test_a_binary_file_is_refused_in_the_same_way(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="line 1 has"):
        read_fixations(path)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"real gaze is not at {REAL}")
def test_real_gaze_is_read_whole_and_lies_in_its_images():
    paths = sorted(REAL.glob("Fixation_run*.txt"))
    runs = [read_fixations(path) for path in paths]
    assert len(runs) == 5
    fixations = sum(len(r.fixations) for run in runs for r in run.values())
    raw = sum((line.count(",") - 2) // 3 for path in paths for line in path.open())
    assert fixations == raw
    for recording in runs[0].values():
        counts = fixation_counts(recording.fixations, (recording.height, recording.width), (14, 14))
        assert counts.sum() == len(recording.fixations) > 0


# ---------------------------------------------------------------- any source on any grid: human_map


def recording(fixations, size):
    return Recording(1, size[1], size[0], np.asarray(fixations, np.float32).reshape(-1, 3))


def dense_pixels(fixations, size, sigma, weight):
    """The map in another way: impulses on pixels, blurred by scipy, [h, w]."""
    impulses = np.zeros(size)
    for x, y, duration in fixations:
        impulses[int(y), int(x)] += duration if weight == "duration" else 1
    return gaussian_filter(impulses, sigma, mode="constant", truncate=3)


@pytest.mark.parametrize("weight", ["count", "duration"])
@pytest.mark.parametrize("unit", ["patch", "pixel"])
@pytest.mark.parametrize(("size", "grid"), [((333, 500), (14, 14)), ((500, 375), (9, 16))])
def test_gaze_agrees_with_a_dense_reference(size, grid, unit, weight):
    rng = np.random.default_rng(0)
    looks = np.column_stack([rng.uniform(0, size[1], 12), rng.uniform(0, size[0], 12)])
    looks = np.column_stack([looks, rng.uniform(80, 900, 12)])
    halves = (recording(looks[:5], size), recording(looks[5:], size))  # two readers are pooled
    sigma = 1.3 if unit == "patch" else 45.0
    per_axis = np.divide(size, grid) * sigma if unit == "patch" else sigma
    dense = dense_pixels(looks, size, per_axis, weight)
    rows, columns = (
        ((np.arange(g) + 0.5) * s / g).astype(int) for g, s in zip(grid, size, strict=True)
    )
    expected = dense[np.ix_(rows, columns)]
    found, known = human_map(halves, size, grid, sigma, unit, weight)
    assert known.all() and found.max() == 1
    # scipy cuts a square, we cut a circle, and it rounds to pixels
    np.testing.assert_allclose(found, expected / expected.max(), atol=0.02)


@settings(max_examples=40, deadline=None)
@given(looks, sizes, st.integers(1, 4))
def test_a_fine_map_pools_to_a_maximum_of_1(points, size, fine):
    source = (recording(scaled(points, size), size),)
    found, known = human_map(source, size, (4, 5), 1.0, fine=fine)
    assert found.shape == known.shape == (4 * fine, 5 * fine)
    if known.any():
        pooled, _ = to_grid(found, known, (4, 5))
        assert pooled.max().item() == pytest.approx(1, abs=1e-5) or fine == 1
    else:
        assert not found.any() and not in_frame(scaled(points, size), size)


def test_nothing_is_known_without_a_source():
    outside = recording([[-5, 3, 100]], (20, 20))
    for source in (None, (), (outside,), Box((50, 50, 60, 60), 20, 20)):
        found, known = human_map(source, (20, 20), (4, 4))
        assert found.shape == (4, 4) and not found.any() and not known.any()


def test_a_box_is_the_share_of_each_cell():
    found, known = human_map(Box((5, 0, 15, 10), width=20, height=40), (40, 20), (4, 4), fine=2)
    expected = np.zeros((8, 8))
    expected[:2, 2:6] = 1
    np.testing.assert_allclose(found, expected)
    assert known.all()


def test_painted_values_are_taken_as_they_are():
    values = np.array([[0, 0.5], [0, 1]], np.float32)
    known = np.array([[True, True], [False, False]])
    found, valid = human_map(Painted(values, known), None, (2, 2))
    assert torch.equal(found, torch.tensor([[0, 0.5], [0, 0]])) and valid.numpy().tolist() == [
        [True, True],
        [False, False],
    ]
    found, valid = human_map(Painted(values, known), None, (2, 2), fine=2)  # on a finer grid
    assert found[:2, 2:].unique().tolist() == [0.5] and valid.sum() == 8
    zeros = human_map(Painted(np.zeros((2, 2), np.float32), known), None, (2, 2))
    assert torch.equal(zeros[1], valid[::2, ::2])  # "do not look here" is something that is known


# ---------------------------------------------------------------------------------------- map files


def ramp(size=(60, 90)):
    """Rising to the lower right corner, the same at every resolution."""
    rise = [(np.arange(side) + 0.5) / side for side in size]
    return (255 * np.outer(*rise)).round().astype(np.uint8)


def save_map(path, values):
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "values", "tolerance"),
    [
        ("a.png", ramp(), 1e-6),
        ("a.jpg", ramp(), 0.02),
        ("rgb.jpg", np.repeat(ramp()[..., None], 3, axis=2), 0.02),
        ("rgb.png", np.repeat(ramp()[..., None], 3, axis=2), 1e-6),
        ("deep.png", ramp().astype(np.uint16) * 257, 1e-6),
        ("a.npy", ramp(), 1e-6),
        ("deep.npy", ramp().astype(np.uint16) * 257, 1e-6),
        ("other order.npy", (ramp().astype(np.uint16) * 257).astype(">u2"), 1e-6),
        ("float.tif", (ramp() / 255).astype(np.float32), 1e-6),
        ("deep.tif", ramp().astype(np.uint16) * 257, 1e-6),
        ("clear.png", np.dstack([ramp(), np.full((60, 90), 255, np.uint8)]), 1e-6),
        ("float.npy", ramp() / 255, 1e-6),
        ("half.npy", (ramp() / 255).astype(np.float16), 1e-3),
        ("small.png", ramp((20, 30)), 0.03),  # the picture's proportions at a third of its size
    ],
)
def test_every_kind_of_map_file_gives_the_same_map(tmp_path, name, values, tolerance):
    path = save_map(tmp_path / name, values)
    found, known = human_map(path, (60, 90), (4, 6))
    expected = ramp().reshape(4, 15, 6, 15).mean((1, 3))
    assert known.all() and found.dtype == torch.float32
    np.testing.assert_allclose(found, expected / expected.max(), atol=tolerance)


def test_a_map_rendered_from_gaze_gives_the_map_of_the_gaze(tmp_path):
    size, grid = (300, 420), (14, 14)
    looks = np.array([[100, 80, 300], [250, 200, 500], [270, 190, 250]], np.float32)
    sigma = np.divide(size, grid)
    dense = dense_pixels(looks, size, sigma, "duration")
    path = save_map(tmp_path / "7.png", (255 * dense / dense.max()).astype(np.uint8))
    by_file, _ = human_map(path, size, grid)
    by_gaze, _ = human_map((recording(looks, size),), size, grid)
    assert (by_file - by_gaze).abs().max() < 0.06  # area mean against cell centre


def test_squeezed_maps_and_grids_are_taken_as_they_are(tmp_path):
    values = np.random.default_rng(0).random((14, 14)).astype(np.float32)
    found, _ = human_map(save_map(tmp_path / "a.npy", values), (333, 500), (14, 14))
    np.testing.assert_allclose(found, values / values.max(), atol=1e-6)
    squeezed = np.kron(values, np.ones((16, 16), np.float32))
    path = save_map(tmp_path / "b.npy", squeezed)
    found, _ = human_map(path, (333, 500), (14, 14), shown=(224, 224))
    np.testing.assert_allclose(found, values / values.max(), atol=1e-5)


def test_nan_and_transparency_are_not_known(tmp_path):
    values = np.full((40, 40), 0.5, np.float32)
    values[:20, :10] = np.nan
    values[30:, 30:] = 0
    found, known = human_map(save_map(tmp_path / "a.npy", values), (40, 40), (4, 4))
    unknown = np.zeros((4, 4), bool)
    unknown[:2, :1] = True
    assert (known.numpy() == ~unknown).all()
    assert not found[~known].any() and found[3, 3] == 0 and found[3, 0] == 1
    pixels = np.full((40, 40, 4), 128, np.uint8)
    pixels[..., 3] = np.where(np.isnan(values), 0, 255)
    _, same = human_map(save_map(tmp_path / "a.png", pixels), (40, 40), (4, 4))
    assert torch.equal(same, known)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_map_is_turned_by_its_own_exif_as_its_picture_is(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(ramp() // 200 * 255)  # people looked at the lower right corner
    stored.convert("RGB").save(tmp_path / "picture.jpg", exif=exif, quality=95)
    stored.save(tmp_path / "map.jpg", exif=exif, quality=95)
    stored.save(tmp_path / "map.webp", exif=exif, lossless=True)
    seen = np.asarray(read_picture(tmp_path / "picture.jpg").convert("L")) > 128
    for name in ("map.jpg", "map.webp"):
        found, known = human_map(tmp_path / name, picture_size(tmp_path / "picture.jpg"), (30, 30))
        expected, _ = to_grid(torch.from_numpy(seen), torch.ones(seen.shape), (30, 30))
        assert known.all() and (found - expected).abs().max() < 0.05


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), max_size=4), st.integers(0, 400)
)
def test_damaged_arrays_are_read_or_named_and_nothing_else(tmp_path_factory, changes, length):
    path = save_map(tmp_path_factory.getbasetemp() / "damaged.npy", ramp((6, 9)) / 255)
    data = bytearray(path.read_bytes())
    for where, value in changes:
        data[where] = value
    path.write_bytes(data[:length] if length < 200 else data)
    try:
        read_map(path)
    except MapError as error:
        assert str(path) in str(error)


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 400), st.integers(20, 400), st.floats(0.05, 3))
def test_a_map_in_the_pictures_proportions_is_always_accepted(height, width, scale):
    shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    _refuse_other_geometry(Path("a.png"), shape, (height, width), (None, (14, 14)))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("cut.png", ramp((60, 60)), r"cut.png is 60 x 60, but its picture is 90 x 60 pixels"),
        ("turned.png", ramp((90, 60)), r"turned.png is 60 x 90, but its picture is 90 x 60"),
        ("high.npy", np.full((60, 90), 1.5), r"high.npy has values from 1.5 to 1.5; scale them"),
        ("low.npy", np.full((60, 90), -0.1), r"low.npy has values from -0.1"),
        ("whole.npy", np.ones((60, 90), np.int64), "whole.npy holds int64; save bool"),
        ("flat.npy", np.ones(90, np.float32), r"flat.npy has the shape \(90,\)"),
        ("code.npy", np.array([{}] * 4, dtype=object), "code.npy cannot be read as a map"),
    ],
)
def test_map_files_that_do_not_fit_are_refused(tmp_path, name, values, message):
    path = save_map(tmp_path / name, values)
    with pytest.raises(MapError, match=message):
        human_map(path, (60, 90), (4, 6))


def test_broken_and_missing_map_files_are_named(tmp_path):
    with (tmp_path / "several.npy").open("wb") as file:
        np.savez(file, ramp())
    (tmp_path / "folder.npy").mkdir()
    for name in ("several.npy", "folder.npy"):
        with pytest.raises(MapError, match=rf"{name} cannot be read as a map"):
            human_map(tmp_path / name, (60, 90), (4, 6))
    for name in ("a.png", "a.jpg", "a.npy"):
        path = save_map(tmp_path / name, ramp())
        path.write_bytes(path.read_bytes()[:90])
        with pytest.raises(MapError, match=rf"{name} cannot be read as a map"):
            human_map(path, (60, 90), (4, 6))
        path.unlink()
        with pytest.raises(FileNotFoundError, match=name):
            human_map(path, (60, 90), (4, 6))
