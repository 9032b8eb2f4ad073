"""The gallery page: pictures whose prediction another training fixed or broke, as plain HTML.

And sample pictures with all that a model's attention shows of them.

Which pictures are shown is decided by a rule that the page states, and it says how many there are
in all: a few chosen by hand would show whatever one likes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from lib import figures
from lib.config import Evaluation
from lib.data.dataset import BirdDataset, evenly_spaced, subset
from lib.edit import rollout
from lib.evaluation import metrics
from lib.experiments.compare import Trial, first_trials, run_name, seeds_by_variant
from lib.files import make_folder, write_bytes, write_text
from lib.model.predict import predict
from lib.model.vit import SigmoidViT
from lib.training.runs import Run

TEMPLATE = Path(__file__).parent / "gallery.html"
# How pictures are chosen, in the words of the page.
RULES = {
    "order": "in the order of the data set, then of the seeds",
    "change": "those whose probability of the true class changed most",
}


def attention_maps(
    model: SigmoidViT, dataset: BirdDataset, chosen: Sequence[int]
) -> tuple[list[np.ndarray], list[bool]]:
    """Where a model looks: the last block's class row, mean of heads, for some images.

    Args:
        chosen: positions in the data set, each once.

    Returns:
        for every chosen image its map `[gh, gw]`, non-negative, and whether the prediction is
        right.
    """
    maps, right = [], []
    for batch, scores, rows in predict(model, subset(dataset, chosen), batch_size=16):
        attention = metrics.patch_attention(rows[model.depth - 1], model.num_prefix).cpu()
        maps += list(attention.reshape(-1, *dataset.grid).numpy())  # [B, P] to [B, gh, gw]
        right += (scores.argmax(-1) == batch["label"]).tolist()
    return maps, right


def attention_rows(
    runs: Mapping[str, Run],
    dataset: BirdDataset,
    chosen: Sequence[int] = range(5),
    which: str = "last",
) -> figures.Figure:
    """Rows of images: the picture with people's gaze, then each model's class row on it."""
    columns = {
        name: list(zip(*attention_maps(run.model(which), dataset, chosen), strict=True))
        for name, run in runs.items()
    }
    human = [dataset.annotations(int(i))["human"].reshape(dataset.grid).numpy() for i in chosen]
    return figures.rows_of_maps([dataset.image(int(i)) for i in chosen], human, columns)


def changed_predictions(images: pd.DataFrame, against: str) -> pd.DataFrame:
    """Images that a variant predicts right and the `against` model of the same seed does not.

    Args:
        images: a row an image, variant and seed, as `measure_runs` gives them:
            every variant and seed has the images in the order of the data set.

    Returns:
        a row a change, in the order of variants, images, seeds: variant, seed, kind ("fixed", or
        "broken" where it is the other way round), position (in the data set), image_id,
        class_name, predicted_before, confidence_before, predicted_after, confidence_after, change
        (of the probability of the true class, in [-1, 1]).
    """
    columns = ["image_id", "class_name", "top1", "predicted", "confidence", "p_true"]
    position = images.groupby(["variant", "seed"], sort=False).cumcount()
    numbered = images[["variant", "seed", *columns]].assign(position=position)
    before = numbered[numbered["variant"] == against].drop(columns=["variant", "class_name"])
    after = numbered[numbered["variant"] != against]
    keys = ["seed", "image_id", "position"]
    pairs = after.merge(before, on=keys, suffixes=("_after", "_before"))
    pairs = pairs[pairs["top1_after"] != pairs["top1_before"]]
    order = {name: number for number, name in enumerate(dict.fromkeys(images["variant"]))}
    pairs = pairs.assign(
        kind=np.where(pairs["top1_after"].astype(bool), "fixed", "broken"),
        change=pairs["p_true_after"] - pairs["p_true_before"],
        order=pairs["variant"].map(order),
    ).sort_values(["order", "position", "seed"], ignore_index=True)
    shown = ["variant", "seed", "kind", "position", "image_id", "class_name", "predicted_before"]
    return pairs[[*shown, "confidence_before", "predicted_after", "confidence_after", "change"]]


def choose(changes: pd.DataFrame, count: int, rule: str = "order") -> pd.DataFrame:
    """At most `count` changes of each variant and kind, by one of `RULES`."""
    if rule == "change":
        changes = changes.sort_values("change", key=abs, ascending=False, kind="stable")
    return changes.groupby(["variant", "kind"], sort=False).head(count)


def write_gallery(
    folder: Path,
    trials: Sequence[Trial],
    dataset: BirdDataset,
    changes: pd.DataFrame,
    options: Evaluation,
) -> Path:
    """Writes `folder/gallery.html` and its pictures below `folder/gallery`.

    Args:
        dataset: the split that was measured, without augmentation.
        changes: all of them, from `changed_predictions`.
        options: how many are shown and by which rule; against a variant, which must be named.

    Returns:
        the page. Its links are relative: the folder can be moved, or put on a web server.
    """
    chosen = choose(changes, options.gallery, options.gallery_rule)
    pictures = folder / "gallery"
    make_folder(pictures)
    has_people = {}
    for position in tqdm(sorted(set(chosen["position"])), desc="gallery", leave=False):
        item, image = dataset.annotations(int(position)), dataset.image(int(position))
        _save_picture(pictures / f"{position}-image.png", image)
        has_people[position] = bool(item["valid"].any())
        if has_people[position]:
            people = torch.where(item["valid"], item["human"], torch.nan).reshape(dataset.grid)
            _save_picture(pictures / f"{position}-people.png", image, people.numpy())
    # Variants can be called anything, files cannot: a number stands for each variant and seed.
    numbers = {(trial.variant, trial.seed): number for number, trial in enumerate(trials)}
    for trial in tqdm(trials, desc="gallery models", leave=False):  # each is loaded once
        shown = chosen[chosen["seed"] == trial.seed]
        if trial.variant != options.against:
            shown = shown[shown["variant"] == trial.variant]
        positions = sorted(set(shown["position"]))
        if not positions:
            continue
        maps, _ = attention_maps(trial.run.model(options.which), dataset, positions)
        ending = f"-model{numbers[trial.variant, trial.seed]}.png"
        for position, attention in zip(positions, maps, strict=True):
            _save_picture(pictures / f"{position}{ending}", dataset.image(int(position)), attention)
    cards = chosen.assign(
        has_people=chosen["position"].map(has_people),
        name_before=[dataset.classes[label] for label in chosen["predicted_before"]],
        name_after=[dataset.classes[label] for label in chosen["predicted_after"]],
        model_before=[numbers[options.against, seed] for seed in chosen["seed"]],
        model_after=[numbers[key] for key in zip(chosen["variant"], chosen["seed"], strict=True)],
    )
    page = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True).render(
        against=options.against,
        split=options.split,
        images=len(dataset),
        rule=RULES[options.gallery_rule],
        sections=_sections(trials, changes, cards, options.against),
    )
    write_text(folder / "gallery.html", page)
    return folder / "gallery.html"


def write_samples(
    folder: Path, trials: Sequence[Trial], dataset: BirdDataset, options: Evaluation
) -> None:
    """What each model, by its first run, makes of `options.samples` pictures of a data set.

    They are spread evenly. In `folder`, of every image:
    <image id>.png            the picture, and a row a model: its five most probable classes,
                              attention rollout, and the class row's sigmoid attention in the last
                              block, mean and head by head
    <image id>/picture.png    as the model sees it; and, to be laid over it, see `transparent`:
    <image id>/<run>-mean.png, -head<k>.png (k from 1): alpha is the sigmoid attention
    <image id>/<run>-rollout.png: alpha is the rollout of the patches over its maximum
    """
    chosen = evenly_spaced(dataset, options.samples)
    rows: dict[int, dict] = {position: {} for position in chosen}
    for trial in tqdm(first_trials(trials).values(), desc="samples", leave=False):
        model = trial.run.model(options.which)
        batches = predict(model, subset(dataset, chosen), batch_size=1)  # N x N once a block
        for position, (batch, scores, found) in zip(chosen, batches, strict=True):
            with torch.no_grad():
                rolled = rollout(model.attention_matrices(batch["image"]))[0, 0]
            row = found[model.depth - 1][0, :, model.num_prefix :]
            heads = torch.sigmoid(row.float()).cpu().reshape(-1, *dataset.grid).numpy()
            maps = {"rollout": rolled[model.num_prefix :].cpu().reshape(dataset.grid).numpy()}
            maps |= {"mean": heads.mean(0)}
            maps |= {f"head{k}": head for k, head in enumerate(heads, start=1)}
            rows[position][trial.variant] = (scores[0].softmax(-1).cpu().numpy(), maps)
            below = folder / str(dataset.records[position].image_id)
            make_folder(below)
            name = run_name(trial.variant, trial.seed)
            for kind, values in maps.items():
                values = values / values.max() if kind == "rollout" else values
                size = dataset.config.image_size
                _write_png(below / f"{name}-{kind}.png", figures.transparent(values, size))
    for position, models in rows.items():
        record, image = dataset.records[position], dataset.image(position)
        _write_png(folder / str(record.image_id) / "picture.png", image)
        sheet = figures.sample_sheet(image, record.label, dataset.classes, models)
        write_bytes(folder / f"{record.image_id}.png", figures.as_file(sheet, "png", dpi=100))


def _sections(
    trials: Sequence[Trial], changes: pd.DataFrame, cards: pd.DataFrame, against: str
) -> list[dict[str, object]]:
    """What the template shows: a section a variant, with its fixed and its broken images."""
    seeds = seeds_by_variant(trials)
    theirs, sections = seeds.pop(against), []
    for variant, ours in seeds.items():
        kinds = []
        for kind in ("fixed", "broken"):
            total = len(changes.query("variant == @variant and kind == @kind"))
            shown = cards.query("variant == @variant and kind == @kind").to_dict("records")
            kinds.append({"kind": kind, "cards": shown, "total": total})
        sections.append({"variant": variant, "seeds": sorted(ours & theirs), "kinds": kinds})
    return sections


def _save_picture(path: Path, image: np.ndarray, grid_map: np.ndarray | None = None) -> None:
    _write_png(path, figures.picture(image, grid_map))


def _write_png(path: Path, pixels: np.ndarray) -> None:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="png", compress_level=4)
    write_bytes(path, content.getvalue())
