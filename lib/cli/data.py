"""Commands about data and weights: fetch, split, check."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lib.config import PRESETS, ROOT, Config, asked, preset, resolved, there

if TYPE_CHECKING:
    from lib.data.check import Finding
    from lib.model.vit import SigmoidViT

# Each command imports what it needs itself: help and downloads do not wait for PyTorch.

# As the original tool names them; others are <data set>_dataset.json.
SPLIT_FILES = {"cub2011": "cub200_2011_dataset.json", "cub2010": "cub200_2010_dataset.json"}


def weights(
    model_name: str = "vit_small_patch16_224",
    save_dir: Path = ROOT / "models",
    overwrite: bool = False,
) -> None:
    """Save timm's pretrained weights to a file, where the presets look for them.

    Args:
        model_name: any that works (see `models`), e.g. vit_small_patch14_dinov2.
        save_dir: folder of <model name>.pt; or the file itself, ending in .pt or .safetensors.
        overwrite: fetch and write again even where the file is there.
    """
    from lib.model.weights import save_pretrained

    print(f"{save_pretrained(model_name, save_dir, overwrite)} is ready")


def split(
    N: Annotated[float, tyro.conf.arg(name="N")] = 0.8,
    shuffle: bool = False,
    seed: int = 0,
    official: bool = False,
    val_share: float = 0.0,
    out: Path | None = None,
) -> None:
    """Split the data set into train and test, class by class, and write it as JSON.

    PRESET chooses the data set (cub2011 when unset). The last line says how to train with it.

    Args:
        N: share of each class that is for training; the rest is for testing.
        shuffle: shuffle each class before it is split.
        seed: of the shuffle, and of the validation images.
        official: the split that the data set was published with, instead of N.
        val_share: share of each class's training images to name as validation images in the file;
            with 0 they are carved from train when the file is read.
        out: the file; <data folder>/cub200_2011_dataset.json by default.
    """
    from lib.data import splits
    from lib.data.dataset import DATA_SETS

    name = os.environ.get("PRESET") or "cub2011"
    if name == "toy":
        raise ValueError("toy birds are drawn in parts and need no split; set PRESET to another")
    config = preset(name).data
    listing = DATA_SETS[config.name].pictures(config.root)
    if not official:
        made = splits.per_class(listing.rows, listing.label_list, N, shuffle, seed)
    elif listing.published:
        made = listing.published
    else:
        raise ValueError(f"{listing.home} comes without a split of its own; leave out --official")
    if val_share:
        made = splits.with_validation(made, val_share, seed)
    out = out or config.root / SPLIT_FILES.get(name, f"{name}_dataset.json")
    splits.write_split(made, out)
    parts = [f"{len(getattr(made, part))} {part}" for part in ("train", "val", "test")]
    print(f"{out}: {', '.join(parts)} images of {len(made.label_list)} classes")
    chosen = {"SPLIT": str(resolved(out)), "PRESET": name}
    if asked("DATA_DIR"):
        chosen["DATA_DIR"] = str(config.root)
    words = " ".join(f"{variable}={shlex.quote(value)}" for variable, value in chosen.items())
    print(f"to train with it: {words} make demo")


def fetch(
    name: tyro.conf.Positional[Literal["cub2011", "cub-gha"]], to: Path = ROOT / "datasets"
) -> None:
    """Download a published data set; a second call goes on where the first stopped.

    Args:
        name: cub2011 is CUB-200-2011 (1.15 GB), cub-gha the human gaze for it (6 MB).
        to: folder that receives it.
    """
    from lib.data.download import download

    download(name, to)


def check(
    name: tyro.conf.Positional[Literal[PRESETS] | None] = None,
    details: Path | None = None,
    json: bool = False,
) -> int:
    """Read every picture, every human map and the weights once and say what is wrong, and what is
    not read; exit code 1 if training or its evaluation would fail.

    Args:
        name: the preset; PRESET when left out.
        details: a .csv file to write every single finding to.
        json: print one JSON object and nothing else, for scripts.
    """
    from lib.data.check import Finding, Report, check_data
    from lib.files import write_text
    from lib.training.runs import bare_model, fine_tuning

    with redirect_stdout(sys.stderr):  # whatever a library says is no part of the report
        try:
            config = preset(name)
        except (OSError, ValueError) as error:  # of a variable; nothing else can be known then
            config, root = None, resolved(asked("DATA_DIR") or ROOT / "datasets")
            report = Report((Finding("path: cannot be used", "", "", str(error)),))
        else:
            root = config.data.root
            try:
                model = bare_model(fine_tuning(config, seed=0), num_classes=0)
            except (OSError, ValueError) as error:
                report = check_data(config.data, (14, 14))
                findings = [Finding("model: cannot be used", "", "", str(error))]
            else:
                report = check_data(config.data, model.grid)
                findings = [*_about_weights(model, config)]
                if not (findings or report.stops_training):  # else that is what to mend first
                    findings = [*_about_zero_shot(config)]
            report = replace(report, findings=(*findings, *report.findings))
    shown = config.preset if config else name or asked("PRESET")
    if json:
        print(dumps({"preset": shown, "root": str(root)} | report.to_plain(), indent=2))
    else:
        print(f"preset {shown}: {root}\n\n{report.in_words(root)}\n")
        print(report.verdict)
    if details is not None:
        write_text(details, report.details().to_csv(index=False))
        print(f"{len(report.findings)} findings: {details}", file=sys.stderr)
    return int(report.stops_training)


def _about_weights(model: SigmoidViT, config: Config) -> Iterator[Finding]:
    """What would go wrong with the weights that training starts from."""
    from lib.data.check import NO_WEIGHTS, Finding
    from lib.model.weights import load_weights

    path = config.model.weights
    if path is None:
        return
    try:
        there("WEIGHTS")  # names all places where they were looked for
        load_weights(model, path)
    except FileNotFoundError as error:
        yield Finding(NO_WEIGHTS, "", "", str(error))
    except (OSError, ValueError) as error:
        yield Finding("weights: cannot be used", "", "", str(error))


def _about_zero_shot(config: Config) -> Iterator[Finding]:
    """What would go wrong with the head that is made of the classes' text embeddings."""
    from lib.data.check import Finding
    from lib.data.dataset import read_records
    from lib.model.zero_shot import read_embeddings, zero_shot
    from lib.training.runs import bare_model, fine_tuning
    from lib.training.state import load_start

    if config.model.zero_shot is None:
        return
    try:
        text = read_embeddings(config.model.zero_shot)
        model = bare_model(fine_tuning(config, seed=0), text.width)
        load_start(model, config.model)  # may bring what lies between the tower and the texts
        zero_shot(model, text.of(read_records(config.data, "train")[1]))
    except (OSError, ValueError) as error:
        yield Finding("path: cannot be used", "", "", f"ZERO_SHOT: {error}")
