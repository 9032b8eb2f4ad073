"""Downloads from a real server that misbehaves in every way we know, and archives that do."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_files import disk_of

from lib.data import download as module
from lib.data.download import SOURCES, DownloadError, Published, download, extract, fetch_file

ROOT = Path(__file__).resolve().parents[1]
BODY = random.Random(0).randbytes(50_000)
OTHER = random.Random(1).randbytes(50_000)
FILE = "set/data.bin"


# ----------------------------------------------------------------------------------------- server


@dataclass(frozen=True)
class Drop:
    """Promise the whole answer, close at this byte of the file; `reset` closes with an error."""

    at: int
    reset: bool = False


@dataclass(frozen=True)
class Stall:
    """Promise the whole answer, fall silent at this byte of the file."""

    at: int
    part: Path | None = None  # press Ctrl-C once this file has bytes


@dataclass(frozen=True)
class Short:
    """End the file here; the answer says so, or has no Content-Length."""

    at: int
    length: bool = True


@dataclass(frozen=True)
class Page:
    """Answer with a web page of another server, a proxy's, whatever was asked."""


@dataclass
class Site:
    """What the server holds, what it does with the next requests, and what it was asked."""

    body: bytes = BODY
    ranges: bool = True
    shift: int = 0  # by how much the answer to a Range starts too late
    plan: Iterable = ()  # a fault, a status or None (no fault) for each request; then all is well
    asked: list[str | None] = field(default_factory=list)  # the Range of each request
    url: str = ""

    def __post_init__(self):
        self.plan = iter(self.plan)
        self.over = threading.Event()  # ends what stalls


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server.site
        if self.path == "/moved":
            return self.answer(302, {"Location": "/file"})
        asked = self.headers["Range"]
        site.asked.append(asked)
        fault = next(site.plan, None)
        if isinstance(fault, int):
            return self.answer(fault, {})
        if isinstance(fault, Page):
            page = b"<html>please log in</html>"
            return self.answer(
                200, {"Content-Type": "text/html", "Content-Length": len(page)}, page
            )
        start = 0
        if asked and site.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(site.body):
                return self.answer(416, {})
            start += site.shift
        self.send(site, start, fault)

    def send(self, site, start, fault):
        total = len(site.body)
        end = min(fault.at, total) if fault else total
        promised = end if isinstance(fault, Short) else total
        headers = {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{promised - 1}/{promised}"
        if not (isinstance(fault, Short) and not fault.length):
            headers["Content-Length"] = max(promised - start, 0)
        self.answer(206 if start else 200, headers, site.body[start:end])
        if isinstance(fault, Stall):
            self.wfile.flush()
            if fault.part:
                while not (fault.part.exists() and fault.part.stat().st_size):
                    time.sleep(0.01)
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            site.over.wait(10)
        if isinstance(fault, Drop) and fault.reset:
            linger = struct.pack("ii", 1, 0)  # close() then sends a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # the client may go away in the middle: some tests do


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C is heard: a command in the background (`make test &`) starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, Server(("127.0.0.1", 0), Handler) as server:
        patch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextmanager
def serving(server, **settings) -> Iterator[Site]:
    server.site = Site(**settings, url=f"http://127.0.0.1:{server.server_port}/file")
    yield server.site
    server.site.over.set()


@pytest.fixture
def serve(server):
    """serve(**settings) puts a new site on the server."""
    sites = []

    def new(**settings):
        sites.append(serving(server, **settings))
        return sites[-1].__enter__()

    yield new
    for site in sites:
        site.__exit__(None, None, None)


def source(site, body=BODY, **changes) -> Published:
    known = {"size": len(body), "md5": hashlib.md5(body).hexdigest()}
    return Published(**{"url": site.url, "path": FILE, **known, **changes})


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def part_of(folder: Path) -> bytes:
    return files(folder)[f"{FILE}.part"]


# ------------------------------------------------------------------------------------------ fetch


FIRST, SECOND, THIRD = None, "bytes=20000-", "bytes=35000-"  # ranges of successive requests


def test_a_file_is_fetched_once_and_nothing_else_is_left(serve, tmp_path):
    site = serve()
    for _ in range(2):
        assert fetch_file(source(site), tmp_path, wait=0) == tmp_path / FILE
        assert files(tmp_path) == {FILE: BODY} and site.asked == [FIRST]


@pytest.mark.parametrize("wrong", [BODY[:-1], OTHER])
def test_a_wrong_file_under_the_final_name_is_replaced(serve, tmp_path, wrong):
    (tmp_path / "set").mkdir()
    (tmp_path / FILE).write_bytes(wrong)
    site = serve()
    fetch_file(source(site), tmp_path, wait=0)
    assert files(tmp_path) == {FILE: BODY} and len(site.asked) == 1


PASSING = {
    "drops": ({"plan": [Drop(20_000), Drop(35_000)]}, [FIRST, SECOND, THIRD]),
    "resets": ({"plan": [Drop(20_000, reset=True), Drop(0, reset=True)]}, 3),
    "silence": ({"plan": [Stall(20_000)]}, [FIRST, SECOND]),
    "no ranges": ({"ranges": False, "plan": [Drop(20_000)]}, [FIRST, SECOND]),
    "a range that was not asked for": (
        {"shift": 7, "plan": [Drop(20_000)]},
        [FIRST, SECOND, FIRST],
    ),
    "a short body": ({"plan": [Short(20_000)]}, [FIRST, SECOND]),
    "a short body without a length": ({"plan": [Short(20_000, length=False)]}, [FIRST, SECOND]),
    # 10 drops with 2 attempts: each brings new bytes
    "many drops": ({"plan": [Drop(at) for at in range(4_000, 44_000, 4_000)]}, 11),
    **{
        f"status {status}": ({"plan": [Drop(20_000), status]}, [FIRST, SECOND, SECOND])
        for status in (429, 500, 502, 503)  # the refusal lost no byte
    },
}


@pytest.mark.parametrize(("settings", "asked"), PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again_from_where_it_broke(serve, tmp_path, settings, asked):
    site = serve(**settings)
    start = time.monotonic()
    fetch_file(source(site), tmp_path, attempts=2, timeout=0.2, wait=0)
    assert time.monotonic() - start < 9  # a server that is silent is so for 10 s
    assert files(tmp_path) == {FILE: BODY}
    assert asked in (site.asked, len(site.asked))


def test_a_page_of_a_proxy_does_not_become_the_beginning_of_the_file(serve, tmp_path):
    site = serve(plan=[Page(), Drop(30_000), Page()])
    path = fetch_file(source(site, md5=None), tmp_path, wait=0)
    assert path.read_bytes() == BODY
    assert site.asked == [None, None, "bytes=30000-", "bytes=30000-"]


def test_a_redirect_keeps_the_range(serve, tmp_path):
    site = serve(plan=[Drop(20_000)])
    fetch_file(source(site, url=site.url.replace("file", "moved")), tmp_path, wait=0)
    assert files(tmp_path) == {FILE: BODY} and site.asked == [FIRST, SECOND]


LASTING = {
    "silence": ({"plan": itertools.repeat(Stall(0))}, r"timed out \(2 attempts", 2),
    # Every request brings 20,000 bytes, but never one that was not there before
    "no ranges": (
        {"ranges": False, "plan": itertools.repeat(Drop(20_000))},
        "2 attempts without progress",
        3,
    ),
    # The server has only 20,000 bytes: it answers 416 to the Range, and the file starts again
    **{
        f"a short body, {length=}": (
            {"body": BODY[:20_000], "plan": itertools.repeat(Short(20_000, length))},
            "2 attempts without progress",
            3,
        )
        for length in (True, False)
    },
}


@pytest.mark.parametrize(("settings", "message", "requests"), LASTING.values(), ids=LASTING)
def test_what_lasts_is_given_up(serve, tmp_path, settings, message, requests):
    site = serve(**settings)
    with pytest.raises(DownloadError, match=message):
        fetch_file(source(site), tmp_path, attempts=2, timeout=0.1, wait=0)
    assert len(site.asked) == requests and not (tmp_path / FILE).exists()


def test_giving_up_keeps_the_part_and_the_next_call_goes_on(serve, tmp_path, capsys):
    site = serve(plan=[Drop(20_000)] * 6)
    with pytest.raises(DownloadError, match=r"ended at 20,000 of 50,000 bytes \(5 attempts"):
        fetch_file(source(site), tmp_path, wait=0)
    assert len(site.asked) == 6  # one with progress, five without
    assert part_of(tmp_path) == BODY[:20_000] and not (tmp_path / FILE).exists()
    capsys.readouterr()
    fetch_file(source(site), tmp_path, wait=0)
    assert files(tmp_path) == {FILE: BODY} and site.asked[6:] == [SECOND]
    bar = capsys.readouterr().err  # starts at what is there
    assert "data.bin:  40%" in bar and "20.0k/50.0k" in bar and " 0%" not in bar


def test_waits_grow(serve, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    site = serve(plan=itertools.repeat(503))
    with pytest.raises(DownloadError, match="the server answered 503 Service Unavailable"):
        fetch_file(source(site), tmp_path, attempts=9)
    assert waits == sorted(waits) and waits[0] >= 1 and waits[-1] == 60
    assert len(site.asked) == 9 and len(waits) == 8


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_final_refusal_is_not_tried_again(serve, tmp_path, status):
    site = serve(plan=[status])
    with pytest.raises(DownloadError, match=f"the server answered {status}") as caught:
        fetch_file(source(site), tmp_path, wait=0)
    assert len(site.asked) == 1 and files(tmp_path) == {}
    sentence = str(caught.value)
    assert site.url in sentence and str(tmp_path / FILE) in sentence and "by hand" in sentence


def test_no_server_at_all(tmp_path):
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file"
        with pytest.raises(DownloadError, match=r"refused.*check the connection"):
            fetch_file(Published(url, FILE, 1), tmp_path, attempts=2, wait=0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (OTHER, f"md5 is {hashlib.md5(OTHER).hexdigest()} where {hashlib.md5(BODY).hexdigest()}"),
        (BODY + b"more", "has 50,004 bytes where 50,000 are expected"),
    ],
)
def test_a_wrong_file_is_deleted_and_the_next_call_starts_afresh(serve, tmp_path, body, message):
    site = serve(body=body)
    with pytest.raises(DownloadError, match=message):
        fetch_file(source(site), tmp_path, wait=0)
    assert files(tmp_path) == {}
    site.body = BODY
    fetch_file(source(site), tmp_path, wait=0)
    assert files(tmp_path) == {FILE: BODY} and site.asked == [FIRST, FIRST]


def test_a_file_that_changed_between_two_calls_is_noticed_at_the_end(serve, tmp_path):
    site = serve(body=OTHER, plan=[Drop(20_000), Drop(0)])
    with pytest.raises(DownloadError, match="ended at 20,000"):
        fetch_file(source(site), tmp_path, attempts=1, wait=0)
    site.body = BODY
    with pytest.raises(DownloadError, match="md5 is"):
        fetch_file(source(site), tmp_path, wait=0)
    assert files(tmp_path) == {}
    fetch_file(source(site), tmp_path, wait=0)
    assert files(tmp_path) == {FILE: BODY} and site.asked == [FIRST, SECOND, SECOND, FIRST]


@pytest.mark.parametrize(
    ("part", "asked"),
    [
        (BODY, []),  # a process was killed between the last byte and the rename
        (bytes(60_000), ["bytes=60000-", FIRST]),  # the server answers 416
    ],
)
def test_a_part_that_is_not_short(serve, tmp_path, part, asked):
    (tmp_path / "set").mkdir()
    (tmp_path / f"{FILE}.part").write_bytes(part)
    site = serve()
    fetch_file(source(site), tmp_path, wait=0)
    assert files(tmp_path) == {FILE: BODY} and site.asked == asked


def test_ctrl_c_leaves_the_part(serve, tmp_path):
    site = serve(plan=[Stall(20_000, part=tmp_path / f"{FILE}.part")])
    with pytest.raises(KeyboardInterrupt):
        fetch_file(source(site), tmp_path, wait=0)
    assert BODY.startswith(part_of(tmp_path)) and not (tmp_path / FILE).exists()
    kept = len(part_of(tmp_path))
    site.asked.clear()
    fetch_file(source(site), tmp_path, wait=0)
    assert files(tmp_path) == {FILE: BODY}
    assert kept and site.asked == [f"bytes={kept}-"]


def test_a_full_disk_says_what_is_needed_and_keeps_the_part(serve, tmp_path):
    body = BODY * 40
    site = serve(body=body)
    with disk_of(1_000_000), pytest.raises(DownloadError) as caught:
        fetch_file(source(site, body), tmp_path, wait=0)
    assert len(site.asked) == 1 and not (tmp_path / FILE).exists()
    kept = part_of(tmp_path)
    assert len(kept) <= 1_000_000 and body.startswith(kept)
    assert f"make room for {2_000_000 - len(kept):,} more bytes" in str(caught.value)
    fetch_file(source(site, body), tmp_path, wait=0)
    assert files(tmp_path) == {FILE: body}


def test_a_folder_that_cannot_be_made(serve, tmp_path):
    (tmp_path / "set").write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match=r"see that .*set can be written to"):
        fetch_file(source(serve()), tmp_path, wait=0)


faults = st.one_of(
    st.none(),
    st.builds(Drop, st.integers(0, 50_000), st.booleans()),
    st.builds(Short, st.integers(0, 50_000), st.booleans()),
    st.sampled_from([404, 416, 429, 503]),
)


@given(plan=st.lists(faults, max_size=8), ranges=st.booleans())
def test_whatever_the_server_does_the_file_is_right_or_absent(
    server, tmp_path_factory, plan, ranges
):
    folder = tmp_path_factory.mktemp("any")
    with serving(server, plan=plan, ranges=ranges) as site:
        for _ in range(len(plan) + 1):  # every failed call uses up a fault of the plan
            try:
                fetch_file(source(site), folder, attempts=2, wait=0)
                break
            except DownloadError:
                assert not (folder / FILE).exists()
        assert files(folder) == {FILE: BODY}


# ---------------------------------------------------------------------------------------- extract

TREE = {"top/images/a.jpg": BODY, "top/images/b.jpg": OTHER, "top/list.txt": b"1 a\n2 b\n"}
BESIDE = {"attributes.txt": b"1 has_bill\n"}


def tar_of(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, content in members.items():
            if isinstance(content, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                content.name = name
                tar.addfile(content)
    return path


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


suffixes = pytest.mark.parametrize("suffix", ["tgz", "tar"])


@suffixes
def test_only_the_top_folder_is_kept(tmp_path, out, suffix):
    archive = tar_of(tmp_path / f"x.{suffix}", {**BESIDE, **TREE})
    assert extract(archive, out, "top") == out / "top"
    assert files(out) == TREE and [path.name for path in out.iterdir()] == ["top"]
    assert archive.exists()


def test_a_leading_dot_is_no_other_folder(tmp_path, out):
    extract(tar_of(tmp_path / "x.tgz", {f"./{k}": v for k, v in TREE.items()}), out, "top")
    assert files(out) == TREE


@pytest.mark.parametrize("start", ["", "./"])
def test_links_that_stay_are_kept(tmp_path, out, start):
    links = {
        "top/soft": special(tarfile.SYMTYPE, "images/a.jpg"),
        "top/images/up": special(tarfile.SYMTYPE, "../list.txt"),
        "top/hard": special(tarfile.LNKTYPE, f"{start}top/images/a.jpg"),
    }
    members = {start + name: content for name, content in {**TREE, **links}.items()}
    extract(tar_of(tmp_path / "x.tgz", members), out, "top")
    assert (out / "top/soft").is_symlink() and (out / "top/soft").read_bytes() == BODY
    assert (out / "top/images/up").read_bytes() == TREE["top/list.txt"]
    assert (out / "top/hard").read_bytes() == BODY


def test_no_archive_sets_special_modes(tmp_path, out):
    program = special(tarfile.REGTYPE)
    program.mode = 0o4777
    extract(tar_of(tmp_path / "x.tgz", {"top/program": program}), out, "top")
    assert stat.S_IMODE((out / "top/program").stat().st_mode) == 0o755


@suffixes
def test_the_bar_of_an_extraction_moves_to_the_end(tmp_path, out, suffix, capsys, monkeypatch):
    monkeypatch.setitem(module.BAR, "mininterval", 0)
    extract(tar_of(tmp_path / f"x.{suffix}", TREE), out, "top")
    shares = [int(share) for share in re.findall(r"(\d+)%", capsys.readouterr().err)]
    assert shares == sorted(shares) and shares[0] == 0 and 85 <= shares[-1] <= 100


UNSAFE = {
    "parent": {"../evil.txt": b"evil"},
    "inner parent": {"top/../../evil.txt": b"evil"},
    "absolute": {"/evil.txt": b"evil"},
    "drive": {"C:/evil.txt": b"evil"},
    "backslash": {"top\\..\\..\\evil.txt": b"evil"},
    "absolute link": {"top/evil.txt": special(tarfile.SYMTYPE, "/etc/passwd")},
    "link above": {"top/evil.txt": special(tarfile.SYMTYPE, "../../evil.txt")},
    "link beside top": {"top/evil.txt": special(tarfile.SYMTYPE, "../other/evil.txt")},
    "hard link above": {"top/evil.txt": special(tarfile.LNKTYPE, "../evil.txt")},
    "hard link beside top": {**BESIDE, "top/evil": special(tarfile.LNKTYPE, "attributes.txt")},
    "top is a link": {"other/a": b"a", "top": special(tarfile.SYMTYPE, "other")},
    "fifo": {"top/evil": special(tarfile.FIFOTYPE)},
    "device": {"top/evil": special(tarfile.CHRTYPE)},
    "null": {"top/evil": special(tarfile.REGTYPE)},
}
UNSAFE["null"]["top/evil"].pax_headers = {"path": "top/e\0vil"}


def cut(path: Path, share: float) -> Path:
    whole = tar_of(path, TREE).read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    return path


REFUSED = {
    **{f"{k} last": partial(tar_of, members={**TREE, **v}) for k, v in UNSAFE.items()},
    **{f"{k} first": partial(tar_of, members={**v, **TREE}) for k, v in UNSAFE.items()},
    **{f"{share} of it": partial(cut, share=share) for share in (0, 0.05, 0.5, 0.9, 0.9999)},
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_an_unsafe_or_damaged_archive_is_refused_and_leaves_nothing(tmp_path, out, make):
    archive = make(tmp_path / "x.tgz")
    before = files(tmp_path)
    with pytest.raises(DownloadError, match="delete the archive and run") as caught:
        extract(archive, out, "top")
    assert str(archive) in str(caught.value) and "\n" not in str(caught.value)
    assert list(out.iterdir()) == [] and files(tmp_path) == before


@given(position=st.floats(0, 0.999), value=st.integers(1, 255))
def test_a_damaged_byte_is_noticed_or_harmless(tmp_path_factory, position, value):
    folder = tmp_path_factory.mktemp("damaged")
    text = "".join(f"{i} {i * i}\n" for i in range(5_000)).encode()
    tree = {**TREE, "top/text": text}
    archive = tar_of(folder / "x.tgz", tree)
    content = bytearray(archive.read_bytes())
    content[int(position * len(content))] ^= value
    archive.write_bytes(content)
    try:
        extract(archive, folder / "out", "top")
    except DownloadError as error:
        assert "delete the archive" in str(error) or "holds no folder top" in str(error)
        assert list((folder / "out").iterdir()) == []
    else:  # a byte of a time stamp, say
        assert set(files(folder / "out").values()) == set(tree.values())


def test_an_archive_without_the_top_folder(tmp_path, out):
    archive = tar_of(tmp_path / "x.tgz", {**BESIDE, "topper/a": b"a", "other/top/a": b"a"})
    with pytest.raises(DownloadError, match="holds no folder top"):
        extract(archive, out, "top")
    assert list(out.iterdir()) == []


def test_what_is_there_already_is_not_touched(tmp_path, out):
    (out / "top").mkdir(parents=True)
    (out / "top" / "mine.txt").write_text("mine")
    with pytest.raises(DownloadError, match="there already"):
        extract(tar_of(tmp_path / "x.tgz", TREE), out, "top")
    assert files(out) == {"top/mine.txt": b"mine"}


def test_no_archive_at_all(tmp_path, out):
    with pytest.raises(DownloadError, match=r"No such file.*can be read"):
        extract(tmp_path / "x.tgz", out, "top")


@suffixes
def test_a_full_disk_leaves_nothing(tmp_path, out, suffix):
    archive = tar_of(tmp_path / f"x.{suffix}", {**TREE, "top/big": BODY * 10})
    with disk_of(400_000), pytest.raises(DownloadError, match="make room for more than"):
        extract(archive, out, "top")
    assert list(out.iterdir()) == []


def stop_at_second_member(monkeypatch, stop):
    """Let tarfile's filter call `stop` after one member has landed."""
    calls = itertools.count()
    keep = tarfile.data_filter

    def data_filter(member, path):
        if next(calls):
            stop()
        return keep(member, path)

    monkeypatch.setattr(tarfile, "data_filter", data_filter)


def test_ctrl_c_in_an_extraction_leaves_nothing(tmp_path, out, monkeypatch):
    archive = tar_of(tmp_path / "x.tgz", TREE)
    seen = []

    def stop():
        seen.extend(files(out).values())
        signal.raise_signal(signal.SIGINT)

    stop_at_second_member(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        extract(archive, out, "top")
    assert seen == [BODY]  # it was in the middle
    assert list(out.iterdir()) == []


KILLED = """
import os, signal, sys
sys.path[:0] = ["tests"]
import pytest, test_download as tests
tests.stop_at_second_member(pytest.MonkeyPatch(), lambda: os.kill(os.getpid(), signal.SIGKILL))
tests.extract(sys.argv[1], sys.argv[2], "top")
"""


def test_what_a_killed_process_left_is_removed(tmp_path, out):
    archive = tar_of(tmp_path / "x.tgz", {"top/old.txt": b"old", **TREE})
    command = [sys.executable, "-c", KILLED, str(archive), str(out)]
    killed = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert list(files(out).values()) == [b"old"] and not (out / "top").exists()
    extract(tar_of(tmp_path / "new.tgz", TREE), out, "top")
    assert files(out) == TREE and [path.name for path in out.iterdir()] == ["top"]


# --------------------------------------------------------------------------------------- download


@pytest.fixture
def archive_site(serve, tmp_path, monkeypatch):
    """A server with an archive that SOURCES names "birds"."""
    body = tar_of(tmp_path / "published.tgz", {**TREE, **BESIDE}).read_bytes()
    site = serve(body=body)
    birds = source(site, body, path="birds.tgz", unpacks="top")
    monkeypatch.setitem(SOURCES, "birds", (birds,))
    return site


def test_download_extracts_deletes_the_archive_and_then_does_nothing(archive_site, out, capsys):
    assert download("birds", out) == [out / "top"]
    assert files(out) == TREE and len(archive_site.asked) == 1
    capsys.readouterr()
    assert download("birds", out) == [out / "top"]
    assert len(archive_site.asked) == 1 and files(out) == TREE
    assert capsys.readouterr().out == f"{out / 'top'} is there already: nothing to do\n"


def test_an_archive_that_is_there_is_used(archive_site, out):
    out.mkdir()
    (out / "birds.tgz").write_bytes(archive_site.body)
    assert download("birds", out) == [out / "top"]
    assert files(out) == TREE and archive_site.asked == []


def test_a_failed_extraction_keeps_the_archive(archive_site, out, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_second_member(patch, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            download("birds", out)
    assert files(out) == {"birds.tgz": archive_site.body}
    assert download("birds", out) == [out / "top"] and len(archive_site.asked) == 1


def test_files_without_md5_are_judged_by_their_size(serve, out, monkeypatch, capsys):
    site = serve()
    both = tuple(source(site, md5=None, path=f"gaze/{run}.txt") for run in (1, 2))
    monkeypatch.setitem(SOURCES, "gaze", both)
    paths = [out / "gaze" / "1.txt", out / "gaze" / "2.txt"]
    paths[0].parent.mkdir(parents=True)
    paths[0].write_bytes(bytes(50_000))
    paths[1].write_bytes(bytes(40_000))
    assert download("gaze", out) == paths
    assert files(out) == {"gaze/1.txt": bytes(50_000), "gaze/2.txt": BODY}
    assert len(site.asked) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{paths[0]} is there already: nothing to do",
        f"{paths[1]} is ready",
    ]
    assert download("gaze", out) == paths and len(site.asked) == 1


def test_an_unknown_name_lists_the_names(out):
    with pytest.raises(ValueError, match="no data set 'cub'; choose from cub2011, cub-gha"):
        download("cub", out)


def test_sources_land_where_the_data_module_reads():
    (birds,) = SOURCES["cub2011"]
    assert (birds.path, birds.unpacks) == ("CUB_200_2011.tgz", "CUB_200_2011")
    assert (birds.size, birds.md5) == (1_150_585_339, "97eceeb196236b17998738112f37df78")
    paths = [f"CUB_GHA/data_5runs/Fixation_run{run}.txt" for run in range(1, 6)]
    assert [part.path for part in SOURCES["cub-gha"]] == paths
    for part in SOURCES["cub-gha"]:
        assert part.url.endswith(part.path.removeprefix("CUB_GHA"))
        assert part.size > 1_000_000 and part.md5 is None and part.unpacks is None
