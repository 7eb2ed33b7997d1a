"""The networks of an actor-critic by its settings: what sees images, and perceptrons."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from gymnasium import spaces
from torch import nn

from proximo.errors import UserError
from proximo.models.encoders import SeveralImages, chosen_encoder, image_encoder
from proximo.models.packing import PackedObservations

if TYPE_CHECKING:
    from proximo.models.control import NetworkConfig


def image_encoder_of(space: spaces.Space, config: NetworkConfig, generator: torch.Generator | None) -> Any:
    """What sees the images of an observation; None where there are none.

    Raises:
        UserError: if the images are not such as it can see, or a setting has nothing that it is for.
    """
    if isinstance(space, PackedObservations):
        if space.images:
            kind = "nature_cnn" if config.encoder == "auto" else config.encoder
            if kind == "mlp":
                raise UserError(
                    f"encoder is 'mlp', but the observations have images: {space.source}. Use nature_cnn or impala."
                )
            return SeveralImages([image.leaf.space for image in space.images], kind, config.orthogonal_init, generator)
        kind = "mlp" if config.encoder == "auto" else config.encoder
        if kind != "mlp":
            raise UserError(f"encoder is {kind!r}, but there is no image in the observations {space.source}. Use mlp.")
    else:
        assert isinstance(space, spaces.Box)
        kind = chosen_encoder(config.encoder, space)
        if kind != "mlp" and config.normalize_observations:
            raise UserError(
                f"normalize_observations is on, but the observations {space} are images, which the encoder scales from "
                "0..255 to 0..1 by itself. Set normalize_observations to false."
            )
        if kind != "mlp":
            return image_encoder(kind, space, orthogonal=config.orthogonal_init, generator=generator)
    if config.precision != "float32":
        raise UserError(
            f"precision is {config.precision!r}, which is for images alone; the perceptrons for "
            f"{space} compute in float32. Leave it out."
        )
    return None


def perceptron(
    n_inputs: int,
    hidden_sizes: tuple[int, ...],
    config: NetworkConfig,
    n_outputs: int,
    *,
    head_gain: float,
    generator: torch.Generator | None,
) -> nn.Sequential:
    """Linear layers with the activation between them, initialized as the config says."""
    sizes = [n_inputs, *hidden_sizes, n_outputs]
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(sizes)):
        with torch.random.fork_rng(devices=[]):  # the weights are drawn below, from the run's own generator
            linear = nn.Linear(before, after)
        is_head = index == len(sizes) - 2
        if config.orthogonal_init:
            nn.init.orthogonal_(linear.weight, head_gain if is_head else math.sqrt(2), generator=generator)
            nn.init.zeros_(linear.bias)
        else:
            bound = 1.0 / math.sqrt(before)
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
        layers.append(linear)
        if not is_head:
            layers.append(nn.Tanh() if config.activation == "tanh" else nn.ReLU())
    return nn.Sequential(*layers)
