"""Pictures that are kept decoded: exact, complete or absent, and shared by processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_files import disk_of
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as v2
from tqdm.auto import tqdm

from lib.data.pictures import AHEAD, SAMPLE, DecodedImages, decoded_images

MIXED = [(30, 40), (40, 30), (16, 50), (50, 16), (12, 12), (21, 20)]  # height, width


def read(paths, index):
    """What a data set does: uint8 [3, h, w], OSError naming a broken file."""
    try:
        with Image.open(paths[index]) as picture:
            return v2.pil_to_tensor(picture.convert("RGB"))
    except OSError as error:
        raise OSError(f"{paths[index]} cannot be decoded.") from error


def read_noted(paths, notes, index):
    """`read` that appends a byte to a file of its own for every picture, in any process."""
    with (notes / str(index)).open("ab") as note:
        note.write(b".")
    time.sleep(0.05)
    return read(paths, index)


def build_noted(paths, folder, notes):
    return decoded_images(paths, folder, 16, partial(read_noted, paths, notes)).path.name


def build_halfway(paths, folder):
    tqdm.set_lock(threading.RLock())  # its own is known to the system, and a kill would leak it

    def decode(index):
        time.sleep(0 if index < 40 else 60)
        return torch.full((3, 64, 64), 7, dtype=torch.uint8)

    decoded_images(paths, folder, (64, 64), decode)


def process_id():
    """Of a process that has loaded this file, and with it all that it needs."""
    return os.getpid()


@pytest.fixture(scope="module")
def other_process():
    """Gives one spawned process, the same for all tests until one kills it: torch loads slowly."""
    pools = []

    def alive():
        try:
            pools[-1].submit(process_id).result()
        except (IndexError, BrokenProcessPool):
            spawn = multiprocessing.get_context("spawn")
            pools.append(ProcessPoolExecutor(1, mp_context=spawn))
            pools[-1].submit(process_id).result()
        return pools[-1]

    yield alive
    for pool in pools:
        pool.shutdown()


def pictures(folder, sizes=MIXED, seed=0):
    """JPEG files of noise, one for each (height, width)."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03d}.jpg" for i in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
    return paths


def cached(paths, folder, size):
    return decoded_images(paths, folder, size, partial(read, paths))


def never(index):
    raise AssertionError(f"picture {index} was decoded although it is in the cache")


def squeezed(paths, size):
    return [v2.resize(read(paths, i), list(size), antialias=True) for i in range(len(paths))]


def same(images, expected):
    assert len(images) == len(expected)
    for found, wanted in zip(images, expected, strict=True):
        assert found.dtype == torch.uint8 and torch.equal(found, wanted)


def left_in(folder):
    """Names of what lies in the folder, the lock aside."""
    return sorted(path.name for path in folder.iterdir() if path.name != "decoded.lock")


# ---------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("size", [(20, 20), (14, 28), (64, 48)])
def test_a_fixed_size_is_bit_for_bit_what_decoding_and_resizing_gives(tmp_path, size):
    paths = pictures(tmp_path / "jpg")
    images = cached(paths, tmp_path / "cache", size)
    same(images, squeezed(paths, size))
    assert images.path.stat().st_size == len(paths) * (3 * size[0] * size[1] + 8) + 4
    assert left_in(tmp_path / "cache") == [images.path.name]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5),
    st.integers(1, 40),
)
def test_a_shorter_side_keeps_proportions_and_never_enlarges(tmp_path_factory, sizes, shorter):
    folder = tmp_path_factory.mktemp("shorter")
    paths = pictures(folder / "jpg", sizes)
    for image, (h, w), i in zip(cached(paths, folder, shorter), sizes, range(9), strict=False):
        if min(h, w) <= shorter:
            assert torch.equal(image, read(paths, i))
        else:
            height, width = image.shape[1:]
            assert min(height, width) == shorter
            assert height == pytest.approx(shorter * h / min(h, w), abs=1)
            assert width == pytest.approx(shorter * w / min(h, w), abs=1)
            assert torch.equal(image, v2.resize(read(paths, i), [height, width], antialias=True))


def test_the_second_run_reads_and_decodes_nothing(tmp_path):
    paths = pictures(tmp_path / "jpg")
    first = cached(paths, tmp_path / "cache", 16)
    second = decoded_images(paths, tmp_path / "cache", 16, never)
    assert second.path == first.path
    same(second, list(first))
    assert torch.equal(second[-1], first[len(paths) - 1])
    with pytest.raises(IndexError):
        second[len(paths)]


def test_order_is_kept_and_only_a_few_dozen_pictures_wait_for_being_written(tmp_path, monkeypatch):
    paths = pictures(tmp_path / "jpg", [(8, 8)]) * 200
    started, written, waiting = [], [], []

    def watched(items, *args, **kwargs):
        for item in tqdm(items, *args, **kwargs):
            waiting.append(len(started) - len(written))
            written.append(1)
            time.sleep(0.001)  # a slow disk
            yield item

    def slow_at_first(index):
        started.append(index)
        time.sleep(0.02 if index % 8 == 0 else 0)  # threads finish out of order
        return torch.full((3, 2, 2), index, dtype=torch.uint8)

    monkeypatch.setattr("lib.data.pictures.tqdm", watched)
    images = decoded_images(paths, tmp_path / "cache", (2, 2), slow_at_first)
    assert [int(image.float().mean()) for image in images] == list(range(200))
    assert len(started) == len(written) == 200 and max(waiting) <= AHEAD


def test_a_picture_is_the_callers_own_and_gives_no_warning(tmp_path, recwarn):
    paths = pictures(tmp_path / "jpg")
    images = cached(paths, tmp_path / "cache", (9, 9))
    before = images.path.read_bytes()
    kept = images[0].clone()
    images[0].zero_()
    assert torch.equal(images[0], kept) and images.path.read_bytes() == before
    assert not recwarn.list


def smooth(height, width, seed):
    """A picture of blobs and a gradient without edges: uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 100
    waves = [
        np.sin(rng.uniform(1, 4) * x + rng.uniform(1, 4) * y + rng.uniform(0, 6)) for _ in range(9)
    ]
    return np.stack([127 + 40 * sum(waves[c::3]) for c in range(3)], axis=2).clip(0, 255)


def test_crops_of_a_shorter_side_differ_by_a_small_resampling_error(tmp_path):
    # The same window of the original and of the cache, which is 2 / 3 as large.
    paths = [tmp_path / f"{i}.png" for i in range(8)]
    for i, path in enumerate(paths):
        Image.fromarray(smooth(300, 400, i).astype(np.uint8)).save(path)
    rng = np.random.default_rng(0)
    errors = []
    for i, small in enumerate(cached(paths, tmp_path / "cache", 200)):
        assert small.shape == (3, 200, 266)
        for _ in range(10):
            h, w = 3 * rng.integers(40, 101), 3 * rng.integers(40, 134)
            top, left = 3 * rng.integers(0, 101 - h // 3), 3 * rng.integers(0, 134 - w // 3)
            window = np.array([top, left, h, w])
            crops = [
                v2.resized_crop(picture, *box.tolist(), [112, 112], antialias=True).float()
                for picture, box in ((read(paths, i), window), (small, window * 2 // 3))
            ]
            errors.append((crops[0] - crops[1]).abs().mean().item())
    print(f"mean absolute difference {np.mean(errors):.3f}, worst crop {max(errors):.3f} of 255")
    assert 0 < np.mean(errors) < 1 and max(errors) < 2


# ------------------------------------------------------------------------------------ which entry


def test_what_changes_the_key(tmp_path):
    paths = pictures(tmp_path / "jpg")
    folder = tmp_path / "cache"
    entries = {cached(paths, folder, 16).path}

    def new(paths, size=16):
        count = len(entries)
        entries.add(cached(paths, folder, size).path)
        return len(entries) == count + 1

    assert not new(paths)
    assert new(paths, 15) and new(paths, (16, 16)) and new(paths, (16, 15))
    assert new(paths[::-1]) and new(paths[:-1])
    stat = paths[2].stat()
    os.utime(paths[2], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert new(paths)
    with paths[2].open("ab") as file:
        file.write(b"\0")
    os.utime(paths[2], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert new(paths)
    paths[3] = paths[3].rename(paths[3].with_name("other.jpg"))
    assert new(paths)
    assert left_in(folder) == sorted(path.name for path in entries)


def test_a_changed_picture_is_read_anew(tmp_path):
    paths = pictures(tmp_path / "jpg")
    cached(paths, tmp_path / "cache", (9, 9))
    Image.new("RGB", (33, 33), "red").save(paths[1])
    same(cached(paths, tmp_path / "cache", (9, 9)), squeezed(paths, (9, 9)))


def test_a_moved_data_set_keeps_its_entry_and_two_in_one_folder_do_not_collide(tmp_path):
    one, two = pictures(tmp_path / "one", seed=1), pictures(tmp_path / "two", seed=2)
    folder = tmp_path / "cache"
    first, second = cached(one, folder, (9, 9)), cached(two, folder, (9, 9))
    same(first, squeezed(one, (9, 9)))
    same(second, squeezed(two, (9, 9)))
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    moved = [tmp_path / "elsewhere" / path.name for path in one]
    assert decoded_images(moved, folder, (9, 9), never).path == first.path


# -------------------------------------------------------------------------------- complete or not


def test_two_processes_at_once_decode_every_picture_once(tmp_path, other_process):
    paths = pictures(tmp_path / "jpg", MIXED * 4)
    folder, notes = tmp_path / "cache", tmp_path / "notes"
    notes.mkdir()
    theirs = other_process().submit(build_noted, paths, folder, notes)
    ours = build_noted(paths, folder, notes)
    assert ours == theirs.result()
    assert {note.name: note.read_bytes() for note in notes.iterdir()} == {
        str(i): b"." for i in range(len(paths))
    }
    images = decoded_images(paths, folder, 16, never)
    assert left_in(folder) == [images.path.name] == [ours]
    assert torch.equal(images[4], read(paths, 4))


def test_killed_half_way_leaves_nothing_that_is_read_and_nothing_that_piles_up(
    tmp_path, other_process
):
    folder = tmp_path / "cache"
    paths = pictures(tmp_path / "jpg", [(20, 30)] * 80)
    folder.mkdir()
    (folder / "decoded-0123456789abcdef.building").write_bytes(b"of a data set that has changed")
    process = other_process()
    victim = process.submit(process_id).result()
    build = process.submit(build_halfway, paths, folder)
    # 40 pictures of 12 kB are decoded, the 41st sleeps; wait until one of them is in the file
    while sum(path.stat().st_size for path in folder.glob("*.building")) < 3 * 64**2:
        assert not build.done()
        time.sleep(0.02)
    os.kill(victim, signal.SIGKILL)
    assert isinstance(build.exception(), BrokenProcessPool)
    (left,) = left_in(folder)
    assert left.endswith(".building") and "0123456789abcdef" not in left

    images = cached(paths, folder, (64, 64))
    same(images, squeezed(paths, (64, 64)))
    assert left_in(folder) == [images.path.name]
    assert images.path.stem == left.removesuffix(".building")  # the very entry that was killed


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:30],
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: bytes(60) + whole[60:],
        lambda whole: whole[:4] + bytes([whole[4] ^ 1]) + whole[5:],
        lambda whole: whole[8:16] + whole[:8] + whole[16:],
    ],
    ids=["empty", "in the table", "one byte less", "one more", "zeros", "a bit", "swapped sizes"],
)
def test_a_damaged_entry_is_noticed_and_built_again(tmp_path, damage):
    paths = pictures(tmp_path / "jpg")
    entry = cached(paths, tmp_path / "cache", 12).path
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    with pytest.raises(ValueError, match="is damaged; delete it"):
        DecodedImages(entry, len(paths))
    assert cached(paths, tmp_path / "cache", 12).path == entry
    assert entry.read_bytes() == whole


@pytest.mark.parametrize("size", [(9, 9), 9])
def test_a_broken_picture_is_named_and_nothing_is_left(tmp_path, size):
    paths = pictures(tmp_path / "jpg", MIXED * 12)
    whole = paths[50].read_bytes()
    paths[50].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"050.jpg cannot be decoded"):
        cached(paths, tmp_path / "cache", size)
    assert left_in(tmp_path / "cache") == []
    paths[50].write_bytes(whole)
    assert len(cached(paths, tmp_path / "cache", size)) == len(paths)


def test_a_missing_picture_is_named(tmp_path):
    paths = pictures(tmp_path / "jpg")
    paths[3].unlink()
    with pytest.raises(FileNotFoundError, match=r"003.jpg cannot be read .*restore the file"):
        cached(paths, tmp_path / "cache", 9)
    with pytest.raises(ValueError, match="no pictures"):
        cached([], tmp_path / "cache", 9)


@pytest.mark.parametrize(
    "pixels", [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)], ids=["float", "grey"]
)
def test_what_is_not_uint8_rgb_is_refused(tmp_path, pixels):
    paths = pictures(tmp_path / "jpg")
    with pytest.raises(ValueError, match=r"000.jpg was decoded to .*uint8 \[3, h, w\] is expected"):
        decoded_images(paths, tmp_path / "cache", 8, lambda index: pixels)
    assert left_in(tmp_path / "cache") == []


# -------------------------------------------------------------------------------- room and rights


@pytest.mark.parametrize(
    ("size", "needed", "most"), [((100, 100), r"3\.0 MB", 0), (100, r"4\.0 MB", SAMPLE + AHEAD)]
)
def test_too_little_room_is_said_before_the_work(tmp_path, monkeypatch, size, needed, most):
    # 100 pictures: 30,000 bytes each squeezed, 39,900 at shorter side 100 (100 x 133)
    paths = pictures(tmp_path / "jpg", [(120, 160)]) * 100
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_500_000))
    decoded = []

    def noted(index):
        decoded.append(index)
        return read(paths, index)

    with pytest.raises(OSError, match=rf"need {needed}, but .*cache has room for 2\.5 MB; set CAC"):
        decoded_images(paths, tmp_path / "cache", size, noted)
    assert len(decoded) <= most
    assert left_in(tmp_path / "cache") == []


def test_a_disk_that_is_full_while_writing_is_said_in_the_same_way(tmp_path):
    paths = pictures(tmp_path / "jpg", [(100, 100)] * 40)
    message = r"need 1\.2 MB, but .*has room for 0\.7 MB; set CA"
    with disk_of(700_000), pytest.raises(OSError, match=message):
        cached(paths, tmp_path / "cache", 100)
    assert left_in(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_written_is_said_with_the_remedy(tmp_path):
    paths = pictures(tmp_path / "jpg")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"file.* cannot be written \(.*\); set CACHE to another"):
            cached(paths, folder, 9)
    assert (tmp_path / "file").read_bytes() == b""


def test_a_read_only_folder_gives_what_it_has_and_refuses_what_it_has_not(tmp_path):
    paths = pictures(tmp_path / "jpg")
    folder = tmp_path / "cache"
    cached(paths, folder, 9)
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    try:
        assert len(decoded_images(paths, folder, 9, never)) == len(paths)
        with pytest.raises(OSError, match=r"cache cannot be written \(Permission denied\); set CA"):
            cached(paths, folder, 10)
    finally:
        folder.chmod(0o755)


# ---------------------------------------------------------------------------------------- workers


def large(folder):
    """5 MB of decoded pictures: 34 of 224 x 224."""
    paths = pictures(folder / "jpg", [(20 + i % 5, 30) for i in range(34)])
    return paths, cached(paths, folder / "cache", (224, 224))


def test_a_pickle_holds_no_pixels_and_opens_the_file_on_first_use(tmp_path):
    paths, images = large(tmp_path)
    assert images.path.stat().st_size > 5e6
    images[0]  # the map is open now
    kept = pickle.dumps(images)
    assert len(kept) < 1000
    again = pickle.loads(kept)
    assert "_bytes" in vars(images) and "_bytes" not in vars(again)
    same(again, squeezed(paths, (224, 224)))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader_read_the_right_pictures(tmp_path, start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} on this system")
    paths, images = large(tmp_path)
    images[0]
    loader = DataLoader(images, batch_size=8, num_workers=2, multiprocessing_context=start)
    same(torch.cat(list(loader)), squeezed(paths, (224, 224)))
