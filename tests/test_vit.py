"""SigmoidViT against the timm model that it holds, and weights in and out."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from conftest import VITS, images_for, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

from lib.edit import AttentionEdit, sigmoid_attention
from lib.losses import attention_loss
from lib.model.vit import SigmoidViT, UnsupportedModelError, create_model
from lib.model.weights import WeightsError, load_weights, save_weights, write_state

QUERIES = ["cls", "all"]


def patch_mask(model: SigmoidViT, images: int, seed: int = 0) -> torch.Tensor:
    patches = model.grid[0] * model.grid[1]
    return torch.rand(images, patches, generator=torch.Generator().manual_seed(seed)) < 0.4


@torch.no_grad()
def test_no_edit_equals_timm(any_model):
    images = images_for(any_model)
    plain = any_model.vit(images)
    assert (any_model(images) - plain).abs().max() < 1e-5 * plain.abs().max().clamp(min=1)
    any_model.one_query = False
    assert torch.equal(any_model(images), plain)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_edit_equals_timm_in_half_precision(any_model, dtype):
    model, images = any_model.to(dtype), images_for(any_model).to(dtype)
    try:
        plain = model.vit(images)
    except RuntimeError as error:  # mixed rotary positions in older versions
        pytest.skip(f"timm {timm.__version__} cannot compute it in {dtype}: {error}")
    close = (model(images) - plain).abs().max() / plain.abs().max()
    assert close < 20 * torch.finfo(dtype).eps
    model.one_query = False
    assert torch.equal(model(images), plain)
    nothing = AttentionEdit(torch.zeros_like(patch_mask(model, 3)), 0.0, blocks="all")
    assert torch.equal(model(images, edit=nothing), plain)


@torch.no_grad()
def test_rows_are_the_attention_that_timm_uses(any_model):
    images = images_for(any_model)
    seen = {}
    for index, block in enumerate(any_model.vit.blocks):
        block.attn.fused_attn = False  # or the hook below captures nothing
        keep = lambda _m, _i, out, index=index: seen.__setitem__(index, out)  # noqa: E731
        block.attn.attn_drop.register_forward_hook(keep)
    if any_model.layout.pooled:
        pool = any_model.vit.attn_pool
        pool.register_forward_pre_hook(lambda _, args: seen.__setitem__(3, _pooled(pool, *args)))
    any_model.vit(images)
    _, rows = any_model(images, rows="all")
    assert list(rows) == list(any_model.layout.read) and len(seen) == any_model.depth
    for index, row in rows.items():
        assert row.shape[1] == any_model.layout.heads[index]
        left_out = row.shape[-1] - seen[index].shape[-1]  # by a pooling of the patches alone
        expected = F.pad(seen[index][:, :, 0], (left_out, 0))
        assert torch.allclose(torch.softmax(row, -1), expected, atol=1e-5)


def _pooled(pool: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Attention `[B, heads, 1, N]` of timm's pooling, head by head, written out."""
    keys, query = pool.kv(tokens).chunk(2, -1)[0], pool.q(pool.latent)[0, 0]
    parts = zip(keys.chunk(pool.num_heads, -1), query.chunk(pool.num_heads), strict=True)
    rows = [(k @ q / len(q) ** 0.5).softmax(-1) for k, q in parts]
    return torch.stack(rows, dim=1)[:, :, None]


@torch.no_grad()
@pytest.mark.parametrize("queries", QUERIES)
def test_only_what_is_named_changes(any_model, queries):
    model, images = any_model, images_for(any_model)
    mask = patch_mask(model, 3)
    mask[1] = False
    plain, rows = model(images, rows="all")
    edit = AttentionEdit(mask, 0.0, blocks="all", queries=queries)
    edited = model(images, edit=edit)
    assert torch.equal(edited[1], plain[1])  # an image without an edit keeps its bits
    assert not torch.equal(edited[0], plain[0])
    # The rows of blocks up to the edited one are those of the plain model.
    one = AttentionEdit(mask, 0.0, blocks=(1,), queries="all")
    _, edited_rows = model(images, rows="all", edit=one)
    same = [torch.equal(row, edited_rows[index]) for index, row in rows.items()]
    assert same == [index < 2 for index in rows]


@torch.no_grad()
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("one_query", [True, False])
def test_heads_that_are_not_named_do_not_change(queries, one_query):
    model = SigmoidViT(tiny_vit(), one_query)
    mask = patch_mask(model, 3)
    seen = []
    last = model.vit.blocks[-1].attn.proj
    handle = last.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(images_for(model))
    model(images_for(model), edit=AttentionEdit(mask, 1.0, heads=(2,), queries=queries))
    handle.remove()
    before, after = (x.unflatten(-1, (4, -1))[:, 0] for x in seen)  # [B, heads, d] of the class row
    assert torch.equal(before[:, [0, 1, 3]], after[:, [0, 1, 3]])
    assert not torch.equal(before[:, 2], after[:, 2])


@torch.no_grad()
@pytest.mark.parametrize("offset", ["none", "centred"])
@pytest.mark.parametrize("queries", QUERIES)
def test_an_edit_is_what_a_model_with_those_logits_computes(offset, queries):
    """Against a plain N x N attention in which the edited logits are written by hand."""
    model = SigmoidViT(tiny_vit("registers"))
    images, mask = images_for(model), patch_mask(model, 3)
    edit = AttentionEdit(mask, 0.7, blocks=(1,), queries=queries, offset=offset)
    tokens = model.tokens(images, 1)
    block, attn = model.vit.blocks[1], model.vit.blocks[1].attn
    qkv = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    x = (q * attn.scale) @ k.mT
    patches = x[..., 5:]
    c = patches.exp().mean(-1, keepdim=True).log() if offset == "centred" else 0.0
    new = torch.where(mask[:, None, None], torch.logit(torch.tensor(0.7)) + c, patches)
    y = torch.cat([x[..., :5], new], -1)
    if queries == "cls":
        y = torch.cat([y[:, :, :1], x[:, :, 1:]], 2)
    mixed = (y.softmax(-1) @ v).transpose(1, 2).flatten(2)
    tokens = tokens + block.ls1(attn.proj(mixed))
    tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    expected = model.vit.forward_head(model.vit.norm(model.vit.blocks[2](tokens)))
    assert torch.allclose(model(images, edit=edit), expected, atol=1e-4)


@torch.no_grad()
def test_distilled_edit_reaches_both_rows_that_the_head_reads():
    model = SigmoidViT(tiny_vit("distilled"))
    seen = []
    model.vit.head_dist.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(images_for(model))
    model(images_for(model), edit=AttentionEdit(patch_mask(model, 3), 1.0))
    assert not torch.allclose(*seen, atol=1e-4)


@given(seed=st.integers(0, 1000), value=st.sampled_from([0.0, 1e-9, 0.5, 1 - 1e-9, 1.0]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_saturated_models_survive_extreme_edits(dtype, seed, value):
    model = SigmoidViT(tiny_vit(seed=seed % 3))
    for block in model.vit.blocks:
        block.attn.scale = 20.0  # logits of plus or minus 40 and more
    model, images = model.to(dtype), images_for(model, seed=seed).to(dtype)
    mask = patch_mask(model, 3, seed)
    for queries in QUERIES:
        scores = model(images, edit=AttentionEdit(mask, value, blocks="all", queries=queries))
        assert torch.isfinite(scores).all()


@torch.no_grad()
@pytest.mark.parametrize("offset", ["none", "centred"])
def test_asking_for_the_current_attention_changes_nothing(any_model, offset):
    images = images_for(any_model)
    plain, rows = any_model(images, rows="last")
    current = sigmoid_attention(rows[any_model.depth - 1], offset, any_model.num_prefix)
    edit = AttentionEdit(torch.ones_like(current).bool(), current, offset=offset)
    if any_model.num_read == 1:  # a distilled model's second row has another current value
        assert (any_model(images, edit=edit) - plain).abs().max() <= 1e-6


@pytest.mark.parametrize("blocks", ["last", "last2", "all"])
def test_gradient_reaches_queries_and_keys_of_supervised_blocks_only(any_model, blocks):
    images = images_for(any_model)
    patches = any_model.grid[0] * any_model.grid[1]
    human = torch.rand(3, patches)
    _, rows = any_model(images, rows=blocks)
    attention_loss("kl", rows, human, torch.ones(3, patches, dtype=torch.bool)).backward()
    for index in rows:
        query, key, value = _projection_gradients(any_model.vit, index)
        assert query.abs().max() > 0 and key.abs().max() > 0
    assert any_model.vit.head.weight.grad is None  # the loss of a row does not reach the head
    if blocks == "last":  # values of the last block do not influence its own row
        assert value is None or value.abs().max() == 0


def _projection_gradients(vit: torch.nn.Module, index: int) -> Sequence[torch.Tensor | None]:
    """Of what makes a block's q, k and v."""
    if index == len(vit.blocks):
        return vit.attn_pool.q.weight.grad, *vit.attn_pool.kv.weight.grad.chunk(2)
    attn = vit.blocks[index].attn
    if attn.qkv is None:
        return [one.weight.grad for one in (attn.q_proj, attn.k_proj, attn.v_proj)]
    return attn.qkv.weight.grad.chunk(3)


def test_training_gradients_equal_those_of_timm(any_model):
    images, labels = images_for(any_model), torch.tensor([0, 1, 2])
    gradients = []
    for forward in (any_model, any_model.vit):
        any_model.zero_grad()
        torch.nn.functional.cross_entropy(forward(images), labels).backward()
        gradients.append([p.grad.clone() for p in any_model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for ours, theirs in zip(*gradients, strict=True):
        # The gradient of the bias of a key's norm is 0 in theory, and 1e-7 of rounding in practice.
        assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max().clamp(min=3e-3))


def test_gradient_checkpointing_gives_the_same_gradients():
    model = SigmoidViT(tiny_vit())
    images, found = images_for(model), []
    for enable in (False, True):
        model.zero_grad()
        model.vit.set_grad_checkpointing(enable)
        model(images).sum().backward()
        found.append(model.vit.blocks[0].attn.qkv.weight.grad.clone())
    assert torch.allclose(*found)


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, "last", "all"])
def test_the_training_forward_compiles_without_a_graph_break(rows):
    model = SigmoidViT(tiny_vit()).train()
    images = images_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    _assert_same(compiled(images, rows=rows), model(images, rows=rows))


def test_training_on_cached_tokens_compiles_without_a_graph_break():
    model = SigmoidViT(tiny_vit()).train()
    tokens = model.tokens(images_for(model), -1).detach()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    for rows in (None, "last"):
        _assert_same(compiled(tokens=tokens, rows=rows), model(tokens=tokens, rows=rows))


def _assert_same(found, expected):
    (scores, rows), (wanted, others) = (
        given if isinstance(given, tuple) else (given, {}) for given in (found, expected)
    )
    assert torch.equal(scores, wanted) and rows.keys() == others.keys()
    assert all(torch.equal(row, others[block]) for block, row in rows.items())


def test_rows_keep_no_copy_for_the_backward_pass():
    model = SigmoidViT(tiny_vit(), one_query=False).train()
    images = images_for(model)

    def kept(**asked) -> int:
        """Bytes that the backward pass needs, parameters left out, each block of memory once."""
        blocks = {}
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor):
            blocks[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = model(images, **asked)
        assert result is not None
        return sum(size for pointer, size in blocks.items() if pointer not in parameters)

    plain, supervised = kept(), kept(rows="all")
    queries = 4 * len(images) * 32 * model.depth  # one query a block, scaled: [B, H, 1, d]
    assert plain <= supervised <= plain + 2 * queries


def test_the_trunk_can_be_computed_once(any_model):
    images = images_for(any_model)
    tokens = any_model.tokens(images, -1)
    last = any_model.depth - 1
    assert torch.equal(any_model.forward_tokens(tokens, start=last), any_model(images))
    early = AttentionEdit(patch_mask(any_model, 3), 0.0, blocks="all", queries="all")
    with pytest.raises(ValueError, match="block 0"):
        any_model.forward_tokens(tokens, start=last, edit=early)


@torch.no_grad()
def test_dynamic_image_size_is_read_from_the_images():
    model = SigmoidViT(tiny_vit(dynamic_img_size=True))
    images = torch.randn(2, 3, 32, 80)
    _, rows = model(images, rows="last")
    assert rows[2].shape == (2, 4, 1 + 2 * 5)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0] = True
    assert not torch.equal(model(images, edit=AttentionEdit(mask, 0.0)), model.vit(images))


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer"),
        ("resnet18", {}, "ResNet"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, 'global_pool="avg"'),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, None),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ("eva02_tiny_patch14_224", {}, '"avg".*create it with global_pool="token"'),
        ("vit_small_patch16_36x1_224", {"depth": 1}, None),
        ("vit_small_patch16_18x2_224", {"depth": 1}, "ParallelThingsBlock"),
    ],
)
def test_models_whose_class_row_does_not_decide_are_refused_by_name(name, changes, says):
    vit = timm.create_model(name, num_classes=3, **changes)
    if says is None:
        SigmoidViT(vit)
    else:
        with pytest.raises(UnsupportedModelError, match=says):
            SigmoidViT(vit)


def test_create_model_refuses_what_has_no_image_size():
    with pytest.raises(UnsupportedModelError, match="resnet18"):
        create_model("resnet18", 3, (64, 64))


# ------------------------------------------------------------------------------------------ weights


def test_epsilon_and_normalisation_are_those_that_are_asked_for():
    """Every LayerNorm's, as in a timm model that was built with it; None leaves timm's own."""
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 4}
    plain = create_model("vit_tiny_patch16_224", 5, (64, 64), **sizes).eval()
    numbers = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    asked = {"norm_eps": 1e-2, "normalisation": numbers}
    ours = create_model("vit_tiny_patch16_224", 5, (64, 64), **asked, **sizes).eval()
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-2)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, img_size=64, norm_layer=norm, **sizes
    ).eval()
    for vit in (ours.vit, theirs):
        vit.load_state_dict(plain.vit.state_dict())
    images = images_for(plain)
    assert (ours(images) - theirs(images)).abs().max() < 1e-5
    assert (ours(images) - plain(images)).abs().max() > 1e-3
    assert ours.normalisation == (numbers[:3], numbers[3:])
    assert plain.normalisation == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@torch.no_grad()
def test_weights_round_trip(any_model, tmp_path, suffix):
    path = tmp_path / f"weights.some_tag{suffix}"
    save_weights(any_model, path)
    other = SigmoidViT(_like(any_model))
    report = load_weights(other, path)
    assert not (report.new or report.unused or report.resampled or report.misfit)
    assert torch.equal(other(images_for(any_model)), any_model(images_for(any_model)))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def _like(model: SigmoidViT) -> torch.nn.Module:
    """The same architecture with other weights."""
    vit = copy.deepcopy(model.vit)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter)
    return vit


def plain_state(path: Path) -> dict[str, torch.Tensor]:
    """What other programs read from the file."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_are_plain_state_dicts(tmp_path, suffix):
    vit, path = tiny_vit(), tmp_path / f"w{suffix}"
    save_weights(SigmoidViT(vit), path)
    found = plain_state(path)
    assert set(found) == set(vit.state_dict())
    assert all(torch.equal(found[key], value) for key, value in vit.state_dict().items())
    tiny_vit(seed=3).load_state_dict(found)  # strict: no key too many


# Another image size for each of VITS: larger, smaller, turned by 90 degrees (as many patches), ...
OTHER_SIZES = {
    "plain": (96, 96),
    "wide": (96, 64),
    "distilled": (32, 80),
    "registers": (28, 70),
    "qk_norm": (64, 128),
    "no_bias": (48, 48),
    "rotary": (96, 48),
    "eva": (28, 70),
    "mixed": (80, 48),
    "pooled": (48, 96),
    "two_kinds": (48, 80),
    "left_out": (32, 96),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", list(VITS))
@torch.no_grad()
def test_position_embeddings_follow_the_image_size(kind, suffix, tmp_path):
    source = SigmoidViT(tiny_vit(kind))
    target = SigmoidViT(tiny_vit(kind, seed=3, img_size=OTHER_SIZES[kind]))
    save_weights(source, tmp_path / f"w{suffix}")
    report = load_weights(target, tmp_path / f"w{suffix}")
    assert not report.new and not report.unused
    assert torch.isfinite(target(images_for(target))).all()
    old, new = source.vit.pos_embed, target.vit.pos_embed
    if old is None:  # rotary positions alone: nothing to resample
        assert not report.resampled
        return
    assert report.resampled == ("pos_embed",) and "resampled: pos_embed" in str(report)
    prefix = 0 if source.vit.no_embed_class else source.num_prefix
    assert torch.equal(new[:, :prefix], old[:, :prefix])
    image = old[:, prefix:].mT.unflatten(-1, source.grid)  # [1, dim, gh, gw]
    expected = torch.nn.functional.interpolate(image, target.grid, mode="bicubic", antialias=True)
    assert torch.allclose(new[:, prefix:], expected.flatten(2).mT, atol=1e-6)
    assert torch.equal(target.vit.blocks[0].norm1.weight, source.vit.blocks[0].norm1.weight)


SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 4, "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {"img_size": (160, 96)}),
        ("vit_tiny_patch16_224", {"img_size": (112, 448)}),  # as many patches as 224 x 224
        ("vit_tiny_patch16_224", {"img_size": 112, "patch_size": 8}),
        ("vit_tiny_patch16_224", {"img_size": 96, "no_embed_class": True}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 96}),
        ("vit_small_patch14_dinov2", {"img_size": 224}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": (224, 280)}),
        ("flexivit_small", {"img_size": 128}),  # timm resamples it in another way
    ],
)
def test_pretrained_files_load_as_timm_loads_them(name, changes, tmp_path):
    torch.manual_seed(0)
    own = {key: value for key, value in changes.items() if key == "no_embed_class"}
    state = timm.create_model(name, **SMALL, **own).state_dict()
    write_state(state, tmp_path / "w.safetensors")
    overlay = {"state_dict": state, "num_classes": 5}  # timm then fetches nothing
    theirs = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL, **changes
    )
    ours = SigmoidViT(timm.create_model(name, **SMALL, **changes))
    report = load_weights(ours, tmp_path / "w.safetensors")
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.vit.state_dict()[key], value), key
    changed = {k for k in state if not torch.equal(ours.vit.state_dict()[k], state[k])}
    assert set(report.resampled) == changed


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_grid_of_as_many_patches_as_the_pretrained_one_is_not_mistaken_for_it(tmp_path, suffix):
    source = create_model("vit_tiny_patch16_224", 5, (112, 448), depth=1)  # 7 x 28, not 14 x 14
    target = create_model("vit_tiny_patch16_224", 5, (112, 448), depth=1)
    save_weights(source, tmp_path / f"w{suffix}")
    assert not load_weights(target, tmp_path / f"w{suffix}").resampled
    assert torch.equal(target.vit.pos_embed, source.vit.pos_embed)


@pytest.mark.parametrize("kind", ["wide", "registers"])
def test_a_grid_that_nobody_recorded_and_that_is_no_square_is_refused(kind, tmp_path):
    write_state(tiny_vit(kind).state_dict(), tmp_path / "w.pt")
    target = SigmoidViT(tiny_vit(kind, seed=3, img_size=112))
    before = copy.deepcopy(target.vit.state_dict())
    with pytest.raises(WeightsError, match=r"w\.pt.*save_weights, which records the grid"):
        load_weights(target, tmp_path / "w.pt")
    assert all(torch.equal(before[k], v) for k, v in target.vit.state_dict().items())


def test_the_head_alone_may_be_new_and_the_report_says_why(tmp_path):
    save_weights(SigmoidViT(tiny_vit(classes=5)), tmp_path / "w.pt")
    seven = SigmoidViT(tiny_vit(classes=7, seed=3, img_size=96))
    own_head = seven.vit.head.weight.clone()
    report = load_weights(seven, tmp_path / "w.pt")
    assert report.new == report.misfit == ("head.weight", "head.bias")
    assert torch.equal(seven.vit.head.weight, own_head)
    assert str(report) == (
        f"{len(report.loaded)} tensors loaded; resampled: pos_embed; new: head.weight, head.bias; "
        "of another shape in the file: head.weight, head.bias"
    )

    state = {k: v for k, v in tiny_vit().state_dict().items() if not k.startswith("head.")}
    write_state({**state, **{f"extra.{n}": torch.zeros(1) for n in range(9)}}, tmp_path / "w.pt")
    report = load_weights(SigmoidViT(tiny_vit(seed=3)), tmp_path / "w.pt")
    assert report.new == ("head.weight", "head.bias") and not report.misfit
    assert len(report.unused) == 9 and str(report).endswith("extra.4, extra.5 and 3 more")


def test_a_plain_file_does_not_fit_a_distilled_model(tmp_path):
    save_weights(SigmoidViT(tiny_vit("plain")), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"w\.safetensors does not fit .*Distilled.*dist_token"):
        load_weights(SigmoidViT(tiny_vit("distilled")), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"w\.safetensors does not fit .*Distilled"):
        load_weights(SigmoidViT(tiny_vit("distilled", img_size=96)), tmp_path / "w.safetensors")


def test_layer_scale_of_original_deit3_files_is_found(tmp_path):
    vit = tiny_vit("qk_norm")
    state = {k.replace("ls1.gamma", "gamma_1"): v for k, v in vit.state_dict().items()}
    assert "blocks.0.gamma_1" in state
    write_state({k.replace("ls2.gamma", "gamma_2"): v for k, v in state.items()}, tmp_path / "w.pt")
    report = load_weights(SigmoidViT(tiny_vit("qk_norm", seed=3)), tmp_path / "w.pt")
    assert not report.new and not report.unused


def test_an_unknown_extension_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"w\.bin must end in one of \.safetensors, \.pt, \.pth"):
        save_weights(model, tmp_path / "w.bin")
    with pytest.raises(ValueError, match="must end in one of"):
        save_weights(model, tmp_path / "vit_small_patch14_dinov2.lvd142m")
    assert not list(tmp_path.iterdir())


def test_anything_missing_but_the_head_is_an_error_and_loads_nothing(tmp_path):
    source = tiny_vit()
    state = {k: v for k, v in source.state_dict().items() if k != "blocks.1.mlp.fc1.weight"}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    target = SigmoidViT(tiny_vit(seed=3))
    before = target.vit.blocks[0].mlp.fc1.weight.clone()
    with pytest.raises(WeightsError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(target.vit.blocks[0].mlp.fc1.weight, before)


def test_files_that_are_no_weights_are_refused_in_words(tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_weights(model, tmp_path / "nowhere.pt")
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("no weights at all")
        with pytest.raises(WeightsError, match=name):
            load_weights(model, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="state dict"):
        load_weights(model, tmp_path / "list.pt")
    torch.save(model, tmp_path / "module.pt")  # a whole module: code would have to run
    with pytest.raises(WeightsError, match=r"module\.pt cannot be read.*save model\.state_dict"):
        load_weights(model, tmp_path / "module.pt")
    whole = tmp_path / "whole.pt"
    save_weights(model, whole)
    whole.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"whole\.pt cannot be read.*save it again") as caught:
        load_weights(model, whole)
    assert "\n" not in str(caught.value)


class _Code:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_weights_file_is_not_run(tmp_path, model):
    path, made = tmp_path / "w.pt", tmp_path / "made"
    torch.save({**model.vit.state_dict(), "more": _Code(made)}, path)
    with pytest.raises(WeightsError, match="never run") as caught:
        load_weights(model, path)
    assert not made.exists() and "weights_only" not in str(caught.value)
    torch.load(path, weights_only=False)
    assert made.exists()  # the file was dangerous


@torch.no_grad()
def test_real_pretrained_weights_load(shared):
    model = create_model("vit_small_patch14_dinov2", 20, (224, 224))
    path = shared / "models" / "vit_small_patch14_dinov2_saliency.safetensors"
    report = load_weights(model, path)
    assert set(report.new) == {"head.weight", "head.bias"} and not report.unused
    assert report.resampled == ("pos_embed",) and not report.misfit
    assert model.grid == (16, 16)
    images = torch.randn(1, 3, 224, 224)
    scores, rows = model(images, rows="last")
    assert torch.allclose(scores, model.vit(images), atol=1e-5)
    # The fact that `offset` exists for: a raw sigmoid of real weights is almost 1 everywhere.
    assert sigmoid_attention(rows[11], "none", 1).mean() > 0.9
    assert 0.1 < sigmoid_attention(rows[11], "centred", 1).mean() < 0.6
