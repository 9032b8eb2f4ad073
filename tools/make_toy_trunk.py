"""The toy trunk: how lib/model/toybirds_vit.safetensors was made, and how to make it again.

    python tools/make_toy_trunk.py            (8 minutes on one CPU core; less on a GPU)

A real project starts from ImageNet weights; the toy one starts from a small ViT that has learned
to name every mark of a drawn bird and the colour of the decoy, on images in which nothing goes
with anything. It knows both languages, so that fine-tuning can choose the wrong one.

Two things make it a trunk in which it matters where the class token looks, as it does in a large
one. Each patch learns to name what lies in it and nothing of what lies elsewhere. And the class
token that enters the last block is another image's: what the prediction needs is read there, not
gathered on the way, where no supervision of the last block would reach it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.config import Config, preset
from lib.data.toy.birds import ToyBirds, make
from lib.data.toy.scene import ATTRIBUTES, DECOY_COLOURS
from lib.model.predict import processes
from lib.model.vit import SigmoidViT, create_model
from lib.model.weights import write_state

DECOY_WEIGHT = 2.0  # of the decoy's colour among the names; its eight values are learned last
PLACE_WEIGHT = 2.0  # of the names that patches give, beside those of the class token


def attribute_targets(birds: ToyBirds) -> Tensor:
    """What the trunk learns to name: attributes and decoy colour, int64 `[n, A + 1]`."""
    return torch.from_numpy(np.column_stack([birds.attributes, birds.decoys]))


def target_sizes() -> list[int]:
    """Number of values of each column of `attribute_targets`."""
    return [*(len(values) for values in ATTRIBUTES.values()), len(DECOY_COLOURS)]


def pretrain(
    config: Config,
    path: Path,
    images: int = 6000,
    epochs: int = 10,
    seed: int = 0,
    held_out: int = 1000,
) -> dict[str, float]:
    """Trains a trunk on drawn birds without any bias, and saves it in half precision.

    Args:
        config: the toy preset; its model section names the architecture.
        path: where the trunk goes (.safetensors, no head).
        images: number of drawn images. epochs: passes over them. seed: of data and weights.
        held_out: number of new images to measure on.

    Returns:
        accuracy on the new images for each attribute and the decoy colour.
    """
    torch.manual_seed(seed)
    sizes = target_sizes()
    model = create_model(
        config.model.name, sum(sizes), config.data.image_size, **config.model.overrides
    ).to(processes().device)
    height = config.data.image_size[0]
    # One bird a picture: what lies in a patch is then known.
    train = make("pretrain", images, seed=seed, size=height, level="anywhere")
    fresh = make("pretrain", held_out, seed=seed + 1, size=height, level="anywhere")
    pixels, targets = (
        whole.to(model.device)
        for whole in (normalise(model, train.images), attribute_targets(train))
    )
    patch_head = nn.Linear(model.vit.embed_dim, sum(sizes) + len(sizes)).to(model.device)
    patches = where(train, model.grid, height).to(model.device)  # [n, A + 1, 2]
    learning = [*model.parameters(), *patch_head.parameters()]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.05)
    batch = 64
    steps = epochs * (images // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc="pretraining", unit="step") as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(images)[: images // batch * batch].split(batch):
                # Drawn on the CPU: the same pictures and flips whatever the device.
                flips = (torch.rand(batch, 1, 1, 1) < 0.5).to(model.device)
                chosen = chosen.to(model.device)
                x = pixels[chosen]
                x = torch.where(flips, x.flip(-1), x)
                tokens = read_last(model, x)
                loss = naming_loss(model.vit.forward_head(tokens), targets[chosen], sizes)
                at = mirrored(patches[chosen], flips[:, :, 0, 0], model.grid[1])
                named = patch_head(tokens[:, model.num_prefix :])
                loss = loss + PLACE_WEIGHT * local_loss(
                    named, targets[chosen], at, model.grid, sizes
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    trunk = {k: v.half() for k, v in model.vit.state_dict().items() if not k.startswith("head.")}
    write_state(trunk, path)
    return naming_accuracy(model, fresh, sizes)


def read_last(model: SigmoidViT, images: Tensor) -> Tensor:
    """Tokens after the final norm, `[B, N, dim]`.

    The class token is that of another image of the batch until the last block: all that it knows of
    its own is what that block reads.
    """
    tokens = model.tokens(images, model.depth - 1)
    tokens = torch.cat([tokens[:, :1].roll(1, dims=0), tokens[:, 1:]], dim=1)
    return model.vit.norm(model.vit.blocks[-1](tokens))


def naming_loss(scores: Tensor, targets: Tensor, sizes: list[int]) -> Tensor:
    """Cross entropy of the columns: scores `[B, sum(sizes)]`, targets `[B, len(sizes)]`.

    The decoy, the last column, counts DECOY_WEIGHT times.
    """
    losses = [F.cross_entropy(s, targets[:, i]) for i, s in enumerate(scores.split(sizes, dim=-1))]
    return (sum(losses[:-1]) + DECOY_WEIGHT * losses[-1]) / len(sizes)


def where(birds: ToyBirds, grid: tuple[int, int], size: int) -> Tensor:
    """Row and column of the patch that each mark and the decoy's middle lie in, `[n, A + 1, 2]`."""
    boxes = birds.decoy_boxes
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    points = np.concatenate([birds.parts, middle[:, None]], axis=1) / size  # x, y in [0, 1)
    return torch.from_numpy((points[..., ::-1] * np.array(grid)).astype(np.int64))


def mirrored(at: Tensor, flips: Tensor, columns: int) -> Tensor:
    """Rows and columns `[B, K, 2]` where images are mirrored as `flips` `[B, 1]` says."""
    row, column = at.unbind(-1)
    return torch.stack([row, torch.where(flips, columns - 1 - column, column)], dim=-1)


def local_loss(
    scores: Tensor, targets: Tensor, at: Tensor, grid: tuple[int, int], sizes: list[int]
) -> Tensor:
    """Each patch names what lies in it, and says of what lies elsewhere that it is not here.

    Scores are `[B, P, sum(sizes) + len(sizes)]`: the last of each column's is "not here". One patch
    an image and column, drawn at random and not beside the right one, stands for all others.
    """
    losses, batch = [], torch.arange(len(scores), device=scores.device)
    other = torch.stack([torch.randint(side, at.shape[:2]) for side in grid], dim=-1).to(at)
    is_far = (other - at).abs().amax(dim=-1) > 1  # [B, len(sizes)]
    for i, part in enumerate(scores.split([size + 1 for size in sizes], dim=-1)):
        here, there = (place[:, i, 0] * grid[1] + place[:, i, 1] for place in (at, other))
        losses.append(F.cross_entropy(part[batch, here], targets[:, i]))
        nothing = torch.full_like(targets[:, i], sizes[i])
        elsewhere = F.cross_entropy(part[batch, there], nothing, reduction="none")
        losses.append((elsewhere * is_far[:, i]).mean())
    return sum(losses) / len(sizes)


@torch.no_grad()
def naming_accuracy(model: SigmoidViT, birds: ToyBirds, sizes: list[int]) -> dict[str, float]:
    """Share of images in which each attribute, and the decoy colour, is named rightly."""
    model.eval()
    pixels, targets = normalise(model, birds.images), attribute_targets(birds)
    parts = [model(part.to(model.device)).cpu() for part in pixels.split(128)]
    scores = torch.cat(parts).split(sizes, dim=-1)
    names = [*ATTRIBUTES, "decoy"]
    return {
        name: (s.argmax(-1) == targets[:, i]).float().mean().item()
        for i, (name, s) in enumerate(zip(names, scores, strict=True))
    }


def normalise(model: SigmoidViT, images: np.ndarray) -> Tensor:
    """uint8 `[n, H, W, 3]` to float `[n, 3, H, W]`, as the model's weights expect it."""
    mean, std = (torch.tensor(value)[:, None, None] for value in model.normalisation)
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


def main() -> None:
    """Makes the trunk and tells what it can name."""
    parser = argparse.ArgumentParser(description="Make the toy preset's pretrained trunk again.")
    config = preset("toy")
    path = config.model.weights
    parser.add_argument("--path", type=Path, default=path, help="where the trunk goes")
    parser.add_argument("--images", type=int, default=6000, help="number of drawn images")
    parser.add_argument("--epochs", type=int, default=10, help="passes over them")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the weights")
    accuracy = pretrain(config, **vars(parser.parse_args()))
    print("accuracy on new images: " + ", ".join(f"{k} {v:.3f}" for k, v in accuracy.items()))


if __name__ == "__main__":
    main()
