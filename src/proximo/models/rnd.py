"""The networks of random network distillation (Burda et al. 2018), and the moments that belong to them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from gymnasium import spaces
from torch import Tensor, nn

from proximo.core.normalize import RunningMoments
from proximo.models.control import NetworkConfig
from proximo.models.networks import image_encoder_of, perceptron
from proximo.models.packing import PackedObservations

CLIP = 5.0
"""Normalized observations are clipped to plus or minus this (section 2.4 of the paper)."""

_AT_ONCE = 1024
"""Observations that are looked at together where no gradient is wanted."""


class RandomNetworks(nn.Module):
    """A random target that never learns, and a predictor of its outputs.

    Observations are rows of any space as the policy gets them (docs/spaces.md). All that is in them, without the action
    mask, is normalized element by element, pixels too, and clipped to plus or minus 5. Images go through a
    convolutional encoder of the policy's kind, one each for target and predictor. The predictor has two hidden layers
    more than the target, as in the paper.
    """

    observation_mean: Tensor
    observation_variance: Tensor
    observation_count: Tensor
    return_mean: Tensor
    return_variance: Tensor
    return_count: Tensor

    def __init__(self, space: spaces.Box, config: NetworkConfig, width: int, generator: torch.Generator) -> None:
        """Build them for the policy's `observation_space` and network settings; `generator` draws the weights."""
        super().__init__()
        self.observation_space = space
        of_images = replace(config, orthogonal_init=True, normalize_observations=False)
        is_image = image_encoder_of(space, of_images, torch.Generator()) is not None
        if isinstance(space, PackedObservations):
            self._image_shapes = [image.shape for image in space.images]
            self._n_numbers = space.n_numbers
        else:
            self._image_shapes = [space.shape] if is_image else []
            self._n_numbers = 0 if is_image else math.prod(space.shape)
        hidden = () if is_image else (width,)
        self.target = _Network(space, self._n_numbers, of_images, hidden, width, generator)
        self.predictor = _Network(space, self._n_numbers, of_images, (*hidden, width, width), width, generator)
        self.target.requires_grad_(False)
        n_elements = self._n_numbers + sum(math.prod(shape) for shape in self._image_shapes)
        for name, moments in (
            ("observation", RunningMoments.empty((n_elements,))),
            ("return", RunningMoments.empty()),
        ):
            self.register_buffer(f"{name}_mean", moments.mean)
            self.register_buffer(f"{name}_variance", moments.variance)
            self.register_buffer(f"{name}_count", moments.count)

    def error(self, observations: Tensor) -> Tensor:
        """Mean squared error over the outputs, `[N]`, at raw `observations` `[N, *O]`; with gradient."""
        with torch.no_grad():
            numbers, images = self._normalized(observations)
            wanted = self.target(numbers, images)
        return (self.predictor(numbers, images) - wanted).square().mean(-1)

    def novelty(self, observations: Tensor) -> Tensor:
        """The same without gradient, for any number of observations."""
        with torch.no_grad():
            return torch.cat([self.error(some) for some in observations.split(_AT_ONCE)])

    def update_observation_moments(self, observations: Tensor) -> None:
        """Merge raw observations `[N, *O]` into the normalizer. Only ever between two rollouts."""
        moments = RunningMoments(self.observation_mean, self.observation_variance, self.observation_count)
        for some in observations.split(_AT_ONCE):
            moments = moments.updated(torch.cat(self._elements(some), -1))
        self.observation_mean, self.observation_variance, self.observation_count = (
            moments.mean,
            moments.variance,
            moments.count,
        )

    def update_return_moments(self, discounted_sums: Tensor) -> None:
        """Merge running discounted sums `[N]` of the error."""
        moments = RunningMoments(self.return_mean, self.return_variance, self.return_count).updated(discounted_sums)
        self.return_mean, self.return_variance, self.return_count = moments.mean, moments.variance, moments.count

    @property
    def reward_scale(self) -> float:
        """Error per unit of the intrinsic reward: the standard deviation of the intrinsic returns so far."""
        return math.sqrt(float(self.return_variance) + 1e-8)

    def _elements(self, observations: Tensor) -> list[Tensor]:
        """Numbers, and each image's pixels, flat: `[N, ...]` each."""
        space = self.observation_space
        if isinstance(space, PackedObservations):
            parts = [space.numbers(observations), *space.pixels(observations)]
        else:
            parts = [observations]
        return [part.flatten(1).to(torch.float32) for part in parts]

    def _normalized(self, observations: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Numbers `[N, F]` and images `[N, *shape]`, normalized and clipped."""
        x = torch.cat(self._elements(observations), -1)
        scale = (self.observation_variance + 1e-8).rsqrt().to(torch.float32)
        x = ((x - self.observation_mean.to(torch.float32)) * scale).clamp(-CLIP, CLIP)
        sizes = [self._n_numbers, *(math.prod(shape) for shape in self._image_shapes)]
        numbers, *pixels = x.split(sizes, -1)
        images = zip(pixels, self._image_shapes, strict=True)
        return numbers, [flat.reshape(-1, *shape) for flat, shape in images]


class _Network(nn.Module):
    """An encoder where there are images, and a perceptron on its features and the numbers."""

    def __init__(
        self,
        space: spaces.Box,
        n_numbers: int,
        config: NetworkConfig,
        hidden: tuple[int, ...],
        n_outputs: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._takes_several = isinstance(space, PackedObservations)
        self.encoder = image_encoder_of(space, config, generator)
        seen = n_numbers + (0 if self.encoder is None else self.encoder.n_features)
        config = replace(config, activation="relu", precision="float32")
        self.head = perceptron(seen, hidden, config, n_outputs, head_gain=math.sqrt(2), generator=generator)

    def forward(self, numbers: Tensor, images: list[Tensor]) -> Tensor:
        if self.encoder is None:
            return self.head(numbers)
        pixels = [255.0 * image for image in images]  # the encoders divide by it
        features = self.encoder(pixels if self._takes_several else pixels[0])
        return self.head(torch.cat([numbers, features], -1))
