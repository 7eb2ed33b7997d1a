"""What a rollout says of the task before anything is learned from it: sizes, and how episodes end.

These are for the diagnosis (`report/diagnosis.py`): once per iteration, over whole tensors, so that no step waits.
"""

from __future__ import annotations

import torch

from proximo.collect.rollout import Episodes
from proximo.core.batch import Batch
from proximo.models.control import ActorCritic, NetworkConfig

ROUNDING = 1e-8
"""What is smaller than this share of the largest number cannot be told from 0 beside it in single precision."""


def rollout_metrics(network: NetworkConfig, policy: ActorCritic, batch: Batch, episodes: Episodes) -> dict[str, float]:
    """Sizes of rewards and observations where no normalizer takes care of them, and the share of true ends.

    `reward_largest`: the largest size of a reward. `observation_largest`, `observation_smallest`: the size of the
    largest and of the smallest number of an observation, each at its largest in the rollout; numbers that are
    always 0 are left out. `terminated_share`: episodes that the environment ended by itself, of those that ended;
    the others were cut off. It is left out where no episode ended.
    """
    metrics: dict[str, float] = {}
    if episodes.returns:
        metrics["terminated_share"] = episodes.n_terminated / len(episodes.returns)
    if not (network.normalize_rewards or network.sign_rewards):
        metrics["reward_largest"] = float(torch.where(batch.mask, batch.rewards, 0.0).abs().max())
    if network.normalize_observations or not isinstance(batch.observations, torch.Tensor):
        return metrics
    everywhere = bool(batch.mask.all())
    observations = batch.observations.flatten(0, 1) if everywhere else batch.observations[batch.mask]
    extent = policy.observation_extent(observations)
    if extent is not None:
        largest = extent.max()
        counted = torch.where(extent > ROUNDING * largest, extent, torch.inf)
        smallest = torch.where(largest > 0, counted.min(), 0.0)
        metrics["observation_largest"], metrics["observation_smallest"] = torch.stack([largest, smallest]).tolist()
    return metrics
