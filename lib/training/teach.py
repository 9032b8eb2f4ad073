"""Teach a model by a few corrections: seconds of training on tokens that are computed once.

Only the last blocks, the final norm and the head learn. The trunk before them is frozen, so a
picture passes it once, and a step costs what the learning blocks cost. Each step has two parts:
the attention loss of the corrected pictures, which speaks of painted cells only, and cross entropy
on a replay set of training pictures, so that what the model knew is kept. Corrections say where to
look, not what is there to see: the classes of the corrected pictures are not used.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from lib.config import TrainConfig
from lib.data.corrections import Correction
from lib.data.dataset import BirdDataset, conflicting_decoys
from lib.edit import AttentionEdit, resolve_blocks, resolve_heads
from lib.evaluation import metrics
from lib.losses import bce, mse
from lib.model.vit import SigmoidViT
from lib.training.learning import learning_rate_factor, parameter_groups, trained_modules
from lib.training.loop import TrainingDiverged

Progress = Callable[[int, int, dict[str, float]], None]
Tick = Callable[[int], None]

HALF = 0.5  # cells painted below it ask for less attention, the others for more
BATCH = 32  # pictures that pass the trunk, or are measured, together
UNDO_LEVELS = 10  # a level of ViT-S/16 takes 7 MB a learning block


def mass(logits: Tensor, wanted: Tensor, painted: Tensor, offset: str) -> Tensor:
    """-log of the softmax mass off the cells painted low, plus -log of that on those painted high.

    Shares of the whole row, class token included. Unlike the energy of lib/losses.py it makes
    sense when a person painted only where not to look, or only where to look. How far below or
    above `HALF` a cell is painted does not matter, and `offset` neither.

    Args:
        logits: `[B, H, N]`. wanted, painted: `[B, 1, P]`, values in [0, 1] and bool.

    Returns:
        `[B, H]`; 0 is best.
    """
    patches = wanted.shape[-1]
    prefix, cells = logits.split([logits.shape[-1] - patches, patches], dim=-1)
    low, high = painted & (wanted < HALF), painted & (wanted >= HALF)
    whole = torch.logsumexp(logits, dim=-1)
    # Finite, so that a row without a cell painted high has a gradient of 0 and not NaN.
    off_low = torch.logsumexp(torch.cat([prefix, cells.masked_fill(low, -1e4)], -1), dim=-1)
    on_high = torch.logsumexp(cells.masked_fill(~high, -1e4), dim=-1)
    return whole - off_low + torch.where(high.any(-1), whole - on_high, 0.0)


# The losses that make sense for a map of which only some cells are known, high or low ones alone.
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, str], Tensor]] = {
    "mass": mass,
    "mse": mse,
    "bce": bce,
}


@dataclass(frozen=True)
class TeachConfig:
    """How deep, how long and how fast a model is taught."""

    last_blocks: int = 1  # blocks that learn, with the final norm and the head; all: the depth
    loss: Literal["mass", "mse", "bce"] = "mass"  # of the painted cells: mass, or as in losses.py
    lam: float = 3.0  # weight of the attention loss; 0 is the control: replay alone
    steps: int = 60  # updates of the weights
    lr: float | None = None  # peak learning rate of AdamW; None: 1e-3 for one block, 2e-4 for more
    batch_size: int = 32  # pictures a step: so many replayed, and corrected ones at most
    replay: int = 512  # training pictures to replay, spread over the classes
    seed: int = 0  # which pictures are replayed, and their order

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f'loss is "{self.loss}"; use one of {", ".join(LOSSES)}')
        for name in ("last_blocks", "steps", "batch_size", "replay"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.lam < 0 or self.rate <= 0:
            raise ValueError(
                f"lam is {self.lam:g} and lr {self.rate:g}; lam must be 0 or more, lr above 0"
            )

    @property
    def rate(self) -> float:
        """`lr`, or what was found to suit the number of learning blocks."""
        if self.lr is not None:
            return self.lr
        return 1e-3 if self.last_blocks == 1 else 2e-4


@dataclass(frozen=True)
class TeachReport:
    """What one `Teacher.teach` did."""

    history: pd.DataFrame  # one row a step: step, cross_entropy, attention_loss
    seconds: float  # with the pictures' way through the trunk
    used: tuple[Correction, ...]  # those that were taught
    skipped: tuple[tuple[str, str], ...]  # image id and reason of those that were left out
    cancelled: bool  # True: the model is as it was before


@dataclass(frozen=True)
class Example:
    """One picture before and after the last `Teacher.teach`; the dicts have these two words."""

    group: str  # of `Teacher.before_after`
    image_id: str
    image: np.ndarray  # uint8 [H, W, 3]
    class_name: str
    edit: AttentionEdit | None  # what was asked of a corrected picture
    predicted: dict[str, str]  # class names
    attention: dict[str, np.ndarray]  # float32 [gh, gw], last block's softmax, mean of heads


class NothingToTeach(ValueError):
    """None of the corrections can be used."""


class _Cancelled(Exception):
    """Somebody pressed Cancel."""


class Teacher:
    """Teaches one model in place, as often as wanted, and takes it back.

    Args:
        model: SigmoidViT on any device. Its modes and `requires_grad` flags are left as they are.
        replay: training pictures on the model's grid.
        config: how to teach; `TeachConfig()` where not given.
        pictures: the data set that corrections speak of; `replay` where not given.

    The tokens of pictures are kept as long as the Teacher lives: make a new one when the model's
    weights change in another way.

    Raises:
        ValueError: the model has fewer blocks than are to learn, or a data set is augmented.
    """

    def __init__(
        self,
        model: SigmoidViT,
        replay: BirdDataset,
        config: TeachConfig | None = None,
        pictures: BirdDataset | None = None,
    ) -> None:
        self.model = model
        self.config = config or TeachConfig()
        if self.config.last_blocks > model.depth:
            raise ValueError(
                f"last_blocks is {self.config.last_blocks}, but the model has {model.depth}"
            )
        self.start = model.depth - self.config.last_blocks  # the first block that learns
        self._kept: dict[int, TrunkTokens] = {}
        self._replay = self._tokens_of(replay)
        self._pictures = self._tokens_of(replay if pictures is None else pictures)
        labels = replay.table["label"].to_numpy()
        self._replayed = spread(labels, self.config.replay, self.config.seed)
        self._levels: list[tuple[list[dict[str, Tensor]], tuple[Correction, ...]]] = []

    def _tokens_of(self, dataset: BirdDataset) -> TrunkTokens:
        """One store a data set, however often it is named."""
        if id(dataset) not in self._kept:
            self._kept[id(dataset)] = TrunkTokens(self.model, dataset, self.start)
        return self._kept[id(dataset)]

    def teach(
        self,
        corrections: Sequence[Correction],
        progress: Progress | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> TeachReport:
        """Trains the model to look where the corrections say.

        A correction is taught in those of its blocks that learn, in its heads, and in the row of
        the class token whatever its `queries` are. All corrections weigh the same, however much
        is painted. The fingerprint of the weights that they were made on does not matter: where
        to look is said of the picture.

        Args:
            corrections: one a picture, as `lib.data.corrections.load_corrections` gives them.
            progress: called as progress(step, steps, losses) after every step; losses are
                cross_entropy and attention_loss. Before the first step, while pictures pass the
                trunk, it is called with step 0 and {"pictures": number of those left}. Where
                not given, a tqdm bar is shown.
            cancelled: asked after every such call; the first True ends the teaching.

        Returns:
            what was done. After a cancel, as after an error, the model is as it was before.

        Raises:
            NothingToTeach: none of the corrections can be used; names the first reason.
            TrainingDiverged: a loss is not finite.
        """
        began = time.perf_counter()
        usable, skipped = self._sort(corrections)
        before, history, stopped = self._state(), [], False
        try:
            hidden, steps = progress is not None, self.config.steps
            with tqdm(total=steps, desc="teaching", leave=False, disable=hidden) as bar:
                self._train(usable, progress or _shown_by(bar), cancelled, history)
        except BaseException as error:  # an interrupt from the keyboard too
            self._restore(before)
            stopped = isinstance(error, _Cancelled)
            if not stopped:
                raise
        else:
            self._levels = [*self._levels, (before, usable)][-UNDO_LEVELS:]
        frame = pd.DataFrame(history, columns=["step", "cross_entropy", "attention_loss"])
        return TeachReport(frame, time.perf_counter() - began, usable, skipped, stopped)

    @property
    def levels(self) -> int:
        """How many times `undo` can be called, up to UNDO_LEVELS."""
        return len(self._levels)

    def undo(self) -> None:
        """Brings back, bit for bit, the model before the last `teach` that was not undone yet.

        Raises:
            IndexError: there is nothing to undo.
        """
        self._restore(self._last_level()[0])
        self._levels.pop()

    def before(self) -> SigmoidViT:
        """A copy of the model as `undo` would bring it back; IndexError as there."""
        state = self._last_level()[0]
        model = copy.deepcopy(self.model)
        _load(_learning_modules(model, self.start), state)
        return model

    def before_after(
        self, held_out: BirdDataset, most: int = 100, progress: Progress | None = None
    ) -> pd.DataFrame:
        """What the last `teach` changed, on pictures it saw and on others.

        Args:
            held_out: pictures that the model was not trained on, on the model's grid.
            most: pictures a group at most, drawn at random; the corrected ones are all measured.
            progress: called as by `teach` with step 0 while pictures pass the trunk, which they do
                once in the life of the Teacher.

        Returns:
            one row a group that is not empty: the corrected pictures; held-out pictures of the
            same classes, and of other classes; the replayed pictures that were not corrected
            (forgetting). Columns: pictures, then before and after: accuracy, conflicting-decoy
            accuracy where decoys are drawn, NSS (CC for maps without fixations) where people's
            maps are known, and the share of the patches' attention in the last block that is on
            the cells painted low (mean of heads, corrected pictures only). NaN where undefined.

        Raises:
            IndexError: nothing was taught, or all of it was undone.
        """
        models = {"before": self.before(), "after": self.model}
        rows = {}
        for name, (pictures, indices, low) in self._groups(held_out, most).items():
            if not len(indices):
                continue
            pictures.keep(indices, self._tick(progress))
            row: dict[str, float] = {"pictures": len(indices)}
            looks = {when: _look(m, pictures, indices, low) for when, m in models.items()}
            for column in looks["before"].columns:
                row |= {f"{column} {when}": look[column].mean() for when, look in looks.items()}
            rows[name] = row
        return pd.DataFrame(rows).T.rename_axis("group").astype({"pictures": int})

    @torch.no_grad()
    def examples(self, held_out: BirdDataset, most: int = 4) -> list[Example]:
        """Pictures to look at: the last corrected ones, and held-out ones of the same classes.

        Args:
            held_out: as for `before_after`, which it should follow: both draw the same pictures.
            most: pictures of each of the two groups; held-out ones are drawn at random, whatever
                became of them.

        Raises:
            IndexError: nothing was taught, or all of it was undone.
        """
        models = {"before": self.before(), "after": self.model}
        edits = {correction.image_id: correction.edit for correction in self._last_level()[1]}
        found = []
        for group, (pictures, indices, _) in list(self._groups(held_out, most).items())[:2]:
            chosen = indices[-most:]
            if not len(chosen):
                continue
            classes, predicted, attention = pictures.dataset.classes, {}, {}
            for when, model in models.items():
                scores, rows = _scores_and_row(model, pictures, chosen)
                predicted[when] = [classes[c] for c in scores.argmax(dim=-1).tolist()]
                maps = metrics.patch_attention(rows, model.num_prefix)
                attention[when] = maps.unflatten(-1, model.grid).cpu().numpy()
            for k, index in enumerate(map(int, chosen)):
                row = pictures.dataset.table.iloc[index]
                found.append(
                    Example(
                        group=group,
                        image_id=str(row["image_id"]),
                        image=pictures.dataset.image(index),
                        class_name=str(row["class_name"]),
                        edit=edits[str(row["image_id"])] if group == "corrected" else None,
                        predicted={when: names[k] for when, names in predicted.items()},
                        attention={when: maps[k] for when, maps in attention.items()},
                    )
                )
        return found

    def _tick(self, progress: Progress | None) -> Tick | None:
        """How pictures that pass the trunk are told of."""
        if progress is None:
            return None
        return lambda left: progress(0, self.config.steps, {"pictures": left})

    # ------------------------------------------------------------------------------- one teaching

    def _sort(
        self, corrections: Sequence[Correction]
    ) -> tuple[tuple[Correction, ...], tuple[tuple[str, str], ...]]:
        """The corrections that can be taught, and image id and reason of the others."""
        reasons = [self._refusal(correction) for correction in corrections]
        pairs = list(zip(corrections, reasons, strict=True))
        usable = tuple(correction for correction, reason in pairs if reason is None)
        skipped = tuple((c.image_id, reason) for c, reason in pairs if reason is not None)
        if not usable:
            why = f" (picture {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
            raise NothingToTeach(
                f"none of the {len(pairs)} corrections can be taught{why}; paint a picture of this "
                "data set in the editor and save it"
            )
        return usable, skipped

    def _refusal(self, correction: Correction) -> str | None:
        """Why a correction cannot be taught; None if it can."""
        edit, grid = correction.edit, self.model.grid
        if correction.image_id not in self._pictures.index_of:
            return f'image_id is "{correction.image_id}", which is not in the data set'
        if edit.grid != grid:
            return (
                f"grid is {edit.grid[0]} x {edit.grid[1]}, but the model has {grid[0]} x {grid[1]} "
                "patches"
            )
        if edit.is_empty:
            return "no cell is painted"
        try:
            blocks = resolve_blocks(edit.blocks, self.model.depth)
            resolve_heads(edit.heads, self.model.num_heads)
        except ValueError as error:
            return str(error)
        if blocks[-1] < self.start:
            return f"blocks is {edit.blocks}, but only blocks from {self.start} on learn"
        return None

    def _train(
        self,
        usable: Sequence[Correction],
        progress: Progress,
        cancelled: Callable[[], bool],
        history: list[dict[str, float]],
    ) -> None:
        """All steps; `history` gets a row after each."""
        config, model = self.config, self.model

        def tell(step: int, steps: int, losses: dict[str, float]) -> None:
            progress(step, steps, losses)
            if cancelled():
                raise _Cancelled

        indices = [self._pictures.index_of[correction.image_id] for correction in usable]
        self._replay.keep(self._replayed, self._tick(tell))
        self._pictures.keep(indices, self._tick(tell))
        replayed, corrected = self._replay.batch(self._replayed), self._pictures.batch(indices)
        corrected |= targets([correction.edit for correction in usable], model, self.start)
        rng = np.random.default_rng(config.seed)
        old = _batches(len(self._replayed), config.batch_size, config.steps, rng)
        new = _batches(len(usable), config.batch_size, config.steps, rng)
        like = next(model.parameters())
        with _learning(model, _learning_modules(model, self.start)), _seeded(config.seed, like):
            # Weight decay, warm-up and clipping are those of training.
            plan = TrainConfig(lr=config.rate)
            optimizer = torch.optim.AdamW(parameter_groups(model, plan))
            learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer.zero_grad(set_to_none=True)  # of whatever the caller computed before
            scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: learning_rate_factor(step, config.steps, plan.warmup)
            )
            for step in range(1, config.steps + 1):
                cross_entropy, attention = teach_terms(
                    model,
                    self.start,
                    _part(replayed, old[step - 1], like),
                    _part(corrected, new[step - 1], like),
                    config,
                )
                loss = cross_entropy + config.lam * attention
                losses = {
                    "cross_entropy": cross_entropy.item(),
                    "attention_loss": attention.item(),
                }
                if not math.isfinite(loss.item()):
                    raise TrainingDiverged(
                        f"the loss is {loss.item()} in step {step} ({losses}); lower lr "
                        f"({config.rate:g}) or lam ({config.lam:g})"
                    )
                loss.backward()
                nn.utils.clip_grad_norm_(learning, plan.clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                history.append({"step": step, **losses})
                tell(step, config.steps, losses)

    def _state(self) -> list[dict[str, Tensor]]:
        """A copy of all that learns."""
        modules = _learning_modules(self.model, self.start)
        return [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]

    def _restore(self, state: list[dict[str, Tensor]]) -> None:
        _load(_learning_modules(self.model, self.start), state)

    def _last_level(self) -> tuple[list[dict[str, Tensor]], tuple[Correction, ...]]:
        if not self._levels:
            raise IndexError("there is nothing to undo: the model was not taught")
        return self._levels[-1]

    # ---------------------------------------------------------------------------- before and after

    def _groups(
        self, held_out: BirdDataset, most: int
    ) -> dict[str, tuple[TrunkTokens, np.ndarray, Tensor | None]]:
        """Pictures of each group, and of the corrected ones the cells painted low, `[n, P]`."""
        used = self._last_level()[1]
        ids = [correction.image_id for correction in used]
        corrected = np.array([self._pictures.index_of[one] for one in ids])
        asked = targets([correction.edit for correction in used], self.model, self.start)
        low = asked["painted"] & (asked["wanted"] < HALF)
        rng = np.random.default_rng(self.config.seed)

        def some(pictures: TrunkTokens, chosen: np.ndarray) -> tuple:
            known = {pictures.index_of.get(one) for one in ids}
            left = [i for i in rng.permutation(chosen) if i not in known]
            return pictures, np.array(left[:most], dtype=int), None

        others = self._tokens_of(held_out)
        classes = self._pictures.dataset.table["class_name"].to_numpy()[corrected]
        same = held_out.table["class_name"].isin(classes).to_numpy()
        return {
            "corrected": (self._pictures, corrected, low),
            "held out, same classes": some(others, np.flatnonzero(same)),
            "held out, other classes": some(others, np.flatnonzero(~same)),
            "replayed": some(self._replay, self._replayed),
        }


def _shown_by(bar: tqdm) -> Progress:
    def progress(step: int, steps: int, losses: dict[str, float]) -> None:
        bar.update(step - bar.n)
        bar.set_postfix(losses)

    return progress


def teach_terms(
    model: SigmoidViT,
    start: int,
    replayed: dict[str, Tensor],
    corrected: dict[str, Tensor],
    config: TeachConfig,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the replayed pictures and attention loss of the corrected ones.

    Args:
        start: the first block that learns.
        replayed: "tokens" `[B, N, dim]` that enter it, "label" `[B]`.
        corrected: "tokens" `[C, N, dim]`, and what `targets` gives.
        config: `loss` and `lam` are used; with lam = 0 the corrected pictures are left out.

    Returns:
        two scalars.
    """
    tokens, blocks = replayed["tokens"], range(start, model.depth)
    count = len(tokens)
    if config.lam == 0:
        scores = model.forward_tokens(tokens, start)
        attention = scores.new_zeros(())
    else:
        both = torch.cat([tokens, corrected["tokens"]])
        scores, rows = model.forward_tokens(both, start, rows=blocks)
        rows = {block: row[count:] for block, row in rows.items()}
        attention = correction_loss(config.loss, rows, corrected)
    return F.cross_entropy(scores[:count].float(), replayed["label"]), attention


def correction_loss(name: str, rows: dict[int, Tensor], asked: dict[str, Tensor]) -> Tensor:
    """The attention loss of corrected pictures: painted cells only, a mean over the pictures.

    Args:
        name: one of LOSSES. rows: `{block: [C, H, N]}`, class-row logits of all learning blocks.
        asked: what `targets` gives.
    """
    total = torch.zeros(())
    for position, logits in enumerate(rows.values()):
        cells = (logits.float(), asked["wanted"][:, None], asked["painted"][:, None])
        plain, centred = (LOSSES[name](*cells, offset) for offset in ("none", "centred"))
        losses = torch.where(asked["centred"][:, None], centred, plain)  # [C, H]
        total = total.to(losses) + (losses * asked["share"][:, position]).sum(dim=1).mean()
    return total


def targets(edits: Sequence[AttentionEdit], model: SigmoidViT, start: int) -> dict[str, Tensor]:
    """Edits as what the loss needs, C of them.

    Returns:
        "wanted" `[C, P]` in [0, 1], "painted" bool `[C, P]`, "centred" bool `[C]` (the offset),
        "share" `[C, blocks from start on, H]`: what each block and head counts in the picture's
        loss; sums to 1 over those that the edit names.
    """
    share = torch.zeros(len(edits), model.depth, model.num_heads)
    for one, edit in zip(share, edits, strict=True):
        blocks = [b for b in resolve_blocks(edit.blocks, model.depth) if b >= start]
        heads = list(resolve_heads(edit.heads, model.num_heads))
        one[np.ix_(blocks, heads)] = 1 / (len(blocks) * len(heads))
    return {
        "wanted": torch.stack([edit.values for edit in edits]).flatten(1),
        "painted": torch.stack([edit.mask for edit in edits]).flatten(1),
        "centred": torch.tensor([edit.offset == "centred" for edit in edits]),
        "share": share[:, start:],
    }


class TrunkTokens:
    """Pictures of a data set as the tokens that enter block `start`: each passes the trunk once.

    Tokens are kept in half precision in the computer's memory: 0.15 MB a picture with ViT-S/16.

    Raises:
        ValueError: the data set is augmented.
    """

    def __init__(self, model: SigmoidViT, dataset: BirdDataset, start: int) -> None:
        if dataset.augment:
            raise ValueError(
                "the pictures are augmented, so their tokens cannot be kept; make the data set "
                "with augment=False"
            )
        self.model, self.dataset, self.start = model, dataset, start
        ids = dataset.table["image_id"]
        self.index_of = {str(image_id): index for index, image_id in enumerate(ids)}
        self._items: dict[int, dict] = {}

    def keep(self, indices: Sequence[int], tick: Tick | None = None) -> None:
        """Takes pictures through the trunk unless that was done before.

        `tick` is called with the number of pictures left, before each part of them; where not
        given, a tqdm bar is shown.
        """
        missing = [index for index in dict.fromkeys(map(int, indices)) if index not in self._items]
        parts = range(0, len(missing), BATCH)
        hidden = tick is not None
        for at in tqdm(parts, desc="trunk", delay=1.0, leave=False, disable=hidden):
            if tick is not None:
                tick(len(missing) - at)
            self._pass(missing[at : at + BATCH])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Items as the data set makes them, stacked, "tokens" `[n, N, dim]` in place of "image"."""
        self.keep(indices)
        return default_collate([self._items[int(index)] for index in indices])

    @torch.no_grad()
    def _pass(self, indices: Sequence[int]) -> None:
        items = [self.dataset[index] for index in indices]
        images = torch.stack([item.pop("image") for item in items])
        with _learning(self.model, []):
            tokens = self.model.tokens(images.to(next(self.model.parameters())), self.start)
        for index, item, one in zip(indices, items, tokens.half().cpu(), strict=True):
            self._items[index] = {**item, "tokens": one}


def spread(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of `count` labels, one of each class in turn, at random within a class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = pd.Series(labels[order]).groupby(labels[order]).cumcount().to_numpy()
    return order[np.argsort(turn, kind="stable")][:count]


def _batches(count: int, size: int, steps: int, rng: np.random.Generator) -> Tensor:
    """Positions below `count` for every step, `[steps, size]`: each once, then each again."""
    size = min(size, count)
    passes = [rng.permutation(count) for _ in range(math.ceil(steps * size / count))]
    return torch.from_numpy(np.concatenate(passes)[: steps * size].reshape(steps, size))


def _part(batch: dict[str, Tensor], chosen: Tensor, like: Tensor) -> dict[str, Tensor]:
    """Chosen items, on the device of `like`; the tokens in its precision."""
    part = {name: value[chosen].to(like.device) for name, value in batch.items()}
    return {**part, "tokens": part["tokens"].to(like)}


def _learning_modules(model: SigmoidViT, start: int) -> list[nn.Module]:
    """The blocks from `start` on, the final norm and the head."""
    last, *rest = trained_modules(model, "last_block")
    return [*model.vit.blocks[start:-1], last, *rest]


def _load(modules: Sequence[nn.Module], state: Sequence[dict[str, Tensor]]) -> None:
    for module, part in zip(modules, state, strict=True):
        module.load_state_dict(part)


@contextmanager
def _learning(model: SigmoidViT, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Only these modules learn, all else is used as in evaluation; afterwards all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        for module in modules:
            module.train().requires_grad_(True)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _seeded(seed: int, like: Tensor) -> Iterator[None]:
    """Dropout as the seed decides it, and the caller's random numbers as if nothing had been."""
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        torch.manual_seed(seed)
        yield


def _scores_and_row(
    model: SigmoidViT, pictures: TrunkTokens, indices: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Class scores `[n, classes]` and the last block's class rows `[n, H, N]`."""
    like = next(model.parameters())
    batch = _part(pictures.batch(indices), torch.arange(len(indices)), like)
    with _learning(model, []):
        scores, rows = model.forward_tokens(batch["tokens"], pictures.start, rows="last")
    return scores, rows[model.depth - 1]


@torch.no_grad()
def _look(
    model: SigmoidViT, pictures: TrunkTokens, indices: np.ndarray, low: Tensor | None
) -> pd.DataFrame:
    """One row a picture: the columns of `Teacher.before_after`; `low` is `[n, P]` or None."""
    found = []
    for at in range(0, len(indices), BATCH):
        part = indices[at : at + BATCH]
        scores, row = _scores_and_row(model, pictures, part)
        known = {key: value.to(scores.device) for key, value in pictures.batch(part).items()}
        attention = metrics.patch_attention(row, model.num_prefix)
        columns = {
            "accuracy": metrics.top_k(scores, known["label"], 1).float(),
            "NSS": metrics.nss(attention, known["fixations"]),
            "CC": metrics.cc(attention, known["human"]),
        }
        if low is not None:
            region = low[at : at + BATCH].to(attention)
            share = metrics.energy_inside(attention, region)
            columns["attention on cells painted low"] = share.where(region.any(1), torch.nan)
        found.append(pd.DataFrame({key: value.cpu() for key, value in columns.items()}))
    frame = pd.concat(found, ignore_index=True)
    table = pictures.dataset.table.iloc[indices].reset_index(drop=True)
    if "decoy" in table:
        only = frame["accuracy"].where(conflicting_decoys(table))
        frame.insert(1, "conflicting-decoy accuracy", only)
    if frame["NSS"].notna().any():
        return frame.drop(columns="CC")
    return frame.drop(columns="NSS")
