"""What is trained, how fast and how exactly: frozen parts, parameter groups, rates, precision."""

from __future__ import annotations

import math
from functools import partial

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from lib.config import TrainConfig
from lib.model.adapter import learned_parts, learned_rotations
from lib.model.vit import SigmoidViT

# Words of `TrainConfig.mixed_precision`, once the device is known.
PRECISIONS = {
    "no": "float32",
    "tf32": "float32 with TF32 products",
    "fp16": "mixed float16",
    "bf16": "mixed bfloat16",
}


def learning_blocks(trainable: str | int, depth: int) -> int:
    """How many blocks at the end of the model learn: `depth` for "all", 0 for "head".

    Raises:
        ValueError: for an unknown word or a number outside 1 to `depth`.
    """
    words = {"all": depth, "last_block": 1, "head": 0}
    if trainable in words:
        return words[trainable]
    if isinstance(trainable, int) and 1 <= trainable <= depth:
        return trainable
    raise ValueError(
        f'trainable is "{trainable}"; use "all", "last_block", "head", or how many of the '
        f"{depth} blocks learn"
    )


def trained_modules(model: SigmoidViT, trainable: str | int) -> list[nn.Module]:
    """The modules that learn: everything, or the last blocks with the final norm and the head."""
    if trainable == "all":
        return [model.vit]
    return learned_parts(model.vit, learning_blocks(trainable, model.depth))


def freeze(model: SigmoidViT, trainable: str | int) -> None:
    """Lets only the named part learn; frozen parts store no activations for a backward pass."""
    model.requires_grad_(False)
    for module in trained_modules(model, trainable):
        module.requires_grad_(True)


def set_train_mode(model: SigmoidViT, trainable: str | int) -> None:
    """Training mode for the part that learns; a frozen part is used as in evaluation."""
    model.eval()
    for module in trained_modules(model, trainable):
        module.train()


def model_summary(model: SigmoidViT, trainable: str | int) -> str:
    """The parts of a model, a line each: how many parameters, and whether they learn."""
    learning = {id(p) for part in trained_modules(model, trainable) for p in part.parameters()}
    parts = {"tokens, positions": list(model.vit.parameters(recurse=False))}
    for name, part in model.vit.named_children():
        inner = {f"block {i}": one for i, one in enumerate(part)} if name == "blocks" else {}
        parts |= {one: list(of.parameters()) for one, of in (inner or {name: part}).items()}
    lines = []
    for name, parameters in parts.items():
        count = sum(p.numel() for p in parameters)
        learned = sum(p.numel() for p in parameters if id(p) in learning)
        if count:
            lines.append(f"{name:20} {count:>12,} parameters, {learned:>12,} learn")
    return "\n".join(lines)


def parameter_groups(model: SigmoidViT, config: TrainConfig) -> list[dict]:
    """AdamW's groups, each with its peak learning rate as `lr` and `peak`.

    Weight decay is for matrices only (timm's rule). With `layer_decay` d, what lies k layers below
    the head learns at d^k times `lr` (Clark et al. 2020, BEiT); the head at `head_lr_factor` times.
    Learned rotations are positions, and learn as slowly: timm counts them to the head.
    """
    kind_of = {id(p): "rotation" for p in learned_rotations(model.vit)}
    heads = trained_modules(model, "head")
    kind_of |= {id(p): "head" for head in heads for p in head.parameters()}
    found = param_groups_layer_decay(
        model.vit,
        config.weight_decay,
        no_weight_decay_list=model.vit.no_weight_decay(),
        layer_decay=config.layer_decay,
    )
    slowest = min((group["lr_scale"] for group in found), default=1.0)
    groups = []
    for group in found:
        scales = {"layer": group["lr_scale"], "rotation": slowest, "head": config.head_lr_factor}
        for kind, scale in scales.items():
            chosen = [p for p in group["params"] if kind_of.get(id(p), "layer") == kind]
            if chosen:
                lr, decay = config.lr * scale, group["weight_decay"]
                groups.append({"params": chosen, "lr": lr, "peak": lr, "weight_decay": decay})
    return groups


def make_optimizer(
    model: SigmoidViT, config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimiser of a name over `parameter_groups`; one fused kernel a step on a GPU."""
    kinds = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": partial(torch.optim.SGD, momentum=config.momentum),
    }
    return kinds[config.optimizer](parameter_groups(model, config), fused=device.type == "cuda")


def learning_rate_factor(
    step: int, steps: int, warmup: float, schedule: str = "cosine", an_epoch: int = 1
) -> float:
    """Linear warm-up over the first share `warmup` of the steps; then a cosine to 0, or constant.

    "epoch_cosine" keeps the rate for `an_epoch` steps: without warm-up it is PyTorch's
    `CosineAnnealingLR` over all epochs, stepped after each.

    A function of the step alone, so that a resumed run needs no state of a scheduler.
    """
    rising = round(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    if schedule == "epoch_cosine":
        step = max(rising, step - step % an_epoch)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group at `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def precision(asked: str, device: torch.device) -> str:
    """The precision of training steps, as `TrainConfig` names it, once the device is known.

    "auto" is bf16 on a GPU that computes in it (NVIDIA's since Ampere; a T4 only imitates it), and
    float32 ("no") everywhere else.
    """
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "no"
    is_native = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if is_native else "no"


def trained_state(model: SigmoidViT) -> dict[str, Tensor]:
    """The parameters that learn, by timm's names: what a checkpoint must hold of a model."""
    return {name: p.detach() for name, p in model.vit.named_parameters() if p.requires_grad}
