"""Files are whole or as they were: full disks, read-only folders, two writers."""

from __future__ import annotations

import json
import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib import files
from lib.files import (
    StorageError,
    claimed,
    file_name,
    make_folder,
    move_into_place,
    replacing,
    write_bytes,
    write_text,
)
from lib.model.weights import write_state


@contextmanager
def disk_of(size: int):
    """The system lets this process write no file of more bytes: the nearest to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_full_disk_is_one_sentence_and_keeps_the_old_weights(tmp_path, name):
    path = tmp_path / name
    write_state({"a": torch.ones(2)}, path)
    old = path.read_bytes()
    with disk_of(2000), pytest.raises(StorageError, match=f"{name} could not be written") as told:
        write_state({"a": torch.zeros(20_000)}, path)
    assert "is intact" in str(told.value) and "Free space" in str(told.value)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be made"):
        make_folder(tmp_path / "file" / "runs")
    with pytest.raises(StorageError, match="nothing was there before"):
        write_text(tmp_path / "absent" / "a.txt", "a")


@given(st.text(st.characters(codec=None), max_size=300), st.text(max_size=300))
def test_any_name_makes_a_file_of_its_own_on_any_system(one, other):
    made = file_name(one)
    assert not set(made) & set('<>:"/\\|?*\0\n') and made not in ("", ".", "..")
    assert len(made.encode(errors="backslashreplace")) <= 100 or made == one
    assert (file_name(other) == made) == (other == one)
    assert file_name("HITL last block, 日本") == "HITL last block, 日本"


@pytest.mark.parametrize("raw", [b"caf\xe9", "赤い鳥 \N{BIRD}".encode(), b"\xff\\"])
def test_text_of_any_file_name_can_be_written_and_json_reads_it_back(tmp_path, raw):
    name = os.fsdecode(raw)
    for ascii_only in (True, False):
        write_text(tmp_path / "a.json", json.dumps([name], ensure_ascii=ascii_only))
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == [name]


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_folder_that_weights_could_not_be_read_from_is_refused(tmp_path):
    with pytest.raises(StorageError, match=r"is not UTF-8.*name another"):
        make_folder(tmp_path / os.fsdecode(b"caf\xe9"))


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """Each has a temporary name of its own; the last rename wins, with whole content."""
    path, fsync = tmp_path / "a.txt", os.fsync

    def another_writes_meanwhile(descriptor):
        monkeypatch.undo()
        write_bytes(path, b"short")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", another_writes_meanwhile)
    write_bytes(path, b"longer content")
    assert path.read_bytes() == b"longer content" and list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_bytes(path, b"old")
    with pytest.raises(KeyError), replacing(path, tmp_path / "a.building") as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with replacing(path, tmp_path / "a.building") as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old" and (tmp_path / "a.building").read_bytes() == b"new"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_finished_file_or_folder_gets_its_name(tmp_path):
    (tmp_path / "part").mkdir()
    write_text(tmp_path / "part" / "a.txt", "a")
    move_into_place(tmp_path / "part", tmp_path / "whole")
    move_into_place(tmp_path / "whole" / "a.txt", tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_text() == "a"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt", "whole"]


def test_a_claimed_name_is_nobody_elses(tmp_path):
    names = [tmp_path / "a", tmp_path / "b"]
    with claimed(names) as first, claimed(names) as second:
        assert [first, second] == names and not first.exists()
        with pytest.raises(StorageError, match=r"no name is free up to .*b; use another"):
            claimed(names).__enter__()
    assert not list(tmp_path.iterdir())
    names[0].touch()
    with claimed(names) as free:
        assert free == names[1]
