"""Figures: arrays and tables in, one matplotlib Figure out, none shown here."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from lib.figures.maps import (
    LONGEST,
    MAP_COLOURS,
    PALETTE,
    SPLITS,
    gallery,
    maps_in_a_row,
    overlay,
    picture,
    token_gallery,
)
from lib.figures.results import (
    accuracy_and_alignment,
    artefacts,
    comparison,
    curves,
    erasing,
    ladder,
    reliability,
    token_norms,
    true_class_density,
)
from lib.figures.training import (
    by_lambda,
    choices,
    histories,
    pareto,
    parts,
    training_curves,
    turns,
)

__all__ = [
    "Figure",
    "plt",
    "LONGEST",
    "MAP_COLOURS",
    "PALETTE",
    "SPLITS",
    "accuracy_and_alignment",
    "artefacts",
    "by_lambda",
    "choices",
    "comparison",
    "curves",
    "erasing",
    "gallery",
    "histories",
    "ladder",
    "maps_in_a_row",
    "overlay",
    "pareto",
    "parts",
    "picture",
    "reliability",
    "token_gallery",
    "token_norms",
    "training_curves",
    "true_class_density",
    "turns",
]
