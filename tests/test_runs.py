"""Runs on disk: loaded, refused, resumed, locked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image

from lib import config as cfg
from lib.config import DataConfig, RunConfig
from lib.data.classes import OtherClasses
from lib.data.dataset import make_dataset
from lib.evaluation.per_image import per_image
from lib.experiments import sweep
from lib.experiments.compare import load_trials
from lib.experiments.evaluate import common_dataset, measure_runs, tell_of_leaks
from lib.files import StorageError, write_text
from lib.training import runs
from lib.training.runs import Run, RunBusy, RunConflict, fine_tuning, human_in_the_loop, train_run
from lib.training.state import MADE_OF, STATE, settled, to_json
from lib.training.teach import Teacher
from lib.widgets.session import LiveSession


def test_a_run_is_loaded_when_it_is_there_and_refused_when_it_differs(config):
    first = train_run("ft", fine_tuning(config, 0), config.runs)
    stamp = (first.folder / "last.safetensors").stat().st_mtime_ns
    (first.folder / STATE).write_bytes(b"left by a process that was killed as it finished")
    again = train_run("ft", fine_tuning(config, 0), config.runs)
    assert not (first.folder / STATE).exists()
    assert again == first and (first.folder / "last.safetensors").stat().st_mtime_ns == stamp
    other = fine_tuning(config, 1)
    with pytest.raises(RunConflict, match=r"train\.seed is 0 there and 1 here"):
        train_run("ft", other, config.runs)
    assert train_run("ft", other, config.runs, overwrite=True).config.train.seed == 1


def test_a_run_that_stopped_half_way_goes_on(config, monkeypatch):
    """It is trained from its checkpoint, not from the start; without one, from the start."""
    config.ft = replace(config.ft, checkpoint_minutes=0.0, log_every=1)
    whole = train_run("whole", fine_tuning(config, 0), config.runs)
    steps = []

    def stop(progress):
        steps.append(progress.steps[-1]["step"])
        if len(progress.history) == 1 and progress.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run("ft", fine_tuning(config, 0), config.runs, watch=stop)
    with pytest.raises(FileNotFoundError, match="stopped after 1 of 2 epochs; resume"):
        Run.load(config.runs / "ft")
    before = len(steps)
    run = train_run("ft", fine_tuning(config, 0), config.runs, watch=lambda p: steps.append(-1))
    assert len(steps) - before < 6 and not (run.folder / STATE).exists()
    for name in ("last.safetensors", "best.safetensors", "history.csv", "steps.csv"):
        assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Run.load(config.runs / "nothing")


def test_how_a_run_is_made_may_change_when_it_goes_on(config):
    run = train_run("ft", fine_tuning(config, 0), config.runs)
    config.ft = replace(config.ft, workers=2, checkpoint_minutes=7.0, log_every=3)
    assert train_run("ft", fine_tuning(config, 0), config.runs).folder == run.folder


def test_two_trainings_of_one_run_do_not_meet(config):
    other = []

    def train_it_again(progress):
        if not other:
            with pytest.raises(RunBusy, match="being trained by another process") as told:
                train_run("ft", fine_tuning(config, 0), config.runs)
            other.append(told)

    train_run("ft", fine_tuning(config, 0), config.runs, watch=train_it_again)
    assert other


def test_overwriting_starts_anew_and_takes_what_was_half_written(config):
    run = train_run("ft", fine_tuning(config, 0), config.runs)
    (run.folder / "state.pt.0123.tmp").write_bytes(b"half")
    write_text(run.folder / "notes.txt", "mine")
    again = train_run("ft", fine_tuning(config, 1), config.runs, overwrite=True)
    assert again.config.train.seed == 1 and not list(again.folder.glob("*.tmp"))
    assert (again.folder / "notes.txt").read_text() == "mine"


def test_a_runs_folder_that_cannot_be_made_is_one_sentence(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/ft cannot be made"):
        train_run("ft", fine_tuning(config, 0), tmp_path / "file")


def test_what_is_refused_leaves_no_run_behind(config):
    """Else the corrected command would meet a run of that name."""
    train_run("ft", fine_tuning(config, 0), config.runs)
    config.hitl = replace(config.hitl, trainable="last_block")
    refused = [human_in_the_loop(config, "ft", 0, blocks="all")]
    for changes in ({"mixed_precision": "fp16"}, {"trackers": ("nothing_of_that_name",)}):
        stage = replace(config.ft, **changes)
        refused.append(RunConfig(config.data, config.model, stage))
    for settings in refused:
        with pytest.raises(ValueError, match=r"freezes it|needs a GPU|is not installed"):
            train_run("x", settings, config.runs)
    assert not (config.runs / "x").exists()


def test_a_run_folder_that_is_read_only_is_one_sentence(config, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runs.FileLock, "acquire", denied)  # root may write everywhere
    with pytest.raises(StorageError, match="ft cannot be written to"):
        train_run("ft", fine_tuning(config, 0), config.runs)


def test_a_finished_run_without_weights_says_so(config):
    run = train_run("ft", fine_tuning(config, 0), config.runs)
    for file in run.folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="ft has no weights: a sweep keeps none"):
        Run.load(run.folder)


# ------------------------------------------------- runs of pictures on disk, which change and move

CLASSES = ("1.ant", "2.bee")
COLOURS = {"ant": 0, "bee": 1, "cat": 2}  # a class is a channel, so that a few steps learn it


def draw(folder: Path, classes=CLASSES, count: int = 6) -> Path:
    """A data set in train, val and test, each class of its own colour, with maps beside."""
    rng = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for name in classes:
            for i in range(count):
                pixels = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
                pixels[..., COLOURS[name[2:]]] += 150
                picture = Image.fromarray(pixels)
                save(picture, folder / part / name / f"{part}{i}.png")
                save(picture.convert("L"), folder.parent / "maps" / name / f"{part}{i}.png")
    return folder


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def on_disk(root: Path, runs: Path) -> cfg.Config:
    config = tiny_config(runs)
    data = DataConfig("folder", root, (64, 64), maps="none")
    stage = {"epochs": 4, "batch_size": 4, "lr": 3e-3}
    return replace(
        config,
        data=data,
        ft=replace(config.ft, **stage),
        hitl=replace(config.hitl, **stage),
        variants={},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A project: pictures in `photos`, and in `runs` a run that is right on all test pictures."""
    home = tmp_path_factory.mktemp("project")
    config = on_disk(draw(home / "photos"), home / "runs")
    run = train_run("ft-s0", fine_tuning(config, 0), config.runs)
    assert per_image(run.model(), run.dataset("test"))["top1"].mean() == 1
    return home


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    """A copy, whose run remembers the first place of its pictures; that of the copy is DATA_DIR."""
    for name in ("DATA_DIR", "MAPS", "SPLIT", "CACHE"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "project" / "photos"))
    return on_disk(tmp_path / "project" / "photos", tmp_path / "project" / "runs")


def renamed(root: Path, old: str, new: str) -> None:
    for part in ("train", "val", "test"):
        (root / part / old).rename(root / part / new)


def reordered(root: Path) -> None:
    renamed(root, "1.ant", "3.ant")


def added(root: Path) -> None:
    draw(root, ("3.cat",))


def removed(root: Path) -> None:
    for part in ("train", "val", "test"):
        shutil.rmtree(root / part / "2.bee")


def train_again(config):
    train_run("ft-s0", fine_tuning(config, 0), config.runs)


def resume(config):
    folder = config.runs / "ft-s0"
    lines = (folder / "history.csv").read_text().splitlines()
    (folder / "history.csv").write_text("\n".join(lines[:2]) + "\n")
    run = train_run("ft-s0", fine_tuning(config, 0), config.runs)
    assert per_image(run.model(), run.dataset("test"))["top1"].mean() == 1


def start_from(config):
    run = train_run("hitl-s0", human_in_the_loop(config, "ft-s0", 0, lam=0.0), config.runs)
    assert run.classes == ["ant", "bee"]
    assert per_image(run.model(), run.dataset("test"))["top1"].mean() == 1


def measure(config):
    """As `evaluate` does, and as notebooks do with the configuration that the run remembers."""
    trials = load_trials(["ft-s0"], config.runs)
    assert measure_runs(trials)["top1"].mean() == 1
    run = trials[0].run
    test = runs.dataset_for(run.model(), run.config, "test", augment=False)
    assert per_image(run.model(), test)["top1"].mean() == 1


def sweep_on_it(config):
    axes = sweep.Sweep(lam=(0.0,))
    table, failed = sweep.run_sweep(config, axes, config.runs / "sweep.csv")
    assert not failed and (table["top1"] == 1).all()


def edit(config):
    run = Run.load(config.runs / "ft-s0")
    session = LiveSession(run.model(), run.dataset("test"))
    for index in range(len(session)):
        shown = session.open(index)
        assert session.classes[session.outcome(index).probabilities.argmax()] == shown.class_name


def teach(config):
    run = Run.load(config.runs / "ft-s0")
    Teacher(run.model(), run.dataset("train"), pictures=run.dataset("test"))


CHANGES = {
    "added": (added, r"has 3 \(new: cat\)"),
    "removed": (removed, r"has 1 \(gone: bee\)"),
    "renamed": (lambda root: renamed(root, "2.bee", "2.wasp"), r"has 2 \(new: wasp; gone: bee\)"),
}
MEETINGS = (train_again, resume, start_from, measure, sweep_on_it, edit, teach)


@pytest.mark.parametrize("meet", MEETINGS, ids=lambda meet: meet.__name__)
def test_a_run_meets_the_classes_of_its_data_by_name(project, meet):
    """In another order they are mapped; others are refused in a sentence with the remedy."""
    before = sorted(project.runs.rglob("*"))
    for change, says in CHANGES.values():
        shutil.copytree(project.data.root, project.data.root.parent / "kept")
        change(project.data.root)
        with pytest.raises(ValueError, match=rf"was trained for 2 classes .*{says}.*--overwrite"):
            meet(project)
        assert [p for p in sorted(project.runs.rglob("*")) if p not in before] == []
        shutil.rmtree(project.data.root)
        (project.data.root.parent / "kept").rename(project.data.root)
    reordered(project.data.root)
    meet(project)


def test_a_data_set_made_by_hand_is_held_against_the_models_classes(project):
    model = Run.load(project.runs / "ft-s0").model()
    reordered(project.data.root)
    test = make_dataset(project.data, "test", model.grid, *model.normalisation)
    for meet in (LiveSession, Teacher, per_image):
        with pytest.raises(OtherClasses, match=r"in another order; make .* `run\.dataset"):
            meet(model, test)


def test_a_run_is_not_handed_out_for_other_pictures(project, monkeypatch):
    """Times do not count, sizes and names do; `overwrite` trains on what is there now."""
    again = fine_tuning(project, 0)
    train = project.data.root / "train"
    for path in train.rglob("*.png"):
        path.touch()
    train_run("ft-s0", again, project.runs)
    Image.new("RGB", (9, 9)).save(train / "1.ant" / "train0.png")
    shutil.copy(train / "1.ant" / "train1.png", train / "1.ant" / "more.png")
    (train / "2.bee" / "train1.png").unlink()
    (train / "2.bee" / "train2.png").unlink()
    says = r"ft-s0 was made of other training pictures \(of 12: 2 changed, 1 gone\); .*--overwrite"
    with pytest.raises(RunConflict, match=says):
        train_run("ft-s0", again, project.runs)
    with pytest.raises(RunConflict, match=says):
        sweep_on_it(project)
    shutil.move(train / "1.ant" / "train3.png", project.data.root / "test" / "1.ant")
    trials = load_trials(["ft-s0"], project.runs)
    with pytest.warns(UserWarning, match=r"trained on other pictures .*: 1 of the 13 that"):
        tell_of_leaks(trials, common_dataset(trials, "test", "ft"))
    start_from(project)
    train_run("ft-s0", again, project.runs, overwrite=True)
    assert train_run("ft-s0", again, project.runs).made_of["pictures"]
    with pytest.raises(RunConflict, match=r"started from other weights than .* now in ft-s0"):
        start_from(project)


def test_human_maps_are_part_of_what_learned_from_them(project):
    maps = project.data.root.parent / "maps"
    project.data = replace(project.data, maps="files", maps_dir=maps)
    stages = [fine_tuning(project, 0), human_in_the_loop(project, "ft-s0", 0)]
    stages[0].data = replace(project.data)
    train_run("ft", stages[0], project.runs)
    train_run("hitl", stages[1], project.runs)
    moved = maps.rename(maps.with_name("gaze"))
    for stage in stages:
        stage.data = replace(stage.data, maps_dir=moved)
    train_run("hitl", stages[1], project.runs)
    one = np.asarray(Image.open(moved / "1.ant" / "train0.png"))
    Image.fromarray(255 - one).save(moved / "1.ant" / "train0.png")
    Image.fromarray(255 - one).save(moved / "1.ant" / "test0.png")  # which nothing learns from
    with pytest.raises(RunConflict, match=r"was made of other human maps \(of 12: 1 changed\)"):
        train_run("hitl", stages[1], project.runs)
    stages[0].data = replace(stages[0].data, maps="none", maps_dir=None)  # unseen where lam is 0
    assert train_run("ft", stages[0], project.runs).config.data.maps == "none"


def test_older_runs_load_and_go_by_the_names_of_places(project):
    (project.runs / "ft-s0" / MADE_OF).unlink()
    removed(project.data.root)
    with pytest.raises(RunConflict, match="gone: bee"):
        train_again(project)
    draw(project.data.root)
    train_again(project)
    project.data.root = project.data.root.rename(project.data.root.with_name("other"))
    with pytest.raises(RunConflict, match=r"of the pictures in .*photos, and here are .*other"):
        train_again(project)


def test_places_do_not_decide(project, monkeypatch, trained):
    """The project moves; DATA_DIR wins over what a run remembers, which wins over datasets/."""
    home = project.runs.parent
    run = Run.load(home / "runs" / "ft-s0")
    assert run.config.data.root == home / "photos"
    monkeypatch.delenv("DATA_DIR")
    assert Run.load(home / "runs" / "ft-s0").config.data.root == trained / "photos"
    moved = home.rename(home.with_name("moved"))
    file = moved / "runs" / "ft-s0" / "config.json"
    gone = home / "datasets"
    data = {"maps": "files", "maps_dir": gone / "maps", "cache": gone / "decoded"}
    stage = fine_tuning(project, 0)
    stage.data = replace(stage.data, root=gone, **data)
    file.write_text(to_json(stage))
    monkeypatch.setattr(cfg, "ROOT", moved)
    found = Run.load(file.parent).config.data
    assert (found.root, found.maps_dir, found.cache) == (gone, gone / "maps", None)
    with pytest.raises(FileNotFoundError, match=r"datasets is missing; set DATA_DIR to"):
        Run.load(file.parent).dataset("test")
    (moved / "photos").rename(moved / "datasets")
    (moved / "maps").rename(moved / "datasets" / "maps")
    found = Run.load(file.parent).config.data
    assert (found.root, found.maps_dir) == (moved / "datasets", moved / "datasets" / "maps")
    assert Run.load(file.parent).dataset("test").has_map.all()
    stage.data = replace(stage.data, root=found.root, maps_dir=found.maps_dir, cache=None)
    again = train_run("ft-s0", stage, moved / "runs", watch=lambda p: None)
    assert again.config == settled(stage, torch.device("cpu"))
    monkeypatch.setenv("MAPS", str(trained / "maps"))
    assert Run.load(file.parent).config.data.maps_dir == trained / "maps"


def test_a_finished_run_can_be_used_without_its_data(project, monkeypatch):
    shutil.rmtree(project.data.root)
    with pytest.raises(FileNotFoundError, match="photos is missing; set DATA_DIR"):
        Run.load(project.runs / "ft-s0")  # DATA_DIR names it
    monkeypatch.delenv("DATA_DIR")
    run = train_run("ft-s0", fine_tuning(project, 0), project.runs)
    assert run.model().classes == ["ant", "bee"]
    with pytest.raises(FileNotFoundError, match="photos is missing; set DATA_DIR"):
        run.dataset("test")
