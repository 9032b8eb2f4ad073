"""Checkpoints of transformers, torchvision and open_clip: the same weights give the same scores.

transformers and open_clip are the extra `others`; without them their names, in tests/others.txt,
stand for them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from lib.model.vit import SigmoidViT
from lib.model.weights import LoadReport, load_weights

NAMES = Path(__file__).parent / "others.txt"
WIDTH, CLASSES = 32, 5
TINY = {"depth": 2, "embed_dim": WIDTH, "num_heads": 4, "img_size": 64, "patch_size": 16}
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"image_size": 64, "patch_size": 16}
WIDE = SIZES | {"intermediate_size": 4 * WIDTH}
TOWER = {"image_size": 64, "layers": 2, "width": WIDTH, "head_width": 8, "patch_size": 16}
TEXTS = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}


def installed(library: str) -> object:
    reason = f"{library} is not installed: pip install -e '.[others]'"
    if os.environ.get("REQUIRE_OTHERS"):
        return __import__(library)
    return pytest.importorskip(library, reason=reason)


@dataclass
class Kind:
    """A model of another library, and timm's twin."""

    library: str
    make: Callable[[object], nn.Module]  # from the library
    features: Callable[[nn.Module, Tensor], Tensor]  # what timm's model gives
    twin: str  # of timm
    changes: dict[str, object] = field(default_factory=dict)
    unused: str = "$^"  # pattern of what the twin has no place for

    def vit(self, **more: object) -> nn.Module:
        torch.manual_seed(1)
        return timm.create_model(self.twin, **{**TINY, "num_classes": 0, **self.changes, **more})


def hugging(kind: str, config: str, sizes: dict[str, object], features, twin: str, **how) -> Kind:
    """A class of transformers with a configuration of so many sizes."""

    def make(library: object) -> nn.Module:
        return getattr(library, kind)(getattr(library, config)(**sizes))

    return Kind("transformers", make, features, twin, **how)


def scores(model: nn.Module, images: Tensor) -> Tensor:
    return model(pixel_values=images).logits


def class_token(model: nn.Module, images: Tensor) -> Tensor:
    return model(pixel_values=images).last_hidden_state[:, 0]


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    return model(pixel_values=images).pooler_output


def embedded(model: nn.Module, images: Tensor) -> Tensor:
    return model(pixel_values=images).image_embeds


def encoded(model: nn.Module, images: Tensor) -> Tensor:
    return model.encode_image(images)


def as_patches(model: nn.Module, images: Tensor) -> Tensor:
    """SigLIP2 of variable size takes patches: rows, columns, colours."""
    count, side = len(images), images.shape[-1] // 16
    patches = images.unflatten(3, (side, 16)).unflatten(2, (side, 16))  # B 3 rows 16 columns 16
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    mask = torch.ones(count, side**2, dtype=torch.long)
    shapes = torch.tensor([[side, side]] * count)
    given = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return model(**given).pooler_output


def timm_tower(twin: str, proj: str, pool: str, width: int) -> Callable[[object], nn.Module]:
    """A CLIP of open_clip around a tiny tower of timm, which open_clip knows by its name alone."""

    def make(library: object) -> nn.Module:
        name = "tiny_" + twin
        if not timm.is_model(name):

            def entry(pretrained: bool = False, **how: object) -> nn.Module:
                return timm.create_model(twin, **TINY, **how)

            entry.__name__ = name
            timm.models.register_model(entry)
        tower = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": 64}
        return library.CustomTextCLIP(width, tower, TEXTS, init_logit_bias=-10.0)

    return make


LABELS = {"num_classes": CLASSES}
PROJECTED = {"num_classes": 8}
TOKEN = {"global_pool": "token"}
GATED = WIDE | {"use_gated_mlp": True, "hidden_act": "silu"}
V3 = {"num_register_tokens": 4, "query_bias": False, "value_bias": False}
NAFLEX = {name: value for name, value in WIDE.items() if name != "image_size"} | {"num_patches": 16}
KINDS = {
    "vit": hugging(
        *("ViTForImageClassification", "ViTConfig", WIDE | {"num_labels": CLASSES}),
        *(scores, "vit_tiny_patch16_224"),
        changes=LABELS,
    ),
    "vit without a head": hugging(
        *("ViTModel", "ViTConfig", WIDE, class_token, "vit_tiny_patch16_224"), unused="pooler"
    ),
    "deit": hugging(
        *("DeiTForImageClassificationWithTeacher", "DeiTConfig", WIDE | {"num_labels": CLASSES}),
        *(scores, "deit_tiny_distilled_patch16_224"),
        changes=LABELS,
    ),
    "dinov2": hugging(
        *("Dinov2Model", "Dinov2Config", SIZES, class_token, "vit_small_patch14_dinov2")
    ),
    "dinov2 giant": hugging(
        *("Dinov2Model", "Dinov2Config", SIZES | {"use_swiglu_ffn": True}, class_token),
        "vit_giant_patch14_dinov2",
        changes={"mlp_ratio": 2 * 88 / WIDTH},
    ),
    "dinov2 with registers": hugging(
        *("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SIZES, class_token),
        "vit_small_patch14_reg4_dinov2",
    ),
    "dinov3": hugging(
        *("DINOv3ViTModel", "DINOv3ViTConfig", WIDE | V3, class_token),
        "vit_small_patch16_dinov3",
        changes=TOKEN,
    ),
    "dinov3 with biases": hugging(
        *("DINOv3ViTModel", "DINOv3ViTConfig", WIDE | {"num_register_tokens": 4}, class_token),
        "vit_small_patch16_dinov3_qkvb",
        changes=TOKEN,
    ),
    "dinov3 plus": hugging(
        *("DINOv3ViTModel", "DINOv3ViTConfig", GATED | V3, class_token),
        "vit_small_plus_patch16_dinov3",
        changes=TOKEN | {"mlp_ratio": 4},
    ),
    "clip": hugging(
        *("CLIPVisionModelWithProjection", "CLIPVisionConfig", WIDE | {"projection_dim": 8}),
        *(embedded, "vit_base_patch16_clip_quickgelu_224"),
        changes=PROJECTED,
    ),
    "siglip": hugging(
        *("SiglipVisionModel", "SiglipVisionConfig", WIDE, pooled, "vit_base_patch16_siglip_224"),
        changes={"act_layer": "gelu_tanh"},
    ),
    "siglip2 of variable size": hugging(
        *("Siglip2VisionModel", "Siglip2VisionConfig", NAFLEX, as_patches),
        "vit_base_patch16_siglip_224",
        changes={"act_layer": "gelu_tanh"},
    ),
    "torchvision": Kind(
        "torchvision",
        lambda library: library.models.VisionTransformer(
            64, 16, 2, 4, WIDTH, 4 * WIDTH, num_classes=CLASSES
        ),
        lambda model, images: model(images),
        "vit_tiny_patch16_224",
        LABELS,
    ),
    "open_clip": Kind(
        "open_clip",
        lambda library: library.CLIP(8, TOWER, TEXTS),
        *(encoded, "vit_base_patch16_clip_224", PROJECTED),
    ),
    "open_clip, custom text": Kind(
        "open_clip",
        lambda library: library.CustomTextCLIP(8, TOWER, TEXTS, quick_gelu=True),
        *(encoded, "vit_base_patch16_clip_quickgelu_224", PROJECTED),
    ),
    "open_clip, tower alone": Kind(
        "open_clip",
        lambda library: library.CLIP(8, TOWER, TEXTS).visual,
        *(lambda model, images: model(images), "vit_base_patch16_clip_224", PROJECTED),
    ),
    "open_clip, siglip": Kind(
        "open_clip",
        timm_tower("vit_base_patch16_siglip_224", "none", "map", WIDTH),
        *(encoded, "vit_base_patch16_siglip_224"),
    ),
    "open_clip, projected timm": Kind(
        "open_clip",
        timm_tower("vit_tiny_patch16_224", "linear", "token", 8),
        *(encoded, "vit_tiny_patch16_224", PROJECTED),
    ),
    "open_clip, eva": Kind(
        "open_clip",
        timm_tower("eva02_base_patch16_clip_224", "", "token", 8),
        *(encoded, "eva02_base_patch16_clip_224", PROJECTED),
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def theirs(kind: Kind) -> nn.Module:
    torch.manual_seed(0)
    model = kind.make(installed(kind.library)).eval()
    for parameter in model.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, std=0.3)
    return model


def loaded(state: dict[str, Tensor], vit: nn.Module, folder: Path) -> tuple[SigmoidViT, LoadReport]:
    torch.save(state, folder / "w.pt")
    model = SigmoidViT(vit.eval())
    return model, load_weights(model, folder / "w.pt")


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def in_files(other: nn.Module, library: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """State dicts as people have them; transformers saves other names than it holds."""
    if library != "transformers":
        return {"in memory": other.state_dict()}
    other.save_pretrained(folder)
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    return {"saved": saved, "in memory": other.state_dict()}


@every_kind
@torch.no_grad()
def test_the_same_weights_give_the_same_scores(kind, tmp_path):
    kind = KINDS[kind]
    other, images = theirs(kind), torch.randn(2, 3, 64, 64)
    expected = kind.features(other, images)
    for state in in_files(other, kind.library, tmp_path).values():
        model, report = loaded({"epoch": 1, "net": state}, kind.vit(), tmp_path)
        assert_close(model(images), expected)
        assert_whole(report, kind)


def assert_whole(report: LoadReport, kind: Kind) -> None:
    assert not report.new and all(re.match(kind.unused, name) for name in report.unused)
    whose = {"transformers": "Hugging Face transformers"}.get(kind.library, kind.library)
    assert report.whose == whose and f" in the names of {whose}" in str(report)


def listed() -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes by kind and form; of two blocks the first is listed."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in NAMES.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            names = found.setdefault(line[2:], {})
            continue
        name, _, shape = line.partition(" ")
        shape = tuple(map(int, shape.split("x"))) if shape else ()
        names[name] = shape
        names[FIRST.sub(r"\g<1>1.", name)] = shape
    return found


FIRST = re.compile(r"(layers?\.|blocks\.|resblocks\.)0\.")


@pytest.mark.parametrize("form", listed())
def test_names_of_the_real_library_are_all_known(form, tmp_path):
    kind, names = KINDS[form.partition(" | ")[0]], listed()[form]
    state = {name: torch.randn(shape) for name, shape in names.items()}
    model, report = loaded(state, kind.vit(), tmp_path)
    assert_whole(report, kind)
    own = model.vit.state_dict()
    if "blocks.0.attn.qkv.weight" in own and kind.library == "transformers":
        parts = [
            value
            for part in ("q", "k", "v")
            for name, value in state.items()
            if FIRST.search(name) and re.search(rf"\.{part}(_proj|uery|ey|alue)\.weight", name)
        ]
        assert torch.equal(own["blocks.0.attn.qkv.weight"], torch.cat(parts))


@pytest.mark.parametrize("form", listed())
def test_the_lists_are_those_of_the_library(form, tmp_path):
    name, _, which = form.partition(" | ")
    library = installed(KINDS[name].library)
    if which == "in memory" and int(library.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers 4 holds what it saves")
    state = in_files(theirs(KINDS[name]), KINDS[name].library, tmp_path)[which or "in memory"]
    assert {key: tuple(value.shape) for key, value in state.items()} == listed()[form]
