"""What is on users' disks keeps loading: tests/kept was written before lib had wings."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from lib.config import RunConfig
from lib.data.corrections import load_corrections
from lib.data.pictures import decoded_images
from lib.experiments.compare import load_trials
from lib.experiments.evaluate import measure_runs
from lib.training import tokens
from lib.training.runs import Run, train_run
from lib.training.state import from_json

KEPT = Path(__file__).parent / "kept"
NUMBERS = ["p_true", "confidence", "class_token", "sigmoid"]  # that no drawn pixel decides


@pytest.fixture
def kept(tmp_path):
    return shutil.copytree(KEPT, tmp_path / "kept")


def refuse(*_):
    pytest.fail("it is made again")


def test_runs_and_cached_tokens_load_and_measure_as_they_did(kept, monkeypatch):
    """A fine-tuned run and one on cached tokens, whose test images are not run again.

    Files of tokens have newer names, of which pictures' times are a part and places are not.
    """
    monkeypatch.setattr(tokens, "_run_trunk", refuse)
    tokens.forget_tokens()
    trials = load_trials(["ft-s0", "hitl-s0"], kept / "runs")
    found = measure_runs(trials).set_index(["variant", "seed", "image_id"])
    images = pd.read_csv(kept / "result" / "one" / "images.csv")
    then = images.set_index(["variant", "seed", "image_id"])
    assert (found[NUMBERS] - then[NUMBERS]).abs().max().max() < 2e-3


def test_a_finished_run_is_loaded_and_one_that_was_stopped_goes_on(kept, monkeypatch):
    config = from_json(RunConfig, (KEPT / "runs" / "ft-s0" / "config.json").read_text())
    again = train_run("ft-s0", config, kept / "runs")
    assert again.history["epoch"].tolist() == [1, 2]
    half = from_json(RunConfig, (KEPT / "runs" / "half-s0" / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="1 of 2 epochs"):
        Run.load(kept / "runs" / "half-s0")
    resumed = train_run("half-s0", half, kept / "runs")
    first = pd.read_csv(KEPT / "runs" / "half-s0" / "history.csv")
    assert resumed.history["epoch"].tolist() == [1, 2]
    pd.testing.assert_frame_equal(resumed.history.iloc[:1][first.columns], first)
    # It started as ft-s0 did, which was not stopped; other versions of PyTorch round otherwise.
    weights = [run.model().state_dict() for run in (resumed, again)]
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*map(dict.values, weights)))  # noqa: B905


def test_a_correction_loads(kept):
    (one,), skipped = load_corrections(kept / "corrections")
    assert not skipped and (one.image_id, one.author) == ("200000", "somebody")
    assert one.edit.mask.sum() == 2 and one.edit.values[0, 0] == 0.25
    assert (one.edit.blocks, one.edit.heads, one.edit.offset) == ("all", (0,), "centred")


def test_a_cache_of_decoded_pictures_is_found(kept):
    paths = sorted((kept / "pictures").glob("*.png"))
    for path in paths:  # git keeps no times
        os.utime(path, (1_700_000_000, 1_700_000_000))
    found = decoded_images(paths, kept / "cache", 6, refuse)
    for index, path in enumerate(paths):
        with Image.open(path) as picture:
            plain = v2.pil_to_tensor(picture.convert("RGB"))
        assert found[index].shape[1:] == v2.resize(plain, 6).shape[1:]


def test_a_result_names_the_configuration_of_its_runs(kept):
    for file in (kept / "result" / "one" / "config").glob("*.json"):
        run = json.loads((kept / "runs" / file.stem / "config.json").read_text())
        assert json.loads(file.read_text()) == run
