"""Checkpoints of transformers, torchvision and open_clip: the same weights give the same scores.

transformers and open_clip are the extra `others`; without them their names, in tests/others.txt,
stand for them.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lib.model.vit import SigmoidViT
from lib.model.weights import LoadReport, WeightsError, load_weights

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


def skip_where_timm_lacks(name: str) -> None:
    """Older timm, down to what pyproject allows, has fewer models."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")


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
        skip_where_timm_lacks(self.twin)
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


def lively(vit: nn.Module) -> nn.Module:
    for parameter in vit.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, std=0.3)
    return vit.eval()


def theirs(kind: Kind) -> nn.Module:
    torch.manual_seed(0)
    return lively(kind.make(installed(kind.library)))


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
    if which and int(library.__version__.partition(".")[0]) < 5:
        pytest.skip(
            "the lists are of transformers 5; what it saves, 4 has nearly the same names for"
        )
    state = in_files(theirs(KINDS[name]), KINDS[name].library, tmp_path)[which or "in memory"]
    assert {key: tuple(value.shape) for key, value in state.items()} == listed()[form]


def random_state(form: str) -> dict[str, Tensor]:
    """Tensors in the names of a list."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in listed()[form].items()}


VIT_FILE = random_state("vit | saved")


@given(
    above=st.lists(st.sampled_from(["state_dict", "module", "model", "net", "0"]), max_size=3),
    wrappers=st.lists(st.sampled_from(["module.", "_orig_mod.", "backbone."]), max_size=2),
    student=st.booleans(),
    bare=st.booleans(),
)
def test_their_names_are_found_wherever_they_are(above, wrappers, student, bare):
    prefix, kind = "".join(wrappers), KINDS["vit without a head" if bare else "vit"]
    state = {prefix + (k.removeprefix("vit.") if bare else k): v for k, v in VIT_FILE.items()}
    content: dict = {"epoch": 1, **({"teacher": state} if student else state)}
    if student:
        content["student"] = {name: value + 1 for name, value in state.items()}
    for key in above:
        content = {key: content}
    with tempfile.TemporaryDirectory() as folder:
        model, report = loaded(content, kind.vit(), Path(folder))
    own = model.vit.state_dict()
    assert torch.equal(own["cls_token"], VIT_FILE["vit.embeddings.cls_token"])
    assert bare or torch.equal(own["head.weight"], VIT_FILE["classifier.weight"])
    where = [*above[::-1], *(["teacher"] if student else []), *(one[:-1] for one in wrappers)]
    assert report.taken == ".".join([*where, *([] if bare else ["vit"])])


def test_other_grids_and_what_is_computed_otherwise_are_told(tmp_path):
    vit = KINDS["vit"].vit(img_size=96)
    _, report = loaded(VIT_FILE, vit, tmp_path)
    assert report.resampled == ("pos_embed",)
    assert "epsilon of such weights is 1e-12" in str(report) and "norm_eps=1e-12" in str(report)
    _, report = loaded(
        VIT_FILE, KINDS["vit"].vit(norm_layer=partial(nn.LayerNorm, eps=1e-12)), tmp_path
    )
    assert not report.beware
    for form, name in (("siglip | saved", "gelu_tanh"), ("clip | saved", "quick_gelu")):
        kind, state = KINDS[form.partition(" ")[0]], random_state(form)
        assert not loaded(state, kind.vit(), tmp_path)[1].beware
        (said,) = loaded(state, kind.vit(act_layer="gelu"), tmp_path)[1].beware
        assert f'act_layer="{name}"' in said
    assert not loaded(random_state("dinov3 | saved"), KINDS["dinov3"].vit(), tmp_path)[1].beware
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn\.q_bias, .*; use .* with _qkvb"):
        loaded(random_state("dinov3 with biases | saved"), KINDS["dinov3"].vit(), tmp_path)


def test_a_classifier_of_something_else_is_not_the_head(tmp_path):
    """CLIP's and SigLIP's is of the patches' average; DINOv2's is of twice the width."""
    head = {"classifier.weight": torch.ones(CLASSES, WIDTH), "classifier.bias": torch.ones(CLASSES)}
    clip = random_state("clip | saved")
    del clip["visual_projection.weight"]
    model, report = loaded(clip | head, KINDS["clip"].vit(**LABELS), tmp_path)
    assert report.new == ("head.weight", "head.bias")
    assert report.unused == ("classifier.weight", "classifier.bias")
    state = {f"dinov2.{k}": v for k, v in random_state("dinov2 | saved").items()}
    head["classifier.weight"] = torch.ones(CLASSES, 2 * WIDTH)
    model, report = loaded(state | head, KINDS["dinov2"].vit(**LABELS), tmp_path)
    assert report.new == ("head.weight", "head.bias") and not model.vit.head.bias.any()
    assert "of another shape in the file: head.weight" in str(report)


# ------------------------------------------------------------------ Eva, which timm converts itself


def as_meta(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's DINOv3 in the names of Meta's checkpoints."""
    found = {"rope_embed.periods": torch.ones(2), "mask_token": torch.zeros(1, WIDTH)}
    for name, value in state.items():
        name = re.sub(r"gamma_(\d)", r"ls\1.gamma", name).replace("reg_token", "storage_tokens")
        if name.endswith("attn.q_bias"):
            bias = name.replace("q_bias", "qkv.bias")
            values = state[name.replace("q_bias", "v_bias")]
            found[bias] = torch.cat([value, torch.full_like(value, torch.nan), values])
            found[bias + "_mask"] = torch.cat(
                [torch.ones(WIDTH), torch.zeros(WIDTH), torch.ones(WIDTH)]
            )
        elif not name.endswith("attn.v_bias"):
            found[name] = value
    return found


@torch.no_grad()
def test_metas_dinov3_is_converted_by_timm_but_for_biases_that_would_be_lost(tmp_path, capfd):
    with_biases, plain = KINDS["dinov3 with biases"], KINDS["dinov3"]
    vit = lively(with_biases.vit())
    model, report = loaded(as_meta(vit.state_dict()), with_biases.vit(), tmp_path)
    images = torch.randn(2, 3, 64, 64)
    assert_close(model(images), vit(images))
    assert not report.new and not report.unused
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn\.qkv\.bias.*; use .* with _qkvb"):
        loaded(as_meta(vit.state_dict()), plain.vit(), tmp_path)
    for name, value in vit.state_dict().items():
        if name.endswith(("q_bias", "v_bias")):
            value.zero_()
    model, _ = loaded(as_meta(vit.state_dict()), plain.vit(), tmp_path)
    assert_close(model(images), vit(images))
    assert not capfd.readouterr().out  # timm would print an error


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_small_patch16_dinov3", TOKEN),
        ("vit_small_patch16_rope_mixed_224", {}),
        ("eva02_tiny_patch14_224", TOKEN | {"ref_feat_shape": (4, 4)}),
        ("vit_pe_core_tiny_patch16_384", {}),
    ],
)
def test_files_of_eva_keep_their_norm_whatever_was_cached_beside(name, changes, tmp_path):
    skip_where_timm_lacks(name)
    vit = lively(timm.create_model(name, **{**TINY, **LABELS, **changes}))
    cached = {"rope.periods": torch.ones(2), "rope.pos_embed_cached": torch.ones(16, 4)}
    cached |= {"mask_token": torch.zeros(1, 1, WIDTH)}
    twin = timm.create_model(name, **{**TINY, **LABELS, **changes})
    model, report = loaded({"model": vit.state_dict() | cached}, twin, tmp_path)
    assert not report.new and not report.unused
    assert all(torch.equal(model.vit.state_dict()[k], v) for k, v in vit.state_dict().items())
