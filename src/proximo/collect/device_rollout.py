"""`device_rollout`: what `rollout` does, for environments on a device, without a word to the host while it collects."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from proximo.collect.device_envs import DeviceEnvs
from proximo.collect.envs import EnvironmentFault
from proximo.collect.gsde import steady_noise
from proximo.collect.rollout import Episodes
from proximo.core.batch import Batch
from proximo.core.capture import captured
from proximo.models.control import ActorCritic


@dataclass
class DeviceCarry:
    """What one rollout leaves to the next, as `rollout.Carry`, on the device; overwritten in place."""

    observations: Tensor
    """[N, *O]: what to act on next."""
    episode_return: Tensor
    """[N], float64: rewards since the reset, the environment's own."""
    episode_length: Tensor
    """[N], int64: steps since the reset."""
    discounted_return: Tensor
    """[N], float64: sum of gamma^k r since the reset, as the reward scale sees it."""
    noise: Tensor | None = None
    """[N, F, columns]: gsde's matrices; None for every other distribution."""
    noise_age: np.ndarray | None = None
    """[], on the host: steps taken with them; -1 before there are any."""

    @staticmethod
    def start(observations: Tensor, noise_shape: tuple[int, int] | None = None) -> DeviceCarry:
        """At the first observations of all environments."""
        zeros = torch.zeros(len(observations), dtype=torch.float64, device=observations.device)
        carry = DeviceCarry(observations.clone(), zeros.clone(), zeros.to(torch.int64), zeros.clone())
        if noise_shape is not None:
            carry.noise = torch.zeros(len(observations), *noise_shape, device=observations.device)
            carry.noise_age = np.array(-1)
        return carry


def device_rollout(
    policy: ActorCritic,
    envs: DeviceEnvs,
    carry: DeviceCarry,
    length: int,
    generator: torch.Generator,
    *,
    gamma: float,
) -> tuple[Batch, Episodes]:
    """Take `length` steps in each environment with the policy as it is; advance `carry`. See `rollout.rollout`.

    All tensors of the batch are on the environments' device, which must be the policy's and the generator's too.

    Raises:
        EnvironmentFault: if an observation or reward is not finite.
    """
    return DeviceCollector(policy, envs, carry, length, generator, gamma=gamma, capture=False).collect()


class DeviceCollector:
    """Collects one rollout after the other into the same memory: acting and stepping as one CUDA graph, on CUDA.

    The batch of a rollout is overwritten by the next one. On another device, or where the environments cannot be
    captured, every operation is launched by itself; the numbers are the same.
    """

    def __init__(
        self,
        policy: ActorCritic,
        envs: DeviceEnvs,
        carry: DeviceCarry,
        length: int,
        generator: torch.Generator,
        *,
        gamma: float,
        capture: bool = True,
    ) -> None:
        """Set the memory for `length` steps aside; `carry` and `generator` are advanced by every rollout."""
        self._policy, self._envs, self._generator = policy, envs, generator
        self.carry = carry
        self._gamma = gamma
        self._length = length
        self._to_environment = policy.environment_actions(envs.device)
        self._t = torch.zeros(1, dtype=torch.int64, device=envs.device)
        self._record: dict[str, Tensor] | None = None
        self._may_capture = capture and envs.capturable
        self._step = self._take_step

    def collect(self) -> tuple[Batch, Episodes]:
        """One rollout.

        Raises:
            EnvironmentFault: if an observation or reward is not finite.
        """
        if self._record is None:
            self._record = self._memory()
            if self._may_capture:
                self._capture()
        self._t.zero_()
        noise = steady_noise(self._policy, self.carry, self._generator)
        for _ in range(self._length):
            if noise is not None:
                noise.next()  # in place, where the step reads it
            self._step()
        return self._assemble(self._record)

    def _memory(self) -> dict[str, Tensor]:
        """Every field of a rollout `[T, N, ...]`; what the policy gives is tried out, without drawing anything."""
        carry, before = self.carry, self._generator.get_state()
        acted = self._policy.act(carry.observations, self._generator, noise=carry.noise)
        self._generator.set_state(before)
        numbers = carry.episode_return
        flags = torch.zeros_like(numbers, dtype=torch.bool)
        rows = acted._asdict() | {
            "observations": carry.observations,
            "final_observations": carry.observations,
            **dict.fromkeys(("rewards", "discounted", "episode_return", "episode_length"), numbers),
            **dict.fromkeys(("terminated", "done", "valid"), flags),
        }
        return {name: row.new_zeros(self._length, *row.shape) for name, row in rows.items()}

    def _capture(self) -> None:
        """Capture a step, and undo the steps that this takes."""
        carry, envs = self.carry, self._envs
        before, acting = envs.snapshot(), self._generator.get_state()
        kept = {name: tensor.clone() for name, tensor in vars(carry).items() if isinstance(tensor, Tensor)}
        generators = [self._generator] + ([] if envs.generator is None else [envs.generator])
        self._step = captured(self._take_step, envs.device, generators)
        envs.restore(before)
        self._generator.set_state(acting)
        for name, tensor in kept.items():
            getattr(carry, name).copy_(tensor)

    def _take_step(self) -> None:
        """Act, step, and write row `t` of the record. Tensors alone: nothing here asks for a value."""
        carry = self.carry
        acted = self._policy.act(carry.observations, self._generator, noise=carry.noise)
        self._write(observations=carry.observations, **acted._asdict())  # before the step: it may overwrite them
        step = self._envs.step(self._to_environment(acted.actions))
        rewards, valid = step.rewards.to(torch.float64), step.valid
        done = (step.terminated | step.truncated) & valid
        carry.episode_return.add_(torch.where(valid, rewards, 0.0))
        carry.episode_length.add_(valid)
        advanced = self._gamma * carry.discounted_return + rewards
        carry.discounted_return.copy_(torch.where(valid, advanced, carry.discounted_return))
        self._write(
            final_observations=step.final_observations,
            rewards=rewards,
            discounted=carry.discounted_return,
            episode_return=carry.episode_return,
            episode_length=carry.episode_length.to(torch.float64),
            terminated=step.terminated & valid,
            done=done,
            valid=valid,
        )
        for per_episode in (carry.episode_return, carry.episode_length, carry.discounted_return):
            per_episode.masked_fill_(done, 0)
        carry.observations.copy_(step.observations)
        self._t.add_(1).remainder_(self._length)  # warming up must not leave the record

    def _write(self, **rows: Tensor) -> None:
        assert self._record is not None
        for name, row in rows.items():
            self._record[name].index_copy_(0, self._t, row.unsqueeze(0))

    def _assemble(self, record: dict[str, Tensor]) -> tuple[Batch, Episodes]:
        """The batch, and what the host wants to know of the rollout, in one transfer."""
        policy, values = self._policy, record["values"]
        ended = record["done"].nonzero()  # in order of time; from here on the host may wait
        times, rows = ended.unbind(1)
        finals = record["final_observations"][times, rows]
        next_values = torch.cat([values[1:], policy.scaled_values(self.carry.observations).unsqueeze(0)])
        if len(finals):
            next_values[times, rows] = policy.scaled_values(finals)
        self._refuse_what_is_not_finite(record, finals, rows)
        rewards = record["rewards"].sign() if policy.config.sign_rewards else record["rewards"]
        if policy.config.normalize_rewards:
            policy.update_return_moments(record["discounted"].mT[record["valid"].mT])
            limit = policy.config.clip_reward
            rewards = (rewards / policy.reward_scale).clamp(-limit, limit)
        fields = {
            name: record[name] for name in ("observations", "actions", "log_probs", "values", "terminated", "done")
        }
        fields |= {"mask": record["valid"], "rewards": rewards.to(torch.float32), "next_values": next_values}
        batch = Batch(**{name: tensor.transpose(0, 1) for name, tensor in fields.items()})
        facts = torch.stack([record[name][times, rows] for name in ("episode_return", "episode_length", "terminated")])
        returns, lengths, terminated = facts.tolist()
        return batch, Episodes(returns, [int(length) for length in lengths], int(sum(terminated)))

    def _refuse_what_is_not_finite(self, record: dict[str, Tensor], finals: Tensor, rows: Tensor) -> None:
        """Raise for the first environment with an observation or reward that is not finite."""
        bad = (~record["rewards"].isfinite() & record["valid"]).any(0)
        bad |= ~_finite(record["observations"].transpose(0, 1)) | ~_finite(self.carry.observations)
        bad = bad.index_put((rows,), ~_finite(finals), accumulate=True)
        if not bool(bad.any()):
            return
        index = int(bad.nonzero()[0])
        problem = "an observation or reward is not finite"
        facts = {"env_index": index, "episode": -1, "step": -1, "seed": None, "actions": [], "problem": problem}
        said = f"environment {index}, within the last {self._length} steps: {problem}. Environments on a device are "
        raise EnvironmentFault(said + "looked at once a rollout, so the very step is not known.", facts)


def _finite(x: Tensor) -> Tensor:
    """`[N]`: whether all of each row is finite."""
    if not x.is_floating_point():
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    return x.isfinite().reshape(len(x), math.prod(x.shape[1:])).all(1)
