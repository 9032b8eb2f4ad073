"""What runs, notebooks and the editor compute, on the GPU that is there: tests/fake_gpu.py."""

from __future__ import annotations

import copy
import json
import runpy
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import images_for, tiny_config, tiny_vit
from fake_gpu import GPU, fake_gpu
from IPython.display import display

from lib import config as cfg
from lib.data.corrections import save_correction
from lib.edit import LADDER, AttentionEdit
from lib.evaluation import erasing, outliers
from lib.evaluation.per_image import per_head, per_image
from lib.experiments import simulate
from lib.experiments.gallery import attention_maps
from lib.model.live import LiveImage
from lib.model.predict import tf32_products
from lib.model.vit import SigmoidViT
from lib.training.runs import Run, fine_tuning, human_in_the_loop, train_run
from lib.training.teach import TeachConfig
from lib.widgets.controller import EditorController
from lib.widgets.rungs import climb
from lib.widgets.session import LiveSession
from lib.widgets.teaching import TeachPanel


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> cfg.Config:
    config = tiny_config(tmp_path_factory.mktemp("gpu") / "runs")
    config.data = replace(config.data, toy_train=24, toy_val=8, toy_test=12)
    config.ft, config.hitl = (replace(part, epochs=1) for part in (config.ft, config.hitl))
    config.variants = dict(list(config.variants.items())[:2])  # the control and one more
    return config


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
            order: erasing.deletion_insertion(model, test, order, 2, range(3), batch_size=2)
            for order in ("attention", "random")
        }
        return {
            "images": per_image(model, test, batch_size=10),
            "heads": per_head(model, test, batch_size=10),
            "erased": erasing.erase(model, test, images=range(3), batch_size=2),
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
        model, waits = run.model(), []
        for batch_size in (3, 12):
            gpu.reset()
            per_image(model, run.dataset("test"), batch_size=batch_size)
            waits.append(gpu.waits)
    assert waits[0] == waits[1]  # no batch is read by itself
    same(on_gpu, on_cpu)


def test_what_is_measured_is_float32_whatever_is_allowed(toy):
    """PyTorch allows TF32 in convolutions by itself, and a person may in all products."""
    (model, dataset), found = toy, []

    def allowed() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    patches = model.vit.patch_embed
    watch = patches.register_forward_pre_hook(lambda *_: found.append(allowed()))
    some, before = {"images": range(2)}, allowed()
    with tf32_products(True):
        per_image(model, dataset)
        erasing.erase(model, dataset, **some)
        erasing.deletion_insertion(model, dataset, "random", 2, **some)
        outliers.read_patch_tokens(model, dataset, **some)
        LiveImage(model, dataset[0]["image"])
        assert allowed() == ("high", True)
    watch.remove()
    assert len(found) >= 5 and set(found) == {("highest", False)} and allowed() == before


@pytest.mark.parametrize("kind", ["plain", "registers"])
def test_a_live_edit_is_one_tensor_up_and_one_back(kind):
    model = SigmoidViT(tiny_vit(kind))
    image = images_for(model, 1)[0]
    mask = torch.rand(model.grid, generator=torch.Generator().manual_seed(0)) < 0.3
    edits = {rung: AttentionEdit(mask, 0.9, **scope) for rung, scope in LADDER.items()}
    edits["a head"] = AttentionEdit(mask, 0.0, "all", (1,), "all", "centred")

    def full(edit: AttentionEdit) -> torch.Tensor:
        with torch.no_grad():
            return model(image[None].to(model.device), edit=edit)[0].cpu()

    on_cpu = LiveImage(model, image)
    answers = {name: (*on_cpu.run(edit), full(edit)) for name, edit in edits.items()}
    with fake_gpu() as gpu:
        live = LiveImage(model.to("cuda"), image)
        assert gpu.waits == 1
        for name, edit in edits.items():
            gpu.reset()
            found = live.run(edit)
            assert (gpu.uploads, gpu.waits) == (1, 1), name
            gpu.reset()
            same([*found, full(edit)][2], answers[name][2])
            assert gpu.waits == 1, name
            same(found[0], answers[name][0])
            same(found[1], answers[name][1])
            there = AttentionEdit(edit.mask.to("cuda"), 0.9 * (name != "a head"), *_scope(edit))
            same(live.run(there)[0], answers[name][0])
        assert not gpu.left


def _scope(edit: AttentionEdit) -> tuple:
    return edit.blocks, edit.heads, edit.queries, edit.offset


def test_training_runs_on_the_gpu(run, config, gpu):
    again = train_run("on the gpu", fine_tuning(config, 0), config.runs)
    assert gpu.large > 50 and not gpu.left
    same(again.history, run.history)
    config = replace(config, hitl=replace(config.hitl, trainable="last_block", cache_tokens=True))
    stage = human_in_the_loop(config, run.name, 0, blocks="last", loss="kl")
    assert train_run("cached", stage, config.runs).history["human_loss"].iloc[0] > 0
    assert not gpu.left


def test_pretraining_runs_on_the_gpu(tmp_path, gpu):
    pretrain = runpy.run_path(str(cfg.ROOT / "tools" / "make_toy_trunk.py"))["pretrain"]
    config = cfg.preset("toy")
    config.model = replace(config.model, overrides={**config.model.overrides, "depth": 1})
    accuracy = pretrain(config, tmp_path / "trunk.safetensors", images=64, epochs=1, held_out=8)
    assert 0 <= accuracy["decoy"] <= 1 and gpu.large > 10 and not gpu.left


def test_an_edit_and_a_lesson_are_answered_by_the_gpu(run, tmp_path, monkeypatch):
    monkeypatch.setattr(simulate, "TeachConfig", partial(TeachConfig, steps=2, replay=8))
    train, test = run.dataset("train"), run.dataset("test")
    corrections = simulate.simulated_corrections(train, range(4))
    for one in corrections:
        save_correction(one, tmp_path)
    settings = TeachConfig(steps=3, batch_size=4, replay=8, last_blocks=1)

    def found() -> dict:
        session = LiveSession(run.model(), train)
        controller = EditorController(session)
        controller.paint([(0, 0), (1, 2)], 0.9)
        painted = {"own": controller.own, "ladder": pd.DataFrame(climb(controller))}
        panel = TeachPanel(session, train, test, tmp_path, settings)
        history, table = panel.teach().history, panel.table
        taught, own = (dict(one.named_parameters()) for one in (session.model, panel._before[0]))
        shared = {name for name in own if taught[name] is own[name]}
        panel.undo()
        simulated = simulate.simulated_teaching(session.model, train, test, [1])
        return {
            **painted,
            "history": history,
            "table": table,
            "not copied": len(shared),
            "simulated": simulated.drop(columns="seconds"),
        }

    on_cpu = found()
    with fake_gpu() as gpu:
        on_gpu = found()
    assert gpu.large > 100 and not gpu.left
    same(on_gpu, on_cpu)
    # The first block, the patches' and positions' embedding are those of the model before it.
    assert on_cpu["not copied"] == 16


# 02 to 04 bring batches to a model; the others leave that to lib, which the tests above hold.
@pytest.mark.parametrize("number", ["02", "03", "04"])
def test_notebooks_run_on_the_gpu(number, config, monkeypatch, gpu):
    """The code of their cells, with a small model, as a kernel would run it."""
    monkeypatch.setattr(cfg, "preset", lambda *_, **__: config)
    file = next((cfg.ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    space = {"display": display}
    for place, cell in enumerate(json.loads(file.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            for slow, quick in (("steps=150", "steps=3"), ("seeds=[0, 1]", "seeds=[0]")):
                code = code.replace(slow, quick)
            name = f"{file.name}, cell {place}"
            # Without what it asserts: so small a model learns nothing.
            exec(compile(code, name, "exec", optimize=1), space)
            plt.close("all")
    assert space["model"].device == GPU and gpu.large > 100 and not gpu.left
