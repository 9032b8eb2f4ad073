"""Weights in and out: timm's pretrained ones, other people's files, our own.

What timm must fetch from a hub is fetched once, to a file; what is loaded says what became of it.
"""

from __future__ import annotations

import difflib
import io
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import safetensors
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from lib.files import make_folder, write_bytes
from lib.model.vit import SigmoidViT

FORMATS = (".safetensors", ".pt", ".pth")
GRID_KEY = "patch_grid"  # in a file's metadata: rows and columns of its position embedding, "7x28"
_GRID_HINT = ", and for images that are not square a file of save_weights, which records the grid"


class WeightsError(ValueError):
    """A weights file does not fit the model, or cannot be had or read."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, by parameter name."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]  # the model's own head, when the file has none that fits
    unused: tuple[str, ...]  # in the file, but not in the model
    resampled: tuple[str, ...]  # of `loaded`: embeddings brought to the model's patch grid or size
    misfit: tuple[str, ...]  # of `new`: in the file, but for another number of classes

    def __str__(self) -> str:
        lists = {
            "resampled": self.resampled,
            "new": self.new,
            "of another shape in the file": self.misfit,
            "in the file but unused": self.unused,
        }
        told = [f"{title}: {_some(names)}" for title, names in lists.items() if names]
        return "; ".join([f"{len(self.loaded)} tensors loaded", *told])


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def load_weights(model: SigmoidViT, path: Path) -> LoadReport:
    """Reads a timm or SigmoidViT state dict (.pt, .pth or .safetensors) into `model`.

    Position and patch embeddings are resampled to the model by timm's own functions. The grid
    that they come from is in files of `save_weights`; for others it is taken as timm takes it:
    that of timm's pretrained weights, or else a square. A head of another size, or none, leaves
    the model's own head in place and is reported as new.

    Raises:
        FileNotFoundError: with the path. WeightsError: unreadable, or anything but the head is
            missing or of another shape; nothing is loaded then.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; set WEIGHTS to a .safetensors or .pt file")
    state, grid = _read_state(path)
    state = {key.removeprefix("vit."): value for key, value in state.items()}
    kind = type(model.vit).__name__
    try:
        fitted = _fit_embeddings(state, grid, model.vit)
    except Exception as error:  # timm's conversions of foreign files have no common class
        raise WeightsError(
            f"{path} does not fit {kind}: its embeddings cannot be resampled "
            f"({first_sentence(error)}); use weights of the same architecture{_GRID_HINT}"
        ) from error
    own = model.vit.state_dict()
    misfit = [key for key in own if key in fitted and fitted[key].shape != own[key].shape]
    new = [key for key in own if key not in fitted or key in misfit]
    wrong = [key for key in new if not key.startswith(("head.", "head_dist."))]
    if wrong:
        raise WeightsError(
            f"{path} does not fit {kind}: missing or of another shape: {_some(wrong)}; use weights "
            f"of the same architecture{_GRID_HINT if wrong == ['pos_embed'] else ''}"
        )
    loaded = {key: fitted[key] for key in own if key not in new}
    model.vit.load_state_dict(loaded, strict=False)
    unused = tuple(key for key in fitted if key not in own)
    # Where there is nothing to resample, timm hands on the very tensor.
    resampled = tuple(
        key
        for key in ("pos_embed", "patch_embed.proj.weight")
        if key in loaded and key in state and fitted[key] is not state[key]
    )
    return LoadReport(tuple(loaded), tuple(new), unused, resampled, tuple(misfit))


def _fit_embeddings(
    state: dict[str, Tensor], grid: tuple[int, int] | None, vit: nn.Module
) -> dict[str, Tensor]:
    """The state in timm's names, its embeddings resampled from `grid` to the model's grid."""
    # As timm itself does: these two families were trained on embeddings resized in this way.
    name = getattr(vit, "pretrained_cfg", {}).get("architecture") or ""
    coarse = "flexi" in name or "radio" in name
    how = {"interpolation": "bilinear", "antialias": False} if coarse else {}
    state = dict(state)  # timm's conversions take entries out
    # Where the grid is known, timm must not guess: it takes 7 x 28 patches for 14 x 14.
    position = state.pop("pos_embed", None) if grid else None
    # adapt_layer_scale: DeiT III files have another name for layer scale
    fitted = checkpoint_filter_fn(state, vit, adapt_layer_scale=True, **how)
    if position is None:
        return fitted
    if grid != vit.patch_embed.grid_size:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        position = resample_abs_pos_embed(position, vit.patch_embed.grid_size, grid, prefix, **how)
    return {**fitted, "pos_embed": position}


def _read_state(path: Path) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """Tensors by name, and the patch grid of the position embedding if the file records it."""
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(state, dict):
                state = state.get("model", state.get("state_dict", state))
            metadata = getattr(state, "_metadata", {}).get("", {})
    except pickle.UnpicklingError as error:  # its own text advises to run the code in the file
        raise WeightsError(
            f"{path} cannot be read as weights: it holds something else than tensors, which is "
            "never run; save model.state_dict()"
        ) from error
    except Exception as error:  # zip and header errors have no common class
        raise WeightsError(
            f"{path} cannot be read as weights ({first_sentence(error)}); copy or save it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path} holds no state dict of tensors; save model.state_dict()")
    grid = metadata.get(GRID_KEY)
    return state, tuple(map(int, grid.split("x"))) if grid else None


def first_sentence(error: Exception) -> str:
    """The first sentence of an error, without its advice."""
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


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
    SigmoidViT(timm.create_model(model_name))
    save_weights(SigmoidViT(_fetch(model_name)), path)
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


def _fetch(model_name: str) -> nn.Module:
    """The pretrained model, from the hub or its cache."""
    repository = timm.get_pretrained_cfg(model_name).hf_hub_id
    try:
        cached = (huggingface_hub.try_to_load_from_cache(repository, name) for name in HUB_FILES)
        if repository and not any(isinstance(path, str) for path in cached):
            # One question with one timeout (HF_HUB_ETAG_TIMEOUT, 10 s): the download itself asks a
            # dead connection again and again, with a warning each time, for 47 s to many minutes.
            huggingface_hub.file_exists(repository, HUB_FILES[0])
        return timm.create_model(model_name, pretrained=True)
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
