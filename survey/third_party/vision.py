"""Image models: timm's, torchvision's, and two that segment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import monai.networks.nets
import segmentation_models_pytorch
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import detection

from survey.third_party.case import Case, Inputs, call_in_order, randn

BATCH, CLASSES = 3, 4


def timm_case(name: str, side: int, **options: Any) -> Case:
    make = partial(timm.create_model, name, pretrained=False, num_classes=CLASSES, **options)
    return Case(name, "timm", make, randn(BATCH, 3, side, side))


CASES = [
    timm_case("resnet18", 32),
    timm_case("vit_tiny_patch16_224", 32, img_size=32, depth=2),
    timm_case("convnext_atto", 32, depths=(1, 1, 2, 1), drop_path_rate=0.2),
    timm_case("efficientnet_b0", 64),
    timm_case("swin_tiny_patch4_window7_224", 56, img_size=56, depths=(2, 2), num_heads=(2, 4), embed_dim=24),
    timm_case("mobilenetv3_small_050", 64),
    timm_case("regnetx_002", 64),
    timm_case("mixer_s32_224", 64, img_size=64),
    timm_case("deit3_small_patch16_224", 32, img_size=32, depth=2, drop_path_rate=0.2),
    timm_case("maxvit_rmlp_pico_rw_256", 64, img_size=64),
    timm_case("edgenext_xx_small", 64),
    timm_case("densenet121", 64),
]


# -- torchvision


def torchvision_case(name: str, side: int, **options: Any) -> Case:
    make = partial(torchvision.models.get_model, name, weights=None, num_classes=CLASSES, **options)
    return Case(name, "torchvision", make, randn(BATCH, 3, side, side))


def backbone(kind: str) -> Callable[[], nn.Module]:
    if kind.startswith("resnet"):
        make = detection.backbone_utils.resnet_fpn_backbone
        return partial(make, backbone_name=kind, weights=None, norm_layer=nn.BatchNorm2d)
    return partial(detection.backbone_utils.mobilenet_backbone, backbone_name=kind, weights=None, fpn=True)


def pictures(generator: torch.Generator) -> Inputs:
    """Two pictures, and two boxes in each, with their classes."""
    corners = 20 * torch.rand(2, 2, 2, generator=generator, dtype=torch.float64)
    sizes = 12 + 20 * torch.rand(2, 2, 2, generator=generator, dtype=torch.float64)
    return {
        "images": torch.rand(2, 3, 64, 64, generator=generator, dtype=torch.float64),
        "boxes": torch.cat([corners, corners + sizes], -1),
        "labels": torch.randint(1, CLASSES, (2, 2), generator=generator),
    }


def detected(model: nn.Module, images: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor) -> Any:
    """In training the losses; otherwise each picture's boxes, as many as there are found."""
    targets = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]
    return model(list(images), targets) if model.training else model(list(images))


def detector(name: str, **options: Any) -> Case:
    options |= {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    make = partial(getattr(detection, name), **options)
    return Case(name, "torchvision", make, pictures, detected, steps=1, untracked=("boxes",))


def first_of(model: nn.Module, x: torch.Tensor) -> Any:
    return model(x)["out"]


CASES += [
    Case("resnet18 FPN backbone", "torchvision", backbone("resnet18"), randn(1, 3, 64, 64)),
    Case("mobilenet FPN backbone", "torchvision", backbone("mobilenet_v3_large"), randn(1, 3, 64, 64)),
    detector("fasterrcnn_mobilenet_v3_large_320_fpn", min_size=64, max_size=64),
    detector("retinanet_resnet50_fpn", min_size=64, max_size=64),
    detector("fcos_resnet50_fpn", min_size=64, max_size=64),
    detector("ssdlite320_mobilenet_v3_large"),
    Case(
        "lraspp segmentation",
        "torchvision",
        partial(
            torchvision.models.get_model,
            "lraspp_mobilenet_v3_large",
            weights=None,
            weights_backbone=None,
            num_classes=CLASSES,
        ),
        randn(BATCH, 3, 64, 64),
        first_of,
    ),
    torchvision_case("swin_v2_t", 64),
    torchvision_case("shufflenet_v2_x0_5", 64),
    torchvision_case("googlenet", 64, aux_logits=False, init_weights=False),
    Case(
        "r3d_18 video",
        "torchvision",
        partial(torchvision.models.video.r3d_18, num_classes=CLASSES),
        randn(2, 3, 4, 24, 24),
    ),
]


# -- segmentation

CASES += [
    Case(
        "Unet of resnet18",
        "segmentation-models-pytorch",
        partial(segmentation_models_pytorch.Unet, "resnet18", encoder_weights=None, classes=2),
        randn(BATCH, 3, 32, 32),
    ),
    Case(
        "DeepLabV3+ of resnet18",
        "segmentation-models-pytorch",
        partial(segmentation_models_pytorch.DeepLabV3Plus, "resnet18", encoder_weights=None, classes=2),
        randn(BATCH, 3, 32, 32),
    ),
    Case(
        "U-Net in 3 dimensions",
        "monai",
        partial(
            monai.networks.nets.UNet,
            spatial_dims=3,
            in_channels=1,
            out_channels=2,
            channels=(4, 8, 16),
            strides=(2, 2),
            num_res_units=1,
            dropout=0.1,
        ),
        randn(BATCH, 1, 8, 8, 8),
    ),
    Case(
        "SegResNet",
        "monai",
        partial(
            monai.networks.nets.SegResNet,
            spatial_dims=3,
            init_filters=8,
            in_channels=1,
            out_channels=2,
            blocks_down=(1, 1),
            blocks_up=(1,),
            dropout_prob=0.1,
        ),
        randn(1, 1, 8, 8, 8),
    ),
    Case(
        "Swin UNETR",
        "monai",
        partial(
            monai.networks.nets.SwinUNETR,
            in_channels=1,
            out_channels=2,
            feature_size=12,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 2),
            spatial_dims=2,
        ),
        randn(1, 1, 64, 64),
    ),
]
__all__ = ["CASES", "call_in_order"]
