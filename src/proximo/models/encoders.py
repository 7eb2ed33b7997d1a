"""Encoders: networks that turn an observation into features, on which actor and critic stand together."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from proximo.errors import UserError

Encoder = Literal["auto", "mlp", "nature_cnn"]

SMALLEST_IMAGE = 36
"""Pixels of height and of width below which nothing is left of an image after the three convolutions."""


class NatureCNN(nn.Module):
    """The network of Mnih et al. 2015 (Nature 518, extended data table 1) up to its 512 features.

        32 filters 8x8 stride 4, 64 of 4x4 stride 2, 64 of 3x3 stride 1, 512 units; ReLU after each.

    Images are `[N, *O]` as the environment gives them, uint8 (or floats of the same range), and become floats only
    here: 0 to 255 is scaled to 0 to 1 by scaling the first filters, so that there is one float copy and no second.
    In bfloat16 on a CPU the first layer is the same sum over blocks of 4x4 pixels: 2x2 filters on 16 times the
    channels, which fill the tiles that the processor multiplies.
    """

    n_features = 512

    def __init__(self, space: spaces.Box, *, orthogonal: bool, generator: torch.Generator | None) -> None:
        """Build it for images of this space; `generator` draws the weights.

        Raises:
            UserError: if the space is not one of images, or of images that are too small.
        """
        super().__init__()
        self.channels_last, channels, height, width = image_layout(space)
        if min(height, width) < SMALLEST_IMAGE:
            raise UserError(
                f"encoder is 'nature_cnn', but the observations {space} are images of {height} by {width} pixels; it "
                f"needs {SMALLEST_IMAGE} by {SMALLEST_IMAGE} at least. Enlarge them (gymnasium.wrappers."
                "ResizeObservation), or use encoder 'mlp'."
            )
        sides = [((size - 8) // 4 + 1 - 4) // 2 + 1 - 2 for size in (height, width)]
        layers = (
            nn.utils.skip_init(nn.Conv2d, channels, 32, 8, 4),
            nn.utils.skip_init(nn.Conv2d, 32, 64, 4, 2),
            nn.utils.skip_init(nn.Conv2d, 64, 64, 3, 1),
            nn.utils.skip_init(nn.Linear, 64 * sides[0] * sides[1], self.n_features),
        )
        for layer in layers:
            if orthogonal:
                nn.init.orthogonal_(layer.weight, math.sqrt(2), generator=generator)  # type: ignore[arg-type]
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            else:
                bound = 1.0 / math.sqrt(layer.weight[0].numel())  # type: ignore[index]
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)  # type: ignore[arg-type]
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)  # type: ignore[arg-type]
        self.first, self.second, self.third, self.features = layers

    def forward(self, images: Tensor) -> Tensor:
        """Features `[N, 512]` of images `[N, *O]`."""
        first = self.first
        scaled = first.weight * (1.0 / 255.0)  # type: ignore[operator]
        if _fits_blocks(images) and not self.channels_last:
            x = F.conv2d(_blocks(images).to(torch.bfloat16), _filters_of_blocks(scaled), first.bias)  # type: ignore[arg-type]
        else:
            if self.channels_last:
                images = images.movedim(-1, 1)
            # Channels last in memory: on a CPU the gradient of the first filters takes a third of the time. Bytes
            # first: to move them costs less than to move floats.
            x = images.contiguous(memory_format=torch.channels_last).to(torch.float32)
            x = F.conv2d(x, scaled, first.bias, stride=4)  # type: ignore[arg-type]
        x = F.relu(x, inplace=True)
        x = F.relu(self.second(x), inplace=True)
        x = F.relu(self.third(x), inplace=True)
        return F.relu(self.features(x.permute(0, 2, 3, 1).flatten(1)), inplace=True)  # as it lies: nothing is copied


def _fits_blocks(images: Tensor) -> bool:
    """Whether these are bytes `[N, C, H, W]` in whole blocks, to be worked through in bfloat16 on a CPU."""
    in_bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return (
        images.device.type == "cpu"
        and images.dtype == torch.uint8
        and in_bfloat16
        and images.shape[-1] % 4 == 0
        and images.shape[-2] % 4 == 0
    )


def _blocks(images: Tensor) -> Tensor:
    """Bytes `[N, C, H, W]` as `[N, C * 4 * 4, H / 4, W / 4]`, channels last in memory; four are moved at a time."""
    n, channels, height, width = images.shape
    fours = images.contiguous().view(torch.int32).view(n, channels, height // 4, 4, width // 4)
    moved = fours.permute(0, 2, 4, 1, 3).contiguous().view(torch.uint8)
    return moved.view(n, height // 4, width // 4, 16 * channels).permute(0, 3, 1, 2)


def _filters_of_blocks(weight: Tensor) -> Tensor:
    """Filters `[F, C, 8, 8]` of stride 4 as `[F, C * 4 * 4, 2, 2]` of stride 1 for `_blocks`."""
    filters, channels = weight.shape[:2]
    halves = weight.view(filters, channels, 2, 4, 2, 4).permute(0, 1, 3, 5, 2, 4)
    return halves.reshape(filters, 16 * channels, 2, 2)


def chosen_encoder(wanted: Encoder, space: spaces.Box) -> Literal["mlp", "nature_cnn"]:
    """What `auto` means for these observations: the Nature CNN for uint8 images that are large enough for it."""
    if wanted != "auto":
        return wanted
    is_image = len(space.shape) == 3 and space.dtype == np.uint8
    if not is_image:
        return "mlp"
    _, _, height, width = image_layout(space)
    return "nature_cnn" if min(height, width) >= SMALLEST_IMAGE else "mlp"


def image_layout(space: spaces.Box) -> tuple[bool, int, int, int]:
    """Whether the channels come last, and the number of channels, height and width.

    They come first, as in a stack of frames (4, 84, 84), unless the last dimension alone is 1, 3 or 4.

    Raises:
        UserError: if these are no images that the Nature CNN can see.
    """
    shape = space.shape
    problem = None
    if len(shape) != 3:
        problem = "an image has three dimensions, such as (4, 84, 84)"
    elif space.dtype != np.uint8 and not (space.low.min() >= 0 and space.high.max() <= 255):
        problem = "the pixels of an image are from 0 to 255"
    if problem is not None:
        raise UserError(f"encoder is 'nature_cnn', but the observations are {space}: {problem}. Use encoder 'mlp'.")
    last = shape[2] in (1, 3, 4) and shape[0] not in (1, 3, 4)
    channels, height, width = (shape[2], shape[0], shape[1]) if last else shape
    return last, channels, height, width
