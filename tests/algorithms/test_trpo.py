"""TRPO: the natural gradient against oracles, and a constraint that holds at every step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.algorithms.trpo import TRPO, conjugate_gradient, fisher_vector_product
from proximo.algorithms.update import estimated
from proximo.core.masked import masked_mean, whiten
from proximo.errors import UserError


def updated(policy, batch, **settings) -> dict[str, float]:
    optimizer = FlatAdam(policy, learning_rate=0.0)
    return TRPO(**({"batch_size": 16, "n_epochs": 2} | settings)).update(
        policy, optimizer, batch, torch.Generator().manual_seed(0)
    )


def flat(gradients, weights) -> Tensor:
    pairs = zip(gradients, weights, strict=True)
    return torch.cat([(torch.zeros_like(weight) if one is None else one).flatten() for one, weight in pairs])


def kl_since(policy, batch, old) -> float:
    with torch.no_grad():
        return float(masked_mean(old.kl(policy.evaluate(batch).distribution), batch.mask))


def distribution_now(policy, batch):
    with torch.no_grad():
        return policy.evaluate(batch).distribution.frozen()


class TestConjugateGradient:
    @pytest.mark.parametrize("n", [1, 5, 20])
    def test_solves_what_a_direct_method_solves(self, n: int):
        generator = torch.Generator().manual_seed(n)
        root = torch.randn(n, n, generator=generator, dtype=torch.float64)
        matrix = root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64)
        wanted = torch.randn(n, generator=generator, dtype=torch.float64)
        found = conjugate_gradient(lambda x: matrix @ x, wanted, 3 * n)
        torch.testing.assert_close(found, torch.linalg.solve(matrix, wanted), rtol=1e-4, atol=1e-6)

    def test_by_hand(self):
        # One step of diag(1, 3) x = (1, 1): |b|^2 / b'Ab = 2 / 4
        diagonal = torch.tensor([1.0, 3.0])
        assert conjugate_gradient(lambda x: diagonal * x, torch.ones(2), 1).tolist() == [0.5, 0.5]
        assert conjugate_gradient(lambda x: diagonal * x, torch.ones(2), 2).tolist() == pytest.approx([1.0, 1 / 3])

    def test_nothing_wanted_is_nothing(self):
        assert conjugate_gradient(lambda x: x, torch.zeros(3), 10).tolist() == [0.0, 0.0, 0.0]


def test_the_product_is_that_of_the_fisher_matrix(tiny_policy, make_batch):
    """Mean over steps of `sum_a p(a) grad log p(a) grad log p(a)'`, every action counted."""
    policy = tiny_policy("discrete")
    batch = make_batch(policy, 2, 5)
    weights = policy.policy_weights()

    def flat_gradient(value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(found, weights, strict=True)]
        )

    log_p = policy.evaluate(batch).distribution.log_probabilities
    fisher = sum(
        float(log_p[place][action].exp()) * torch.outer(slope, slope)
        for place in (tuple(index) for index in batch.mask.nonzero().tolist())
        for action in range(log_p.shape[-1])
        for slope in [flat_gradient(log_p[place][action])]
    ) / int(batch.mask.sum())
    product = fisher_vector_product(policy, batch, distribution_now(policy, batch), weights, 0.3)
    for seed in range(3):
        vector = torch.randn(len(fisher), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        torch.testing.assert_close(product(vector), fisher @ vector + 0.3 * vector, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
@pytest.mark.parametrize("max_kl", [1e-4, 0.01, 0.5])
def test_the_constraint_holds_at_every_step(tiny_policy, make_batch, kind: str, max_kl: float):
    policy = tiny_policy(kind)
    n_taken = 0
    for seed in range(10):
        batch = make_batch(policy, 4, 16, seed=seed)
        old = distribution_now(policy, batch)
        metrics = updated(policy, batch, max_kl=max_kl)
        kl = kl_since(policy, batch, old)  # after the critic has learned, too, which shares layers with the actor
        assert kl <= max_kl
        assert kl == pytest.approx(metrics["kl_old_new"], abs=1e-12)
        n_taken += metrics["line_search_steps_taken"] > 0
    assert n_taken >= 8


def test_a_small_step_goes_as_far_as_it_may(tiny_policy, make_batch):
    """To second order the first length has exactly the KL that is allowed (without damping)."""
    for kind in ("discrete", "continuous"):
        policy = tiny_policy(kind)
        metrics = updated(
            policy,
            make_batch(policy),
            max_kl=1e-8,
            conjugate_gradient_damping=0.0,
            conjugate_gradient_steps=40,
            line_search_factor=0.99,
        )
        assert metrics["kl_old_new"] == pytest.approx(1e-8, rel=0.03)


def test_it_is_the_natural_gradient(tiny_policy, make_batch):
    """For a small step: the solution of F x = g, scaled to the constraint."""
    policy = tiny_policy("continuous")
    batch = make_batch(policy)
    weights = policy.policy_weights()
    product = fisher_vector_product(policy, batch, distribution_now(policy, batch), weights, 0.1)
    size = sum(w.numel() for w in weights)
    matrix = torch.stack([product(column) for column in torch.eye(size, dtype=torch.float64)])
    before = torch.cat([w.detach().flatten() for w in weights]).clone()
    algorithm = TRPO(max_kl=1e-8, conjugate_gradient_steps=200, gae_lambda=0.9)
    everything, _ = estimated(policy, batch, gamma=0.99, gae_lambda=0.9)
    advantages = whiten(everything.advantages, everything.batch.mask)
    new = policy.evaluate(everything.batch)
    slope = torch.autograd.grad(
        masked_mean(new.log_probs * advantages, everything.batch.mask), weights, allow_unused=True
    )
    g = torch.cat([(torch.zeros_like(w) if s is None else s).flatten() for s, w in zip(slope, weights, strict=True)])
    direction = torch.linalg.solve(matrix, g)
    algorithm.update(policy, FlatAdam(policy, learning_rate=0.0), batch, torch.Generator().manual_seed(0))
    moved = torch.cat([w.detach().flatten() for w in policy.policy_weights()]) - before
    assert float(torch.cosine_similarity(moved, direction, dim=0)) > 0.999


def test_the_objective_gets_better_and_the_critic_nearer(tiny_policy, make_batch):
    policy = tiny_policy("discrete")
    batch = make_batch(policy)
    first = updated(policy, batch, learning_rate=1e-2, n_epochs=20)
    assert first["policy_loss"] < 0  # with whitened advantages it is 0 before
    again = updated(policy, batch, learning_rate=1e-2, n_epochs=20)
    assert again["value_loss"] < first["value_loss"]


def test_without_advantages_the_policy_stays_where_it_is(tiny_policy, make_batch):
    policy = tiny_policy("discrete")
    batch = make_batch(policy)
    level = replace(batch, rewards=torch.zeros_like(batch.rewards), values=torch.zeros_like(batch.rewards))
    level = replace(level, next_values=torch.zeros_like(batch.rewards))
    before = [weight.clone() for weight in policy.policy_weights()]
    metrics = updated(policy, level)
    assert metrics["line_search_steps_taken"] == 0
    assert metrics["kl_old_new"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, policy.policy_weights(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_never_reaches_the_weights(tiny_policy, make_batch, value: float):
    policy = tiny_policy("continuous")
    batch = make_batch(policy)
    rewards = batch.rewards.clone()
    rewards[batch.mask.nonzero()[0][0], batch.mask.nonzero()[0][1]] = value
    before = policy.flat()
    with pytest.raises(NonFiniteUpdateError):
        updated(policy, replace(batch, rewards=rewards))
    assert torch.equal(policy.flat(), before)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_kl", 0.0), ("conjugate_gradient_steps", 0), ("line_search_factor", 1.0), ("learning_rate", -1.0)],
)
def test_impossible_settings_are_refused(setting: str, value: float):
    with pytest.raises(UserError, match=setting):
        TRPO(**{setting: value})
