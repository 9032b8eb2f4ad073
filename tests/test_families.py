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


WORKING = [family for family in FAMILIES if family.decides]
each_family = pytest.mark.parametrize("family", WORKING, ids=lambda family: family.title)
# Of what is as timm makes it: its own square grid; a wide one; another resolution than its own.
SIZES = {"square": (4, 4), "wide": (3, 5), "other": (5, 3)}


def example_of(family: Family, dtype: torch.dtype, size: str) -> tuple[SigmoidViT, Tensor]:
    """A small model of the family, and two pictures."""
    name = family.example
    if name.partition(".")[0] not in KNOWN:
        pytest.skip(f"timm {timm.__version__} has no {name}")
    changes = {} if family.trained else {"global_pool": "token"}
    patch = small(name, **changes).patch_embed.feat_ratio()
    rows, columns = SIZES[size]
    height, width = rows * patch, columns * patch
    if size == "other":
        changes |= {"dynamic_img_size": True}
    else:
        changes |= {"img_size": (height, width)}
    model = SigmoidViT(small(name, **changes)).to(dtype)
    return model, pictures(model, size=(height, width)).to(dtype)


Change = Callable[[int, Tensor], Tensor]


def written_out(
    vit: nn.Module, images: Tensor, change: Change = lambda _, logits: logits
) -> tuple[Tensor, list[Tensor]]:
    """timm's own forward pass, each attention in it computed here, with its logits changed.

    Returns:
        scores; the logits of every block, in order, before the change.
    """
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        assert not any(value for key, value in options.items() if key != "enable_gqa")
        shared = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(shared, dim=1) for part in (k, v))
        seen.append(q.float() @ k.float().transpose(-2, -1) / q.shape[-1] ** 0.5)
        shares = torch.softmax(change(len(seen) - 1, seen[-1]), dim=-1)
        return shares.to(v.dtype) @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        return vit(images), seen


@torch.no_grad()
@each_family
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_are_those_of_timms_attention(family, size, dtype):
    model, images = example_of(family, dtype, size)
    near = 1e-5 if dtype is torch.float32 else 20 * torch.finfo(dtype).eps
    plain, seen = written_out(model.vit, images)
    scores, rows = model(images, rows="all")
    assert_close(scores, plain, near)
    assert len(seen) == model.depth and set(rows) == set(model.layout.read)
    grid = model.grid_of(images)
    for block, row in rows.items():
        theirs = seen[block][:, :, 0]
        hidden = row.shape[-1] - theirs.shape[-1]  # prefix tokens that a pooling leaves out
        assert row.shape[-1] == model.num_prefix + grid[0] * grid[1]
        assert hidden in (0, model.num_prefix) and (row[..., :hidden] < -1e3).all()
        assert_close(row[..., hidden:], theirs, near)


@torch.no_grad()
@each_family
@pytest.mark.parametrize("size", ["wide", "other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("queries", ["cls", "all"])
def test_edits_are_what_timm_gives_with_edited_logits(family, size, dtype, queries):
    model, images = example_of(family, dtype, size)
    grid = model.grid_of(images)
    patches = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(patches, generator=generator) < 0.4
    values = 0.02 + 0.96 * torch.rand(patches, generator=generator)
    wanted = torch.log(values / (1 - values))
    near = 1e-5 if dtype is torch.float32 else 20 * torch.finfo(dtype).eps
    plain = model(images)
    for blocks in ("last", "last2", "all", *(["pool"] if model.layout.pooled else [])):
        edited = {"last": 1, "pool": 1, "last2": 2, "all": model.depth}[blocks]
        edited = range(model.depth - edited, model.depth)

        def change(block: int, logits: Tensor, edited: range = edited) -> Tensor:
            rows = logits.shape[2] if queries == "all" else family_rows(model, block)
            if block not in edited or not rows:
                return logits
            logits = logits.clone()
            cells = logits[:, :, :rows, -patches:]
            cells.copy_(torch.where(mask, wanted, cells))
            return logits

        theirs, _ = written_out(model.vit, images, change)
        edit = AttentionEdit(mask, values, blocks=blocks, queries=queries)
        if dtype is torch.float32:  # the edit does something
            assert (theirs - plain).abs().max() > 100 * near
        for one_query in (True, False):
            model.one_query = one_query
            assert_close(model(images, edit=edit), theirs, near)


def family_rows(model: SigmoidViT, block: int) -> int:
    """Rows of a block that an edit of the class rows changes."""
    is_pool = model.layout.pooled and block == model.depth - 1
    return 1 if is_pool else (model.vit.cls_token is not None) + hasattr(model.vit, "head_dist")
