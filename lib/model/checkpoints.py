"""Other people's checkpoints: from a file of any kind to tensors by name, and where a ViT is in it.

Nesting and prefixes are one thing here: tensors get the path to them as their name, joined by
dots, and a ViT is wherever, below some prefix, the names are such as timm or `convert.py` knows.
The content of a file decides what kind it is, its suffix does not. No code in a file is ever
imported or run.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

GRID_KEY = "patch_grid"  # in a file's metadata: rows and columns of its position embedding, "7x28"

# What torch.compile and wrappers for many GPUs put into names, at any place.
_WRAPPERS = r"(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)"
_WRAPPER = re.compile(rf"(?<=\.){_WRAPPERS}")

# One tensor of every naming that can be converted; what precedes it is the prefix.
_ROOT = re.compile(
    r"(|.*?\.)(?:patch_embed\." + _WRAPPERS + r"*proj\.weight"
    r"|visual\.class_embedding|(?:visual\.)?ln_pre\.weight"  # CLIP, PE
    r"|embeddings\.patch_embeddings?\.(?:projection\.)?weight"  # transformers
    r"|conv_proj\.weight"  # torchvision
    r"|beit3\.vision_embed\.proj\.weight|preprocessor\.patchifier\.proj\.weight"
    r"|radio_model\.model\.patch_generator\.embedder\.weight)"
)
_CHUNK = re.compile(r"blocks\.(\d+)\.(\d+)\.")  # DINOv2's training: blocks.<chunk>.<block>

# Averaged over training, so better than what learns; the second is taken only if nothing else fits.
_AVERAGES = {"teacher", "ema", "target", "momentum", "averaged", "swa"}
_LEARNERS = {"student", "online", "optimizer"}

# Part of a tensor's name, and who names tensors so, in models that are not converted.
_FOREIGN = {"patch_embed.projection.weight": "OpenMMLab"}
_LEGACY_TORCH = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the number that torch.save wrote first, before 1.6
_BEGINNINGS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run git lfs pull",
    b"<": "is a web page, not weights; download the file (on the hub: /resolve/, not /blob/)",
    b"{": "is a text in JSON, such as the list of a model's parts; make one file of the parts",
    b"\x1f\x8b": "is a compressed archive; unpack it first",
    b"\x89HDF": "is an HDF5 file, as Keras writes it; save the weights with safetensors",
    b"\x93NUMPY": "is a single array of NumPy; name a file with all tensors",
    b"\x80": "is a plain pickle, which is never run; save the weights with safetensors",
}


class WeightsError(ValueError):
    """A weights file does not fit the model, or cannot be had or read."""


def first_sentence(error: Exception) -> str:
    """The first sentence of an error, without its advice."""
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def some(names: Sequence[str], most: int = 6) -> str:
    """The first names of many, for a sentence."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_checkpoint(path: Path) -> tuple[object, tuple[str, ...]]:
    """What a file of torch.save, safetensors or NumPy (.npz) holds, on the CPU.

    Returns:
        the content, usually nested dicts; names of what stands beside the tensors and was passed
        over, such as "argparse.Namespace": nothing of it is imported.

    Raises:
        WeightsError: another kind of file, which is named, or a damaged one.
    """
    kind = _kind_of_file(path)
    try:
        if kind == "safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            state = OrderedDict(safetensors.torch.load_file(path))
            state._metadata = {"": metadata}  # where `write_state` has it in files of torch.save
            return state, ()
        if kind == "npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            numbers = {key: value for key, value in arrays.items() if value.dtype.kind not in "SU"}
            return {key: torch.from_numpy(value) for key, value in numbers.items()}, ()
        return _torch_load(path)
    except pickle.UnpicklingError as error:  # its own text advises to run the code in the file
        name = re.search(r"GLOBAL (.+?)(?: was not | whose |$)", str(error))
        what = f"holds {name[1]} beside tensors" if name else "is not pickled as torch.save does it"
        raise WeightsError(
            f"{path} cannot be read as weights: it {what}, and is never run; where it was made, "
            "save model.state_dict() alone"
        ) from error
    except Exception as error:  # zip and header errors have no common class
        raise WeightsError(
            f"{path} cannot be read as weights ({first_sentence(error)}); copy or save it again"
        ) from error


def _kind_of_file(path: Path) -> str:
    """ "torch", "safetensors" or "npz"; WeightsError says what else a file is."""
    if path.is_dir():
        suffixes = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
        inside = sorted(one.name for one in path.iterdir() if one.suffix.lower() in suffixes)
        raise WeightsError(f"{path} is a folder; name the file in it ({some(inside) or 'none'})")
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        raise WeightsError(f"{path} is empty; copy or save it again")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "safetensors"
    if _LEGACY_TORCH in head[:40]:
        return "torch"
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    for beginning, what in _BEGINNINGS.items():
        if text.startswith(beginning):
            raise WeightsError(f"{path} {what}")
    if head[257:262] == b"ustar":
        raise WeightsError(f"{path} is an archive of tar; unpack it first")
    raise WeightsError(
        f"{path} cannot be read as weights: it begins with {head[:16]!r}, which no file of "
        "torch.save, safetensors or NumPy does; copy or save it again"
    )


def _kind_of_zip(path: Path) -> str:
    try:
        names = zipfile.ZipFile(path).namelist()
    except zipfile.BadZipFile as error:
        raise WeightsError(
            f"{path} cannot be read as weights: its end is missing; copy or save it again"
        ) from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(
            f"{path} is a TorchScript archive, a program with its weights, which is never run; "
            "where the file was made, save model.state_dict()"
        )
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if not any(name.endswith("data.pkl") for name in names):
        raise WeightsError(f"{path} is a zip archive of {some(names)}; unpack it first")
    return "torch"


def _torch_load(path: Path) -> tuple[object, tuple[str, ...]]:
    zipped = zipfile.is_zipfile(path)  # what torch.save writes since 1.6
    if zipped and (damaged := zipfile.ZipFile(path).testzip()):  # PyTorch does not ask
        raise OSError(f"{damaged} in it is damaged")
    with open(path, "rb") as file:  # of a path, PyTorch would believe the suffix
        try:
            return torch.load(file, map_location="cpu", weights_only=True), ()
        except pickle.UnpicklingError:
            if not zipped or not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
                raise  # a file of PyTorch before 1.6; this PyTorch is before 2.6
        # Settings of a trainer, paths, numbers of NumPy: still read as tensors only, with a class
        # that does nothing in place of each name.
        file.seek(0)
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        file.seek(0)
        try:
            with torch.serialization.safe_globals([_stand_in(name) for name in names]):
                return torch.load(file, map_location="cpu", weights_only=True), tuple(names)
        except Exception as error:  # of any class, from what PyTorch does with the stand-ins
            raise pickle.UnpicklingError(f"GLOBAL {some(names)}") from error


def _stand_in(full_name: str) -> type:
    """A class of that name whose objects are empty, whatever they are made with."""
    module, _, name = full_name.rpartition(".")
    if module.startswith("numpy"):  # has its state as a tuple
        methods = {"__init__": lambda self, *args: None, "__setstate__": lambda self, state: None}
    else:  # PyTorch fills no other class than this one, should the original be a dict
        methods = {"__new__": lambda cls, *args: OrderedDict()}
    return type(name, (), {"__module__": module, **methods})


def flatten(content: object) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """Tensors by their path in nested dicts, and patch grids by the path of who records one."""
    tensors, grids = {}, {}
    for path, value in _with_paths(content, "", ()):
        if isinstance(value, Tensor):
            tensors[path] = value
        elif grid := _own_grid(value):
            grids[path] = tuple(map(int, grid.split("x")))
    return tensors, grids


def _own_grid(value: object) -> str | None:
    metadata = getattr(value, "_metadata", None)  # others use that name, too
    root = metadata.get("") if isinstance(metadata, Mapping) else None
    grid = root.get(GRID_KEY) if isinstance(root, Mapping) else None
    return grid if re.fullmatch(r"\d+x\d+", str(grid)) else None


def _with_paths(value: object, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, object]]:
    yield path, value
    if isinstance(value, Mapping) and id(value) not in above:
        for key, child in value.items():
            yield from _with_paths(
                child, f"{path}.{key}" if path else str(key), (*above, id(value))
            )


def find_prefixes(names: Sequence[str]) -> list[str]:
    """What stands before the names of a ViT, for every ViT that is there, the best one first.

    Averages (teacher, EMA, target or momentum encoder) come before all others, and students
    (online networks) last; among equals, the shortest prefix comes first.
    """

    def rank(prefix: str) -> tuple[int, int]:
        words = {*re.split(r"[^a-z]+", prefix.lower())}
        return bool(words & _LEARNERS) - bool(words & _AVERAGES), len(prefix)

    found = (_ROOT.fullmatch(name) for name in names)
    return sorted(dict.fromkeys(match[1] for match in found if match), key=rank)


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors behind a prefix, without it, without wrappers, their blocks in one row."""
    state = {
        _WRAPPER.sub("", name.removeprefix(prefix)): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    chunked = {name: match for name in state if (match := _CHUNK.match(name))}
    blocks = sorted({(int(match[1]), int(match[2])) for match in chunked.values()})
    for name, match in chunked.items():
        index = blocks.index((int(match[1]), int(match[2])))
        state[f"blocks.{index}.{name[match.end() :]}"] = state.pop(name)
    return state


def describe(content: object, tensors: Mapping[str, Tensor]) -> str:
    """What a file holds in which no ViT was found, and what to do."""
    for part, who in _FOREIGN.items():
        if any(part in name for name in tensors):
            return (
                f"its tensors have the names of {who}, which are not converted; timm has most "
                "such weights under names of its own (python -m lib weights --model-name)"
            )
    names = [str(key) for key in content] if isinstance(content, Mapping) else []
    groups = Counter(name.partition(".")[0] for name in tensors)
    told = []
    for group, count in groups.items() if names else ():
        name = next(name for name in tensors if name.partition(".")[0] == group)
        example = f"{name} of {shape_of(tensors[name])}"
        told.append(example if count == 1 else f"{group} ({count} tensors such as {example})")
    told += [name for name in names if name.partition(".")[0] not in groups]
    what = some(told, 4) or f"a {type(content).__name__} without names"
    return f"it holds {what}, and no state dict as timm has it; save model.state_dict()"


def shape_of(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"
