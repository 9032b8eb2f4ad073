"""timm's pretrained weights as a file: to keep, and to take to a machine without a connection.

path = save_pretrained("vit_small_patch16_224", Path("models"))
"""

from __future__ import annotations

import difflib
from pathlib import Path

import huggingface_hub
import timm
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from lib.model import FORMATS, SigmoidViT, WeightsError, first_sentence, save_weights

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
    _refuse_unknown(model_name)
    save_dir = Path(save_dir)
    path = save_dir if save_dir.suffix in FORMATS else save_dir / f"{model_name}.pt"
    if path.is_file() and not overwrite:
        return path
    SigmoidViT(timm.create_model(model_name))
    save_weights(SigmoidViT(_fetch(model_name)), path)
    return path


def _refuse_unknown(model_name: str) -> None:
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
        if repository and not _is_cached(repository):
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


def _is_cached(repository: str) -> bool:
    found = (huggingface_hub.try_to_load_from_cache(repository, name) for name in HUB_FILES)
    return any(isinstance(path, str) for path in found)
