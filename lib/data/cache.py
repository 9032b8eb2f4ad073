"""Decoded pictures in one file on disk, so that training decodes every JPEG once, not every epoch.

An entry is one file: the size of every picture (int32 [N, 2]: height, width; then the CRC-32 of
that table), then all pixels (uint8, picture after picture, channels last as Pillow decodes them: a
random crop is resized almost twice as fast from that order). It is mapped into memory: epochs,
runs and the worker processes of a DataLoader share the pages that the system keeps of it.

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

import errno
import hashlib
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torchvision.transforms.v2 import functional as v2
from tqdm.auto import tqdm

FORMAT = 1  # of an entry; part of the key
THREADS = min(16, os.cpu_count() or 1)
AHEAD = 32  # pictures that wait for being written: bounds the memory
SAMPLE = 16  # pictures that the size of the whole is estimated from
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota or largest file of the file system
REMEDY = "set CACHE to another folder, or to 0 to decode every time"


class DecodedImages(Sequence[Tensor]):
    """Pictures of a finished entry; `decoded_images` makes it.

    `images[i]` is a uint8 tensor [3, h, w], a copy that is the caller's own. The memory map is
    opened on first use, once a process. Pickling stores the path, not the pixels, so that worker
    processes, forked or spawned, read the same file.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, sizes: np.ndarray) -> None:
        """`sizes` is the table of the entry, int32 [N, 2]: height and width of each picture."""
        self.path = path
        self._sizes = sizes
        self._starts = _starts(sizes)

    @classmethod
    def open(cls, path: Path, count: int) -> DecodedImages:
        """Open the entry of `count` pictures; OSError or ValueError if it is missing or damaged."""
        return cls(path, _read_sizes(path, count))

    @property
    def bytes_on_disk(self) -> int:
        """Length of the file."""
        return int(self._starts[-1])

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
        return DecodedImages.open, (self.path, len(self))


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
    path = Path(folder).absolute() / f"decoded-{_key(paths, sides)}.pixels"
    images = _finished(path, len(paths))
    if images is None:
        with _sole_builder(path) as temporary:
            images = _finished(path, len(paths))  # another process may have built it by now
            if images is None:
                path.unlink(missing_ok=True)  # damaged: gives its room back
                _build(temporary, paths, sides, decode)
                temporary.replace(path)
                images = DecodedImages.open(path, len(paths))
    return images


def _key(paths: Sequence[Path], sides: list[int]) -> str:
    """16 hex digits that change with the pictures, their order and the size; not when all move."""
    key = hashlib.sha256(f"{FORMAT} {sides}".encode())
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


def _finished(path: Path, count: int) -> DecodedImages | None:
    """The entry, or None where it is missing or damaged."""
    try:
        return DecodedImages.open(path, count)
    except (OSError, ValueError):
        return None


def _header(count: int) -> int:
    """Bytes before the first pixel: the table of sizes and its CRC-32."""
    return 8 * count + 4


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each picture starts in the file, and where the last one ends: int64 [N + 1]."""
    lengths = 3 * sizes.astype(np.int64).prod(axis=1)
    return np.cumsum(np.concatenate([[_header(len(sizes))], lengths]))


def _read_sizes(path: Path, count: int) -> np.ndarray:
    """The table of an entry, int32 [N, 2], checked by its CRC-32 and against the file's length."""
    with path.open("rb") as file:
        table, check = file.read(8 * count), file.read(4)
        length = os.fstat(file.fileno()).st_size
    if zlib.crc32(table).to_bytes(4, "little") == check:
        sizes = np.frombuffer(table, "<i4").reshape(-1, 2)
        if _starts(sizes)[-1] == length:
            return sizes
    raise ValueError(f"{path} is damaged; delete it, and the next run builds it again.")


@contextmanager
def _sole_builder(path: Path) -> Iterator[Path]:
    """Hold the folder's lock and give a new empty file to build `path` in, removed at the end.

    One lock for all entries of the folder: whoever holds it knows that every other unfinished file
    is what a killed process left.
    """
    folder, temporary = path.parent, path.with_suffix(".building")
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / "decoded.lock"))
            for left in folder.glob("decoded-*.building"):
                left.unlink()
            temporary.touch()
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"{folder} cannot be written ({reason}); {REMEDY}.") from error
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _build(
    temporary: Path, paths: Sequence[Path], sides: list[int], decode: Callable[[int], Tensor]
) -> None:
    """Decode, resize and write all pictures to `temporary`, to the disk itself."""

    def picture(index: int) -> np.ndarray:
        return _resized(decode(index), sides, paths[index])

    room = shutil.disk_usage(temporary.parent).free
    with closing(_in_order(picture, len(paths))) as pictures:
        first: list[np.ndarray] = []
        pixels = 3 * np.prod(sides)
        if len(sides) == 1:  # proportions differ: known only from the pictures
            first = list(islice(pictures, SAMPLE))
            pixels = np.mean([array.nbytes for array in first])
        needed = _header(len(paths)) + len(paths) * pixels
        if needed > room:
            raise _no_room(temporary.parent, needed, room)
        try:
            with temporary.open("wb") as file:
                _write(file, chain(first, pictures), len(paths))
        except OSError as error:  # of the pictures too: those pass
            if error.errno in FULL:
                raise _no_room(temporary.parent, needed, temporary.stat().st_size) from error
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


def _in_order(picture: Callable[[int], np.ndarray], count: int) -> Iterator[np.ndarray]:
    """`picture` of 0 to count - 1, made in threads: Pillow and torch release the GIL."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        waiting: deque[Future[np.ndarray]] = deque()
        for index in range(count):
            waiting.append(pool.submit(picture, index))
            if len(waiting) == AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write(file: BinaryIO, pictures: Iterable[np.ndarray], count: int) -> None:
    """Write an entry; the table comes last, because it is known last."""
    sizes = np.zeros((count, 2), "<i4")
    file.seek(_header(count))
    progress = tqdm(pictures, "decoded pictures", total=count, delay=1.0, leave=False)
    for index, picture in enumerate(progress):
        sizes[index] = picture.shape[:2]
        file.write(picture)
    table = sizes.tobytes()
    file.seek(0)
    file.write(table + zlib.crc32(table).to_bytes(4, "little"))
    file.flush()
    os.fsync(file.fileno())  # before the rename: a power cut must not leave the name without bytes


def _no_room(folder: Path, needed: float, room: float) -> OSError:
    return OSError(
        f"The decoded pictures need {needed / 1e6:,.1f} MB, but {folder} has room for "
        f"{room / 1e6:,.1f} MB; {REMEDY}."
    )
