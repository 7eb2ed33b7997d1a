"""Encoders: networks that turn an observation into features, on which actor and critic stand together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from proximo.errors import UserError
from proximo.models.packing import SMALLEST_IMAGE, image_layout

Encoder = Literal["auto", "mlp", "nature_cnn", "impala"]
Kind = Literal["mlp", "nature_cnn", "impala"]


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
            _draw(layer, orthogonal=orthogonal, generator=generator)
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


class ImpalaCNN(nn.Module):
    """The residual network of Espeholt et al. 2018 (figure 3, right, without its LSTM) up to its 256 features.

        three times: 3x3 convolution, 3x3 maximum with stride 2, two residual blocks of two 3x3 convolutions each;
        16, 32 and 32 filters; ReLU, 256 units, ReLU.

    Images are as for `NatureCNN`.
    """

    n_features = 256

    def __init__(self, space: spaces.Box, *, orthogonal: bool, generator: torch.Generator | None) -> None:
        """Build it for images of this space; `generator` draws the weights.

        Raises:
            UserError: if the space is not one of images.
        """
        super().__init__()
        self.channels_last, channels, height, width = image_layout(space)
        self.convolutions = nn.ModuleList()
        for before, after in zip((channels, 16, 32), (16, 32, 32), strict=True):
            self.convolutions.append(nn.utils.skip_init(nn.Conv2d, before, after, 3, padding=1))
            for _ in range(4):
                self.convolutions.append(nn.utils.skip_init(nn.Conv2d, after, after, 3, padding=1))
            height, width = (height + 1) // 2, (width + 1) // 2
        self.features = nn.utils.skip_init(nn.Linear, 32 * height * width, self.n_features)
        for layer in (*self.convolutions, self.features):
            _draw(layer, orthogonal=orthogonal, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        """Features `[N, 256]` of images `[N, *O]`."""
        if self.channels_last:
            images = images.movedim(-1, 1)
        x = images.contiguous(memory_format=torch.channels_last).to(torch.float32) * (1.0 / 255.0)
        for first in range(0, len(self.convolutions), 5):
            enter, *blocks = self.convolutions[first : first + 5]
            x = F.max_pool2d(enter(x), 3, stride=2, padding=1)
            for one, other in zip(blocks[::2], blocks[1::2], strict=True):
                x = x + other(F.relu(one(F.relu(x))))
        return F.relu(self.features(F.relu(x).permute(0, 2, 3, 1).flatten(1)))


class SeveralImages(nn.Module):
    """An encoder for each image of an observation; their features side by side."""

    def __init__(
        self, of: Sequence[spaces.Space], kind: Kind, orthogonal: bool, generator: torch.Generator | None
    ) -> None:
        """Build one for each space.

        Raises:
            UserError: if one is of images that cannot be seen.
        """
        super().__init__()
        made = []
        for space in of:
            assert isinstance(space, spaces.Box)
            made.append(image_encoder(kind, space, orthogonal=orthogonal, generator=generator))
        self.encoders = nn.ModuleList(made)
        self.n_features = sum(encoder.n_features for encoder in made)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Features `[N, n_features]` of each kind of image, `[N, *O]`."""
        return torch.cat([encoder(image) for encoder, image in zip(self.encoders, images, strict=True)], -1)


def image_encoder(
    kind: Kind, space: spaces.Box, *, orthogonal: bool, generator: torch.Generator | None
) -> NatureCNN | ImpalaCNN:
    """An encoder of this kind for images of this space.

    Raises:
        UserError: if it cannot see them.
    """
    of_kind = ImpalaCNN if kind == "impala" else NatureCNN
    return of_kind(space, orthogonal=orthogonal, generator=generator)


def _draw(layer: nn.Module, *, orthogonal: bool, generator: torch.Generator | None) -> None:
    """The initial weights of a convolution or a linear layer."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    if orthogonal:
        nn.init.orthogonal_(weight, math.sqrt(2), generator=generator)
        nn.init.zeros_(bias)
    else:
        bound = 1.0 / math.sqrt(weight[0].numel())
        nn.init.uniform_(weight, -bound, bound, generator=generator)
        nn.init.uniform_(bias, -bound, bound, generator=generator)


def chosen_encoder(wanted: Encoder, space: spaces.Box) -> Kind:
    """What `auto` means for these observations: the Nature CNN for uint8 images that are large enough for it."""
    if wanted != "auto":
        return wanted
    is_image = len(space.shape) == 3 and space.dtype == np.uint8
    if not is_image:
        return "mlp"
    _, _, height, width = image_layout(space)
    return "nature_cnn" if min(height, width) >= SMALLEST_IMAGE else "mlp"
