from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import proximo
from proximo.collect.demonstrations import Demonstrations
from proximo.errors import UserError
from proximo.training import clone as cloning
from proximo.training.clone import BOUND_MARGIN, CloneConfig
from proximo.training.config import ControlConfig, with_settings
from tests.commands import said_by

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


class TwoStates(gym.Env):
    """Goes back and forth between two states; reward 1 a step, for ever, cut off after 20 steps."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Discrete(2), spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.t = 0
        return 0, {}

    def step(self, action):
        self.t += 1
        return self.t % 2, 1.0, False, self.t == 20, {}


TRUTH = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])


def two_state_file(path: Path, *, n_episodes: int = 40, has_finals: bool = True) -> tuple[Path, np.ndarray]:
    """Episodes of a known stochastic policy, and its actions."""
    random = np.random.default_rng(0)
    states = np.tile(np.arange(20) % 2, n_episodes)
    actions = np.array([random.choice(3, p=TRUTH[state]) for state in states])
    ends = np.arange(20 * n_episodes) % 20 == 19
    finals = {"final_observations": np.zeros(n_episodes, int)} if has_finals else {}
    np.savez(
        path / "two.npz",
        observations=states,
        actions=actions,
        rewards=np.ones(len(states)),
        terminations=np.zeros(len(states)),
        truncations=ends,
        **finals,
    )
    return path / "two.npz", actions


def balancing(path: Path, *, n_episodes: int = 12, noise: float = 0.2) -> Path:
    """CartPole by a controller that now and then does anything: nobody has to be trained for it."""
    env, random = gym.make("CartPole-v1"), np.random.default_rng(1)
    seen, did, over, cut, final = [], [], [], [], []
    for episode in range(n_episodes):
        observation, _ = env.reset(seed=episode)
        terminated = truncated = False
        while not (terminated or truncated):
            seen.append(observation)
            x, v, angle, spin = observation
            action = int(angle + 0.5 * spin + 0.02 * x + 0.05 * v > 0)
            did.append(int(random.integers(2)) if random.random() < noise else action)
            observation, _, terminated, truncated, _ = env.step(did[-1])
            over.append(terminated)
            cut.append(truncated)
        final.append(observation)
    arrays = dict(observations=seen, actions=did, rewards=np.ones(len(did)), terminations=over, truncations=cut)
    np.savez(path / "balance.npz", final_observations=final, **arrays)
    return path / "balance.npz"


@pytest.fixture(scope="module")
def balance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return balancing(tmp_path_factory.mktemp("balance"))


@pytest.fixture(scope="module")
def balancer(balance: Path) -> proximo.ClonedRun:
    run_dir = balance.parent / "clone"
    return proximo.clone("CartPole-v1", balance, run_dir=run_dir, quiet=True, n_epochs=12, eval_episodes=10)


# --- what is learned ------------------------------------------------------------------------------


@pytest.mark.parametrize("has_finals", [True, False])
def test_a_known_policy_and_its_value_are_recovered(tmp_path: Path, has_finals: bool) -> None:
    file, actions = two_state_file(tmp_path, has_finals=has_finals)
    settings: dict[str, Any] = dict(gamma=0.9, hidden_sizes=(), eval_episodes=2, seed=3, normalize_observations=False)
    run = proximo.clone(
        TwoStates, file, run_dir=tmp_path / "run", quiet=True, hold_out=0.0, n_epochs=40, learning_rate=0.02, **settings
    )
    table = np.stack([np.bincount(actions[state::2], minlength=3) / len(actions[state::2]) for state in range(2)])
    states = np.repeat([0, 1], 3)
    learned = np.exp(run.policy.log_prob(states, np.tile(np.arange(3), 2))).reshape(2, 3)
    np.testing.assert_allclose(learned, table, atol=0.03)
    # No episode ends by itself: 1 / (1 - 0.9), where a return that stops at the cut would be 6.3 on average.
    np.testing.assert_allclose(run.policy.value(np.arange(2)), 10.0, rtol=0.02)
    assert run.measured["return_mean"] == run.measured["data_return_mean"] == 20.0


def test_a_controller_is_cloned(balancer: proximo.ClonedRun, balance: Path) -> None:
    measured = balancer.measured
    with np.load(balance) as file:
        assert measured["data_steps"] == len(file["actions"])
    assert measured["return_mean"] >= 0.9 * measured["data_return_mean"]
    assert measured["accuracy_held_out"] > 0.8  # a tenth of its actions are the other one by chance
    rows = [json.loads(line) for line in (balancer.path / "metrics.jsonl").read_text().splitlines()]
    actor = [row["log_prob_held_out"] for row in rows if row["phase"] == "actor"]
    assert measured["log_prob_held_out"] == pytest.approx(max(actor), abs=1e-6)  # the best weights, not the last
    assert {row["phase"] for row in rows} == {"actor", "critic"}


def test_the_same_seed_gives_the_same_clone_and_another_one_another(balance: Path, tmp_path: Path) -> None:
    policies = [
        proximo.clone(
            "CartPole-v1", balance, run_dir=tmp_path / f"{k}", quiet=True, n_epochs=1, eval_episodes=0, seed=seed
        ).policy
        for k, seed in enumerate((1, 1, 2))
    ]
    weights = [torch.cat([weight.flatten() for weight in policy.parameters()]) for policy in policies]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# --- the pieces -----------------------------------------------------------------------------------


def config_for(**settings: Any) -> ControlConfig:
    return with_settings(ControlConfig(), settings, where="the test")


def demonstrated(actions: np.ndarray, observations: np.ndarray | None = None) -> Demonstrations:
    n = len(actions)
    seen = np.zeros((n, 2), np.float32) if observations is None else observations
    ends = np.array(sorted({n // 2 - 1, n - 1} - {-1}))
    return Demonstrations(seen, actions, np.arange(n, dtype=float), np.zeros(n, bool), ends, None)


@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [1, 9], [10]])
def test_whole_episodes_are_held_out(lengths: list[int]) -> None:
    learned, held_out = cloning.split(np.array(lengths), 0.25, seed=0)
    assert sorted([*learned, *held_out]) == list(range(sum(lengths)))
    assert len(learned)
    assert len(held_out)
    if len(lengths) > 1:
        episode = np.repeat(np.arange(len(lengths)), lengths)
        assert not set(episode[learned]) & set(episode[held_out])
    assert len(cloning.split(np.array(lengths), 0.0, seed=0)[1]) == 0


@pytest.mark.parametrize("kind", ["gaussian", "squashed_gaussian", "beta"])
def test_actions_on_the_bounds_are_learned_from(kind: str) -> None:
    space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))
    config = config_for(distribution=kind)
    policy = cloning.new_policy(config, spaces.Box(-1, 1, (2,)), space)
    actions = np.array([[-2, 0], [2, 10], [0, 5], [1, 2.5]] * 5, np.float32)
    data = cloning.prepare(config, CloneConfig(hold_out=0.0), policy, demonstrated(actions))
    log_probs = cloning.log_likelihoods(policy, data.batch)
    assert torch.isfinite(log_probs).all()
    back = policy.to_environment(data.batch.actions[:, 0])
    np.testing.assert_allclose(back, actions, atol=1.01 * BOUND_MARGIN * 5)
    np.testing.assert_allclose(back[2:4], actions[2:4], atol=1e-5)
    if kind != "gaussian":  # the bounds do not outweigh the rest by orders of magnitude
        assert log_probs.min() > -100


def test_bounds_within_a_dict_of_actions() -> None:
    from proximo.models.packing import PackedActions

    source = spaces.Dict({"aim": spaces.Box(-2, 2, (1,), np.float32), "button": spaces.Discrete(3, start=1)})
    space, config = PackedActions(source), config_for(distribution="beta")
    policy = cloning.new_policy(config, spaces.Box(-1, 1, (2,)), space)
    rows = np.array([[2.0, 1.0], [-2.0, 3.0]])
    back = policy.to_environment(torch.from_numpy(cloning.sampled_actions(policy, rows)))
    np.testing.assert_allclose(back, [[2 - 2e-3, 1], [-2 + 2e-3, 3]], atol=1e-6)


def test_normalizers_take_in_what_is_learned_from_alone() -> None:
    config = config_for(normalize_observations=True, normalize_rewards=True, gamma=0.5)
    policy = cloning.new_policy(config, spaces.Box(-9, 9, (2,)), spaces.Discrete(2))
    observations = np.random.default_rng(0).normal(2.0, 3.0, (40, 2)).astype(np.float32)
    data = cloning.prepare(config, CloneConfig(hold_out=0.5), policy, demonstrated(np.zeros(40, int), observations))
    own = observations[data.learned.numpy()]
    np.testing.assert_allclose(policy.observation_mean, own.mean(0), rtol=1e-5)
    np.testing.assert_allclose(policy.observation_variance, own.var(0), rtol=1e-5)
    running, expected = 0.0, []
    for reward in np.arange(40.0)[data.learned.numpy()]:
        running = reward + 0.5 * running
        expected.append(running)
    assert policy.reward_scale == pytest.approx(np.std(expected), rel=1e-6)


def test_a_forbidden_action_is_told() -> None:
    from proximo.models.packing import PackedObservations

    seen = PackedObservations(spaces.Box(-1, 1, (2,)), (3,))
    rows = seen.pack_many(np.zeros((4, 2)), np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 1]]), (4,))
    policy = cloning.new_policy(config_for(), seen, spaces.Discrete(3))
    with pytest.raises(UserError, match=r"step 3 \(episode 1, its step 1\) takes an action that its action mask"):
        cloning.prepare(config_for(), CloneConfig(), policy, demonstrated(np.array([0, 1, 1, 1]), rows))


def test_images_are_cloned_too() -> None:
    config = config_for()
    space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    policy = cloning.new_policy(config, space, spaces.Discrete(2))
    images = np.zeros((8, 36, 36, 1), np.uint8)
    data = cloning.prepare(config, CloneConfig(), policy, demonstrated(np.arange(8) % 2, images))
    assert torch.isfinite(cloning.log_likelihoods(policy, data.batch)).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(hold_out=1.0), "hold_out is 1.0"),
        (dict(n_epochs=0), "n_epochs is 0"),
        (dict(patience=2.5), "patience is 2.5"),
        (dict(learning_rate=-1.0), "learning_rate is -1.0"),
        (dict(hold_ot=0.1), "there is no setting 'hold_ot'"),
        (dict(hidden_sizes=(0,)), "hidden_sizes"),
        (dict(memory="gru"), "cannot be cloned here.*--memory none"),
        (dict(distribution="gsde"), "Clone with --distribution gaussian"),
    ],
)
def test_impossible_settings(balance: Path, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        proximo.clone("CartPole-v1", balance, run_dir=tmp_path / "run", quiet=True, **settings)
    assert not (tmp_path / "run").exists()


# --- PPO from there -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_ppo_begins_near_the_clone_and_beats_a_beginning_from_nothing(
    balancer: proximo.ClonedRun, tmp_path: Path, seed: int
) -> None:
    common: dict[str, Any] = dict(total_steps=4096, seed=seed, keep_checkpoints=99, quiet=True)
    ours = proximo.train("CartPole-v1", run_dir=tmp_path / "ours", init_from=balancer, learning_rate=1e-4, **common)
    scratch = proximo.train("CartPole-v1", run_dir=tmp_path / "scratch", **common)
    before = balancer.policy.state_dict()
    first = proximo.load(ours, checkpoint="0").state_dict()
    assert all(torch.equal(first[name], value) for name, value in before.items())
    scores = [proximo.evaluate(run, episodes=10)["return_mean"] for run in (ours, scratch)]
    assert scores[0] >= 0.8 * balancer.measured["return_mean"]
    assert scores[0] > scores[1] + 100
    config = (ours.path / "config.toml").read_text()
    assert f'init_from = "{balancer.path}"' in config


def test_a_run_that_began_from_another_resumes_exactly_without_it(balancer: proximo.ClonedRun, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(balancer.path, copy)
    constant = dict(learning_rate_schedule="constant", clip_schedule="constant", quiet=True, seed=5)
    begin = dict(init_from=str(copy / "checkpoints" / "latest"), **constant)
    whole = proximo.train("CartPole-v1", run_dir=tmp_path / "whole", total_steps=1024, **begin)
    part = proximo.train("CartPole-v1", run_dir=tmp_path / "part", total_steps=512, **begin)
    shutil.rmtree(copy)
    proximo.resume(part, total_steps=1024, quiet=True)
    one, other = whole.policy.state_dict(), proximo.load(part.path).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_any_control_run_may_be_begun_from(tmp_path: Path) -> None:
    first = proximo.train("CartPole-v1", run_dir=tmp_path / "first", total_steps=512, quiet=True)
    second = proximo.train(
        "CartPole-v1", run_dir=tmp_path / "second", total_steps=256, init_from=first, learning_rate=1e-9, quiet=True
    )
    for weight, other in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        torch.testing.assert_close(weight, other, atol=1e-6, rtol=0)


def test_a_run_that_explores_begins_from_one_that_does_not_and_the_other_way_round(tmp_path: Path) -> None:
    """All but the intrinsic critic is taken over."""
    small: dict[str, Any] = dict(total_steps=1024, n_envs=4, rollout_length=32, batch_size=64, quiet=True)
    explores = small | {"exploration": "rnd", "warmup_rollouts": 7, "learning_rate": 1e-9}
    plain = proximo.train("CartPole-v1", run_dir=tmp_path / "plain", **small)
    exploring = proximo.train("CartPole-v1", run_dir=tmp_path / "exploring", init_from=plain, **explores)
    assert exploring.policy.intrinsic_critic is not None
    for name, weight in plain.policy.named_parameters():
        torch.testing.assert_close(exploring.policy.get_parameter(name), weight, atol=1e-6, rtol=0)
    back = proximo.train("CartPole-v1", run_dir=tmp_path / "back", init_from=exploring, learning_rate=1e-9, **small)
    torch.testing.assert_close(back.policy.actor[0].weight, plain.policy.actor[0].weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("env", "settings", "said"),
    [
        ("CartPole-v1", dict(hidden_sizes=(32,)), r"has hidden_sizes \[64, 64\].*--hidden-sizes 64 64"),
        ("CartPole-v1", dict(normalize_observations=True), "normalize_observations False.*--no-normalize-observations"),
        ("Acrobot-v1", {}, "observation space.*of another task"),
        ("CartPole-v1", dict(init_from="nowhere/run"), "There is no nowhere/run"),
    ],
)
def test_what_cannot_be_begun_from(
    balancer: proximo.ClonedRun, tmp_path: Path, env: str, settings: dict[str, Any], said: str
) -> None:
    settings = {"init_from": balancer.path} | settings
    with pytest.raises(UserError, match=said):
        proximo.train(env, run_dir=tmp_path / "run", quiet=True, **settings)
    assert not (tmp_path / "run").exists()


# --- from the command line ------------------------------------------------------------------------


def test_record_clone_and_all_that_runs_are_good_for(
    balancer: proximo.ClonedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "episodes.npz", tmp_path / "run"
    words = ("record", str(balancer.path), "--output", str(file), "--episodes", "4", "--json")
    code, out, _ = said_by(capsys, *words)
    told = json.loads(out)
    assert (code, told["episodes"], told["deterministic"]) == (0, 4, True)
    evaluated = proximo.evaluate(balancer.path, episodes=4)
    assert told["return_mean"] == evaluated["return_mean"]
    code, _, error = said_by(capsys, *words)
    assert (code, "nothing is written over" in error) == (2, True)

    words = ("clone", "CartPole-v1", "--data", str(file), "--run-dir", str(run), "--n-epochs", "2")
    code, out, error = said_by(capsys, *words, "--eval-episodes", "2", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["data_return_mean"] == evaluated["return_mean"]
    assert {"log_prob_held_out", "accuracy_held_out", "return_mean", "sampled_return_mean"} <= set(told)
    assert f"--init-from {run}" in error
    assert said_by(capsys, "evaluate", str(run), "--episodes", "2")[0] == 0
    code, out, _ = said_by(capsys, "report", str(run))
    assert (code, "cloned from data" in out) == (0, True)
    assert (run / "report" / "cloning.png").exists()
    code, _, error = said_by(capsys, "resume", str(run))
    assert (code, "--init-from" in error) == (2, True)
    config = str(run / "config.toml")
    words = ("train", "CartPole-v1", "--config", config, "--init-from", str(run), "--total-steps", "256", "--quiet")
    assert said_by(capsys, *words, "--run-dir", str(tmp_path / "ppo"))[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("clone",), "needs an environment right after it"),
        (("clone", "CartPole-v1"), "needs data"),
        (("clone", "CartPole-v1", "--data", "none.npz"), "There is no file"),
        (("clone", "CartPole-v7", "--data", "none.npz"), "There is no environment"),
        (("record", "nowhere", "--output", "x.npz"), "There is no nowhere"),
        (("record", "nowhere", "--output", "x.json"), "FILE.npz"),
        (("record", "nowhere", "--output", "none/x.npz"), "There is no folder"),
    ],
)
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = said_by(capsys, *words)
    assert (code, said in error) == (2, True)
