"""Figures: arrays and tables in, one matplotlib Figure out, none shown here."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from lib.figures.fonts import label
from lib.figures.overlays import (
    PALETTE,
    as_file,
    editor_state,
    maps_in_a_row,
    overlay,
    picture,
    rows_of_maps,
    sample_sheet,
    snapshot_sheet,
    strength_frame,
    transparent,
)
from lib.figures.results import (
    accuracy_and_alignment,
    comparison,
    curves,
    erasing,
    ladder,
    outliers,
    reliability,
    rule_changes,
    true_class_density,
)
from lib.figures.trainings import (
    by_lambda,
    choices,
    histories,
    pareto,
    parts,
    training_curves,
    turns,
)
