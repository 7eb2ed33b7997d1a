"""REINFORCE with a learned baseline (Williams 1992; Sutton and Barto 2018, section 13.4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from proximo.algorithms.adam import Optimizer
from proximo.algorithms.policy_gradient import PolicyGradient
from proximo.algorithms.update import estimated
from proximo.core.batch import Batch
from proximo.core.masked import masked_mean
from proximo.core.policy import Policy


@dataclass(frozen=True)
class Reinforce(PolicyGradient):
    """Settings of REINFORCE, and the update that follows them: one step of Adam on the episodes that have ended.

    The return of a step is what its episode still brought, whole, minus the baseline; only at a truncation the value of
    what was cut off stands in. Steps of episodes that have not ended when the rollout does are left out.
    """

    learning_rate: float = 1e-3
    """Step size of Adam."""
    normalize_advantages: bool = True
    """Shift and scale the returns minus the baseline to mean 0 and standard deviation 1."""

    def update(
        self, policy: Policy, optimizer: Optimizer, batch: Batch, generator: torch.Generator
    ) -> dict[str, float]:
        """Improve `policy` in place on one rollout; return metrics by their names.

        Where no episode has ended there is nothing to learn from: `n_updates` is 0.

        Raises:
            NonFiniteUpdateError: if the loss or gradient is not finite; the weights stay finite.
        """
        ended = replace(batch, mask=batch.mask & in_ended_episodes(batch.done & batch.mask))
        if not ended.mask.any():
            return self._unchanged(policy, batch)
        # Of the whole return up to an episode's end nothing comes from the critic but the baseline: lambda is 1.
        return self.step(policy, optimizer, ended, generator, gae_lambda=1.0)

    def _unchanged(self, policy: Policy, batch: Batch) -> dict[str, float]:
        _, quality = estimated(policy, batch, gamma=self.gamma, gae_lambda=1.0)
        with torch.no_grad():
            entropy = float(masked_mean(policy.evaluate(batch).entropy, batch.mask))
        nothing = dict.fromkeys(("policy_loss", "value_loss", "approx_kl", "approx_kl_max", "grad_norm"), 0.0)
        return nothing | quality | {"entropy": entropy, "n_updates": 0.0, "kl_stopped": 0.0}


def in_ended_episodes(done: Tensor) -> Tensor:
    """Of steps `[B, T]` those at or before the last end of their row."""
    return done.flip(1).cumsum(1).flip(1) > 0
