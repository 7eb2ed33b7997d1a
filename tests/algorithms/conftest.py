"""A policy small enough to see through, and batches for it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from proximo.core.batch import Batch
from proximo.core.distributions import Categorical, DiagonalGaussian
from proximo.core.policy import Evaluation, PlainActorCritic

N_OBSERVED, N_ACTIONS, N_DIMENSIONS = 3, 4, 2


class _Policy(nn.Module):
    """What the policies here share; `heads` gives the parameters of the distribution and the values."""

    def __init__(self, kind: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.n_outputs = N_ACTIONS if kind == "discrete" else N_DIMENSIONS
        self.log_std = None if kind == "discrete" else nn.Parameter(torch.zeros(N_DIMENSIONS, dtype=dtype))
        self.dtype, self.seed = dtype, seed
        self.n_evaluations = 0

    def _draw_weights(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.5, generator=generator)

    def heads(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def distribution(self, outputs: Tensor) -> Categorical | DiagonalGaussian:
        return Categorical(outputs) if self.log_std is None else DiagonalGaussian(outputs, self.log_std)

    def evaluate(self, batch: Batch) -> Evaluation:
        self.n_evaluations += 1
        outputs, values = self.heads(batch.observations)
        distribution = self.distribution(outputs)
        return Evaluation(distribution.log_prob(batch.actions), distribution.entropy(), values, distribution)

    def critic_weights(self) -> list[Tensor]:
        return list(self.critic.parameters())

    def policy_weights(self) -> list[Tensor]:
        critic = {id(weight) for weight in self.critic_weights()}
        return [weight for weight in self.parameters() if id(weight) not in critic]

    def flat(self) -> Tensor:
        """A copy of all parameters in one vector."""
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters()])


class TinyPolicy(_Policy):
    """Three observed numbers, five hidden units that actor and critic share: no plain actor-critic."""

    def __init__(self, kind: str = "discrete", seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(kind, seed, dtype)
        self.body = nn.Linear(N_OBSERVED, 5, dtype=dtype)
        self.actor = nn.Linear(5, self.n_outputs, dtype=dtype)
        self.critic = nn.Linear(5, 1, dtype=dtype)
        self._draw_weights()

    def heads(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(observations).tanh()
        return self.actor(hidden), self.critic(hidden).squeeze(-1)

    has_memory = False

    def plain(self, batch: Batch) -> None:
        return None


class PlainPolicy(_Policy):
    """Separate perceptrons of unequal depth, which see twice the observations."""

    def __init__(
        self, kind: str = "discrete", seed: int = 0, dtype: torch.dtype = torch.float64, activation: str = "tanh"
    ) -> None:
        super().__init__(kind, seed, dtype)
        self.activation = activation

        def perceptron(*sizes: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(a, b, dtype=dtype) for a, b in itertools.pairwise(sizes))

        self.actor = perceptron(N_OBSERVED, 6, 4, self.n_outputs)
        self.critic = perceptron(N_OBSERVED, 5, 1)
        self._draw_weights()

    def heads(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        outputs, values = (self._through(network, 2 * observations) for network in (self.actor, self.critic))
        return outputs, values.squeeze(-1)

    def _through(self, network: nn.ModuleList, x: Tensor) -> Tensor:
        for layer in network[:-1]:
            x = layer(x).tanh() if self.activation == "tanh" else layer(x).relu()
        return network[-1](x)

    has_memory = False

    def plain(self, batch: Batch) -> PlainActorCritic:
        actor, critic = ([(layer.weight, layer.bias) for layer in network] for network in (self.actor, self.critic))
        return PlainActorCritic(2 * batch.observations.flatten(0, 1), actor, critic, self.log_std, self.activation)


def _make_batch(policy: _Policy, n_envs: int = 4, n_steps: int = 16, *, seed: int = 0, masked: float = 0.2) -> Batch:
    """Random experience that `policy` collected just now: every ratio is 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_envs, n_steps)

    def normal(*more: int) -> Tensor:
        return torch.randn(*shape, *more, generator=generator, dtype=policy.dtype)

    def share(probability: float) -> Tensor:
        return torch.rand(shape, generator=generator) < probability

    observations = normal(N_OBSERVED)
    with torch.no_grad():
        outputs, values = policy.heads(observations)
        acting = policy.distribution(outputs)
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
def plain_policy():
    """`plain_policy(kind, seed, dtype, activation)` makes a policy that lays its networks open."""
    return PlainPolicy


@pytest.fixture(scope="session")
def make_batch():
    """`make_batch(policy, n_envs, n_steps, seed=, masked=)` makes what it would have collected."""
    return _make_batch
