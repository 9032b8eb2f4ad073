"""A file becomes the pixels that people see, or is named; decoded ones are exact and shared."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from test_files import disk_of
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as v2
from tqdm.auto import tqdm

from lib import __main__ as command_line
from lib.data import pictures as of_files
from lib.data.maps import MapError, read_map
from lib.data.pictures import (
    AHEAD,
    SAMPLE,
    DecodedImages,
    PictureError,
    decoded_images,
    is_in_colours,
    picture_size,
    read_picture,
)

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


# ------------------------------------------------------------------------- from a file to pixels


def png(samples, depth, colour, *chunks, size=None):
    """A PNG by its definition: samples [h, w, c] of `depth` bits, colour type, further chunks."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = size or samples.shape[:2]
    bits = samples[..., None] >> np.arange(depth)[::-1] & 1
    rows = np.packbits(bits.reshape(len(samples), -1).astype(bool), axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = (b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def tiff(pixels, bits, kind, light=1, orientation=b"", order="<", size=None):
    """A TIFF by its definition: bytes of one strip, bits, sample format; `orientation` an entry."""
    height, width, channels = size or pixels.shape
    data = pixels.tobytes()
    # tag, type (3 is SHORT, 4 LONG), value
    tags = [(256, 4, width), (257, 4, height), (259, 3, 1), (262, 3, light), (277, 3, channels)]
    tags += [(273, 4, 8), (278, 4, height), (279, 4, len(data)), (339, 3, kind)]
    entries = {tag: struct.pack(order + "HHIHH", tag, t, 1, v, 0) for tag, t, v in tags if t == 3}
    entries |= {tag: struct.pack(order + "HHII", tag, t, 1, v) for tag, t, v in tags if t == 4}
    directory = 8 + len(data)
    if channels == 1:
        entries[258] = struct.pack(order + "HHIHH", 258, 3, 1, bits, 0)
    else:
        entries[258] = struct.pack(order + "HHII", 258, 3, channels, directory)
        data += struct.pack(order + f"{channels}H", *[bits] * channels)
    if orientation:
        entries[274] = orientation
    start = 8 + len(data)
    if len(orientation) > 12:  # its value lies elsewhere, here at the end
        end = start + 2 + 12 * len(entries) + 4
        entries[274] = orientation[:8] + struct.pack(order + "I", end)
    listed = b"".join(entries[tag] for tag in sorted(entries))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return (
        head + data + struct.pack(order + "H", len(entries)) + listed + b"\0" * 4 + orientation[12:]
    )


PNGS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # colour: depths


@settings(max_examples=80)
@given(
    st.sampled_from([(colour, depth) for colour, depths in PNGS.items() for depth in depths]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_every_kind_of_png_is_what_people_see(tmp_path_factory, kind, clear, seed):
    """Depths, palettes, alpha and transparent colours, against the definition; maps as well."""
    (colour, depth), rng = kind, np.random.default_rng(seed)
    top = 2**depth - 1
    samples = rng.integers(0, top + 1, (5, 7, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]))
    channels, chunks, alpha = samples / top, [], np.ones((5, 7))
    if colour in (4, 6):
        channels, alpha = channels[..., :-1], channels[..., -1]
    elif colour == 3:
        palette, opacity = rng.integers(0, 256, (top + 1, 3)), rng.integers(0, 256, top + 1)
        channels = palette[samples[..., 0]] / 255
        chunks.append((b"PLTE", palette.astype(np.uint8).tobytes()))
        if clear:
            alpha = opacity[samples[..., 0]] / 255
            chunks.append((b"tRNS", opacity.astype(np.uint8).tobytes()))
    elif clear:
        alpha = 1.0 - (samples == samples[2, 3]).all(axis=2)
        chunks.append((b"tRNS", samples[2, 3].astype(">u2").tobytes()))
    path = tmp_path_factory.getbasetemp() / "kind.png"
    path.write_bytes(png(samples, depth, colour, *chunks))
    expected = 255 * (channels * alpha[..., None] + 1 - alpha[..., None])
    found = read_picture(path)
    assert found.mode == "RGB" and picture_size(path) == (5, 7)
    np.testing.assert_allclose(np.asarray(found), np.broadcast_to(expected, (5, 7, 3)), atol=2.1)
    values, known = read_map(path)
    np.testing.assert_array_equal(known, np.broadcast_to(alpha * 255 >= 127.501, (5, 7)))
    grey = channels @ (0.299, 0.587, 0.114) if channels.shape[2] == 3 else channels[..., 0]
    np.testing.assert_allclose(values, grey, atol=1.6 / 255)
    assert is_in_colours(path) == (np.ptp(np.asarray(found).astype(int), axis=2).max() > 24)


DRAWN = np.kron(np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8), np.ones((8, 8, 1)))
DRAWN = DRAWN.astype(np.uint8)
SEEN = {  # what people see of an array that is stored with an orientation
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}
TYPES = {  # of TIFF: how numbers are written; None: characters or bytes
    **{1: None, 2: None, 3: "H", 4: "I", 5: "II", 6: "b", 7: None, 8: "h", 9: "i", 10: "ii"},
    **{11: "f", 12: "d"},
}


def entry(kind, value, count, order):
    """An orientation of any type in a directory of EXIF; beyond 12 bytes its value, to be moved."""
    form = TYPES[kind]
    if form is None:
        one = str(value % 256).encode() if kind == 2 else bytes([value % 256])
    elif len(form) == 2:
        one = struct.pack(order + form, value, 1)
    else:
        bits = 8 * struct.calcsize(form)
        wrapped = value if form in "fdHI" else (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
        one = struct.pack(order + form, wrapped)
    values = one * count + (b"\0" if kind == 2 else b"")
    length = len(values) if form is None else count
    return struct.pack(order + "HHI", 0x0112, kind, length) + (
        values.ljust(4, b"\0") if len(values) <= 4 else b"\0" * 4 + values
    )


@settings(max_examples=120)
@given(
    st.sampled_from(["jpg", "png", "webp", "tif"]),
    st.sampled_from(sorted(TYPES)),
    st.sampled_from([*range(10), 65535]),
    st.integers(1, 2),
    st.sampled_from("<>"),
)
@pytest.mark.filterwarnings("ignore:Metadata Warning")
def test_orientations_are_obeyed_if_they_are_numbers_from_1_to_8(
    tmp_path_factory, suffix, kind, value, count, order
):
    """Of any number type, as Pillow and viewers do; maps are turned by their own."""
    path = tmp_path_factory.getbasetemp() / f"turned.{suffix}"
    tag = entry(kind, value, count, order)
    stored = DRAWN
    if suffix == "tif":
        path.write_bytes(tiff(DRAWN, 8, 1, 2, tag, order))
    else:
        start = struct.pack(order + "IH", 8, 1)
        where = struct.pack(order + "I", 26) if len(tag) > 12 else tag[8:]
        head = b"II*\0" if order == "<" else b"MM\0*"
        exif = b"Exif\0\0" + head + start + tag[:8] + where + b"\0" * 4 + tag[12:]
        Image.fromarray(DRAWN).save(path, lossless=True, exif=exif)
        if suffix == "jpg":
            with Image.open(path) as plain:
                stored = np.asarray(plain)
    seen = SEEN.get(value, np.asarray)(stored) if TYPES[kind] else stored
    np.testing.assert_array_equal(np.asarray(read_picture(path)), seen)
    assert picture_size(path) == seen.shape[:2]
    grey = np.asarray(Image.fromarray(np.ascontiguousarray(seen)).convert("L")) / 255
    np.testing.assert_allclose(read_map(path)[0], grey, atol=1.1 / 255)


def test_an_exif_that_is_broken_leaves_the_picture_as_it_lies(tmp_path):
    whole = entry(3, 6, 1, "<")
    broken = {
        "nothing": b"Exif\0\0",
        "no head": b"Exif\0\0" + b"?" * 30,
        "cut": b"Exif\0\0II*\0\x08\0\0\0\x02\0" + whole[:7],
        "far": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    }
    for name, exif in broken.items():
        path = tmp_path / f"{name}.jpg"
        Image.fromarray(DRAWN).save(path, exif=exif)
        assert picture_size(path) == DRAWN.shape[:2] == np.asarray(read_picture(path)).shape[:2]
    # Another tag that is broken (Pillow's own exif_transpose raises) does not stop the turning.
    gps = struct.pack("<HHII", 0x829A, 5, 1, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + whole + gps + b"\0" * 4
    Image.fromarray(DRAWN).save(tmp_path / "other.jpg", exif=exif)
    assert picture_size(tmp_path / "other.jpg") == read_picture(tmp_path / "other.jpg").size[::-1]
    assert picture_size(tmp_path / "other.jpg") == (32, 24)


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")


def test_modes_of_every_container_are_converted_over_white(tmp_path):
    """What Pillow holds of a picture is what is read of it, transparency over white."""
    ramp = np.linspace(0, 255, DRAWN[..., 0].size).reshape(DRAWN.shape[:2]).astype(np.uint8)
    clear = Image.fromarray(np.dstack([DRAWN, ramp]))
    done = []
    for mode in MODES:
        base = clear if mode in ("LA", "PA", "RGBA") else clear.convert("RGB")
        picture = base.convert("RGB").convert("P") if mode[0] == "P" else base.convert(mode)
        picture = picture.convert(mode)
        for suffix in ("tif", "png", "webp", "gif", "bmp", "jpg", "jp2", "ppm", "tga", "avif"):
            path = tmp_path / f"{mode}.{suffix}"
            try:
                picture.save(path)
                with Image.open(path) as stored:
                    rgba = np.asarray(stored.convert("RGBA")).astype(float)
            except (OSError, ValueError, KeyError):  # not of this container, or of this Pillow
                continue
            alpha = rgba[..., 3:] / 255
            expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
            np.testing.assert_allclose(np.asarray(read_picture(path)), expected, atol=1)
            assert picture_size(path) == DRAWN.shape[:2]
            done.append(path.name)
    assert {"CMYK.jpg", "PA.tif", "RGBA.webp", "LAB.tif", "P.gif", "LA.png"} <= {*done}


LEVELS = np.linspace(0, 65535, 40).round().astype(np.uint16).reshape(5, 8)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("grey.png", png(LEVELS[..., None].astype(int), 16, 0)),
        ("little.tif", tiff(LEVELS[..., None].astype("<u2"), 16, 1)),
        ("big.tif", tiff(LEVELS[..., None].astype(">u2"), 16, 1, order=">")),
        ("white is 0.tif", tiff((65535 - LEVELS)[..., None].astype("<u2"), 16, 1, light=0)),
        ("float.tif", tiff((LEVELS / 65535)[..., None].astype("<f4"), 32, 3)),
        ("big float.tif", tiff((LEVELS / 65535)[..., None].astype(">f4"), 32, 3, order=">")),
        ("float 0.tif", tiff((1 - LEVELS / 65535)[..., None].astype("<f4"), 32, 3, light=0)),
        ("grey.pgm", b"P5 8 5 65535\n" + LEVELS.astype(">u2").tobytes()),
        ("text.pgm", b"P2 8 5 65535\n" + " ".join(map(str, LEVELS.ravel())).encode()),
        ("grey.jp2", None),
    ],
)
def test_deep_grey_is_scaled_by_its_range(tmp_path, name, data):
    path = tmp_path / name
    if data is None:
        Image.fromarray(LEVELS).save(path)
    else:
        path.write_bytes(data)
    found = np.asarray(read_picture(path))
    np.testing.assert_array_equal(found, np.repeat(np.round(LEVELS / 257)[..., None], 3, axis=2))
    np.testing.assert_allclose(read_map(path)[0], LEVELS / 65535, atol=1e-6)
    assert picture_size(path) == (5, 8) and not is_in_colours(path)


def test_twelve_bits_are_scaled_by_their_own_range(tmp_path):
    packed = np.frombuffer(b"\0\x0f\xff", np.uint8)  # 0 and 4095
    (tmp_path / "a.tif").write_bytes(tiff(packed, 12, 1, size=(1, 2, 1)))
    assert np.asarray(read_picture(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png", "avif"])
def test_the_first_of_several_frames_is_read(tmp_path, suffix):
    if f".{suffix}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow does not know {suffix}")
    first, second = Image.fromarray(DRAWN), Image.fromarray(255 - DRAWN)
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=[second, second], lossless=True)
    alone = tmp_path / f"alone.{suffix}"
    first.save(alone, lossless=True)
    found, wanted = (np.asarray(read_picture(file)).astype(int) for file in (path, alone))
    assert abs(found - wanted).max() <= (16 if suffix == "avif" else 0)
    assert abs(found - DRAWN).mean() < 30


def whole(suffix, **options):
    file = io.BytesIO()
    Image.fromarray(DRAWN).save(file, suffix, **options)
    return file.getvalue()


NO_BYTES = np.zeros((1, 1, 1), int)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "it is empty; restore it"),
        (b"<!DOCTYPE html><title>404</title>", r"it begins with b'<!DOCTYPE html>.', which is no"),
        (b"version https://git-lfs.github.com/spec/v1\n", "begins with b'version https://'"),
        (b"\0\0\0\x18ftypheic" + bytes(40), r"ftypheic.*, which is no .*save it as JPEG or PNG"),
        (whole("jpeg")[:-100], r"truncated .*; restore it from where it came from\.$"),
        (whole("png")[:-30], "(truncated|broken)"),
        (whole("webp")[:40], "decoder"),
        (png(NO_BYTES, 1, 0, size=(20_000, 9_500)), "more than 178,956,970 pixels; make it small"),
        (png(NO_BYTES, 1, 0, size=(90_000, 90_000)), "more than 178,956,970 pixels; make it sma"),
        (tiff(np.ones((2, 2, 1), "<u4"), 32, 1), "integers of 32 bits .* save it with 8 or 16"),
        (tiff(np.ones((2, 2, 1), "<i2"), 16, 2), "integers of 32 bits or with a sign"),
        (tiff(np.full((2, 2, 1), 7, "<f4"), 32, 3), "values from 7 to 7; scale them to .* 0 to 1"),
        (tiff(np.full((2, 2, 1), np.nan, "<f4"), 32, 3), "values from nan to nan; scale them"),
        (tiff(np.ones((2, 2, 3), "<f4"), 32, 3, 2), "it begins with b'II"),
    ],
)
def test_what_cannot_be_used_is_named_with_the_remedy(tmp_path, data, says):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(PictureError, match=rf"a\.png cannot be decoded: .*{says}") as caught:
        read_picture(path)
    assert "\n" not in str(caught.value) and str(caught.value).count(str(path)) == 1
    picture_size(path)
    if "nan" not in says:  # in a map: not known
        with pytest.raises(MapError, match=r"a\.png (cannot be read as a map: |has values)"):
            read_map(path)


def test_folders_pipes_missing_files_and_forbidden_ones_are_named(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # to open it would wait for ever
    for path in (tmp_path / "folder.jpg", tmp_path / "pipe.jpg"):
        with pytest.raises(PictureError, match="it is a folder or a device; move it away"):
            read_picture(path)
        assert picture_size(path) is None
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "file").touch()
    for path in (tmp_path / "gone.jpg", tmp_path / "link.jpg", tmp_path / "file" / "a.jpg"):
        with pytest.raises(FileNotFoundError, match=r"jpg is missing; set DATA_DIR"):
            read_picture(path)
        assert picture_size(path) is None
    assert picture_size(tmp_path / "a\0.jpg") is None
    path = tmp_path / "closed.jpg"
    path.write_bytes(whole("jpeg"))
    path.chmod(0)
    if not os.access(path, os.R_OK):
        with pytest.raises(
            PictureError, match=r"closed\.jpg .*Permission denied; make it readable"
        ):
            read_picture(path)


def test_large_pictures_and_long_metadata_are_read_in_silence(tmp_path):
    path = tmp_path / "a.png"
    texts = PngImagePlugin.PngInfo()
    texts.add_text("history", "a layer was moved " * 200_000, zip=True)  # 3.6 MB
    Image.fromarray(DRAWN).save(path, pnginfo=texts, icc_profile=bytes(2_000_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(np.asarray(read_picture(path)), DRAWN)
        path.write_bytes(png(NO_BYTES, 1, 0, size=(17_000, 10_000)))  # Pillow warns from 89 million
        assert picture_size(path) == (17_000, 10_000)


def test_a_size_is_that_of_the_file_as_it_is_now(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"broken")
    assert picture_size(path) is None
    for size in ((4, 6), (6, 4)):  # of files as long as each other, written within one second
        Image.new("RGB", size[::-1]).save(path)
        os.utime(path, ns=(1, 1_700_000_000_000_000_000 + size[0]))
        assert picture_size(path) == size


SMALL = [
    whole("jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry(3, 6, 1, "<") + b"\0" * 4),
    whole("png", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry(3, 6, 1, "<") + b"\0" * 4),
    whole("webp", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry(3, 6, 1, "<") + b"\0" * 4),
    whole("gif"),
    tiff(DRAWN, 8, 1, 2, entry(3, 6, 1, "<")),
    whole("tiff", compression="tiff_lzw"),
]


@settings(max_examples=250)
@given(
    st.sampled_from(SMALL),
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=5),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_are_read_or_named_and_nothing_else(
    tmp_path_factory, data, length, changes, in_front
):
    data = bytearray(data[: max(1, length % (3 * len(data)))])  # two of three are not cut
    for where, value in changes:  # most of what can go wrong lies in front
        data[where % min(len(data), 150 if in_front else 10**6)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    path.write_bytes(data)
    size = picture_size(path)
    try:
        found = read_picture(path)
        assert found.mode == "RGB" and found.size[::-1] == size
    except PictureError as error:
        assert str(path) in str(error)
    try:
        values, known = read_map(path)
        assert values.shape == known.shape == size
    except MapError as error:
        assert str(path) in str(error)


def test_many_threads_read_the_same(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for path, data in zip(paths, SMALL, strict=False):
        path.write_bytes(data)
    alone = [np.asarray(read_picture(path)) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        for index, found in enumerate(pool.map(read_picture, paths * 25)):
            np.testing.assert_array_equal(np.asarray(found), alone[index % 4])


class Broken:
    """A data set whose one picture cannot be read."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise PictureError("a.jpg cannot be decoded: it is empty; restore it.")


def test_the_command_line_says_one_sentence_of_what_a_worker_of_a_loader_met(monkeypatch, capsys):
    def command(*_, **__):
        list(DataLoader(Broken(), num_workers=1))

    monkeypatch.setattr(command_line.tyro.extras, "subcommand_cli_from_dict", command)
    assert command_line.main([]) == 2
    said = capsys.readouterr().err
    assert said == "error: a.jpg cannot be decoded: it is empty; restore it.\n"


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


def test_entries_that_hold_other_pixels_than_are_read_today_are_not_found(tmp_path, monkeypatch):
    """Of older versions: transparency was black, 16 bits were cut. All others stay."""
    path = tmp_path / "a.png"
    for mode, stays in (("RGB", True), ("L", True), ("P", True), ("RGBA", False), ("I;16", False)):
        Image.new(mode, (9, 9)).save(path)
        now = of_files.pictures_key([path], [9])
        with monkeypatch.context() as patch:
            patch.setattr(of_files, "_was_misread", lambda *file: False)
            assert (of_files.pictures_key([path], [9]) == now) == stays, mode


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
