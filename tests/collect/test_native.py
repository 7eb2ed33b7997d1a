"""`NativeEnvs`: vector environments that reset in their own ways look alike from outside."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from proximo.collect.envs import EnvironmentFault
from proximo.collect.native import NativeEnvs, make_native
from proximo.errors import UserError
from tests.environments import Counting, Faulty, Forever, Noisy, Recording

MODES = list(AutoresetMode)


def native(make: Callable[[], gym.Env], mode: AutoresetMode, n_envs: int = 3, seed: int = 1) -> NativeEnvs:
    return NativeEnvs(SyncVectorEnv([make] * n_envs, autoreset_mode=mode), seed, name="Arm-v0")


def counting(mode: AutoresetMode) -> NativeEnvs:
    numbers = count()
    return native(lambda: Counting(next(numbers)), mode)


def run(envs: NativeEnvs, n_steps: int) -> None:
    envs.reset()
    for _ in range(n_steps):
        envs.step(zeros(envs))


def zeros(envs: NativeEnvs) -> np.ndarray:
    return np.zeros((envs.n_envs, *envs.action_space.shape), envs.action_space.dtype)


class TestSteps:
    @pytest.mark.parametrize("mode", MODES)
    def test_valid_rows_count_and_ends_show_the_true_last_observation(self, mode):
        envs = counting(mode)
        observations = envs.reset().copy()
        acted_on: list[list[list[float]]] = [[], [], []]
        for _ in range(60):
            step = envs.step(zeros(envs))
            for i in np.flatnonzero(step.valid):
                index, episode, t = observations[i]
                acted_on[i].append(observations[i].tolist())
                assert step.final_observations[i].tolist() == [index, episode, t + 1]
                assert step.rewards[i] == 100 * index + 10 * episode + t + 1
                over = t + 1 == Counting.length(int(index), int(episode))
                kind = Counting.ends(int(index), int(episode)) if over else (False, False)
                assert (step.terminated[i], step.truncated[i]) == kind
            observations = step.observations.copy()
        for i in range(3):
            every = [[i, e, t] for e in range(40) for t in range(Counting.length(i, e))]
            assert acted_on[i] == every[: len(acted_on[i])]
            assert len(acted_on[i]) > 40

    def test_only_next_step_has_rows_that_are_no_experience(self):
        n_invalid = {}
        for mode in MODES:
            envs = counting(mode)
            envs.reset()
            valid = [envs.step(zeros(envs)).valid.copy() for _ in range(30)]
            n_invalid[mode] = int((~np.array(valid)).sum())
        # Episodes of 2, 4, 2, 4, ...; 5, 3, ...; 4, 2, ... steps, each with a reset after it: 7, 6 and 7 resets.
        assert n_invalid == {AutoresetMode.NEXT_STEP: 20, AutoresetMode.SAME_STEP: 0, AutoresetMode.DISABLED: 0}

    def test_a_vector_environment_that_does_not_say_resets_in_the_next_step(self):
        inner = SyncVectorEnv([Noisy] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)
        inner.metadata = {}
        envs = NativeEnvs(inner, 0)
        envs.reset()
        valid = [envs.step(zeros(envs)).valid.copy() for _ in range(30)]
        assert not np.array(valid).all()

    def test_observations_have_the_type_that_other_environments_give(self):
        envs = native(Noisy, AutoresetMode.SAME_STEP)
        assert envs.reset().dtype == np.float32
        assert envs.step(zeros(envs)).observations.dtype == np.float32

    def test_the_same_step_without_a_final_observation_is_a_fault_that_says_so(self):
        class NoFinal(SyncVectorEnv):
            def step(self, actions):
                *rest, info = super().step(actions)
                info.pop("final_obs", None)
                return (*rest, info)

        numbers = count()
        vector = NoFinal([lambda: Counting(next(numbers))] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
        envs = NativeEnvs(vector, 1, name="Arm-v0")
        with pytest.raises(EnvironmentFault, match=r"Arm-v0.*SAME_STEP, and info has no final_obs"):
            run(envs, 60)


class TestSeeds:
    @pytest.mark.parametrize("mode", MODES)
    def test_no_two_environments_and_episodes_begin_alike(self, mode):
        envs = native(Noisy, mode, n_envs=4)
        firsts = [row.tobytes() for row in envs.reset()]
        for _ in range(50):
            step = envs.step(zeros(envs))
            reset = ~step.valid if mode is AutoresetMode.NEXT_STEP else step.terminated | step.truncated
            firsts += [row.tobytes() for row in step.observations[reset]]
        assert len(firsts) > 12
        assert len(set(firsts)) == len(firsts)

    @pytest.mark.parametrize("mode", MODES)
    def test_no_two_environments_get_the_same_seed(self, mode):
        made: list[Recording] = []
        envs = native(lambda: Recording(length=3, log=made), mode)
        envs.reset()
        for _ in range(30):
            envs.step(zeros(envs))
        seeds = [seed for env in made for seed in env.seeds if seed is not None]
        assert len(seeds) >= 3
        assert len(set(seeds)) == len(seeds)

    def test_the_same_seed_begins_the_same_run(self):
        one, two, other = (native(Noisy, AutoresetMode.NEXT_STEP, seed=seed).reset() for seed in (3, 3, 4))
        assert np.array_equal(one, two)
        assert not (one == other).any()


class TestFaults:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("fault", "words"),
        [
            ("NaN reward", "the reward is nan"),
            ("NaN observation", "observation[1] is nan"),
            ("infinite reward", "-inf"),
        ],
    )
    def test_what_is_not_finite_is_told_with_its_place(self, mode, fault, words):
        numbers = count(-1)  # SyncVectorEnv makes none but these
        envs = native(lambda: Faulty(fault, faulty=next(numbers) == 0), mode)
        with pytest.raises(EnvironmentFault) as caught:
            run(envs, 20)
        step = 10 if mode is AutoresetMode.NEXT_STEP else 9
        assert words in str(caught.value)
        assert f"Arm-v0, environment 1, step {step} of the run" in str(caught.value)
        assert caught.value.record["env_index"] == 1

    def test_a_final_observation_that_is_not_finite_under_same_step(self):
        envs = native(lambda: Faulty("NaN observation", at=6, episode=0), AutoresetMode.SAME_STEP)
        with pytest.raises(EnvironmentFault):
            run(envs, 10)

    @pytest.mark.parametrize("episode", [0, 1])
    def test_a_first_observation_that_is_not_finite_where_we_reset(self, episode):
        envs = native(lambda: Faulty("reset returns NaN", episode=episode), AutoresetMode.DISABLED)
        with pytest.raises(EnvironmentFault):
            run(envs, 6)

    def test_an_observation_outside_its_space(self):
        envs = native(lambda: Faulty("out of bounds"), AutoresetMode.SAME_STEP)
        with pytest.raises(EnvironmentFault, match="outside its space"):
            run(envs, 20)

    def test_is_only_told_where_that_was_asked_for(self):
        vector = SyncVectorEnv([lambda: Faulty("out of bounds")] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
        envs = NativeEnvs(vector, 1, name="Arm-v0", on_space_violation="warn")
        run(envs, 20)
        (told,) = envs.warnings
        assert "Arm-v0, environment 0" in told
        assert "outside its space" in told

    @pytest.mark.parametrize("end", ["False", np.nan, None, 2])
    def test_an_end_that_is_neither_true_nor_false(self, end):
        vector = SyncVectorEnv([lambda: Faulty("none")] * 2)
        step = vector.step
        vector.step = lambda actions: (*step(actions)[:2], np.array([end] * 2), np.zeros(2, bool), {})
        with pytest.raises(EnvironmentFault, match="terminated must be 2 of True or False"):
            run(NativeEnvs(vector, 1), 1)
        vector.step = lambda actions: (*step(actions)[:3], np.array([1, 0]), {})
        envs = NativeEnvs(vector, 1)
        envs.reset()
        assert envs.step(zeros(envs)).truncated.tolist() == [True, False]

    def test_close_says_what_went_wrong(self, capsys):
        vector = SyncVectorEnv([lambda: Faulty("none")])

        def close() -> None:
            raise RuntimeError("the door is stuck")

        vector.close = close
        NativeEnvs(vector, 1, name="Arm-v0").close()
        assert "closing Arm-v0 failed: RuntimeError: the door is stuck" in capsys.readouterr().err

    @pytest.mark.parametrize("fault", ["raises", "two rewards", "leaves Python"])
    def test_an_environment_that_raises(self, fault):
        envs = native(lambda: Faulty(fault), AutoresetMode.SAME_STEP)
        with pytest.raises(EnvironmentFault):
            run(envs, 20)


class TestRestore:
    @pytest.mark.parametrize("mode", MODES)
    def test_begins_fresh_episodes_and_says_so(self, mode):
        envs = native(Noisy, mode)
        first = envs.reset().copy()
        for _ in range(12):
            envs.step(zeros(envs))
        snapshot = envs.snapshot()
        others = native(Noisy, mode)
        others.reset()
        observations, fresh = others.restore(snapshot)
        assert fresh == [0, 1, 2]
        assert not (observations == first).any()
        assert others.step(zeros(others)).valid.all()
        again = native(Noisy, mode)
        again.reset()
        assert np.array_equal(again.restore(snapshot)[0], observations)


class TestCartPole:
    def test_every_row_is_the_physics_of_the_plain_environment(self):
        envs = NativeEnvs(make_native("CartPole-v1", 4, {"max_episode_steps": 15}), seed=2)
        plain = gym.make("CartPole-v1").unwrapped
        plain.reset()
        observations = envs.reset().copy()
        lengths, t = [], np.zeros(4, int)
        actions = np.random.default_rng(0).integers(2, size=(120, 4))
        for row in actions:
            step = envs.step(row)
            for i in np.flatnonzero(step.valid):
                plain.state = observations[i]
                plain.steps_beyond_terminated = None
                expected, reward, terminated, _, _ = plain.step(row[i])
                t[i] += 1
                assert np.allclose(step.final_observations[i], expected, atol=1e-6)
                assert (step.rewards[i], step.terminated[i]) == (reward, terminated)
                assert step.truncated[i] == (t[i] == 15)
                if step.terminated[i] or step.truncated[i]:
                    lengths.append(t[i])
                    t[i] = 0
            assert (np.abs(step.observations[~step.valid]) <= 0.05).all()
            observations = step.observations.copy()
        assert max(lengths) == 15
        assert min(lengths) < 15

    def test_an_environment_without_a_vector_version_is_refused(self):
        with pytest.raises(UserError, match=r"Pendulum-v1 has no vector version.*serial"):
            make_native("Pendulum-v1", 2, {})

    def test_arguments_that_do_not_fit_are_told(self):
        with pytest.raises(UserError, match=r"could not be made.*colour"):
            make_native("CartPole-v1", 2, {"colour": "red"})


@pytest.mark.parametrize("mode", MODES)
def test_a_time_limit_ends_by_truncation(mode):
    envs = native(lambda: gym.wrappers.TimeLimit(Forever(), 4), mode)
    envs.reset()
    steps = [envs.step(zeros(envs)) for _ in range(4)]
    assert steps[-1].truncated.all()
    assert not steps[-1].terminated.any()
