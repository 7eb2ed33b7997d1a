"""`rollout`: whatever kind of vector environment it drives, the batch is the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.ppo import PPO
from proximo.collect.envs import VectorEnvs
from proximo.collect.native import NativeEnvs, make_native
from proximo.collect.rollout import Carry, Episodes, rollout
from proximo.collect.serial_envs import SerialEnvs
from proximo.core.advantages import gae
from proximo.core.batch import Batch
from proximo.models.control import ActorCritic, NetworkConfig
from tests.environments import Counting, Noisy, Recording, Scripted

Make = Callable[[], gym.Env]
KINDS = ["serial", AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


def environments(make: Make, kind: str | AutoresetMode, n_envs: int, seed: int = 0) -> VectorEnvs:
    if isinstance(kind, AutoresetMode):
        return NativeEnvs(SyncVectorEnv([make] * n_envs, autoreset_mode=kind), seed)
    return SerialEnvs(make, n_envs, seed)


def counting(kind: str | AutoresetMode, n_envs: int = 3) -> VectorEnvs:
    numbers = count()
    return environments(lambda: Counting(next(numbers)), kind, n_envs)


def policy_for(envs: VectorEnvs, **settings) -> ActorCritic:
    # Unlike tanh, relu tells large observations apart.
    config = NetworkConfig(hidden_sizes=(16,), activation="relu", **settings)
    return ActorCritic(envs.observation_space, envs.action_space, config, torch.Generator().manual_seed(3))


def collect(
    policy: ActorCritic, envs: VectorEnvs, lengths: list[int], gamma: float = 0.9
) -> tuple[list[Batch], list[Episodes], Carry]:
    """One rollout after the other."""
    carry = Carry.start(envs.reset())
    generator = torch.Generator().manual_seed(5)
    batches, episodes = [], []
    for length in lengths:
        batch, ended = rollout(policy, envs, carry, length, generator, gamma=gamma)
        batches.append(batch)
        episodes.append(ended)
    return batches, episodes, carry


class Row(NamedTuple):
    observation: list[float]
    reward: float
    terminated: bool
    done: bool
    value: float
    next_value: float


def valid_rows(batches: list[Batch]) -> list[list[Row]]:
    """The experience of each environment, in order, over all batches."""
    rows: list[list[Row]] = [[] for _ in range(len(batches[0].mask))]
    for batch in batches:
        for i, t in batch.mask.nonzero().tolist():
            rows[i].append(
                Row(
                    batch.observations[i, t].tolist(),
                    batch.rewards[i, t].item(),
                    batch.terminated[i, t].item(),
                    batch.done[i, t].item(),
                    batch.values[i, t].item(),
                    batch.next_values[i, t].item(),
                )
            )
    return rows


LENGTHS = [7, 1, 12, 20, 5]


@pytest.mark.parametrize("kind", KINDS)
class TestCounting:
    """An environment that counts its own steps proves that the batch is the same in every mode."""

    def test_no_step_is_missing_doubled_or_out_of_place(self, kind):
        envs = counting(kind)
        batches, _, _ = collect(policy_for(envs), envs, LENGTHS)
        for i, rows in enumerate(valid_rows(batches)):
            every = [[i, e, t] for e in range(40) for t in range(Counting.length(i, e))]
            assert [row.observation for row in rows] == every[: len(rows)]
            assert len(rows) > 30

    def test_rewards_and_ends_are_those_of_the_step(self, kind):
        envs = counting(kind)
        batches, _, _ = collect(policy_for(envs), envs, LENGTHS)
        seen = set()
        for rows in valid_rows(batches):
            for row in rows:
                i, e, t = (int(x) for x in row.observation)
                over = t + 1 == Counting.length(i, e)
                terminated, truncated = Counting.ends(i, e) if over else (False, False)
                assert row.reward == 100 * i + 10 * e + t + 1
                assert (row.terminated, row.done) == (terminated, terminated or truncated)
                seen.add((terminated, truncated))
        assert len(seen) == 4

    def test_next_values_are_the_critic_at_the_true_next_observation(self, kind):
        envs = counting(kind)
        policy = policy_for(envs)
        batches, _, _ = collect(policy, envs, LENGTHS)
        for rows in valid_rows(batches):
            here = torch.tensor([row.observation for row in rows])
            after = here + torch.tensor([0.0, 0.0, 1.0])
            assert torch.allclose(torch.tensor([row.value for row in rows]), policy.scaled_values(here), atol=1e-4)
            assert torch.allclose(
                torch.tensor([row.next_value for row in rows]), policy.scaled_values(after), atol=1e-4
            )
            # It would show: the critic tells the last observation from the one before and the one after.
            last = [k for k, row in enumerate(rows[:-1]) if row.done]
            assert all(abs(rows[k].next_value - rows[k].value) > 1e-3 for k in last)
            assert all(abs(rows[k].next_value - rows[k + 1].value) > 1e-3 for k in last)

    def test_episodes_have_the_environments_own_returns_and_lengths(self, kind):
        envs = counting(kind)
        batches, episodes, _ = collect(policy_for(envs, normalize_rewards=True), envs, LENGTHS)
        told = [pair for ended in episodes for pair in zip(ended.returns, ended.lengths, strict=True)]
        n_terminated = sum(ended.n_terminated for ended in episodes)
        expected, ended_by_itself = [], 0
        for rows in valid_rows(batches):
            for row in rows:
                i, e, _ = (int(x) for x in row.observation)
                if row.done:
                    length = Counting.length(i, e)
                    expected.append((sum(100.0 * i + 10 * e + t + 1 for t in range(length)), length))
                    ended_by_itself += Counting.ends(i, e)[0]
        assert sorted(told) == sorted(expected)
        assert n_terminated == ended_by_itself

    def test_the_carry_holds_the_open_episodes(self, kind):
        envs = counting(kind)
        batches, _, carry = collect(policy_for(envs), envs, LENGTHS, gamma=0.5)
        for i, rows in enumerate(valid_rows(batches)):
            last_end = max((k for k, row in enumerate(rows) if row.done), default=-1)
            rewards = [row.reward for row in rows[last_end + 1 :]]
            assert carry.episode_length[i] == len(rewards)
            assert carry.episode_return[i] == sum(rewards)
            assert carry.discounted_return[i] == sum(r * 0.5**k for k, r in enumerate(reversed(rewards)))


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_batch_is_the_same_in_every_mode(mode):
    reference = counting("serial")
    ours, _, _ = collect(policy_for(reference), reference, [60])
    envs = counting(mode)
    theirs, _, _ = collect(policy_for(envs), envs, [60])
    for mine, other in zip(valid_rows(ours), valid_rows(theirs), strict=True):
        n = len(other)
        assert n > 40
        # The last row but one: at the cut of the rollout the next row is not there to compare.
        for a, b in zip(mine[: n - 1], other[: n - 1], strict=True):
            assert a[:4] == b[:4]
            assert a[4:] == pytest.approx(b[4:], abs=1e-4)


class TestResetRows:
    def test_they_are_masked_and_counted_neither_as_steps_nor_in_episodes(self):
        envs = counting(AutoresetMode.NEXT_STEP)
        [batch], [episodes], _ = collect(policy_for(envs), envs, [41])
        resets = ~batch.mask
        assert batch.n_valid == 3 * 41 - int(resets.sum()) < 3 * 41
        # Each stands where the step before has ended an episode, and nowhere else.
        assert torch.equal(resets[:, 1:], batch.done[:, :-1])
        assert not resets[:, 0].any()
        assert not (batch.done | batch.terminated)[resets].any()
        assert sum(episodes.lengths) <= batch.n_valid

    def test_one_at_the_start_of_a_rollout_is_masked_too(self):
        envs = counting(AutoresetMode.NEXT_STEP, n_envs=1)
        batches, _, _ = collect(policy_for(envs), envs, [2, 3])  # the first episode has two steps
        assert batches[0].mask.tolist() == [[True, True]]
        assert batches[1].mask.tolist() == [[False, True, True]]

    def test_they_do_not_reach_the_reward_scale(self):
        scales = []
        for kind in ("serial", AutoresetMode.NEXT_STEP):
            envs = environments(lambda: Scripted(THREE), kind, 1)
            policy = policy_for(envs, normalize_rewards=True)
            # Six steps of experience; under NEXT_STEP there is a reset row between them, and one after.
            collect(policy, envs, [6] if kind == "serial" else [8])
            scales.append((policy.reward_scale, float(policy.return_count)))
        assert scales[0] == scales[1]


THREE = [(1.0, False, False), (2.0, False, False), (3.0, True, False)]


class TestRewardScale:
    """Rewards 1, 2, 3, end, at gamma 1/2: discounted returns 1, 2 1/2, 4 1/4, and again."""

    # Of 1, 2.5, 4.25: the mean is 31/12, the population variance 127/72.
    SCALE = (127 / 72) ** 0.5

    @pytest.mark.parametrize("lengths", [[6], [2, 4], [1, 1, 1, 3]])
    def test_it_uses_the_runs_gamma_and_forgets_with_the_episode(self, lengths):
        envs = SerialEnvs(lambda: Scripted(THREE), 1, 0)
        policy = policy_for(envs, normalize_rewards=True)
        collect(policy, envs, lengths, gamma=0.5)
        assert policy.reward_scale == pytest.approx(self.SCALE, rel=1e-6)
        assert float(policy.return_mean) == pytest.approx(31 / 12)

    def test_another_gamma_gives_another_scale(self):
        envs = SerialEnvs(lambda: Scripted(THREE), 1, 0)
        policy = policy_for(envs, normalize_rewards=True)
        collect(policy, envs, [6], gamma=1.0)
        # Of 1, 3, 6: variance 38/9.
        assert policy.reward_scale == pytest.approx((38 / 9) ** 0.5, rel=1e-6)

    @pytest.mark.parametrize("end", [(True, False), (False, True), (True, True)])
    def test_every_kind_of_end_is_one(self, end):
        envs = SerialEnvs(lambda: Scripted([*THREE[:2], (3.0, *end)]), 1, 0)
        policy = policy_for(envs, normalize_rewards=True)
        collect(policy, envs, [6], gamma=0.5)
        assert policy.reward_scale == pytest.approx(self.SCALE, rel=1e-6)

    def test_the_batch_is_scaled_and_the_episodes_are_not(self):
        envs = SerialEnvs(lambda: Scripted(THREE), 1, 0)
        [batch], [episodes], _ = collect(policy_for(envs, normalize_rewards=True), envs, [6], gamma=0.5)
        scaled = [[reward / self.SCALE for reward in (1.0, 2.0, 3.0, 1.0, 2.0, 3.0)]]
        assert torch.allclose(batch.rewards, torch.tensor(scaled))
        assert episodes.returns == [6.0, 6.0]

    def test_rewards_are_clipped_after_scaling(self):
        envs = SerialEnvs(lambda: Scripted(THREE), 1, 0)
        policy = policy_for(envs, normalize_rewards=True, clip_reward=1.6)
        [batch], _, _ = collect(policy, envs, [3], gamma=0.5)
        assert torch.allclose(batch.rewards, torch.tensor([[1 / self.SCALE, 2 / self.SCALE, 1.6]]))

    def test_without_it_rewards_stay_what_they_are(self):
        envs = SerialEnvs(lambda: Scripted([(1e6, False, False), (-1e-3, True, False)]), 1, 0)
        policy = policy_for(envs)
        [batch], _, _ = collect(policy, envs, [2])
        assert torch.equal(batch.rewards, torch.tensor([[1e6, -1e-3]]))
        assert policy.reward_scale == 1.0


class TestActions:
    def test_the_sampled_action_is_stored_and_the_clipped_one_acts(self):
        made: list[Recording] = []
        space = spaces.Box(np.array([-0.5, -3], np.float32), np.array([2.0, np.inf], np.float32))
        envs = SerialEnvs(lambda: Recording(space, log=made), 2, 0)
        policy = policy_for(envs, log_std_init=1.0)
        [batch], _, _ = collect(policy, envs, [50])
        received = torch.from_numpy(np.array([env.actions for env in made]))
        # The first dimension is bounded: -1 and 1 are its bounds. The second has no upper bound: as it is.
        assert torch.allclose(received[..., 0], (batch.actions[..., 0] * 1.25 + 0.75).clamp(-0.5, 2.0), atol=1e-6)
        assert torch.equal(received[..., 1], batch.actions[..., 1].clamp(min=-3.0))
        assert (batch.actions.abs() > 1).float().mean() > 0.5
        assert all(action.dtype == np.float32 and space.contains(action) for env in made for action in env.actions)

    def test_log_probs_are_of_the_stored_action(self):
        envs = SerialEnvs(lambda: Recording(spaces.Box(-0.1, 0.1, (2,), np.float32)), 2, 0)
        policy = policy_for(envs, log_std_init=0.5)
        [batch], _, _ = collect(policy, envs, [30])
        again = policy.evaluate(batch)
        assert torch.allclose(again.log_probs, batch.log_probs, atol=1e-5)
        assert torch.allclose(again.values, batch.values, atol=1e-6)

    def test_discrete_actions_are_stored_from_zero_and_act_from_the_spaces_start(self):
        made: list[Recording] = []
        envs = SerialEnvs(lambda: Recording(spaces.Discrete(3, start=5), log=made), 2, 0)
        [batch], _, _ = collect(policy_for(envs), envs, [40])
        assert set(batch.actions.flatten().tolist()) == {0, 1, 2}
        received = torch.tensor(np.array([env.actions for env in made]))
        assert torch.equal(received, batch.actions + 5)

    def test_the_generator_alone_decides(self):
        envs = [SerialEnvs(Noisy, 2, seed=1) for _ in range(2)]
        torch.manual_seed(1)
        [one], _, _ = collect(policy_for(envs[0]), envs[0], [30])
        torch.manual_seed(2)
        [two], _, _ = collect(policy_for(envs[1]), envs[1], [30])
        assert torch.equal(one.actions, two.actions)
        assert torch.equal(one.rewards, two.rewards)


class TestNormalizer:
    def test_it_does_not_change_while_collecting(self):
        envs = SerialEnvs(Noisy, 2, seed=1)
        policy = policy_for(envs, normalize_observations=True)
        policy.update_observation_moments(torch.randn(100, 3) * 5)
        before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        [batch], _, _ = collect(policy, envs, [30])
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
        assert torch.allclose(policy.evaluate(batch).log_probs, batch.log_probs, atol=1e-5)

    def test_the_batch_holds_raw_observations(self):
        envs = counting("serial")
        policy = policy_for(envs, normalize_observations=True)
        policy.update_observation_moments(torch.rand(100, 3) * 50)
        [batch], _, _ = collect(policy, envs, [5])
        assert batch.observations[0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 1, 2]]

    def test_final_observations_are_normalized_as_all_others(self):
        envs = counting("serial")
        policy = policy_for(envs, normalize_observations=True)
        policy.update_observation_moments(torch.rand(100, 3) * 50)
        [batch], _, _ = collect(policy, envs, [25])
        after = batch.observations[batch.done] + torch.tensor([0.0, 0.0, 1.0])
        assert torch.allclose(batch.next_values[batch.done], policy.scaled_values(after), atol=1e-4)


def advantages_of(batch: Batch, **settings) -> torch.Tensor:
    return gae(batch.rewards, batch.values, batch.next_values, batch.terminated, batch.done, batch.mask, **settings)


class TestEnds:
    """What an end does to advantages: batch and GAE together."""

    @staticmethod
    def advantages(kind: str | AutoresetMode, end: tuple[bool, bool], *, after: float = 0.0, final: float = 0.5):
        """Of the steps 0, 1 and 2, the last of which ends the episode, before rewards of `after`."""
        script = [(1.0, False, False), (1.0, False, False), (1.0, *end), *[(after, False, False)] * 3]
        envs = environments(lambda: Scripted(script, final), kind, 1)
        [batch], _, _ = collect(policy_for(envs), envs, [6])
        return advantages_of(batch, gamma=0.9, gae_lambda=0.8)[0, :3]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("end", [(True, False), (False, True), (True, True)])
    def test_nothing_of_the_next_episode_leaks_back(self, kind, end):
        poor, rich = (self.advantages(kind, end, after=after) for after in (0.0, 1e6))
        assert torch.equal(poor, rich)

    def test_without_an_end_it_does_reach_back(self):
        poor, rich = (self.advantages("serial", (False, False), after=after) for after in (0.0, 1e6))
        assert ((rich - poor) > 1e4).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_truncation_goes_on_with_the_value_of_the_final_observation(self, kind):
        near, far = (self.advantages(kind, (False, True), final=final) for final in (0.5, 40.0))
        assert (near != far).all()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("end", [(True, False), (True, True)])
    def test_termination_does_not_and_an_episode_that_is_both_is_terminated(self, kind, end):
        near, far = (self.advantages(kind, end, final=final) for final in (0.5, 40.0))
        assert torch.equal(near, far)
        assert torch.equal(near, self.advantages(kind, (True, False)))

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_mode_gives_the_same(self, kind):
        for end in [(True, False), (False, True), (True, True)]:
            assert torch.allclose(self.advantages(kind, end), self.advantages("serial", end), atol=1e-6)


class TestCartPoleVectorEnv:
    """Gymnasium's own: it resets in the next step."""

    def test_rows_are_transitions_and_resets_are_masked(self):
        envs = NativeEnvs(make_native("CartPole-v1", 4, {"max_episode_steps": 25}), seed=2)
        policy = policy_for(envs)
        [batch], [episodes], _ = collect(policy, envs, [150])
        plain = gym.make("CartPole-v1").unwrapped
        plain.reset()
        finals = []
        for i, t in batch.mask.nonzero().tolist():
            plain.state = batch.observations[i, t].numpy()
            plain.steps_beyond_terminated = None
            expected, reward, terminated, _, _ = plain.step(int(batch.actions[i, t]))
            finals.append(torch.from_numpy(expected))
            assert (batch.rewards[i, t], batch.terminated[i, t]) == (reward, terminated)
            if t + 1 < 150:
                assert torch.allclose(batch.observations[i, t + 1], finals[-1], atol=1e-6)
        assert torch.allclose(batch.next_values[batch.mask], policy.scaled_values(torch.stack(finals)), atol=1e-5)
        assert batch.n_valid + len(episodes.returns) == pytest.approx(4 * 150, abs=4)
        assert episodes.returns == [float(length) for length in episodes.lengths]
        assert max(episodes.lengths) == 25

    def test_it_can_be_learned_from(self):
        envs = NativeEnvs(make_native("CartPole-v1", 4, {}), seed=2)
        policy = policy_for(envs)
        [batch], _, _ = collect(policy, envs, [60])
        optimizer = FlatAdam(policy, learning_rate=1e-3)
        metrics = PPO(n_epochs=1).update(policy, optimizer, batch, torch.Generator().manual_seed(0))
        assert metrics["n_updates"] == round(batch.n_valid / 64)


@pytest.mark.parametrize("kind", KINDS)
def test_episodes_are_told_in_order_of_time(kind):
    envs = counting(kind)
    [batch], [episodes], _ = collect(policy_for(envs), envs, [60])
    ends = sorted((t, i) for i, t in batch.done.nonzero().tolist())
    assert episodes.lengths == [int(batch.observations[i, t, 2]) + 1 for t, i in ends]
