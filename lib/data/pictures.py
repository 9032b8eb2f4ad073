"""How a file becomes pixels, and pixels that are kept decoded: the only file that opens pictures.

One way for training, the cache, the check and maps: the first frame, turned as its EXIF says
(orientations that are no number from 1 to 8 are ignored, as Pillow and viewers do), transparency
over white, 16 bits divided by 65535, floats from 0 to 1. Integers of 32 bits, floats out of range
and what is broken, empty, too large or no picture are refused by name: `PictureError`.

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
import math
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from stat import S_ISREG

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as v2
from tqdm.auto import tqdm

from lib.files import disk_is_full, replacing

DATA_REMEDY = "set DATA_DIR to the folder that holds the data, or fill datasets/ (see its README)"
PICTURE_REMEDY = "restore it from where it came from"
UNUSABLE = "cannot be decoded"
CACHE_REMEDY = "set CACHE to another folder, or to 0 to decode every time"
CACHE_FORMAT = 1  # of an entry; part of the key
THREADS = min(16, os.cpu_count() or 1)
AHEAD = 32  # pictures that wait for being written: bounds the memory
SAMPLE = 16  # pictures that the size of the whole is estimated from

ORIENTATION = 0x0112  # of EXIF; whatever is not a number from 2 to 8 turns nothing
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {TURNS[orientation] for orientation in (5, 6, 7, 8)}

# What Pillow has for the whole process only, hence once. It warns of pictures from half the size
# that it refuses: here they are read in silence up to what it refuses, and larger ones are named.
# Metadata of a PNG may be as long as all of it may be: editors write more than 1 MB of history.
PIXELS = 178_956_970
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, 2 * PIXELS)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class PictureError(OSError):
    """A file that cannot be used as a picture; the text names it, what is wrong and the remedy."""


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB, turned as its EXIF says.

    Raises PictureError, and FileNotFoundError where there is no file.
    """
    with _opened(path) as picture:
        picture = _upright(picture, path)
        if _is_deep(picture):
            levels, opaque = _levels(picture)
            if not ((levels >= 0) & (levels <= 1)).all():  # NaN is not, either
                found = f"it has values from {levels.min():g} to {levels.max():g}"
                raise _refused(path, found, "scale them to the range from 0 to 1")
            grey = np.where(opaque, np.round(255 * levels), 255)
            picture = Image.fromarray(grey.astype(np.uint8))
        elif picture.has_transparency_data:
            colours = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
        return picture.convert("RGB")


def picture_size(path: Path) -> tuple[int, int] | None:
    """Height and width of what `read_picture` gives, from the header; None if that is unreadable.

    Never raises. A file that was changed in place is read anew.
    """
    try:
        status = os.stat(path)
        return _header_size(path, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError):  # ValueError: no name that a file can have
        return None


@lru_cache(maxsize=100_000)  # errors are not kept
def _header_size(path: Path, length: int, changed: int) -> tuple[int, int]:
    with _opened(path) as header:
        width, height = header.size
        if header.format == "TIFF":  # Pillow turns it: here, or, if older, only on loading
            width, height = header.tag_v2[256], header.tag_v2[257]
        return (width, height) if _turn(header) in SIDEWAYS else (height, width)


def read_brightness(path: Path) -> tuple[np.ndarray, np.ndarray | bool]:
    """The brightness of a picture, turned as its EXIF says, and where it is opaque, both [h, w].

    It is uint8; float32 where the file has 16 bits (then in [0, 1]) or floats (as they are).
    Raises as `read_picture`.
    """
    with _opened(path) as picture:
        picture = _upright(picture, path)
        if _is_deep(picture):
            return _levels(picture)
        if picture.has_transparency_data:
            colours = picture.convert("RGBA")
            return np.asarray(colours.convert("L")), np.asarray(colours.getchannel("A")) >= 128
        return np.asarray(picture.convert("L")), True


def is_in_colours(path: Path) -> bool:
    """Whether the channels of a picture differ by more than JPEG does to grey ones."""
    with _opened(path) as picture:
        if Image.getmodebase(picture.mode) == "L":
            return False
    channels = np.asarray(read_picture(path)).astype(int)
    return int(np.ptp(channels, axis=2).max()) > 24


def unusual(path: Path) -> dict[str, str]:
    """What `read_picture` changes, drops or is slow at, and how much; raises as it does."""
    with _opened(path) as picture:
        pixels, found = math.prod(picture.size), {}
        if _is_deep(picture):
            found["deep"] = f"mode {picture.mode}"
        elif picture.has_transparency_data:
            clear = (np.asarray(picture.convert("RGBA"))[..., 3] < 255).mean()
            found |= {"transparent": f"{clear:.0%} of it"} if clear else {}
        frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # 2: a preview
        found |= {"frames": f"{frames} frames"} if frames > 1 else {}
        return found | ({"large": f"{pixels:,} pixels"} if pixels > 50_000_000 else {})


def _refused(path: Path, reason: object, remedy: str = PICTURE_REMEDY) -> PictureError:
    return PictureError(f"{path} {UNUSABLE}: {reason}; {remedy}.")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The first frame of a picture whose pixels were not read yet; names what goes wrong inside.

    Pillow raises whatever its parsers come upon: SyntaxError, struct.error, KeyError, zlib.error.
    """
    try:
        status = os.stat(path)
        if not S_ISREG(status.st_mode):  # reading a pipe would never end
            raise _refused(path, "it is a folder or a device", "move it away")
        if not status.st_size:
            raise _refused(path, "it is empty")
        with Image.open(path) as picture:
            if picture.width * picture.height > PIXELS:
                raise Image.DecompressionBombError
            _mend_key(picture)
            yield picture
    except PictureError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path} is missing; {DATA_REMEDY}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"it has more than {PIXELS:,} pixels"
        raise _refused(path, reason, "make it smaller") from error
    except UnidentifiedImageError as error:
        with open(path, "rb") as file:
            reason = f"it begins with {file.read(16)!r}, which is no picture that Pillow can read"
        raise _refused(path, reason, f"{PICTURE_REMEDY}, or save it as JPEG or PNG") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        remedy = "make it readable" if isinstance(error, PermissionError) else PICTURE_REMEDY
        raise _refused(path, reason or type(error).__name__, remedy) from error


def _upright(picture: Image.Image, path: Path) -> Image.Image:
    """The loaded picture, turned, in a mode that can be converted."""
    picture.load()
    turn = _turn(picture)  # None for a TIFF: loading has turned it, and dropped the tag
    if picture.mode == "I" and picture.format in ("PNG", "PPM"):  # 16 bits, of an older Pillow
        picture = picture.convert("I;16")
    if picture.mode == "I":
        reason = "it holds integers of 32 bits or with a sign, whose range no two files share"
        raise _refused(path, reason, "save it with 8 or 16 bits")
    if picture.mode == "La":
        picture = picture.convert("LA")
    return picture if turn is None else picture.transpose(turn)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """How a picture is to be turned for viewing."""
    try:
        return TURNS.get(picture.getexif().get(ORIENTATION))
    except Exception:  # an EXIF that is broken in any way: as viewers, show the picture as it lies
        return None


def _mend_key(picture: Image.Image) -> None:
    """Bring the transparent colour of a PNG to 8 bits, as Pillow does with the pixels alone."""
    key, raw = picture.info.get("transparency"), picture.tile and picture.tile[0][3]
    if key is not None and raw in ("1", "L;2", "L;4"):  # of "1", newer versions do
        picture.info["transparency"] = min(255, key * {"1": 255, "L;2": 85, "L;4": 17}[raw])
    elif key is not None and raw == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in key)


def _is_deep(picture: Image.Image) -> bool:
    """Whether a picture is grey with more than 8 bits."""
    return picture.mode == "F" or picture.mode.startswith("I;16")


def _levels(picture: Image.Image) -> tuple[np.ndarray, np.ndarray | bool]:
    """As `read_brightness`, of a deep picture."""
    values, key = np.asarray(picture), picture.info.get("transparency")
    opaque = True if key is None else values != key
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    if picture.mode != "F":
        values = values / np.float32(2 ** tags.get(258, (16,))[0] - 1)  # 12 bits, too
    if tags.get(262) == 0:  # white is 0, which Pillow obeys for 8 bits only
        values = 1 - values
    return values, opaque


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
        file = stat.st_size, stat.st_mtime_ns
        key.update("\0{} {}\0".format(*file).encode())
        if not path.lower().endswith((".jpg", ".jpeg")) and _was_misread(path, *file):
            key.update(b"over white, 16 bits scaled")
    return key.hexdigest()[:16]


@lru_cache(maxsize=100_000)  # each split of each run asks
def _was_misread(path: str, length: int, changed: int) -> bool:
    """Whether entries of the first versions hold other pixels: then they are not to be found."""
    try:
        with _opened(Path(path)) as picture:
            return picture.has_transparency_data or _is_deep(picture) or picture.mode == "I"
    except OSError:
        return False  # decoding tells


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
