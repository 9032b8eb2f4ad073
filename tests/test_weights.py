"""Pretrained weights as a file: from a cached hub, and without a hub. Nothing is downloaded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch

from lib.model.vit import SigmoidViT, UnsupportedModelError
from lib.model.weights import HUB_FILES, WeightsError, load_weights, save_pretrained

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "test_vit.r160_in1k"  # timm's tiny ViT of its own tests: 0.4 million parameters


def put_in_cache(hub: Path, model_name: str, file: str = HUB_FILES[0]) -> dict[str, torch.Tensor]:
    """Random weights of a model where huggingface_hub would keep the pretrained ones."""
    torch.manual_seed(7)
    state = timm.create_model(model_name).state_dict()
    repository = timm.get_pretrained_cfg(model_name).hf_hub_id
    folder = hub / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    if file.endswith(".safetensors"):
        safetensors.torch.save_file(state, snapshot / file)
    else:
        torch.save(state, snapshot / file)
    return state


def read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of huggingface_hub, in offline mode."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.mark.parametrize("file", HUB_FILES)
def test_cached_weights_are_saved_tensor_for_tensor(hub, tmp_path, file):
    state = put_in_cache(hub, NAME, file)
    path = save_pretrained(NAME, tmp_path / "models")
    assert path == tmp_path / "models" / f"{NAME}.pt"  # the tag is part of the name
    assert_same(read(path), state)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    # without the tag: timm's default tag, which is this one
    assert_same(read(save_pretrained("test_vit", tmp_path / "models")), state)
    assert (tmp_path / "models" / "test_vit.pt").is_file()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_file_name_decides_the_format(hub, tmp_path, suffix):
    state = put_in_cache(hub, NAME)
    path = save_pretrained(NAME, tmp_path / "new" / f"my.weights{suffix}")
    assert path == tmp_path / "new" / f"my.weights{suffix}"
    assert_same(read(path), state)

    model = SigmoidViT(timm.create_model(NAME, num_classes=3, img_size=(96, 160)))
    report = load_weights(model, path)
    assert report.resampled == ("pos_embed",) and report.misfit == ("head.weight", "head.bias")


def test_a_file_that_is_there_is_kept_unless_asked(hub, tmp_path):
    (tmp_path / f"{NAME}.pt").write_bytes(b"mine")
    assert save_pretrained(NAME, tmp_path).read_bytes() == b"mine"  # nor is the hub asked
    with pytest.raises(WeightsError):
        save_pretrained(NAME, tmp_path, overwrite=True)
    assert (tmp_path / f"{NAME}.pt").read_bytes() == b"mine"
    state = put_in_cache(hub, NAME)
    assert_same(read(save_pretrained(NAME, tmp_path, overwrite=True)), state)


def test_offline_without_a_cache_is_one_sentence_with_two_ways_out(hub, tmp_path, caplog, capfd):
    with pytest.raises(WeightsError) as caught:
        save_pretrained(NAME, tmp_path / "models")
    assert_names_two_ways_out(str(caught.value), NAME)
    assert not (tmp_path / "models").exists()
    assert not caplog.records and capfd.readouterr() == ("", "")


def assert_names_two_ways_out(message: str, model_name: str) -> None:
    assert f"hub could not be reached for {model_name} (" in message
    assert "WEIGHTS=<file>" in message and "HF_HOME" in message
    assert "\n" not in message and ". " not in message.replace(model_name, "")


def test_a_damaged_cache_is_named(hub, tmp_path):
    put_in_cache(hub, NAME)
    file = next(hub.rglob(HUB_FILES[0]))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=rf"cannot load the pretrained {NAME} .*delete"):
        save_pretrained(NAME, tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_smal_patch16_224", r"knows no model 'vit_smal_patch16_224'.* vit_small_patch16_224"),
        ("vit_smal_patch16_224.dino", r"knows no model .* vit_small_patch16_224"),
        ("hf-hub:timm/vit_tiny_patch16_224", "knows no model"),
        ("../vit_tiny_patch16_224", "knows no model"),
        ("", "knows no model ''"),
        (
            "vit_small_patch14_dinov2.lvd",
            r"no pretrained weights for .*; it has for vit_small_patch14_dinov2\.lvd142m$",
        ),
        (
            "vit_small_patch16_36x1_224",
            r"no pretrained weights for 'vit_small_patch16_36x1_224'; it has for .*vit_small_patch",
        ),
    ],
)
def test_names_that_timm_has_no_weights_for_are_told_with_close_ones(tmp_path, name, says):
    with pytest.raises(ValueError, match=says) as caught:
        save_pretrained(name, tmp_path)
    assert not isinstance(caught.value, WeightsError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "says"),
    [("test_resnet", "ResNet"), ("test_vit2", 'global_pool="avg"'), ("test_vit3", "map")],
)
def test_unsupported_models_are_refused_before_the_hub_is_asked(hub, tmp_path, name, says):
    with pytest.raises(UnsupportedModelError, match=says):
        save_pretrained(name, tmp_path)


SCRIPT = """
import json, sys, time
from pathlib import Path
from lib.model.weights import save_pretrained
from lib.model.weights import WeightsError
folder, started = Path(sys.argv[1]), time.perf_counter()
save_pretrained("vit_tiny_patch16_224", folder)
save_pretrained("vit_tiny_patch16_224", folder / "same.safetensors")
try:
    save_pretrained("vit_small_patch16_224", folder)
except WeightsError as error:
    print(json.dumps([str(error), time.perf_counter() - started]))
"""


def test_a_dead_connection_is_told_at_once_and_does_not_matter_where_the_cache_has_it(tmp_path):
    """In a process of its own, with the environment variables that a person would set."""
    state = put_in_cache(tmp_path / "home" / "hub", "vit_tiny_patch16_224")
    with socket.socket() as closed:  # bound, but nobody listens: connections are refused
        closed.bind(("127.0.0.1", 0))
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}",
        }
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "models")],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    message, seconds = json.loads(done.stdout)
    assert_names_two_ways_out(message, "vit_small_patch16_224")
    assert not done.stderr
    assert seconds < 30  # timm alone would retry for 47 s
    for name in ("vit_tiny_patch16_224.pt", "same.safetensors"):
        assert_same(read(tmp_path / "models" / name), state)
    assert len(list((tmp_path / "models").iterdir())) == 2
