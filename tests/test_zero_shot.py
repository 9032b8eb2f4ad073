"""Text embeddings of the classes' names as a head: the scores of open_clip and transformers."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import tiny_vit
from test_weights_others import (
    TEXTS,
    TINY,
    TOWER,
    WIDE,
    WIDTH,
    assert_close,
    installed,
    lively,
    timm_tower,
)
from torch import Tensor, nn

from lib import AttentionEdit, create_model, load_weights, zero_shot
from lib.cli.data import _about_zero_shot
from lib.config import preset
from lib.data.dataset import read_records
from lib.model.live import LiveImage
from lib.model.vit import SigmoidViT
from lib.model.weights import save_weights
from lib.model.zero_shot import TextEmbeddings, ZeroShotHead, read_embeddings
from lib.training.runs import RunConflict, bare_model, fine_tuning, starting_point, train_run

NAMES = ("auk", "gull", "tern", "wren", "finch")
TOKENS = {"low": 1, "high": 49, "size": (len(NAMES), TEXTS["context_length"])}


def towers_of_open_clip(library: object, siglip: bool) -> nn.Module:
    if siglip:
        return timm_tower("vit_base_patch16_siglip_224", "none", "map", WIDTH)(library)
    return library.CLIP(8, TOWER, TEXTS)


def towers_of_transformers(library: object, siglip: bool) -> nn.Module:
    texts = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    texts |= {"intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 8}
    texts |= {"eos_token_id": 49, "bos_token_id": 1, "pad_token_id": 0}
    if siglip:
        config = library.SiglipConfig(vision_config=WIDE, text_config=texts)
        return library.SiglipModel(config)
    config = library.CLIPConfig(vision_config=WIDE, text_config=texts, projection_dim=8)
    return library.CLIPModel(config)


TOWERS = {"open_clip": towers_of_open_clip, "transformers": towers_of_transformers}


@pytest.mark.parametrize("siglip", [False, True], ids=["clip", "siglip"])
@pytest.mark.parametrize("library", TOWERS)
@torch.no_grad()
def test_the_scores_are_those_of_both_towers_and_an_edit_changes_them(library, siglip, tmp_path):
    torch.manual_seed(0)
    towers = lively(TOWERS[library](installed(library), siglip))
    towers.logit_scale.fill_(math.log(30))
    if siglip:
        towers.logit_bias.fill_(-7)
    images, tokens = torch.randn(2, 3, 64, 64), torch.randint(**TOKENS)
    if library == "open_clip":
        expected, text = towers.get_logits(images, tokens)[0], towers.encode_text(tokens)
    else:
        out = towers(input_ids=tokens, pixel_values=images)
        expected, text = out.logits_per_image, out.text_embeds
    torch.save(towers.state_dict(), tmp_path / "towers.pt")

    act = {"open_clip": "gelu", "transformers": "gelu_tanh" if siglip else "quick_gelu"}[library]
    twin = "vit_base_patch16_siglip_224" if siglip else "vit_base_patch16_clip_224"
    sizes = {key: value for key, value in TINY.items() if key != "img_size"} | {"act_layer": act}
    model = create_model(twin, 0 if siglip else 8, (64, 64), **sizes).eval()
    assert not load_weights(model, tmp_path / "towers.pt").new
    bias = towers.logit_bias if siglip else None
    zero_shot(model, text, NAMES, towers.logit_scale, bias)
    assert_close(model(images), expected)
    assert model.classes == list(NAMES) and model.vit.num_classes == len(NAMES)

    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = True
    edit = AttentionEdit(mask, torch.full((4, 4), 0.9))
    edited = model(images, edit=edit)
    assert (edited - expected).abs().max() > 1e-3 * expected.abs().max()
    live = LiveImage(model, images[0])
    assert_close(live.scores, expected[0])
    assert_close(live.run(edit)[0], edited[0])

    save_weights(model, tmp_path / "zero_shot.safetensors")
    again = create_model(twin, len(NAMES), (64, 64), **sizes).eval()
    report = load_weights(again, tmp_path / "zero_shot.safetensors")
    assert not report.new and not report.unused
    assert torch.equal(again(images), model(images))


def with_projection(classes: int = 8) -> SigmoidViT:
    return SigmoidViT(tiny_vit(classes=classes))


def test_scores_are_scaled_cosines_and_the_head_learns_as_any_other():
    model, images = with_projection(), torch.randn(3, 3, 64, 64)
    features, text = model(images).detach(), torch.randn(5, 8) * 3
    zero_shot(model, text.numpy(), logit_scale=2.0, logit_bias=-1.0)
    expected = math.exp(2) * F.cosine_similarity(features[:, None], text[None], dim=-1) - 1
    assert_close(model(images).detach(), expected)
    assert model.classes is None
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.vit.head.parameters())
    zero_shot(model, text[:2], NAMES[:2])  # other classes
    assert_close(model(images).detach(), 100 * (expected[:, :2] + 1) / math.exp(2))
    model.vit.reset_classifier(4)  # an own head again
    assert model(images).shape == (3, 4)


def test_a_saved_head_stays_out_of_models_of_other_classes(tmp_path):
    model = with_projection()
    zero_shot(model, torch.randn(5, 8))
    save_weights(model, tmp_path / "w.pt")
    for classes, new in ((3, ("head.weight", "head.bias")), (0, ())):
        other = with_projection(classes)
        report = load_weights(other, tmp_path / "w.pt")
        assert report.new == new and "head.classifier.weight" in report.unused
        assert other(torch.randn(1, 3, 64, 64)).shape == (1, classes or 32)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_embeddings_are_read_from_files(suffix, tmp_path):
    matrix, path = torch.randn(5, 8), tmp_path / f"classes{suffix}"
    if suffix == ".npy":
        np.save(path, matrix.numpy())
    elif suffix == ".npz":
        np.savez(path, embeddings=matrix.double(), names=NAMES, logit_scale=3.0, logit_bias=-2)
    else:
        tensors = {"embeddings": matrix, "logit_scale": torch.tensor(3.0)}
        tensors["logit_bias"] = torch.tensor([-2.0])
        safetensors.torch.save_file(tensors, path, {"names": json.dumps(NAMES)})
    found = read_embeddings(path)
    assert torch.equal(found.embeddings, matrix)
    told = (None, math.log(100), 0.0) if suffix == ".npy" else (NAMES, 3.0, -2.0)
    assert (found.names, found.logit_scale, found.logit_bias) == told
    model = with_projection()
    zero_shot(model, path, logit_bias=4.0)
    assert model.vit.head.classifier.bias.eq(4).all()


def test_a_data_set_takes_its_classes_in_its_order():
    text = TextEmbeddings(torch.eye(5), NAMES)
    assert text.of(["wren", "auk"]).embeddings.argmax(dim=1).tolist() == [3, 0]
    with pytest.raises(ValueError, match=r"no text embedding for dodo; there are those of auk, "):
        text.of(["auk", "dodo"])
    assert TextEmbeddings(torch.eye(2)).of(["b", "a"]).names == ("b", "a")
    with pytest.raises(ValueError, match="5 text embeddings have 2 names"):
        TextEmbeddings(torch.eye(5)).of(["b", "a"])


def spoiled(value: float) -> Tensor:
    matrix = torch.ones(5, 8)
    matrix[3] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "how", "says"),
    [
        (torch.ones(5, 7), {}, r"7 numbers wide, the model's images 8; .*num_classes=7\) where"),
        (torch.ones(8), {}, r"text embeddings are \(8,\); give a matrix"),
        (torch.ones(0, 8), {}, r"are \(0, 8\)"),
        (torch.ones(5, 8), {"names": NAMES[:4]}, "5 text embeddings have 4 names"),
        (spoiled(math.nan), {}, "text embedding 3 has values that are NaN"),
        (spoiled(math.inf), {"names": NAMES}, r"embedding 3 \(wren\) has values"),
        (spoiled(0), {}, "text embedding 3 is all zeros"),
        (torch.ones(5, 8), {"logit_scale": math.nan}, "logit_scale is nan"),
        (torch.ones(5, 8), {"logit_scale": 100}, "logit_scale is 100, .* scale before exp"),
        (torch.ones(5, 8), {"logit_bias": -math.inf}, "logit_bias -inf"),
    ],
)
def test_what_cannot_be_a_head_is_told_and_changes_nothing(matrix, how, says):
    model = with_projection()
    before = model.vit.head
    with pytest.raises(ValueError, match=says) as caught:
        zero_shot(model, matrix, **how)
    assert model.vit.head is before and model.vit.num_classes == 8
    assert "\n" not in str(caught.value)


def test_other_files_are_refused_by_name(tmp_path):
    def refused(name: str, says: str) -> None:
        with pytest.raises(ValueError, match=says) as caught:
            read_embeddings(tmp_path / name)
        assert name in str(caught.value)

    with pytest.raises(FileNotFoundError, match=r"no text embeddings at .*a\.npz"):
        read_embeddings(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", text=np.ones((5, 8)))
    refused("a.npz", "has text, but no embeddings")
    np.savez(tmp_path / "a.npz", embeddings=np.ones((5, 8)), names=["x"])
    refused("a.npz", "5 text embeddings have 1 names")
    np.savez(tmp_path / "a.npz", embeddings=np.array([{}], dtype=object))
    refused("a.npz", "cannot be read as text embeddings")
    for name in ("a.npy", "a.safetensors", "a.npz", "a.csv"):
        Path(tmp_path / name).write_bytes(b"nothing of the kind")
        refused(name, "cannot be read as text embeddings")


def test_a_run_starts_from_a_zero_shot_head_and_keeps_it(config, tmp_path, capfd):
    """SigLIP's way: the trunk has no projection. Rows are in another order than the classes."""
    trunk = bare_model(fine_tuning(config, 0), num_classes=0)
    save_weights(trunk, tmp_path / "trunk.safetensors")
    classes = read_records(config.data, "train")[1][::-1]
    matrix = torch.randn(len(classes), trunk.vit.num_features)
    np.savez(tmp_path / "texts.npz", embeddings=matrix, names=classes)
    config.model = replace(
        config.model, weights=tmp_path / "trunk.safetensors", zero_shot=tmp_path / "texts.npz"
    )
    config.ft = replace(config.ft, epochs=1)
    run_config = fine_tuning(config, 0)
    model, train_set = starting_point(run_config, config.runs)
    assert "; the head is made of texts.npz" in capfd.readouterr().out
    assert model.classes == train_set.classes == classes[::-1]
    twin = SigmoidViT(copy.deepcopy(trunk.vit))
    zero_shot(twin, matrix.flip(0))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), twin.eval()(images))

    run = train_run("zero", run_config, config.runs)
    assert isinstance(run.model().vit.head, ZeroShotHead)
    assert torch.equal(
        train_run("zero", run_config, config.runs).model()(images), run.model()(images)
    )
    assert not torch.equal(run.model()(images), twin(images))
    np.savez(tmp_path / "texts.npz", embeddings=matrix + 1, names=classes)
    with pytest.raises(RunConflict, match="started from other weights"):
        train_run("zero", run_config, config.runs)


def test_zero_shot_in_the_environment_is_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("ZERO_SHOT", str(tmp_path / "texts.npz"))
    with pytest.raises(FileNotFoundError, match=r"texts\.npz is missing; set ZERO_SHOT to a \.npz"):
        preset("folder")
    (tmp_path / "texts.npz").write_bytes(b"")
    assert preset("folder").model.zero_shot == tmp_path / "texts.npz"


def test_check_finds_what_would_stop_a_run_with_these_embeddings(config, tmp_path):
    path, classes = tmp_path / "texts.npz", read_records(config.data, "train")[1]
    trunk = bare_model(fine_tuning(config, 0), num_classes=0)
    save_weights(trunk, tmp_path / "trunk.pt")
    config.model = replace(config.model, weights=tmp_path / "trunk.pt", zero_shot=path)
    width = trunk.vit.num_features
    for matrix, names, says in (
        (np.full((len(classes), width), np.nan), classes, "text embedding 0 .* NaN"),
        (np.ones((len(classes), width + 1)), classes, f"{width + 1} numbers wide"),
        (np.ones((1, width)), classes[:1], f"no text embedding for {classes[1]}"),
    ):
        np.savez(path, embeddings=matrix, names=names)
        (finding,) = _about_zero_shot(config)
        assert re.search(says, str(finding)) and finding.problem == "path: cannot be used"
        with pytest.raises(ValueError, match=says):
            starting_point(fine_tuning(config, 0), config.runs)
    np.savez(path, embeddings=np.ones((len(classes), width)), names=classes)
    assert not [*_about_zero_shot(config)]


def test_a_model_with_two_heads_is_refused():
    sizes = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    model = create_model("deit_tiny_distilled_patch16_224", 8, (32, 32), **sizes)
    with pytest.raises(ValueError, match="averages two classifiers, and text embeddings are one"):
        zero_shot(model, torch.ones(5, 8))
