"""Corrections: what an edit may be, files that survive anything, and what loading leaves out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lib.data.corrections import (
    MAX_BYTES,
    TRASH,
    Correction,
    CorrectionError,
    Skipped,
    _to_fields,
    bring_back,
    discard,
    list_corrections,
    load_corrections,
    on_grid,
    save_correction,
    write_note,
)
from lib.edit import AttentionEdit
from lib.files import StorageError

ROOT = Path(__file__).resolve().parents[1]
TIME = "2026-08-01T12:34:56Z"
MASK = np.array([[True, False, False], [False, False, True]])
VALUES = np.array([[0.25, 0, 0], [0, 0, 1]], np.float32)
PNG = b"\x89PNG\r\n\x1a\n and what follows"


def edit(**fields) -> AttentionEdit:
    return AttentionEdit(**{"mask": MASK, "values": VALUES, **fields})


def correction(**fields) -> Correction:
    given = {"image_id": "7", "edit": edit(), "model": "ab12", "author": "Ada", "time": TIME}
    return Correction(**{**given, **fields})


def at(second: int, **fields) -> Correction:
    return correction(time=f"2026-08-01T12:34:{second:02}Z", **fields)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


indices = st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True).map(tuple)


@st.composite
def edits(draw) -> AttentionEdit:
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    return AttentionEdit(
        mask=draw(hnp.arrays(bool, shape)),
        values=draw(hnp.arrays(np.float32, shape, elements=st.floats(0, 1, width=32))),
        blocks=draw(st.sampled_from(["last", "last2", "all"]) | indices),
        heads=draw(st.sampled_from(["mean", "all"]) | indices),
        queries=draw(st.sampled_from(["cls", "all"])),
        offset=draw(st.sampled_from(["none", "centred"])),
        strength=draw(st.integers(0, 10**4)) / 10**4,
    )


# ------------------------------------------------------------------------------------ corrections


def test_equal_corrections_compare_equal_and_others_do_not():
    assert correction() == correction()
    for fields in (
        {"mask": MASK.T, "values": VALUES.T},
        {"values": VALUES / 2},
        {"blocks": "all"},
        {"heads": (1,)},
        {"heads": "mean"},
        {"queries": "all"},
        {"offset": "centred"},
        {"strength": 0.5},
    ):
        assert correction(edit=edit(**fields)) != correction()


def test_a_correction_of_now_has_the_time_in_utc_and_seconds():
    found = Correction.now("7", edit(), "ab12", "Ada", class_name="Auk", note="n")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found.time)
    age = (datetime.now(UTC) - datetime.fromisoformat(found.time)).total_seconds()
    assert 0 <= age < 5
    assert found == replace(correction(class_name="Auk", note="n"), time=found.time)


@pytest.mark.parametrize(
    "time", [TIME, "2026-08-01T12:34:56+00:00", "2026-08-01T14:34:56.789+02:00"]
)
def test_times_of_any_zone_are_kept_in_utc(time):
    assert correction(time=time).time == TIME


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time": "2026-08-01T12:34:56"}, "time is '2026-08-01T12:34:56'; give ISO 8601"),
        ({"time": "yesterday"}, "time is 'yesterday'"),
        ({"time": "9999-12-31T23:59:59-01:00"}, "time is '9999"),
        ({"image_id": ""}, "image_id is empty; name the picture"),
        ({"image_id": 7}, "image_id is 7; give a text"),
        ({"author": None}, "author is None; give a text"),
        ({"edit": "look left"}, "edit is a str; give an AttentionEdit"),
        (
            {"edit": AttentionEdit(MASK.ravel(), VALUES.ravel())},
            "mask is bool [6]; give bool [gh, gw]",
        ),
        (
            {"edit": AttentionEdit(MASK, VALUES, heads=(-1, 0))},
            'heads is [-1, 0]; use "mean", "all" or different indices from 0',
        ),
    ],
)
def test_a_correction_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(CorrectionError, match=re.escape(message)):
        correction(**fields)


# ----------------------------------------------------------------------------------- save and load

HARD = "\ud800 \x00 <b>鳥</b> ../../etc/CON?*:|\"' " + "é" * 300


@settings(max_examples=40, deadline=None)
@given(edits(), st.text(min_size=1), st.text(), st.text(), st.text(), st.datetimes())
@example(edit(), HARD, HARD, HARD, HARD, datetime(2026, 8, 1))
@example(edit(blocks=(-1,)), "..", "", ".", "\\", datetime.max)
def test_what_was_saved_is_loaded(given_edit, image_id, class_name, author, note, moment):
    saved = correction(
        edit=given_edit,
        image_id=image_id,
        class_name=class_name,
        author=author,
        note=note,
        time=f"{moment.isoformat()}+00:00",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = save_correction(saved, folder)
        # Names that Linux, macOS and Windows take, in the folder, and short
        name = r"\d{4}-\d\d-\d\dT\d{6}Z-[A-Za-z0-9_-]{1,40}-0000\.json"
        assert re.fullmatch(name, path.name) and path.parent == Path(folder)
        assert path.read_bytes().count(b"\n") == 1
        (loaded,), skipped = load_corrections(folder)
    rounded = np.round(given_edit.values.numpy().astype(np.float64), 4)
    assert loaded == replace(saved, edit=replace(given_edit, values=rounded))
    assert skipped == []


def test_the_file_holds_one_line_of_the_schema(tmp_path):
    values = np.array([[0.123456, 0, 0], [0, 0, 1]])
    saved = correction(image_id="a/b 1.jpg", edit=edit(values=values, blocks=(1, 3)), note="n")
    path = save_correction(saved, tmp_path / "new" / "folder", preview=PNG)
    assert path.name == "2026-08-01T123456Z-a_b_1_jpg-0000.json"
    assert names(path.parent) == [path.name, path.name.replace(".json", ".png")]
    assert path.with_suffix(".png").read_bytes() == PNG
    assert json.loads(path.read_text()) == {
        "schema": 1,
        "image_id": "a/b 1.jpg",
        "class_name": "",
        "file": "",
        "grid": [2, 3],
        "mask": "100001",
        "values": [0.1235, None, None, None, None, 1.0],
        "blocks": [1, 3],
        "heads": "all",
        "queries": "cls",
        "offset": "none",
        "strength": 1.0,
        "model": "ab12",
        "author": "Ada",
        "time": TIME,
        "note": "n",
    }


def test_no_file_is_overwritten(tmp_path):
    ours = save_correction(correction(note="a"), tmp_path, preview=b"a").name
    (tmp_path / ours.replace("0000.json", "0001.png")).write_bytes(b"someone's")
    second = save_correction(correction(note="b"), tmp_path, preview=b"b").name
    assert second == ours.replace("0000", "0002")
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.png"))] == [
        b"a",
        b"someone's",
        b"b",
    ]


def test_ids_that_look_alike_made_safe_do_not_meet(tmp_path):
    ids = ["a/b", "a:b", "a?b", "鳥", "魚", "x" * 300, "x" * 299]
    for image_id in ids:
        save_correction(correction(image_id=image_id), tmp_path)
    loaded, skipped = load_corrections(tmp_path)
    assert sorted(one.image_id for one in loaded) == sorted(ids) and skipped == []


def test_a_correction_too_large_to_load_is_not_saved(tmp_path):
    with pytest.raises(CorrectionError, match=r"'7' takes 4\.2 MB, but a file may have 4\.2 MB"):
        save_correction(correction(note="n" * MAX_BYTES), tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("fails_at", [1, 2], ids=["the preview", "the correction"])
@pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt()])
def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch, fails_at, error):
    kept = save_correction(correction(), tmp_path, preview=PNG)
    before, renames, rename = names(tmp_path), [], os.replace

    def failing(source, target):
        renames.append(target)
        if len(renames) == fails_at:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(type(error)):
        save_correction(correction(note="lost"), tmp_path, preview=b"lost")
    assert len(renames) == fails_at
    assert names(tmp_path) == before
    assert load_corrections(tmp_path) == ([correction()], [])
    assert kept.with_suffix(".png").read_bytes() == PNG


KILLED = """
import os, sys
from test_corrections import correction, save_correction
folder, last = sys.argv[1], int(sys.argv[2])
rename, renames = os.replace, []
def killed(source, target):
    renames.append(target)
    if len(renames) == last:
        os._exit(9)  # no cleanup runs
    rename(source, target)
os.replace = killed
save_correction(correction(note="lost"), folder, preview=b"lost")
"""


def start(script: str, *arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, env=environment
    )


@pytest.mark.parametrize("last", [1, 2])
def test_a_kill_during_a_save_leaves_no_half_correction(tmp_path, last):
    assert start(KILLED, tmp_path, last).wait() == 9
    assert load_corrections(tmp_path) == ([], [])
    assert not list(tmp_path.glob("*.json"))
    path = save_correction(correction(note="again"), tmp_path, preview=PNG)
    assert load_corrections(tmp_path) == ([correction(note="again")], [])
    assert path.with_suffix(".png").read_bytes() == PNG


SAVES = """
import sys, time
from pathlib import Path
from test_corrections import correction, save_correction
folder, who = Path(sys.argv[1]), sys.argv[2]
(folder / f"{who}.ready").touch()
while len(list(folder.glob("*.ready"))) < 2:
    time.sleep(0.001)
for number in range(50):
    note = f"{who}{number:02}"
    save_correction(correction(note=note), folder / "saved", preview=note.encode())
"""


def test_two_processes_may_save_to_one_folder(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    processes = [start(SAVES, tmp_path, who) for who in "ab"]
    while any(process.poll() is None for process in processes):  # read while they write
        assert all(path.with_suffix(".png").exists() for path in folder.glob("*.json"))
        _, skipped = load_corrections(folder)
        assert all(one.reason.startswith("replaced by ") for one in skipped)
        time.sleep(0.02)
    assert [process.returncode for process in processes] == [0, 0]

    paths = sorted(folder.glob("*.json"))
    notes = [json.loads(path.read_text())["note"] for path in paths]
    assert sorted(notes) == [f"{who}{number:02}" for who in "ab" for number in range(50)]
    assert [path.with_suffix(".png").read_text() for path in paths] == notes
    assert len(names(folder)) == 200  # and nothing temporary
    for who in "ab":  # the same second: in the order they were saved in
        ours = [note for note in notes if note.startswith(who)]
        assert ours == sorted(ours)


# --------------------------------------------------------------------------------------- left out


def test_a_missing_folder_and_an_empty_one(tmp_path):
    assert load_corrections(tmp_path) == ([], [])
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; save a correction"):
        load_corrections(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "schema is 2; this version reads 1"),
        ({"schema": "1"}, "schema is '1'; this version reads 1"),
        ({"schema": True}, "schema is True; this version reads 1"),
        ({"schema": ...}, "schema is None; this version reads 1"),
        ({"grid": "2x3"}, "grid is '2x3'; expected a list"),
        ({"grid": [2, 3, 1]}, "grid is [2, 3, 1]; expected two numbers above 0"),
        ({"grid": [0, 3]}, "grid is [0, 3]; expected two numbers above 0"),
        ({"grid": [2.0, 3]}, "grid is [2.0, 3]; expected two numbers above 0"),
        ({"grid": [3, 3]}, "mask has 6 cells, but grid is 3 x 3"),
        ({"grid": [10**30, 10**30]}, f"mask has 6 cells, but grid is {10**30} x {10**30}"),
        ({"mask": "10000"}, "mask has 5 cells, but grid is 2 x 3"),
        ({"mask": "100002"}, "mask is '100002'; expected 0 and 1 only"),
        ({"mask": [1, 0, 0, 0, 0, 1]}, "mask is [1, 0, 0, 0, 0, 1]; expected a text"),
        ({"mask": "100000"}, "values holds 1.0 at 5, where mask is 0"),
        ({"mask": "110001"}, "values holds None at 1; expected 0 to 1"),
        ({"values": [0.5]}, "values has 1 cells, but grid is 2 x 3"),
        ({"values": [1.01, *[None] * 4, 1]}, "values holds 1.01 at 0; expected 0 to 1"),
        ({"values": [-0.1, *[None] * 4, 1]}, "values holds -0.1 at 0; expected 0 to 1"),
        ({"values": [float("nan"), *[None] * 4, 1]}, "values holds nan at 0; expected 0 to 1"),
        ({"values": [10**400, *[None] * 4, 1]}, "values holds 1000000"),
        ({"values": [True, *[None] * 4, 1]}, "values holds True at 0; expected 0 to 1"),
        ({"values": ["1", *[None] * 4, 1]}, "values holds '1' at 0; expected 0 to 1"),
        ({"blocks": "first"}, "blocks is 'first'; use"),
        ({"blocks": [1.5]}, "blocks is [1.5]; use"),
        ({"blocks": 1}, "blocks is 1; use"),
        ({"heads": []}, "heads is []; use"),
        ({"heads": [-1]}, "heads is [-1]; use"),
        ({"queries": "q" * 10**6}, "queries is 'qqq"),
        ({"offset": "left"}, "offset is 'left'; use"),
        ({"strength": 1.1}, "strength is 1.1; expected 0 to 1"),
        ({"strength": "half"}, "strength is 'half'; expected 0 to 1"),
        ({"strength": None}, "strength is None; expected 0 to 1"),
        ({"image_id": 7}, "image_id is 7; give a text"),
        ({"image_id": ""}, "image_id is empty"),
        ({"time": "noon"}, "time is 'noon'; give ISO 8601"),
        *(({name: ...}, f"{name} is missing") for name in ("image_id", "class_name", "grid")),
        *(({name: ...}, f"{name} is missing") for name in ("mask", "values", "blocks", "heads")),
        *(({name: ...}, f"{name} is missing") for name in ("queries", "offset", "model", "note")),
        *(({name: None}, f"{name} is None; give a text") for name in ("author", "time")),
    ],
)
def test_a_damaged_file_is_skipped_with_the_reason(tmp_path, changes, reason):
    """`...` stands for a field that is taken out."""
    good = save_correction(correction(), tmp_path)
    bad = save_correction(at(59, note="newer"), tmp_path)
    fields = {**json.loads(bad.read_text()), **changes}
    bad.write_text(json.dumps({name: it for name, it in fields.items() if it is not ...}))
    loaded, (left,) = load_corrections(tmp_path)
    assert loaded == [correction()] and good.exists()  # a damaged one replaces nothing
    assert left.path == bad and left.reason.startswith(reason)
    assert len(left.reason) < 250


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is not JSON, or cut off"),
        (b"\xff\xfe\x00\xd8", "it is not JSON, or cut off"),
        (b"{'schema': 1}", "it is not JSON, or cut off"),
        (b"[" * 100_000, "it is not JSON, or cut off"),
        (b"9" * 5000, "it is not JSON, or cut off"),
        (b"[1, 2]", "it holds [1, 2]; expected a JSON object"),
        (b"{}", "schema is None; this version reads 1"),
        (b" " * (MAX_BYTES + 1), "it has more than 4.2 MB; no correction is as large"),
    ],
)
def test_a_file_that_is_no_correction_is_skipped(tmp_path, content, reason):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    loaded, (left,) = load_corrections(tmp_path)
    assert loaded == [] and left.path == path and left.reason.startswith(reason)


def test_a_file_cut_off_anywhere_is_skipped(tmp_path):
    path = save_correction(correction(), tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # without its last byte, the line end, it is whole
        path.write_bytes(whole[:length])
        loaded, (left,) = load_corrections(tmp_path)
        assert loaded == [] and left.reason.startswith("it is not JSON, or cut off")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
anything = scalars | st.lists(scalars, max_size=6) | st.just({}) | st.just([[0.5]] * 6)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(_to_fields(correction()))), anything)
def test_no_content_of_a_field_raises(name, value):
    fields = {**_to_fields(correction()), name: value}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.json").write_text(json.dumps(fields))
        loaded, skipped = load_corrections(folder)
    assert len(loaded) + len(skipped) == 1


def test_folders_links_and_pipes_named_json_are_skipped(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.json")
    _, skipped = load_corrections(tmp_path)
    assert skipped == [
        Skipped(tmp_path / f"{name}.json", "it is not a file")
        for name in ("folder", "link", "pipe")
    ]


def test_a_file_that_cannot_be_read_is_skipped(tmp_path, monkeypatch):
    path = save_correction(correction(), tmp_path)

    def refused(self, *_):  # a mode of 000 would not stop root
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refused)
    expected = Skipped(path, "it cannot be read: Permission denied")
    assert load_corrections(tmp_path) == ([], [expected])


def test_other_files_are_none_of_its_business(tmp_path):
    path = save_correction(correction(), tmp_path, preview=PNG)
    for name in ("notes.txt", ".x.json.part", "x.jsonl"):
        (tmp_path / name).write_text("?")
    (tmp_path / "older").mkdir()
    path.with_suffix(".png").unlink()  # a correction counts without its picture too
    assert load_corrections(tmp_path) == ([correction()], [])


def test_corrections_on_a_finer_grid_are_brought_to_this_one_and_others_skipped(tmp_path):
    values = np.float32([[0.5, 0.8, 0.1, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0]])  # odds 1, 4
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]], bool)
    fine = edit(mask=np.repeat(mask, 2, axis=0), values=np.repeat(values, 2, axis=0))
    thin = edit(mask=np.pad([[True]], (0, 3)), values=np.pad([[0.9]], (0, 3)))  # 1 of 16 cells
    low = edit(mask=np.ones((1, 4), bool), values=np.ones((1, 4)))
    edits = enumerate([edit(), fine, thin, low])
    paths = [save_correction(at(k, image_id=str(k), edit=one), tmp_path) for k, one in edits]
    loaded, skipped = load_corrections(tmp_path, (2, 3))
    assert loaded[0] == at(0, image_id="0") and len(loaded) == 2
    found = loaded[1].edit
    assert found.mask.tolist() == [[True, True, False], [True, False, False]]  # half is enough
    # By area: attention v / (1 - v) times the average patch, (1 + 4 + 1 + 4) / 4 and (1 + 1) / 2.
    assert found.values[:, 0].tolist() == pytest.approx([2.5 / 3.5, 0.5], abs=1e-6)
    assert found.values[0, 1].item() == pytest.approx(0.1)
    assert found.scope == fine.scope
    assert skipped == [
        Skipped(paths[2], "it fills no half of a cell of the model's 2 x 3"),
        Skipped(paths[3], "grid is 1 x 4, but the model has 2 x 3 patches"),
    ]
    assert len(load_corrections(tmp_path)[0]) == 4  # nothing given, nothing compared


@given(
    hnp.arrays(np.float32, (2, 3), elements=st.floats(0, 1, width=32)),
    hnp.arrays(bool, (2, 3)),
    st.integers(1, 4),
)
def test_a_finer_grid_and_back_is_the_same_correction(values, mask, factor):
    one = correction(edit=edit(mask=mask, values=values))
    assert on_grid(one, (2, 3)) is one
    fine = on_grid(one, (2 * factor, 3 * factor))
    assert fine.edit.mask.tolist() == np.kron(mask, np.ones((factor, factor), bool)).tolist()
    back = on_grid(fine, (2, 3))
    assert torch.equal(back.edit.mask, one.edit.mask)
    assert torch.allclose(back.edit.values, one.edit.values, atol=2e-6)


def test_the_newest_usable_correction_of_a_picture_counts(tmp_path):
    scopes = [{}, {"heads": (1,)}, {"blocks": "all"}, {}]
    in_order = [at(second, edit=edit(**scope)) for second, scope in enumerate(scopes)]
    others = [at(9, image_id="8"), at(0, image_id="6")]
    stale = at(30, edit=edit(mask=MASK.T, values=VALUES.T))
    paths = {}
    for name, one in zip("abcde", [*reversed(in_order), stale], strict=True):
        # Saved in no order of time, and renamed: the time inside the file counts
        paths[one.time] = save_correction(one, tmp_path).rename(tmp_path / f"{name}.json")
    for one in others:
        save_correction(one, tmp_path)
    loaded, skipped = load_corrections(tmp_path, grid=(2, 3))
    assert loaded == [others[1], in_order[3], others[0]]
    winner = paths[in_order[3].time].name
    assert skipped == [
        *(Skipped(paths[one.time], f"replaced by {winner}") for one in in_order[2::-1]),
        Skipped(paths[stale.time], "grid is 3 x 2, but the model has 2 x 3 patches"),
    ]


def test_of_the_same_second_the_last_one_saved_counts(tmp_path):
    for note in "abcdefghijkl":
        last = save_correction(correction(note=note), tmp_path)
    loaded, skipped = load_corrections(tmp_path)
    assert loaded == [correction(note="l")]
    assert {left.reason for left in skipped} == {f"replaced by {last.name}"}
    assert len(skipped) == 11


@pytest.mark.parametrize("missing", [["strength"], ["strength", "file"]])
def test_files_of_older_versions_load(tmp_path, missing):
    path = save_correction(correction(), tmp_path)
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({name: it for name, it in fields.items() if name not in missing}))
    assert load_corrections(tmp_path) == ([correction()], [])


# ------------------------------------------------------------------------- listed, renamed, deleted


def test_the_list_has_every_file_and_why_it_does_not_count(tmp_path):
    old, big, new = (
        save_correction(one, tmp_path)
        for one in (at(1), at(2, edit=edit(mask=MASK.T, values=VALUES.T)), at(3, note="n"))
    )
    (tmp_path / "x.json").write_text("?")
    listed = list_corrections(tmp_path, (2, 3))
    reasons = [(one.path.name, one.reason) for one in listed[1:]]
    assert reasons == [
        (old.name, f"replaced by {new.name}"),
        (big.name, "grid is 3 x 2, but the model has 2 x 3 patches"),
        (new.name, ""),
    ]
    assert listed[0].correction is None and listed[0].reason.startswith("it is not JSON")
    assert listed[1].correction == at(1) and listed[3].correction == at(3, note="n")


def test_another_note_changes_nothing_else(tmp_path):
    path = save_correction(correction(edit=edit(strength=0.5)), tmp_path, preview=PNG)
    fields = json.loads(path.read_text()) | {"of a later version": 1}
    path.write_text(json.dumps(fields))
    write_note(path, HARD)
    assert json.loads(path.read_text()) == fields | {"note": HARD}
    with pytest.raises(CorrectionError, match="a file may have"):
        write_note(path, "n" * MAX_BYTES)
    assert json.loads(path.read_text())["note"] == HARD  # as before, and whole
    (tmp_path / "x.json").write_text("?")
    with pytest.raises(CorrectionError, match="it is not JSON"):
        write_note(tmp_path / "x.json", "n")


@pytest.mark.parametrize("preview", [None, PNG])
def test_what_is_deleted_lies_in_the_trash_and_comes_back(tmp_path, preview):
    path = save_correction(correction(), tmp_path, preview)
    before = names(tmp_path)
    gone = discard(path)
    assert gone == tmp_path / TRASH / path.name
    assert names(tmp_path) == [TRASH] and names(tmp_path / TRASH) == before
    assert load_corrections(tmp_path) == ([], [])
    taken = save_correction(correction(note="later"), tmp_path, preview)
    assert taken == path  # the name was free again
    back = bring_back(gone)
    found, (left,) = load_corrections(tmp_path)
    assert found == [correction(note="later")] and left.path == back  # of the same second
    assert back.with_suffix(".png").is_file() == (preview is not None)
    again = discard(back), discard(taken)
    assert len(set(again)) == 2 and len(names(tmp_path / TRASH)) == 2 * len(before)


def test_what_cannot_be_moved_stays_whole(tmp_path, monkeypatch):
    path = save_correction(correction(), tmp_path, PNG)
    rename = os.replace

    def failing(source, target):
        if str(source) == str(path):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(StorageError, match=r"could not be moved to .*trash \(Input/output error\)"):
        discard(path)
    assert load_corrections(tmp_path) == ([correction()], [])
    assert path.with_suffix(".png").read_bytes() == PNG
    monkeypatch.undo()
    path.unlink()
    with pytest.raises(StorageError, match="unless somebody else moved it"):
        discard(path)
    assert path.with_suffix(".png").read_bytes() == PNG and not names(tmp_path / TRASH)
