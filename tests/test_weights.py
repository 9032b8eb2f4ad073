"""Weights in files: pretrained ones, from a cached hub, and other people's checkpoints.

Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import collections
import copy
import gzip
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import tiny_vit
from hypothesis import example, given
from hypothesis import strategies as st

from lib.model.vit import SigmoidViT, UnsupportedModelError
from lib.model.weights import (
    HUB_FILES,
    WeightsError,
    is_cached,
    load_weights,
    pretrained,
    save_pretrained,
    save_weights,
    write_state,
)

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
    [("test_resnet", "ResNet"), ("test_vit2", 'global_pool="avg"')],
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


# ------------------------------------------------------------------------ checkpoints of others

VIT = tiny_vit()
STATE = VIT.state_dict()
TWIN = tiny_vit(seed=1).state_dict()
ELSE = tiny_vit(seed=2)  # what the files are loaded into


def under(prefix: str, state: dict[str, torch.Tensor] = STATE) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


def load(content: object, folder: Path, name: str = "w.pt", vit: torch.nn.Module = ELSE, **how):
    """What became of a content that was saved and loaded: the tensors, and the report."""
    torch.save(content, folder / name, **how)
    return load_file(folder / name, vit)


def load_file(path: Path, vit: torch.nn.Module = ELSE):
    model = SigmoidViT(copy.deepcopy(vit))
    report = load_weights(model, path)
    return model.vit.state_dict(), report


class Settings(dict):
    """As Lightning, yacs and OmegaConf have them: a dict of another class, with attributes."""

    _metadata = None


def settings_of(**values: object) -> Settings:
    settings = Settings(values)
    settings.frozen = True
    return settings


# Good first: what learns, and its average.
TWINS = (
    ("teacher", "student"),
    ("model_ema", "model"),
    ("state_dict_ema", "state_dict"),
    ("target_encoder", "encoder"),
    ("module.momentum_encoder", "module.base_encoder"),
    ("target_network", "online_network"),
    ("averaged_model", "model"),
)
WRAPPERS = ("module", "_orig_mod", "model", "backbone", "encoder", "vit", "net", "visual_encoder")
KEYS = ("state_dict", "model", "model_state_dict", "checkpoint", "module", "net", "0")
SIBLINGS = {
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
    "epoch": 3,
    "arch": "vit_base",
    "history": [1.0, {"loss": 2}],
    "args": argparse.Namespace(lr=1, output=Path("runs")),
    "best": np.float64(0.5),
    "hyper_parameters": settings_of(a=1, b=settings_of(c=Path("x"))),
    "counts": collections.defaultdict(list, a=[1]),
    "dino_head.mlp.0.weight": torch.zeros(2, 2),
}


def nest(content: dict, keys: list[str], siblings: list[str]) -> dict:
    for key in keys:
        content = {**{one: SIBLINGS[one] for one in siblings}, key: content}
    return content


def chunked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As DINOv2 trains: two chunks, the second with the third block."""
    return {
        key.replace("blocks.2.", "blocks.1.2.")
        .replace("blocks.1.n", "blocks.0.1.n")
        .replace("blocks.1.a", "blocks.0.1.a")
        .replace("blocks.1.m", "blocks.0.1.m")
        .replace("blocks.0.n", "blocks.0.0.n")
        .replace("blocks.0.a", "blocks.0.0.a")
        .replace("blocks.0.m", "blocks.0.0.m"): value
        for key, value in state.items()
    }


@given(
    keys=st.lists(st.sampled_from(KEYS), max_size=3),
    wrappers=st.lists(st.sampled_from(WRAPPERS), max_size=3),
    siblings=st.lists(st.sampled_from(list(SIBLINGS)), max_size=4, unique=True),
    twins=st.sampled_from(TWINS) | st.none(),
    flat=st.booleans(),
    last_first=st.booleans(),
    chunks=st.booleans(),
    broken=st.sampled_from([key for key in STATE if key[0] in "bn"]) | st.none(),
)
@example(["model"], ["backbone"], ["args"], TWINS[0], True, True, True, None)  # DINOv2
def test_a_vit_is_found_wherever_it_is(
    keys, wrappers, siblings, twins, flat, last_first, chunks, broken
):
    prefix = "".join(f"{one}." for one in wrappers)
    wanted = {**STATE, broken: STATE[broken][1:]} if broken else STATE
    states = [under(prefix, chunked(one) if chunks else one) for one in (wanted, TWIN)]
    if twins is None:
        content = states[0]
    else:
        pairs = list(zip(twins, states, strict=True))[:: -1 if last_first else 1]
        content = dict(pairs)
        if flat:
            content = {k: v for name, state in pairs for k, v in under(f"{name}.", state).items()}
    content = nest(content, keys, siblings)
    with tempfile.TemporaryDirectory() as folder:
        if broken:
            with pytest.raises(WeightsError, match=rf"w\.pt.* does not fit .*{broken}"):
                load(content, Path(folder))
            return
        found, report = load(content, Path(folder))
    assert_same(found, STATE)
    assert not report.new and not report.resampled
    where = ".".join([*keys[::-1], *twins[:1], *wrappers] if twins else [*keys[::-1], *wrappers])
    assert report.taken == where
    assert len(report.others) == (twins is not None)
    assert not where or f"loaded from {where}" in str(report)


@pytest.mark.parametrize("suffix", [".bin", ".pth.tar", ".CKPT", "", ".safetensors"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "npz"])
def test_the_content_of_a_file_decides_its_kind(kind, suffix, tmp_path):
    path = tmp_path / f"w{suffix}"
    state = {key: value.half() for key, value in under("module.").items()}
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "npz":
        with open(path, "wb") as file:
            names = np.array(["a", "b"])
            np.savez(file, names=names, **{key: value.numpy() for key, value in state.items()})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    found, report = load_file(path)
    assert_same(found, {key: value.half().float() for key, value in STATE.items()})
    assert report.taken == "module"


def test_of_several_vits_one_of_the_models_size_is_taken(tmp_path):
    """Distillation: the teacher is larger."""
    larger = tiny_vit(embed_dim=64).state_dict()
    found, report = load({"teacher": larger, "student": {"model": STATE}}, tmp_path)
    assert_same(found, STATE)
    assert "loaded from student.model, not from teacher" in str(report)


def test_a_wrapper_round_every_block_and_a_recorded_grid_are_seen(tmp_path):
    state = {key.replace("blocks.1.", "blocks.1._orig_mod."): STATE[key] for key in STATE}
    assert_same(load({"_orig_mod.module." + k: v for k, v in state.items()}, tmp_path)[0], STATE)
    wide = tiny_vit("wide")
    save_weights(SigmoidViT(wide), tmp_path / "w.pt")
    inner = torch.load(tmp_path / "w.pt", weights_only=True)
    found, _ = load({"net": inner}, tmp_path, vit=tiny_vit("wide", seed=2))
    assert_same(found, wide.state_dict())


def test_names_that_timm_converts_are_found_below_prefixes(tmp_path):
    registers = tiny_vit("registers")
    state = registers.state_dict()
    original = {key: value for key, value in state.items() if key != "reg_token"}
    original["register_tokens"] = state["reg_token"]
    zero = torch.zeros_like(state["cls_token"])
    original["pos_embed"] = torch.cat([zero, state["pos_embed"]], dim=1)
    original["mask_token"] = zero[0]
    found, report = load(
        {"teacher": under("backbone.", original)}, tmp_path, vit=tiny_vit("registers", seed=2)
    )
    assert_same(found, state)

    clip = tiny_vit(pre_norm=True, classes=0)
    names = {"patch_embed.proj": "conv1", "pos_embed": "positional_embedding", "norm_pre": "ln_pre"}
    names |= {"blocks.": "transformer.resblocks.", "cls_token": "class_embedding"}
    names |= {"attn.proj": "attn.out_proj", "qkv.": "in_proj_", "mlp.fc1": "mlp.c_fc"}
    names |= {"mlp.fc2": "mlp.c_proj", ".norm": ".ln_"}
    original = {"logit_scale": torch.ones(()), "transformer.resblocks.7.ln_1.weight": zero}
    for key, value in clip.state_dict().items():
        key = "ln_post" + key[4:] if key.startswith("norm.") else key
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if key in ("positional_embedding", "class_embedding"):
            value = value.flatten(0, -2).squeeze(0)
        original[f"module.visual.{key}"] = value
    target = tiny_vit(pre_norm=True, classes=0, seed=2)
    found, report = load({"state_dict": original, "epoch": 3}, tmp_path, vit=target)
    assert_same(found, clip.state_dict())
    assert report.taken == "state_dict.module"


def of_jax(vit: torch.nn.Module, siglip: bool = False) -> dict[str, np.ndarray]:
    """The names and shapes of google-research: vision_transformer, or big_vision's SigLIP."""
    heads, arrays = vit.blocks[0].attn.num_heads, {}
    state = {key: value.numpy() for key, value in vit.state_dict().items()}
    arrays["embedding/kernel"] = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    arrays["embedding/bias"] = state["patch_embed.proj.bias"]
    arrays["pos_embedding"] = state["pos_embed"]
    norms = {"norm": "Transformer/encoder_norm"}

    def attend(of: str, ours: str, parts: tuple[str, ...], out: str) -> None:
        for kind, name in (("weight", "kernel"), ("bias", "bias")):
            values = np.split(state[f"{ours}.{kind}"], len(parts))
            for part, value in zip(parts, values, strict=True):
                arrays[f"{of}/{part}/{name}"] = value.T.reshape(*value.T.shape[:-1], heads, -1)
            value = state[f"{out}.{kind}"].T
            value = value.reshape(heads, -1, value.shape[-1]) if kind == "weight" else value
            arrays[f"{of}/out/{name}"] = value

    def project(of: str, ours: str) -> None:
        for dense in (0, 1):
            arrays[f"{of}/Dense_{dense}/kernel"] = state[f"{ours}.fc{dense + 1}.weight"].T
            arrays[f"{of}/Dense_{dense}/bias"] = state[f"{ours}.fc{dense + 1}.bias"]

    attention, mlp, norm = (0, 0, 1) if siglip else (1, 3, 2)
    for index in range(len(vit.blocks)):
        block, ours = f"Transformer/encoderblock_{index}", f"blocks.{index}"
        norms[f"{ours}.norm1"] = f"{block}/LayerNorm_0"
        norms[f"{ours}.norm2"] = f"{block}/LayerNorm_{norm}"
        of = f"{block}/MultiHeadDotProductAttention_{attention}"
        attend(of, f"{ours}.attn.qkv", ("query", "key", "value"), f"{ours}.attn.proj")
        project(f"{block}/MlpBlock_{mlp}", f"{ours}.mlp")
    if siglip:
        arrays["MAPHead_0/probe"] = state["attn_pool.latent"]
        of = "MAPHead_0/MultiHeadDotProductAttention_0"
        attend(of, "attn_pool.q", ("query",), "attn_pool.proj")
        attend(of, "attn_pool.kv", ("key", "value"), "attn_pool.proj")
        project("MAPHead_0/MlpBlock_0", "attn_pool.mlp")
        norms["attn_pool.norm"] = "MAPHead_0/LayerNorm_0"
    else:
        arrays["cls"] = state["cls_token"]
        arrays["Transformer/posembed_input/pos_embedding"] = arrays.pop("pos_embedding")
        arrays["head/kernel"], arrays["head/bias"] = state["head.weight"].T, state["head.bias"]
    for ours, theirs in norms.items():
        arrays[f"{theirs}/scale"] = state[f"{ours}.weight"]
        arrays[f"{theirs}/bias"] = state[f"{ours}.bias"]
    return {f"params/img/{name}": value for name, value in arrays.items()} if siglip else arrays


def test_big_visions_siglip_is_read_and_its_text_tower_is_none_of_it(tmp_path):
    vit = tiny_vit("pooled", classes=0)
    texts = {"params/txt/Encoder_0/encoderblock_7/LayerNorm_0/scale": np.ones(8)}
    texts |= {"params/txt/pos_embedding": np.ones((1, 8, 32))}
    np.savez(tmp_path / "siglip.npz", **texts, **of_jax(vit, siglip=True))
    found, report = load_file(tmp_path / "siglip.npz", tiny_vit("pooled", classes=0, seed=2))
    assert_same(found, vit.state_dict())
    assert not report.new and not report.resampled


def test_original_files_of_jax_are_read_by_timms_own_loader(tmp_path):
    path = tmp_path / "augreg.npz"
    np.savez(path, **of_jax(VIT))
    found, report = load_file(path)
    assert_same(found, STATE)
    assert not report.new and not report.resampled and len(report.loaded) == len(STATE)

    found, report = load_file(path, tiny_vit(seed=2, classes=7, img_size=96))
    assert report.new == ("head.weight", "head.bias") and report.resampled == ("pos_embed",)
    for other, says in (({"depth": 2}, "blocks: 3 in"), ({"embed_dim": 64}, "width: 32 in")):
        with pytest.raises(WeightsError, match=rf"augreg.npz does not fit .*{says} the file"):
            load_file(path, tiny_vit(**other))
    arrays = of_jax(VIT)
    del arrays["Transformer/encoderblock_1/LayerNorm_2/scale"]
    np.savez(path, **arrays)
    with pytest.raises(WeightsError, match=r"does not fit .*encoderblock_1/LayerNorm_2/scale"):
        load_file(path)
    np.savez(path, **{**of_jax(VIT), "cls": np.where(np.arange(32) == 3, np.nan, arrays["cls"])})
    with pytest.raises(WeightsError, match=r"1 of 32 values in cls_token that are NaN"):
        load_file(path)


def changed(**changes: object) -> dict[str, torch.Tensor]:
    return {**STATE, **{key.replace("__", "."): value for key, value in changes.items()}}


def without(*keys: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in STATE.items() if key not in keys}


OTHER = timm.create_model("test_resnet").state_dict()
AVERAGED = {key.replace("norm.", "fc_norm.") if key[0] == "n" else key: STATE[key] for key in STATE}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        # another ViT
        ({"a": tiny_vit(depth=2).state_dict()}, "at a, .* blocks: 2 in the file, 3 in the model"),
        ({"a": tiny_vit(depth=4).state_dict()}, "blocks: 4 in the file, 3 in the model"),
        (tiny_vit(embed_dim=64).state_dict(), "width: 64 in .* 1 x 1 x 64 .* 1 x 1 x 32"),
        (tiny_vit(mlp_ratio=2).state_dict(), "fc1.weight is 64 x 32 in the file, 128 x 32 in"),
        (without("cls_token"), "missing or of another shape: cls_token; use"),
        (
            {**without("pos_embed"), "rope_embed.periods": torch.ones(2)},
            "shape: pos_embed; in the file but not in the model: rope_embed.periods",
        ),
        ({"model": AVERAGED}, "fc_norm stands in place of norm.* average"),
        # no ViT
        (
            timm.create_model("test_resnet").state_dict(),
            r"conv1 \(13 tensors .* and 3 more, and no",
        ),
        ({"v": {"patch_embed.projection.weight": torch.ones(1)}}, "have the names of OpenMMLab"),
        ({"backbone": {"a": torch.ones(1, 2)}, "epoch": 3}, "backbone.a of 1 x 2, epoch, and no"),
        ({"epoch": 3, "model": VIT}, "it holds epoch, model, and no .*; passed over: timm"),
        (torch.ones(3), "holds a Tensor"),
        ({}, "holds a dict"),
        # values
        (changed(norm__bias=STATE["norm.bias"] / 0), r"32 of 32 values in norm.bias that are NaN"),
        ({"a": changed(cls_token=torch.full((1, 1, 32), torch.nan))}, "values in a.cls_token that"),
        (changed(norm__bias=torch.full((32,), 1e300, dtype=torch.double)), "NaN or infinite"),
        (changed(cls_token=torch.ones(1, 1, 32).to(torch.int8)), "cls_token in torch.int8"),
        (changed(cls_token=torch.ones(1, 1, 32, device="meta")), "cls_token without values"),
        (changed(norm__bias=torch.ones(32).to_sparse()), r"norm.bias as torch.sparse_coo; save"),
        # no code is run, whatever stands there
        ({"model": STATE, "queue": collections.deque([1])}, "holds collections.deque beside"),
    ],
)
def test_what_does_not_fit_is_told_by_name(content, says, tmp_path):
    with pytest.raises(WeightsError, match=rf"w\.pt.*{says}") as caught:
        load(content, tmp_path)
    assert "\n" not in str(caught.value)


def saved(content: object, **how: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("model.pth"))
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as zipped:
            zipped.writestr("model.pth", b"")
    elif kind == "npz":
        np.savez(file, a=np.array([{}], dtype=object))
    else:
        np.save(file, np.ones(3))
    return file.getvalue()


WHOLE = saved(STATE)
MIDDLE = len(WHOLE) // 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (WHOLE[:MIDDLE], "its end is missing"),
        (WHOLE[:MIDDLE] + b"??" + WHOLE[MIDDLE + 2 :], "is damaged"),
        (b"PK", "its end is missing"),
        (safetensors.torch.save(STATE)[:5000], "cannot be read as weights .*save it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "web page"),
        (b'{"weight_map": {}}', "JSON, such as the list of a model's parts"),
        (gzip.compress(WHOLE), "compressed archive"),
        (archive("tar"), "archive of tar"),
        (archive("zip"), r"zip archive of model\.pth"),
        (archive("npz"), "Object arrays"),
        (archive("npy"), "single array"),
        (pickle.dumps(STATE), "plain pickle, which is never run"),
        (saved(STATE, pickle_protocol=4), "not pickled as torch.save does it, and is never run"),
        (
            saved({"a": SIBLINGS["args"]}, _use_new_zipfile_serialization=False),
            "holds argparse.Namespace beside tensors, and is never run",
        ),
        (bytes(600), "begins with"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_other_files_are_named_by_their_content(content, says, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"{path} .*{says}") as caught:
        load_file(path)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_folders_parts_and_programs_are_named(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"hub is a folder.*\(model\.safetensors\)"):
        load_file(tmp_path / "hub")
    with pytest.raises(WeightsError, match="one part of several"):
        load(without("norm.weight"), tmp_path, "model-00001-of-00002.bin")
    program = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    program.save(tmp_path / "program.pt")
    with pytest.raises(WeightsError, match=r"TorchScript archive.* never run"):
        load_file(tmp_path / "program.pt")


def test_what_stands_beside_the_tensors_is_told_and_never_made(tmp_path):
    Settings.__setstate__ = lambda self, state: pytest.fail("was made")
    try:
        _, report = load({"model": STATE, **SIBLINGS}, tmp_path)
    finally:
        del Settings.__setstate__
    assert f"{Settings.__module__}.Settings" in report.passed_over
    assert "argparse.Namespace" in str(report)


# ------------------------------------------------------------------------------ pooled by attention


def test_a_pooled_model_comes_from_the_cache_with_its_pooling(hub):
    assert not is_cached("test_vit3")
    state = put_in_cache(hub, "test_vit3")
    model = pretrained("test_vit3")
    assert is_cached("test_vit3") and model.layout.names[-1] == "pool"
    assert_same(model.vit.state_dict(), state)


def test_a_trunk_goes_into_a_pooled_model_whose_pooling_is_new(tmp_path):
    """An attentive probe: the pooling learns on a trunk that was trained with a class token."""
    trunk, probe = SigmoidViT(tiny_vit("plain")), SigmoidViT(tiny_vit("left_out", seed=1))
    save_weights(trunk, tmp_path / "trunk.pt")
    report = load_weights(probe, tmp_path / "trunk.pt")
    assert {name.partition(".")[0] for name in report.new} == {"attn_pool"}
    for name, value in trunk.vit.state_dict().items():
        assert torch.equal(probe.vit.state_dict()[name], value)
    # Half a pooling, or a pooling that the model has not, is another architecture.
    state = probe.vit.state_dict()
    del state["attn_pool.latent"]
    write_state(state, tmp_path / "half.pt")
    for model, file in ((probe, "half.pt"), (trunk, "probe.pt")):
        save_weights(probe, tmp_path / "probe.pt")
        with pytest.raises(WeightsError, match=r"does not fit .*attn_pool\.latent"):
            load_weights(model, tmp_path / file)
