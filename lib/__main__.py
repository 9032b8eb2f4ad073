"""Command line of Sigmoid Attention ViT: the same functions as the notebooks.

The environment variable PRESET chooses the data set ("toy" when unset), see lib/config.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from lib.config import (
    PRESETS,
    RECIPES,
    ROOT,
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    Sweep,
    TrainConfig,
    file_md5,
    preset,
)

# Each command imports what it needs itself: help and downloads do not wait for PyTorch.

SPLIT_NAMES = {
    "cub2011": "cub200_2011_dataset.json",
    "cub2010": "cub200_2010_dataset.json",
    "folder": "folder_dataset.json",
}

T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]  # the fields of a dataclass as options without a prefix


@dataclass
class Training:
    """Options of both steps of `train`, beside the fields of TrainConfig."""

    data: DataConfig
    model: ModelConfig
    name: str | None = None  # of the run; ft-s<seed> or hitl-<loss>-s<seed> when left out
    # where the values below come from; "original" is that of the first experiment
    recipe: Literal[tuple(RECIPES)] = "tuned"
    resume: bool = False  # go on where a run of that name was stopped; options must be as they were
    overwrite: bool = False  # train again in the place of a run of that name


# Mistakes that a person can mend: told in one sentence, exit code 2, no traceback; the last one
# is a loss that is not finite.
EXPECTED = (OSError, ValueError, FloatingPointError)


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
    from lib import evaluate, report

    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; train with 1 or more")
    config = preset()
    if epochs is not None:
        config.ft, config.hitl = (replace(part, epochs=epochs) for part in (config.ft, config.hitl))
    trials = evaluate.train_comparison(config, range(seeds), overwrite)
    images = evaluate.evaluate_trials(trials)
    folder = report.write_report(trials, images, out, command=_called())
    table = evaluate.comparison_table(evaluate.by_seed(images))
    print(f"\npreset {config.preset}, {seeds} seed{'s' * (seeds > 1)}, test images\n")
    print(table.to_string())
    print(f"\nfigures and tables: {folder}")


def train(arguments: list[str]) -> None:
    """Train one model: `train ft` from pretrained weights, `train hitl` from a run.

    Args:
        arguments: "ft" or "hitl" and its options; every field of the configuration is one.
    """
    # The recipe changes what the other options start from, so it is read first.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", default=os.environ.get("RECIPE") or "tuned")
    recipe = first.parse_known_args(arguments)[0].recipe
    config = preset(recipe=recipe)
    given = Training(config.data, config.model, recipe=recipe)

    def fine_tune(run: Flat[Training] = given, train: Flat[TrainConfig] = config.ft) -> None:
        """Step 1: cross entropy only, from pretrained weights and a new head."""
        _train_one(config, run.name or f"ft-s{train.seed}", run, train)

    def hitl(
        init: str, run: Flat[Training] = given, train: Flat[TrainConfig] = config.hitl
    ) -> None:
        """Step 2: with human attention as one more term of the loss, from a trained run.

        Args:
            init: name of the run to start from.
        """
        name = run.name or f"hitl-{train.human.loss}-s{train.seed}"
        _train_one(config, name, run, train, init)

    tyro.extras.subcommand_cli_from_dict(
        {"ft": fine_tune, "hitl": hitl},
        prog="python -m lib train",
        description="Train one model; PRESET chooses data and model (see lib/config.py).",
        args=arguments,
    )


def _train_one(
    config: Config, name: str, given: Training, train: TrainConfig, init: str | None = None
) -> None:
    """`train_run`, for a person who may not know that the run is there."""
    from lib.runs import finished_run, train_run
    from lib.train import processes

    folder, resume, overwrite = config.runs / name, given.resume, given.overwrite
    if resume and overwrite:
        raise ValueError("--resume and --overwrite are given; the one keeps what the other drops")
    if (folder / "config.json").is_file() and not (resume or overwrite):
        stands = "is finished" if finished_run(folder) else "was stopped half way"
        raise FileExistsError(
            f"{folder} exists and {stands}; go on with --resume, train again with --overwrite, or "
            "choose another --name"
        )
    if resume and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no run that could be resumed; leave out --resume")
    data = given.data
    if data.split_file is not None:
        data = replace(data, split_md5=file_md5(data.split_file))
    run = RunConfig(data, given.model, train, init)
    found = train_run(name, run, config.runs, overwrite)
    if processes().is_main_process:
        last = found.history.iloc[-1]
        print(f"{folder}: {last['epoch']:.0f} epochs, validation accuracy {last['val_top1']:.3f}")


def evaluate_runs(
    runs: tyro.conf.Positional[tuple[str, ...]],
    against: str | None = None,
    split: Literal["test", "val", "train"] = "test",
    which: Literal["last", "best"] = "last",
    out: Path | None = None,
    gallery: int = 12,
    gallery_rule: Literal["order", "change"] = "order",
    erase: int = 0,
    curves: int = 0,
    tokens: int = 0,
) -> None:
    """Measure trained models side by side: tables, paired tests, figures, a gallery page.

    Args:
        runs: names below the PRESET's runs folder, such as ft-s0 or sweep/NAME, or paths of runs.
            Those that differ in their -s<seed> alone are one model of the tables.
        against: the model that the others are compared with; the control where there is one, else
            the first.
        split: images to measure on.
        which: weights of the last epoch, or of the one that was best on the validation images.
        out: folder of the result; result/result%Y%m%d_%H%M below the repository by default. A row
            a run is added to summary.csv beside it.
        gallery: pictures whose prediction was fixed, and as many that were broken, for each model
            on the gallery page; 0 makes no page.
        gallery_rule: the first in the order of the data set, or the largest changes.
        erase: is the attention causal? Erase what a model looks at, on so many images, about 12
            forward passes each; 0 does not ask.
        curves: deletion and insertion curves of so many images, about 80 forward passes each.
        tokens: outlying tokens and attention on background of so many images.
    """
    from lib import evaluate, probes, report
    from lib.files import make_folder
    from lib.summary import read_summary

    config = preset()
    trials = report.load_trials(runs, config.runs, which)
    against = report.yardstick_variant(trials, against)
    parent = ROOT / "result" if out is None else out.resolve().parent
    make_folder(out or parent)  # what cannot be written is found out now, not after measuring
    read_summary(parent / "summary.csv")
    if gallery < 0:
        raise ValueError(f"gallery is {gallery}; use 0 for no gallery, or a number of pictures")
    dataset = report.common_dataset(trials, split, against)
    probed = probes.probe(trials, dataset, erase, curves, tokens, which)
    images = evaluate.measure_runs(trials, dataset, config.runs / "tokens", which)
    folder = report.write_report(
        trials, images, out, against, split, which, gallery, gallery_rule, _called(), dataset,
        probed,
    )  # fmt: skip
    print((folder / "result.txt").read_text(encoding="utf-8"))
    print(f"figures and tables: {folder}")


def _called() -> str:
    """The command line as it could be typed again."""
    chosen = f"PRESET={os.environ['PRESET']} " if os.environ.get("PRESET") else ""
    return f"{chosen}python -m lib {shlex.join(sys.argv[1:])}"


def sweep(
    axes: Flat[Sweep] = Sweep(),  # noqa: B008
    jobs: int = 1,
    keep_weights: bool = False,
    out: Path | None = None,
) -> int:
    """Train and measure every combination of settings; exit code 1 if one of them failed.

    The same command again goes on where it was stopped. What is measured is kept in
    runs/<preset>/sweep and never trained again.

    Args:
        axes: what is combined.
        jobs: trainings at a time. They share the processor cores, or the GPU.
        keep_weights: keep the weights of every training; else they go when it is measured.
        out: the table, a row a training and split (val, test) of all sweeps of this preset;
            sweep.csv in the runs folder of the preset by default.
    """
    from lib.sweep import run_sweep

    config = preset()
    out = out or config.runs / "sweep.csv"
    try:
        table, failed = run_sweep(config, axes, out, jobs, keep_weights)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on. What is measured: {out}", file=sys.stderr)
        return 130
    for name, failure in failed.items():
        print(f"{name} failed: {failure}", file=sys.stderr)
    print(f"{len(failed)} trainings failed; {len(table)} rows: {out}")
    return int(bool(failed))


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
    from lib.pretrain import pretrain

    accuracy = pretrain(preset("toy"), path, images, epochs, seed)
    print("accuracy on new images: " + ", ".join(f"{k} {v:.3f}" for k, v in accuracy.items()))


def speed(
    name: str = "vit_small_patch16_224",
    image_size: int = 224,
    batch_size: int | None = None,
    rounds: int = 8,
    loading: bool = True,
    workers: int | None = None,
    bf16: bool | None = None,
    compile: bool = False,
) -> None:
    """One training step of ours against plain timm's and explicit attention's, in turns.

    Pictures to load are those of the PRESET; for the toy preset JPEGs are drawn.

    Args:
        name: timm model.
        image_size: pixels.
        batch_size: images a step; 128 on a GPU and 16 on a CPU when left out.
        rounds: measured turns.
        loading: measure each way with the loading of its pictures as well.
        workers: processes that load; when left out, the CPU cores on a GPU machine, else 0.
        bf16: measure automatic mixed precision as well; when left out, on a GPU.
        compile: measure with torch.compile as well, which takes minutes to compile.
    """
    import tempfile

    import torch

    from lib import bench

    config, on_gpu = preset(), torch.cuda.is_available()
    batch_size = batch_size or (128 if on_gpu else 16)
    workers = (os.cpu_count() or 0) * on_gpu if workers is None else workers
    with tempfile.TemporaryDirectory() as folder:
        pictures = None
        if loading and config.preset == "toy":
            pictures = bench.draw_pictures(Path(folder), batch_size)
        elif loading:
            pictures = config.data
        table = bench.training_steps(
            name, image_size, batch_size, rounds, bf16=bf16, compile=compile, pictures=pictures,
            workers=workers,
        )  # fmt: skip
    print(f"{name}, {image_size} pixels, batch {batch_size}: median of {rounds} turns")
    if loading:
        source = "drawn JPEGs" if config.preset == "toy" else config.preset
        kept = " from the decoded cache" if pictures.cache else ""
        print(f"loaded: {source}{kept}, {workers} processes that load")
    asked = {"bf16": bf16, "torch.compile": compile}
    print(bench.conditions([part for part in bench.GPU_ONLY if not asked.get(part)]) + "\n")
    print(bench.step_summary(table).round(3).to_string())


def memory(
    name: str = "vit_small_patch16_224",
    image_size: int = 224,
    batch_size: int | None = None,
    bf16: bool = False,
    repeats: int = 3,
) -> None:
    """Peak memory of training: plain timm, explicit attention, ours with all blocks supervised.

    Args:
        name: timm model.
        image_size: pixels.
        batch_size: images a step; 128 on a GPU and 16 on a CPU when left out.
        bf16: automatic mixed precision.
        repeats: processes a way, one after the other.
    """
    import torch

    from lib import bench

    batch_size = batch_size or (128 if torch.cuda.is_available() else 16)
    table = bench.peak_memory(name, image_size, batch_size, bf16, repeats)
    table["MB"] = table["bytes"] / 1e6
    found = table.groupby("way", sort=False).agg(
        MB=("MB", "median"), least=("MB", "min"), most=("MB", "max"), of_plain=("ratio", "median")
    )
    kind = "allocated on the GPU" if torch.cuda.is_available() else "address space"
    print(f"{name}, {image_size} pixels, batch {batch_size}, peak of a training, {kind}")
    print(bench.conditions(["the memory of a GPU"]) + "\n")
    print(found.rename(columns={"of_plain": "of plain"}).round(3).to_string())


def cached(epochs: int = 10, all_epochs: bool = False) -> None:
    """Training the last block of the PRESET's model: whole model each step, or cached tokens.

    Args:
        epochs: of the training.
        all_epochs: run all of them with the whole model too, instead of one, counted so often.
    """
    from lib import bench

    config = preset()
    table = bench.cached_epochs(config, epochs, all_epochs)
    print(f"preset {config.preset}, {config.model.name}, seconds of {epochs} epochs")
    if not all_epochs:
        print(f"whole model: one epoch measured and counted {epochs} times (--all-epochs runs all)")
    print(bench.conditions(["the time on a GPU"]) + "\n")
    print(table.round(2).to_string())
    factor = table.loc["whole model", "total"] / table.loc["cached tokens", "total"]
    print(f"\ncached tokens, caching included: {factor:.1f} times faster")


def editing(name: str = "vit_small_patch16_224", image_size: int = 224, rounds: int = 30) -> None:
    """An attention edit to new class scores, trunk cached, against a full forward pass, in turns.

    Args:
        name: timm model.
        image_size: pixels.
        rounds: measured turns.
    """
    from lib import bench

    found = bench.medians(bench.live_edits(name, image_size, rounds))
    found["milliseconds"] = 1e3 * found.pop("seconds")
    found = found.rename(columns={"ratio": "times faster"})[["milliseconds", "times faster"]]
    print(f"{name}, {image_size} pixels, one image: median of {rounds} turns\n")
    print(found.round(2).to_string())


def loading(images: int = 256, rounds: int = 5) -> None:
    """Reading training pictures: decoded every time against the decoded cache, in turns.

    Args:
        images: how many pictures of the PRESET are read.
        rounds: measured turns.
    """
    from lib import bench
    from lib.runs import bare_model, fine_tuning

    config = preset()
    if config.preset == "toy":
        raise ValueError("toy birds are drawn, not decoded; set PRESET to another")
    grid = bare_model(fine_tuning(config, seed=0), num_classes=0).grid
    table, cost = bench.image_loading(config.data, grid, images, rounds)
    found = bench.medians(table)
    found["pictures a second"] = cost["pictures"] / found["seconds"]
    print(f"{cost['pictures']} training pictures, one process: median of {rounds} turns\n")
    print(found.round(3).to_string())
    print(
        f"\nbuilt in {cost['seconds to build']:.1f} s; a picture takes "
        f"{cost['bytes a picture, cache'] / 1e3:.0f} kB on disk "
        f"({cost['bytes a picture, JPEG'] / 1e3:.0f} kB as JPEG)"
    )


def teaching(
    seeds: int = 3, counts: tuple[int, ...] = (5, 16, 28), only_tags: bool = False
) -> None:
    """What SIMULATED corrections of drawn birds teach, beside a control and shuffled corrections.

    Accuracy on test images whose tag names another class; mean and standard deviation over seeds.

    Args:
        seeds: number of fine-tuned models to teach; they are trained where they are not there.
        counts: numbers of corrections.
        only_tags: paint the tag to 0 and nothing else.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    from lib import evaluate
    from lib.runs import fine_tuning, train_run
    from lib.teach import simulated_teaching

    if seeds < 1 or not counts or min(counts) < 1:
        raise ValueError(f"seeds is {seeds} and counts {counts}; give 1 or more of each")
    config, counts = preset("toy"), sorted(counts)
    found = []
    for seed in tqdm(range(seeds), desc="seeds"):
        run = train_run(f"ft-s{seed}", fine_tuning(config, seed), config.runs)
        model, train, test = run.model(), run.dataset("train"), run.dataset("test")
        for name, last_blocks in (("last block", 1), ("all blocks", model.depth)):
            table = simulated_teaching(model, train, test, counts, last_blocks, only_tags)
            found.append(table.assign(variant=table["model"], learns=name, seed=seed))
    table = pd.concat(found, ignore_index=True)
    for name, part in table.groupby("learns", sort=False):
        taught = part.loc[part["corrections"] > 0, "seconds"]
        print(f"\n{name}: seconds of one teaching, median {taught.median():.1f}\n")
        print(evaluate.comparison_table(part).to_string())


def weights(
    model_name: str = "vit_small_patch16_224",
    save_dir: Path = ROOT / "models",
    overwrite: bool = False,
) -> None:
    """Save timm's pretrained weights to a file, where the presets look for them.

    Args:
        model_name: any timm ViT with a class token, e.g. vit_small_patch14_dinov2.
        save_dir: folder of <model name>.pt; or the file itself, ending in .pt or .safetensors.
        overwrite: fetch and write again even where the file is there.
    """
    from lib.weights import save_pretrained

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

    PRESET chooses the data set (cub2011 when unset). Set SPLIT to the file to train with it.

    Args:
        N: share of each class that is for training; the rest is for testing.
        shuffle: shuffle each class before it is split.
        seed: of the shuffle, and of the validation images.
        official: the split that the data set was published with, instead of N.
        val_share: share of each class's training images to name as validation images in the file;
            with 0 they are carved from train when the file is read.
        out: the file; <data folder>/cub200_2011_dataset.json by default.
    """
    from lib import splits
    from lib.readers import list_pictures

    name = os.environ.get("PRESET") or "cub2011"
    if name == "toy":
        raise ValueError("toy birds are drawn in parts and need no split; set PRESET to another")
    config = preset(name).data
    listing = list_pictures(config)
    if not official:
        made = splits.per_class(listing.rows, listing.label_list, N, shuffle, seed)
    elif listing.published:
        made = listing.published
    else:
        raise ValueError(f"{listing.home} comes without a split of its own; leave out --official")
    if val_share:
        made = splits.with_validation(made, val_share, seed)
    out = out or config.root / SPLIT_NAMES[name]
    splits.write_split(made, out)
    parts = [f"{len(getattr(made, part))} {part}" for part in ("train", "val", "test")]
    print(f"{out}: {', '.join(parts)} images of {len(made.label_list)} classes")


def fetch(
    name: tyro.conf.Positional[Literal["cub2011", "cub-gha"]], to: Path = ROOT / "datasets"
) -> None:
    """Download a published data set; a second call goes on where the first stopped.

    Args:
        name: cub2011 is CUB-200-2011 (1.15 GB), cub-gha the human gaze for it (6 MB).
        to: folder that receives it.
    """
    from lib.download import download

    download(name, to)


def check(
    name: tyro.conf.Positional[Literal[PRESETS] | None] = None, details: Path | None = None
) -> int:
    """Read every picture and every human map once and say what is wrong; exit code 1 if training
    would fail.

    Args:
        name: the preset; PRESET when left out.
        details: a .csv file to write every single finding to.
    """
    from lib.check import check_data
    from lib.files import write_text
    from lib.runs import bare_model, fine_tuning

    config = preset(name)
    grid = bare_model(fine_tuning(config, seed=0), num_classes=0).grid
    report = check_data(config.data, grid)
    print(f"preset {config.preset}: what was looked for, and how often it was found\n")
    print(report.table().to_string())
    for example in report.examples():
        print(f"\nfirst {example}")
    print(f"\n{report.balance.to_string()}\n")
    if details is not None:
        write_text(details, report.details().to_csv(index=False))
        print(f"{len(report.findings)} findings: {details}")
    print("training would fail" if report.stops_training else "training can start")
    return int(report.stops_training)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {
        "demo": demo,
        "train": train,
        "evaluate": evaluate_runs,
        "sweep": sweep,
        "weights": weights,
        "download": fetch,
        "split": split,
        "check": check,
        "pretrain": make_trunk,
        "simulate-teaching": teaching,
        "bench": speed,
        "bench-memory": memory,
        "bench-cached": cached,
        "bench-data": loading,
        "bench-edit": editing,
    }
    try:
        if arguments[:1] == ["train"]:  # has commands of its own
            return train(arguments[1:]) or 0
        code = tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m lib", description=__doc__, args=arguments
        )
    except EXPECTED as error:
        rank = os.environ.get("RANK", "0")  # of several processes that train together
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {error}", file=sys.stderr)
        return 2
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
