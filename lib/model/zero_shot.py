"""Zero-shot classifiers: text embeddings of the classes' names become the head of CLIP or SigLIP.

Such a model was trained to bring a picture and its text together. So the embedding of "a photo of a
sparrow" is a classifier for sparrows, and attention can be edited before anything is trained.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.vit import SigmoidViT

LOG_100 = math.log(100)  # where CLIP's logit_scale ended


class ZeroShotHead(nn.Module):
    """Features of a picture to a score a class: scale x cosine with the class's embedding + bias.

    The scale is part of the classifier's weight, so that training may go on from it as from any
    linear head (as Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", do).

    Args:
        projection: from the width of the model to that of the embeddings: nn.Linear in CLIP,
            nn.Identity in SigLIP.
        width: of the embeddings. classes: their number.
    """

    def __init__(self, projection: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.projection = projection
        self.classifier = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """`[B, dim]` to scores `[B, classes]`."""
        return self.classifier(F.normalize(self.projection(features), dim=-1))


@dataclass(frozen=True)
class TextEmbeddings:
    """What a text tower said of each class: an embedding `[classes, width]`, of any length.

    Attributes:
        names: of the classes, where they are known.
        logit_scale: the logarithm of what cosines are multiplied with, as CLIP and SigLIP have it.
        logit_bias: added to every score, as SigLIP has it.

    Raises:
        ValueError: no matrix, another number of names, a class without direction, or a number that
            is not finite.
    """

    embeddings: Tensor
    names: tuple[str, ...] | None = None
    logit_scale: float = LOG_100
    logit_bias: float = 0.0

    def __post_init__(self) -> None:
        shape = tuple(self.embeddings.shape)
        if len(shape) != 2 or not self.embeddings.numel():
            raise ValueError(f"text embeddings are {shape}; give a matrix, a row a class")
        if self.names is not None and len(self.names) != shape[0]:
            raise ValueError(
                f"{shape[0]} text embeddings have {len(self.names)} names; give one a row"
            )
        lengths = self.embeddings.double().norm(dim=1)
        for row, length in enumerate(lengths.tolist()):
            if not math.isfinite(length) or length == 0:
                name = f" ({self.names[row]})" if self.names else ""
                what = "is all zeros" if length == 0 else "has values that are NaN or infinite"
                raise ValueError(f"text embedding {row}{name} {what}; make it again")
        if not (abs(self.logit_scale) < 15 and math.isfinite(self.logit_bias)):
            raise ValueError(
                f"logit_scale is {self.logit_scale:g}, logit_bias {self.logit_bias:g}; give both "
                "as the model has them: finite, and the scale before exp (CLIP's is 4.6)"
            )

    @property
    def width(self) -> int:
        """Numbers of one embedding."""
        return self.embeddings.shape[1]

    def of(self, classes: Sequence[str]) -> TextEmbeddings:
        """Those of a data set's classes, in its order.

        Raises:
            ValueError: a class has none; without names: another number.
        """
        if self.names is None:
            return replace(self, names=tuple(classes))
        rows = {name: row for row, name in enumerate(self.names)}
        if missing := [name for name in classes if name not in rows]:
            raise ValueError(
                f"no text embedding for {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}; "
                f"there are those of {', '.join(self.names[:3])}{', ...' * (len(self.names) > 3)}"
            )
        chosen = self.embeddings[[rows[name] for name in classes]]
        return replace(self, embeddings=chosen, names=tuple(classes))


def read_embeddings(path: Path) -> TextEmbeddings:
    """Text embeddings from .npy (the matrix alone), .npz or .safetensors.

    The last two have `embeddings` and may have `logit_scale` and `logit_bias`; names are an array
    `names` of texts in .npz, a list in JSON as `names` of the metadata in .safetensors.

    Raises:
        FileNotFoundError: with the path. ValueError: another kind of file, a damaged one, or what
            `TextEmbeddings` refuses.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no text embeddings at {path}; save them there with numpy.savez")
    try:
        arrays = _arrays(path)
    except (OSError, ValueError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read as text embeddings ({error}); save them with numpy.savez"
        ) from error
    if "embeddings" not in arrays:
        raise ValueError(
            f"{path} has {', '.join(arrays) or 'nothing'}, but no embeddings; save them with "
            "numpy.savez(file, embeddings=..., names=...)"
        )
    names = arrays.get("names")
    told = [key for key in ("logit_scale", "logit_bias") if key in arrays]
    try:
        return TextEmbeddings(
            torch.from_numpy(np.asarray(arrays["embeddings"], dtype=np.float32)),
            None if names is None else tuple(str(name) for name in names),
            **{key: np.asarray(arrays[key]).item() for key in told},
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _arrays(path: Path) -> Mapping[str, object]:
    if path.suffix == ".npy":
        return {"embeddings": np.load(path, allow_pickle=False)}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    if path.suffix != ".safetensors":
        raise ValueError("it is not .npy, .npz or .safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        found: dict[str, object] = {
            key: file.get_tensor(key).float().numpy()
            for key in file.keys()  # noqa: SIM118
        }
        names = (file.metadata() or {}).get("names")
    return found if names is None else found | {"names": json.loads(names)}


def zero_shot(
    model: SigmoidViT,
    embeddings: TextEmbeddings | Tensor | np.ndarray | Path | str,
    names: Sequence[str] | None = None,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
) -> None:
    """Makes the classes' text embeddings the head of a CLIP or SigLIP image tower, in place.

    The scores are then what the two towers give together (`logits_per_image`): the scaled cosines
    of the picture's embedding with those of the classes.

    Args:
        model: with its trained weights, and with what they have between the tower and the
            embeddings: for CLIP `create_model(..., num_classes=width of the embeddings)`, whose
            head `load_weights` fills with the projection; for SigLIP, which has none,
            `num_classes=0`. A second call changes the classes.
        embeddings: `[classes, width]`, of any length, or a file (see `read_embeddings`).
        names, logit_scale, logit_bias: see `TextEmbeddings`; they go before those of a file.

    Raises:
        ValueError: embeddings of another width than the model's, a model with two heads, or as
            `read_embeddings`.
    """
    numbers = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    told: dict[str, object] = {
        key: torch.as_tensor(value).item() for key, value in numbers.items() if value is not None
    }
    if names is not None:
        told["names"] = tuple(names)
    if isinstance(embeddings, str | Path):
        embeddings = read_embeddings(Path(embeddings))
    if isinstance(embeddings, TextEmbeddings):
        text = replace(embeddings, **told)
    else:
        text = TextEmbeddings(torch.as_tensor(embeddings).detach().float().cpu(), **told)
    vit = model.vit
    if model.num_read > 1:
        raise ValueError(
            "the head of a distilled model averages two classifiers, and text embeddings are one; "
            "use a CLIP or SigLIP"
        )
    projection = vit.head.projection if isinstance(vit.head, ZeroShotHead) else vit.head
    width = projection.out_features if isinstance(projection, nn.Linear) else vit.num_features
    count = len(text.embeddings)
    if width != text.width:
        raise ValueError(
            f"the text embeddings are {text.width} numbers wide, the model's images {width}; use "
            f"the text tower that belongs to the weights, and create_model(num_classes="
            f"{text.width}) where they have a projection (CLIP), num_classes=0 where not (SigLIP)"
        )
    vit.head = _new_head(vit, projection, width, count)
    with torch.no_grad():
        weight = F.normalize(text.embeddings.double(), dim=-1) * math.exp(text.logit_scale)
        vit.head.classifier.weight.copy_(weight)
        vit.head.classifier.bias.fill_(text.logit_bias)
    vit.num_classes = count
    model.classes = list(text.names) if text.names else None


def head_of_file(vit: nn.Module, state: Mapping[str, Tensor]) -> ZeroShotHead | None:
    """A head like the one in a file of `save_weights`, for as many classes as the model has.

    Args:
        state: in timm's names.
    """
    weight = state.get("head.classifier.weight")
    if weight is None or len(weight) != vit.num_classes:
        return None
    projection: nn.Module = nn.Identity()
    if (inner := state.get("head.projection.weight")) is not None:
        projection = nn.Linear(inner.shape[1], inner.shape[0], "head.projection.bias" in state)
    return _new_head(vit, projection, weight.shape[1], len(weight))


def _new_head(vit: nn.Module, projection: nn.Module, width: int, count: int) -> ZeroShotHead:
    head = ZeroShotHead(projection, width, count).to(next(vit.parameters()))
    return head.train(vit.training)
