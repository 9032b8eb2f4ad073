"""Fetch the published data sets: resumed, checked, extracted, and never half there.

What is on its way lies beside its final place: `<file>.part` holds the bytes so far,
`<file>.part.version` what the server calls that version of the file, `<folder>.part` a folder that
is being extracted. A broken download goes on from its `.part` at the next call; an extraction
starts again. One process at a time may fetch into a folder.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import posixpath
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from tqdm.auto import tqdm

BLOCK = 1 << 20  # bytes read at once, at most
LONGEST_WAIT = 60.0  # seconds between two requests
HEADERS = {"User-Agent": "sigmoid-attention-vit"}  # some servers refuse urllib's own name
BAR = {"unit": "B", "unit_scale": True, "leave": False}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota or largest file of the file system
AGAIN = "run the same command again"
# What tarfile and zipfile raise on damaged, encrypted or foreign files
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError)


class DownloadError(OSError):
    """A file could not be fetched or extracted: one sentence with file, cause and remedy."""


class _BrokenError(Exception):
    """A request that brought less than asked for; another one may bring more."""


class _RefusedError(Exception):
    """An archive that must not be extracted."""


@dataclass(frozen=True)
class Source:
    """One published file."""

    url: str
    path: str  # where it lands below the target folder
    size: int | None = None  # bytes; None where it is not known
    md5: str | None = None  # hexadecimal; None where it is not known
    unpacks: str | None = None  # top folder that the archive holds; None: the file is no archive


# The commit is part of the address, so that the content cannot change. The authors publish no md5
# of these files; their sizes are those of the files at this commit.
CUB_GHA = (
    "https://raw.githubusercontent.com/yaorong0921/CUB-GHA/d182dcfaaca28a7747dded9202eec55c274ace13"
)
CUB_GHA_SIZES = (1_153_923, 1_119_450, 1_083_355, 1_327_148, 1_385_069)  # bytes, runs 1 to 5

SOURCES: dict[str, tuple[Source, ...]] = {
    "cub2011": (
        Source(
            url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
            path="CUB_200_2011.tgz",
            size=1_150_585_339,
            md5="97eceeb196236b17998738112f37df78",
            unpacks="CUB_200_2011",
        ),
    ),
    "cub-gha": tuple(
        Source(
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
    of the sources. Raises ValueError for an unknown name, DownloadError as `fetch` and `extract`.
    """
    if name not in SOURCES:
        raise ValueError(f"there is no data set {name!r}; choose from {', '.join(SOURCES)}.")
    return [_provide(source, Path(folder)) for source in SOURCES[name]]


def _provide(source: Source, folder: Path) -> Path:
    target = folder / (source.unpacks or source.path)
    if target.is_dir() if source.unpacks else _is_right(target, source):
        print(f"{target} is there already: nothing to do")
        return target
    path = fetch(source, folder)
    if source.unpacks:
        extract(path, folder, source.unpacks)
        path.unlink()
    print(f"{target} is ready")
    return target


# ------------------------------------------------------------------------------------------ fetch


def fetch(
    source: Source,
    folder: str | Path,
    attempts: int = 5,
    timeout: float = 30.0,
    wait: float = 1.0,
) -> Path:
    """Download one file to `folder / source.path` and check it; returns that path.

    The bytes go to `<path>.part` and get the final name only after size and md5 are right. A
    `.part` is continued where the server still has the same version of the file, by ETag or
    Last-Modified; where it sends neither, the check at the end decides. A right file under the
    final name is not downloaded again, a wrong one is replaced once the right one is complete.

    Dropped connections, short bodies, silence of `timeout` seconds and the answers 429 and 5xx are
    tried again after `wait` seconds, doubled with every failure in a row up to a minute. It gives
    up after `attempts` requests in a row that brought no new bytes, and keeps the `.part`.

    Raises DownloadError: refused by the server, given up, wrong content (deleted), disk full.
    """
    path = Path(folder) / source.path
    part = _Part(path)
    try:
        if _is_right(path, source):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        _fill(part, source, attempts, timeout, wait)
        wrong = _mismatch(part.bytes, source)
        if wrong:
            part.discard()
            raise _failed(source, part, wrong, f"it was deleted, {AGAIN}")
        part.bytes.replace(path)
        part.discard()
    except DownloadError:
        raise
    except OSError as error:  # the network's own errors are _BrokenError by now: this is the disk
        missing = f"{source.size - part.size():,} more bytes" if source.size else "the file"
        remedy = f"make room for {missing} in {path.parent} and {AGAIN}"
        if error.errno not in FULL:
            remedy = f"see that {path.parent} can be written to and {AGAIN}"
        raise _failed(source, part, error.strerror, remedy) from error
    return path


class _Part:
    """The bytes of a file so far, and what the server calls the version that they are of."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.bytes = final.with_name(f"{final.name}.part")
        self.note = final.with_name(f"{final.name}.part.version")

    def size(self) -> int:
        return self.bytes.stat().st_size if self.bytes.exists() else 0

    def version(self) -> str | None:
        return self.note.read_text("utf-8") if self.note.exists() else None

    def restart(self, version: str | None) -> None:
        self.discard()
        if version:
            self.note.write_text(version, "utf-8")

    def discard(self) -> None:
        # The bytes first: a process killed in between must not leave old bytes for a new version
        self.bytes.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _fill(part: _Part, source: Source, attempts: int, timeout: float, wait: float) -> None:
    """Ask until the server has nothing more to send."""
    best, failures = part.size(), 0
    while part.size() != source.size:
        try:
            return _request(part, source, timeout)
        except _BrokenError as error:
            # Progress is more than ever before: a server that always drops at the same byte and
            # always starts from the first makes none.
            failures = 0 if part.size() > best else failures + 1
            best = max(best, part.size())
            if failures >= attempts:
                remedy = f"check the connection and {AGAIN}, it goes on where it stopped"
                what = f"{error} ({attempts} attempts without progress)"
                raise _failed(source, part, what, remedy) from error
            time.sleep(min(wait * 2**failures, LONGEST_WAIT))


def _request(part: _Part, source: Source, timeout: float) -> None:
    """One request for the bytes that are missing."""
    with _open(part, source, timeout) as response:
        version = _version(response.headers)
        if response.status != http.client.PARTIAL_CONTENT:
            part.restart(version)  # the whole file: no range support, or another version
        elif not _continues(part, response, version):
            part.discard()
            raise _BrokenError("the server sent other bytes than those asked for")
        have = part.size()
        announced = None if response.length is None else have + response.length
        end = source.size or announced
        bar = tqdm(desc=part.final.name, initial=have, total=end, **BAR)
        with part.bytes.open("ab") as file, bar:
            for block in _blocks(response):
                file.write(block)
                bar.update(len(block))
    if end is not None and part.size() < end:
        raise _BrokenError(f"the connection ended at {part.size():,} of {end:,} bytes")


def _open(part: _Part, source: Source, timeout: float) -> http.client.HTTPResponse:
    headers = dict(HEADERS)
    if part.size():
        headers["Range"] = f"bytes={part.size()}-"
        if part.version():
            headers["If-Range"] = part.version()
    try:
        request = urllib.request.Request(source.url, headers=headers)
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        what = f"the server answered {error.code} {error.reason}"
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.discard()
        elif error.code != http.client.TOO_MANY_REQUESTS and error.code < 500:
            remedy = f"put the file there by hand and {AGAIN}"
            raise _failed(source, part, what, remedy) from error
        raise _BrokenError(what) from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(_reason(error)) from error


def _continues(part: _Part, response: http.client.HTTPResponse, version: str | None) -> bool:
    span = response.headers.get("Content-Range", "")
    return span.startswith(f"bytes {part.size()}-") and version in (None, part.version())


def _version(headers: http.client.HTTPMessage) -> str | None:
    """What If-Range may name: a weak ETag (W/"...") says too little about the bytes."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified")


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            block = response.read1(BLOCK)  # what is there, without waiting for a whole block
        except (OSError, http.client.HTTPException) as error:
            raise _BrokenError(_reason(error)) from error
        if not block:
            return
        yield block


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)  # of a URLError, which wraps what happened
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _is_right(path: Path, source: Source) -> bool:
    return path.is_file() and _mismatch(path, source) is None


def _mismatch(path: Path, source: Source) -> str | None:
    """What is wrong with a file, found and expected; None where nothing is."""
    size = path.stat().st_size
    if source.size is not None and size != source.size:
        return f"it has {size:,} bytes where {source.size:,} are expected"
    if source.md5 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        if digest.hexdigest() != source.md5:
            return f"its md5 is {digest.hexdigest()} where {source.md5} is expected"
    return None


def _failed(source: Source, part: _Part, what: str, remedy: str) -> DownloadError:
    return DownloadError(f"{source.url} was not downloaded to {part.final}: {what}; {remedy}.")


# ---------------------------------------------------------------------------------------- extract


def extract(archive: str | Path, folder: str | Path, top: str) -> Path:
    """Extract the folder `top` of a .tgz, .tar or .zip to `folder / top`; returns that path.

    Everything is extracted to a temporary folder beside it first, which is gone afterwards in
    every case; what the archive holds beside `top` is not kept. Absolute names, names with "..",
    devices, links that leave their top folder, and any link in a zip are refused. Damage is noticed
    by the checksums of gzip and of the members of a zip; a bare .tar has none for what it holds.

    Raises DownloadError when `folder / top` is there already, the archive is refused, damaged or
    without `top`, or the disk is full.
    """
    archive, target = Path(archive), Path(folder) / top
    part = target.with_name(f"{target.name}.part")
    try:
        if target.exists():
            raise _RefusedError(f"{target} is there already; move it away")
        shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
        part.mkdir(parents=True)
        unpack = _unzip if archive.suffix == ".zip" else _untar
        unpack(archive, part)
        if not (part / top).is_dir():
            raise _RefusedError(f"it holds no folder {top}; use the published archive")
        (part / top).rename(target)
    except _RefusedError as error:
        raise _unextracted(archive, target, str(error)) from error
    except DAMAGED as error:
        what = str(error).partition("\n")[0].rstrip(":")
        raise _unextracted(archive, target, f"{what}; delete the archive") from error
    except OSError as error:
        if error.errno is None:  # gzip's complaint about the content
            remedy = "delete the archive"
        elif error.errno in FULL:
            remedy = f"make room for more than {archive.stat().st_size:,} bytes in {target.parent}"
        else:
            remedy = f"see that {archive} can be read and {target.parent} written to"
        raise _unextracted(archive, target, f"{error.strerror or error}; {remedy}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _unextracted(archive: Path, target: Path, what: str) -> DownloadError:
    return DownloadError(f"{archive} was not extracted to {target}: {what} and {AGAIN}.")


def _untar(archive: Path, folder: Path) -> None:
    bar = tqdm(desc=archive.name, total=archive.stat().st_size, **BAR)
    with bar, archive.open("rb") as raw, tarfile.open(fileobj=raw) as tar:

        def checked(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
            bar.update(raw.tell() - bar.n)
            _check_name(member.name)
            if member.issym() or member.islnk():
                _check_link(member)
            # Devices, and links that leave by way of other links
            return tarfile.data_filter(member, path)

        tar.extractall(folder, filter=checked)
        while tar.fileobj.read(BLOCK):  # gzip's checksum comes after the last member
            pass


def _unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            _check_name(member.filename)
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(member.filename, "is a link or a device")
        total = sum(member.compress_size for member in members)
        with tqdm(desc=archive.name, total=total, **BAR) as bar:
            for member in members:
                file.extract(member, folder)
                bar.update(member.compress_size)


def _check_name(name: str) -> None:
    path = PureWindowsPath(name)  # takes / and \ as separators and knows drives: refused everywhere
    if path.anchor or ".." in path.parts:
        raise _refused(name, "leaves the folder")


def _check_link(member: tarfile.TarInfo) -> None:
    """Only the top folder is kept, so a link must stay in its own."""
    start = posixpath.dirname(member.name) if member.issym() else ""
    target = posixpath.normpath(posixpath.join(start, member.linkname))
    if target.split("/")[0] != posixpath.normpath(member.name).split("/")[0]:
        raise _refused(member.name, f"is a link to {member.linkname}, which leaves its folder")


def _refused(name: str, what: str) -> _RefusedError:
    return _RefusedError(f"its member {name!r} {what}; delete the archive")
