"""Parallel environments of several agents as rows: who lives, whose end it is, and what must not be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

pytest.importorskip("pettingzoo")
from pettingzoo.test import parallel_api_test

from proximo.collect.agents_rollout import rollout_agents
from proximo.collect.parallel_envs import ParallelEnvs, grouped
from proximo.collect.rollout import Carry, Clock
from proximo.core.advantages import gae
from proximo.errors import UserError
from proximo.models.agents import CentralActorCritic
from proximo.models.control import ActorCritic, NetworkConfig
from tests.several import Differ, Kinds, Luck, Mortal, Random


def zeros(envs: ParallelEnvs) -> dict[str, np.ndarray]:
    return {name: np.zeros(envs.n_envs * len(group.agents), np.int64) for name, group in envs.groups.items()}


def steps_of(envs: ParallelEnvs, n: int) -> list[dict[str, np.ndarray]]:
    """What the only group gets in each of `n` steps."""
    found = []
    for _ in range(n):
        (step,) = envs.step(zeros(envs)).values()
        found.append({name: np.array(value) for name, value in step._asdict().items()})
    return found


@pytest.mark.parametrize("env", [Mortal, Random, Differ, Luck, Kinds])
def test_these_environments_are_as_pettingzoo_has_them(env, capsys):
    if env is not Differ:  # which returns no infos
        parallel_api_test(env(), num_cycles=60)


class TestRows:
    def test_who_has_ended_is_masked_until_the_environment_is_reset(self):
        envs = ParallelEnvs(Mortal, 1, 0, agent_id=False)
        envs.reset()
        steps = steps_of(envs, 6)
        valid = np.array([step["valid"] for step in steps])
        assert valid.T.tolist() == [
            [True, True, False, False, False, True],
            [True, True, True, False, False, True],
            [True, True, True, True, True, True],
        ]
        terminated, truncated = (np.array([step[name] for step in steps]).T for name in ("terminated", "truncated"))
        assert np.argwhere(terminated).tolist() == [[0, 1], [2, 4]]
        assert np.argwhere(truncated).tolist() == [[1, 2], [2, 4]]

    def test_every_number_is_its_own_agents(self):
        envs = ParallelEnvs(Mortal, 2, 0, agent_id=False)
        first = envs.reset()["shared"]
        assert first.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]] * 2
        steps = steps_of(envs, 5)
        assert steps[1]["rewards"].tolist() == [2.0, 102.0, 202.0] * 2
        assert steps[1]["final_observations"].tolist() == [[0, 2, 0], [1, 2, 0], [2, 2, 0]] * 2
        assert steps[3]["rewards"].tolist() == [0.0, 0.0, 204.0] * 2
        assert steps[4]["final_observations"][2].tolist() == [2, 5, 0]
        assert steps[4]["observations"].tolist() == [[0, 0, 1], [1, 0, 1], [2, 0, 1]] * 2

    def test_an_environment_gets_actions_for_those_who_live(self):
        made: list[Mortal] = []
        envs = ParallelEnvs(lambda: made.append(Mortal()) or made[-1], 1, 0)
        envs.reset()
        actions = zeros(envs)
        actions["shared"][:] = [1, 0, 1]
        for _ in range(5):
            envs.step({"shared": actions["shared"].copy()})
        assert made[0].given == [{"a": 1, "b": 0, "c": 1}] * 2 + [{"b": 0, "c": 1}] + [{"c": 1}] * 2
        assert all(type(action) is int for given in made[0].given for action in given.values())

    def test_returns_of_joint_episodes(self):
        envs = ParallelEnvs(Mortal, 2, 0)
        envs.reset()
        steps_of(envs, 10)
        a, b, c = 1 + 2, 101 + 102 + 103, sum(200 + t for t in range(1, 6))
        assert [(e.env_index, e.returns, e.length) for e in envs.ended[:2]] == [(0, (a, b, c), 5), (1, (a, b, c), 5)]
        assert envs.ended[2].returns == (a + 2 * 10, b + 3 * 10, c + 5 * 10)

    def test_a_time_limit_cuts_everybody_who_lives_and_ends_nobody_else_anew(self):
        envs = ParallelEnvs(Mortal, 1, 0, max_episode_steps=2)
        envs.reset()
        last = steps_of(envs, 2)[-1]
        assert last["terminated"].tolist() == [True, False, False]
        assert last["truncated"].tolist() == [False, True, True]
        assert envs.ended[0].length == 2

    def test_an_agent_is_told_its_number(self):
        envs = ParallelEnvs(Mortal, 1, 0, agent_id=True)
        assert envs.reset()["shared"].tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0, 0, 1, 2, 0, 0]]
        group = envs.groups["shared"]
        packed = group.observation_space.pack({"observation": np.array([7.0, 8.0, 9.0]), "agent_id": 1})
        assert packed.tolist() == [0, 1, 0, 7, 8, 9]  # the quick way is the same as the general one

    def test_the_state_stands_behind_what_an_agent_sees(self):
        envs = ParallelEnvs(Luck, 1, 3, agent_id=False, is_central=True)
        rows = envs.reset()["shared"]
        assert envs.n_state == 3
        assert (rows[:, 1:] == rows[0, 1:]).all()
        assert rows[:, 0].tolist() == rows[0, 1:3].tolist()

    def test_without_a_state_the_observations_of_all_stand_for_it(self):
        envs = ParallelEnvs(Mortal, 1, 0, agent_id=False, is_central=True)
        # Episode 1, as the first one was begun to look for a state.
        assert envs.reset()["shared"][0].tolist() == [0, 0, 1, 0, 0, 1, 1, 0, 1, 2, 0, 1]
        step = steps_of(envs, 3)[-1]
        assert step["final_observations"][2].tolist() == [2, 3, 1, 0, 0, 0, 1, 3, 1, 2, 3, 1]  # a is not there any more

    def test_some_may_take_no_part(self):
        class Absent(Mortal):
            def reset(self, seed=None, options=None):
                observations, infos = super().reset(seed, options)
                self.agents.remove("b")
                return {a: o for a, o in observations.items() if a != "b"}, infos

        envs = ParallelEnvs(Absent, 1, 0)
        envs.reset()
        valid = np.array([step["valid"] for step in steps_of(envs, 5)])
        assert not valid[:, 1].any()
        assert np.isnan(envs.ended[0].returns[1])


class TestGroups:
    def test_equal_spaces_are_one_group(self):
        groups = grouped(Mortal(), "mortal", "by_space", agent_id=True)
        assert [group.agents for group in groups.values()] == [("a", "b", "c")]

    def test_each_by_itself_needs_no_number(self):
        groups = grouped(Mortal(), "mortal", "independent", agent_id=True)
        assert list(groups) == ["a", "b", "c"]
        assert not any(group.has_ids for group in groups.values())

    def test_other_spaces_by_space(self):
        groups = grouped(Kinds(), "kinds", "by_space", agent_id=True)
        assert list(groups) == ["pusher", "chooser"]
        assert groups["pusher"].observation_space.shape == (2, 2)

    def test_other_spaces_cannot_be_shared(self):
        with pytest.raises(UserError, match=r"spaces of pusher and chooser are not equal.*--agents by_space"):
            grouped(Kinds(), "kinds", "shared", agent_id=True)


class TestRollout:
    def test_a_batch_has_each_agents_own_ends(self):
        """An agent's advantages are those it would have alone: nothing leaks from the others, or past its end."""
        envs = ParallelEnvs(Mortal, 1, 0, agent_id=False)
        group = envs.groups["shared"]
        policy = ActorCritic(group.observation_space, group.action_space, NetworkConfig(hidden_sizes=(8,)))
        carry = Carry.start(envs.reset()["shared"])
        generator = torch.Generator().manual_seed(0)
        batch = rollout_agents(
            {"shared": policy}, envs, {"shared": carry}, 7, {"shared": generator}, gamma=0.9, clock=Clock()
        )["shared"]
        assert batch.mask.tolist() == [
            [True, True, False, False, False, True, True],
            [True, True, True, False, False, True, True],
            [True] * 7,
        ]
        advantages = gae(
            batch.rewards, batch.values, batch.next_values, batch.terminated, batch.done, batch.mask,
            gamma=0.9, gae_lambda=0.8,
        )  # fmt: skip

        def value(agent: int, t: int, episode: int) -> float:
            return float(policy.value(np.array([agent, t, episode], np.float32)))

        # a terminates at its second step; b is cut at its third, where the value of what it saw last stands in.
        a1 = 2.0 - value(0, 1, 0)
        a0 = 1.0 + 0.9 * value(0, 1, 0) - value(0, 0, 0) + 0.9 * 0.8 * a1
        b2 = 103.0 + 0.9 * value(1, 3, 0) - value(1, 2, 0)
        b1 = 102.0 + 0.9 * value(1, 2, 0) - value(1, 1, 0) + 0.9 * 0.8 * b2
        assert advantages[0, :2].tolist() == pytest.approx([a0, a1], rel=1e-5)
        assert advantages[1, 1:3].tolist() == pytest.approx([b1, b2], rel=1e-5)

    def test_a_central_critic_values_the_state_and_the_actor_does_not_see_it(self):
        envs = ParallelEnvs(Luck, 2, 0, agent_id=False, is_central=True)
        group = envs.groups["shared"]
        policy = CentralActorCritic(
            group.observation_space, group.action_space, NetworkConfig(normalize_observations=True), envs.n_state
        )
        torch.nn.init.normal_(policy.actor[-1].weight)
        carry = Carry.start(envs.reset()["shared"])
        before = carry.observations.copy()
        generator = torch.Generator().manual_seed(0)
        batch = rollout_agents(
            {"shared": policy}, envs, {"shared": carry}, 4, {"shared": generator}, gamma=0.9, clock=Clock()
        )["shared"]
        policy.update_observation_moments(batch.observations[batch.mask])
        other = torch.from_numpy(before).clone()
        other[:, 1:] += 5.0
        assert (policy.scaled_values(torch.from_numpy(before)) != policy.scaled_values(other)).all()
        own = before[:, :1]
        log_probs = policy.log_prob(own, np.zeros(4, np.int64))
        assert (policy.evaluate(batch).log_probs.shape, log_probs.shape) == ((4, 4), (4,))
        wide = policy._distribution(policy._features(torch.from_numpy(before)[:, :1]))
        assert wide.log_prob(torch.zeros(4, dtype=torch.int64)).tolist() == pytest.approx(log_probs.tolist())
        assert policy.value(own[0], state=before[0, 1:]) == pytest.approx(
            float(policy.scaled_values(torch.from_numpy(before[:1]))), rel=1e-5
        )
        with pytest.raises(ValueError, match="sees the state of the whole environment"):
            policy.value(own[0])


class TestSnapshots:
    @pytest.mark.parametrize("is_central", [False, True])
    def test_open_episodes_come_back(self, is_central):
        def play(envs: ParallelEnvs, n: int, seed: int) -> list[np.ndarray]:
            rng = np.random.default_rng(seed)
            return [envs.step({"shared": rng.integers(0, 3, 6)})["shared"].observations.copy() for _ in range(n)]

        first = ParallelEnvs(Random, 3, 5, is_central=is_central)
        first.reset()
        play(first, 9, seed=1)
        snapshot = first.snapshot()
        assert snapshot.arrays["lengths"].max() > 0
        second = ParallelEnvs(Random, 3, 5, is_central=is_central)
        observations, fresh = second.restore(snapshot)
        assert fresh == []
        assert observations["shared"].tobytes() == snapshot.arrays["observations/shared"].tobytes()
        for one, other in zip(play(first, 20, seed=2), play(second, 20, seed=2), strict=True):
            assert one.tobytes() == other.tobytes()

    def test_what_its_seed_does_not_fix_begins_anew(self):
        class Unseeded(Random):
            def reset(self, seed=None, options=None):
                return super().reset(None, options)

        envs = ParallelEnvs(Unseeded, 2, 0)
        envs.reset()
        envs.step({"shared": np.zeros(4, np.int64)})
        _, fresh = ParallelEnvs(Unseeded, 2, 0).restore(envs.snapshot())
        assert fresh == [0, 1]


class TestFaults:
    def broken(self, **changes):
        return type("Broken", (Mortal,), changes)

    def refused(self, env, match, n=5, **options):
        def play():
            envs = ParallelEnvs(env, 1, 0, **options)
            envs.reset()
            steps_of(envs, n)

        with pytest.raises(UserError, match=match):
            play()

    def changed_step(self, change):
        def step(env, actions):
            result = Mortal.step(env, actions)
            change(env, *result)
            return result

        return self.broken(step=step)

    def test_an_agent_that_appears_in_the_middle(self):
        class Late(Mortal):
            def reset(self, seed=None, options=None):
                observations, infos = super().reset(seed, options)
                self.agents.remove("c")
                return {a: observations[a] for a in self.agents}, infos

            def step(self, actions):
                result = super().step(actions)
                self.agents.append("c")
                return result

        self.refused(Late, r"the agent 'c' appeared in the middle of an episode.*Let every agent be there from reset")

    def test_an_agent_that_comes_back(self):
        def step(env, actions):
            result = Mortal.step(env, actions)
            if env.t == 3:
                env.agents.append("a")
                result[2]["a"] = result[3]["a"] = False
            return result

        self.refused(self.broken(step=step), "'a' came back after it had ended")

    def test_an_agent_that_vanishes(self):
        self.refused(
            self.changed_step(lambda env, *_: env.agents.remove("c")), "'c' is gone from env.agents without having been"
        )

    def test_a_reward_that_is_missing_or_none(self):
        self.refused(self.changed_step(lambda env, o, r, *_: r.pop("b")), "returned rewards without 'b'")
        self.refused(
            self.changed_step(lambda env, o, r, *_: r.update(b=np.nan)), "the reward of b must be a finite number"
        )

    def test_an_end_that_is_none(self):
        self.refused(self.changed_step(lambda env, o, r, te, tr, i: te.update(b="no")), "termination and truncation")

    def test_an_observation_of_another_shape_outside_or_missing(self):
        see = self.changed_step(lambda env, o, *_: o.update(b=np.zeros(4)))
        self.refused(see, r"agent b: the observation has shape \(4,\), not \(3,\)")
        self.refused(
            self.changed_step(lambda env, o, *_: o.update(b=np.full(3, -5.0))), r"agent b: .*outside its space"
        )
        self.refused(self.changed_step(lambda env, o, *_: o.update(b=np.full(3, np.nan))), r"agent b: .*is nan")
        self.refused(self.changed_step(lambda env, o, *_: o.pop("c")), "returned no observation for 'c'")

    def test_out_of_bounds_may_be_told_instead(self):
        env = self.changed_step(lambda env, o, *_: o.update(b=np.full(3, -5.0)))
        envs = ParallelEnvs(env, 1, 0, on_space_violation="warn")
        envs.reset()
        steps_of(envs, 2)
        assert "agent b" in envs.warnings[0]

    def test_what_it_raises_is_told_with_the_place(self):
        def step(env, actions):
            raise RuntimeError("the motor is hot")

        self.refused(
            self.broken(step=step), r"environment 0, episode 0 \(seed \d+\), step 1: step\(\) raised .*the motor is hot"
        )

    def test_agents_that_are_not_named(self):
        self.refused(self.broken(__init__=lambda env: setattr(env, "agents", [])), "has no possible_agents")

    def test_nobody_after_a_reset(self):
        def reset(env, seed=None, options=None):
            env.agents = []
            return {}, {}

        self.refused(self.broken(reset=reset), "env.agents is empty")

    def test_a_step_of_another_form(self):
        self.refused(self.broken(step=lambda env, actions: (1, 2)), r"step\(\) must return \(observations, rewards")

    def test_one_environment_twice(self):
        one = Mortal()
        with pytest.raises(UserError, match="same environment twice"):
            ParallelEnvs(lambda: one, 2, 0)

    def test_an_agent_id_of_its_own(self):
        space = spaces.Dict({"agent_id": spaces.Discrete(3), "x": spaces.Discrete(2)})
        self.refused(self.broken(observation_space=lambda env, agent: space), "--no-agent-id")
