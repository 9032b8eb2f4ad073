"""Every ViT that timm has: it works and equals timm, or is refused with the reason."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.__main__ import main
from lib.edit import AttentionEdit
from lib.model.families import FAMILIES, Family, default_pool, family_of, why_refused
from lib.model.vit import SigmoidViT, UnsupportedModelError, create_model
from lib.model.weights import WeightsError, load_weights

KNOWN = set(timm.list_models())
VITS = [
    name
    for pattern in ("vit_*", "eva*", "deit*", "flexivit_*", "beit*", "aimv2_*", "test_vit*",
                    "samvit_*", "naflexvit_*")
    for name in timm.list_models(pattern)
    if not name.startswith("vitamin")
]  # fmt: skip
CLASSES = 5


def skip_unknown(name: str) -> None:
    if name.partition(".")[0] not in KNOWN:
        pytest.skip(f"timm {timm.__version__} has no {name}")


def patch_of(name: str) -> int:
    """Pixels between patches."""
    if "_r_s16_p8" in name:
        return 32
    return int(next(iter(re.findall(r"patch(\d+)", name)), 16))


def small(name: str, **changes: object) -> nn.Module:
    """What timm builds for a name, of its kind but small; every parameter is lively.

    Zero biases, layer scales of 1e-5 and zero heads would hide what is left out.
    """
    patch = patch_of(name)
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
    assert_close(model(images, rows="all")[0], plain, 1e-5)  # every block is taken apart
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
    skip_unknown(name)
    changes = {} if family.trained else {"global_pool": "token"}
    height, width = (side * patch_of(name) for side in SIZES[size])
    if size == "other":
        changes |= {"dynamic_img_size": True}
    else:
        changes |= {"img_size": (height, width)}
    model = SigmoidViT(small(name, **changes)).to(dtype)
    images = pictures(model, size=(height, width)).to(dtype)
    try:
        model.vit(images)
    except RuntimeError as error:  # mixed rotary positions in older versions
        pytest.skip(f"timm {timm.__version__} cannot compute {name} in {dtype}: {error}")
    return model, images


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
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(size, torch.float32) for size in SIZES] + [("wide", torch.bfloat16)],
    ids=str,
)
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
@pytest.mark.parametrize("queries", ["cls", "all"])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [("wide", torch.float32), ("other", torch.float32), ("wide", torch.bfloat16)],
    ids=str,
)
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


def keys(vit: nn.Module) -> set[str]:
    return set(vit.state_dict())


@pytest.mark.parametrize(
    "family", [one for one in WORKING if one.average], ids=lambda one: one.title
)
def test_what_pooling_by_the_class_token_changes(family):
    """What the table says of a file of weights: which of its norms fit, and that a head does."""
    skip_unknown(family.example)
    average, token = (small(family.example, global_pool=pool) for pool in ("avg", "token"))
    changed = {"norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias"}
    assert keys(average) ^ keys(token) == (changed if "fc_norm" in family.average else set())
    if "no norm behind the blocks" in family.average:
        assert isinstance(token.norm, nn.Identity) and isinstance(token.fc_norm, nn.Identity)
    # No file has a head: "a head is new in either case", "no head".
    files = [timm.get_pretrained_cfg(name) for name in timm.list_pretrained() if family.has(name)]
    without_head = all(file.num_classes == 0 for file in files)
    assert without_head == (family.trained or "no head" in family.average)


def test_a_file_of_averaged_patches_is_refused_or_renamed_as_the_page_says(tmp_path):
    vit, path = small("eva02_tiny_patch14_336", global_pool="avg"), tmp_path / "eva02.pt"
    torch.save(vit.state_dict(), path)
    model = SigmoidViT(small("eva02_tiny_patch14_336", global_pool="token"))
    with pytest.raises(WeightsError, match=r"no class row decides.*docs/models\.md says how"):
        load_weights(model, path)
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(
        "\n".join(line for line in code.splitlines() if line.startswith("state = ")),
        here := {"vit": vit},
    )
    torch.save(here["state"], path)
    report = load_weights(model, path)
    assert report.new == ("head.weight", "head.bias") and not report.unused
    assert torch.equal(model.vit.norm.weight, vit.fc_norm.weight)


def test_create_model_pools_by_what_the_weights_were_trained_with():
    sizes = {"depth": 1, "embed_dim": 48, "num_heads": 4}
    for name in ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3.lvd1689m"):
        assert create_model(name, 3, (32, 48), **sizes).vit.global_pool == "token"
    assert create_model("vit_base_patch16_siglip_224", 3, (32, 32), **sizes).layout.pooled
    said = r'pools its tokens with global_pool="avg".*\(EVA-02: fine-tuned with the average'
    with pytest.raises(UnsupportedModelError, match=said):
        create_model("eva02_tiny_patch14_224", 3, (28, 28), **sizes)
    model = create_model("eva02_tiny_patch14_224", 3, (28, 28), global_pool="token", **sizes)
    assert model.num_read == 1
    with pytest.raises(UnsupportedModelError, match=r'without "_gap" in its name'):
        create_model("vit_base_patch16_siglip_gap_224", 3, (32, 32), **sizes)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_an_example_is_of_its_family_and_the_page_has_it(family):
    assert family_of(family.example) is family_of(f"hf_hub:timm/{family.example}") is family
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    prefix = " or ".join(map(str, family.prefix))
    cells = [family.title, f"`{family.example}`"]
    if family.decides:
        cells += [family.decides, prefix, family.positions]
    elif family.example in KNOWN:
        cells.append(why_refused(family.example).partition("; ")[0])
    assert f"| {' | '.join(cells)} |" in page


def forget(owner: nn.Module, attribute: str) -> None:
    """As if another version of timm had another name for it."""
    parts = vars(owner), owner._modules, owner._parameters, owner._buffers
    place = next(place for place in parts if attribute in place)
    place[f"{attribute}_2"] = place.pop(attribute)


@pytest.mark.parametrize(
    ("name", "where", "attributes"),
    [
        (
            "vit_tiny_patch16_224",
            "",
            "patch_embed norm_pre norm fc_norm head_drop cls_token blocks",
        ),
        ("vit_tiny_patch16_224", "blocks.1", "norm1 attn ls1 drop_path1 norm2 mlp ls2 drop_path2"),
        (
            "vit_tiny_patch16_224",
            "blocks.1.attn",
            "qkv q_norm k_norm attn_drop norm proj proj_drop scale",
        ),
        ("vit_small_patch16_dinov3", "blocks.1", "norm1 attn gamma_2 drop_path1 norm2 mlp"),
        ("vit_small_patch16_dinov3", "blocks.1.attn", "qkv q_norm num_heads num_prefix_tokens"),
        (
            "vit_base_patch16_siglip_224",
            "attn_pool",
            "latent q kv q_norm k_norm proj norm mlp scale",
        ),
    ],
)
def test_a_renamed_attribute_is_one_sentence_that_names_it(name, where, attributes):
    for attribute in attributes.split():
        vit = small(name)
        forget(vit.get_submodule(where), attribute)
        with pytest.raises(UnsupportedModelError) as caught:
            SigmoidViT(vit)
        said = str(caught.value)
        assert re.search(rf"has no attribute {attribute}, ", said), said
        assert "or this version of timm names it otherwise; use a model" in said
        assert "\n" not in said and ". " not in said


# What each of timm's releases may have: one of each kind of reason.
@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, 'create it with global_pool="token"'),
        ("vit_base_patch16_gap_224", {}, "it has no class token, so use a model of"),
        ("vit_tiny_patch16_224", {"global_pool": "prr"}, "is no query that pools the tokens"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "create it with patch_drop_rate=0"),
        ("eva02_enormous_patch14_clip_224", {}, "has its norms behind attention and MLP"),
        ("vit_dwee_patch16_reg1_gap_256", {}, "subtracts two softmaxes"),
        ("vit_base_patch16_xp_224", {}, "beside each other from one projection"),
        ("vit_base_patch16_rpn_224", {}, "has its norms behind attention and MLP"),
        ("vit_relpos_base_patch16_cls_224", {}, "adds relative positions to its logits"),
    ],
)
def test_what_is_refused_says_why(name, changes, says):
    skip_unknown(name)
    try:
        vit = small(name, **changes)
    except AssertionError:
        pytest.skip(f"timm {timm.__version__} has no {changes}")
    with pytest.raises(UnsupportedModelError, match=says):
        SigmoidViT(vit)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("vit_tiny_patch16_224", "blocks.0"),
        ("vit_small_patch16_dinov3", "blocks.0"),
        ("vit_base_patch16_siglip_224", "attn_pool"),
    ],
)
def test_a_class_that_computes_something_else_is_refused(name, place):
    """Every attribute is there, but its forward pass is another one."""
    vit = small(name, **({"global_pool": "token"} if "dinov3" in name else {}))
    SigmoidViT(copy.deepcopy(vit))
    part = vit.get_submodule(place)
    plain = type(part).forward
    doubled = {"forward": lambda self, x, **more: 1.5 * plain(self, x, **more)}
    part.__class__ = type("Doubled", (type(part),), doubled)
    with pytest.raises(UnsupportedModelError, match=r"^Doubled of this .* computes something else"):
        SigmoidViT(vit)


def test_the_command_lists_families_and_single_names(capsys):
    assert main(["models"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 100
    assert all(family.title in told and family.example in told for family in WORKING)
    assert "this VisionTransformerRelPos adds relative positions to its logits" in told
    assert main(["models", "eva02_*224"]) == 0
    told = capsys.readouterr().out
    assert "eva02_base_patch16_clip_224: class row (EVA-02-CLIP)" in told
    assert 'eva02_tiny_patch14_224: class row with global_pool="token" (EVA-02)' in told
    assert "eva02_enormous_patch14_clip_224: refused\n    EvaBlockPostNorm of this Eva" in told
    assert main(["models", "vit_small_*.dino"]) == 0
    assert "vit_small_patch16_224.dino: class row (DINO)" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "list_models", lambda: ["vit_small_patch16_224"])
        assert main(["models"]) == 0 and "relative positions" not in capsys.readouterr().out
    assert main(["models", "dinov3"]) == 2
    assert "has no model dinov3; for a part of a name put stars" in capsys.readouterr().err
