"""`proximo.train`, `resume`, `load`, `evaluate` as a Python caller uses them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
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


def test_settings_in_a_dict_are_told_to_be_keywords(tmp_path: Path) -> None:
    with pytest.raises(proximo.UserError, match="as keywords"):
        proximo.train("CartPole-v1", {"seed": 1}, run_dir=tmp_path / "run")  # type: ignore[arg-type]


def test_a_run_can_be_given_wherever_its_directory_can(tmp_path: Path) -> None:
    run = proximo.train(Corridor, run_dir=tmp_path / "run", **SMALL)
    assert proximo.load(run).state_dict().keys() == run.policy.state_dict().keys()
    assert proximo.resume(run, Corridor, total_steps=1024, quiet=True).env_steps == 1024


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    run = proximo.train(Corridor, run_dir=tmp_path / "run", checkpoint_every=256, **SMALL)
    (sorted((run.path / "checkpoints").glob("step_*"))[-1] / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="Step 448 is used|Step 256 is used"):
        proximo.load(run)
    with pytest.warns(UserWarning, match=r"instead of what was damaged: step_0+512"):
        assert proximo.evaluate(run, Corridor, episodes=1)["step"] < 512


def test_an_environment_that_fails_to_close_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Clings(Corridor):
        def close(self):
            raise RuntimeError("the door is stuck")

    assert proximo.train(Clings, run_dir=tmp_path / "run", **SMALL).env_steps == 512
    assert "the door is stuck" in capsys.readouterr().err


def test_of_two_runs_in_one_folder_one_is_trained(tmp_path: Path) -> None:
    def attempt(seed: int) -> object:
        try:
            return proximo.train(Corridor, run_dir=tmp_path / "run", seed=seed, **SMALL)
        except proximo.UserError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        runs = [each for each in pool.map(attempt, (1, 2)) if isinstance(each, proximo.Run)]
    assert len(runs) == 1
    assert f"seed = {runs[0].config.seed}\n" in (tmp_path / "run" / "config.toml").read_text()


def test_a_folder_that_another_process_took_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = proximo.train(Corridor, run_dir=tmp_path / "run", **SMALL)
    before = (run.path / "config.toml").read_bytes()
    monkeypatch.setattr(proximo.api, "new_run", lambda *_: proximo.api.RunDirectory(run.path))
    with pytest.raises(proximo.UserError, match="another process"):
        proximo.train(Corridor, run_dir=run.path, seed=9, **SMALL)
    assert (run.path / "config.toml").read_bytes() == before


def test_a_run_that_is_being_trained_is_locked_before_its_checkpoint_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = proximo.train(Corridor, run_dir=tmp_path / "run", **SMALL)

    def never(*_: object) -> None:
        raise AssertionError("read without the lock")

    monkeypatch.setattr(proximo.api, "newest_checkpoint", never)
    with (
        proximo.api.locked(proximo.api.RunDirectory(run.path)),
        pytest.raises(proximo.UserError, match="being trained"),
    ):
        proximo.resume(run, Corridor, quiet=True)


def test_no_second_set_of_a_persons_environments_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(Corridor):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    proximo.train(Counted, run_dir=tmp_path / "run", **(SMALL | dict(quiet=False)))
    assert len(made) == 2 + 1  # one to see its spaces


def test_no_name_is_advised_that_leads_nowhere(tmp_path: Path) -> None:
    run = proximo.train(lambda: Corridor(4), run_dir=tmp_path / "run", **SMALL)
    with pytest.raises(proximo.UserError, match=r"proximo\.resume\(run, env\)") as caught:
        proximo.resume(run)
    assert "--allow-import" not in str(caught.value)


@pytest.mark.parametrize("value", ["\ud800", {"deep": ["\ud800"]}])
def test_arguments_that_no_file_can_hold_leave_no_folder(value: object, tmp_path: Path) -> None:
    with pytest.raises(proximo.UserError, match="toml cannot hold"):
        proximo.train(lambda **_: Corridor(4), env_kwargs={"name": value}, run_dir=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()
