"""Commands that measure speed and memory, side by side."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from lib.config import preset

# Each command imports what it needs itself: help and downloads do not wait for PyTorch.

ModelName = Annotated[str, arg(help="timm model.")]
Pixels = Annotated[int, arg(help="pixels.")]
BATCH_SIZE = "images a step; 128 on a GPU and 16 on a CPU when left out."
BatchSize = Annotated[int | None, arg(help=BATCH_SIZE)]
Rounds = Annotated[int, arg(help="measured turns.")]
VIT_S = "vit_small_patch16_224"


def speed(
    name: ModelName = VIT_S,
    image_size: Pixels = 224,
    batch_size: BatchSize = None,
    rounds: Rounds = 8,
    loading: bool = True,
    workers: int | None = None,
    bf16: bool | None = None,
    compile: bool = False,
) -> None:
    """One training step of ours against plain timm's and explicit attention's, in turns.

    Pictures to load are those of the PRESET; for the toy preset JPEGs are drawn.

    Args:
        loading: measure each way with the loading of its pictures as well.
        workers: processes that load; when left out, as many as a training on many pictures has.
        bf16: measure automatic mixed precision as well; when left out, where a training has it.
        compile: measure with torch.compile as well, which takes minutes to compile.
    """
    from lib.experiments import bench

    config, batch_size = preset(), batch_size or bench.USUAL_BATCH_SIZE
    pictures, source = config.data, config.preset
    if workers is None:
        workers = bench.USUAL_WORKERS
    with tempfile.TemporaryDirectory() as folder:
        if loading and config.preset == "toy":
            pictures, source = bench.draw_pictures(Path(folder), batch_size), "drawn JPEGs"
        asked = (name, image_size, batch_size, rounds, bf16, compile)
        table = bench.training_steps(*asked, pictures if loading else None, workers)
    print(f"{name}, {image_size} pixels, batch {batch_size}: median of {rounds} turns")
    if loading:
        source += " from the decoded cache" if pictures.cache else ""
        print(f"loaded: {source}, {workers} processes that load")
    asked = {"bf16": bf16, "torch.compile": compile}
    print(bench.conditions([part for part in bench.GPU_ONLY if not asked.get(part)]) + "\n")
    print(bench.step_summary(table).round(3).to_string())


def memory(
    name: ModelName = VIT_S,
    image_size: Pixels = 224,
    batch_size: BatchSize = None,
    bf16: bool = False,
    repeats: int = 3,
) -> None:
    """Peak memory of training: plain timm, explicit attention, ours with all blocks supervised.

    Args:
        bf16: automatic mixed precision.
        repeats: processes a way, one after the other.
    """
    from lib.experiments import bench

    batch_size = batch_size or bench.USUAL_BATCH_SIZE
    table = bench.peak_memory(name, image_size, batch_size, bf16, repeats)
    table["MB"] = table["bytes"] / 1e6
    ways = table.groupby("way", sort=False)
    found = ways["MB"].agg(MB="median", least="min", most="max")
    found["of plain"] = ways["ratio"].median()
    kind = "allocated on the GPU" if bench.DEVICE.type == "cuda" else "address space"
    print(f"{name}, {image_size} pixels, batch {batch_size}, peak of a training, {kind}")
    print(bench.conditions(["the memory of a GPU"]) + "\n")
    print(found.round(3).to_string())


def cached(epochs: int = 10, all_epochs: bool = False) -> None:
    """Training the last block of the PRESET's model: whole model each step, or cached tokens.

    Args:
        epochs: of the training.
        all_epochs: run all of them with the whole model too, instead of one, counted so often.
    """
    from lib.experiments import bench, bench_caches

    config = preset()
    table = bench_caches.cached_epochs(config, epochs, all_epochs)
    print(f"preset {config.preset}, {config.model.name}, seconds of {epochs} epochs")
    if not all_epochs:
        print(f"whole model: one epoch measured and counted {epochs} times (--all-epochs runs all)")
    print(bench.conditions(["the time on a GPU"]) + "\n")
    print(table.round(2).to_string())
    factor = table.loc["whole model", "total"] / table.loc["cached tokens", "total"]
    print(f"\ncached tokens, caching included: {factor:.1f} times faster")


def editing(name: ModelName = VIT_S, image_size: Pixels = 224, rounds: Rounds = 30) -> None:
    """An attention edit to new class scores, trunk cached, against a full forward pass in turns."""
    from lib.experiments import bench

    found = bench.medians(bench.live_edits(name, image_size, rounds))
    found["milliseconds"] = 1e3 * found.pop("seconds")
    found = found.rename(columns={"ratio": "times faster"})[["milliseconds", "times faster"]]
    print(f"{name}, {image_size} pixels, one image: median of {rounds} turns\n")
    print(found.round(2).to_string())


def kinds(image_size: Pixels = 224, batch_size: BatchSize = 8, rounds: Rounds = 8) -> None:
    """Steps, forward passes and edits of every kind of model at ViT-S size, beside plain timm."""
    from lib.experiments import bench

    table = bench.every_kind(image_size=image_size, batch_size=batch_size, rounds=rounds)
    middle = bench.medians(table, by=("what", "kind", "way"))
    middle["milliseconds"] = 1e3 * middle.pop("seconds")
    middle["times faster"] = 1 / middle["ratio"]
    print(f"ViT-S size, {image_size} pixels, batch {batch_size} a step: median of {rounds} turns")
    print(bench.conditions(["the time on a GPU"]) + "\n")
    print(middle[["milliseconds", "ratio", "times faster"]].round(3).to_string())


def loading(images: int = 256, rounds: Rounds = 5) -> None:
    """Reading training pictures: decoded every time against the decoded cache, in turns.

    Args:
        images: how many pictures of the PRESET are read.
    """
    from lib.experiments import bench, bench_caches
    from lib.training.runs import bare_model, fine_tuning

    config = preset()
    if config.preset == "toy":
        raise ValueError("toy birds are drawn, not decoded; set PRESET to another")
    grid = bare_model(fine_tuning(config, seed=0), num_classes=0).grid
    table, cost = bench_caches.image_loading(config.data, grid, images, rounds)
    found = bench.medians(table)
    found["pictures a second"] = cost["pictures"] / found["seconds"]
    print(f"{cost['pictures']} training pictures, one process: median of {rounds} turns\n")
    print(found.round(3).to_string())
    kept, jpeg = (cost[f"bytes a picture, {kind}"] / 1e3 for kind in ("cache", "JPEG"))
    built = f"built in {cost['seconds to build']:.1f} s"
    print(f"\n{built}; a picture takes {kept:.0f} kB on disk ({jpeg:.0f} kB as JPEG)")
