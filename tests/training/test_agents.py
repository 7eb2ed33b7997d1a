"""Several agents that learn at once: known optima, exact resume, policies that are loaded, and bad settings."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pettingzoo")

import proximo
from proximo.errors import UserError
from proximo.models.agents import AgentsPolicy, CentralActorCritic
from proximo.runs.checkpoint import load_checkpoint, newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import read_metrics
from proximo.training import agents
from proximo.training.agents_config import AgentsConfig
from proximo.training.agents_evaluate import make_parallel_envs
from proximo.training.config import with_settings
from proximo.training.control import CLOCK_METRICS
from tests.commands import said_by
from tests.several import Differ, Kinds, Luck, Mortal, Random

QUICK: dict[str, Any] = dict(
    n_envs=4, rollout_length=16, batch_size=32, total_steps=256, hidden_sizes=[8], quiet=True, debug=True
)
HERE = Path(__file__).parent.parent / "several.py"


def quick(env: Any, folder: Path, **settings: Any) -> Any:
    return proximo.train(env, run_dir=folder, **QUICK | settings)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    found = newest_checkpoint(RunDirectory(path).checkpoints)
    return {f"{part}/{name}": tensor for part, group in found.tensors.items() for name, tensor in group.items()}


LEARNING: dict[str, Any] = dict(
    rollout_length=32, batch_size=64, n_epochs=4, hidden_sizes=[16], learning_rate=5e-3, total_steps=6144, debug=False
)


class TestLearning:
    """Settings of which seeds 0 to 3 were tried."""

    def test_agents_that_share_a_policy_can_differ_because_they_are_told_who_they_are(self, tmp_path):
        run = quick(Differ, tmp_path / "run", **LEARNING)
        assert proximo.evaluate(run, Differ, episodes=4)["return_mean"] == 8.0

    def test_without_being_told_they_cannot(self, tmp_path):
        """Both see the same, so the best that one policy can do is to toss a coin: 4 of 8."""
        run = quick(Differ, tmp_path / "run", **LEARNING | dict(agent_id=False, total_steps=2048))
        assert proximo.evaluate(run, Differ, episodes=4)["return_mean"] == 0.0
        sampled = proximo.evaluate(run, Differ, episodes=100, deterministic=False)["return_mean"]
        assert 3.3 < sampled < 4.7

    def test_policies_of_their_own_need_not_be_told(self, tmp_path):
        run = quick(Differ, tmp_path / "run", agents="independent", **LEARNING)
        assert proximo.evaluate(run, Differ, episodes=4)["return_mean"] == 8.0

    def test_agents_of_different_kinds(self, tmp_path):
        run = quick(Kinds, tmp_path / "run", agents="by_space", gamma=0.5, **LEARNING)
        scores = proximo.evaluate(run, Kinds, episodes=10)["agents"]
        assert scores["pusher"] > -1.5  # 6 steps, at best 0 each; at 0 it would be -6
        assert scores["chooser"] == 10.0  # 2 wherever that is possible, else 1

    def test_a_central_critic_takes_out_luck_that_only_the_state_shows(self, tmp_path):
        """Which bit to name is learned by both; benchmarks/agents.py has more seeds."""
        settings = LEARNING | dict(total_steps=2048, learning_rate=3e-3, agent_id=False, hidden_sizes=[32])

        def wrong(critic: str) -> float:
            policy = quick(Luck, tmp_path / critic, critic=critic, **settings).policy["one"]
            log_probs = [policy.log_prob(np.array([bit], np.float32), int(bit > 0)) for bit in (-1.0, 1.0)]
            return 1.0 - float(np.exp(log_probs).mean())

        central, own = wrong("central"), wrong("own")
        assert central < 0.01
        assert own > 4 * central


class TestRuns:
    def test_rows_have_a_return_for_each_agent_and_for_all(self, tmp_path):
        run = quick(Mortal, tmp_path / "run")
        row = read_metrics(run.path / "metrics.jsonl")[-1]
        own = [row[f"return_mean/{agent}"] for agent in "abc"]
        assert row["return_mean"] == pytest.approx(np.mean(own))
        assert row["team_return_mean"] == pytest.approx(np.sum(own))
        assert row["env_steps"] == 256
        assert row["length_mean"] == 5.0
        # Of 5 steps a has 2, b 3 and c 5; 256 steps are 4 environments of 64 steps, 12 episodes and 4 steps more.
        assert row["agent_steps"] == 4 * (12 * 10 + 2 + 3 + 4)
        assert row["first_ratio_error"] < 1e-5

    @pytest.mark.parametrize("settings", [{}, dict(agents="independent"), dict(critic="central")], ids=str)
    def test_an_interrupted_run_ends_where_an_undisturbed_one_does(self, tmp_path, settings):
        settings = settings | dict(checkpoint_every=64, normalize_rewards=True, normalize_observations=True)
        whole = quick(Random, tmp_path / "whole", **settings)
        cut = self.cut_after(2, tmp_path / "cut", settings)
        proximo.resume(cut, Random, quiet=True)
        one, other = tensors_of(whole.path), tensors_of(cut)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
        rows = [
            [{k: v for k, v in row.items() if k not in CLOCK_METRICS} for row in read_metrics(path / "metrics.jsonl")]
            for path in (whole.path, cut)
        ]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 4

    def cut_after(self, n: int, folder: Path, settings: dict[str, Any]) -> Path:
        """A run that was killed after so many of its iterations."""
        iterate = agents.iterate
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(agents, "iterate", lambda *arguments: islice(iterate(*arguments), n))
            return quick(Random, folder, **settings).path

    def test_agents_that_learn_by_themselves_have_nothing_in_common(self, tmp_path):
        run = quick(Random, tmp_path / "run", agents="independent")
        state = newest_checkpoint(RunDirectory(run.path).checkpoints).state
        assert list(state["learners"]) == ["left", "right"]
        policy = run.policy
        left, right = (policy[agent].policy for agent in ("left", "right"))
        weights = zip(left.parameters(), right.parameters(), strict=True)
        assert all(not torch.equal(one, other) or not one.any() for one, other in weights)

    def test_an_agent_that_is_never_there_learns_nothing_and_harms_nothing(self, tmp_path):
        class Absent(Mortal):
            def reset(self, seed=None, options=None):
                observations, infos = super().reset(seed, options)
                self.agents.remove("b")
                return {a: o for a, o in observations.items() if a != "b"}, infos

        run = quick(Absent, tmp_path / "run", agents="independent")
        row = read_metrics(run.path / "metrics.jsonl")[-1]
        assert row["return_mean/b"] is None
        assert row["return_mean"] == pytest.approx((row["return_mean/a"] + row["return_mean/c"]) / 2)
        assert "policy_loss/a" in row
        assert "policy_loss/b" not in row

    def test_a_config_of_other_agents_does_not_fit(self, tmp_path):
        run = quick(Random, tmp_path / "run")
        config = with_settings(AgentsConfig(), QUICK_CONFIG | dict(agents="independent"), where="test")
        found = load_checkpoint(run.path / "checkpoints" / "step_000000000256")
        with pytest.raises(UserError, match="was made with other agents"):
            agents.restore(config, found, make_parallel_envs(config, Random))


QUICK_CONFIG = {name: value for name, value in QUICK.items() if name != "quiet"}


class TestPolicies:
    def test_all_at_once_and_one_by_one(self, tmp_path):
        policy = proximo.load(quick(Mortal, tmp_path / "run"))
        assert isinstance(policy, AgentsPolicy)
        assert (list(policy), len(policy)) == (["a", "b", "c"], 3)
        seen = {agent: np.array([1.0, 2.0, 3.0], np.float32) for agent in ("a", "c")}
        actions = policy(seen)
        assert set(actions) == {"a", "c"}
        assert actions["c"] == policy["c"](seen["c"])
        batch = np.stack([seen["a"], seen["a"] + 1])
        assert policy["a"](batch).shape == (2,)
        assert policy["a"].log_prob(batch, np.zeros(2, np.int64)).shape == (2,)
        told = [policy[agent].log_prob(seen["a"], 0) for agent in "abc"]
        assert len({float(value) for value in told}) == 3  # one network, three numbers

    def test_sampled_actions_can_be_repeated_and_are_each_agents_own(self, tmp_path):
        policy = proximo.load(quick(Random, tmp_path / "run", agent_id=False))
        seen = {agent: np.zeros(2, np.float32) for agent in ("left", "right")}
        draws = [policy(seen, deterministic=False, seed=seed) for seed in range(40)]
        assert draws == [policy(seen, deterministic=False, seed=seed) for seed in range(40)]
        assert any(draw["left"] != draw["right"] for draw in draws)

    def test_with_a_central_critic_acting_needs_the_own_observation_alone(self, tmp_path):
        policy = proximo.load(quick(Luck, tmp_path / "run", critic="central", agent_id=False))
        own = policy["one"]
        assert isinstance(own.policy, CentralActorCritic)
        assert own(np.ones(1, np.float32)) in (0, 1)
        assert np.isfinite(own.policy.value(np.ones(1, np.float32), state=np.array([1.0, -1.0, 1.0])))

    def test_an_unknown_agent(self, tmp_path):
        policy = proximo.load(quick(Mortal, tmp_path / "run"))
        with pytest.raises(UserError, match=r"no agent 'd'\. There are: a, b, c"):
            policy({"d": np.zeros(3)})


class TestCommands:
    def test_train_evaluate_resume_and_watch(self, tmp_path, capsys):
        flags = ["--n-envs", "2", "--rollout-length", "16", "--batch-size", "16", "--total-steps", "64"]
        folder = str(tmp_path / "run")
        code, out, error = said_by(
            capsys, "train", f"{HERE}:Luck", *flags, "--critic", "central", "--run-dir", folder, "--json"
        )
        assert code == 0, error
        assert json.loads(out)["env_steps"] == 64
        assert "the critic also sees a state of 3" in error
        code, out, error = said_by(capsys, "evaluate", folder, "--allow-import", "--episodes", "20", "--json")
        told = json.loads(out)
        assert set(told["agents"]) == {"one", "two"}
        assert told["team_return_mean"] == pytest.approx(2 * told["return_mean"])
        code, out, error = said_by(capsys, "evaluate", folder, "--allow-import", "--episodes", "5")
        assert "team" in out
        code, out, error = said_by(capsys, "resume", folder, "--allow-import", "--total-steps", "128", "--json")
        assert code == 0, error
        assert "exact" in error
        assert json.loads(out)["env_steps"] == 128
        code, out, error = said_by(capsys, "watch", folder, "--allow-import")
        assert code == 2
        assert "no render_mode 'rgb_array'" in error

    @pytest.mark.parametrize(
        ("flags", "told"),
        [
            (["--agents", "shared"], "are not equal"),
            (["--agents", "together"], "invalid choice"),
            (["--agents", "independent", "--vectorization", "workers"], "are stepped serially"),
            (["--agents", "independent", "--update-path", "compiled"], "auto, eager and fused"),
            (["--agents", "independent", "--on-environment-fault", "restart"], "are not made anew"),
        ],
    )
    def test_bad_settings(self, tmp_path, capsys, flags, told):
        code, out, error = said_by(capsys, "train", f"{HERE}:Kinds", *flags, "--run-dir", str(tmp_path / "run"))
        assert code == 2
        assert told in " ".join((out + error).split())
        assert not (tmp_path / "run").exists()

    def test_these_settings_are_for_several_agents(self, tmp_path):
        with pytest.raises(UserError, match="there is no setting 'agents'"):
            proximo.train("CartPole-v1", agents="shared", run_dir=tmp_path / "run")

    def test_check_env_says_what_it_is(self, capsys):
        code, out, _ = said_by(capsys, "check-env", f"{HERE}:Luck")
        assert code == 2
        assert "parallel_api_test" in out

    def test_a_package_that_is_not_there(self, capsys, monkeypatch):
        for name in [name for name in sys.modules if name.startswith("mpe2.")]:  # another test may have imported it
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "mpe2", None)
        code, _, error = said_by(capsys, "train", "mpe2.simple_spread_v3:parallel_env", "--total-steps", "2048")
        assert code == 2
        assert 'pip install -c constraints.txt -e ".[agents]"' in error


@pytest.mark.slow
def test_simple_spread_of_the_particle_environments(tmp_path):
    pytest.importorskip("mpe2")
    settings = dict(QUICK, n_envs=2, total_steps=128, critic="central", hidden_sizes=[16])
    run = proximo.train("mpe2.simple_spread_v3:parallel_env", run_dir=tmp_path / "run", **settings)
    scores = proximo.evaluate(run, episodes=4, allow_import=True)
    assert set(scores["agents"]) == {"agent_0", "agent_1", "agent_2"}
    assert scores["length_mean"] == 25.0
