"""Finding a picture worth correcting among thousands: small pictures in pages, and filters.

What a filter needs of the model is computed in a thread of its own, batch by batch, the pictures
that promise most first; what is known is shown meanwhile. The model is only read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from time import monotonic

import ipywidgets as widgets
import numpy as np
from torch.utils.data import Subset

from lib.data.dataset import BirdDataset, conflicting_decoys
from lib.evaluation import metrics
from lib.model.predict import predict
from lib.model.vit import SigmoidViT
from lib.training.teach import spread_over_classes
from lib.widgets.controller import EditorController
from lib.widgets.panel import Panel, in_row, told
from lib.widgets.shelf import CorrectionFolder
from lib.widgets.thumbs import TELL, Thumbnails

PAGE = 24  # pictures a page
BATCH = 8  # pictures that pass the model together: scores wait for one batch at most
EVERY = "every class"
Looked = tuple[np.ndarray, dict[str, np.ndarray]]  # positions, and what `look` gave of them


@dataclass(frozen=True)
class Filter:
    """One way to choose pictures."""

    text: str  # in the menu
    found: str  # how those that it finds are called, "3 are wrong"
    column: str | None = None  # of `Seen`, by which they are sorted; None: the model is not asked
    descending: bool = False


FILTERS = {
    "all": Filter("all pictures", ""),
    "wrong": Filter("wrong, nearly right first", "wrong", "p_true", descending=True),
    "unsure": Filter("least sure first", "", "confidence"),
    "disagrees": Filter("disagrees with people, most first", "with a human map", "cc"),
    "conflicting": Filter("decoy of another class", ""),
    "corrected": Filter("corrected", ""),
}


class Seen:
    """What the model makes of each picture of a data set, as far as that is known; [N] each."""

    def __init__(self, count: int) -> None:
        self.asked = np.zeros(count, dtype=bool)  # the others were not looked at yet
        self.predicted = np.full(count, -1)  # label; -1: not known
        self.p_true = np.full(count, np.nan)  # probability of the true class
        self.confidence = np.full(count, np.nan)  # and of the predicted one
        self.cc = np.full(count, np.nan)  # last block's softmax, mean of heads, with people's map

    @property
    def known(self) -> np.ndarray:
        return self.predicted >= 0

    def keep(self, indices: Sequence[int], looked: dict[str, np.ndarray]) -> None:
        """Takes in what `look` gave; nothing of pictures that cannot be read."""
        self.asked[indices] = True
        for name, values in looked.items():
            getattr(self, name)[indices] = values


def look(model: SigmoidViT, dataset: BirdDataset, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """The columns of `Seen` for a few pictures, which pass the model as one batch."""
    chosen = Subset(dataset, list(indices))
    # No processes: they would be started from a thread.
    batch, scores, rows = next(iter(predict(model, chosen, len(chosen), workers=0)))
    probabilities = scores.softmax(-1)
    attention = metrics.patch_attention(rows[model.depth - 1].float(), model.num_prefix)
    human = (batch["human"] * batch["valid"]).to(attention)
    found = {
        "predicted": scores.argmax(-1),
        "p_true": probabilities.gather(1, batch["label"][:, None])[:, 0],
        "confidence": probabilities.amax(-1),
        "cc": metrics.cc(attention, human),  # NaN without a map
    }
    return {name: values.cpu().numpy() for name, values in found.items()}


def promising(dataset: BirdDataset) -> np.ndarray:
    """All positions of a data set, those first where a model is most likely to be wrong.

    Validation pictures before training pictures, drawn birds whose decoy names another class before
    others, and those of a class far from each other.
    """
    table = dataset.table
    order = spread_over_classes(table["label"].to_numpy(), len(table), seed=0)
    if "decoy" in table:
        order = order[np.argsort(~conflicting_decoys(table).to_numpy()[order], kind="stable")]
    if "part" in table:
        order = order[np.argsort((table["part"] != "val").to_numpy()[order], kind="stable")]
    return order


def worth_opening(model: SigmoidViT, dataset: BirdDataset, most: int = 128) -> tuple[int, str]:
    """A picture to begin with, found without running all of them: the first that is wrong.

    Args:
        most: pictures that are looked at, at most. Where all of them are right, it is the one of
            which the model is least sure.

    Returns:
        its position in the data set, and a sentence on it.
    """
    seen, order = Seen(len(dataset)), promising(dataset)[:most]
    labels = dataset.table["label"].to_numpy()
    for start in range(0, len(order), BATCH):
        indices = order[start : start + BATCH]
        seen.keep(indices, look(model, dataset, indices))
        wrong = indices[seen.predicted[indices] != labels[indices]]
        if len(wrong):
            return int(wrong[0]), _sentence(dataset, seen, wrong[0])
    index = order[np.argmin(seen.confidence[order])]
    words = f"All {len(order)} pictures that were looked at are right; this is the least sure one. "
    return int(index), words + _sentence(dataset, seen, index)


def three_examples(model: SigmoidViT, dataset: BirdDataset, most: int = 64) -> dict[str, int]:
    """Pictures for a class, by what the model makes of them; of the first `most`, see `promising`.

    Returns:
        positions by name: "a mistake", the surest one; "unsure" and "sure", the right ones of which
        it is least and most sure. What there is none of is left out.
    """
    seen, order = Seen(len(dataset)), promising(dataset)[:most]
    seen.keep(order, look(model, dataset, order))
    is_right = (seen.predicted == dataset.table["label"].to_numpy())[order]
    wrong, right = order[~is_right], order[is_right]
    found = {}
    if len(wrong):
        found["a mistake"] = wrong[np.argmax(seen.confidence[wrong])]
    if len(right):
        found["unsure"] = right[np.argmin(seen.confidence[right])]
        found["sure"] = right[np.argmax(seen.confidence[right])]
    return {name: int(index) for name, index in found.items()}


def _sentence(dataset: BirdDataset, seen: Seen, index: int) -> str:
    row = dataset.table.iloc[index]
    said = dataset.classes[seen.predicted[index]]
    right = "that is right" if seen.predicted[index] == row["label"] else f"it is {row.class_name}"
    return f"Picture {row.image_id}: the model says {said} ({seen.confidence[index]:.2f}); {right}."


class PictureBrowser(Panel):
    """Pictures to open in the editor, in pages.

    Args:
        controller: of a `LiveSession`; gets the picture that is pressed.
        changed: called after that, such as the editor's `refresh`.
        folder: of saved corrections, which can be a filter.

    Attributes:
        seen: what is known of the session's model.
        thumbs: the page of pictures.
    """

    def __init__(
        self,
        controller: EditorController,
        changed: Callable[[], None] = lambda: None,
        folder: str | Path = "corrections",
    ) -> None:
        super().__init__()
        self.controller, self.changed = controller, changed
        self.session = controller.session
        self._corrections = CorrectionFolder(folder, self.session)
        self._stop = Event()
        self._computing = False
        self._fingerprint = self.session.fingerprint
        self.dataset: BirdDataset = self.session.dataset
        self.seen = Seen(len(self.dataset))
        self._labels = self.dataset.table["label"].to_numpy()
        self._promising: np.ndarray | None = None
        style = {"description_width": "initial"}
        kinds = {one.text: name for name, one in FILTERS.items() if self._offers(name)}
        classes = {EVERY: -1} | {name: k for k, name in enumerate(self.dataset.classes)}
        for name, text, options in (("filter", "Show", kinds), ("class", "Class", classes)):
            menu = widgets.Dropdown(options=list(options.items()), description=text, style=style)
            menu.observe(lambda _: self.act(self._chose), "value")
            self.controls[name] = menu
        self.button("look", "Stop", self._stop_or_go_on)
        self._bar = widgets.IntProgress(layout=widgets.Layout(width="auto"))
        self._words, self._error = widgets.HTML(), widgets.HTML()
        self.thumbs = Thumbnails(self, self._picture, self._name, self._open, PAGE)
        row = in_row(self.controls[name] for name in ("filter", "class", "look"))
        self.children = [row, self._bar, self._words, self._error, self.thumbs]
        self.add_class("teach-panel")  # the frame of all panels
        self._list()

    def refresh(self) -> None:
        """Shows which picture is open; another model is asked anew."""
        if self._fingerprint != self.session.fingerprint:
            self._fingerprint = self.session.fingerprint
            self.seen = Seen(len(self.dataset))
            self._chose()
        elif self.controls["filter"].value == "corrected":
            self._list()
        else:
            self.thumbs.show(self.thumbs.items, self.controller.index)

    def show_error(self, html: str) -> None:
        self._error.value = html

    # -- what is listed

    def _offers(self, name: str) -> bool:
        if name == "conflicting":
            return "decoy" in self.dataset.table
        return name != "disagrees" or bool(self.dataset.has_map.any())

    def _candidates(self) -> np.ndarray:
        """Those that the model is not needed for to choose, bool [N]."""
        kind, label = self.controls["filter"].value, self.controls["class"].value
        chosen = (self._labels == label) if label >= 0 else np.ones(len(self._labels), dtype=bool)
        if kind == "conflicting":
            chosen &= conflicting_decoys(self.dataset.table).to_numpy()
        elif kind == "disagrees":
            chosen &= self.dataset.has_map
        elif kind == "corrected":
            here = [one.index for one in self._corrections.entries() if one.index is not None]
            chosen &= np.isin(np.arange(len(chosen)), here)
        return chosen

    def _found(self) -> np.ndarray:
        """Positions of the pictures that the filter finds among what is known, in its order."""
        kind, chosen = FILTERS[self.controls["filter"].value], self._candidates()
        if kind.column is None:
            return np.flatnonzero(chosen)
        chosen &= self.seen.known
        if kind is FILTERS["wrong"]:
            chosen &= self.seen.predicted != self._labels
        values = getattr(self.seen, kind.column)
        chosen = np.flatnonzero(chosen & ~np.isnan(values))
        return chosen[np.argsort(values[chosen] * (-1) ** kind.descending, kind="stable")]

    def _list(self, stays: bool = False) -> None:
        """Lists what is found; where the pages up to this one are to stay, others follow them."""
        items = self._found().tolist()
        if stays:
            found = set(items)
            end = (self.thumbs.page + 1) * PAGE
            first = [item for item in self.thumbs.items[:end] if item in found]
            placed = set(first)
            items = first + [item for item in items if item not in placed]
        self.thumbs.show(items, self.controller.index)
        self._tell(len(items))

    def _tell(self, found: int) -> None:
        kind, candidates = FILTERS[self.controls["filter"].value], self._candidates()
        total, button = int(candidates.sum()), self.controls["look"]
        known = int((candidates & self.seen.asked).sum())
        needed = kind.column is not None
        words = f"{total} picture{'s' * (total != 1)}"
        if needed:
            so_far = f"looked at {known} of {total}" if known < total else f"all {total} looked at"
            words = f"{so_far}: {found} {kind.found}" if kind.found else so_far
            if known < total and not self._computing:
                words = f"stopped; {words}"
            if self.session.now.model is not self.session.model:
                words += ", at the model's own picture size"
        self._words.value = told(words)
        self._bar.max, self._bar.value = max(total, 1), known
        busy = needed and known < total
        self._bar.layout.display = button.layout.display = None if busy else "none"
        button.description = "Stop" if self._computing else "Go on"

    # -- callbacks

    def _chose(self) -> None:
        self._stop.set()
        self._computing = False
        self.thumbs.page = 0
        self._go_on()

    def _stop_or_go_on(self) -> None:
        if not self._computing:
            return self._go_on()
        self._stop.set()
        self._computing = False
        self._list(stays=True)

    def _open(self, index: int) -> None:
        self._error.value = ""
        self.controller.open(index)
        self.thumbs.show(self.thumbs.items, index)
        self.changed()

    # -- asking the model

    def _go_on(self) -> None:
        """Asks the model about the candidates that it was not asked about, where that is needed."""
        if FILTERS[self.controls["filter"].value].column is None:
            return self._list()
        if self._promising is None:
            self._promising = promising(self.dataset)
        wanted = self._candidates() & ~self.seen.asked
        order = self._promising[wanted[self._promising]]
        self._computing = len(order) > 0
        self._list()
        if self._computing:
            model, seen = self.session.model, self.seen
            self._stop = self.behind(lambda tell, stop: self._ask(model, seen, order, tell, stop))

    def _ask(
        self, model: SigmoidViT, seen: Seen, order: np.ndarray, tell: Callable, stop: Event
    ) -> None:
        found: list[Looked] = []
        said = 0.0
        for start in range(0, len(order), BATCH):
            if stop.is_set():
                break
            found += self._look(model, order[start : start + BATCH])
            if monotonic() - said > TELL:
                tell(partial(self._take, seen, found, False))
                found, said = [], monotonic()
        tell(partial(self._take, seen, found, not stop.is_set()))

    def _look(self, model: SigmoidViT, indices: np.ndarray) -> list[Looked]:
        try:
            return [(indices, look(model, self.dataset, indices))]
        except (OSError, ValueError):  # a picture that cannot be read; its thumbnail says why
            if len(indices) == 1:
                return [(indices, {})]
            return [one for index in indices for one in self._look(model, np.array([index]))]

    def _take(self, seen: Seen, found: list[Looked], is_all: bool) -> None:
        if seen is not self.seen:  # of a model that is no longer the session's
            return
        for one in found:
            seen.keep(*one)
        if is_all:
            self._computing = False
        self._list(stays=not is_all)

    # -- one picture

    def _picture(self, index: int) -> np.ndarray:
        return self.dataset.image(index)

    def _name(self, index: int) -> str:
        row, seen = self.dataset.table.iloc[index], self.seen
        words = [f"{row['class_name']} {row['image_id']}"]
        words += ["validation"] if row.get("part") == "val" else []
        if seen.known[index]:
            is_right = seen.predicted[index] == row["label"]
            said = "" if is_right else f" {self.dataset.classes[seen.predicted[index]]}"
            words.append(f"{'right' if is_right else 'wrong:'}{said} {seen.confidence[index]:.2f}")
        if self.controls["filter"].value == "disagrees":
            words.append(f"CC {seen.cc[index]:.2f}")
        return ", ".join(words)
