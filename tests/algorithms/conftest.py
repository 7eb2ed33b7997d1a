"""A policy small enough to see through, and batches for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from proximo.core.policy import Evaluation
from proximo.core.batch import Batch
from proximo.core.distributions import Categorical, DiagonalGaussian

N_OBSERVED, N_ACTIONS, N_DIMENSIONS = 3, 4, 2


class TinyPolicy(nn.Module):
    """Three observed numbers, five shared hidden units, a categorical or Gaussian head and a critic."""

    def __init__(self, kind: str = "discrete", seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        n_outputs = N_ACTIONS if kind == "discrete" else N_DIMENSIONS
        self.body = nn.Linear(N_OBSERVED, 5, dtype=dtype)
        self.actor = nn.Linear(5, n_outputs, dtype=dtype)
        self.critic = nn.Linear(5, 1, dtype=dtype)
        self.log_std = None if kind == "discrete" else nn.Parameter(torch.zeros(n_outputs, dtype=dtype))
        self.n_evaluations = 0
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.5, generator=generator)

    def heads(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of the distribution, and values."""
        hidden = self.body(observations).tanh()
        return self.actor(hidden), self.critic(hidden).squeeze(-1)

    def evaluate(self, batch: Batch) -> Evaluation:
        self.n_evaluations += 1
        outputs, values = self.heads(batch.observations)
        distribution = Categorical(outputs) if self.log_std is None else DiagonalGaussian(outputs, self.log_std)
        return Evaluation(distribution.log_prob(batch.actions), distribution.entropy(), values, distribution)

    def flat(self) -> Tensor:
        """A copy of all parameters in one vector."""
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters()])


def _make_batch(policy: TinyPolicy, n_envs: int = 4, n_steps: int = 16, *, seed: int = 0, masked: float = 0.2) -> Batch:
    """Random experience that `policy` collected just now: every ratio is 1."""
    generator = torch.Generator().manual_seed(seed)
    dtype = policy.critic.weight.dtype
    shape = (n_envs, n_steps)

    def normal(*more: int) -> Tensor:
        return torch.randn(*shape, *more, generator=generator, dtype=dtype)

    def share(probability: float) -> Tensor:
        return torch.rand(shape, generator=generator) < probability

    observations = normal(N_OBSERVED)
    with torch.no_grad():
        outputs, values = policy.heads(observations)
        acting = Categorical(outputs) if policy.log_std is None else DiagonalGaussian(outputs, policy.log_std)
        actions = acting.sample(generator)
        log_probs = acting.log_prob(actions)
    terminated = share(0.1)
    mask = ~share(masked)
    mask[0, 0] = True
    return Batch(
        observations=observations,
        actions=actions,
        mask=mask,
        rewards=normal(),
        log_probs=log_probs,
        values=values,
        next_values=normal(),
        terminated=terminated,
        done=terminated | share(0.1),
    )


@pytest.fixture(scope="session")
def tiny_policy():
    """`tiny_policy(kind, seed, dtype)` makes a policy."""
    return TinyPolicy


@pytest.fixture(scope="session")
def make_batch():
    """`make_batch(policy, n_envs, n_steps, seed=, masked=)` makes what it would have collected."""
    return _make_batch
