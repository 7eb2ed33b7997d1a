"""A policy as one graph of tensors: raw observations in, the environment's own actions and the value out.

`PolicyGraph` is what `proximo export` writes to a file. It has no weights or arithmetic of its own: normalizers,
networks and the way to the environment's units are those of the `ActorCritic` that it stands on. What it does itself is
to take an observation apart, which `models/packing.py` does for arrays on the host.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from proximo.models.control import ActorCritic
from proximo.models.packing import MASK_KEY, PackedActions, PackedObservations, Path, is_image, leaves

Role = Literal["observation", "action_mask", "memory", "action", "value"]


@dataclass(frozen=True)
class Port:
    """One input or output: its name, and which part of an observation or an action it is."""

    name: str
    role: Role
    path: Path
    """Keys and numbers that lead to it: `observation["arm"][0]` is `("arm", 0)`."""
    shape: tuple[int, ...]
    """Without the leading dimension, which is that of the batch."""
    dtype: np.dtype
    space: spaces.Space | None = None
    """None for a mask from `info`, for memory, and for the value."""


class PolicyGraph(nn.Module):
    """The deterministic policy and the value function over named tensors.

    Observations `[N, *O]` come raw, in the dtypes of their spaces, one for each simple space within a Dict or a Tuple.
    The mask, where the policy was trained with one, is `[N, options]`: 0 is forbidden. Actions `[N, *A]` are in
    the environment's own units, one for each simple space within; `value` `[N]` is in those of its rewards. A policy
    that remembers takes its `memory` `[N, S]`, zeros at the start of an episode, and gives `next_memory`.
    """

    def __init__(self, policy: ActorCritic) -> None:
        """Name what goes in and out."""
        super().__init__()
        self.policy = policy
        taken: set[str] = set()
        self.inputs = _inputs_of(policy, taken)
        self.outputs = _outputs_of(policy, taken)
        self.scale = policy.reward_scale
        parts, device = policy.head.parts, torch.device("cpu")
        self.actions = [port for port in self.outputs if port.role == "action"]
        self.value = next(port for port in self.outputs if port.role == "value")
        acted = [port.space for port in self.actions if port.space is not None]
        self._ways = [part.on_device(space, device) for part, space in zip(parts, acted, strict=True)]

    @property
    def columns(self) -> dict[str, slice]:
        """Where among the numbers that are normalized those of an input are; not of images and masks."""
        places, first = {}, 0
        for port in self.inputs:
            if port.role == "observation" and port.space is not None and not self._is_seen(port):
                width = _as_numbers(port.space, torch.zeros(1, *port.shape)).shape[-1]
                places[port.name] = slice(first, first + width)
                first += width
        return places

    def _is_seen(self, port: Port) -> bool:
        """Whether an input goes to the encoder."""
        is_packed = isinstance(self.policy.observation_space, PackedObservations)
        return is_image(port.space) if is_packed and port.space is not None else self.policy.encoder is not None

    def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Actions and values by the names of `outputs`, of tensors by the names of `inputs`."""
        images, numbers, mask = self._taken_apart(given)
        leading = (next(iter(given.values())).shape[0],)
        for_actor = for_critic = self.policy.features(images, numbers, leading)
        memory = [given[port.name].clone() for port in self.inputs if port.role == "memory"]
        if self.policy.memory is not None:
            for_actor, for_critic = self.policy.memory.step(for_actor, memory[0])
        modes = self.policy.head.modes(self.policy.actor(for_actor), self.policy.log_std, mask)
        actions = [way(mode) for way, mode in zip(self._ways, modes, strict=True)]
        value = self.policy.critic(for_critic).squeeze(-1) * self.scale
        return dict(zip([port.name for port in self.outputs], [*actions, value, *memory], strict=True))

    def _taken_apart(self, given: dict[str, Tensor]) -> tuple[Any, Tensor | None, Tensor | None]:
        """Images as the encoder takes them, numbers `[N, F]`, mask `[N, options]`; None for what there is not."""
        images, numbers, mask = [], [], None
        for port in self.inputs:
            value = given[port.name]
            if port.role == "action_mask":
                mask = value.flatten(1) != 0
            elif port.role == "memory":
                continue
            elif self._is_seen(port):
                images.append(value)
            else:
                assert port.space is not None
                numbers.append(_as_numbers(port.space, value))
        is_one = not isinstance(self.policy.observation_space, PackedObservations)
        seen: Any = images[0] if images and is_one else images or None
        return seen, torch.cat(numbers, -1) if numbers else None, mask


def _inputs_of(policy: ActorCritic, taken: set[str]) -> list[Port]:
    space = policy.observation_space
    if not isinstance(space, PackedObservations):
        return [_port("observation", (), space, taken), *_memory_of(policy, "memory", taken)]
    ports = []
    for leaf in leaves(space.source, "observation"):
        is_mask = space.mask_is_observed and leaf.path == (MASK_KEY,)
        ports.append(_port("action_mask" if is_mask else "observation", leaf.path, leaf.space, taken))
    if space.options and not space.mask_is_observed:
        # int8 as Gymnasium's own masks are: `info["action_mask"]` of Taxi, `mask` of `Discrete.sample`
        name = _free("action_mask", taken)
        ports.append(Port(name, "action_mask", (), (space.n_options,), np.dtype(np.int8)))
    return [*ports, *_memory_of(policy, "memory", taken)]


def _memory_of(policy: ActorCritic, words: str, taken: set[str]) -> list[Port]:
    """What a policy remembers, where it does."""
    size = policy.blank_memory(1).shape[1]
    return [Port(_free(words, taken), "memory", (), (size,), np.dtype(np.float32))] if size else []


def _outputs_of(policy: ActorCritic, taken: set[str]) -> list[Port]:
    space = policy.action_space
    if isinstance(space, PackedActions):
        ports = [_port("action", leaf.path, leaf.space, taken) for leaf in space.leaves]
    else:
        ports = [_port("action", (), space, taken)]
    value = Port(_free("value", taken), "value", (), (), np.dtype(np.float32))
    return [*ports, value, *_memory_of(policy, "next_memory", taken)]


def _port(role: Role, path: Path, space: spaces.Space, taken: set[str]) -> Port:
    words = "action_mask" if role == "action_mask" else "_".join([role, *map(str, path)])
    assert space.dtype is not None
    # A policy's choice among the options of a bare Discrete is an int64, whatever the space says.
    dtype = np.dtype(np.int64) if role == "action" and not path and isinstance(space, spaces.Discrete) else space.dtype
    return Port(_free(words, taken), role, path, tuple(space.shape or ()), np.dtype(dtype), space)


def _free(words: str, taken: set[str]) -> str:
    """A name that is nobody's yet, of letters, digits and underscores alone: ONNX and Python have no others."""
    plain = re.sub(r"[^0-9A-Za-z_]", "_", words)
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}_{number}", number + 1
    taken.add(name)
    return name


def _as_numbers(space: spaces.Space, value: Tensor) -> Tensor:
    """A part of an observation `[N, *shape]` as numbers `[N, F]`: a choice among n as n numbers of which one is 1."""
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return value.reshape(-1, math.prod(space.shape)).to(torch.float32)
    if isinstance(space, spaces.Discrete):
        sizes, first = [int(space.n)], np.array([int(space.start)])
    else:
        assert isinstance(space, spaces.MultiDiscrete)
        sizes, first = space.nvec.ravel().tolist(), np.asarray(space.start).ravel()
    options = np.concatenate([start + np.arange(size) for start, size in zip(first, sizes, strict=True)])
    chosen = value.reshape(-1, len(sizes)).to(torch.int64)
    columns = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    return (chosen[:, columns] == torch.from_numpy(options.astype(np.int64))).to(torch.float32)
