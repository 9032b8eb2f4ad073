"""Live curves of a training, in a notebook."""

from __future__ import annotations

import time

import pandas as pd
from IPython.display import display

from lib import figures
from lib.training.state import Progress


class LiveCurves:
    """Draws loss and accuracy while a model trains: `train_run(..., watch=LiveCurves())`.

    Args:
        seconds: least time between two drawings; the end of an epoch is always drawn.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        self.seconds = seconds
        self._epochs, self._drawn, self._handle = 0, float("-inf"), None

    def __call__(self, progress: Progress) -> None:
        """Draws what there is, in the place of what was drawn before."""
        is_new_epoch = len(progress.history) > self._epochs
        if not is_new_epoch and time.monotonic() - self._drawn < self.seconds:
            return
        self._epochs, self._drawn = len(progress.history), time.monotonic()
        figure = figures.training_curves(
            pd.DataFrame(progress.steps), pd.DataFrame(progress.history)
        )
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        elif self._handle:
            self._handle.update(figure)
        figures.plt.close(figure)  # else the notebook draws it once more at the end of the cell
