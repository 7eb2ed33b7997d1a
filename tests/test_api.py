"""`proximo.train`, `resume`, `load`, `evaluate` as a Python caller uses them."""

from __future__ import annotations

import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import proximo
from proximo.collect.make import make_env


class Corridor(gym.Env):
    """Walk right five times; the observation is the place."""

    observation_space = gym.spaces.Box(0.0, 5.0, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length: int = 5) -> None:
        self.length, self.place, self.steps = length, 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = 0, 0
        return np.array([self.place], np.float32), {}

    def step(self, action):
        self.steps += 1
        self.place = max(0, self.place + (1 if action == 1 else -1))
        done = self.place == self.length
        return np.array([self.place], np.float32), float(done), done, self.steps == 50, {}


SMALL = dict(total_steps=512, n_envs=2, rollout_length=32, batch_size=32, n_epochs=1, quiet=True)


@pytest.mark.parametrize("env", [Corridor, lambda: Corridor(4), "CartPole-v1"], ids=["class", "factory", "id"])
def test_train_load_evaluate(env, tmp_path: Path) -> None:
    run = proximo.train(env, run_dir=tmp_path / "run", seed=1, **SMALL)
    assert run.env_steps == 512
    policy = proximo.load(run.path)
    scores = proximo.evaluate(run, env, episodes=3)
    assert scores["episodes"] == 3
    assert policy.state_dict().keys() == run.policy.state_dict().keys()


def test_a_policy_takes_one_or_many_in_numpy_or_torch(tmp_path: Path) -> None:
    policy = proximo.train("CartPole-v1", run_dir=tmp_path / "run", **SMALL).policy
    many = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    actions = policy(many)
    assert isinstance(actions, np.ndarray)
    assert actions.shape == (7,)
    assert policy(many[0]) == actions[0]
    assert torch.equal(policy(torch.from_numpy(many)), torch.from_numpy(actions))
    assert policy.value(many).shape == (7,)
    probabilities = np.exp([policy.log_prob(many[0], np.array(action)) for action in (0, 1)])
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-6)
    assert actions[0] == probabilities.argmax()
    sampled = np.array([policy(many[0], deterministic=False, seed=seed) for seed in range(400)])
    assert sampled.mean() == pytest.approx(probabilities[1], abs=0.1)


def test_the_value_is_in_the_environments_own_units(tmp_path: Path) -> None:
    """A reward of 1,000 a step forever, discount 0.5: the value is near 2,000 though learning scales rewards."""

    class Generous(Corridor):
        def step(self, action):
            observation, _, _, _, info = super().step(action)
            self.place = 0
            return observation * 0, 1000.0, False, self.steps >= 50, info

    run = proximo.train(
        Generous,
        run_dir=tmp_path / "run",
        **(SMALL | dict(total_steps=20_000, n_epochs=10, gamma=0.5, learning_rate=3e-3, normalize_rewards=True)),
    )
    assert float(run.policy.value(np.zeros(1, np.float32))) == pytest.approx(2000.0, rel=0.05)


def test_a_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    first = proximo.train(Corridor, run_dir=tmp_path / "run", **SMALL)
    more = proximo.resume(first.path, Corridor, total_steps=1024, quiet=True)
    assert more.env_steps == 1024
    assert more.config.total_steps == 1024
    again = proximo.resume(first.path, Corridor, quiet=True)
    assert again.env_steps == 1024


def test_training_works_outside_the_main_thread_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    runs = []
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    thread = threading.Thread(target=lambda: runs.append(proximo.train(Corridor, run_dir=tmp_path / "run", **SMALL)))
    thread.start()
    thread.join()
    assert runs[0].env_steps == 512
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"clip_epsilom": 0.1}, "clip_epsilon"),
        ({"gamma": "high"}, "gamma"),
        ({"n_envs": 2.5}, "n_envs"),
        ({"hidden_sizes": (64, 0)}, "hidden_sizes"),
    ],
)
def test_settings_are_checked_by_name_and_kind(settings: dict, expected: str, tmp_path: Path) -> None:
    with pytest.raises(proximo.UserError, match=expected):
        proximo.train("CartPole-v1", run_dir=tmp_path / "run", quiet=True, **settings)
    assert not (tmp_path / "run").exists()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    one, same, other = (
        proximo.train(Corridor, run_dir=tmp_path / name, seed=seed, **SMALL).policy.state_dict()
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["actor.0.weight"], other["actor.0.weight"])


def test_loading_executes_nothing_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = proximo.train(Corridor, run_dir=tmp_path / "run", **SMALL)
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('stolen').touch()\n")
    config = run.path / "config.toml"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("env_id")]
    for env_id in ("evil.py:Env", "evil:Env-v0", "evil:CartPole-v1"):
        config.write_text("\n".join([f'env_id = "{env_id}"', *lines]))
        proximo.load(run.path)
        for use in (proximo.evaluate, proximo.resume):
            with pytest.raises(proximo.UserError, match="allow"):
                use(run.path)
    assert not (tmp_path / "stolen").exists()


def test_a_time_limit_of_the_config_reaches_the_environment(tmp_path: Path) -> None:
    run = proximo.train(Corridor, run_dir=tmp_path / "run", max_episode_steps=3, **SMALL)
    assert proximo.evaluate(run, Corridor, episodes=4)["length_mean"] == 3
    assert make_env(Corridor, "Corridor", {}, max_episode_steps=3).spec is None
