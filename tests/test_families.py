"""Every ViT that timm has: it works and equals timm, or is refused with the reason."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.edit import AttentionEdit
from lib.model.families import FAMILIES, Family, default_pool, family_of, why_refused
from lib.model.vit import SigmoidViT, UnsupportedModelError, create_model

KNOWN = set(timm.list_models())
VITS = [
    name
    for pattern in ("vit_*", "eva*", "deit*", "flexivit_*", "beit*", "aimv2_*", "test_vit*",
                    "samvit_*", "naflexvit_*")
    for name in timm.list_models(pattern)
    if not name.startswith("vitamin")
]  # fmt: skip
CLASSES = 5


def small(name: str, **changes: object) -> nn.Module:
    """What timm builds for a name, of its kind but small; every parameter is lively.

    Zero biases, layer scales of 1e-5 and zero heads would hide what is left out.
    """
    patch = next((int(word[5:]) for word in name.split("_") if word.startswith("patch")), 16)
    sizes = {"img_size": 4 * patch, "depth": 3, "embed_dim": 48, "num_heads": 4}
    if "_mci_" in name:  # its convolutional net has a width of its own
        sizes |= {"embed_dim": 768}
    if "sapiens2" in name:  # keys and values are shared by heads in the middle of large ones
        sizes["num_kv_heads"] = (4, 4 if "base" in name else 2, 4)
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=CLASSES, **default_pool(name) | sizes | changes)
    with torch.no_grad():
        for key, parameter in vit.named_parameters():
            if "backbone" not in key:  # a convolutional net before the blocks; it would explode
                parameter += 0.3 * torch.randn_like(parameter)
    return vit.eval()


def pictures(model: SigmoidViT, count: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *(size or model.vit.patch_embed.img_size), generator=generator)


def assert_close(ours: Tensor, theirs: Tensor, to: float) -> None:
    assert torch.isfinite(theirs).all() and theirs.abs().max() > 1e-3
    assert (ours - theirs).abs().max() <= to * theirs.abs().max().clamp(min=1)


@torch.no_grad()
@pytest.mark.parametrize("name", VITS)
def test_every_vit_of_timm_equals_it_or_is_refused(name):
    family = family_of(name)
    assert family, f"{name} is of no family; give it one in lib/model/families.py"
    if not family.decides or not family.trained:
        try:
            vit = small(name)
        except TypeError:  # its constructor has no such sizes
            reason = why_refused(name)
        else:
            with pytest.raises(UnsupportedModelError) as caught:
                SigmoidViT(vit)
            reason = str(caught.value)
        assert "use a model of a supported family" in reason or "create it with" in reason
        if not family.decides:
            return
    changes = {} if family.trained else {"global_pool": "token"}
    model = SigmoidViT(small(name, **changes))
    images = pictures(model)
    plain = model.vit(images)
    assert_close(model(images), plain, 1e-5)
    model.one_query = False
    assert torch.equal(model(images), plain)
    positions = [word for word, there in (
        ("learned", model.vit.pos_embed is not None),
        ("rotary", getattr(model.vit, "rope", None) is not None),
    ) if there]  # fmt: skip
    assert ", ".join(positions) == family.positions
    assert model.num_prefix in family.prefix
    assert model.layout.pooled == (family.decides == "pooling row")
    assert (model.num_read == 2) == (family.decides == "class and distillation rows")
