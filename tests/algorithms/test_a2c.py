"""A2C and REINFORCE: the plain policy gradient, by hand and as the special case of PPO that it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from proximo.algorithms.a2c import A2C
from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.ppo import PPO
from proximo.algorithms.reinforce import Reinforce, in_ended_episodes
from proximo.core.losses import policy_gradient
from proximo.errors import UserError


def updated(algorithm, policy, batch) -> dict[str, float]:
    return algorithm.update(policy, FlatAdam(policy, learning_rate=0.0), batch, torch.Generator().manual_seed(0))


def test_the_loss_by_hand():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    loss = policy_gradient(log_probs, torch.tensor([[2.0, -1.0, 9.0]]), torch.tensor([[True, True, False]]))
    assert loss.item() == pytest.approx(-(-2.0 + 2.0) / 2)
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[-1.0, 0.5, 0.0]]


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_one_step_on_everything_is_ppo_with_one_epoch(tiny_policy, make_batch, kind: str):
    """Huang et al. 2022: where nothing has moved yet there is nothing to clip."""
    settings = dict(learning_rate=0.01, gamma=0.97, gae_lambda=0.9, entropy_coef=0.02, normalize_advantages=True)
    one, other = tiny_policy(kind), tiny_policy(kind)
    batch = make_batch(one)
    a2c = updated(A2C(**settings), one, batch)
    ppo = updated(PPO(**settings, n_epochs=1, batch_size=10**6, update_path="eager"), other, batch)
    torch.testing.assert_close(one.flat(), other.flat(), rtol=1e-12, atol=1e-14)
    assert a2c["grad_norm"] == pytest.approx(ppo["grad_norm"])
    assert a2c["value_loss"] == pytest.approx(ppo["value_loss"])


def test_microbatches_change_nothing(tiny_policy, make_batch):
    one, other = tiny_policy(), tiny_policy()
    batch = make_batch(one)
    updated(A2C(), one, batch)
    updated(A2C(microbatch_size=7), other, batch)
    torch.testing.assert_close(one.flat(), other.flat(), rtol=1e-10, atol=1e-12)


class TestReinforce:
    def test_which_steps_belong_to_an_episode_that_has_ended(self):
        done = torch.tensor([[False, True, False, False], [False, False, False, False], [True, False, False, True]])
        assert in_ended_episodes(done).tolist() == [[True, True, False, False], [False] * 4, [True] * 4]

    def test_what_comes_after_the_last_end_counts_for_nothing(self, tiny_policy, make_batch):
        one, other = tiny_policy(), tiny_policy()
        batch = make_batch(one)
        open_steps = ~in_ended_episodes(batch.done & batch.mask)
        assert open_steps.any()
        changed = torch.where(open_steps, 100.0, batch.rewards)
        updated(Reinforce(), one, batch)
        updated(Reinforce(), other, replace(batch, rewards=changed))
        assert torch.equal(one.flat(), other.flat())

    def test_returns_are_whole_and_owe_nothing_to_the_critic_but_the_baseline(self, tiny_policy, make_batch):
        """What the critic says of the state after a termination changes nothing."""
        one, other = tiny_policy(), tiny_policy()
        batch = make_batch(one, masked=0.0)
        ends = torch.zeros_like(batch.done)
        ends[:, 7::8] = True
        batch = replace(batch, terminated=ends, done=ends)
        updated(Reinforce(normalize_advantages=False), one, batch)
        updated(
            Reinforce(normalize_advantages=False), other, replace(batch, next_values=batch.next_values + 5.0 * ends)
        )
        assert torch.equal(one.flat(), other.flat())

    def test_without_an_end_nothing_is_learned(self, tiny_policy, make_batch):
        policy = tiny_policy()
        batch = make_batch(policy)
        none = torch.zeros_like(batch.done)
        before = policy.flat()
        metrics = updated(Reinforce(), policy, replace(batch, terminated=none, done=none))
        assert metrics["n_updates"] == 0
        assert torch.equal(policy.flat(), before)


@pytest.mark.parametrize("kind", [A2C, Reinforce])
@pytest.mark.parametrize(("setting", "value"), [("learning_rate", 0.0), ("gamma", 1.1), ("max_grad_norm", 0.0)])
def test_impossible_settings_are_refused(kind, setting: str, value: float):
    with pytest.raises(UserError, match=setting):
        kind(**{setting: value})
