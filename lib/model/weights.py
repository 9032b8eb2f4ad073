"""Weights in and out: timm's pretrained ones, other people's files, our own.

What timm must fetch from a hub is fetched once, to a file; what is loaded says what became of it.
"""

from __future__ import annotations

import copy
import difflib
import io
import math
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn

from lib.files import make_folder, write_bytes
from lib.model.checkpoints import (
    GRID_KEY,
    WeightsError,
    below,
    describe,
    find_prefixes,
    first_sentence,
    flatten,
    read_checkpoint,
    shape_of,
    some,
)
from lib.model.convert import differences_told, fit_embeddings, in_timms_names
from lib.model.families import default_pool
from lib.model.vit import SigmoidViT
from lib.model.zero_shot import head_of_file

FORMATS = (".safetensors", ".pt", ".pth")
_OF_JAX = "embedding/kernel"  # in the original files (.npz) of google-research
_JAX_BLOCK = re.compile(r"encoderblock_(\d+)/")
_JAX_STACK = "encoderblock/LayerNorm_0/scale"  # where all blocks are in one tensor
_KERNEL = "patch_embed.proj.weight"
_VIT_HEADS = ("head.", "head_dist.")
_POOL = "attn_pool."
_VIT_LAYERS = ("blocks.", "patch_embed.", "norm_pre.", "reg_token", "dist_token", _POOL)
_GRID_HINT = ", and for images that are not square a file of save_weights, which records the grid"


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, by parameter name."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]  # the model's own head, when the file has none that fits
    unused: tuple[str, ...]  # in the file, but not in the model
    resampled: tuple[str, ...]  # of `loaded`: embeddings brought to the model's patch grid or size
    misfit: tuple[str, ...]  # of `new`: in the file, but for another number of classes
    taken: str = ""  # path and prefix of the tensors in the file, such as "teacher.backbone"
    others: tuple[str, ...] = ()  # paths of other ViTs in the file
    passed_over: tuple[str, ...] = ()  # Python objects in the file, which were not made
    whose: str = ""  # who names tensors as the file does, where its names were converted here
    beware: tuple[str, ...] = ()  # what they compute otherwise, though the weights are the same

    def __str__(self) -> str:
        lists = {
            "resampled": self.resampled,
            "new": self.new,
            "of another shape in the file": self.misfit,
            "in the file but unused": self.unused,
            "passed over": self.passed_over,
        }
        told = [f"{title}: {some(names)}" for title, names in lists.items() if names]
        taken = f" from {self.taken or 'the top level'}" if self.taken or self.others else ""
        taken += f", not from {some(self.others)}" if self.others else ""
        taken += f" in the names of {self.whose}" if self.whose else ""
        return "; ".join([f"{len(self.loaded)} tensors loaded{taken}", *told, *self.beware])


def load_weights(model: SigmoidViT, path: Path) -> LoadReport:
    """Reads a ViT from a checkpoint of any make into `model`.

    Its names are timm's, or such as timm converts itself, or those of Hugging Face transformers,
    torchvision or open_clip (see `convert.py`); the report says whose.

    The file is one of torch.save, safetensors or NumPy, whatever its suffix. The ViT may lie in
    nested dicts and below prefixes (`state_dict`, `module.`, `teacher.backbone.`, ...). Of several
    it is one of the model's width and depth, and among these an average (teacher, EMA, target or
    momentum encoder) before any other, a student last. The report says which.

    Position and patch embeddings are resampled to the model by timm's own functions. The grid
    that they come from is in files of `save_weights`; for others it is taken as timm takes it:
    that of timm's pretrained weights, or else a square. A head of another size, or none, leaves
    the model's own head in place and is reported as new.

    Raises:
        FileNotFoundError: with the path. WeightsError: unreadable, no ViT in it, values that are
            not finite, or another architecture: anything but the head is missing, of another shape,
            or a layer that the model has not; nothing is loaded then.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}; set WEIGHTS to a .safetensors or .pt file")
    content, passed_over = read_checkpoint(path)
    tensors, grids = flatten(content)
    if any(name.endswith(_OF_JAX) for name in tensors):
        found = [_from_jax(tensors, path, model.vit)]
    else:
        prefixes = find_prefixes(tensors)
        found = [_candidate(prefix, tensors, grids, model.vit) for prefix in prefixes]
    if not found:
        beside = f"; passed over: {some(passed_over)}" if passed_over else ""
        raise WeightsError(
            f"{path} cannot be read as weights of a ViT (such as patch_embed.proj.weight): "
            f"{describe(content, tensors)}{beside}"
        )
    own = model.vit.state_dict()
    best = min(found, key=lambda one: len(_differences(_sizes(one.fitted), _sizes(own))))
    _refuse_unlike(best, own, path, type(model.vit).__name__)
    fitted, state = best.fitted, best.state
    head = head_of_file(model.vit, fitted)
    if head is not None:  # of `zero_shot`, in place of the model's
        own = {key: value for key, value in own.items() if not key.startswith("head.")}
        own |= {f"head.{key}": value for key, value in head.state_dict().items()}
    loaded = {key: one for key, one in fitted.items() if key in own and one.shape == own[key].shape}
    for part in _VIT_HEADS:  # a bias belongs to its weight
        if part + "weight" not in loaded:
            loaded.pop(part + "bias", None)
    for key, value in loaded.items():
        _refuse_unusable(state.get(key, value), f"{path} has", best.prefix + key)
    if head is not None:
        model.vit.head = head
    model.vit.load_state_dict(loaded, strict=False)
    new = tuple(key for key in own if key not in loaded)
    # Where there is nothing to resample, timm hands on the very tensor.
    resampled = tuple(
        key
        for key in ("pos_embed", _KERNEL)
        if key in loaded and key in state and fitted[key] is not state[key]
    )
    return LoadReport(
        loaded=tuple(loaded),
        new=new,
        unused=tuple(key for key in fitted if key not in own),
        resampled=resampled,
        misfit=tuple(key for key in new if key in fitted),
        taken=best.where,
        others=tuple(one.where or "the top level" for one in found if one is not best),
        passed_over=passed_over,
        whose=best.whose,
        beware=best.beware,
    )


@dataclass(frozen=True)
class _Candidate:
    """One ViT of a file."""

    prefix: str
    state: dict[str, Tensor]  # as in the file, without the prefix, but in timm's names
    fitted: dict[str, Tensor]  # embeddings resampled, if there was no error
    error: Exception | None = None
    whose: str = ""  # see `LoadReport`
    beware: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return self.prefix.rstrip(".")


def _candidate(
    prefix: str, tensors: dict[str, Tensor], grids: dict[str, tuple[int, int]], vit: nn.Module
) -> _Candidate:
    theirs = below(tensors, prefix)
    above = [place for place in grids if not place or prefix.startswith(f"{place}.")]
    grid = grids[max(above, key=len)] if above else None
    beware = tuple(differences_told(theirs, vit))
    state, whose = in_timms_names(theirs, tensors, prefix, vit)
    try:
        return _Candidate(prefix, state, fit_embeddings(state, grid, vit), None, whose, beware)
    except Exception as error:  # timm's conversions of foreign files have no common class
        return _Candidate(prefix, state, state if _KERNEL in state else {}, error, whose)


def _sizes(state: dict[str, Tensor]) -> tuple[int, int]:
    """Width and number of blocks."""
    kernel = state.get(_KERNEL, ())
    return len(kernel), len({key.split(".")[1] for key in state if key.startswith("blocks.")})


def _differences(there: tuple[int, int], here: tuple[int, int]) -> list[str]:
    return [
        f"{what}: {theirs} in the file, {ours} in the model"
        for what, theirs, ours in zip(("width", "blocks"), there, here, strict=True)
        if theirs != ours
    ]


def _refuse_unlike(best: _Candidate, own: dict[str, Tensor], path: Path, kind: str) -> None:
    """WeightsError, unless the head alone is missing or of another shape, or a pooling missing.

    Layers in the file that the model has not (blocks, registers, layer scale, norms) would change
    what the others do: then it is another architecture, too.
    """
    refused = f"{path}{f', at {best.where},' * bool(best.prefix)} does not fit {kind}: "
    remedy = "use weights of the same architecture"
    if re.search(r"\d+-of-\d+", path.name):
        remedy = "the file is one part of several; make one file of all parts"
    fitted, told = best.fitted, []
    shaped = [key for key in own if key in fitted and fitted[key].shape != own[key].shape]
    wrong = [key for key in own if key not in fitted or key in shaped]
    wrong = [key for key in wrong if not key.startswith(_VIT_HEADS)]
    if not any(key.startswith(_POOL) for key in fitted):  # it is new, and learns as a head does
        wrong = [key for key in wrong if not key.startswith(_POOL)]
    others = [key for key in fitted if key not in own and not key.startswith(_VIT_HEADS)]
    if not (best.error or wrong or any(key.startswith(_VIT_LAYERS) for key in others)):
        return
    if best.error:
        told.append(f"its embeddings cannot be resampled ({first_sentence(best.error)})")
    if fitted:
        differences = _differences(_sizes(fitted), _sizes(own))
        if wrong and not differences:
            told.append(f"missing or of another shape: {some(wrong)}")
        told += differences
    if first := [key for key in shaped if key in wrong][:1]:
        here, there = shape_of(own[first[0]]), shape_of(fitted[first[0]])
        told.append(f"{first[0]} is {there} in the file, {here} in the model")
    if "norm.weight" in wrong and "fc_norm.weight" in fitted:
        told.append(
            "fc_norm stands in place of norm, as the model was trained to average its patches, so "
            "that no class row decides"
        )
        if "cls_token" not in wrong:
            remedy = "docs/models.md says how its class row can learn to decide"
    if any(key.endswith(("attn.q_bias", "attn.qkv.bias")) for key in others):
        remedy = "use timm's model of that name with _qkvb, which has biases there"
    if others:
        told.append(f"in the file but not in the model: {some(others)}")
    hint = _GRID_HINT if best.error or wrong == shaped == ["pos_embed"] else ""
    raise WeightsError(f"{refused}{'; '.join(told)}; {remedy}{hint}") from best.error


def _refuse_unusable(value: Tensor, owner: str, name: str) -> None:
    if value.is_meta or value.layout != torch.strided:
        what = "without values (device meta)" if value.is_meta else f"as {value.layout}"
        raise WeightsError(f"{owner} {name} {what}; save dense tensors on the CPU")
    if not value.is_floating_point():
        raise WeightsError(
            f"{owner} {name} in {value.dtype}, not in floating point: it is quantised; use the "
            "file that it was made from"
        )
    finite = value.float().isfinite()
    if not finite.all():
        raise WeightsError(
            f"{owner} {int((~finite).sum())} of {value.numel()} values in {name} that are NaN or "
            "infinite: its training had failed, or it is damaged; use an earlier checkpoint"
        )


def _from_jax(arrays: dict[str, Tensor], path: Path, vit: nn.Module) -> _Candidate:
    """An original file of google-research (.npz), by timm's own loader."""
    tower = next(name for name in arrays if name.endswith(_OF_JAX)).removesuffix(_OF_JAX)
    arrays = {name: value for name, value in arrays.items() if name.startswith(tower)}  # no texts
    kernel = arrays[tower + _OF_JAX]
    blocks = len({found[1] for found in map(_JAX_BLOCK.search, arrays) if found})
    stacked = (len(value) for name, value in arrays.items() if name.endswith(_JAX_STACK))
    sizes = kernel.shape[-1], blocks or next(stacked, 0)
    read = copy.deepcopy(vit).cpu()
    for parameter in read.parameters():
        nn.init.constant_(parameter, math.nan)  # what stays so is not in the file
    try:
        if not (differ := "; ".join(_differences(sizes, _sizes(vit.state_dict())))):
            read.load_pretrained(str(path))
    except Exception as error:  # KeyError, RuntimeError, ValueError
        differ = first_sentence(error)
    if differ:
        raise WeightsError(
            f"{path} does not fit {type(vit).__name__}: {differ}; use weights of the same "
            "architecture"
        )
    fitted = {name: value for name, value in read.state_dict().items() if not value.isnan().all()}
    # Its embeddings are resampled already; where that was so, the file's own have another shape.
    position = next(value for name, value in arrays.items() if name.endswith("pos_embedding"))
    theirs = {"pos_embed": position, _KERNEL: kernel.permute(3, 2, 0, 1)}
    theirs = {key: one for key, one in theirs.items() if one.shape != fitted[key].shape}
    return _Candidate("", {**fitted, **theirs}, fitted)


def save_weights(model: SigmoidViT, path: Path) -> None:
    """Writes the timm state dict as .safetensors, .pt or .pth, and records the patch grid."""
    write_state(model.vit.state_dict(), path, model.grid)


def write_state(state: dict[str, Tensor], path: Path, grid: tuple[int, int] | None = None) -> None:
    """Writes tensors as .safetensors, or with torch.save as .pt or .pth.

    `path` holds the old file or the new one, never half. `grid` is the patch grid of the position
    embedding: with it the file can be loaded at any image size, not only where timm knows the grid.

    Raises:
        ValueError: another extension. StorageError: a full disk, a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in one of {', '.join(FORMATS)}, which name the format")
    make_folder(path.parent)
    tensors = OrderedDict((key, value.detach().cpu().contiguous()) for key, value in state.items())
    metadata = {GRID_KEY: f"{grid[0]}x{grid[1]}"} if grid else {}
    if path.suffix == ".safetensors":
        content = safetensors.torch.save(tensors, metadata or None)
    else:
        tensors._metadata = {"": metadata}  # where PyTorch keeps what goes with a state dict
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        content = buffer.getvalue()
    write_bytes(path, content)


# What timm looks for in the repository of a model, in its order.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")

# The base of HfHubHTTPError is the error class of the HTTP library that the installed
# huggingface_hub uses: requests, httpx or httpx2.
HUB_ERRORS = (OSError, HfHubHTTPError.__bases__[0])


def save_pretrained(model_name: str, save_dir: Path, overwrite: bool = False) -> Path:
    """Writes a timm model's pretrained weights to a file, in their native resolution, with head.

    Args:
        model_name: of timm, with or without a tag ("vit_small_patch14_dinov2.lvd142m").
        save_dir: a folder, where the file is named `<model_name>.pt`; or the file itself, if it
            ends in .pt, .pth or .safetensors, which decides the format.
        overwrite: False leaves a file that is there as it is, and downloads nothing.

    Returns:
        The path of the file.

    Raises:
        ValueError: timm does not know the model or has no weights for it.
        UnsupportedModelError: SigmoidViT does not work with the model; nothing is downloaded.
        WeightsError: the hub cannot be reached and its cache on this machine has no such weights.
    """
    _refuse_unknown_model(model_name)
    save_dir = Path(save_dir)
    path = save_dir if save_dir.suffix in FORMATS else save_dir / f"{model_name}.pt"
    if path.is_file() and not overwrite:
        return path
    SigmoidViT(timm.create_model(model_name, **default_pool(model_name)))
    save_weights(pretrained(model_name), path)
    return path


def _refuse_unknown_model(model_name: str) -> None:
    if timm.is_model_pretrained(model_name):
        return
    architecture = model_name.partition(".")[0]
    known = timm.list_models()
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=5, cutoff=0)
        raise ValueError(f"timm knows no model {model_name!r}; the closest are {', '.join(close)}")
    tagged = timm.list_pretrained(f"{architecture}.*")
    close = tagged or difflib.get_close_matches(model_name, timm.list_pretrained(), n=5, cutoff=0)
    raise ValueError(
        f"timm has no pretrained weights for {model_name!r}; it has for {', '.join(close)}"
    )


def is_cached(model_name: str) -> bool:
    """Whether the cache of huggingface_hub on this machine has a timm model's weights."""
    repository = timm.get_pretrained_cfg(model_name).hf_hub_id
    cached = (huggingface_hub.try_to_load_from_cache(repository, name) for name in HUB_FILES)
    return bool(repository) and any(isinstance(path, str) for path in cached)


def pretrained(model_name: str) -> SigmoidViT:
    """A timm model with its weights and head, from the hub or its cache, in its own resolution.

    Raises:
        UnsupportedModelError, WeightsError: as `save_pretrained`.
    """
    repository = timm.get_pretrained_cfg(model_name).hf_hub_id
    try:
        if repository and not is_cached(model_name):
            # One question with one timeout (HF_HUB_ETAG_TIMEOUT, 10 s): the download itself asks a
            # dead connection again and again, with a warning each time, for 47 s to many minutes.
            huggingface_hub.file_exists(repository, HUB_FILES[0])
        vit = timm.create_model(model_name, pretrained=True, **default_pool(model_name))
    except HUB_ERRORS as error:
        raise WeightsError(
            f"the Hugging Face hub could not be reached for {model_name} "
            f"({type(error).__name__}: {first_sentence(error)}); run this on a machine with a "
            "connection and copy the file here (then WEIGHTS=<file>), or set HF_HOME to a folder "
            "where huggingface_hub has it"
        ) from error
    except Exception as error:  # of zip, pickle, safetensors, timm: no common class
        raise WeightsError(
            f"timm cannot load the pretrained {model_name} ({first_sentence(error)}); update timm, "
            "or delete the model from the cache of huggingface_hub if its file there is damaged"
        ) from error
    return SigmoidViT(vit)
