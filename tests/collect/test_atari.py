"""Atari games: one game and ale-py's vector of them are the same task, and a lost life is an end for learning alone."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from proximo.collect.atari import AtariGame, register_games
from proximo.collect.envs import episode_seed
from proximo.collect.make import find_factory, make_env
from proximo.collect.native import NativeEnvs, make_native
from proximo.collect.rollout import Carry, rollout
from proximo.collect.serial_envs import SerialEnvs
from proximo.errors import UserError
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.presets import resolve_settings
from proximo.training.config import ControlConfig, with_settings

pytest.importorskip("ale_py", reason="ale-py is not installed: the extra atari")

FIRE = 1
LARGEST_SEED = 2**63 - 1


def vector(game: str, n_envs: int = 1, *, seed: int = 0, lives: bool = False, **settings: Any) -> NativeEnvs:
    limit = settings.pop("max_episode_steps", None)
    envs = make_native(f"ALE/{game}-v5", n_envs, settings, max_episode_steps=limit, episodic_life=lives)
    return NativeEnvs(envs, seed, name=game, atari=True)


def a_game(game: str, **settings: Any) -> AtariGame:
    env = make_env(find_factory(f"ALE/{game}-v5"), f"ALE/{game}-v5", settings)
    assert isinstance(env, AtariGame)
    return env


class TestOneGame:
    def test_it_is_the_game_of_the_vector_environment_pixel_by_pixel(self):
        """A whole game of Breakout; without no-ops, which each draws in its own way, nothing is left to chance."""
        one, many = a_game("Breakout", noop_max=1), vector("Breakout", noop_max=1)
        assert (one.observation_space, one.action_space) == (many.observation_space, many.action_space)
        seen, _ = one.reset(seed=0)
        assert np.array_equal(seen, many.reset()[0])
        generator, n_steps, terminated = np.random.default_rng(0), 0, False
        while not terminated:
            action = generator.integers(4)
            seen, reward, terminated, truncated, _ = one.step(action)
            step = many.step(np.array([action]))
            assert (reward, terminated, truncated) == (step.rewards[0], step.terminated[0], step.truncated[0])
            assert terminated or np.array_equal(seen, step.observations[0])
            n_steps += 1
        assert n_steps > 100

    def test_a_seed_is_an_episode(self):
        env = a_game("Pong")
        episodes = []
        for seed in (1, 1, 2, 3, 4):
            seen = [env.reset(seed=seed)[0]] + [env.step(action)[0] for action in (2, 3, 2, 2, 3, 0)]
            episodes.append(np.stack(seen))
        assert np.array_equal(episodes[0], episodes[1])
        assert any(not np.array_equal(episodes[0], other) for other in episodes[2:])  # other no-ops before it

    def test_frames_are_stacked_behind_each_other(self):
        env = a_game("Pong")
        seen, _ = env.reset(seed=0)
        assert not seen[:3].any()
        assert seen[3].any()
        following = env.step(2)[0]
        assert np.array_equal(following[2], seen[3])
        assert env.observation_space.contains(following)

    def test_an_open_game_is_found_again(self):
        def envs() -> SerialEnvs:
            return SerialEnvs(lambda: a_game("Breakout", repeat_action_probability=0.25), 2, 5)

        actions = np.random.default_rng(0).integers(0, 4, (25, 2))
        first, again = envs(), envs()
        first.reset()
        for action in actions[:15]:
            first.step(action)
        _, fresh = again.restore(first.snapshot())
        assert fresh == []
        for action in actions[15:]:
            one, other = first.step(action), again.step(action)
            assert np.array_equal(one.observations, other.observations)
            assert np.array_equal(one.rewards, other.rewards)

    def test_it_can_be_filmed(self):
        env = make_env(find_factory("ALE/Pong-v5"), "ALE/Pong-v5", {}, render_mode="rgb_array")
        env.reset(seed=0)
        assert env.render().shape == (210, 160, 3)

    def test_an_unknown_game_is_met_with_the_nearest(self):
        with pytest.raises(UserError, match=r"There is no environment 'ALE/Pung-v5'. Did you mean .*ALE/Pong-v5"):
            find_factory("ALE/Pung-v5")


class TestManyGames:
    def test_the_time_limit_counts_steps(self):
        envs = vector("Pong", 2, max_episode_steps=10)
        first = envs.reset()
        ends = [envs.step(np.zeros(2, np.int64)) for _ in range(10)]
        assert [step.truncated.tolist() for step in ends] == [[False, False]] * 9 + [[True, True]]
        last = ends[-1]
        assert not last.terminated.any()
        assert last.valid.all()
        assert last.observations[:, :3].sum() == 0  # the next game, with a single frame of it
        assert last.final_observations[:, :3].any()
        assert first.shape == (2, 4, 84, 84)

    def test_a_seed_is_a_run_and_may_be_as_large_as_any(self):
        seen = [vector("Breakout", 3, seed=seed).reset() for seed in (LARGEST_SEED, LARGEST_SEED, 1)]
        assert episode_seed(LARGEST_SEED, 0, 0) >= 0
        assert np.array_equal(seen[0], seen[1])

    def test_a_life_is_an_end_and_the_game_goes_on(self):
        """Breakout has five lives; a paddle that only serves loses them one by one."""
        envs = vector("Breakout", lives=True)
        envs.reset()
        ends = []
        goes_on = [True]
        while goes_on[-1]:
            step = envs.step(np.array([FIRE]))
            assert envs.goes_on is not None
            if step.terminated[0]:
                ends.append(step)
                goes_on.append(bool(envs.goes_on[0]))
        assert goes_on[1:] == [True] * 4 + [False]
        for step in ends[:4]:
            assert np.array_equal(step.final_observations, step.observations)  # nothing was reset
            assert step.observations[0, 0].any()
        assert not ends[-1].observations[0, :3].any()

    def test_the_return_is_of_the_whole_game_and_learning_sees_signs(self):
        """Ms. Pac-Man has three lives and rewards of 10 and more."""
        envs = vector("MsPacman", lives=True)
        config = NetworkConfig(sign_rewards=True)
        policy = ActorCritic(
            envs.observation_space, envs.action_space, config, torch.Generator().manual_seed(0)
        ).requires_grad_(False)
        carry = Carry.start(envs.reset())
        generator = torch.Generator().manual_seed(0)
        ends, returns, lengths, score, n_steps = 0, [], [], 0.0, 0
        while not returns:
            batch, episodes = rollout(policy, envs, carry, 64, generator, gamma=0.99)
            ends += int(batch.terminated.sum())
            score += float(batch.rewards.sum())
            returns, lengths = episodes.returns, episodes.lengths
            n_steps += 64
            assert set(batch.rewards.unique().tolist()) <= {-1.0, 0.0, 1.0}
        assert ends >= 3
        assert len(returns) == 1
        assert returns[0] % 10 == 0
        assert returns[0] >= 100
        assert lengths[0] + int(carry.episode_length[0]) == n_steps  # no life was an episode of its own
        assert score < returns[0]


class TestSettings:
    def test_a_game_has_those_of_the_zoo(self):
        config, said = resolve_settings("ALE/Breakout-v5", lambda: pytest.fail("no game need be made for that"))
        task = config.environment
        assert (task.vectorization, task.episodic_life, config.network.sign_rewards) == ("native", True, True)
        assert (task.n_envs, config.rollout_length, config.algorithm.batch_size) == (8, 128, 256)
        assert "RL Baselines3 Zoo" in said

    @pytest.mark.parametrize(
        "settings", [{"env_id": "CartPole-v1"}, {"env_id": "ALE/Pong-v5", "vectorization": "serial"}]
    )
    def test_lives_are_those_of_native_games(self, settings: dict[str, Any]):
        with pytest.raises(
            UserError, match=r"episodic_life is on, which is for games ALE/\.\.\. with --vectorization native"
        ):
            with_settings(ControlConfig(), {"episodic_life": True, **settings}, where="test")

    def test_a_sign_has_no_scale(self):
        with pytest.raises(UserError, match="sign_rewards and normalize_rewards are both on"):
            NetworkConfig(sign_rewards=True, normalize_rewards=True)

    def test_without_ale_py_the_command_that_installs_it_is_named(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "ale_py", None)
        with pytest.raises(UserError, match=r"ALE/Pong-v5 needs ale-py.*\n.*pip install .*\[atari\]"):
            register_games("ALE/Pong-v5")
