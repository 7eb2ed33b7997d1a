"""What an intrinsic reward adds to a control run: its state, the rewards of a rollout, and the update that has both.

One iteration: the errors of the predictor at the rollout's next observations become rewards, divided by the running
standard deviation of their returns; the predictor learns; the policy learns from both rewards; and only then the
observations are taken into the moments that normalize them. The first `warmup_rollouts` do only the last of these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.ppo import PPO
from proximo.algorithms.rnd import discounted_sums, distill, following_values
from proximo.collect.rollout import Episodes
from proximo.core.batch import Batch
from proximo.core.masked import masked_mean
from proximo.errors import UserError
from proximo.models.control import ActorCritic
from proximo.models.rnd import RandomNetworks
from proximo.training.config import ControlConfig


@dataclass
class Explorer:
    """Everything of the intrinsic reward that changes while a run goes on."""

    networks: RandomNetworks
    optimizer: FlatAdam
    """Of the predictor."""
    running_return: Tensor
    """`[N]`, float64: discounted sums of the error, through the ends of episodes unless these cut it."""

    @staticmethod
    def start(config: ControlConfig, policy: ActorCritic) -> Explorer:
        """At the beginning of a run."""
        seed = np.random.SeedSequence([config.seed, 0x52BDF00D]).generate_state(1, np.uint64)
        drawn = torch.Generator().manual_seed(int(seed[0]))
        networks = RandomNetworks(policy.observation_space, policy.config, config.intrinsic.rnd_width, drawn)
        networks = networks.to(config.device)
        optimizer = FlatAdam(networks.predictor, learning_rate=config.intrinsic.predictor_learning_rate)
        running = torch.zeros(config.environment.n_envs, dtype=torch.float64, device=config.device)
        return Explorer(networks, optimizer, running)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor, for a checkpoint."""
        networks = {f"networks.{name}": tensor for name, tensor in self.networks.state_dict().items()}
        moments = {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_dict().items()}
        return networks | moments | {"running_return": self.running_return}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            KeyError, ValueError, RuntimeError: if it is of another run.
        """
        parts: dict[str, dict[str, Tensor]] = {"networks": {}, "optimizer": {}}
        for name, tensor in state.items():
            part, _, inner = name.partition(".")
            if inner:
                parts[part][inner] = tensor
        self.networks.load_state_dict(parts["networks"])
        self.optimizer.load_state_dict(parts["optimizer"])
        running = state["running_return"]
        if (running.shape, running.dtype) != (self.running_return.shape, self.running_return.dtype):
            raise ValueError(f"its running_return is {running.dtype} of shape {tuple(running.shape)}")
        self.running_return.copy_(running)


def refuse_what_cannot_explore(config: ControlConfig) -> None:
    """Refuse algorithms that would not read an intrinsic reward.

    Raises:
        UserError: naming the setting that does not fit, and how to mend it.
    """
    if config.intrinsic.explores and not isinstance(config.algorithm, PPO):
        raise UserError(
            f"exploration is '{config.intrinsic.exploration}', which is for PPO, and the algorithm is "
            f"{config.algorithm_name}. Use --algorithm ppo, or --exploration none."
        )


def is_warming_up(config: ControlConfig, iteration: int) -> bool:
    """Whether the iteration after so many only begins the moments."""
    return config.intrinsic.explores and iteration < config.intrinsic.warmup_rollouts


def next_observations(batch: Batch, episodes: Episodes, carried: np.ndarray) -> Tensor:
    """What followed each step, `[B, T, *O]`: the true final observation where an episode ended.

    Args:
        batch: the rollout.
        episodes: those that ended in it, with their final observations.
        carried: `[B, *O]`: what the next rollout begins with.
    """
    observations = batch.observations
    assert isinstance(observations, Tensor)
    last = torch.from_numpy(carried).to(observations.device)
    following = torch.cat([observations[:, 1:], last.unsqueeze(1)], 1)
    if len(episodes.final_observations):
        times, rows = torch.as_tensor(np.array(episodes.ends), device=observations.device).unbind(1)
        following[rows, times] = torch.from_numpy(np.array(episodes.final_observations)).to(observations.device)
    return following


def with_intrinsic_rewards(
    config: ControlConfig, explorer: Explorer, policy: ActorCritic, batch: Batch, following: Tensor, carried: np.ndarray
) -> Batch:
    """The batch with intrinsic rewards and values; the scale of the rewards takes in this rollout's first.

    Args:
        config: the settings.
        explorer: its running return and reward scale advance.
        policy: as it collected.
        batch: the rollout.
        following: what `next_observations` says.
        carried: `[B, *O]`: what the next rollout begins with.
    """
    settings, networks, mask = config.intrinsic, explorer.networks, batch.mask
    assert isinstance(batch.observations, Tensor)
    errors = networks.novelty(following.flatten(0, 1)).view(mask.shape)
    sums, explorer.running_return = discounted_sums(
        errors.to(torch.float64),
        mask,
        explorer.running_return,
        gamma=settings.intrinsic_gamma,
        cut=batch.done if settings.intrinsic_episodic else None,
    )
    networks.update_return_moments(sums[mask])
    values = policy.intrinsic_values(batch.observations.flatten(0, 1)).view(mask.shape)
    if settings.intrinsic_episodic:
        next_values = policy.intrinsic_values(following.flatten(0, 1)).view(mask.shape)
    else:
        last = policy.intrinsic_values(torch.from_numpy(carried).to(values.device))
        next_values = following_values(values, last, mask)
    return replace(
        batch,
        intrinsic_rewards=torch.where(mask, errors / networks.reward_scale, 0.0),
        intrinsic_values=values,
        intrinsic_next_values=next_values,
    )


def warm_up(explorer: Explorer, batch: Batch, episodes: Episodes, carried: np.ndarray) -> None:
    """Take a rollout into the moments of the observations, and learn nothing."""
    explorer.networks.update_observation_moments(next_observations(batch, episodes, carried)[batch.mask])


def explored_update(
    config: ControlConfig,
    explorer: Explorer,
    algorithm: PPO,
    policy: ActorCritic,
    optimizer: FlatAdam,
    batch: Batch,
    episodes: Episodes,
    carried: np.ndarray,
    generator: torch.Generator,
) -> dict[str, float]:
    """`PPO.update` on both rewards, and the predictor's; returns the metrics of both.

    Raises:
        NonFiniteUpdateError: if a loss or gradient is not finite; the weights stay finite.
    """
    settings = config.intrinsic
    following = next_observations(batch, episodes, carried)
    batch = with_intrinsic_rewards(config, explorer, policy, batch, following, carried)
    assert batch.intrinsic_rewards is not None
    seen = following[batch.mask]
    predictor_loss = distill(
        explorer.networks.error,
        explorer.optimizer,
        seen,
        n_epochs=algorithm.n_epochs,
        batch_size=algorithm.batch_size,
        share=settings.predictor_share,
        max_grad_norm=algorithm.max_grad_norm,
        generator=generator,
    )
    metrics = algorithm.update(policy, optimizer, batch, generator, intrinsic=settings)
    explorer.networks.update_observation_moments(seen)
    return metrics | {
        "intrinsic_reward_mean": float(masked_mean(batch.intrinsic_rewards, batch.mask)),
        "predictor_loss": predictor_loss,
    }
