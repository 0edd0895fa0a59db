"""The model as one network from bytes to boxes, with what is constant at inference folded into its weights.

It loads whatever `AutoModelForObjectDetection` does that has sigmoid scores: RT-DETRv2 and RT-DETR.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import AutoModelForObjectDetection
from transformers.utils import logging as transformers_logging

from processors.detect.card import Card, Pixels, unloadable

# The names under which RT-DETR's layers, and its ResNet's, keep a convolution and the norm behind it.
_PAIRS = (("conv", "norm"), ("convolution", "normalization"), ("0", "1"))

# Of transformers' frozen norms, which keep none.
_FROZEN_EPS = 1e-5


class Network(nn.Module):
    """uint8 (n, height, width, 3) RGB in; float32 (n, queries, classes + 4) out: sigmoid scores, then the box.

    A box is centre x, centre y, width and height as fractions. One tensor, so that one copy brings it back.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: nn.Module, pixels: Pixels) -> None:
        super().__init__()
        self.model = model
        self.size = (pixels.height, pixels.width)
        self.register_buffer("scale", torch.tensor(pixels.scale).view(1, 3, 1, 1))
        self.register_buffer("shift", torch.tensor(pixels.shift).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the class. Bytes that lie as an image are `channels_last` already: nothing is moved."""
        dtype = next(self.model.parameters()).dtype
        scaled = images.permute(0, 3, 1, 2).float() * self.scale + self.shift
        output = self.model(pixel_values=scaled.to(dtype))
        return torch.cat((output.logits.sigmoid(), output.pred_boxes), -1).float()


def load(card: Card, *, fold: bool = True) -> Network:
    """The network of a model's folder, on the CPU, float32, for inference.

    Raises:
        ModelError: transformers cannot load it.
    """
    transformers_logging.disable_progress_bar()  # it is drawn for terminals, and would stand in the log
    try:
        model: Any = AutoModelForObjectDetection.from_pretrained(card.folder)
    except (OSError, ValueError) as error:
        raise unloadable(card.name, error) from error
    model = model.eval().requires_grad_(requires_grad=False)
    if fold:
        fold_norms(model)
        fold_branches(model)
    return Network(model, card.pixels).eval().to(memory_format=torch.channels_last)


def fold_norms(model: nn.Module) -> None:
    """Put every batch norm into the convolution before it: at inference it is a scale and a shift."""
    for module in list(model.modules()):
        for first, second in _PAIRS:
            conv: Any = getattr(module, first, None)
            norm: Any = getattr(module, second, None)
            if isinstance(conv, nn.Conv2d) and hasattr(norm, "running_var"):
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight,
                    conv.bias,
                    norm.running_mean,
                    norm.running_var,
                    getattr(norm, "eps", _FROZEN_EPS),
                    norm.weight,
                    norm.bias,
                )
                setattr(module, second, nn.Identity())


def fold_branches(model: nn.Module) -> None:
    """Make one 3x3 convolution of RepVGG's two branches (arXiv 2101.03697); their norms must be folded already."""
    for parent in list(model.modules()):
        for name, block in list(parent.named_children()):
            if not type(block).__name__.endswith("RepVggBlock"):
                continue
            three, one = block.conv1.conv, block.conv2.conv  # type: ignore[union-attr]
            assert isinstance(three, nn.Conv2d)
            assert isinstance(one, nn.Conv2d)
            assert three.bias is not None
            assert one.bias is not None
            three.weight = nn.Parameter(three.weight + nn.functional.pad(one.weight, [1, 1, 1, 1]), requires_grad=False)
            three.bias = nn.Parameter(three.bias + one.bias, requires_grad=False)
            setattr(parent, name, nn.Sequential(three, block.activation))  # type: ignore[arg-type]
