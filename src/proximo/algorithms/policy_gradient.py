"""One step along the policy gradient per rollout: what A2C and REINFORCE share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from proximo.algorithms.adam import Optimizer
from proximo.algorithms.ppo import Schedule
from proximo.algorithms.update import Epochs, Loss, Minibatch, estimated, run_epochs
from proximo.core.batch import Batch
from proximo.core.kl import k3
from proximo.core.losses import policy_gradient, value_loss
from proximo.core.masked import masked_mean
from proximo.core.policy import Policy
from proximo.errors import in_range, one_of


@dataclass(frozen=True)
class PolicyGradient:
    """Settings of a single step of Adam on each rollout, and that step."""

    learning_rate: float = 7e-4
    """Step size of Adam."""
    learning_rate_schedule: Schedule = "constant"
    """`linear` brings the learning rate down to 0 at the end of the run."""
    gamma: float = 0.99
    """Discount per step."""
    normalize_advantages: bool = False
    """Shift and scale the advantages of the rollout to mean 0 and standard deviation 1."""
    value_coef: float = 0.5
    """Weight of the value loss (the mean squared error, without a factor 1/2)."""
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
        in_range("learning_rate", self.learning_rate, above=0.0, usual="0.0007")
        one_of("learning_rate_schedule", self.learning_rate_schedule, ("constant", "linear"))
        in_range("gamma", self.gamma, at_least=0.0, at_most=1.0, usual="0.99")
        in_range("value_coef", self.value_coef, at_least=0.0, usual="0.5")
        in_range("entropy_coef", self.entropy_coef, at_least=0.0, usual="0.0 to 0.01")
        in_range("max_grad_norm", self.max_grad_norm, above=0.0, usual="0.5")
        in_range("microbatch_size", self.microbatch_size, optional=True, at_least=1, whole=True, usual="none at all")

    def at(self, remaining: float) -> Any:
        """Return the settings in force when `remaining` (1 at the start, 0 at the end) of the run is left."""
        rate_factor = max(remaining, 1e-8) if self.learning_rate_schedule == "linear" else 1.0
        return replace(self, learning_rate=self.learning_rate * rate_factor)

    def step(
        self, policy: Policy, optimizer: Optimizer, batch: Batch, generator: torch.Generator, *, gae_lambda: float
    ) -> dict[str, float]:
        """Improve `policy` in place on one rollout; return metrics by their names.

        Raises:
            NonFiniteUpdateError: if the loss or gradient is not finite; the weights stay finite.
        """
        optimizer.learning_rate = self.learning_rate
        everything, quality = estimated(policy, batch, gamma=self.gamma, gae_lambda=gae_lambda)
        whole = Epochs(
            n_epochs=1,
            batch_size=everything.batch.mask.numel(),
            normalize_advantages=self.normalize_advantages,
            max_grad_norm=self.max_grad_norm,
            microbatch_size=self.microbatch_size,
        )
        metrics = run_epochs(policy, optimizer, everything, self._loss, whole, generator)
        return metrics | quality

    def _loss(self, policy: Policy, minibatch: Minibatch) -> Loss:
        """Policy gradient + value_coef * value loss - entropy_coef * entropy (Mnih et al. 2016, section 4)."""
        batch, denominator = minibatch.batch, minibatch.denominator
        new = policy.evaluate(batch)
        assert new.values is not None
        assert minibatch.returns is not None
        policy_loss = policy_gradient(new.log_probs, minibatch.advantages, batch.mask, denominator=denominator)
        critic_loss = value_loss(new.values, minibatch.returns, batch.mask, denominator=denominator)
        entropy = masked_mean(new.entropy, batch.mask, denominator=denominator)
        total = policy_loss + self.value_coef * critic_loss - self.entropy_coef * entropy
        with torch.no_grad():
            approx_kl = masked_mean(k3(batch.log_probs, new.log_probs), batch.mask, denominator=denominator)
        metrics = {"policy_loss": policy_loss, "value_loss": critic_loss, "entropy": entropy}
        return Loss(total, approx_kl, metrics)
