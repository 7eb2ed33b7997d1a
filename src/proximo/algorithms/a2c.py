"""Advantage actor-critic (Mnih et al. 2016), all environments in step: one gradient per rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proximo.algorithms.adam import Optimizer
from proximo.algorithms.policy_gradient import PolicyGradient
from proximo.core.batch import Batch
from proximo.core.policy import Policy
from proximo.errors import in_range


@dataclass(frozen=True)
class A2C(PolicyGradient):
    """Settings of A2C, and the update that follows them: one step of Adam on each rollout."""

    gae_lambda: float = 1.0
    """Bias against variance of the advantages: 1 is the discounted return to the rollout's end, and then the value."""

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            UserError: naming the setting, its value, what is possible, and a usual value.
        """
        super().__post_init__()
        in_range("gae_lambda", self.gae_lambda, at_least=0.0, at_most=1.0, usual="1.0")

    def update(
        self, policy: Policy, optimizer: Optimizer, batch: Batch, generator: torch.Generator
    ) -> dict[str, float]:
        """Improve `policy` in place on one rollout; return metrics by their names.

        Raises:
            NonFiniteUpdateError: if the loss or gradient is not finite; the weights stay finite.
        """
        return self.step(policy, optimizer, batch, generator, gae_lambda=self.gae_lambda)
