"""Trained models side by side: measured, questioned, and told of in one result folder."""

from __future__ import annotations

import io
import itertools
import platform
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import pandas as pd
import timm
import torch
from tqdm.auto import tqdm

from lib import config as cfg
from lib import figures
from lib.config import Evaluation, RunConfig
from lib.data.dataset import BirdDataset, evenly_spaced, read_records
from lib.data.splits import PARTS
from lib.evaluation import erasing, outliers
from lib.evaluation.per_image import per_image
from lib.evaluation.tables import (
    COLUMNS,
    calibration,
    in_words,
    markdown,
    report_tables,
    summary_tables,
    tests_in_words,
)
from lib.experiments.compare import (
    Trial,
    first_trials,
    labelled_as,
    load_trials,
    run_name,
    yardstick_variant,
)
from lib.experiments.gallery import (
    attention_rows,
    changed_predictions,
    write_gallery,
    write_samples,
)
from lib.files import make_folder, write_bytes, write_text
from lib.model.predict import in_main_process
from lib.model.vit import SigmoidViT
from lib.training.state import picture_checksums, to_json
from lib.training.tokens import with_cached_tokens


def evaluate(
    runs: Sequence[str | Trial],
    options: Evaluation | None = None,
    below: Path | None = None,
    command: str = "",
) -> Path:
    """Measures runs on the same images and writes tables, tests, figures and a gallery page.

    What is wrong, or cannot be written, is found before anything is computed. Of several processes
    the main one does all of it, while the others wait.

    Args:
        runs: names or trials, see `load_trials`.
        below: the runs folder, where named runs and cached tokens are; by default that of the
            first trial, or of the preset for names.
        command: what was called, for result.txt.

    Returns:
        the folder:
        result.txt         everything that can be read in a terminal
        table.csv          a row a model, and a map that no model made; see `result_table`
        table.md           the same for readers, a column a model
        seeds.csv          a row a run, with what it was measured on, when, and by which versions
        images.csv         a row a run and image, and which split that is of; misclassified.csv
        splits.csv         of split "all": table.csv of each split; seeds.csv has each as well
        tests.csv, .md     `paired_tests` of lib.evaluation.statistics, of two models or more
        calibration.csv    `calibration`; baselines.csv the maps that no model made
        config/*.json      the configuration of every run
        *.png, *.pdf       comparison, p_true, history, calibration, attention, and where there are
                           human maps: accuracy_cc
        gallery.html       `lib.experiments.gallery.write_gallery`, of two models or more
        samples/           `lib.experiments.gallery.write_samples`
        and the tables and figures of the questions that `options` ask, see `ask`.

        Of split "all" every number is that of its split alone (a shuffled AUC and a mean map too),
        and all together are the mean over the images. Gallery, samples, attention and questions
        are of the test images.

    Raises:
        FileNotFoundError, ValueError: see `load_trials` and `yardstick_variant`.
        StorageError: the folder cannot be written.
    """
    return in_main_process(partial(_evaluate, runs, options or Evaluation(), below, command))


def _evaluate(
    runs: Sequence[str | Trial], options: Evaluation, below: Path | None, command: str
) -> Path:
    if below is None:
        is_trial = runs and isinstance(runs[0], Trial)
        below = runs[0].run.folder.parent if is_trial else cfg.preset().runs
    trials = load_trials(runs, below, options.which)
    against, words = yardstick_variant(trials, options.against), labelled_as(trials, options.label)
    options = replace(options, against=words[against])
    trials = [replace(trial, variant=words[trial.variant]) for trial in trials]
    make_folder(options.out or cfg.ROOT / "result")

    parts = PARTS if options.split == "all" else (options.split,)
    datasets = {part: common_dataset(trials, part, options.against) for part in parts}
    datasets = {part: dataset for part, dataset in datasets.items() if len(dataset)}
    if not datasets:
        raise ValueError(f"there are no {options.split} images to measure on; use another --split")
    for part, dataset in datasets.items():
        if part != "train":
            tell_of_leaks(trials, dataset)
    part, dataset = list(datasets.items())[-1]  # whose pictures are shown
    answers = ask(trials, dataset, options)
    images = pd.concat(
        measure_runs(trials, dataset, below / "tokens", options.which).assign(split=part)
        for part, dataset in datasets.items()
    )
    tables = report_tables(images, list(datasets.values()), options.against)
    by_split = {
        part: summary_tables(images[images["split"] == part], [datasets[part]])
        for part in (datasets if options.split == "all" else ())
    }

    folder = options.out or _new_folder(cfg.ROOT / "result")
    make_folder(folder / "config")
    counts = {part: len(dataset) for part, dataset in datasets.items()}
    each = ", ".join(f"{count} {part}" for part, count in counts.items())
    each = f" ({each})" if options.split == "all" else ""
    head = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "command": command,
        "data": dataset.config.name,
        "split": f"{options.split}, {sum(counts.values())} images{each}, "
        f"{len(dataset.classes)} classes",
        "human maps": dataset.config.maps,
        "weights": options.which,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    drawn = _draw(trials, dataset, tables, options) | draw_answers(answers)
    counts = {options.split: sum(counts.values())} | counts
    seeds = {options.split: tables["seeds"]} | {k: v["seeds"] for k, v in by_split.items()}
    tables["seeds"] = pd.concat(
        seeds[split].assign(
            run=[trial.run.name for trial in trials],
            precision=[trial.run.config.train.mixed_precision for trial in trials],
            **{name: head[name] for name in ("date", "data", "torch", "timm")},
            **{"result": folder.name, "split": split, "which": options.which},
            images=counts[split],
        )
        for split in seeds
    )
    if by_split:
        found = {split: told["table"] for split, told in by_split.items()}
        tables["splits"] = pd.concat(found, names=["split"]).reset_index("split")
    for name, table in (tables | answers).items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    words = in_words(tables["table"])
    write_text(folder / "table.md", markdown(words.rename_axis("").reset_index()))
    if "tests" in tables:
        write_text(folder / "tests.md", markdown(tests_in_words(tables["tests"])))
    for trial in trials:
        file = folder / "config" / f"{run_name(trial.variant, trial.seed)}.json"
        write_text(file, to_json(trial.run.config))
    _save_figures(folder, drawn)
    if options.gallery and "tests" in tables:
        changes = changed_predictions(images[images["split"] == part], options.against)
        write_gallery(folder, trials, dataset, changes, replace(options, split=part))
    if options.samples:
        write_samples(folder / "samples", trials, dataset, options)
    parts = [
        "\n".join(f"{name + ':':<12}{value}" for name, value in head.items() if value),
        *_in_words(tables, options.against),
        *(
            f"Of the {counts[split]} {split} images\n\n{in_words(told['table']).to_string()}"
            for split, told in by_split.items()
        ),
        *answers_in_words(answers),
    ]
    write_text(folder / "result.txt", "\n\n".join(parts) + "\n")
    return folder


def _new_folder(parent: Path) -> Path:
    """result%Y%m%d_%H%M, with _2, _3, ... behind it when that minute has one already."""
    stem = datetime.now().strftime("result%Y%m%d_%H%M")
    for number in itertools.count(1):
        folder = parent / (stem if number == 1 else f"{stem}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder


# ----------------------------------------------------------------------------------- measurements


def common_dataset(trials: Sequence[Trial], split: str, against: str) -> BirdDataset:
    """The images that all are measured on, with the human maps of one run for all.

    The maps are those of the first run of `against`; where it was trained without any, of the
    first run that has some.
    """
    order = sorted(trials, key=lambda trial: trial.variant != against)
    run = next((t.run for t in order if t.run.config.data.maps != "none"), order[0].run)
    return run.dataset(split)


def tell_of_leaks(trials: Sequence[Trial], dataset: BirdDataset) -> None:
    """Warns where the data changed since a run was trained, and measures it on what it has seen."""
    made = [(trial.run.folder, (trial.run.made_of or {}).get("pictures", [])) for trial in trials]
    if not any(pictures for _, pictures in made):
        return  # drawn, or older
    now = picture_checksums(dataset.records, dataset.classes)
    data = replace(dataset.config, maps="none", maps_dir=None)
    for_training = picture_checksums(*read_records(data, "train"))
    for folder, pictures in made:
        known = set(pictures)
        seen = sum(one in known for one in now)
        if seen and pictures != for_training:
            warnings.warn(
                f"{folder} was trained on other pictures than are for training now: {seen} of "
                f"the {len(now)} that it is measured on were among them; train it again "
                "(--overwrite, or another RUNS_DIR)",
                stacklevel=3,
            )


def measure_runs(
    trials: Sequence[Trial],
    dataset: BirdDataset | None = None,
    tokens: Path | None = None,
    which: str = "last",
) -> pd.DataFrame:
    """`per_image` of every run, with columns variant and seed.

    Args:
        dataset: without augmentation; the test images of the first run by default.
        tokens: folder of cached tokens, for runs that were trained on some; that beside the first
            run by default.
    """
    first = trials[0]
    dataset = dataset or common_dataset(trials[:1], "test", first.variant)
    tokens = tokens or first.run.folder.parent / "tokens"
    frames = []
    for trial in tqdm(trials, desc="evaluating runs", leave=False):
        model = trial.run.model(which)
        frame = measure(model, dataset, trial.run.config, tokens)
        frames.append(frame.assign(variant=trial.variant, seed=trial.seed))
    return pd.concat(frames, ignore_index=True)


def measure(
    model: SigmoidViT, dataset: BirdDataset, config: RunConfig, tokens: Path
) -> pd.DataFrame:
    """`per_image` of a run's model; where it was trained on cached tokens, on those in `tokens`."""
    if config.train.cache_tokens:
        return per_image(model, dataset, with_cached_tokens(model, dataset, config, tokens))
    return per_image(model, dataset, workers=config.train.workers)


# -------------------------------------------------------------------------- the slow questions


def ask(
    trials: Sequence[Trial], dataset: BirdDataset, options: Evaluation
) -> dict[str, pd.DataFrame]:
    """Whether the attention of each model is used, and what it looks at.

    Each is asked on a number of images of its own (`options.erase`, `curves`, `tokens`), spread
    evenly over the data set: it costs several forward passes an image.

    Returns:
        tables by name, with columns variant and seed; those not asked are not there. erasing:
        `lib.evaluation.erasing.erase`, a row an image. curves: `deletion_insertion` in the order
        of the model's own attention, of people's map, of the mean map and at random, a row an
        image, order and fraction; areas of them. tokens: `outliers_by_block`, a row an
        image and block.
    """
    if not (options.erase or options.curves or options.tokens):
        return {}
    orders = {"attention": "attention", "random": "random"}  # of the patches
    if dataset.has_map.any():
        people = dataset.maps[0].flatten(1)
        # The mean map knows the middle of a picture and nothing of the picture.
        orders |= {"people": people, "mean map": people.mean(0).expand_as(people)}
    some = partial(evenly_spaced, dataset)
    found: dict[str, list[pd.DataFrame]] = {}
    for trial in tqdm(trials, desc="asking runs", leave=False):
        model = trial.run.model(options.which)
        tables = {}
        if options.erase:
            tables["erasing"] = erasing.erase(model, dataset, images=some(options.erase))
        if options.curves:
            asked = {"images": some(options.curves)}
            tables["curves"] = pd.concat(
                erasing.deletion_insertion(model, dataset, order, **asked).assign(order=name)
                for name, order in orders.items()
            )
            tables["areas"] = erasing.areas(tables["curves"])
        if options.tokens:
            read = outliers.read_patch_tokens(model, dataset, some(options.tokens))
            tables["tokens"] = outliers.outliers_by_block(read)
        for name, table in tables.items():
            found.setdefault(name, []).append(table.assign(variant=trial.variant, seed=trial.seed))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """One row where there was one a seed: the means. Images, not seeds, are drawn anew."""
    keys = ("variant", "what", "rung", "order", "curve", "index", "block", "fraction")
    keys = [name for name in keys if name in table]
    numbers = table.drop(columns=["seed", *keys]).select_dtypes(["number", "bool"])
    return table.groupby(keys, sort=False)[list(numbers)].mean().reset_index()


# ---------------------------------------------------------------------------- words and figures


def _in_words(tables: dict[str, pd.DataFrame], against: str) -> list[str]:
    """Table and tests as paragraphs to be read in a terminal."""
    spread = "standard deviation over seeds [95 % interval over images]"
    # A table is wide, a terminal is not: a line a number, a column a model.
    parts = [f"Mean over images and seeds ± {spread}\n\n{in_words(tables['table']).to_string()}"]
    if "tests" in tables:
        tests = tables["tests"]
        parts.append(
            f'Each model minus "{against}" on the same images and seeds ± {spread}\n'
            "p (Holm): sign-flip permutation test over images, of the models as they were trained, "
            f"corrected for the {len(tests)} rows;\nwhat another seed would change is the ±; no p "
            "where the seeds disagree on the sign\n\n"
            f"{tests_in_words(tests).to_string(index=False)}"
        )
    return parts


def answers_in_words(answers: dict[str, pd.DataFrame]) -> list[str]:
    """What `ask` found as paragraphs to be read in a terminal."""
    parts = []
    if "erasing" in answers:
        for variant, part in answers["erasing"].groupby("variant", sort=False):
            parts.append(f"{variant}: {erasing.sentence(over_seeds(part))}")
    if "areas" in answers:
        wide = answers["areas"].pivot_table("area", "variant", ["curve", "order"], sort=False)
        heading = "Area under the curves of deletion and insertion"
        parts.append(f"{heading}\n\n{wide.round(3).to_string()}")
    if "tokens" in answers:
        names = ["outliers", "outliers_mass", "background", "background_mass", "flat", "flat_mass"]
        blocks = outliers.mean_by_block(answers["tokens"].drop(columns="seed"))
        last = blocks.xs(blocks.index.get_level_values("block").max(), level="block")
        parts.append(
            "Last block: share of the patches, and of the attention on patches (_mass), on tokens "
            "of outlying norm, on background, on flat background\n\n"
            f"{last[[*names, 'sinks', 'sinks_mass']].round(4).T.to_string()}"
        )
    return parts


def _draw(
    trials: Sequence[Trial],
    dataset: BirdDataset,
    tables: dict[str, pd.DataFrame],
    options: Evaluation,
) -> dict[str, figures.Figure]:
    images, seeds, split = tables["images"], tables["seeds"], options.split
    runs = {name: trial.run for name, trial in first_trials(trials).items()}
    pooled = calibration(images.assign(seed="all"))  # a line a model, not a line a run
    errors = seeds.groupby("variant", sort=False)["ece"].mean().to_dict()
    shown = range(min(5, len(dataset)))
    drawn = {
        "comparison": figures.comparison(seeds, COLUMNS, split),
        "p_true": figures.true_class_density(images, split),
        "history": figures.histories({name: run.history for name, run in runs.items()}),
        "calibration": figures.reliability(pooled, errors, split),
        "attention": attention_rows(runs, dataset, shown, options.which),
    }
    if seeds["cc"].notna().any():
        lines = tables["baselines"].set_index("map")["cc"].dropna().to_dict()
        drawn["accuracy_cc"] = figures.accuracy_and_alignment(seeds, lines, split)
    return drawn


def draw_answers(answers: dict[str, pd.DataFrame]) -> dict[str, figures.Figure]:
    """The figures of what `ask` found, by name; seeds are averaged image by image."""
    drawn = {}
    if "erasing" in answers:
        drawn["erasing"] = figures.erasing(over_seeds(answers["erasing"]))
    if "curves" in answers:
        drawn["curves"] = figures.curves(over_seeds(answers["curves"]), hue="order")
    if "tokens" in answers:
        drawn["tokens"] = figures.outliers(over_seeds(answers["tokens"]))
    return drawn


def _save_figures(folder: Path, drawn: dict[str, figures.Figure]) -> None:
    """Each as PNG and as PDF, laid out once for both."""
    for name, figure in drawn.items():
        figure.set_dpi(150)
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # of any other savefig lays out, and draws, once more
        frame = figure.get_tightbbox().padded(figures.plt.rcParams["savefig.pad_inches"])
        for kind in ("png", "pdf"):
            content = io.BytesIO()
            figure.savefig(content, format=kind, dpi=150, bbox_inches=frame)
            write_bytes(folder / f"{name}.{kind}", content.getvalue())
        figures.plt.close(figure)  # saved, not shown: a notebook would draw it as well
