"""Environments on a device: CartPole against Gymnasium's, other frameworks' arrays over DLPack, bad input."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from proximo.collect.device_envs import TorchCartPole, make_device_envs
from proximo.collect.dlpack_envs import DLPackEnvs
from proximo.collect.envs import Snapshot
from proximo.collect.make import find_factory
from proximo.errors import UserError

PUSHES = np.random.default_rng(0).integers(0, 2, (600, 6))


class TestTorchCartPole:
    def test_it_moves_as_gymnasiums_does(self):
        envs = TorchCartPole(6, seed=1)
        observations = envs.reset()
        theirs = [gym.make("CartPole-v1", disable_env_checker=True) for _ in range(6)]
        for env, state in zip(theirs, observations.double().numpy(), strict=True):
            env.reset()
            env.unwrapped.state = state  # type: ignore[attr-defined]
        n_ended = 0
        for pushes in PUSHES:
            step = envs.step(torch.from_numpy(pushes))
            for i, env in enumerate(theirs):
                observation, reward, terminated, truncated, _ = env.step(int(pushes[i]))
                np.testing.assert_allclose(step.final_observations[i], observation, rtol=1e-5, atol=1e-6)
                assert (step.rewards[i], step.terminated[i], step.truncated[i]) == (reward, terminated, truncated)
                if terminated:
                    n_ended += 1
                    env.reset()
                env.unwrapped.state = step.observations[i].double().numpy()  # type: ignore[attr-defined]
        assert n_ended > 100

    def test_a_balanced_pole_is_truncated_at_500_steps(self):
        envs = TorchCartPole(3, seed=0)
        observations = envs.reset()
        env = gym.make("CartPole-v1", disable_env_checker=True)
        env.reset()
        env.unwrapped.state = observations[0].double().numpy()  # type: ignore[attr-defined]
        for t in range(1, 501):
            x, velocity, angle, spin = observations.unbind(1)
            pushes = (angle + 0.3 * spin + 0.02 * x + 0.05 * velocity > 0).long()
            step = envs.step(pushes)
            _, reward, terminated, truncated, _ = env.step(int(pushes[0]))
            env.unwrapped.state = step.final_observations[0].double().numpy()  # type: ignore[attr-defined]
            assert (step.rewards[0], step.terminated[0], step.truncated[0]) == (reward, terminated, truncated)
            assert bool(step.truncated.all()) == (t == 500)
            assert not step.terminated.any()
            observations = step.observations.clone()
        # The next episode has begun, and the true end of the last one is not lost.
        assert observations.abs().max() <= 0.05
        assert step.final_observations.abs().max() > 0.05
        assert not envs.step(torch.zeros(3, dtype=torch.int64)).truncated.any()

    def test_a_shorter_limit(self):
        envs = make_device_envs("CartPole-v1", gym.make, 2, "cpu", 0, {}, max_episode_steps=3)
        envs.reset()
        assert [bool(envs.step(torch.tensor([0, 1])).truncated.all()) for _ in range(7)] == [False, False, True] * 2 + [
            False
        ]

    def test_the_reset_is_uniform_between_bounds(self):
        observations = TorchCartPole(20_000, seed=4).reset()
        assert observations.abs().max() <= 0.05
        assert observations.std(0).sub(0.1 / 12**0.5).abs().max() < 3e-4  # of a uniform of width 0.1

    def test_the_seed_decides_everything(self):
        def played(seed: int) -> torch.Tensor:
            envs = TorchCartPole(4, seed=seed)
            envs.reset()
            return torch.stack([envs.step(torch.from_numpy(pushes[:4])).observations.clone() for pushes in PUSHES])

        assert torch.equal(played(3), played(3))
        assert not torch.equal(played(3), played(4))

    def test_a_restored_one_goes_on_bit_for_bit(self):
        one, other = TorchCartPole(4, seed=7), TorchCartPole(4, seed=8)
        one.reset()
        for pushes in PUSHES[:20]:
            one.step(torch.from_numpy(pushes[:4]))
        before, fresh = other.restore(one.snapshot())
        assert fresh == []
        ends = []
        for envs in (one, other):
            steps = [envs.step(torch.from_numpy(pushes[:4])).observations.clone() for pushes in PUSHES[:300]]
            ends.append(torch.stack(steps))
        assert torch.equal(*ends)
        assert before.shape == (4, 4)

    def test_a_snapshot_of_another_number_of_poles_is_refused(self):
        with pytest.raises(ValueError, match="state is"):
            TorchCartPole(4).restore(TorchCartPole(3).snapshot())


class ArrayEnvs:
    """Four counters, in arrays of any framework; an episode is cut at 3 steps, the last counter's ends there."""

    num_envs = 4
    single_observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    single_action_space = spaces.Discrete(3)

    def __init__(self, to_array: Any = lambda tensor: tensor, **info: Any) -> None:
        self.to_array, self.info = to_array, info
        self.counts = torch.zeros(4, 2)
        self.actions: Any = None
        self.given: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        mask = torch.ones(4, dtype=torch.bool) if options is None else torch.as_tensor(options["reset_mask"])
        self.counts = torch.where(mask[:, None], 0.0, self.counts)
        return self._out(self.counts.clone()), {}

    def step(self, actions: Any) -> tuple[Any, ...]:
        self.actions = actions
        after = self.counts + 1
        done = after[:, 0] >= 3
        ended = done & (torch.arange(4) == 3)
        self.counts = torch.where(done[:, None], 0.0, after)
        info = {name: self._out(after) for name in self.info}
        outs = [self._out(x) for x in (self.counts.clone(), torch.ones(4), ended, done & ~ended)]
        return (*outs, info)

    def _out(self, tensor: torch.Tensor) -> Any:
        self.given.append(self.to_array(tensor))
        return self.given[-1]


KINDS = {"torch": lambda tensor: tensor, "numpy": lambda tensor: tensor.numpy()}


class TestDLPackEnvs:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("key", ["final_obs", "final_observation"])
    def test_arrays_are_looked_at_where_they_lie(self, kind, key):
        def address(array: Any) -> int:
            return array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data

        inner = ArrayEnvs(KINDS[kind], **{key: True})
        to_actions = np.from_dlpack if kind == "numpy" else None
        envs = DLPackEnvs(inner, device="cpu", autoreset="same_step", to_actions=to_actions)
        assert envs.reset().data_ptr() == address(inner.given[-1])
        actions = torch.tensor([0, 1, 2, 0])
        step = envs.step(actions)
        assert address(inner.actions) == actions.data_ptr()
        seen = [step.observations, step.rewards, step.terminated, step.truncated]
        assert [tensor.data_ptr() for tensor in seen] == [address(array) for array in inner.given[-4:]]
        envs.step(actions)
        step = envs.step(actions)
        assert step.terminated.tolist() == [False, False, False, True]
        assert step.truncated.tolist() == [True, True, True, False]
        assert step.observations.tolist() == [[0.0, 0.0]] * 4
        assert step.final_observations.tolist() == [[3.0, 3.0]] * 4
        assert step.valid.all()

    def test_read_only_arrays_are_copied(self):
        def read_only(tensor: torch.Tensor) -> np.ndarray:
            array = tensor.numpy().copy()
            array.flags.writeable = False
            return array

        envs = DLPackEnvs(ArrayEnvs(read_only, final_obs=True), device="cpu", autoreset="same_step")
        observations = envs.reset()
        observations += 1  # it is ours
        assert envs.step(torch.zeros(4)).rewards.tolist() == [1.0] * 4

    def test_float64_observations_become_float32(self):
        inner = ArrayEnvs(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        assert DLPackEnvs(inner, device="cpu", autoreset="next_step").reset().dtype == torch.float32

    @pytest.mark.parametrize("mode", list(AutoresetMode))
    def test_every_autoreset_mode_of_gymnasium_tells_the_same(self, mode):
        make = partial(gym.make, "CartPole-v1", disable_env_checker=True, max_episode_steps=7)
        envs = DLPackEnvs(
            SyncVectorEnv([make] * 3, autoreset_mode=mode), device="cpu", seed=5, to_actions=np.from_dlpack
        )
        before = envs.reset().clone()
        lengths = torch.zeros(3, dtype=torch.int64)
        for t in range(40):
            step = envs.step(torch.from_numpy(PUSHES[t, :3]))
            lengths += step.valid
            ended = (step.terminated | step.truncated) & step.valid
            assert (lengths[step.truncated] == 7).all()
            moved = (step.final_observations - before).abs().amax(1)
            assert (moved[step.valid] < 1.0).all()  # never from the end of an episode to the start of another
            assert (moved[step.valid] > 0.0).all()
            lengths[ended] = 0
            before = step.observations.clone()
            if mode is not AutoresetMode.NEXT_STEP:
                assert step.valid.all()
                assert (before[ended].abs() <= 0.05).all()
        assert step.observations.dtype == torch.float32
        envs.close()

    def test_resumed_it_begins_fresh_episodes(self):
        envs = DLPackEnvs(ArrayEnvs(), device="cpu", autoreset="next_step")
        observations, fresh = envs.restore(Snapshot({}, {"n_steps": 12}))
        assert fresh == [0, 1, 2, 3]
        assert observations.tolist() == [[0.0, 0.0]] * 4


def changed(**outputs: Any) -> Any:
    """ArrayEnvs, some of whose outputs are something else."""

    class Changed(ArrayEnvs):
        def step(self, actions: Any) -> tuple[Any, ...]:
            names = ("observations", "rewards", "terminated", "truncated", "info")
            given = dict(zip(names, super().step(actions), strict=True)) | outputs
            return tuple(given.values())

    return Changed()


class TestBadInput:
    @pytest.mark.parametrize(
        ("outputs", "message"),
        [
            ({"rewards": torch.ones(4, 1)}, r"the rewards have shape \(4, 1\).*\(4,\)"),
            ({"observations": torch.ones(4, 3)}, r"the observations have shape \(4, 3\).*\(4, 2\)"),
            ({"observations": {"a": torch.ones(4, 2)}}, "the observations are a dict"),
            ({"terminated": [False] * 4}, "the terminated are a list"),
            ({"rewards": "many"}, "torch cannot look at by DLPack"),
            ({"rewards": torch.ones(4, device="meta")}, "the rewards are on meta.*said to be on cpu"),
        ],
    )
    def test_arrays(self, outputs, message):
        envs = DLPackEnvs(changed(**outputs), device="cpu", autoreset="next_step", name="mine")
        envs.reset()
        with pytest.raises(UserError, match=f"mine: .*{message}"):
            envs.step(torch.zeros(4))

    def test_an_end_without_its_final_observation(self):
        envs = DLPackEnvs(ArrayEnvs(), device="cpu", autoreset="same_step")
        envs.reset()
        envs.step(torch.zeros(4))
        envs.step(torch.zeros(4))
        with pytest.raises(UserError, match="info has no 'final_obs'"):
            envs.step(torch.zeros(4))

    def test_what_is_missing_is_named(self):
        with pytest.raises(UserError, match="ArrayEnvs does not say how it resets"):
            DLPackEnvs(ArrayEnvs(), device="cpu")
        with pytest.raises(UserError, match=r"has no single_action_space.*give action_space="):
            DLPackEnvs(
                SimpleNamespace(num_envs=2, single_observation_space=ArrayEnvs.single_observation_space), device="cpu"
            )
        with pytest.raises(UserError, match="must be a Box"):
            DLPackEnvs(ArrayEnvs(), device="cpu", autoreset="next_step", observation_space=spaces.Discrete(3))

    @pytest.mark.parametrize(
        ("env_id", "kwargs", "limit", "message"),
        [
            ("Pendulum-v1", {}, None, "Pendulum-v1 has no version that lives on a device; CartPole-v1 has"),
            ("CartPole-v1", {"sutton_barto_reward": True}, None, "takes no arguments"),
            ("tests.environments:Identity", {}, None, "could not be made with n_envs=2"),
            ("tests.environments:Identity", {}, 5, "max_episode_steps is 5"),
        ],
    )
    def test_environments_that_are_not_to_be_had(self, env_id, kwargs, limit, message):
        with pytest.raises(UserError, match=message):
            make_device_envs(env_id, find_factory(env_id), 2, "cpu", 0, kwargs, max_episode_steps=limit)

    def test_a_factory_of_something_else(self):
        with pytest.raises(UserError, match="does not live on a device: it lacks n_envs, device"):
            make_device_envs("mine", lambda n_envs, device, seed: gym.make("CartPole-v1"), 2, "cpu", 0, {})
        with pytest.raises(UserError, match="made 3 environments on cpu, but it was asked for 2"):
            make_device_envs("mine", lambda n_envs, device, seed: TorchCartPole(3), 2, "cpu", 0, {})
