"""Sweeps: what is trained and how often, what is kept, and the table that comes of it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from lib.__main__ import main
from lib.cli import runs as command
from lib.config import Config, Sweep
from lib.edit import resolve_blocks
from lib.evaluation import tables
from lib.experiments import sweep
from lib.losses import SEES_OFFSET
from lib.training import runs
from lib.training.state import STATE

SMALL = Sweep(loss=("kl", "mse"), lam=(0.0, 1.0))  # a control and two that learn from maps
NAMES = [
    "control-train_all-s0",
    "kl-l1-blocks_last-heads_all-offset_none-train_all-s0",
    "mse-l1-blocks_last-heads_all-offset_none-train_all-s0",
]
ALL = [*NAMES, "fine-tuned-s0"]  # what they start from is measured as well
MEASURED = ["top1", "p_true", "nss", "cc", "sim", "kl", "class_token", "sigmoid", "conflicting"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Config, Path]:
    """A small sweep that is done, in this process, and its table."""
    config = tiny_config(tmp_path_factory.mktemp("swept") / "runs")
    out = config.runs.parent / "tables" / "sweep.csv"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as each of two processes has
    table, failed = sweep.run_sweep(config, SMALL, out)
    torch.set_num_threads(threads)
    assert not failed and len(table) == 8
    return config, out


@pytest.fixture
def copied(swept, tmp_path) -> Config:
    """The configuration of `swept` in a runs folder that has its fine-tuned run only."""
    config = replace(swept[0], runs=tmp_path / "runs")
    shutil.copytree(swept[0].runs / "ft-s0", config.runs / "ft-s0")
    return config


def same_rows(table: pd.DataFrame, other: pd.DataFrame) -> None:
    """Apart from the time that they took."""
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), other.drop(columns="seconds"))


# ------------------------------------------------------------------------------- which trainings


def some(values: list) -> st.SearchStrategy[tuple]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True).map(tuple)


@given(
    st.builds(
        Sweep,
        loss=some(["mse", "mse_zero", "bce", "kl", "cosine", "energy"]),
        lam=some([0, 0.0, 0.1, 1, 1.0, 1.0000001, 150]),
        blocks=some(["last", "last2", "last4", "all", "1", "0,1", "-1"]),
        heads=some(["all", "half", "one", "0", "1,0", "1"]),
        offset=some(["none", "centred"]),
        trainable=some(["all", "last_block", "1", "2"]),
        seeds=some([0, 1, 2]),
    )
)
def test_every_combination_once_and_none_that_cannot_differ(axes):
    config = tiny_config(Path("nowhere"))
    parts = {"1": "last_block", "2": 2}
    heads = {"half": (0,), "one": (0,), "0": (0,), "1": (1,)}  # of two heads; else all
    wanted = set()
    for seed, part, loss, lam, blocks, head, offset in itertools.product(
        axes.seeds, axes.trainable, axes.loss, axes.lam, axes.blocks, axes.heads, axes.offset
    ):
        key = (seed, parts.get(part, part))
        if lam:
            named = {"1": (1,), "0,1": (0, 1), "-1": (-1,)}.get(blocks, blocks)
            offset = offset if loss in SEES_OFFSET else "none"
            key += (loss, lam, resolve_blocks(named, 2), heads.get(head, (0, 1)), offset)
        wanted.add(key)
    found = sweep.cells(config, axes)
    first, found = found[-len(axes.seeds) :], found[: -len(axes.seeds)]
    assert [cell.run for cell in first] == [f"ft-s{seed}" for seed in axes.seeds]
    assert len({cell.name for cell in found}) == len(found)
    assert len({tuple(cell.words.values()) for cell in found}) == len(found)
    keys = []
    for cell in found:
        train, human = cell.config.train, cell.config.train.human
        key = (train.seed, train.trainable)
        if human.lam:
            head = (0, 1) if human.heads == "all" else human.heads
            key += (human.loss, human.lam, resolve_blocks(human.blocks, 2), head, human.offset)
        keys.append(key)
    assert len(keys) == len(wanted) and set(keys) == wanted


def test_one_training_has_one_name_whatever_the_words():
    config = tiny_config(Path("nowhere"))
    config.model.overrides |= {"depth": 4, "num_heads": 4}
    config.hitl = replace(config.hitl, trainable="last_block", cache_tokens=True)
    axes = Sweep(("kl",), (0.1,), ("all", "last4", "0,1,2,3", "-1", "1,3"), ("1,0", "half", "2"))
    names = [cell.name for cell in sweep.cells(config, replace(axes, trainable=("4",)))[:-1]]
    assert names == [
        f"kl-l0.1-blocks_{blocks}-heads_{heads}-offset_none-train_4-s0"
        for blocks in ("all", "last", "1,3")
        for heads in ("half", "2")
    ]
    whole, last, _ = sweep.cells(config, Sweep(lam=(0,), trainable=("all", "last_block")))
    assert not whole.config.train.cache_tokens and last.config.train.cache_tokens
    assert sweep.cells(config, Sweep(lam=(0,)))[0] == last  # the part of the preset


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss": ("hinge",)}, 'loss is "hinge"; use one of mse, mse_zero'),
        ({"offset": ("left",)}, 'offset is "left"; use one of none, centred'),
        ({"blocks": ("first",)}, 'blocks is "first"'),
        ({"blocks": ("2",)}, "block 2 is named, but the model has 2 blocks"),
        ({"heads": ("third",)}, 'heads is "third"; use all, half, one, mean, or indices'),
        ({"heads": ("0,7",)}, "head 7 is named, but the model has 2 heads"),
        ({"trainable": ("most",)}, 'trainable is "most"'),
        ({"trainable": ("last_block",), "blocks": ("last", "all")}, "block 0 is supervised, but"),
        ({"lam": (1.0, -1.0)}, "lam not below 0"),
        ({"lam": (float("nan"),)}, "lam is nan"),
        ({"seeds": ()}, "seeds has no value"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(config, changes, says):
    with pytest.raises(ValueError, match=says):
        sweep.run_sweep(config, replace(SMALL, **changes), config.runs / "sweep.csv")
    assert not config.runs.exists()


def test_maps_are_needed_and_other_runs_are_respected(copied, tmp_path):
    unseen = replace(copied, data=replace(copied.data, maps="none"), runs=tmp_path / "none")
    with pytest.raises(ValueError, match="has a human map"):
        sweep.run_sweep(unseen, SMALL, unseen.runs / "sweep.csv")
    assert not unseen.runs.exists()
    copied.ft = replace(copied.ft, epochs=3)
    with pytest.raises(runs.RunConflict, match=r"train\.epochs is 2 there and 3 here"):
        sweep.run_sweep(copied, SMALL, copied.runs / "sweep.csv")
    assert not (copied.runs / "sweep").exists()


# -------------------------------------------------------------------------- the table, and resuming


def test_the_table_has_one_row_a_training_and_split(swept):
    config, out = swept
    table = pd.read_csv(out)
    assert list(table["split"]) == ["test", "val"] * 4
    assert list(table["loss"]) == ["control", "control", "fine-tuned", "fine-tuned", "kl", "kl",
                                   "mse", "mse"]  # fmt: skip
    run = runs.Run.load(config.runs / "ft-s0")
    frame = sweep.measure(run.model(), run.dataset("test"), run.config, config.runs / "tokens")
    assert table["top1"][2] == pytest.approx(frame["top1"].mean())  # the run as it is
    gains = table["cc"] - table["cc"][[0, 1]].to_numpy().tolist() * 4
    assert table["cc_gain"].tolist() == pytest.approx(gains.tolist())
    assert not table.duplicated(list(sweep.KEYS)).any()
    assert (table["status"] == "measured").all() and (table["seconds"] > 0).all()
    assert table[MEASURED].notna().all(axis=None)
    assert (
        table.loc[table["loss"] == "control", ["blocks", "heads", "offset"]].isna().all(axis=None)
    )
    assert sorted(path.name for path in (config.runs / "sweep").iterdir()) == sorted(ALL)
    assert not list((config.runs / "sweep").glob("*/*.safetensors"))  # measured: weights are gone


def test_rows_are_what_the_trained_model_does(swept, copied):
    axes = replace(SMALL, loss=("mse",), lam=(1.0,))
    out = copied.runs / "sweep.csv"
    table, _ = sweep.run_sweep(copied, axes, out, keep_weights=True)
    run = runs.Run.load(copied.runs / "sweep" / NAMES[2])
    assert run.config.init == "ft-s0" and run.config.train.human.loss == "mse"
    frame = sweep.measure(run.model(), run.dataset("test"), run.config, copied.runs / "tokens")
    row = table[(table["split"] == "test") & (table["loss"] == "mse")].iloc[0]
    for name, value in sweep.summarise(frame).items():
        assert row[name] == pytest.approx(value, abs=1e-6), name
    sweep.run_sweep(copied, axes, out)
    assert (run.folder / "last.safetensors").is_file()  # once kept, kept


def test_weights_that_are_kept_are_what_was_learned(copied, tmp_path):
    """The frozen trunk is that of the run which they start from: it is kept there alone."""
    stage = replace(copied.hitl, trainable="last_block")
    axes = replace(SMALL, loss=("mse",), lam=(1.0,), trainable=("last_block",))
    whole = runs.train_run("whole", runs.human_in_the_loop(replace(copied, hitl=stage), "ft-s0", 0,
                           loss="mse", heads="all"), copied.runs)  # fmt: skip
    _, failed = sweep.run_sweep(copied, axes, copied.runs / "sweep.csv", keep_weights=True)
    assert not failed
    (folder,) = (copied.runs / "sweep").glob("mse*")
    for which in ("last", "best"):
        file = f"{which}.safetensors"
        assert (folder / file).stat().st_size < 0.7 * (whole.folder / file).stat().st_size
        found = runs.Run.load(folder, which).model(which).state_dict()
        wanted = whole.model(which).state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert sweep.under_way([("one", folder), ("ft", copied.runs / "ft-s0")], 0.0) == "none"
    (folder / "result.json").rename(folder / "before.json")
    assert sweep.under_way([("one", folder)], 0.0) == "one 2/2"  # which is being measured
    start = copied.runs / "ft-s0" / "last.safetensors"
    other = whole.folder / "last.safetensors"
    shutil.copy(other, start)  # not what they started from
    with pytest.raises(FileNotFoundError, match=r"differs from the ft-s0/last.safetensors that"):
        runs.Run.load(folder).model()


def test_what_is_measured_is_not_trained_again(swept, monkeypatch):
    config, out = swept
    before = pd.read_csv(out)

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(sweep, "train_cell", refuse)
    table, failed = sweep.run_sweep(config, replace(SMALL, lam=(1.0,)), out)
    assert not failed
    pd.testing.assert_frame_equal(pd.read_csv(out), before)  # rows of former sweeps stay
    config = replace(config, hitl=replace(config.hitl, log_every=3))  # not a matter of the result
    assert len(sweep.run_sweep(config, SMALL, out)[0]) == len(table)
    config = replace(config, hitl=replace(config.hitl, epochs=3))
    with pytest.raises(runs.RunConflict, match=r"train\.epochs"):
        sweep.run_sweep(config, SMALL, out)
    assert set(sweep.collect(config)["loss"]) == {"fine-tuned"}


train_cell = sweep.train_cell


def killed_in_the_middle(folder: Path, cell: sweep.Cell, keep: bool) -> None:
    """`train_cell` in a process that dies in the second epoch of the last of `NAMES`."""
    if cell.name == NAMES[-1]:
        plain = runs.fit

        def die(progress):
            if progress.epoch == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        runs.fit = lambda *arguments: plain(*arguments[:-1], die)
    train_cell(folder, cell, keep)


def test_two_processes_one_is_killed_and_the_next_call_goes_on(swept, copied, monkeypatch):
    """The table can be read at any time, and is in the end what one process makes."""
    done, out = pd.read_csv(swept[1]), copied.runs / "sweep.csv"
    copied.hitl = replace(copied.hitl, checkpoint_minutes=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "train_cell", killed_in_the_middle)
        _, failed = sweep.run_sweep(copied, SMALL, out, jobs=2)
    assert failed == {NAMES[2]: "its process died (exit code -9)"}
    found = pd.read_csv(out)
    dead = found[found["loss"] == "mse"]  # a row all the same, without numbers
    assert set(dead["status"]) == {"failed"} and set(dead["failure"]) == {failed[NAMES[2]]}
    assert dead[MEASURED].isna().all(axis=None)
    alive = done[done["loss"] != "mse"]
    same_rows(found[found["loss"] != "mse"].drop(columns="failure"), alive.drop(columns="failure"))
    settings = tables.by_setting(tables.read_table(out))
    pd.testing.assert_frame_equal(settings, tables.by_setting(tables.read_table(swept[1]))[:3])
    assert (copied.runs / "sweep" / NAMES[2] / STATE).is_file()
    stamps = [(copied.runs / "sweep" / name / "result.json").stat() for name in NAMES[:2]]
    torch.set_num_threads(1)
    _, failed = sweep.run_sweep(copied, SMALL, out)
    assert not failed
    same_rows(pd.read_csv(out), done)
    again = [(copied.runs / "sweep" / name / "result.json").stat() for name in NAMES[:2]]
    assert [s.st_mtime_ns for s in again] == [s.st_mtime_ns for s in stamps]


def test_a_failure_does_not_stop_the_others(copied, monkeypatch, capsys):
    """A loss that diverges is a result; an error that nobody expected is tried again."""
    axes = Sweep(loss=("kl", "mse"), lam=(1e39, 1.0))
    plain = sweep.train_run

    def broken(name, *arguments):
        if "mse-l1-" in name:
            raise RuntimeError("CUDA out of memory")
        return plain(name, *arguments)

    monkeypatch.setattr(sweep, "train_run", broken)
    table, failed = sweep.run_sweep(copied, axes, copied.runs / "sweep.csv")
    assert "CUDA out of memory" in capsys.readouterr().err
    assert sorted(name.partition("-blocks")[0] for name in failed) == [
        "kl-l1e+39", "mse-l1", "mse-l1e+39",
    ]  # fmt: skip
    table = table[table["loss"] != "fine-tuned"]
    assert table.groupby(["loss", "lam"])["status"].unique().str[0].to_dict() == {
        ("kl", 1.0): "measured", ("kl", 1e39): "diverged", ("mse", 1.0): "failed",
        ("mse", 1e39): "diverged",
    }  # fmt: skip
    assert table[table["status"] == "diverged"]["top1"].isna().all()
    monkeypatch.undo()
    calls = []

    def again(folder, cell, keep):
        calls.append(cell.name)
        train_cell(folder, cell, keep)

    monkeypatch.setattr(sweep, "train_cell", again)
    table, left = sweep.run_sweep(copied, axes, copied.runs / "sweep.csv")
    assert calls == [NAMES[2]] and (table["status"] != "failed").all()
    assert {n: f for n, f in failed.items() if "1e+39" in n} == left
    assert all("the loss is not finite" in failure for failure in left.values())


def test_trainings_share_the_tokens_of_a_frozen_trunk(copied, monkeypatch):
    shutil.rmtree(copied.runs)
    stage = {"trainable": "last_block", "cache_tokens": True}
    copied.ft, copied.hitl = replace(copied.ft, **stage), replace(copied.hitl, **stage)
    _, failed = sweep.run_sweep(copied, SMALL, copied.runs / "sweep.csv")
    assert not failed
    assert len(list((copied.runs / "tokens").glob("*.safetensors"))) == 3  # train, val and test
    assert sorted(path.name for path in copied.runs.iterdir()) == [
        "ft-s0", "sweep", "sweep.csv", "tokens",
    ]  # fmt: skip


def test_what_starts_from_a_failed_run_fails_with_its_words(copied, monkeypatch):
    shutil.rmtree(copied.runs)
    plain = sweep.train_run

    def broken(name, *arguments):
        if name == "ft-s1":
            raise OSError("the disk is full")
        return plain(name, *arguments)

    monkeypatch.setattr(sweep, "train_run", broken)
    axes = Sweep(lam=(0.0,), seeds=(0, 1))
    table, failed = sweep.run_sweep(copied, axes, copied.runs / "sweep.csv")
    assert [*failed.values()] == ["what it starts from failed: the disk is full"] * 2
    assert table.groupby("seed")["status"].unique().str[0].tolist() == ["measured", "failed"]


def test_processes_share_cores_and_gpus(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    seen = lambda jobs: [own.get("CUDA_VISIBLE_DEVICES") for own in sweep.shares(jobs)]  # noqa: E731
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert seen(2) == [None, None]
    assert [own["OMP_NUM_THREADS"] for own in sweep.shares(3)] == ["2"] * 3
    assert {own["LOCAL_WORLD_SIZE"] for own in sweep.shares(3)} == {"3"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert seen(3) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8a")
    assert seen(3) == ["3", "GPU-8a", "3"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # no GPU is to be used
    assert seen(2) == [None, None]


def test_a_cell_that_another_process_holds_is_left_to_it(copied):
    cell = sweep.cells(copied, Sweep(lam=(0.0,)))[0]
    folder = copied.runs / "sweep" / cell.name
    folder.mkdir(parents=True)
    with runs.held(folder, ".cell"):
        ended = sweep.attempt(sweep.train_cell, copied.runs, cell)
    assert ended.is_busy and ended.is_fit and "by another process" in ended.failure
    assert not (folder / "result.json").exists()


def test_the_command(swept, copied, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "preset", lambda: swept[0])
    words = "sweep --loss kl mse --lam 0 1 --blocks last --heads all --offset none --seeds 0 --out"
    assert main([*words.split(), str(tmp_path / "table.csv")]) == 0
    assert f"0 trainings failed; 8 rows: {tmp_path / 'table.csv'}" in capsys.readouterr().out
    assert main(["sweep", "--heads", "third"]) == 2
    assert 'heads is "third"' in capsys.readouterr().err
    assert main(["sweep", "--jobs", "0"]) == 2
    monkeypatch.setattr(command, "preset", lambda: copied)
    out = ["--out", str(tmp_path / "other.csv")]
    assert main(["sweep", "--loss", "kl", "--lam", "1e39", *out]) == 1
    assert "the loss is not finite" in capsys.readouterr().err


def test_results_of_an_older_version_had_the_usual_maps(copied, swept):
    """They are not trained again, so they must not fall out of the comparison either."""
    shutil.copytree(swept[0].runs / "sweep", copied.runs / "sweep")
    expected = sweep.collect(copied)
    for file in (copied.runs / "sweep").glob("*/result.json"):
        result = json.loads(file.read_text())
        for name in sweep.USUAL_MAPS:
            del result["config"]["train"]["human"][name]
            for row in result["rows"]:
                del row[name]
        file.write_text(json.dumps(result))
    same_rows(sweep.collect(copied), expected)
    table = sweep.run_sweep(copied, SMALL, copied.runs / "sweep.csv")[0]
    same_rows(table, expected)


def test_maps_that_cannot_be_had_are_refused_before_anything_is_trained(config):
    config.data = replace(config.data, maps="boxes")
    with pytest.raises(ValueError, match='noise is "half_readers", but no image has two readers'):
        sweep.run_sweep(config, Sweep(noise=("none", "half_readers")), config.runs / "sweep.csv")
    assert not list(config.runs.glob("ft-*"))
