"""Speed and memory, side by side: training steps, live edits; for caches see bench_caches.py.

All sides run in one process, in turns, on the same input; the figure is the ratio of a pair of
neighbouring turns, so that what else the machine does falls on both. Throughout, `name` is a timm
model, `image_size` is in pixels, and `rounds` are measured after one that is thrown away; a table
of turns has one row a round and way: round, way, seconds, ratio (to the way named first, in the
same round).
"""

from __future__ import annotations

import copy
import re
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import cycle, islice, product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.config import DataConfig, HumanConfig, TrainConfig
from lib.data.dataset import BirdDataset, make_dataset
from lib.edit import AttentionEdit
from lib.experiments.jobs import environment
from lib.model.adapter import classify, embed, is_pooled, take_apart
from lib.model.live import LiveImage
from lib.model.predict import count_workers, loader, to_device
from lib.model.vit import SigmoidViT, create_model
from lib.training.learning import make_optimizer, precision
from lib.training.loop import loss_terms
from lib.training.state import Batches


def explicit_scores(vit: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """timm's forward pass with every attention written out as an N x N matrix.

    The way of the original experiment, kept as a yardstick: scores and the last class row.
    """
    tokens, ropes = embed(vit, images)
    for index in range(len(vit.blocks) + is_pooled(vit)):
        block = take_apart(vit, index, ropes[index])
        q, k, v = block.queries_keys_values(block.norm(tokens))
        logits = block.logits(q, k)
        tokens = block.leave(tokens, logits.softmax(-1) @ v)
    return classify(vit, tokens), logits[:, :, 0]


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
USUAL_BATCH_SIZE = 128 if DEVICE.type == "cuda" else 16
USUAL_WORKERS = count_workers(DEVICE, batches=100)
# What a training step can tell on a GPU only, or, the first two, on a CPU when asked for.
GPU_ONLY = ("bf16", "torch.compile", "the fused optimiser", "how busy a GPU is")
PLAIN, EXPLICIT = "plain timm", "explicit N x N attention, mse"
LAST, ALL = "ours, HITL last block", "ours, HITL all blocks"


def _explicit_loss(model: SigmoidViT, batch: dict[str, Tensor]) -> Tensor:
    scores, row = explicit_scores(model.vit, batch["image"])
    read = torch.sigmoid(row[..., model.num_prefix :].float())  # [B, heads, P]
    human = batch["human"][:, None].expand_as(read)
    return F.cross_entropy(scores.float(), batch["label"]) + F.mse_loss(read, human)


def _our_loss(model: SigmoidViT, batch: dict[str, Tensor], **human: object) -> Tensor:
    config = TrainConfig(human=HumanConfig(**human))
    cross_entropy, human_loss, _ = loss_terms(model, batch, config)
    return cross_entropy + config.human.lam * human_loss


# Ways to train, each a loss of a model and a batch.
WAYS: dict[str, Callable[[SigmoidViT, dict[str, Tensor]], Tensor]] = {
    PLAIN: lambda model, batch: F.cross_entropy(model.vit(batch["image"]).float(), batch["label"]),
    EXPLICIT: _explicit_loss,
    "ours, control": partial(_our_loss, lam=0.0),
    LAST: partial(_our_loss, loss="kl", blocks="last"),
    ALL: partial(_our_loss, loss="kl", blocks="all"),
}


def training_steps(
    name: str = "vit_small_patch16_224",
    image_size: int = 224,
    batch_size: int = 16,
    rounds: int = 12,
    bf16: bool | None = None,
    compile: bool = False,
    pictures: DataConfig | None = None,
    workers: int = 0,
) -> pd.DataFrame:
    """Seconds of one training step of each way, in turns, with data loading and without.

    Without loading, a turn is a step on a batch that lies on the device. With loading it is steps
    on fresh batches: pictures read, cropped, flipped and collated, with their maps. `workers`
    processes read ahead, for one way at a time; a turn is then so many steps, and as many before it
    do not count, so that neither the start of the processes nor what they read meanwhile flatters.

    Args:
        batch_size: images a step.
        bf16: measure automatic mixed precision as well; None does where trainings have it.
        compile: measure plain timm and ours compiled as well.
        pictures: training pictures to load; None measures without loading only.
        workers: processes that load; 0 loads between the steps.

    Returns:
        a table of turns, with loading, precision and images (a step) besides; seconds are those of
        a step, and ratios to plain timm of the same loading and precision.

    Raises:
        ValueError: too few pictures for a batch.
    """
    base = _random_model(name, image_size).train()
    batch = _random_batch(base, batch_size, image_size)
    sources: dict[bool, Callable[[], Iterator[dict]]] = {False: lambda: repeat(batch)}
    if pictures is not None:
        data = replace(pictures, image_size=(image_size, image_size))
        dataset = make_dataset(data, "train", base.grid, *base.normalisation, augment=True)
        sources[True] = lambda: _loaded(dataset, batch_size, workers)
    mixed = precision("auto", DEVICE) == "bf16" if bf16 is None else bf16
    # Each has its own model and optimiser: none finds another's gradients in the cache.
    steps = {
        (precision, way + ", compiled" * compiled): _training_step(way, base, precision, compiled)
        for precision in ("float32", "bfloat16")[: 1 + mixed]
        for way in WAYS
        for compiled in (False, True)[: 1 + (compile and way != EXPLICIT)]
    }
    turns = {
        (loading, *key): partial(_seconds_a_step, step, batches, workers if loading else 0)
        for loading, batches in sources.items()
        for key, step in steps.items()
    }
    table = in_turns(turns, rounds, names=("loading", "precision", "way"))
    return table.assign(images=batch_size)


def in_turns(
    ways: dict[Hashable, Callable[[], float]],
    rounds: int,
    thrown_away: int = 1,
    value: str = "seconds",
    names: Sequence[str] = ("way",),
) -> pd.DataFrame:
    """A table of turns, each a function that returns its `value`.

    `names` are those of the parts of a key of `ways`; what else they name besides the way is the
    same for both sides of a ratio.
    """
    found = {
        number: pd.Series({way: turn() for way, turn in ways.items()})
        for number in tqdm(range(1 - thrown_away, rounds + 1), desc="rounds", leave=False)
    }
    table = pd.concat(found).rename_axis(["round", *names]).loc[1:].reset_index(name=value)
    same = ["round", *(name for name in names if name != "way")]
    return table.assign(ratio=table[value] / table.groupby(same)[value].transform("first"))


def step_summary(table: pd.DataFrame) -> pd.DataFrame:
    """`training_steps` in one row a way and precision.

    Returns:
        without and with loading ("loaded ..."): images a second (median), ratio to plain timm of
        the same precision, times faster than explicit attention in float32 (medians of ratios in
        the same round); and busy: the median seconds of a step without loading as a share of those
        with loading, below which the model's share of the time does not fall.
    """
    is_explicit = (table["way"] == EXPLICIT) & (table["precision"] == "float32")
    yardstick = table["seconds"].where(is_explicit).groupby([table["round"], table["loading"]])
    table = table.rename(columns={"ratio": "of plain"})
    table["images/s"] = table["images"] / table["seconds"]
    table["x explicit"] = yardstick.transform("first") / table["seconds"]
    columns = ["seconds", "images/s", "of plain", "x explicit"]
    found = []
    for loading, part in table.groupby("loading"):
        middle = part.groupby(["precision", "way"], sort=False)[columns].median()
        found.append(middle.add_prefix("loaded " * loading))
    summary = pd.concat(found, axis=1)
    if "loaded seconds" in summary:
        summary["busy"] = summary["seconds"] / summary["loaded seconds"]
    return summary


def draw_pictures(folder: Path, count: int, image_size: int = 224) -> DataConfig:
    """Draws JPEGs of the size that CUB's have, each with a map: for where no data set is at hand.

    Args:
        folder: gets two class folders, and one of maps. count: pictures a class.
            image_size: pixels that the model sees.
    """
    rng = np.random.default_rng(0)
    for class_name, number in product(("one", "two"), range(count)):
        coarse = rng.integers(0, 256, (94, 125, 3), dtype=np.uint8)
        files = {f"{class_name}/{number}.jpg": coarse}
        files[f"maps/{class_name}/{number}.png"] = coarse[..., 0]
        for name, pixels in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((500, 375)).save(folder / name, quality=90)
    size = (image_size, image_size)
    return DataConfig("folder", folder, size, maps="files", maps_dir=folder / "maps")


def _training_step(
    way: str, base: SigmoidViT, precision: str = "float32", compiled: bool = False
) -> Callable[[dict[str, Tensor]], None]:
    """A step of `way`, with a copy of the model and an optimiser of its own; takes a batch."""
    model = copy.deepcopy(base)
    optimizer = make_optimizer(model, TrainConfig(lr=1e-5), DEVICE)
    if compiled:
        (model.vit if way == PLAIN else model).compile(dynamic=False)

    def step(batch: dict[str, Tensor]) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = WAYS[way](model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _random_model(name: str, image_size: int, **changes: object) -> SigmoidViT:
    torch.manual_seed(0)
    return create_model(name, 200, (image_size, image_size), **changes).to(DEVICE)


def _random_batch(model: SigmoidViT, batch_size: int, image_size: int) -> dict[str, Tensor]:
    """A batch as `BirdDataset` and collate make it, on the model's device."""
    patches = model.grid[0] * model.grid[1]
    batch = {
        "image": torch.randn(batch_size, 3, image_size, image_size),
        "label": torch.randint(0, 200, (batch_size,)),
        "human": torch.rand(batch_size, patches),
        "valid": torch.ones(batch_size, patches, dtype=torch.bool),
    }
    return {key: value.to(DEVICE) for key, value in batch.items()}


def _loaded(dataset: BirdDataset, batch_size: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """Batches on the device for one turn, loaded as lib/training/loop.py loads them."""
    full = [batch for batch in Batches(len(dataset), batch_size, 0) if len(batch) == batch_size]
    if not full:
        raise ValueError(f"{len(dataset)} training pictures are no batch of {batch_size}")
    # As many as are asked for, not an endless stream: no process reads on in another way's turn.
    few = list(islice(cycle(full), workers + max(1, workers)))
    for batch in loader(dataset, batch_size, DEVICE, workers, batch_sampler=few):
        yield to_device(batch, DEVICE)


def _seconds_a_step(
    step: Callable[[dict], None], batches: Callable[[], Iterator[dict]], workers: int
) -> float:
    """Mean of as many steps as there are workers, at least one; as many go before them."""
    upcoming, count = batches(), max(1, workers)
    for batch in islice(upcoming, workers):
        step(batch)
    return mean_seconds(lambda: [step(batch) for batch in islice(upcoming, count)]) / count


def mean_seconds(run: Callable[[], object], least: float = 0.0) -> float:
    """Mean of as many runs as it takes to fill `least` seconds, at least one."""
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    wait()
    runs, elapsed, start = 0, 0.0, time.perf_counter()
    while runs == 0 or elapsed < least:
        run()
        wait()
        runs, elapsed = runs + 1, time.perf_counter() - start
    return elapsed / runs


def peak_memory(
    name: str = "vit_small_patch16_224",
    image_size: int = 224,
    batch_size: int = 16,
    bf16: bool = False,
    repeats: int = 1,
) -> pd.DataFrame:
    """Peak memory of training, each way in a process of its own, without data loading.

    On a GPU, what PyTorch allocated there at most. On a CPU, the peak of the process's address
    space less what stood before the model was made; the C library is told to give large blocks
    back at once, so that this is what was allocated.

    Args:
        batch_size: images a step. bf16: automatic mixed precision. repeats: processes a way.

    Returns:
        a table of turns with bytes in place of seconds; ratios are to plain timm.
    """
    asked = (name, image_size, batch_size, "bfloat16" if bf16 else "float32")
    thrifty = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}

    def measured(way: str) -> int:
        with environment(thrifty), ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(_peak_bytes, way, *asked).result()

    ways = {way: partial(measured, way) for way in (PLAIN, EXPLICIT, ALL)}
    return in_turns(ways, repeats, thrown_away=0, value="bytes")


def _peak_bytes(way: str, name: str, image_size: int, batch_size: int, precision: str) -> int:
    """Peak of two training steps; the first makes the optimiser's state."""
    on_gpu = DEVICE.type == "cuda"
    before = 0 if on_gpu else _address_space("VmSize")
    base = _random_model(name, image_size).train()
    step, batch = _training_step(way, base, precision), _random_batch(base, batch_size, image_size)
    del base
    for _ in range(2):
        step(batch)
    return torch.cuda.max_memory_allocated() if on_gpu else _address_space("VmPeak") - before


def _address_space(field: Literal["VmSize", "VmPeak"]) -> int:
    """Bytes of address space that this process takes: now, or at most so far.

    Not the resident set: that shrinks where a busy system takes pages of PyTorch's libraries back,
    and differed by 4 % from run to run; this one by less than 1 %. Where there is no Linux, the
    peak of the resident set has to do for both.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(rf"^{field}:\s+(\d+) kB$", status.read_text(encoding="utf-8"), re.M)
        return 1024 * int(found[1])
    try:
        import resource
    except ImportError as error:
        raise OSError("Windows does not tell a peak of memory; use Linux, macOS or WSL") from error
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def live_edits(
    name: str = "vit_small_patch16_224", image_size: int = 224, rounds: int = 30
) -> pd.DataFrame:
    """Seconds from an edit of one picture to its class scores, against a full forward pass.

    The edit is of about a quarter of the patches, made wider rung by rung; the full forward pass
    is SigmoidViT's own with the edit of the last block, and timm's stands beside it. Each turn runs
    a way again and again for 50 ms, as the edits of one stroke follow each other, and takes the
    mean.

    Returns:
        a table of turns; its ratio is how many times faster than the full forward pass.
    """
    model = _random_model(name, image_size).eval()
    images = torch.randn(1, 3, image_size, image_size, device=DEVICE)
    mask = torch.rand(model.grid) < 0.25  # where people's edits are made
    edits = {way: AttentionEdit(mask, 0.9, **scope) for way, scope in model.layout.ladder.items()}
    live = LiveImage(model, images[0])
    ways = {
        "timm, no edit": partial(model.vit, images),
        "full forward": partial(model, images, edit=edits["last block"]),
        **{way: partial(live.run, edit) for way, edit in edits.items()},
    }
    turns = {way: partial(mean_seconds, run, least=0.05) for way, run in ways.items()}
    with torch.inference_mode():
        table = in_turns(turns, rounds)
    full = table["seconds"].where(table["way"] == "full forward").groupby(table["round"])
    return table.assign(ratio=full.transform("first") / table["seconds"])


# A model of each kind of block and pooling, all as large as ViT-S (width 384, 12 blocks, 6 heads).
VIT_S_KINDS = {
    "vit_small_patch16_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_rope_mixed_224": {},
    "eva02_small_patch14_224": {"global_pool": "token"},
    "vit_base_patch16_siglip_224": {"embed_dim": 384, "num_heads": 6},
    "vit_pe_core_small_patch16_384": {},
}


def every_kind(
    kinds: Mapping[str, Mapping[str, object]] = VIT_S_KINDS,
    image_size: int = 224,
    batch_size: int = 8,
    rounds: int = 8,
) -> pd.DataFrame:
    """Seconds of a training step, a forward pass and an edit of each kind, beside plain timm's.

    A step is one of `training_steps`; a forward pass and an edit are of one picture. The edit is of
    the row that decides (the last block, or the pooling), cached.

    Args:
        kinds: changes to timm models, by name. batch_size: images a step.

    Returns:
        a table of turns, with kind and what ("step", "forward", "edit") besides.
    """
    found = []
    for name, changes in tqdm(kinds.items(), desc="kinds", leave=False):
        model = _random_model(name, image_size, **changes)
        batch = _random_batch(model.train(), batch_size, image_size)
        steps = {way: _training_step(way, model) for way in (PLAIN, LAST, ALL)}
        steps = {
            way: partial(_seconds_a_step, step, partial(repeat, batch), 0)
            for way, step in steps.items()
        }
        found.append(in_turns(steps, rounds).assign(kind=name, what="step"))
        image = batch["image"][:1]
        edit = AttentionEdit(torch.rand(model.eval().grid) < 0.25, 0.9)
        live = LiveImage(model, image[0])
        passes = {
            PLAIN: partial(model.vit, image),
            "ours, rows": partial(model, image, rows="last"),
        }
        for what, ways in (
            ("forward", passes),
            ("edit", {PLAIN: passes[PLAIN], "ours, edit": partial(live.run, edit)}),
        ):
            turns = {way: partial(mean_seconds, run, least=0.05) for way, run in ways.items()}
            with torch.inference_mode():
                found.append(in_turns(turns, 3 * rounds).assign(kind=name, what=what))
    return pd.concat(found, ignore_index=True)


def medians(table: pd.DataFrame, by: Sequence[str] = ("way",)) -> pd.DataFrame:
    """Median seconds and ratio of each way, or of what the columns `by` name, as measured."""
    return table.groupby([*by], sort=False)[["seconds", "ratio"]].median()


def conditions(missing: Sequence[str] = GPU_ONLY) -> str:
    """Where a measurement runs, and which part of it needs a GPU and finds none, in words."""
    threads = f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {threads}"
    named = " and ".join(", ".join(missing).rsplit(", ", 1))
    return f"CPU, {threads}; no CUDA device here: not measured: {named}"
