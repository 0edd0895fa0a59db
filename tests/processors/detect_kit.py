"""Models for the tests of runtimes: the demo's, and random ones of RT-DETRv2's and RT-DETR's full and least shapes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from infra.models.library import DEMO
from infra.models.scene import random_scene

_FULL = 640

DEMO_DETECTOR = str(DEMO / "detector")


def scenes(count: int) -> list[Image.Image]:
    """The demo's rendered scenes, at 640 x 360."""
    return [random_scene(seed)[0].resize((640, 360), Image.Resampling.BICUBIC) for seed in range(count)]


def patches(count: int, size: tuple[int, int] = (1280, 720)) -> list[Image.Image]:
    """Patches of random colours."""
    rng = np.random.default_rng(7)
    return [
        Image.fromarray(rng.integers(0, 256, (9, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for _ in range(count)
    ]


def tiny_v1(folder: Path) -> str:
    """RT-DETR, the first version, as small as it goes, with random weights."""
    return _save(RTDetrForObjectDetection, RTDetrConfig(**_tiny()), folder, 64)


def tiny_v2(folder: Path) -> str:
    """RT-DETRv2, as small as it goes, with random weights."""
    return _save(RTDetrV2ForObjectDetection, RTDetrV2Config(**_tiny()), folder, 64)


def r18(folder: Path) -> str:
    """RT-DETRv2 with the backbone and the sizes of `PekingU/rtdetr_v2_r18vd`, random weights: its speed is the same."""
    backbone = RTDetrResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=3,
        num_labels=80,
    )
    return _save(RTDetrV2ForObjectDetection, config, folder, _FULL)


def r50(folder: Path) -> str:
    """RT-DETRv2 with the sizes of `PekingU/rtdetr_v2_r50vd`, transformers' defaults, random weights."""
    return _save(RTDetrV2ForObjectDetection, RTDetrV2Config(num_labels=80), folder, _FULL)


def _tiny() -> dict[str, Any]:
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return {
        "backbone_config": backbone,
        "encoder_in_channels": [8, 16, 16],
        "encoder_hidden_dim": 16,
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "d_model": 16,
        "decoder_in_channels": [16, 16, 16],
        "decoder_ffn_dim": 16,
        "decoder_attention_heads": 2,
        "decoder_layers": 2,
        "num_queries": 10,
        "num_labels": 3,
    }


def _save(kind: Any, config: Any, folder: Path, side: int) -> str:
    torch.manual_seed(0)
    model = kind(config)
    _settle(model.eval(), side)
    model.save_pretrained(folder)
    RTDetrImageProcessorPil(size={"height": side, "width": side}, do_normalize=False).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def _settle(model: torch.nn.Module, side: int) -> None:
    """Make of fresh weights some that tell places apart: fresh ones give each of the 8,400 the same score.

    Which 300 of them are looked at closer is chance then, and other in every runtime. So norms get the statistics of
    what reaches them, as training leaves them, and some that folding must heed; and boxes leave their anchors.
    """

    def fit(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)) + 0.01)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.1)

    hooks = []
    for module in model.modules():
        if hasattr(module, "running_var"):
            hooks.append(module.register_forward_pre_hook(fit))
        elif type(module).__name__.endswith("MLPPredictionHead"):
            *hidden, last = module.layers  # type: ignore[misc]
            for layer in hidden:
                torch.nn.init.xavier_normal_(layer.weight)
            last.weight.normal_(0, 0.05)
    rng = np.random.default_rng(1)
    model(torch.from_numpy(rng.random((2, 3, side, side), np.float32)))
    for hook in hooks:
        hook.remove()
