"""`SerialEnvs`: seeds, resets, faults in words, and the way back to any moment."""

from __future__ import annotations

import pickle  # noqa: TID251 (what multiprocessing does with an exception on its way home)
from itertools import count

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from proximo.collect import serial_envs
from proximo.collect.envs import EnvironmentFault, Snapshot, episode_seed
from proximo.collect.returned_values import SpaceCheck
from proximo.collect.serial_envs import SerialEnvs
from tests.environments import Counting, Faulty, Forever, Noisy, Recording, Scripted


def counting(n_envs: int, dtype: type = np.float32) -> SerialEnvs:
    numbers = count()
    return SerialEnvs(lambda: Counting(next(numbers), dtype), n_envs, seed=1)


def zeros(envs: SerialEnvs) -> np.ndarray:
    return np.zeros((envs.n_envs, *envs.action_space.shape), envs.action_space.dtype)


class TestSeeds:
    def test_no_two_of_runs_environments_and_episodes_share_one(self):
        seeds = [episode_seed(run, env, episode) for run in range(5) for env in range(20) for episode in range(20)]
        assert len(set(seeds)) == len(seeds)

    def test_they_never_change(self):
        # Written down once: an open episode of a run from yesterday must be rebuilt tomorrow.
        assert episode_seed(1, 2, 3) == 3822189696

    def test_every_episode_of_every_environment_gets_its_own(self):
        made: list[Recording] = []
        envs = SerialEnvs(lambda: Recording(length=3, log=made), 4, seed=7)
        first = envs.reset().copy()
        assert len({row.tobytes() for row in first}) == 4
        for _ in range(30):
            envs.step(zeros(envs))
        assert [env.seeds for env in made] == [[episode_seed(7, i, e) for e in range(11)] for i in range(4)]
        everywhere = [seed for env in made for seed in env.seeds]
        assert len(set(everywhere)) == len(everywhere) == 44

    def test_another_run_seed_shows_other_episodes(self):
        one, two = (SerialEnvs(Recording, 2, seed=seed).reset() for seed in (1, 2))
        assert not (one == two).any()

    def test_a_part_of_the_environments_is_seeded_as_within_the_whole(self):
        whole, part = SerialEnvs(Noisy, 5, seed=3), SerialEnvs(Noisy, 2, seed=3, first_index=3)
        assert np.array_equal(whole.reset()[3:], part.reset())
        actions = np.ones((5, 2), np.float32)
        for _ in range(25):
            of_whole, of_part = whole.step(actions), part.step(actions[3:])
            assert all(np.array_equal(a[3:], b) for a, b in zip(of_whole, of_part, strict=True))

    def test_reset_begins_again_at_episode_zero(self):
        envs = SerialEnvs(Noisy, 2, seed=3)
        first = envs.reset().copy()
        for _ in range(15):
            envs.step(np.ones((2, 2), np.float32))
        assert np.array_equal(envs.reset(), first)


class TestSteps:
    def test_an_end_shows_the_true_last_observation_and_the_next_episodes_first(self):
        envs = counting(3)
        envs.reset()
        ended = 0
        episodes, t = [0, 0, 0], [0, 0, 0]
        for _ in range(40):
            step = envs.step(zeros(envs))
            assert step.valid.all()
            for i in range(3):
                t[i] += 1
                assert step.final_observations[i].tolist() == [i, episodes[i], t[i]]
                assert step.rewards[i] == 100 * i + 10 * episodes[i] + t[i]
                over = t[i] == Counting.length(i, episodes[i])
                kind = Counting.ends(i, episodes[i]) if over else (False, False)
                assert (step.terminated[i], step.truncated[i]) == kind
                if over:
                    ended += 1
                    episodes[i], t[i] = episodes[i] + 1, 0
                assert step.observations[i].tolist() == [i, episodes[i], t[i]]
        assert ended > 20

    @pytest.mark.parametrize(
        ("given", "kept"), [(np.float64, np.float32), (np.float32, np.float32), (np.uint8, np.uint8)]
    )
    def test_observations_keep_their_type_but_for_float64(self, given, kept):
        envs = counting(2, given)
        assert envs.reset().dtype == kept
        step = envs.step(zeros(envs))
        assert step.observations.dtype == step.final_observations.dtype == kept
        assert step.rewards.dtype == np.float64

    @pytest.mark.parametrize("reward", [1, 1.0, np.float32(1), np.array(1.0), np.array([1]), True])
    def test_one_number_of_any_kind_is_a_reward(self, reward):
        envs = SerialEnvs(lambda: Scripted([(reward, False, False)]), 1, seed=0)
        envs.reset()
        assert envs.step(zeros(envs)).rewards.tolist() == [1.0]

    def test_close_closes_every_environment(self):
        closed = []

        class Closing(Noisy):
            def close(self):
                closed.append(self)

        SerialEnvs(Closing, 3, seed=0).close()
        assert len(closed) == 3

    def test_close_goes_on_after_one_that_raises_and_says_so_once(self, capsys):
        closed = []

        class Stuck(Noisy):
            def close(self):
                closed.append(self)
                raise (SystemExit, RuntimeError)[len(closed) % 2]("the door is stuck")

        SerialEnvs(Stuck, 3, seed=0, name="Arm-v0").close()
        assert len(closed) == 3
        said = capsys.readouterr().err
        assert said.count("the door is stuck") == 1
        assert "closing Arm-v0 failed: RuntimeError" in said


FAULTS = {
    "raises": "step() raised ZeroDivisionError: the arm is stuck",
    "returns four values": (
        "step() must return (observation, reward, terminated, truncated, info), and returned 4 values"
    ),
    "leaves Python": "step() raised SystemExit: 3",
    "NaN reward": "the reward is nan",
    "infinite reward": "the reward is -inf",
    "two rewards": "the reward must be one number, not array([1., 2.])",
    "no reward": "the reward must be one number, not None",
    "NaN observation": "observation[1] is nan",
    "infinite observation": "observation[0] is inf",
    "another shape": "observation has shape (1, 2), not (2,)",
    "out of bounds": "observation[1] is 2.5, outside its space's bounds",
}
RESET_FAULTS = {
    "reset raises": "reset() raised RuntimeError: the arm is stuck",
    "reset returns no pair": "reset() must return (observation, info), and returned a ndarray",
    "reset returns another shape": "that reset() returned has shape (3,), not (2,)",
    "reset returns NaN": "after reset(), observation[0] is nan",
}


def faulty(fault: str, **options) -> SerialEnvs:
    """Of three environments, the middle one does something wrong at step 3 of episode 1."""
    numbers = count()
    return SerialEnvs(lambda: Faulty(fault, faulty=next(numbers) == 1), 3, seed=5, name="Arm-v0", **options)


def drive(envs: SerialEnvs, n_steps: int = 20) -> list[np.ndarray]:
    """Step with actions that tell the step and the environment; return the actions."""
    taken = []
    envs.reset()
    for t in range(n_steps):
        taken.append(np.array([[0.01 * t + 0.001 * i] for i in range(envs.n_envs)], np.float32))
        envs.step(taken[-1].copy())
    return taken


class TestFaults:
    @pytest.mark.parametrize(("fault", "words"), FAULTS.items())
    def test_the_message_says_what_and_where(self, fault, words):
        with pytest.raises(EnvironmentFault) as caught:
            drive(faulty(fault))
        message = str(caught.value)
        assert words in message
        seed = episode_seed(5, 1, 1)
        # Six steps of episode 0, then the third of episode 1: the ninth action of environment 1.
        assert f"Arm-v0, environment 1, episode 1, step 3 (seed {seed})" in message
        assert str(np.float32(0.081).tolist()) in message

    @pytest.mark.parametrize("fault", FAULTS)
    def test_the_record_is_the_episode(self, fault):
        with pytest.raises(EnvironmentFault) as caught:
            drive(faulty(fault))
        record = caught.value.record
        assert {key: record[key] for key in ("env_index", "episode", "step", "seed")} == {
            "env_index": 1,
            "episode": 1,
            "step": 3,
            "seed": episode_seed(5, 1, 1),
        }
        assert np.allclose(record["actions"], [[0.061], [0.071], [0.081]], atol=1e-7)
        assert FAULTS[fault].split(":")[0].split(",")[0] in record["problem"]

    @pytest.mark.parametrize(("fault", "words"), RESET_FAULTS.items())
    def test_resets_too(self, fault, words):
        with pytest.raises(EnvironmentFault) as caught:
            drive(faulty(fault))
        seed = episode_seed(5, 1, 1)
        assert words in str(caught.value)
        assert f"Arm-v0, environment 1, episode 1, step 0 (seed {seed})" in str(caught.value)
        assert caught.value.record["actions"] == []

    def test_the_first_reset_too(self):
        envs = SerialEnvs(lambda: Faulty("reset raises", episode=0), 2, seed=5)
        with pytest.raises(EnvironmentFault, match=r"environment 0, episode 0, step 0"):
            envs.reset()

    def test_a_part_of_the_environments_tells_the_number_within_the_whole(self):
        numbers = count()
        envs = SerialEnvs(lambda: Faulty("NaN reward", faulty=next(numbers) == 1), 3, seed=5, first_index=6)
        with pytest.raises(EnvironmentFault, match="environment 7, episode 1, step 3") as caught:
            drive(envs)
        assert caught.value.record["env_index"] == 7
        assert caught.value.record["seed"] == episode_seed(5, 7, 1)

    def test_a_value_out_of_bounds_says_how_to_go_on(self):
        with pytest.raises(EnvironmentFault, match="--on-space-violation warn"):
            drive(faulty("out of bounds"))

    def test_a_value_out_of_bounds_names_the_bounds_of_the_space(self):
        with pytest.raises(EnvironmentFault, match=r"bounds \[-1, 2\]"):
            drive(faulty("out of bounds"))

    def test_warn_goes_on_with_one_warning(self):
        numbers = count()
        envs = SerialEnvs(
            lambda: Faulty("out of bounds", at=1 + next(numbers)), 3, seed=5, name="Arm-v0", on_space_violation="warn"
        )
        drive(envs)
        [warning] = envs.warnings
        assert "Arm-v0, environment 0, episode 1, step 1" in warning
        assert "observation[1] is 2.5" in warning

    @pytest.mark.parametrize("fault", ["NaN observation", "infinite observation", "NaN reward", "reset returns NaN"])
    def test_warn_is_for_bounds_alone(self, fault):
        with pytest.raises(EnvironmentFault):
            drive(faulty(fault, on_space_violation="warn"))

    def test_bounds_are_wide_enough_for_rounding(self):
        check = SpaceCheck.of(spaces.Box(-1.0, 1.0, (1,), np.float32))
        assert check.fits(np.array([[np.nextafter(np.float32(1), np.float32(2))]]))
        assert not check.fits(np.array([[1.001]]))

    def test_a_fault_survives_the_way_from_a_worker(self):
        with pytest.raises(EnvironmentFault) as caught:
            drive(faulty("NaN reward"))
        again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
        assert (str(again), again.record) == (str(caught.value), caught.value.record)

    def test_integers_out_of_their_type_are_out_of_bounds(self):
        class Bytes(Noisy):
            def __init__(self) -> None:
                super().__init__()
                self.observation_space = spaces.Box(0, 255, (3,), np.uint8)

            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                return np.zeros(3, np.uint8), {}

            def step(self, action):
                super().step(action)
                return np.array([0, 300, 0]), 0.0, False, False, {}

        envs = SerialEnvs(Bytes, 1, seed=0)
        envs.reset()
        with pytest.raises(EnvironmentFault, match="300"):
            envs.step(zeros(envs))

    def test_the_place_in_a_matrix_is_told_by_row_and_column(self):
        check = SpaceCheck.of(spaces.Box(-1.0, 1.0, (2, 3), np.float32))
        problem = check.first_problem(np.array([[0, 0, 0], [0, 0, 9]], np.float32))
        assert problem is not None
        assert "observation[1, 2]" in problem[0]

    @pytest.mark.parametrize("observation", [[1.0, "two", 3.0], [[1.0], 2.0, 3.0]])
    def test_an_observation_that_is_no_array_is_the_environments_fault(self, observation):
        class Odd(Noisy):
            def step(self, action):
                return observation, 0.0, False, False, {}

        envs = SerialEnvs(Odd, 1, seed=0)
        envs.reset()
        with pytest.raises(EnvironmentFault):
            envs.step(zeros(envs))


def walk(envs: SerialEnvs, n_steps: int, generator: np.random.Generator) -> list[tuple[np.ndarray, ...]]:
    steps = []
    for _ in range(n_steps):
        shape = (envs.n_envs, *envs.action_space.shape)
        steps.append(tuple(np.copy(part) for part in envs.step(generator.normal(size=shape).astype(np.float32))))
    return steps


def same(ours: list[tuple[np.ndarray, ...]], theirs: list[tuple[np.ndarray, ...]]) -> bool:
    return all(a.tobytes() == b.tobytes() for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


def through_a_file(snapshot: Snapshot) -> Snapshot:
    return Snapshot({name: array.copy() for name, array in snapshot.arrays.items()}, dict(snapshot.values))


class Shrinking(Noisy):
    """Changes its action in place."""

    def step(self, action):
        action *= 0.1
        return super().step(action)


class TestRestore:
    def test_an_environment_that_changes_its_actions_in_place_is_come_back_to(self):
        envs = SerialEnvs(lambda: Shrinking(50), 2, seed=1)
        envs.reset()
        taken = np.full((2, 2), 1.5, np.float32)
        for _ in range(5):
            envs.step(taken)
        assert (taken == 1.5).all()
        moment = envs.snapshot()
        assert (moment.arrays["open_actions"] == 1.5).all()
        other = SerialEnvs(lambda: Shrinking(50), 2, seed=1)
        assert other.restore(moment)[1] == []
        assert (other.snapshot().arrays["open_actions"] == 1.5).all()

    @pytest.mark.parametrize("n_steps", [0, 1, 10, 11, 12, 29, 33])
    def test_any_moment_is_come_back_to(self, n_steps):
        envs = SerialEnvs(Noisy, 3, seed=4)
        envs.reset()
        walk(envs, n_steps, np.random.default_rng(1))
        snapshot = through_a_file(envs.snapshot())
        then = walk(envs, 40, np.random.default_rng(2))
        others = SerialEnvs(Noisy, 3, seed=4)
        others.reset()
        observations, fresh = others.restore(snapshot)
        assert fresh == []
        assert observations.tobytes() == snapshot.arrays["observations"].tobytes()
        assert same(walk(others, 40, np.random.default_rng(2)), then)

    def test_a_second_time_too(self):
        envs = SerialEnvs(Noisy, 3, seed=4)
        envs.reset()
        walk(envs, 17, np.random.default_rng(1))
        first = SerialEnvs(Noisy, 3, seed=4)
        first.restore(envs.snapshot())
        walk(envs, 3, np.random.default_rng(2))
        walk(first, 3, np.random.default_rng(2))
        second = SerialEnvs(Noisy, 3, seed=4)
        assert second.restore(first.snapshot())[1] == []
        assert same(walk(second, 20, np.random.default_rng(3)), walk(envs, 20, np.random.default_rng(3)))

    def test_after_so_many_steps_that_actions_were_forgotten(self):
        envs = SerialEnvs(lambda: Noisy(length=700), 2, seed=4)
        envs.reset()
        walk(envs, 5000, np.random.default_rng(1))
        assert len(envs._history) < 5000
        others = SerialEnvs(lambda: Noisy(length=700), 2, seed=4)
        assert others.restore(through_a_file(envs.snapshot()))[1] == []
        assert same(walk(others, 800, np.random.default_rng(2)), walk(envs, 800, np.random.default_rng(2)))

    def test_an_episode_without_an_end_is_forgotten_and_begun_afresh(self, monkeypatch):
        monkeypatch.setattr(serial_envs, "LONGEST_REPLAY", 5000)
        numbers = count()

        def make() -> gym.Env:
            return gym.wrappers.TimeLimit(Forever(), 700) if next(numbers) == 0 else Forever()

        envs = SerialEnvs(make, 2, seed=4, name="Arm-v0")
        envs.reset()
        for _ in range(4999):
            envs.step(np.zeros(2, np.int64))
        assert envs.snapshot().arrays["lengths"].tolist() == [99, 4999]
        for _ in range(5):
            envs.step(np.zeros(2, np.int64))
        assert len(envs._history) < 200
        snapshot = through_a_file(envs.snapshot())
        assert snapshot.arrays["lengths"].tolist() == [104, -1]
        assert len(snapshot.arrays["open_actions"]) == 104
        numbers = count()
        others = SerialEnvs(make, 2, seed=4, first_index=6)
        assert others.restore(snapshot)[1] == [7]
        again = others.snapshot()
        assert again.arrays["lengths"].tolist() == [104, 0]
        assert again.arrays["episodes"].tolist() == [7, 1]
        assert again.arrays["reward_sums"].tolist() == [104, 0]
        envs._envs[1].step = lambda action: None
        with pytest.raises(EnvironmentFault, match=r"environment 1, episode 0, step 5005 .*(.|\n)*not kept") as caught:
            envs.step(np.zeros(2, np.int64))
        assert (caught.value.record["step"], caught.value.record["seed"]) == (5005, None)

    def test_a_real_environment(self):
        envs, others = (SerialEnvs(lambda: gym.make("CartPole-v1"), 3, seed=4) for _ in range(2))
        envs.reset()
        actions = np.random.default_rng(1).integers(2, size=(120, 3))
        for row in actions[:60]:
            envs.step(row)
        observations, fresh = others.restore(through_a_file(envs.snapshot()))
        assert fresh == []
        assert np.array_equal(observations, envs.snapshot().arrays["observations"])
        for row in actions[60:]:
            assert same([tuple(others.step(row))], [tuple(envs.step(row))])

    def test_a_world_that_remembers_the_episodes_before_is_not_called_exact(self):
        """BipedalWalker's Box2D world is not the same after a reset as in a fresh environment."""
        pytest.importorskip("Box2D")
        envs, others = (
            SerialEnvs(lambda: gym.make("BipedalWalker-v3"), 2, seed=4, on_space_violation="warn") for _ in range(2)
        )
        envs.reset()
        rng = np.random.default_rng(1)
        while envs._episodes.min() == 0 or min(envs._length_of(i) for i in range(2)) < 5:
            envs.step(rng.uniform(-1, 1, (2, 4)).astype(np.float32))
        others.reset()
        assert others.restore(through_a_file(envs.snapshot()))[1] != []

    @pytest.mark.parametrize("env_id", ["Acrobot-v1", "LunarLander-v3", "Ant-v5"])
    def test_environments_with_physics(self, env_id):
        """After some episodes: what a simulator keeps from one to the next does not show in the last one alone."""
        pytest.importorskip({"A": "mujoco", "L": "Box2D"}[env_id[0]])
        envs, others = (SerialEnvs(lambda: gym.make(env_id), 2, seed=4, on_space_violation="warn") for _ in range(2))
        envs.reset()
        space, rng = envs.action_space, np.random.default_rng(1)

        def actions() -> np.ndarray:
            if isinstance(space, spaces.Discrete):
                return rng.integers(space.n, size=2)
            return rng.uniform(space.low, space.high, (2, *space.shape)).astype(space.dtype)

        for _ in range(160):
            envs.step(actions())
        others.reset()
        assert others.restore(through_a_file(envs.snapshot()))[1] == []
        for _ in range(60):
            row = actions()
            assert same([tuple(others.step(row))], [tuple(envs.step(row))])

    def test_rewards_that_its_seed_does_not_fix_are_noticed_too(self):
        class Whimsical(Noisy):
            def step(self, action):
                observation, _, *rest = super().step(action)
                return observation, float(self.unseeded.normal()), *rest

        envs = SerialEnvs(Whimsical, 2, seed=4)
        envs.reset()
        walk(envs, 5, np.random.default_rng(1))
        assert SerialEnvs(Whimsical, 2, seed=4).restore(envs.snapshot())[1] == [0, 1]

    def test_what_its_seed_does_not_fix_begins_a_fresh_episode_and_is_listed(self):
        def make(number: int) -> Noisy:
            return Noisy(seeded=number != 1)

        numbers = count()
        envs = SerialEnvs(lambda: make(next(numbers)), 3, seed=4)
        envs.reset()
        walk(envs, 5, np.random.default_rng(1))
        snapshot = envs.snapshot()
        numbers = count()
        others = SerialEnvs(lambda: make(next(numbers)), 3, seed=4, first_index=0)
        observations, fresh = others.restore(snapshot)
        assert fresh == [1]
        expected = snapshot.arrays["observations"]
        assert np.array_equal(observations[[0, 2]], expected[[0, 2]])
        assert not np.array_equal(observations[1], expected[1])
        assert others.snapshot().arrays["episodes"].tolist() == [0, 1, 0]
        assert others.snapshot().arrays["lengths"].tolist() == [5, 0, 5]
        # The others go on as ever, although one history is shorter.
        mine, theirs = (walk(each, 30, np.random.default_rng(2)) for each in (others, envs))
        for ours, original in zip(mine, theirs, strict=True):
            assert all(np.array_equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(ours, original, strict=True))

    def test_a_fresh_environments_number_is_that_within_the_whole(self):
        envs = SerialEnvs(lambda: Noisy(seeded=False), 2, seed=4, first_index=6)
        envs.reset()
        walk(envs, 5, np.random.default_rng(1))
        assert SerialEnvs(lambda: Noisy(seeded=False), 2, seed=4, first_index=6).restore(envs.snapshot())[1] == [6, 7]

    def test_an_environment_that_raises_on_the_way_back_begins_a_fresh_episode(self):
        envs = SerialEnvs(lambda: Faulty("none"), 1, seed=4)
        envs.reset()
        walk(envs, 4, np.random.default_rng(1))
        others = SerialEnvs(lambda: Faulty("raises", at=2, episode=0), 1, seed=4)
        assert others.restore(envs.snapshot())[1] == [0]


class AsksItsAction(gym.Wrapper):
    """A wrapper of the user's own that wants what NumPy's integers alone have."""

    def step(self, action):
        return self.env.step(action.item())


def test_only_gymnasiums_own_environments_are_given_pythons_integers():
    for make, takes_ints in (
        (lambda: gym.make("CartPole-v1"), True),
        (lambda: AsksItsAction(gym.make("CartPole-v1")), False),
        (lambda: gym.make("Pendulum-v1"), False),
    ):
        envs = SerialEnvs(make, 2, 0)
        assert envs._takes_ints is takes_ints
        envs.reset()
        for _ in range(3):
            envs.step(np.stack([envs.action_space.sample() for _ in range(2)]))
        envs.restore(envs.snapshot())
