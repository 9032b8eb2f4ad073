"""Command line of Sigmoid Attention ViT: the same functions as the notebooks.

The environment variable PRESET chooses the data set ("toy" when unset), see lib/config.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import tyro

from lib import bench, evaluate
from lib.config import ROOT, preset
from lib.model import UnsupportedModelError, WeightsError
from lib.pretrain import pretrain
from lib.train import RunConflict, TrainingDiverged

# Mistakes that a person can mend: told in one sentence, exit code 2, no traceback.
EXPECTED = (
    OSError,
    RunConflict,
    TrainingDiverged,
    UnsupportedModelError,
    ValueError,
    WeightsError,
)


def demo(
    seeds: int = 1, epochs: int | None = None, overwrite: bool = False, out: Path | None = None
) -> None:
    """The whole experiment: fine-tune, train with human attention, evaluate, compare.

    Args:
        seeds: number of training seeds; the table gives mean and standard deviation.
        epochs: of each stage; those of the preset by default.
        overwrite: train again even where a finished run is there.
        out: folder of the result; result/result%Y%m%d_%H%M below the repository by default.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; train with 1 or more")
    config = preset()
    if epochs is not None:
        config.ft, config.hitl = (replace(part, epochs=epochs) for part in (config.ft, config.hitl))
    trials = evaluate.train_comparison(config, range(seeds), overwrite)
    images = evaluate.evaluate_trials(trials)
    folder = evaluate.write_report(config, trials, images, out)
    table = evaluate.comparison_table(evaluate.by_seed(images))
    print(f"\npreset {config.preset}, {seeds} seed{'s' * (seeds > 1)}, test images\n")
    print(table.to_string())
    print(f"\nfigures and tables: {folder}")


def make_trunk(
    path: Path = ROOT / "models" / "toybirds_vit.safetensors",
    images: int = 4000,
    epochs: int = 7,
    seed: int = 0,
) -> None:
    """Make the toy preset's pretrained trunk again (about two minutes on a CPU).

    Args:
        path: where the trunk goes.
        images: number of drawn images.
        epochs: passes over them.
        seed: of the data and the weights.
    """
    accuracy = pretrain(preset("toy"), path, images, epochs, seed)
    print("accuracy on new images: " + ", ".join(f"{k} {v:.3f}" for k, v in accuracy.items()))


def speed(
    name: str = "vit_small_patch16_224",
    image_size: int = 224,
    batch_size: int = 16,
    rounds: int = 12,
) -> None:
    """One training step of ours against plain timm's, in turns.

    Args:
        name: timm model.
        image_size: pixels.
        batch_size: images a step.
        rounds: measured turns.
    """
    table = bench.medians(bench.training_steps(name, image_size, batch_size, rounds))
    print(f"{name}, {image_size} pixels, batch {batch_size}: median of {rounds} turns\n")
    print(table.round(3).to_string())


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    commands = {"demo": demo, "pretrain": make_trunk, "bench": speed}
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m lib", description=__doc__, args=arguments
        )
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
