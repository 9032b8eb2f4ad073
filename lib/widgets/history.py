"""What a person has done on one picture, step by step; arrays only, no widget."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lib.edit import EPS, LOW, as_odds

SLIDERS = {"strength": (1.0, 1.0), "sharpness": (1.0, 4.0), "suppression": (0.0, 1.0)}  # off, most
OFF = {name: off for name, (off, _) in SLIDERS.items()}


@dataclass(frozen=True, eq=False)
class Work:
    """All that a person has set for one picture. Never changed: a step makes a new one.

    Raises ValueError for a value outside its range.
    """

    painted: np.ndarray  # float32 [gh, gw] in [0, 1], NaN where nothing is painted; read-only
    # In [0, 1]: share of the shift of the logits that is made; 0 is no edit.
    strength: float = OFF["strength"]
    # From 0: every value v of the map becomes sigmoid(sharpness * logit(v)), the painted ones too.
    sharpness: float = OFF["sharpness"]
    # In [0, 1]: share by which the cells that nobody painted go down to `LOW`.
    suppression: float = OFF["suppression"]
    scope: Mapping[str, Any] = field(default_factory=dict)  # blocks, heads, queries, offset

    def __post_init__(self) -> None:
        painted = self.painted.astype(np.float32)
        wrong = (painted < 0) | (painted > 1)
        if wrong.any():
            raise ValueError(f"{painted[wrong][0]:g} is painted; sigmoid attention is from 0 to 1")
        painted.flags.writeable = False
        vars(self).update(painted=painted, scope=dict(self.scope))  # frozen for everybody else
        for name, (_, most) in SLIDERS.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name):g}; give 0 to {most:g}")

    def equals(self, other: Work) -> bool:
        """Whether both ask for the same."""
        return np.array_equal(self.painted, other.painted, equal_nan=True) and all(
            getattr(self, name) == getattr(other, name) for name in (*SLIDERS, "scope")
        )

    @property
    def sliders(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in SLIDERS}


class History:
    """The works of one picture; its length counts them all.

    Args:
        grid: (gh, gw). scope: of the first work, which is unpainted and has the sliders `OFF`.
    """

    def __init__(self, grid: tuple[int, int], scope: Mapping[str, Any]) -> None:
        first = Work(np.full(grid, np.nan), scope=scope)
        self._steps: list[tuple[Work, Hashable]] = [(first, None)]
        self._position = 0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def work(self) -> Work:
        return self._steps[self._position][0]

    @property
    def can_undo(self) -> bool:
        return self._position > 0

    @property
    def can_redo(self) -> bool:
        return self._position < len(self) - 1

    def change(self, gesture: Hashable = None, **changes: Any) -> None:
        """The current work with changes, as one step; what was undone is gone.

        Steps in a row that name the same `gesture`, as the versions of one stroke do, are one.
        """
        work = replace(self.work, **changes)
        if work.equals(self.work):
            return
        goes_on = gesture is not None and gesture == self._steps[self._position][1]
        self._steps[self._position + (not goes_on) :] = [(work, gesture)]
        self._position = len(self) - 1

    def start_with(self, scope: Mapping[str, Any]) -> None:
        """Another scope of the first work; nothing where more has been done."""
        if len(self) == 1:
            self._steps = [(replace(self.work, scope=scope), None)]

    def undo(self) -> None:
        """One step back, where there is one."""
        self._position = max(self._position - 1, 0)

    def redo(self) -> None:
        """One step forward again, where there is one."""
        self._position = min(self._position + 1, len(self) - 1)


def asked_map(
    own: np.ndarray, painted: np.ndarray, strength: float, sharpness: float, suppression: float
) -> np.ndarray:
    """What a person asks for, float32 [gh, gw] in [0, 1]; the settings are those of a `Work`.

    Args:
        own: the model's map. painted: NaN where nothing is painted.
    """
    free = np.isnan(painted)
    wanted = np.where(free, own, painted)
    if sharpness != 1:
        wanted = _sigmoid(sharpness * as_logits(wanted))
    wanted = np.where(free, wanted + suppression * (LOW - wanted), wanted)
    if strength < 1:  # a share of the shift of the logits
        moved = _sigmoid((1 - strength) * as_logits(own) + strength * as_logits(wanted))
        wanted = np.where(wanted == own, own, moved)
    return np.clip(wanted, 0, 1).astype(np.float32)


def in_proportion(weights: np.ndarray, own: np.ndarray) -> np.ndarray:
    """`lib.edit.as_odds` of weights [gh, gw]: the known cells share what they have in `own`."""
    known = ~np.isnan(weights)
    now = np.exp(as_logits(own))[known].mean() if known.any() else 1.0
    return as_odds(weights, now)


def as_logits(values: np.ndarray) -> np.ndarray:
    inside = np.clip(values.astype(np.float64), EPS, 1 - EPS)
    return np.log(inside / (1 - inside))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))
