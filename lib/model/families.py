"""Families of timm's ViTs: what decides in each, and which are refused.

One table, for `create_model`, `python -m lib models` and docs/models.md; the tests hold each line
of it against timm.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

import timm
import torch

from lib.model.adapter import UnsupportedModelError, refuse_unsupported

CLASS, POOL = "class row", "pooling row"
LEARNED, ROTARY = "learned", "rotary"
LIST = "python -m lib models lists those that work"


@dataclass(frozen=True)
class Family:
    """Models that timm has of one kind.

    Args:
        title: what people call them.
        names: patterns of their timm names; where they end in a tag (".mae"), of these weights.
        example: one of them.
        decides: the row that decides; empty where no row does: then the family is refused.
        prefix: how many tokens stand before the patches, class token and registers.
        positions: how tokens know where they are.
        average: what one must know of a family that timm pools by average, and whose models have
            a class token all the same, so that `global_pool="token"` is possible.
        trained: whether its weights were trained with the class token, where timm averages:
            `create_model` asks for `global_pool="token"` then.
        note: what else a user of the family should know.
    """

    title: str
    names: tuple[str, ...]
    example: str
    decides: str = ""
    prefix: tuple[int, ...] = (1,)
    positions: str = LEARNED
    average: str = ""
    trained: bool = True
    note: str = ""

    def has(self, name: str) -> bool:
        """Whether a timm name, with or without a tag, is one of the family's."""
        untagged = name.partition(".")[0]
        return any(fnmatchcase(name if "." in one else untagged, one) for one in self.names)


_AVERAGED = (
    "fine-tuned with the average of the patches: the class row, its norm (which stands in place of "
    "fc_norm) and the head have to learn"
)

# A model is of the first family that has its name, so what is particular comes first.
FAMILIES = (
    Family(
        "DINOv3",
        ("vit_*_dinov3*",),
        "vit_small_patch16_dinov3",
        CLASS,
        (5,),
        ROTARY,
        average="timm averages the patches; here it is made with global_pool=\"token\", as it was "
        "trained: its norm is the same one, and a head is new in either case",
        note="EUPE has the same names",
    ),
    Family(
        "DINOv2 with registers",
        ("vit_*_reg4_dinov2",),
        "vit_small_patch14_reg4_dinov2",
        CLASS,
        (5,),
    ),
    Family("DINOv2", ("vit_*_dinov2",), "vit_small_patch14_dinov2", CLASS),
    Family("DINO", ("vit_*.dino",), "vit_small_patch16_224.dino", CLASS),
    Family(
        "MAE",
        ("vit_*.mae",),
        "vit_base_patch16_224.mae",
        CLASS,
        note="trained to fill in pixels: the class row and the head have to learn",
    ),
    Family("LingBot-Vision", ("vit_*_lingbot",), "vit_small_patch16_lingbot", CLASS, (5,), ROTARY),
    Family("Sapiens2", ("vit_*_sapiens2",), "vit_large_patch16_sapiens2", CLASS, (9,), ROTARY),
    Family("TIPSv2", ("vit_*_tipsv2",), "vit_base_patch14_reg1_tipsv2", CLASS, (2,)),
    Family(
        "RADIO",
        ("vit_*_radio_v?",),
        "vit_base_patch16_radio_v3",
        CLASS,
        (8, 10),
        note="the first of its summary tokens decides",
    ),
    Family("InternViT", ("vit_intern*",), "vit_intern300m_patch14_448", CLASS),
    Family("EVA-02-CLIP, enormous", ("eva02_enormous_*",), "eva02_enormous_patch14_clip_224"),
    Family(
        "EVA-02-CLIP",
        ("eva02_*_clip_*",),
        "eva02_base_patch16_clip_224",
        CLASS,
        positions=f"{LEARNED}, {ROTARY}",
    ),
    Family("EVA-CLIP", ("eva_*_clip_*",), "eva_giant_patch14_clip_224", CLASS),
    Family(
        "EVA-02",
        ("eva02_*",),
        "eva02_tiny_patch14_224",
        CLASS,
        positions=f"{LEARNED}, {ROTARY}",
        average=_AVERAGED,
        trained=False,
    ),
    Family(
        "EVA", ("eva_*",), "eva_large_patch14_196", CLASS, average=_AVERAGED, trained=False
    ),
    Family(
        "BEiT-3", ("beit3_*",), "beit3_base_patch16_224", CLASS, average=_AVERAGED, trained=False
    ),
    Family(
        "PE-core",
        ("vit_pe_core_*",),
        "vit_pe_core_tiny_patch16_384",
        POOL,
        (0, 1),
        f"{LEARNED}, {ROTARY}",
        note="the pooling reads the class token too, but for gigantic, which has none",
    ),
    Family(
        "PE-lang and PE-spatial, gigantic",
        ("vit_pe_lang_gigantic_*", "vit_pe_spatial_gigantic_*"),
        "vit_pe_spatial_gigantic_patch14_448",
        note="vit_pe_core_* is pooled by attention",
    ),
    Family(
        "PE-lang, PE-spatial",
        ("vit_pe_lang_*", "vit_pe_spatial_*"),
        "vit_pe_spatial_tiny_patch16_512",
        CLASS,
        positions=f"{LEARNED}, {ROTARY}",
        average="made for maps of patches: no norm behind the blocks and no head; the class row "
        "has to learn",
        trained=False,
    ),
    Family(
        "SigLIP, average",
        ("vit_*_siglip_gap_*",),
        "vit_base_patch16_siglip_gap_224",
        note='without "_gap" in its name the model has its pooling by attention',
    ),
    Family("SigLIP, SigLIP 2", ("vit_*_siglip_*",), "vit_base_patch16_siglip_224", POOL, (0,)),
    Family(
        "CLIP",
        ("vit_*_clip_*",),
        "vit_base_patch16_clip_224",
        CLASS,
        note="OpenAI's, OpenCLIP, MetaCLIP, DFN, TinyCLIP, MobileCLIP 2",
    ),
    Family(
        "SoViT, attention pooling",
        ("vit_*_reg4_map_*", "test_vit3"),
        "vit_so150m_patch16_reg4_map_256",
        POOL,
        (1, 4),
        note="the pooling leaves the registers out",
    ),
    Family(
        "Differential attention",
        ("vit_dlittle_*", "vit_dwee_*", "vit_dpwee_*"),
        "vit_dwee_patch16_reg1_gap_256",
    ),
    Family(
        "Parallel blocks",
        ("vit_*_xp_*", "vit_*_18x2_*", "vit_pwee_*"),
        "vit_base_patch16_xp_224",
    ),
    Family("Norms behind", ("vit_*_rpn_*",), "vit_base_patch16_rpn_224"),
    Family("Relative positions", ("*vit_*relpos*",), "vit_relpos_base_patch16_cls_224"),
    Family(
        "I-JEPA, AIMv2, ViTamin and others",
        ("vit_*_gap_*", "aimv2_*", "vitamin_*", "test_vit2", "test_vit4"),
        "vit_medium_patch16_gap_240",
    ),
    Family(
        "RoPE ViT",
        ("vit_*_rope_224", "vit_*_rope_mixed_224"),
        "vit_small_patch16_rope_mixed_224",
        CLASS,
        positions=ROTARY,
        note="axial, or mixed: frequencies learned by block and head",
    ),
    Family(
        "RoPE ViT, learned positions",
        ("vit_*_rope_ape_224", "vit_*_rope_mixed_ape_224"),
        "vit_small_patch16_rope_ape_224",
        CLASS,
        positions=f"{LEARNED}, {ROTARY}",
    ),
    Family("DeiT, distilled", ("deit_*_distilled_*",), "deit_tiny_distilled_patch16_224",
           "class and distillation rows", (2,)),
    Family("DeiT", ("deit_*",), "deit_tiny_patch16_224", CLASS),
    Family("DeiT III", ("deit3_*",), "deit3_small_patch16_224", CLASS),
    Family("FlexiViT", ("flexivit_*",), "flexivit_small", CLASS),
    Family(
        "ViT on a convolutional net",
        ("vit_*_r26_*", "vit_*_r50_*", "vit_*_r_s16_*", "vit_*_resnet*", "vit_*_mci_*"),
        "vit_tiny_r_s16_p8_224",
        CLASS,
        note="R26, R50, ResNet-D and MobileCLIP stems",
    ),
    Family("ViT", ("vit_*", "test_vit"), "vit_small_patch16_224", CLASS,
           note="AugReg, ImageNet-21k, SAM optimiser, MIIL, Bamboo"),
    Family("BEiT", ("beit_*", "beitv2_*"), "beit_base_patch16_224"),
    Family("NaFlexViT", ("naflexvit_*",), "naflexvit_base_patch16_siglip",
           note="for SigLIP 2 and RADIO timm has models of one size, vit_*"),
    Family("SAM", ("samvit_*",), "samvit_base_patch16"),
    Family("Hiera", ("hiera_*", "sam2_hiera_*", "hieradet_*"), "hiera_tiny_224"),
    Family("Swin", ("swin_*", "swinv2_*"), "swin_tiny_patch4_window7_224"),
    Family("Vision towers of language models", ("qwen3_vit_*", "gemma4_vit_*", "deepseek_vit_*"),
           "qwen3_vit_88m"),
    Family("Others with attention", ("cait_*", "xcit_*", "volo_*", "convit_*", "crossvit_*",
           "pit_*", "levit_*", "tnt_*", "tiny_vit_*"), "cait_xxs24_224"),
)  # fmt: skip


def family_of(name: str) -> Family | None:
    """The family of a timm name, such as "vit_small_patch16_dinov3.lvd1689m"; None: of none."""
    name = name.rpartition("/")[2]  # hf_hub:timm/...
    return next((family for family in FAMILIES if family.has(name)), None)


def default_pool(name: str) -> dict[str, str]:
    """What timm must be asked for so that a row decides for which the weights were trained."""
    family = family_of(name)
    return {"global_pool": "token"} if family and family.average and family.trained else {}


def advice(name: str) -> str:
    """What is to be said of a model that was refused, beside why; "" where that says it all."""
    family = family_of(name)
    told = (family.average or family.note) if family else ""
    if told and family.average:
        told += "; on the command line: --model.overrides global_pool token"
    return f" ({family.title}: {told})" if told else ""


@cache
def why_refused(name: str, global_pool: str = "") -> str:
    """Why a timm model is refused, or "" if it is not; it takes no memory and fetches nothing.

    Args:
        global_pool: other than the one with which `create_model` makes it.

    Raises:
        RuntimeError: timm knows no such model.
    """
    asked = {"global_pool": global_pool} if global_pool else default_pool(name)
    with torch.device("meta"):
        vit = timm.create_model(name, **asked)
    try:
        refuse_unsupported(vit)
    except UnsupportedModelError as error:
        return str(error)
    return ""
