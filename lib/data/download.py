"""Fetch the published data sets: resumed, checked, extracted, and never half there.

What is on its way lies beside its final place: `<file>.part` holds the bytes so far,
`<folder>.part` a folder that is being extracted. A broken download goes on from its `.part` at the
next call; an extraction starts again. One process at a time may fetch into a folder.
"""

from __future__ import annotations

import hashlib
import http.client
import posixpath
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from tqdm.auto import tqdm

from lib.files import disk_is_full, move_into_place

BLOCK = 1 << 20  # bytes read at once, at most
BAR = {"unit": "B", "unit_scale": True, "leave": False}
AGAIN = "run the same command again"
DAMAGED = (tarfile.TarError, zlib.error, EOFError, ValueError)  # what tarfile raises on such files


class DownloadError(OSError):
    """A file could not be fetched or extracted: one sentence with file, cause and remedy."""


class _BrokenError(Exception):
    """A request that brought less than asked for; another one may bring more."""


class _FinalError(Exception):
    """What went wrong and the remedy, in words; trying again would not help."""


@dataclass(frozen=True)
class Published:
    """One published file. Its content never changes, so that size and md5 tell it from others."""

    url: str
    path: str  # where it lands below the target folder
    size: int  # bytes
    md5: str | None = None  # hexadecimal; None where it is not known
    unpacks: str | None = None  # top folder that the archive holds; None: the file is no archive


# The commit is part of the address, so that the content cannot change. The authors publish no md5
# of these files; their sizes are those of the files at this commit.
CUB_GHA = (
    "https://raw.githubusercontent.com/yaorong0921/CUB-GHA/d182dcfaaca28a7747dded9202eec55c274ace13"
)
CUB_GHA_SIZES = (1_153_923, 1_119_450, 1_083_355, 1_327_148, 1_385_069)  # bytes, runs 1 to 5

SOURCES: dict[str, tuple[Published, ...]] = {
    "cub2011": (
        Published(
            url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
            path="CUB_200_2011.tgz",
            size=1_150_585_339,
            md5="97eceeb196236b17998738112f37df78",
            unpacks="CUB_200_2011",
        ),
    ),
    "cub-gha": tuple(
        Published(
            url=f"{CUB_GHA}/data_5runs/Fixation_run{run}.txt",
            path=f"CUB_GHA/data_5runs/Fixation_run{run}.txt",
            size=size,
        )
        for run, size in enumerate(CUB_GHA_SIZES, start=1)
    ),
}


def download(name: str, folder: str | Path) -> list[Path]:
    """Fetch a data set of `SOURCES` into `folder`, extract its archives and delete them.

    A source whose top folder is there, or whose file is there with the right size and md5, is left
    alone without a request. Prints a line a source. Returns the top folders or files, in the order
    of the sources. Raises ValueError for an unknown name, DownloadError as `fetch_file` and
    `extract`.
    """
    if name not in SOURCES:
        raise ValueError(f"there is no data set {name!r}; choose from {', '.join(SOURCES)}.")
    targets = []
    for source in SOURCES[name]:
        target = Path(folder) / (source.unpacks or source.path)
        if target.is_dir() if source.unpacks else _is_right(target, source):
            print(f"{target} is there already: nothing to do")
        else:
            path = fetch_file(source, folder)
            if source.unpacks:
                extract(path, folder, source.unpacks)
                path.unlink()
            print(f"{target} is ready")
        targets.append(target)
    return targets


def fetch_file(
    source: Published,
    folder: str | Path,
    attempts: int = 5,
    timeout: float = 30.0,
    wait: float = 1.0,
) -> Path:
    """Download one file to `folder / source.path` and check it; returns that path.

    The bytes go to `<path>.part`, which is continued where it is there, and get the final name only
    after size and md5 are right. A right file under the final name is not downloaded again, a wrong
    one is replaced once the right one is complete.

    Dropped connections, short bodies, silence of `timeout` seconds and the answers 429 and 5xx are
    tried again after `wait` seconds, doubled with every failure in a row up to a minute. It gives
    up after `attempts` requests in a row that brought no new bytes, and keeps the `.part`.

    Raises DownloadError: refused by the server, given up, wrong content (deleted), disk full.
    """
    path = Path(folder) / source.path
    part = path.with_name(f"{path.name}.part")
    try:
        if _is_right(path, source):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        _fill(part, source, attempts, timeout, wait)
        wrong = _mismatch(part, source)
        if wrong:
            part.unlink()
            raise _FinalError(f"{wrong}; it was deleted, {AGAIN}")
        move_into_place(part, path)
    except (_FinalError, OSError) as error:
        what = str(error)
        if isinstance(error, OSError):  # of the disk: the network's are _BrokenError
            remedy = f"see that {path.parent} can be written to"
            if disk_is_full(error):
                remedy = f"make room for {source.size - _size(part):,} more bytes in {path.parent}"
            what = f"{error.strerror}; {remedy} and {AGAIN}"
        raise DownloadError(f"{source.url} was not downloaded to {path}: {what}.") from error
    return path


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _fill(part: Path, source: Published, attempts: int, timeout: float, wait: float) -> None:
    """Ask until the server has nothing more to send."""
    best, failures = _size(part), 0
    while _size(part) != source.size:
        try:
            return _request(part, source, timeout)
        except _BrokenError as error:
            # Progress is more than ever before: a server that always drops at the same byte and
            # always starts from the first makes none.
            failures = 0 if _size(part) > best else failures + 1
            best = max(best, _size(part))
            if failures >= attempts:
                remedy = f"check the connection and {AGAIN}, it goes on where it stopped"
                what = f"{error} ({attempts} attempts without progress)"
                raise _FinalError(f"{what}; {remedy}") from error
            time.sleep(min(wait * 2**failures, 60.0))


def _request(part: Path, source: Published, timeout: float) -> None:
    """One request for the bytes that are missing."""
    with _open(part, source, timeout) as response:
        have = 0  # the whole file comes, where the server has no ranges
        if response.status == http.client.PARTIAL_CONTENT:
            have = _size(part)
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                part.unlink()
                raise _BrokenError("the server sent other bytes than those asked for")
        elif response.headers.get_content_type() == "text/html":
            # Of a proxy or a login, not of the source. Kept, it would be the file's beginning.
            raise _BrokenError("a web page came instead of the file")
        bar = tqdm(desc=part.stem, initial=have, total=source.size, **BAR)
        with part.open("ab" if have else "wb") as file, bar:
            for block in _received(response):
                file.write(block)
                bar.update(len(block))
    if _size(part) < source.size:
        raise _BrokenError(f"the connection ended at {_size(part):,} of {source.size:,} bytes")


def _open(part: Path, source: Published, timeout: float) -> http.client.HTTPResponse:
    headers = {"User-Agent": "sigmoid-attention-vit"}  # some servers refuse urllib's own name
    if _size(part):
        headers["Range"] = f"bytes={_size(part)}-"
    try:
        request = urllib.request.Request(source.url, headers=headers)
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        what = f"the server answered {error.code} {error.reason}"
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
        elif error.code != http.client.TOO_MANY_REQUESTS and error.code < 500:
            raise _FinalError(f"{what}; put the file there by hand and {AGAIN}") from error
        raise _BrokenError(what) from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(_reason(error)) from error


def _received(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body as it comes, without waiting for whole blocks."""
    try:
        while block := response.read1(BLOCK):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(_reason(error)) from error


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)  # of a URLError, which wraps what happened
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _is_right(path: Path, source: Published) -> bool:
    return path.is_file() and _mismatch(path, source) is None


def _mismatch(path: Path, source: Published) -> str | None:
    """What is wrong with a file, found and expected; None where nothing is."""
    size = path.stat().st_size
    if size != source.size:
        return f"it has {size:,} bytes where {source.size:,} are expected"
    if source.md5 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        if digest.hexdigest() != source.md5:
            return f"its md5 is {digest.hexdigest()} where {source.md5} is expected"
    return None


def extract(archive: str | Path, folder: str | Path, top: str) -> Path:
    """Extract the folder `top` of a .tgz or .tar to `folder / top`; returns that path.

    Everything is extracted to a temporary folder beside it first, which is gone afterwards in
    every case; what the archive holds beside `top` is not kept. Absolute names, names with "..",
    devices and links that leave their top folder are refused. Damage is noticed by the checksums of
    gzip; a bare .tar has none for what it holds.

    Raises DownloadError when `folder / top` is there already, the archive is refused, damaged or
    without `top`, or the disk is full.
    """
    archive, target = Path(archive), Path(folder) / top
    part = target.with_name(f"{target.name}.part")
    try:
        if target.exists():
            raise _FinalError(f"{target} is there already; move it away")
        shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
        part.mkdir(parents=True)
        _untar(archive, part)
        if not (part / top).is_dir():
            raise _FinalError(f"it holds no folder {top}; use the published archive")
        move_into_place(part / top, target)
    except (_FinalError, OSError, *DAMAGED) as error:
        what = str(error).partition("\n")[0].rstrip(":")
        if isinstance(error, OSError) and error.errno is not None:  # gzip complains without
            remedy = f"see that {archive} can be read and {target.parent} written to"
            if disk_is_full(error):
                size = archive.stat().st_size
                remedy = f"make room for more than {size:,} bytes in {target.parent}"
            what = f"{error.strerror}; {remedy}"
        elif not isinstance(error, _FinalError):
            what = f"{what}; delete the archive"
        raise DownloadError(
            f"{archive} was not extracted to {target}: {what} and {AGAIN}."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _untar(archive: Path, folder: Path) -> None:
    bar = tqdm(desc=archive.name, total=archive.stat().st_size, **BAR)
    with bar, archive.open("rb") as raw, tarfile.open(fileobj=raw) as tar:

        def checked(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
            bar.update(raw.tell() - bar.n)
            _refuse_unsafe(member)
            # Devices, and links that leave by way of other links
            return tarfile.data_filter(member, path)

        tar.extractall(folder, filter=checked)
        while tar.fileobj.read(BLOCK):  # gzip's checksum comes after the last member
            pass


def _refuse_unsafe(member: tarfile.TarInfo) -> None:
    name = PureWindowsPath(member.name)  # takes / and \ as separators and knows drives, everywhere
    leaves = "leaves the folder" if name.anchor or ".." in name.parts else ""
    if member.issym() or member.islnk():  # only the top folder is kept, so it must stay in its own
        start = posixpath.dirname(member.name) if member.issym() else ""
        target = posixpath.normpath(posixpath.join(start, member.linkname))
        if target.split("/")[0] != posixpath.normpath(member.name).split("/")[0]:
            leaves = f"is a link to {member.linkname}, which leaves its folder"
    if leaves:
        raise _FinalError(f"its member {member.name!r} {leaves}; delete the archive")
