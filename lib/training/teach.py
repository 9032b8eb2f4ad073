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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.config import TrainConfig
from lib.data.classes import other_classes
from lib.data.corrections import Correction, found_again
from lib.data.dataset import BirdDataset
from lib.edit import AttentionEdit, resolve_heads
from lib.losses import CORRECTION_LOSSES, HALF, correction_loss
from lib.model.adapter import restoring
from lib.model.vit import SigmoidViT
from lib.training.learning import (
    freeze,
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
    set_train_mode,
    trained_modules,
)
from lib.training.loop import TrainingDiverged
from lib.training.taught import Example, Group, compare, examples, groups, own_copy
from lib.training.tokens import CachedTokens, Tick

OnStep = Callable[[int, int, dict[str, float]], None]

UNDO_LEVELS = 10  # a level of ViT-S/16 takes 7 MB a learning block


@dataclass(frozen=True)
class TeachConfig:
    """How deep, how long and how fast a model is taught."""

    last_blocks: int = 1  # blocks that learn, with the final norm and the head; all: the depth
    loss: Literal["mass", "mse", "bce"] = "mass"  # of the painted cells, see lib/losses.py
    lam: float = 3.0  # weight of the attention loss; 0 is the control: replay alone
    steps: int = 60  # updates of the weights
    lr: float | None = None  # peak learning rate of AdamW; None: 1e-3 for one block, 2e-4 for more
    batch_size: int = 32  # pictures a step: so many replayed, and corrected ones at most
    replay: int = 512  # training pictures to replay, spread over the classes
    seed: int = 0  # which pictures are replayed, and their order

    def __post_init__(self) -> None:
        if self.loss not in CORRECTION_LOSSES:
            raise ValueError(f'loss is "{self.loss}"; use one of {", ".join(CORRECTION_LOSSES)}')
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
        ValueError: the model has fewer blocks than are to learn, or a data set is augmented or has
            other classes than the model.
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
        self._learning = nn.ModuleList(trained_modules(model, self.config.last_blocks))
        # One store a data set, however often it is named.
        self._tokens_of = cache(lambda some: CachedTokens(model, some, self.config.last_blocks))
        self._replay = self._tokens_of(replay)
        self._pictures = self._tokens_of(replay if pictures is None else pictures)
        labels = replay.table["label"].to_numpy()
        self._replayed = spread_over_classes(labels, self.config.replay, self.config.seed)
        self._levels: list[tuple[dict[str, Tensor], tuple[Correction, ...]]] = []

    def teach(
        self,
        corrections: Sequence[Correction],
        progress: OnStep | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> TeachReport:
        """Trains the model to look where the corrections say.

        A correction is taught in those of its blocks that learn, in its heads or in their mean, and
        in the row of the class token, whatever its `queries` and `strength` are. All corrections
        weigh the same, however much is painted. The fingerprint of the weights that they were made
        on does not matter: where to look is said of the picture.

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
        before = copy.deepcopy(self._learning.state_dict())
        history, stopped = [], False
        try:
            hidden, steps = progress is not None, self.config.steps
            with tqdm(total=steps, desc="teaching", leave=False, disable=hidden) as bar:
                self._train(usable, progress or _shown_by(bar), cancelled, history)
        except BaseException as error:  # an interrupt from the keyboard too
            self._learning.load_state_dict(before)
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
        self._learning.load_state_dict(self._last_level()[0])
        self._levels.pop()

    def before(self) -> SigmoidViT:
        """An `own_copy` of the model as `undo` would bring it back; IndexError as there."""
        state, blocks = self._last_level()[0], self.config.last_blocks
        model = own_copy(self.model, blocks)
        nn.ModuleList(trained_modules(model, blocks)).load_state_dict(state)
        return model

    def before_after(
        self, held_out: BirdDataset, most: int = 100, progress: OnStep | None = None
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
        tick = progress and _told_to(progress, self.config.steps)
        return compare(models, self._groups(held_out, most), tick)

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
        return examples(models, self._groups(held_out, most), edits, most)

    def _groups(self, held_out: BirdDataset, most: int) -> dict[str, Group]:
        used = self._last_level()[1]
        asked = targets([correction.edit for correction in used], self.model, self.start)
        low = asked["painted"] & (asked["wanted"] < HALF)
        indices = np.array([self._pictures.index_of[correction.image_id] for correction in used])
        corrected = Group(self._pictures, indices, low)
        replayed = Group(self._replay, self._replayed)
        return groups(corrected, replayed, self._tokens_of(held_out), most, self.config.seed)

    # ------------------------------------------------------------------------------- one teaching

    def _sort(
        self, corrections: Sequence[Correction]
    ) -> tuple[tuple[Correction, ...], tuple[tuple[str, str], ...]]:
        """The corrections that can be taught, and image id and reason of the others."""
        columns = self._pictures.dataset.table[["image_id", "class_name", "path"]]
        known = {str(i): (name, Path(path).name) for i, name, path in columns.to_numpy()}
        found, gone = found_again(corrections, known)
        pairs = [(one, self._refusal(one)) for one in found]
        pairs += [(one, f"its picture, {one.file}, is not in the data set") for one in gone]
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
        index = self._pictures.index_of[correction.image_id]
        shown = self._pictures.dataset.table["class_name"].iloc[index]
        if correction.class_name and other_classes([correction.class_name], [shown]):
            return f"it is of the class {correction.class_name}, but that picture of {shown}"
        if edit.grid != grid:
            return (
                f"grid is {edit.grid[0]} x {edit.grid[1]}, but the model has {grid[0]} x {grid[1]} "
                "patches"
            )
        if edit.is_empty:
            return "no cell is painted" if not edit.mask.any() else "its strength is 0"
        try:
            blocks = self.model.layout.resolve(edit.blocks)
            [resolve_heads(edit.heads, self.model.layout.heads[block]) for block in blocks]
        except ValueError as error:
            return str(error)
        if blocks[-1] < self.start:
            return f"blocks is {edit.blocks}, but only blocks from {self.start} on learn"
        return None

    def _train(
        self,
        usable: Sequence[Correction],
        progress: OnStep,
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
        self._replay.keep(self._replayed, _told_to(tell, config.steps))
        self._pictures.keep(indices, _told_to(tell, config.steps))
        like = next(model.parameters())
        batch = self._replay.batch(self._replayed)
        replayed = {name: batch[name].to(like.device) for name in ("tokens", "label")}
        asked = targets([correction.edit for correction in usable], model, self.start)
        corrected = {"tokens": self._pictures.batch(indices)["tokens"]} | asked
        corrected = {name: value.to(like.device) for name, value in corrected.items()}
        rng = np.random.default_rng(config.seed)
        old = _batches(len(self._replayed), config.batch_size, config.steps, rng).to(like.device)
        new = _batches(len(usable), config.batch_size, config.steps, rng).to(like.device)
        plan = TrainConfig(lr=config.rate)  # weight decay, warm-up and clipping as in training
        with restoring(model), torch.random.fork_rng([like.device] if like.is_cuda else []):
            torch.manual_seed(config.seed)  # of dropout; the caller's random numbers stay
            freeze(model, config.last_blocks)
            set_train_mode(model, config.last_blocks)
            optimizer = make_optimizer(model, plan, like.device)
            optimizer.zero_grad(set_to_none=True)  # of whatever the caller computed before
            for step in range(config.steps):
                set_learning_rate(optimizer, learning_rate_factor(step, config.steps, plan.warmup))
                parts = _chosen(replayed, old[step], like), _chosen(corrected, new[step], like)
                cross_entropy, attention = teach_terms(model, *parts, config)
                loss = cross_entropy + config.lam * attention
                terms = torch.stack([loss, cross_entropy, attention]).tolist()  # a GPU's one wait
                losses = dict(zip(("cross_entropy", "attention_loss"), terms[1:], strict=True))
                if not math.isfinite(terms[0]):
                    raise TrainingDiverged(
                        f"the loss is {terms[0]} in step {step + 1} ({losses}); lower lr "
                        f"({config.rate:g}) or lam ({config.lam:g})"
                    )
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                history.append({"step": step + 1, **losses})
                tell(step + 1, config.steps, losses)

    def _last_level(self) -> tuple[dict[str, Tensor], tuple[Correction, ...]]:
        if not self._levels:
            raise IndexError("there is nothing to undo: the model was not taught")
        return self._levels[-1]


def _told_to(progress: OnStep, steps: int) -> Tick:
    """How pictures that pass the trunk are told of."""
    return lambda left: progress(0, steps, {"pictures": left})


def _shown_by(bar: tqdm) -> OnStep:
    def progress(step: int, steps: int, losses: dict[str, float]) -> None:
        bar.update(step - bar.n)
        bar.set_postfix(losses)

    return progress


def teach_terms(
    model: SigmoidViT,
    replayed: dict[str, Tensor],
    corrected: dict[str, Tensor],
    config: TeachConfig,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the replayed pictures and attention loss of the corrected ones.

    Args:
        replayed: "tokens" `[B, N, dim]` that enter the blocks that learn, "label" `[B]`.
        corrected: "tokens" `[C, N, dim]`, and what `targets` gives.
        config: with lam = 0 the corrected pictures are left out.

    Returns:
        two scalars.
    """
    tokens, start = replayed["tokens"], model.depth - config.last_blocks
    count = len(tokens)
    if config.lam == 0:
        scores = model.forward_tokens(tokens, start)
        attention = scores.new_zeros(())
    else:
        both = torch.cat([tokens, corrected["tokens"]])
        scores, rows = model.forward_tokens(both, start, rows=model.layout.read_from(start))
        rows = {block: row[count:] for block, row in rows.items()}
        attention = correction_loss(config.loss, rows, corrected)
    return F.cross_entropy(scores[:count].float(), replayed["label"]), attention


def targets(edits: Sequence[AttentionEdit], model: SigmoidViT, start: int) -> dict[str, Tensor]:
    """Edits as what the loss needs, C of them.

    Returns:
        "wanted" `[C, P]` in [0, 1], "painted" bool `[C, P]`, "centred" bool `[C]` (the offset),
        "mean" bool `[C]` (of the heads' mean), "share" `[C, blocks, H]`: what each block from
        start on that has a row and each head count in the picture's loss; sums to 1.
    """
    layout = model.layout
    share = torch.zeros(len(edits), model.depth, max(layout.heads))
    for one, edit in zip(share, edits, strict=True):
        for block in (blocks := [b for b in layout.resolve(edit.blocks) if b >= start]):
            heads = list(resolve_heads(edit.heads, layout.heads[block]))
            one[block, heads] = 1 / (len(blocks) * len(heads))
    return {
        "wanted": torch.stack([edit.values for edit in edits]).flatten(1),
        "painted": torch.stack([edit.mask for edit in edits]).flatten(1),
        "centred": torch.tensor([edit.offset == "centred" for edit in edits]),
        "mean": torch.tensor([edit.heads == "mean" for edit in edits]),
        "share": share[:, layout.read_from(start)],
    }


def spread_over_classes(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of `count` labels, one of each class in turn, at random within a class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = pd.Series(labels[order]).groupby(labels[order]).cumcount().to_numpy()
    return order[np.argsort(turn, kind="stable")][:count]


def _batches(count: int, size: int, steps: int, rng: np.random.Generator) -> Tensor:
    """Positions below `count` for every step, `[steps, size]`: each once, then each again."""
    size = min(size, count)
    passes = [rng.permutation(count) for _ in range(math.ceil(steps * size / count))]
    return torch.from_numpy(np.concatenate(passes)[: steps * size].reshape(steps, size))


def _chosen(batch: dict[str, Tensor], chosen: Tensor, like: Tensor) -> dict[str, Tensor]:
    """Chosen items; the tokens in the precision of `like`."""
    part = {name: value[chosen] for name, value in batch.items()}
    return {**part, "tokens": part["tokens"].to(like)}
