"""What the outputs of an actor mean: the distribution over the actions of a space, and the way to the environment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from proximo.core.distributions import (
    GSDE,
    Beta,
    Categorical,
    DiagonalGaussian,
    Distribution,
    Joint,
    MultiCategorical,
    SquashedGaussian,
    allow,
)
from proximo.errors import UserError
from proximo.models.packing import PackedActions, leaves, named, options_of

Continuous = Literal["gaussian", "squashed_gaussian", "beta", "gsde"]
CONTINUOUS: tuple[Continuous, ...] = ("gaussian", "squashed_gaussian", "beta", "gsde")
_BY_NAME = {"gaussian": DiagonalGaussian, "squashed_gaussian": SquashedGaussian, "beta": Beta, "gsde": GSDE}
_WITHIN_BOUNDS = ("squashed_gaussian", "beta")

LOG_STD_RANGE = (-20.0, 2.0)
"""Where a standard deviation that hangs on the state is kept."""


def distribution_name(value: Any) -> Any:
    """The name of a distribution that is given as its class; what is no class, as it is.

    Raises:
        UserError: if it is a class that has no name here.
    """
    if not isinstance(value, type):
        return value
    for name, kind in _BY_NAME.items():
        if value is kind:
            return name
    said = f"{value.__module__}.{value.__qualname__}"
    if value in (Categorical, MultiCategorical):
        raise UserError(
            f"distribution is {said}, which is what choices always have; the setting is for the numbers of a Box. "
            "Leave it out."
        )
    known = ", ".join(f"{kind.__name__} ({name!r})" for name, kind in _BY_NAME.items())
    raise UserError(
        f"distribution is {said}, a class that no name stands for; there are {known}. A run keeps the name alone, so "
        "that loading a policy runs nobody's code. To add one: a class in proximo/core/distributions.py, its name in "
        "proximo/models/actions.py."
    )


class Seen(NamedTuple):
    """What state-dependent exploration needs beside the actor's outputs."""

    features: Tensor
    """`[*S, F]`: what the actor's last layer sees, without gradient."""
    noise: Tensor | None
    """`[*S, F, columns]`: the matrices to act with; None draws afresh."""


@dataclass(frozen=True)
class _Choices:
    """One choice (a Discrete) or several; `first` is the number that the environment has for option 0 of each."""

    name: str
    sizes: tuple[int, ...]
    first: np.ndarray
    is_one: bool

    @property
    def n_columns(self) -> int:
        return len(self.sizes)

    @property
    def n_outputs(self) -> int:
        return sum(self.sizes)

    def distribution(self, logits: Tensor, log_std: Tensor | None, seen: Seen | None) -> Distribution:
        del log_std, seen
        return Categorical(logits) if self.is_one else MultiCategorical(logits, self.sizes)

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """`[N, columns]`, to the environment's numbers."""
        return actions + self.first

    def on_device(self, space: spaces.Space, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Its actions `[N]` or `[N, columns]` as a tensor of actions `[N, *shape]` of `space`."""
        shape, dtype = space.shape or (), _torch_dtype(space)
        first = torch.as_tensor(self.first, device=device)
        columns = len(first)
        return lambda actions: (actions.reshape(-1, columns) + first).reshape(-1, *shape).to(dtype)

    def from_environment(self, actions: np.ndarray) -> np.ndarray:
        wrong = ~((actions >= self.first) & (actions < self.first + np.array(self.sizes)) & (actions % 1 == 0))
        if wrong.any():
            value = actions[wrong][0]
            column = int(np.argwhere(wrong)[0][-1])
            last = int(self.first[column]) + self.sizes[column] - 1
            raise ValueError(f"{self.name} is {value:g}; it must be a whole number from {self.first[column]} to {last}")
        return actions - self.first


@dataclass(frozen=True)
class _Numbers:
    """The numbers of a Box: `offset` and `scale` lead from the policy's units to the environment's."""

    name: str
    kind: Continuous
    offset: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rescaled: np.ndarray
    """Which of them are -1 to 1 for the policy."""
    has_own_std: bool
    """The standard deviation is an output of the actor, too."""
    log_std_init: float

    @property
    def n_columns(self) -> int:
        return len(self.offset)

    @property
    def n_outputs(self) -> int:
        return _BY_NAME[self.kind].parameter_size(self.n_columns) * (2 if self.has_own_std else 1)

    @property
    def n_log_stds(self) -> int:
        """How many standard deviations are weights of their own."""
        return 0 if self.kind == "beta" or self.has_own_std else self.n_columns

    def distribution(self, outputs: Tensor, log_std: Tensor | None, seen: Seen | None) -> Distribution:
        if self.kind == "beta":
            return Beta(outputs.unflatten(-1, (-1, 2)))
        if self.kind == "gsde":
            assert log_std is not None
            assert seen is not None
            return GSDE(outputs, seen.features, log_std, seen.noise)
        if self.has_own_std:
            outputs, raw = outputs.chunk(2, -1)
            log_std = (raw + self.log_std_init).clamp(*LOG_STD_RANGE)
        assert log_std is not None
        return DiagonalGaussian(outputs, log_std) if self.kind == "gaussian" else SquashedGaussian(outputs, log_std)

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        boxed = actions
        if self.kind in _WITHIN_BOUNDS:
            boxed = _BY_NAME[self.kind].to_box(torch.from_numpy(actions)).numpy()
        return (boxed * self.scale + self.offset).clip(self.low, self.high)

    def on_device(self, space: spaces.Space, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Its actions `[N, columns]` as a tensor of actions `[N, *shape]` of `space`."""
        shape, dtype = space.shape or (), _torch_dtype(space)
        offset, scale, low, high = (
            torch.as_tensor(array, dtype=torch.float64, device=device)
            for array in (self.offset, self.scale, self.low, self.high)
        )
        to_box: Any = _BY_NAME[self.kind].to_box
        return lambda actions: (
            (to_box(actions.detach()) * scale + offset).clamp(low, high).reshape(-1, *shape).to(dtype)
        )

    def from_environment(self, actions: np.ndarray) -> np.ndarray:
        boxed = ((actions - self.offset) / self.scale).astype(np.float32)  # at once: "just inside" is of this kind
        if self.kind in _WITHIN_BOUNDS:
            return _BY_NAME[self.kind].from_box(torch.from_numpy(boxed)).numpy()
        return boxed


class ActionHead:
    """Distributions over the actions of a space from an actor's outputs; part by part where it has several.

    Sampled actions are `[N]` for a Discrete, `[N, A]` for everything else, A numbers or choices side by side.

    Args:
        space: Discrete, MultiDiscrete, MultiBinary, a Box of floats, or rows of Dicts and Tuples of these.
        kind: the distribution over the numbers of a Box.
        has_own_std: its standard deviation is an output, too, instead of one weight for all states.
        log_std_init: its logarithm to begin with.
        rescale: bounded dimensions are -1 to 1 for the policy.

    Raises:
        UserError: if actions of this space cannot be learned, or not with this distribution.
    """

    def __init__(
        self, space: spaces.Space, *, kind: Continuous, has_own_std: bool, log_std_init: float, rescale: bool
    ) -> None:
        """Go through the parts."""
        self.space = space
        source = space.source if isinstance(space, PackedActions) else space
        self.parts = [
            _part(leaf.space, named("action", leaf.path), kind, has_own_std, log_std_init, rescale=rescale)
            for leaf in leaves(source, "action")
        ]
        self.options = options_of(source)
        self.n_outputs = sum(part.n_outputs for part in self.parts)
        self._outputs = [part.n_outputs for part in self.parts]
        self._widths = tuple(part.n_columns for part in self.parts)
        self._columns = [slice(*ends) for ends in pairwise([0, *accumulate(self._widths)])]
        self.log_stds = [part.n_log_stds if isinstance(part, _Numbers) else 0 for part in self.parts]
        self._is_joint = isinstance(space, PackedActions)
        self.has_noise = kind == "gsde" and sum(self.log_stds) > 0

    @property
    def has_numbers(self) -> bool:
        """Whether a part of the actions is continuous."""
        return any(isinstance(part, _Numbers) for part in self.parts)

    @property
    def is_plain(self) -> bool:
        """Whether this is one choice, or numbers with one standard deviation for all states: what is written out."""
        part = self.parts[0]
        if isinstance(part, _Choices):
            return part.is_one and not self._is_joint
        return part.kind == "gaussian" and not part.has_own_std and not self._is_joint

    def distribution(
        self, outputs: Tensor, log_std: Tensor | None, mask: Tensor | None = None, seen: Seen | None = None
    ) -> Distribution:
        """The distribution at outputs `[*S, n_outputs]`; `mask` `[*S, sum(options)]` says which options there are.

        `log_std` is `[n]`, one for all states, or `[F, n]` with `seen` (gsde), n being the sum of `log_stds`.
        """
        if len(self.parts) == 1 and not self._is_joint and mask is None:
            return self.parts[0].distribution(outputs, log_std, seen)
        pieces = list(outputs.split(self._outputs, -1))
        if mask is not None:
            masks = iter(mask.split([part.n_outputs for part in self.parts if isinstance(part, _Choices)], -1))
            pieces = [
                allow(piece, next(masks)) if isinstance(part, _Choices) else piece
                for part, piece in zip(self.parts, pieces, strict=True)
            ]
        spreads = [None] * len(pieces) if log_std is None else list(log_std.split(self.log_stds, -1))
        seens = [seen] * len(pieces)
        if seen is not None and seen.noise is not None:
            seens = [Seen(seen.features, noise) for noise in seen.noise.split(self.log_stds, -1)]
        parts = tuple(
            part.distribution(piece, spread, own)
            for part, piece, spread, own in zip(self.parts, pieces, spreads, seens, strict=True)
        )
        return Joint(parts, self._widths) if self._is_joint else parts[0]

    def to_environment(self, actions: Tensor) -> np.ndarray:
        """Sampled actions `[N, *A]` as a fresh array of rows that the environments accept."""
        array = actions.detach().cpu().numpy()
        if isinstance(self.space, spaces.Discrete):
            return array + int(self.space.start)
        rows = array.reshape(len(array), sum(self._widths))
        columns = [part.to_environment(rows[:, own]) for part, own in zip(self.parts, self._columns, strict=True)]
        joined = np.concatenate(columns, 1) if len(columns) > 1 else columns[0]
        if self._is_joint:
            return joined.astype(np.float64)
        return joined.reshape(len(rows), *(self.space.shape or ())).astype(self.space.dtype)

    def from_environment(self, rows: np.ndarray) -> np.ndarray:
        """What was sampled where the environments got `rows` `[N, *A]`: the inverse of `to_environment`.

        Raises:
            ValueError: if a choice is one that there is not.
        """
        flat = rows.reshape(len(rows), sum(self._widths)).astype(np.float64)
        columns = [part.from_environment(flat[:, own]) for part, own in zip(self.parts, self._columns, strict=True)]
        sampled = np.concatenate(columns, 1)
        if isinstance(self.space, spaces.Discrete):
            return sampled[:, 0].astype(np.int64)
        return sampled.astype(np.int64 if isinstance(self.parts[0], _Choices) and not self._is_joint else np.float32)

    @property
    def log_scale(self) -> float:
        """Sum over the continuous dimensions of the logarithm of an environment unit per unit of the policy."""
        scales = [part.scale for part in self.parts if isinstance(part, _Numbers)]
        return float(sum(np.log(scale).sum() for scale in scales))

    @property
    def half_ranges(self) -> list[np.ndarray | None]:
        """Of each part: half the range of each number that is rescaled to its bounds, NaN of others; None: choices."""
        return [
            np.where(part.rescaled, part.scale, np.nan) if isinstance(part, _Numbers) else None for part in self.parts
        ]

    @property
    def action_map(self) -> tuple[np.ndarray, np.ndarray]:
        """Of a Box: offset and scale, shaped as it, from the policy's units to the environment's; else 0 and 1."""
        part, shape = self.parts[0], self.space.shape or ()
        if not isinstance(part, _Numbers) or self._is_joint:
            return np.zeros(()), np.ones(())
        return part.offset.reshape(shape), part.scale.reshape(shape)

    def on_device(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """`to_environment` as a function of tensors on `device`, from which nothing goes to the host."""
        space = self.space
        if isinstance(space, spaces.Discrete):
            start = int(space.start)
            return lambda actions: actions + start if start else actions
        assert not self._is_joint, "environments on a device have a Box, a Discrete or a MultiDiscrete for actions"
        return self.parts[0].on_device(space, device)

    def modes(self, outputs: Tensor, log_std: Tensor | None, mask: Tensor | None = None) -> list[Tensor]:
        """The most likely action of each part, `[N]` or `[N, columns]`, as `distribution` has it."""
        seen = None
        if self.has_noise and log_std is not None:  # which the mode of gsde does not hang on
            seen = Seen(outputs.new_zeros(*outputs.shape[:-1], len(log_std)), None)
        distribution = self.distribution(outputs, log_std, mask, seen)
        parts = distribution.parts if isinstance(distribution, Joint) else (distribution,)
        return [part.mode() for part in parts]


def _torch_dtype(space: spaces.Space) -> torch.dtype:
    return torch.from_numpy(np.empty(0, space.dtype)).dtype


def _part(
    space: spaces.Space, name: str, kind: Continuous, has_own_std: bool, log_std_init: float, *, rescale: bool
) -> _Choices | _Numbers:
    if isinstance(space, spaces.Discrete):
        return _Choices(name, (int(space.n),), np.array([int(space.start)]), True)
    if isinstance(space, spaces.MultiDiscrete):
        sizes = tuple(int(size) for size in space.nvec.ravel())
        return _Choices(name, sizes, np.asarray(space.start).ravel().astype(np.int64), False)
    if isinstance(space, spaces.MultiBinary):
        n = math.prod(space.shape)
        return _Choices(name, (2,) * n, np.zeros(n, np.int64), False)
    assert isinstance(space, spaces.Box)
    if not np.issubdtype(space.dtype, np.floating):
        raise UserError(
            f"{name}'s space is {space}, of whole numbers; a Box of actions is of floats. Use a MultiDiscrete, or give "
            "it dtype=np.float32 and round in the environment."
        )
    low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
    bounded = (np.abs(low) < 1e8) & (np.abs(high) < 1e8) & rescale  # some write the largest float for infinity
    if kind in _WITHIN_BOUNDS and not bounded.all():
        raise UserError(
            f"distribution is {kind!r}, which lies between bounds, but {name} is unbounded: {space}"
            f"{'' if rescale else ' (and rescale_actions is off)'}. Give its space bounds, or use gaussian."
        )
    lowest, highest = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
    offset = (highest + lowest) / 2.0
    scale = np.maximum((highest - lowest) / 2.0, 1e-8)
    return _Numbers(name, kind, offset, scale, low, high, bounded, has_own_std and kind != "beta", log_std_init)
