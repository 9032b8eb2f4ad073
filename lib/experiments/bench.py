"""Speed and memory, side by side: training steps, cached pictures and tokens, live edits.

Both sides run in one process, in turns, on the same input; the figure is the ratio of a pair of
neighbouring turns, so that what else the machine does falls on both.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import cycle, islice, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lib.config import Config, DataConfig, HumanConfig, RunConfig, TrainConfig
from lib.data.dataset import BirdDataset, make_dataset, read_records
from lib.edit import LADDER, AttentionEdit
from lib.experiments.jobs import environment
from lib.model.live import LiveImage
from lib.model.vit import SigmoidViT, create_model
from lib.training.learning import make_optimizer
from lib.training.loop import fit, loss_terms
from lib.training.runs import dataset_for, starting_point
from lib.training.state import Batches
from lib.training.tokens import forget_tokens, with_cached_tokens


def explicit_scores(vit: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """timm's forward pass with every attention written out as an N x N matrix.

    The way of the original experiment, kept as a yardstick: scores and the last class row.
    """
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for block in vit.blocks:
        attn, normed = block.attn, block.norm1(x)
        qkv = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [B, heads, N, d] each
        logits = (attn.q_norm(q) * attn.scale) @ attn.k_norm(k).mT
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.drop_path1(block.ls1(attn.proj(attn.norm(mixed))))
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return vit.forward_head(vit.norm(x)), logits[:, :, 0]


# What a training step can tell on a GPU only, or, the first two, on a CPU when asked for.
GPU_ONLY = ("bf16", "torch.compile", "the fused optimiser", "how busy a GPU is")
PLAIN, EXPLICIT, ALL = "plain timm", "explicit N x N attention, mse", "ours, HITL all blocks"


def _plain_loss(model: SigmoidViT, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model.vit(batch["image"]).float(), batch["label"])


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
    PLAIN: _plain_loss,
    EXPLICIT: _explicit_loss,
    "ours, control": partial(_our_loss, lam=0.0),
    "ours, HITL last block": partial(_our_loss, loss="kl", blocks="last"),
    ALL: partial(_our_loss, loss="kl", blocks="all"),
}


def training_steps(
    name: str = "vit_small_patch16_224",
    image_size: int = 224,
    batch_size: int = 16,
    rounds: int = 12,
    seed: int = 0,
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
        name: timm model. image_size: pixels. batch_size: images a step. rounds: measured turns,
            after one that is thrown away.
        bf16: measure automatic mixed precision as well; None does on a GPU.
        compile: measure plain timm and ours compiled as well.
        pictures: training pictures to load; None measures without loading only.
        workers: processes that load; 0 loads between the steps.

    Returns:
        one row a way, precision, loading and round: way, precision, loading, round, images (a
        step), seconds (a step), ratio (to plain timm of the same precision, loading and round).

    Raises:
        ValueError: too few pictures for a batch.
    """
    device = _device()
    torch.manual_seed(seed)
    base = create_model(name, 200, (image_size, image_size)).to(device).train()
    batch = _random_batch(base, batch_size, image_size)
    mixed = device.type == "cuda" if bf16 is None else bf16
    # Each has its own model and optimiser: none finds another's gradients in the cache.
    steps = {
        (precision, way + ", compiled" * compiled): _training_step(way, base, precision, compiled)
        for precision in ("float32", "bfloat16")[: 1 + mixed]
        for way in WAYS
        for compiled in (False, True)[: 1 + (compile and way != EXPLICIT)]
    }
    sources: dict[bool, Callable[[], Iterator[dict]]] = {False: lambda: repeat(batch)}
    if pictures is not None:
        dataset = _training_set(base, pictures)
        count = workers + max(1, workers)
        sources[True] = lambda: _loaded(dataset, batch_size, count, seed, workers, device)
    rows = []
    for number in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for loading, batches in sources.items():
            seconds = {
                key: _seconds_a_step(step, batches(), workers if loading else 0, workers, device)
                for key, step in steps.items()
            }
            if number > 0:
                rows += [
                    {"way": way, "precision": precision, "loading": loading, "round": number}
                    | {"images": batch_size, "seconds": s, "ratio": s / seconds[precision, PLAIN]}
                    for (precision, way), s in seconds.items()
                ]
    return pd.DataFrame(rows)


def step_summary(table: pd.DataFrame) -> pd.DataFrame:
    """`training_steps` in one row a way and precision.

    Returns:
        without and with loading ("loaded ..."): images a second (median), ratio to plain timm of
        the same precision, times faster than explicit attention in float32 (medians of ratios in
        the same round); and busy: the median seconds of a step without loading as a share of those
        with loading, below which the model's share of the time does not fall.
    """
    is_explicit = (table["way"] == EXPLICIT) & (table["precision"] == "float32")
    yardstick = table[is_explicit].set_index(["loading", "round"])["seconds"]
    keys = pd.MultiIndex.from_frame(table[["loading", "round"]])
    faster = yardstick.reindex(keys).to_numpy() / table["seconds"]
    table = table.assign(images_s=table["images"] / table["seconds"], faster=faster)
    columns = {"images_s": "images/s", "ratio": "of plain", "faster": "x explicit"}
    found = []
    for loading, part in table.groupby("loading"):
        middle = part.groupby(["precision", "way"], sort=False)[["seconds", *columns]].median()
        found.append(middle.rename(columns=columns).add_prefix("loaded " * loading))
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
    for class_name in ("one", "two"):
        for home in (folder / class_name, folder / "maps" / class_name):
            home.mkdir(parents=True)
        for number in range(count):
            coarse = rng.integers(0, 256, (94, 125, 3), dtype=np.uint8)
            drawn = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            drawn.save(folder / class_name / f"{number}.jpg", quality=90)
            looked = Image.fromarray(coarse[..., 0]).resize((500, 375))
            looked.save(folder / "maps" / class_name / f"{number}.png")
    size = (image_size, image_size)
    return DataConfig("folder", folder, size, maps="files", maps_dir=folder / "maps")


def _training_step(
    way: str, base: SigmoidViT, precision: str = "float32", compiled: bool = False
) -> Callable[[dict[str, Tensor]], None]:
    """A step of `way`, with a copy of the model and an optimiser of its own; takes a batch."""
    model = copy.deepcopy(base)
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, TrainConfig(lr=1e-5), device)
    if compiled:
        (model.vit if way == PLAIN else model).compile(dynamic=False)

    def step(batch: dict[str, Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = WAYS[way](model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _random_batch(model: SigmoidViT, batch_size: int, image_size: int) -> dict[str, Tensor]:
    """A batch as `BirdDataset` and collate make it, on the model's device."""
    device, patches = next(model.parameters()).device, model.grid[0] * model.grid[1]
    return {
        "image": torch.randn(batch_size, 3, image_size, image_size, device=device),
        "label": torch.randint(0, 200, (batch_size,), device=device),
        "human": torch.rand(batch_size, patches, device=device),
        "valid": torch.ones(batch_size, patches, dtype=torch.bool, device=device),
    }


def _training_set(model: SigmoidViT, config: DataConfig) -> BirdDataset:
    """The pictures of the training split, with crops and flips, as the model wants them."""
    size = tuple(model.vit.patch_embed.img_size)
    data = replace(config, image_size=size)
    return make_dataset(data, "train", model.grid, *model.normalisation, augment=True)


def _loaded(
    dataset: BirdDataset,
    batch_size: int,
    count: int,
    seed: int,
    workers: int,
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """`count` full batches on the device, loaded as lib/training/loop.py loads them."""
    full = [batch for batch in Batches(len(dataset), batch_size, seed) if len(batch) == batch_size]
    if not full:
        raise ValueError(f"{len(dataset)} training pictures are no batch of {batch_size}")
    # As many as are asked for, not an endless stream: no process reads on in another way's turn.
    loader = DataLoader(
        dataset,
        batch_sampler=list(islice(cycle(full), count)),
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _seconds_a_step(
    step: Callable[[dict], None],
    batches: Iterator[dict],
    untimed: int,
    workers: int,
    device: torch.device,
) -> float:
    """Mean seconds of as many steps as there are workers, at least one."""
    for batch in islice(batches, untimed):
        step(batch)
    count = max(1, workers)
    _synchronise(device)
    start = time.perf_counter()
    for batch in islice(batches, count):
        step(batch)
    _synchronise(device)
    return (time.perf_counter() - start) / count


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
        name: timm model. image_size: pixels. batch_size: images a step.
        bf16: automatic mixed precision. repeats: processes a way.

    Returns:
        one row a way and process: way, round, bytes, ratio (to plain timm in the same round).
    """
    precision = "bfloat16" if bf16 else "float32"
    rows = []
    for number in tqdm(range(1, repeats + 1), desc="processes", leave=False):
        found = {
            way: _in_new_process(_peak_bytes, way, name, image_size, batch_size, precision)
            for way in (PLAIN, EXPLICIT, ALL)
        }
        rows += [
            {"way": way, "round": number, "bytes": size, "ratio": size / found[PLAIN]}
            for way, size in found.items()
        ]
    return pd.DataFrame(rows)


def _peak_bytes(way: str, name: str, image_size: int, batch_size: int, precision: str) -> int:
    """Peak of two training steps; the first makes the optimiser's state."""
    device = _device()
    torch.manual_seed(0)
    before = 0 if device.type == "cuda" else _address_space("VmSize")
    base = create_model(name, 200, (image_size, image_size)).to(device).train()
    step, batch = _training_step(way, base, precision), _random_batch(base, batch_size, image_size)
    del base
    for _ in range(2):
        step(batch)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _address_space("VmPeak") - before


def _address_space(field: Literal["VmSize", "VmPeak"]) -> int:
    """Bytes of address space that this process takes: now, or at most so far.

    Not the resident set: that shrinks where a busy system takes pages of PyTorch's libraries back,
    and differed by 4 % from run to run; this one by less than 1 %. Where there is no Linux, the
    peak of the resident set has to do for both.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return 1024 * int(line.split()[1])
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _in_new_process(function: Callable[..., int], *arguments: object) -> int:
    """What `function` returns in a fresh interpreter, its allocator set to give memory back."""
    thrifty = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    with environment(thrifty), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def cached_epochs(config: Config, epochs: int = 10, all_epochs: bool = False) -> pd.DataFrame:
    """Seconds of training the last block with the trunk run at every step, and on cached tokens.

    Both train the preset's HITL stage from its pretrained weights, validation after every epoch
    included; the cached way without crops and flips, which is what it costs beside the time.

    Args:
        config: a preset. epochs: of the training.
        all_epochs: run all of them with the whole model, too. Otherwise one is run and counted
            `epochs` times: every epoch does the same.

    Returns:
        one row a way ("whole model", "cached tokens"): caching (seconds, once for all runs on this
        trunk), epoch (seconds of one), measured (how many epochs were run), total (seconds).
    """
    rows = {}
    for way, cached in (("whole model", False), ("cached tokens", True)):
        measured = epochs if cached or all_epochs else 1
        stage = replace(
            config.hitl, trainable="last_block", cache_tokens=cached, epochs=measured, trackers=()
        )
        run = RunConfig(config.data, config.model, stage)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model, train_set = starting_point(run, folder)
            val_set = dataset_for(model, run, "val", augment=False)
            caching = 0.0
            if cached:
                model.to(_device())
                forget_tokens()
                start = time.perf_counter()
                train_set, val_set = (
                    with_cached_tokens(model, part, run, folder) for part in (train_set, val_set)
                )
                caching = time.perf_counter() - start
            start = time.perf_counter()
            fit(model, stage, train_set, val_set, folder)
            epoch = (time.perf_counter() - start) / measured
            forget_tokens()
        rows[way] = {"caching": caching, "epoch": epoch, "measured": measured}
    table = pd.DataFrame(rows).T.astype({"measured": int})
    return table.assign(total=table["caching"] + epochs * table["epoch"])


def image_loading(
    config: DataConfig, grid: tuple[int, int], images: int = 256, rounds: int = 5
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Seconds to read the same training pictures decoded every time, and from the decoded cache.

    One process reads, as one worker of a DataLoader does: crop, flip and map included. The cache
    is built in a temporary folder and lies in the system's file cache when it is read, as it does
    from the second epoch on where memory allows.

    Args:
        config: a data set of pictures. grid: of the model. images: how many are read. rounds:
            measured turns, after one that is thrown away.

    Returns:
        one row a way and round: way, round, seconds, ratio (to decoding in the same round); and
        the cost: seconds to build, bytes a picture on disk and as JPEG.
    """
    records, classes = read_records(config, "train")
    rng = np.random.default_rng(0)
    chosen = [records[i] for i in rng.permutation(len(records))[:images]]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ways = {}
        for way, cache in (("decoded cache", Path(folder)), ("decoding", None)):
            data = replace(config, cache=cache)
            ways[way] = BirdDataset(chosen, classes, data, grid, (0.5,) * 3, (0.5,) * 3, True)
            if cache:
                built = time.perf_counter() - start
        for number in tqdm(range(rounds + 1), desc="rounds", leave=False):
            seconds = {}
            for way, dataset in reversed(ways.items()):
                start = time.perf_counter()
                for i in range(len(dataset)):
                    dataset[i]
                seconds[way] = time.perf_counter() - start
            if number > 0:
                rows += [
                    {"way": way, "round": number, "seconds": s, "ratio": s / seconds["decoding"]}
                    for way, s in seconds.items()
                ]
        on_disk = sum(path.stat().st_size for path in Path(folder).iterdir())
    cost = {
        "pictures": len(chosen),
        "seconds to build": built,
        "bytes a picture, cache": on_disk / len(chosen),
        "bytes a picture, JPEG": float(np.mean([r.image.stat().st_size for r in chosen])),
    }
    return pd.DataFrame(rows), cost


def live_edits(
    name: str = "vit_small_patch16_224", image_size: int = 224, rounds: int = 30, seed: int = 0
) -> pd.DataFrame:
    """Seconds from an edit of one picture to its class scores, against a full forward pass.

    The edit is of about a quarter of the patches, made wider rung by rung; the full forward pass
    is SigmoidViT's own with the edit of the last block, and timm's stands beside it. Each turn runs
    a way again and again for 50 ms, as the edits of one stroke follow each other, and takes the
    mean.

    Args:
        name: timm model. image_size: pixels. rounds: measured turns, after one that is thrown away.

    Returns:
        one row a way and round: way, round, seconds, ratio (of the full forward pass in the same
        round to this way: times faster).
    """
    device = _device()
    torch.manual_seed(seed)
    model = create_model(name, 200, (image_size, image_size)).to(device).eval()
    images = torch.randn(1, 3, image_size, image_size, device=device)
    mask = torch.rand(model.grid, device=device) < 0.25
    edits = {way: AttentionEdit(mask, 0.9, **scope) for way, scope in LADDER.items()}
    live = LiveImage(model, images[0])
    ways: dict[str, Callable[[], object]] = {
        "timm, no edit": lambda: model.vit(images),
        "full forward": lambda: model(images, edit=edits["last block"]),
        **{way: partial(live.run, edit) for way, edit in edits.items()},
    }
    rows = []
    for number in tqdm(range(rounds + 1), desc="rounds", leave=False):
        with torch.inference_mode():
            seconds = {way: _seconds_a_run(run, device) for way, run in ways.items()}
        if number > 0:
            rows += [
                {"way": way, "round": number, "seconds": s, "ratio": seconds["full forward"] / s}
                for way, s in seconds.items()
            ]
    return pd.DataFrame(rows)


def _seconds_a_run(run: Callable[[], object], device: torch.device, least: float = 0.05) -> float:
    """Mean of as many runs as it takes to fill `least` seconds."""
    runs, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < least:
        run()
        _synchronise(device)
        runs, elapsed = runs + 1, time.perf_counter() - start
    return elapsed / runs


def medians(table: pd.DataFrame) -> pd.DataFrame:
    """Median seconds and ratio of each way, in the order measured."""
    return table.groupby("way", sort=False)[["seconds", "ratio"]].median()


def conditions(missing: Sequence[str] = GPU_ONLY) -> str:
    """Where a measurement runs, and which part of it needs a GPU and finds none, in words."""
    threads = f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {threads}"
    *most, last = missing
    named = f"{', '.join(most)} and {last}" if most else last
    return f"CPU, {threads}; no CUDA device here: not measured: {named}"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
