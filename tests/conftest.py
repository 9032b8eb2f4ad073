"""Small models and data that the tests share."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
import timm
import torch
from hypothesis import settings

from lib.model import SigmoidViT

matplotlib.use("Agg")
settings.register_profile("lib", deadline=None, max_examples=40)
settings.load_profile("lib")

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Architectures that must work: name, changes, and what they stand for.
VITS = {
    "plain": ("vit_tiny_patch16_224", {"img_size": 64}),
    "wide": ("vit_tiny_patch16_224", {"img_size": (64, 96)}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": (56, 42)}),
    "qk_norm": ("vit_tiny_patch16_224", {"img_size": 64, "qk_norm": True, "init_values": 0.5}),
    "no_bias": ("vit_tiny_patch16_224", {"img_size": 64, "qkv_bias": False}),
}


def tiny_vit(kind: str = "plain", classes: int = 5, seed: int = 0, **changes) -> torch.nn.Module:
    """A timm ViT of 3 blocks, width 32 and 4 heads with lively random weights."""
    name, base = VITS[kind]
    torch.manual_seed(seed)
    sizes = {"depth": 3, "embed_dim": 32, "num_heads": 4, "num_classes": classes}
    vit = timm.create_model(name, **{**base, **sizes, **changes})
    for parameter in vit.parameters():
        if parameter.ndim > 1:  # timm's own start gives almost uniform attention
            torch.nn.init.normal_(parameter, std=0.3)
    return vit.eval()


def images_for(model: SigmoidViT, count: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *model.vit.patch_embed.img_size, generator=generator)


@pytest.fixture(params=list(VITS))
def any_model(request: pytest.FixtureRequest) -> SigmoidViT:
    return SigmoidViT(tiny_vit(request.param))


@pytest.fixture
def model() -> SigmoidViT:
    return SigmoidViT(tiny_vit())


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development data beside the checkout; tests that need it skip where it is absent."""
    if not (SHARED / "data" / "CUB_200_2011").is_dir():
        pytest.skip("no development data (real birds, gaze, weights) beside this checkout")
    return SHARED
