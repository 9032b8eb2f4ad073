"""Small models and data that the tests share."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import timm
import torch
from hypothesis import settings
from PIL import Image

from lib.config import Config, DataConfig, ModelConfig, preset
from lib.data.dataset import BirdDataset
from lib.model.vit import SigmoidViT
from lib.training.runs import dataset_for, fine_tuning

matplotlib.use("Agg")
settings.register_profile("lib", deadline=None, max_examples=40)
settings.load_profile("lib")

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Files that `make test` runs in one process, as they share something dear; others go one by one.
TOGETHER = {
    "trained models": r"notebooks/0[2-57]",
    # Notebook 06 is opened in the browser as well, and then finds its model trained.
    "the browser and its servers": r"tests/browser/|notebooks/06",
}

# The tiny CUB-200-2011 of the fixture `cub`.
CUB_CLASSES = ("001.Black_footed_Albatross", "004.Groove_billed_Ani")
CUB_PER_CLASS = 10  # the first 6 are official training images
CUB_UNSEEN = 3  # image id without gaze
CUB_SIZE = (60, 80)  # height, width of the tiny JPEGs

# Architectures that must work: name, changes, and what they stand for.
VITS = {
    "plain": ("vit_tiny_patch16_224", {"img_size": 64}),
    "wide": ("vit_tiny_patch16_224", {"img_size": (64, 96)}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": (56, 42)}),
    "qk_norm": ("vit_tiny_patch16_224", {"img_size": 64, "qk_norm": True, "init_values": 0.5}),
    "no_bias": ("vit_tiny_patch16_224", {"img_size": 64, "qkv_bias": False}),
    "rotary": ("vit_small_patch16_dinov3", {"img_size": (64, 80), "global_pool": "token"}),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 56, "global_pool": "token"}),
    "mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": 64}),
    "pooled": ("vit_base_patch16_siglip_224", {"img_size": (64, 48)}),
    "two_kinds": ("vit_pe_core_tiny_patch16_384", {"img_size": 64, "attn_pool_num_heads": 2}),
    "left_out": ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "map"}),
}


def tiny_vit(kind: str = "plain", classes: int = 5, seed: int = 0, **changes) -> torch.nn.Module:
    """A timm ViT of 3 blocks, width 32 and 4 heads with lively random weights."""
    name, base = VITS[kind]
    torch.manual_seed(seed)
    sizes = {"depth": 3, "embed_dim": 32, "num_heads": 4, "num_classes": classes}
    vit = timm.create_model(name, **{**base, **sizes, **changes})
    for parameter in vit.parameters():
        if parameter.ndim > 1:  # timm's own start gives almost uniform attention
            torch.nn.init.normal_(parameter, std=0.3)
    return vit.eval()


def images_for(model: SigmoidViT, count: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *model.vit.patch_embed.img_size, generator=generator)


def pytest_configure(config: pytest.Config) -> None:
    """Each process of pytest-xdist trains into a folder of its own: two would write the same run.

    Nothing that an older version of the code has trained is loaded, either.
    """
    if hasattr(config, "workerinput"):
        runs = tempfile.TemporaryDirectory(prefix="runs-")
        config.add_cleanup(runs.cleanup)
        os.environ["RUNS_DIR"] = runs.name  # for the kernels of the notebooks, too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bars of the notebooks' kernels move every two seconds.

    nbval reads what a cell wrote when it is over, and ZeroMQ keeps a thousand messages: the last
    one of a long training with quick bars, that it is over, would be lost.
    """
    for notebook in {item.parent for item in items if type(item).__name__ == "IPyNbCell"}:
        notebook.setup = partial(_with_slow_bars, notebook.setup)


def _with_slow_bars(start_kernel: Callable[[], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_MININTERVAL", "2")
        start_kernel()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Which files one process runs together (with pytest 9.2, --dist=loadgroup has no effect)."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((name for name, part in TOGETHER.items() if re.match(part, file)), file)

    return Together(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have measured, in the end: a process of pytest-xdist cannot print."""
    for report in terminalreporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", ()):
            if report.when == "call":
                terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(params=list(VITS))
def any_model(request: pytest.FixtureRequest) -> SigmoidViT:
    return SigmoidViT(tiny_vit(request.param))


@pytest.fixture
def model() -> SigmoidViT:
    return SigmoidViT(tiny_vit())


def tiny_config(runs: Path) -> Config:
    """The toy preset, but a few images, a few steps and a few parameters."""
    config = preset("toy")
    config.data = replace(config.data, toy_train=40, toy_val=16, toy_test=24)
    # The level that is drawn fastest, and enough conflicting decoys among so few.
    config.data = replace(config.data, toy_level="border", agreement=0.95)
    sizes = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config.model = ModelConfig("vit_tiny_patch16_224", None, sizes)
    config.ft = replace(config.ft, epochs=2, batch_size=16)
    config.hitl = replace(config.hitl, epochs=2, batch_size=16)
    config.runs = runs
    return config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path / "runs")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[SigmoidViT, BirdDataset]:
    """A model of 3 blocks with lively attention, and 24 test pictures of 16 patches."""
    config = tiny_config(tmp_path_factory.mktemp("runs"))
    model = SigmoidViT(tiny_vit(classes=8))
    return model, dataset_for(model, fine_tuning(config, 0), "test", augment=False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development data beside the checkout; tests that need it skip where it is absent."""
    if not (SHARED / "data" / "CUB_200_2011").is_dir():
        pytest.skip("no development data (real birds, gaze, weights) beside this checkout")
    return SHARED


@pytest.fixture
def cub(tmp_path):
    """A folder like the published one: 2 classes of 10 images, two runs of gaze."""
    rng = np.random.default_rng(0)
    folder, gaze = tmp_path / "CUB_200_2011", tmp_path / "CUB_GHA" / "data_5runs"
    gaze.mkdir(parents=True)
    tables = {name: [] for name in ("images", "image_class_labels", "train_test_split")}
    boxes, parts, runs = [], [], [[], []]
    for k, class_name in enumerate(CUB_CLASSES):
        (folder / "images" / class_name).mkdir(parents=True)
        for j in range(CUB_PER_CLASS):
            image, name = 1 + k * CUB_PER_CLASS + j, f"{class_name}/bird_{j}.jpg"
            pixels = rng.integers(0, 255, (*CUB_SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name)
            tables["images"].append(f"{image} {name}")
            tables["image_class_labels"].append(f"{image} {int(class_name[:3])}")
            tables["train_test_split"].append(f"{image} {int(j < 6)}")
            boxes.append(f"{image} 20.0 15.0 40.0 30.0")
            parts += [f"{image} 1 25.0 20.0 1", f"{image} 2 55.0 40.0 1", f"{image} 3 0.0 0.0 0"]
            if image != CUB_UNSEEN:
                runs[0].append(f"{image},{CUB_SIZE[1]},{CUB_SIZE[0]},10,10,200,70,50,400")
                runs[1].append(f"{image},{CUB_SIZE[1]},{CUB_SIZE[0]},12,9,300")
    tables["bounding_boxes"] = boxes
    tables["classes"] = [f"{int(name[:3])} {name}" for name in CUB_CLASSES]
    for name, lines in tables.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (folder / "parts").mkdir()
    (folder / "parts" / "part_locs.txt").write_text("\n".join(parts) + "\n")
    for k, lines in enumerate(runs):
        (gaze / f"Fixation_run{k + 1}.txt").write_text("\n".join(lines) + "\n")
    return DataConfig(name="cub2011", root=tmp_path, image_size=(48, 64), val_share=0.34)
