"""Everything that a run depends on, as dataclasses: one comment a field, one preset a data set.

`preset()` reads the environment variable PRESET ("toy" when unset), so one variable flips every
notebook and command. Folder locations and the backbone can come from the environment as well:

DATA_DIR  folder with the data            MODEL     timm name of the backbone
MAPS      gaze, boxes, parts, none, or    WEIGHTS   a file
          a folder of map files or of     RUNS_DIR  where trained models go
          corrections (the editor's)      CLASSES   such as 21-40; all when unset
SPLIT     a file of `python -m lib split` CACHE     1, or a folder: keep decoded pictures
TRAINABLE all, last_block, head or a      RECIPE    tuned, or original (see RECIPES)
          number of blocks                ZERO_SHOT a file: text embeddings of the classes

An empty variable is one that is not set. What a relative path means: `resolved`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from lib.files import ROOT, asked, bubbles_in, has_corrections, maps_beside, resolved, there

T = TypeVar("T")

PRESETS = ("toy", "cub2011", "cub2010", "folder")

# Words of `HumanConfig`, of which a `Sweep` compares several.
LossName = Literal["mse", "mse_zero", "bce", "kl", "cosine", "energy"]
Offset = Literal["none", "centred"]
MapControl = Literal["human", "shuffled", "mean", "box", "boxes"]  # "boxes" is kept as "box"
MapNoise = Literal["none", "shifted", "blurred", "half_readers"]


@dataclass
class DataConfig:
    """Which images, which human maps, and how an image is cut before the model sees it."""

    name: Literal["toy", "cub2011", "cub2010", "folder"] = "toy"  # see lib/data/sources.py
    root: Path = ROOT / "datasets"  # folder that holds the data (unused by toy)
    image_size: tuple[int, int] = (64, 64)  # height, width in pixels, as the model sees them
    # where human maps come from; "corrections" are those that were saved in the editor
    maps: Literal["gaze", "files", "corrections", "boxes", "box", "parts", "none"] = "gaze"
    maps_dir: Path | None = None  # "files": folder of .jpg, .png or .npy; "corrections": of .json
    gaze_runs: Literal["all"] | tuple[int, ...] = "all"  # which runs of the gaze collection
    sigma: float = 1.0  # standard deviation of one fixation's Gaussian, in sigma_unit
    sigma_unit: Literal["patch", "pixel"] = "patch"  # patch of the model, pixel of the picture
    weight: Literal["duration", "count"] = "duration"  # what one fixation weighs
    crop_scale: tuple[float, float] = (0.6, 1.0)  # share of the area a random training crop keeps
    # width to height of a training crop. None is that of the picture, which is squeezed; "input" is
    # that of image_size, so that nothing is, and crop_scale a share of the largest such crop
    crop_ratio: tuple[float, float] | Literal["input"] | None = (3 / 4, 4 / 3)
    flip: float = 0.5  # probability of a horizontal flip in training
    # mean, then standard deviation, of red, green and blue (0 to 1); None is those of the weights
    normalisation: tuple[float, float, float, float, float, float] | None = None
    split_file: Path | None = None  # made by `python -m lib split`; None is the published split
    split_md5: str | None = None  # of that file: another split is another experiment
    classes: str | None = None  # such as 1-20,35: only these, by number (lib/data/classes.py)
    val_share: float = 0.1  # share of each class's training images kept for validation
    cache: Path | None = None  # folder for decoded pictures; None decodes them every time
    toy_train: int = 600  # toy: number of training images
    toy_val: int = 200  # toy: number of validation images, decoy as in training
    toy_test: int = 400  # toy: number of test images, decoy uninformative
    agreement: float = 0.95  # toy: share of training images whose decoy agrees with the label
    # toy: how hard. "border": the bird fills the picture, the decoy is at its border; "anywhere":
    # both are anywhere; "flock": and so is a second bird, at which nobody looks
    toy_level: Literal["border", "anywhere", "flock"] = "border"
    seed: int = 0  # seed of the drawn data and of the validation split

    def __post_init__(self) -> None:
        self.maps = "boxes" if self.maps == "box" else self.maps
        if (self.maps in ("files", "corrections")) != (self.maps_dir is not None):
            raise ValueError(
                f'maps is "{self.maps}" and maps_dir {self.maps_dir}; give a folder with '
                'maps="files" or "corrections", and only then'
            )
        for name in ("root", "maps_dir", "split_file", "cache"):
            if getattr(self, name) is not None:  # a run means the same wherever it is loaded
                setattr(self, name, resolved(getattr(self, name)))


@dataclass
class ModelConfig:
    """Which timm VisionTransformer, and the weights it starts from."""

    name: str = "vit_small_patch16_224"  # timm name
    weights: Path | None = None  # .safetensors or .pt state dict; None starts from random weights
    overrides: dict[str, int | float | str] = field(default_factory=dict)  # for timm.create_model
    norm_eps: float | None = None  # epsilon of every LayerNorm; None is timm's, 1e-6
    zero_shot: Path | None = None  # text embeddings of the classes: the head to start from

    def __post_init__(self) -> None:
        self.weights = self.weights and resolved(self.weights)
        self.zero_shot = self.zero_shot and resolved(self.zero_shot)


@dataclass
class HumanConfig:
    """How the human maps enter the loss: cross entropy + lam * human attention loss."""

    loss: LossName = "energy"  # lib/losses.py
    lam: float = 1.0  # weight of the human attention loss; 0 is the control without maps
    blocks: Literal["last", "last2", "last4", "all"] | tuple[int, ...] = "last"  # supervised blocks
    # supervised heads, the others stay free; "mean" supervises the mean of their attention
    heads: Literal["all", "mean"] | tuple[int, ...] = "all"
    offset: Offset = "none"  # constant of the sigmoid (mse, bce, cosine)
    # Controls and ablations: which maps training images have (lib/training/controls.py).
    maps: MapControl = "human"  # the image's own, or instead of it
    annotated: str = "all"  # training images that keep their map: all, a number, or 10%
    noise: MapNoise = "none"  # added to the maps

    def __post_init__(self) -> None:
        self.maps = "box" if self.maps == "boxes" else self.maps  # as older runs and tables have it
        for name in ("loss", "offset", "maps", "noise"):  # else a misspelt control is no control
            known, value = get_args(get_type_hints(HumanConfig)[name]), getattr(self, name)
            if value not in known:
                raise ValueError(f'{name} is "{value}"; use one of {", ".join(known)}')
        is_number = re.fullmatch(r"\d+|\d+(\.\d+)?%", self.annotated)
        if self.annotated != "all" and not (is_number and float(self.annotated.strip("%")) > 0):
            raise ValueError(f'annotated is "{self.annotated}"; use all, a number, or e.g. 10%')


@dataclass
class TrainConfig:
    """One stage of training: fine-tuning, or human in the loop (HITL) on top of it."""

    epochs: int = 6  # passes over the training images
    batch_size: int = 32  # images a step, over all processes together
    # with decoupled weight decay, or without; or stochastic gradient descent
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = 0.9  # of sgd
    lr: float = 3e-4  # peak learning rate
    head_lr_factor: float = 1.0  # learning rate of the classifier head, as a multiple of lr
    layer_decay: float = 1.0  # learning rate of a block, as a multiple of that of the next block
    weight_decay: float = 0.05  # on matrices only: norms, biases, tokens are left alone
    warmup: float = 0.1  # share of all steps with a rising rate
    # of the learning rate after the warm-up; "epoch_cosine" changes it between epochs only
    schedule: Literal["cosine", "epoch_cosine", "constant"] = "cosine"
    clip: float = 1.0  # gradients are scaled down to this norm at most; 0 leaves them alone
    label_smoothing: float = 0.0  # of the cross entropy
    drop_path: float = 0.0  # stochastic depth: rate of the last block, rising from 0 at the first
    ema: float = 0.0  # decay of an average of the weights, which is then the model; 0 has none
    trainable: Literal["all", "last_block", "head"] | int = "all"  # or: the last so many blocks
    cache_tokens: bool = False  # frozen trunk: run it once an image, without crops and flips
    # of training steps: "auto" is bf16 on a GPU that has it, else no, which is float32; tf32 allows
    # TF32 products in float32. What is measured is float32
    mixed_precision: Literal["auto", "no", "tf32", "fp16", "bf16"] = "auto"
    compile: bool = False  # torch.compile: pays on a GPU after a minute of compiling
    checkpoint_blocks: bool = False  # less memory, a third slower: blocks are computed twice
    workers: int | Literal["auto"] = "auto"  # that load images; "auto" is by cores on a GPU, else 0
    seed: int = 0  # of the head's weights, the order of the images, and the crops
    log_every: int = 10  # steps between two rows of steps.csv
    checkpoint_minutes: float = 1.0  # between two checkpoints
    save_every: int = 0  # epochs between weights that are kept, as epoch<number>; 0 keeps none
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # beside history.csv
    human: HumanConfig = field(default_factory=lambda: HumanConfig(lam=0.0))

    def __post_init__(self) -> None:
        least_of = {"epochs": 1, "batch_size": 1, "workers": 0, "log_every": 1, "save_every": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value != "auto" and value < least:
                raise ValueError(f"{name} is {value}; it must be {least} or more")
        for name in ("momentum", "warmup", "label_smoothing", "drop_path", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be in [0, 1)")
        if self.cache_tokens and self.trainable == "all":
            raise ValueError(
                'cache_tokens is set, but trainable="all" changes the trunk at every step; use '
                'trainable="last_block", "head", or a number of blocks'
            )
        if self.lr <= 0 or self.human.lam < 0 or not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"lr is {self.lr:g}, layer_decay {self.layer_decay:g} and lam {self.human.lam:g}; "
                "lr must be above 0, layer_decay in (0, 1] and lam not below 0"
            )


@dataclass
class Sweep:
    """Which HITL trainings `lib.experiments.sweep` compares: every combination of these."""

    loss: tuple[LossName, ...] = ("energy",)  # of lib/losses.py
    # 0 is the control: one a seed, whatever loss, blocks, heads and offset are
    lam: tuple[float, ...] = (0.0, 0.1, 1.0)
    blocks: tuple[str, ...] = ("last",)  # last, last2, last4, all, or indices such as 8,9
    # all, half (the first ones), one, indices such as 0,2, or mean: of all heads, as one map
    heads: tuple[str, ...] = ("all",)
    offset: tuple[Offset, ...] = ("none",)  # kl and energy do not see it
    maps: tuple[MapControl, ...] = ("human",)
    annotated: tuple[str, ...] = ("all",)  # number or share of images that keep their map
    noise: tuple[MapNoise, ...] = ("none",)
    # all, last_block, head, or a number of blocks; empty is that of the preset. "all" is trained
    # from pictures, with crops and flips, even where the preset trains on cached tokens
    trainable: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)  # of both stages: every seed has a fine-tuned run of its own


@dataclass
class Evaluation:
    """What `lib.experiments.evaluate` asks of trained models, and where the answers go."""

    # the model that the others are compared with; the control where there is one, else the first
    against: str | None = None
    # images to measure on; "all" is each split by itself, and all together
    split: Literal["test", "val", "train", "all"] = "test"
    # names of the models in tables and figures, in the order of the runs; by default those of runs
    label: tuple[str, ...] = ()
    # weights of the last epoch, of the one that was best on the validation images, or of epoch10
    # where save_every kept them
    which: str = "last"
    # folder of the result; result/result%Y%m%d_%H%M below the project by default
    out: Path | None = None
    # pictures whose prediction was fixed, and as many that were broken, for each model on the
    # gallery page; 0 makes no page
    gallery: int = 12
    gallery_rule: Literal["order", "change"] = "order"  # first of the data set, or largest changes
    samples: int = 2  # pictures shown with predictions, rollout, and sigmoid maps of every head
    # is the attention used? Erase what a model looks at, on so many images, about 12 forward
    # passes each; 0 does not ask
    erase: int = 0
    curves: int = 0  # deletion and insertion on so many images, about 80 forward passes each
    tokens: int = 0  # outlying tokens, and attention on background, on so many images

    def __post_init__(self) -> None:
        for name in ("gallery", "samples", "erase", "curves", "tokens"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; use a number of images, or 0 to leave it out"
                )


@dataclass
class RunConfig:
    """All that decides one trained model: what `Run` keeps in its folder as config.json."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    init: str | None = None  # folder name of the run whose weights it starts from
    init_which: str = "last"  # which of its weights: last, best, or epoch10, see save_every


@dataclass
class Config:
    """One preset: the data, the model, and both stages of training."""

    preset: str
    data: DataConfig
    model: ModelConfig
    ft: TrainConfig
    hitl: TrainConfig
    variants: dict[str, dict[str, Any]]  # models of the comparison: changes to hitl.human
    runs: Path = ROOT / "runs"  # one folder a trained model
    hitl_data: dict[str, Any] = field(default_factory=dict)  # changes to data in the second stage
    init_which: str = "last"  # which weights of the first stage the second starts from


# Recipes: what changes in the parts of a preset's `Config`; "train" is both stages. "tuned" is the
# preset as it is written below; "original" trains as the code of Matsumoto et al. (PRMU2024-9,
# 2024) does, see docs/original.md.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "tuned": {},
    "original": {
        "data": {
            "crop_scale": ((179 / 224) ** 2, (179 / 224) ** 2),  # a crop of so many pixels
            "crop_ratio": "input",
            "flip": 0.5,
        },
        "config": {"hitl_data": {"crop_ratio": None}, "init_which": "best"},
        "model": {"norm_eps": 1e-5},
        "train": {
            "optimizer": "adam",
            "momentum": 0.0,
            "lr": 1e-5,
            "batch_size": 128,
            "head_lr_factor": 1.0,
            "layer_decay": 1.0,
            "weight_decay": 0.0,
            "warmup": 0.0,
            "schedule": "epoch_cosine",
            "clip": 1.0,
            "label_smoothing": 0.0,
            "drop_path": 0.0,
            "ema": 0.0,
            "trainable": "all",
            "cache_tokens": False,
            "mixed_precision": "no",
        },
        "ft": {"epochs": 100},
        "hitl": {"epochs": 50, "human": HumanConfig(loss="mse")},
    },
}

# `DataConfig.normalisation` of the recipe "original": the numbers that its code has for each data
# set. Other data have those of the weights.
ORIGINAL_NORMALISATION = {
    "cub2010": (0.4817, 0.4974, 0.4319, 0.2297, 0.2256, 0.2655),
    "cub2011": (0.4859, 0.4996, 0.4318, 0.1750, 0.1738, 0.1859),
}


def preset(name: str | None = None, recipe: str | None = None) -> Config:
    """The configuration of a preset, by name or from the environment variables PRESET and RECIPE.

    Every path in it is absolute, see `resolved`.

    Raises:
        ValueError: for a preset or recipe that does not exist. FileNotFoundError: DATA_DIR, MAPS or
            SPLIT names what is not there; says where it was looked for.
    """
    name = name or asked("PRESET") or "toy"
    recipe = recipe or asked("RECIPE") or "tuned"
    if name not in PRESETS:
        raise ValueError(f'PRESET is "{name}"; use one of {", ".join(PRESETS)}')
    if recipe not in RECIPES:
        raise ValueError(f'the recipe is "{recipe}"; use one of {", ".join(RECIPES)}')
    config = _toy() if name == "toy" else _pictures(name)
    config.runs = resolved(asked("RUNS_DIR") or config.runs) / name
    config.data = replace(config.data, classes=asked("CLASSES") or None)
    if recipe == "original":
        config = _with_recipe(config, RECIPES[recipe], ORIGINAL_NORMALISATION.get(name))
    return config


def _with_recipe(
    config: Config, recipe: dict[str, dict[str, Any]], normalisation: tuple[float, ...] | None
) -> Config:
    """A preset, changed as a recipe says; TRAINABLE, where it is set, wins."""
    train = dict(recipe["train"])
    if asked("TRAINABLE"):
        del train["trainable"]
    return replace(
        config,
        data=replace(config.data, normalisation=normalisation, **recipe["data"]),
        model=replace(config.model, **recipe["model"]),
        ft=replace(config.ft, **train | recipe["ft"]),
        hitl=replace(config.hitl, **train | recipe["hitl"]),
        **recipe["config"],
    )


def _toy() -> Config:
    """Drawn birds, a small ViT whose trunk is part of this package: minutes on a CPU."""
    return Config(
        preset="toy",
        data=DataConfig(
            toy_level="flock", agreement=0.98, **_maps_from_environment("toy", ROOT / "datasets")
        ),
        model=ModelConfig(
            name="vit_tiny_patch16_224",
            weights=Path(__file__).resolve().parent / "model" / "toybirds_vit.safetensors",
            overrides={"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
        ),
        ft=TrainConfig(epochs=6, batch_size=32, lr=3e-4),
        hitl=TrainConfig(epochs=6, batch_size=32, lr=3e-4, human=HumanConfig()),
        variants={
            "control": {"lam": 0.0},
            "HITL last block": {"blocks": "last"},
            "HITL all blocks": {"blocks": "all"},
        },
    )


def _pictures(name: str) -> Config:
    """Real pictures and a ViT-Small: the last block on cached tokens, or TRAINABLE=all on a GPU.

    Without human maps nothing but the control can be compared with fine-tuning.
    """
    model = asked("MODEL") or "vit_small_patch16_224"
    weights = there("WEIGHTS", missing=True) or ROOT / "models" / f"{model}.pt"
    trainable = asked("TRAINABLE") or "last_block"
    trainable = int(trainable) if trainable.isdecimal() else trainable
    stage = {"batch_size": 32, "epochs": 10, "trainable": trainable}
    if trainable == "all":
        stage |= {"lr": 5e-4, "layer_decay": 0.7, "label_smoothing": 0.1, "drop_path": 0.1}
        stage |= {"ema": 0.99}
    else:
        stage |= {"lr": 1e-4, "head_lr_factor": 10.0, "cache_tokens": True}
    root, split = there("DATA_DIR") or ROOT / "datasets", there("SPLIT")
    cache = asked("CACHE")
    data = DataConfig(
        name=name,
        root=root,
        image_size=(224, 224),
        **_maps_from_environment(name, root),
        split_file=split,
        split_md5=file_md5(split) if split else None,
        cache={"0": None, "": None, "1": root / "decoded"}.get(cache, cache),
    )
    variants: dict[str, dict[str, Any]] = {"control": {"lam": 0.0}}
    if data.maps != "none":
        variants |= {
            "HITL mse": {"loss": "mse", "lam": 1.0, "heads": "all"},
            "HITL kl": {"loss": "kl", "lam": 0.1, "heads": "all"},
            "HITL kl mean": {"loss": "kl", "lam": 1.0, "heads": "mean"},
        }
    return Config(
        preset=name,
        data=data,
        model=ModelConfig(name=model, weights=weights, zero_shot=there("ZERO_SHOT")),
        ft=TrainConfig(**stage),
        hitl=TrainConfig(**stage, human=HumanConfig(loss="kl", lam=1.0, heads="mean")),
        variants=variants,
    )


def _maps_from_environment(name: str, root: Path) -> dict[str, Any]:
    """maps and maps_dir, from MAPS or what is usual for the data set.

    Usual is gaze for the toy birds and CUB-200-2011, else the folder `maps` beside the pictures
    where there is one; a class may be called maps, see `maps_beside`.
    """
    maps = asked("MAPS")
    if not maps:
        # CUB-200-2010 has a folder of its own: beside that, nothing is a class called maps.
        beside = maps_beside(root) if name == "folder" else bubbles_in(root)
        beside = str(beside) if beside and beside.is_dir() else "none"
        maps = "gaze" if name in ("toy", "cub2011") else beside
    if maps in ("gaze", "boxes", "box", "parts", "none"):
        return {"maps": maps}
    folder = there("MAPS") or Path(maps)
    kind = "corrections" if has_corrections(folder) else "files"
    return {"maps": kind, "maps_dir": folder}


def file_md5(path: Path) -> str:
    """The md5 of a file's content; FileNotFoundError with the remedy where it is missing."""
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; set SPLIT to a file of `python -m lib split`")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; make it with `python -m lib split`")
    return hashlib.md5(path.read_bytes()).hexdigest()
