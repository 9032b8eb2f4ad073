"""Sigmoid Attention ViT: correct where a Vision Transformer looks.

The face of the package: the names below are here, each loaded when it is first asked for, so that
`import lib` costs nothing and a server without Jupyter can train.
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "SigmoidViT": "model.vit",
    "create_model": "model.vit",
    "load_weights": "model.weights",
    "zero_shot": "model.zero_shot",
    "AttentionEdit": "edit",
    "attention_loss": "losses",
    "make_dataset": "data.dataset",
    "train_run": "training.runs",
    "LiveSession": "widgets.session",
    "attention_editor": "widgets.editor",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
