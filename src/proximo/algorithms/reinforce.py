"""REINFORCE with a learned baseline (Williams 1992; Sutton and Barto 2018, section 13.4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from proximo.algorithms.a2c import A2C
from proximo.algorithms.adam import Optimizer
from proximo.algorithms.ppo import Schedule
from proximo.algorithms.update import estimated
from proximo.core.batch import Batch
from proximo.core.masked import masked_mean
from proximo.core.policy import Policy
from proximo.errors import in_range, one_of


@dataclass(frozen=True)
class Reinforce:
    """Settings of REINFORCE, and the update that follows them: one step of Adam on the episodes that have ended.

    The return of a step is what its episode still brought, whole, minus the baseline; only at a truncation the value of
    what was cut off stands in. Steps of episodes that have not ended when the rollout does are left out.
    """

    learning_rate: float = 1e-3
    """Step size of Adam."""
    learning_rate_schedule: Schedule = "constant"
    """`linear` brings the learning rate down to 0 at the end of the run."""
    gamma: float = 0.99
    """Discount per step."""
    normalize_advantages: bool = True
    """Shift and scale the returns minus the baseline to mean 0 and standard deviation 1."""
    value_coef: float = 0.5
    """Weight of the baseline's loss (the mean squared error, without a factor 1/2)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """The gradient of all weights together is scaled down to this norm."""
    microbatch_size: int | None = None
    """Cut the rollout into pieces of so many steps to save memory; the gradient stays the same."""

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            UserError: naming the setting, its value, what is possible, and a usual value.
        """
        in_range("learning_rate", self.learning_rate, above=0.0, usual="0.001")
        one_of("learning_rate_schedule", self.learning_rate_schedule, ("constant", "linear"))
        in_range("gamma", self.gamma, at_least=0.0, at_most=1.0, usual="0.99")
        in_range("value_coef", self.value_coef, at_least=0.0, usual="0.5")
        in_range("entropy_coef", self.entropy_coef, at_least=0.0, usual="0.0 to 0.01")
        in_range("max_grad_norm", self.max_grad_norm, above=0.0, usual="0.5")
        in_range("microbatch_size", self.microbatch_size, optional=True, at_least=1, whole=True, usual="none at all")

    def at(self, remaining: float) -> Reinforce:
        """Return the settings in force when `remaining` (1 at the start, 0 at the end) of the run is left."""
        rate_factor = max(remaining, 1e-8) if self.learning_rate_schedule == "linear" else 1.0
        return replace(self, learning_rate=self.learning_rate * rate_factor)

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
        settings = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return A2C(**settings, gae_lambda=1.0).update(policy, optimizer, ended, generator)

    def _unchanged(self, policy: Policy, batch: Batch) -> dict[str, float]:
        _, quality = estimated(policy, batch, gamma=self.gamma, gae_lambda=1.0)
        with torch.no_grad():
            entropy = float(masked_mean(policy.evaluate(batch).entropy, batch.mask))
        nothing = dict.fromkeys(("policy_loss", "value_loss", "approx_kl", "approx_kl_max", "grad_norm"), 0.0)
        return nothing | {"entropy": entropy, "explained_variance": quality, "n_updates": 0.0, "kl_stopped": 0.0}


def in_ended_episodes(done: Tensor) -> Tensor:
    """Of steps `[B, T]` those at or before the last end of their row."""
    return done.flip(1).cumsum(1).flip(1) > 0
