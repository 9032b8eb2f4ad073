"""The table of all evaluations: whole whoever writes, and never at the cost of what is there."""

from __future__ import annotations

import csv
import math
import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib.experiments.summary import KEYS, append_summary, read_summary


def row(number: int, **numbers: object) -> dict[str, object]:
    return dict.fromkeys(KEYS, "x") | {"seed": number} | numbers


def append_many(path: Path, process: int, count: int, together: Barrier) -> None:
    for number in range(count):
        together.wait(60)  # both append at the same moment, every time
        append_summary(path, [row(1000 * process + number, **{f"of_{process}": 1})])


def test_two_processes_that_append_at_once_lose_nothing(tmp_path):
    path, count = tmp_path / "result" / "summary.csv", 40
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    writers = [
        context.Process(target=append_many, args=(path, process, count, together))
        for process in (1, 2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    lines = path.read_text().splitlines()
    assert sum(line.startswith("date,") for line in lines) == 1
    seeds = [int(one["seed"]) for one in read_summary(path)]
    assert sorted(seeds) == [*range(1000, 1000 + count), *range(2000, 2000 + count)]
    assert not list(path.parent.glob("*.tmp"))


def test_columns_of_other_versions_are_kept_in_their_order(tmp_path):
    path = tmp_path / "summary.csv"
    append_summary(path, [row(0, top1=0.5, cc=math.nan)])
    append_summary(path, [row(1, sauc=0.7, top1=0.25), row(2, note=None)])
    with open(path, newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [*KEYS, "top1", "cc", "sauc", "note"]
    assert [line[len(KEYS) :] for line in lines] == [
        ["0.5", "", "", ""],
        ["0.25", "", "0.7", ""],
        ["", "", "", ""],
    ]


@example(["\r", "a\nb", '"', ""])
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=4))
def test_whatever_text_a_cell_holds_it_comes_back(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("summary") / "summary.csv"
    for number, text in enumerate(cells):
        append_summary(path, [row(number, note=text)])
    assert [one["note"] for one in read_summary(path)] == cells


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"name,age\nme,3\n", "has no column date"),
        (b"", "has no column date"),
        (b"\xff\xfe\x00rubbish", "cannot be read as a table"),
        (b"date,result,run,variant,seed\na,b,c\n", "has a row 1 that does not fit"),
        (b"date,result,run,variant,seed\na,b,c,d,0,extra\n", "has a row 1 that does not fit"),
        (b"date,result,run,variant,seed\na,b,c,d,0\na,b,c,d,12", "ends in the middle"),
        (b"date,result,run,variant,seed,cc,cc\n", "two columns of one name"),
        (b'date,result,run,variant,seed\na,b,c,"d\n', "cannot be read as a table"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_and_stays(content, says, tmp_path):
    path = tmp_path / "summary.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        append_summary(path, [row(0)])
    assert path.read_bytes() == content
