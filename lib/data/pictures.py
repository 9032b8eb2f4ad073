"""How a file becomes pixels, and pixels that are kept decoded: the only file that opens pictures.

Kept decoded, pictures lie in one file on disk, so that training decodes every JPEG once, not every
epoch. An entry of this cache is one file: the size of every picture (int32 [N, 2]: height, width;
then the CRC-32 of that table), then all pixels (uint8, picture after picture, channels last as
Pillow decodes them: a random crop is resized almost twice as fast from that order). It is mapped
into memory: epochs, runs and the worker processes of a DataLoader share the pages that the system
keeps of it.

The name of an entry holds a key over the names, byte sizes and modification times of the pictures
and the size they are kept in. Other pictures make another entry; an old one is never changed, and
deleting the folder is always safe. What the key cannot see: a picture that changed under the same
byte size and time, and another way of decoding.

How exact: with a fixed size, what is read is bit for bit what decoding and resizing gives. With a
shorter side, a crop is resized twice, here and after the cut, which smooths it a little: kept at
shorter side 200 and cropped to 112, drawn smooth pictures of 400 x 300 differ by 0.5 of 255 in the
mean (a test measures it), photographs of birds by 1.6. A picture whose shorter side is not longer
is kept as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as v2
from tqdm.auto import tqdm

from lib.files import disk_is_full, replacing

DATA_REMEDY = "set DATA_DIR to the folder that holds the data, or fill datasets/ (see its README)"
CACHE_REMEDY = "set CACHE to another folder, or to 0 to decode every time"
CACHE_FORMAT = 1  # of an entry; part of the key
THREADS = min(16, os.cpu_count() or 1)
AHEAD = 32  # pictures that wait for being written: bounds the memory
SAMPLE = 16  # pictures that the size of the whole is estimated from


def picture_size(path: Path) -> tuple[int, int] | None:
    """Height and width of what `read_picture` gives, from the header; None if unreadable."""
    try:
        return _header_size(path)
    except (OSError, SyntaxError):
        return None


@lru_cache(maxsize=100_000)  # errors are not kept: a file may be mended
def _header_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as header:
        turned = header.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 lie on their side
        return (header.width, header.height) if turned else (header.height, header.width)


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB, turned as its EXIF says; OSError that names a missing or broken file."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises both on broken files
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {DATA_REMEDY}.") from error
        raise OSError(f"{path} cannot be decoded; restore it from where it came from.") from error


def read_brightness(path: Path) -> tuple[np.ndarray, np.ndarray | bool]:
    """The brightness of a picture as it is stored, uint8 or uint16 [h, w], and where it is opaque.

    Raises what Pillow raises on missing and broken files: OSError, SyntaxError, ValueError.
    """
    with Image.open(path) as picture:
        if picture.mode.startswith("I"):  # 16 bit; older versions of Pillow say 32
            return np.asarray(picture).astype(np.uint16), True
        if picture.has_transparency_data:
            grey, alpha = picture.convert("RGBA").convert("LA").split()
            return np.asarray(grey), np.asarray(alpha) >= 128
        return np.asarray(picture.convert("L")), True


def is_in_colours(path: Path) -> bool:
    """Whether the channels of a picture differ by more than JPEG does to grey ones."""
    with Image.open(path) as picture:
        if picture.mode not in ("RGB", "RGBA", "P"):
            return False
        channels = np.asarray(picture.convert("RGB")).astype(int)
    return int(np.ptp(channels, axis=2).max()) > 24


# --------------------------------------------------------------------------------- kept decoded


class DecodedImages(Sequence[Tensor]):
    """Pictures of a finished entry; `decoded_images` makes it.

    `images[i]` is a uint8 tensor [3, h, w], a copy that is the caller's own. The memory map is
    opened on first use, once a process. Pickling stores the path, not the pixels, so that worker
    processes, forked or spawned, read the same file.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, count: int) -> None:
        """Open the entry of `count` pictures; OSError or ValueError if it is missing or damaged."""
        self.path = path
        with path.open("rb") as file:
            table, check = file.read(8 * count), file.read(4)
            length = os.fstat(file.fileno()).st_size
        intact = _crc32(table) == check
        if intact:
            self._sizes = np.frombuffer(table, "<i4").reshape(-1, 2)  # height, width
            # Where each picture starts in the file, and where the last one ends.
            self._starts = np.cumsum([len(table) + len(check), *_lengths(self._sizes)])
        if not intact or self._starts[-1] != length:
            raise ValueError(f"{path} is damaged; delete it, and the next run builds it again.")

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> Tensor:
        index = range(len(self))[index]  # negative ones too, and IndexError past the end
        start, end = self._starts[index : index + 2]
        # A view would be of read-only memory, which torch has no notion of: writing to it crashes.
        pixels = np.array(self._bytes[start:end]).reshape(*self._sizes[index], 3)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def __reduce__(self) -> tuple:
        return DecodedImages, (self.path, len(self))


def decoded_images(
    paths: Sequence[Path],
    folder: Path,
    size: tuple[int, int] | int,
    decode: Callable[[int], Tensor],
) -> DecodedImages:
    """Open the decoded pictures of the files `paths`; decode them first where that was not done.

    `folder` is where entries lie; it is made where it is missing. `size` (height, width) squeezes
    every picture to exactly that. One number is for random crops: the shorter side becomes that
    many pixels, proportions are kept, a smaller picture is never enlarged. `decode(i)` gives the
    picture of `paths[i]` as uint8 [3, h, w]; it is called from several threads at once.

    An entry appears in one step when it is complete. A process that is killed before leaves a file
    that is never read and that the next build in this folder removes. Of several processes one
    builds, the others wait for it. An entry of the wrong length or with a damaged table of sizes is
    built again.

    Raises what `decode` raises; FileNotFoundError naming a file that is missing; OSError with the
    remedy where the folder cannot be written or has too little room; ValueError for no pictures or
    for what is not uint8 [3, h, w]. None of these leaves an entry behind.
    """
    if not paths:
        raise ValueError("There are no pictures to decode; give at least one path.")
    sides = [size] if isinstance(size, int) else list(size)  # as torchvision's resize takes it
    path = Path(folder).absolute() / f"decoded-{pictures_key(paths, sides)}.pixels"
    with suppress(OSError, ValueError):  # missing or damaged
        return DecodedImages(path, len(paths))
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One lock for all entries of the folder: whoever holds it knows that every other
            # unfinished file is what a killed process left.
            stack.enter_context(FileLock(path.with_name("decoded.lock")))
            for left in path.parent.glob("decoded-*.building"):
                left.unlink()
            temporary = path.with_suffix(".building")
            temporary.touch()
            stack.callback(temporary.unlink, missing_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"{path.parent} cannot be written ({reason}); {CACHE_REMEDY}.") from error
        with suppress(OSError, ValueError):  # another process may have built it by now
            return DecodedImages(path, len(paths))
        path.unlink(missing_ok=True)  # damaged: gives its room back
        _decode_all(path, paths, sides, decode)
    return DecodedImages(path, len(paths))


def pictures_key(paths: Sequence[Path], sides: list[int]) -> str:
    """16 hex digits that change with the pictures, their order and the size; not when all move."""
    key = hashlib.sha256(f"{CACHE_FORMAT} {sides}".encode())
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    for path in absolute:
        try:
            stat = os.stat(path)
        except OSError as error:
            message = f"{path} cannot be read ({error.strerror}); restore the file or leave it out."
            raise type(error)(message) from error
        # No name holds a zero byte: two lists of files never make the same text.
        key.update(os.fsencode(path[len(root) :]))
        key.update(f"\0{stat.st_size} {stat.st_mtime_ns}\0".encode())
    return key.hexdigest()[:16]


def _crc32(table: bytes) -> bytes:
    return zlib.crc32(table).to_bytes(4, "little")


def _lengths(sizes: np.ndarray) -> np.ndarray:
    """Bytes of pictures of these sizes, int64 [N]."""
    return 3 * sizes.astype(np.int64).prod(axis=1)


def _decode_all(
    path: Path, paths: Sequence[Path], sides: list[int], decode: Callable[[int], Tensor]
) -> None:
    """Decode, resize and write all pictures to the entry `path`; the table comes last."""

    def no_room(room: float) -> OSError:
        return OSError(
            f"The decoded pictures need {needed / 1e6:,.1f} MB, but {path.parent} has room for "
            f"{room / 1e6:,.1f} MB; {CACHE_REMEDY}."
        )

    sizes = np.zeros((len(paths), 2), "<i4")
    header = sizes.nbytes + 4
    room = shutil.disk_usage(path.parent).free
    made = _ahead(lambda index: _resized(decode(index), sides, paths[index]), len(paths))
    with closing(made) as pictures:
        first: list[np.ndarray] = []
        pixels = 3 * np.prod(sides)
        if len(sides) == 1:  # proportions differ: known only from the pictures
            first = list(islice(pictures, SAMPLE))
            pixels = np.mean([array.nbytes for array in first])
        needed = header + len(paths) * pixels
        if needed > room:
            raise no_room(room)
        every = chain(first, pictures)
        bar = tqdm(every, "decoded pictures", len(paths), delay=1.0, leave=False)
        try:
            with replacing(path, path.with_suffix(".building")) as file:
                file.seek(header)
                for index, array in enumerate(bar):
                    file.write(array)
                    sizes[index] = array.shape[:2]
                file.seek(0)
                file.write(sizes.tobytes() + _crc32(sizes.tobytes()))
        except OSError as error:  # of the pictures too: those pass
            if disk_is_full(error):
                raise no_room(header + _lengths(sizes).sum()) from error
            raise


def _resized(pixels: Tensor, sides: list[int], path: Path) -> np.ndarray:
    """A decoded picture as it is kept: uint8 [h, w, 3]."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != 3:
        raise ValueError(
            f"{path} was decoded to {pixels.dtype} {list(pixels.shape)}, but uint8 [3, h, w] is "
            "expected; convert it to RGB when decoding."
        )
    if len(sides) == 2 or min(pixels.shape[1:]) > sides[0]:
        pixels = v2.resize(pixels, sides, antialias=True)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _ahead(picture: Callable[[int], np.ndarray], count: int) -> Iterator[np.ndarray]:
    """`picture` of 0 to count - 1 in order, made in threads: Pillow and torch release the GIL."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        made = (pool.submit(picture, index) for index in range(count))
        waiting = deque(islice(made, AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(islice(made, 1))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, do not wait for the others
