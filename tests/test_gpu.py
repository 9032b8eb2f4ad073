"""What runs, notebooks and the editor compute, on the GPU that is there: tests/fake_gpu.py."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import images_for, tiny_config, tiny_vit
from fake_gpu import GPU, fake_gpu

from lib.edit import LADDER, AttentionEdit
from lib.evaluation import erasing, outliers
from lib.evaluation.per_image import per_head, per_image
from lib.experiments.gallery import attention_maps
from lib.experiments.simulate import simulated_teaching
from lib.model.live import LiveImage
from lib.model.vit import SigmoidViT
from lib.training.runs import Run, fine_tuning, human_in_the_loop, train_run
from lib.widgets.controller import EditorController
from lib.widgets.session import LiveSession


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("gpu") / "runs")


@pytest.fixture(scope="module")
def run(config) -> Run:
    return train_run("ft-s0", fine_tuning(config, 0), config.runs)


@pytest.fixture
def gpu():
    with fake_gpu() as counted:
        yield counted


def same(ours: object, theirs: object) -> None:
    """The same numbers, but for the order of sums: the GPU has another attention kernel."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            same(ours[name], theirs[name])
    elif isinstance(ours, pd.DataFrame):
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-3, atol=1e-5)
    else:
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-3, atol=1e-5)


def test_the_fake_is_as_strict_as_a_gpu(gpu):
    layer, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    y = layer(x)
    assert gpu.left and not gpu.uploads
    layer.to("cuda")
    assert layer.weight.device == GPU == x.to(layer.weight.device).device and layer.weight.is_cuda
    for wrong in (lambda: layer(x), lambda: x.to(GPU) + x, lambda: torch.cat([x.to(GPU), x])):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            wrong()
    for wrong in (np.asarray, lambda tensor: tensor.numpy()):
        with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
            wrong(x.to(GPU))
    gpu.reset()
    there = layer(x.to(GPU)) * torch.tensor(1.0)
    assert gpu.uploads == 1 and gpu.large == 1 and not gpu.waits and not gpu.left
    assert torch.equal(there.cpu(), y) and there.sum().item() and gpu.waits == 2
    assert copy.deepcopy(layer)(x.to(GPU)).device == GPU


def test_what_is_measured_of_a_run_runs_on_the_gpu(run):
    def found() -> dict:
        model, test = run.model(), run.dataset("test")
        tokens = outliers.read_patch_tokens(model, test, range(8), batch_size=5)
        maps, right = attention_maps(model, test, range(6))
        curves = {
            order: erasing.deletion_insertion(model, test, order, 3, range(6), batch_size=4)
            for order in ("attention", "random")
        }
        return {
            "images": per_image(model, test, batch_size=10),
            "heads": per_head(model, test, batch_size=10),
            "erased": erasing.erase(model, test, images=range(6), batch_size=4),
            **curves,
            "tokens": vars(tokens),
            "maps": np.stack(maps),
            "right": right,
        }

    on_cpu = found()
    with fake_gpu() as gpu:
        on_gpu = found()
        assert run.model().device == GPU and run.model(device="cpu").device.type == "cpu"
    assert gpu.large > 100 and not gpu.left
    same(on_gpu, on_cpu)
