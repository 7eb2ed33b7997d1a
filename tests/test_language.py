"""The language stages from Python and from the command line, on models that take milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import proximo
from proximo.errors import UserError
from proximo.language import config_of, read_stage_config, run_stage, written_settings
from proximo.models.folders import load_causal_lm, load_tokenizer
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import read_metrics
from proximo.stage_display import StageDisplay
from tests.commands import cut_at_rollout, said_by
from tests.tiny_language import tiny_model, tiny_tokenizer

QUIET = StageDisplay.choose(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data of every kind and a reward function."""
    monkeypatch.chdir(tmp_path)
    prompts = [{"prompt": f"the {word}"} for word in ("cat", "dog", "bird", "fish", "tree", "house")]
    write(tmp_path / "prompts.jsonl", prompts)
    write(tmp_path / "texts.jsonl", [row | {"completion": "sleeps ."} for row in prompts])
    write(tmp_path / "pairs.jsonl", [row | {"chosen": "sleeps .", "rejected": "eats red red ."} for row in prompts])
    (tmp_path / "rewards.py").write_text(
        "def score(prompts, responses):\n    return [len(text.split()) / 10 for text in responses]\n"
    )
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


ALIGN = dict(n_iterations=4, prompts_per_iteration=4, batch_size=4, max_new_tokens=6, samples_every=2, threads=1)


def numbers(run: Path) -> list[dict[str, Any]]:
    clocks = ("seconds", "tokens_per_second", "seconds_collecting", "seconds_updating")
    return [{k: v for k, v in row.items() if k not in clocks} for row in read_metrics(RunDirectory(run).metrics_path)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_causal_lm(path).state_dict())


class TestPython:
    def test_from_texts_to_an_aligned_model(self, model, folder):
        shared = dict(quiet=True, threads=1, batch_size=2, hold_out=0.3)
        tuned = proximo.sft(model, "texts.jsonl", run_dir="sft", **shared)
        reward = proximo.reward("sft", "pairs.jsonl", run_dir="rm", **shared)
        preferred = proximo.dpo("sft", "pairs.jsonl", run_dir="dpo", **shared)
        aligned = proximo.align("sft", "rm", "prompts.jsonl", run_dir="ppo", quiet=True, **ALIGN)
        assert [run.stage for run in (tuned, reward, preferred, aligned)] == ["sft", "reward", "dpo", "align"]
        assert len(numbers(aligned.path)) == aligned.metrics["iteration"] == 4
        assert any(
            not torch.equal(a, b)
            for a, b in zip(weights(folder / "sft").values(), weights(folder / "ppo").values(), strict=True)
        )
        assert load_tokenizer(folder / "ppo").get_vocab() == load_tokenizer(model).get_vocab()
        samples = [json.loads(line) for line in Path("ppo/samples.jsonl").read_text().splitlines()]
        assert [sample["iteration"] for sample in samples] == [2] * 4 + [4] * 4

    def test_a_function_of_the_callers_is_a_reward(self, model, folder):
        seen = []

        def score(prompts: list[str], responses: list[str]) -> list[float | None]:
            seen.extend(prompts)
            return [float(len(text)) for text in responses]

        run = proximo.align(
            model, score, "prompts.jsonl", algorithm="rloo", responses_per_prompt=2, quiet=True, **ALIGN
        )
        assert run.config.algorithm.baseline == "leave_one_out"
        assert set(seen) <= {f"the {word}" for word in ("cat", "dog", "bird", "fish", "tree", "house")}
        assert run.path.parent == Path("runs/align")

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"algorithm": "pppo"}, "no algorithm 'pppo'.*ppo"),
            ({"n_iteration": 3}, "n_iterations"),
            ({"beta": "much"}, "beta is 'much'"),
            ({"n_iterations": 0}, "n_iterations is 0"),
        ],
    )
    def test_bad_settings_leave_nothing_behind(self, model, folder, settings, said):
        with pytest.raises(UserError, match=said):
            proximo.align(model, "rewards.py:score", "prompts.jsonl", run_dir="run", quiet=True, **settings)
        assert not Path("run").exists()

    def test_what_fails_at_the_start_leaves_no_folder(self, model, folder):
        with pytest.raises(UserError, match="scor"):
            proximo.align(model, "rewards.py:scor", "prompts.jsonl", run_dir="run", quiet=True, **ALIGN)
        assert not Path("run").exists()


class TestSettings:
    @pytest.mark.parametrize("algorithm", ["ppo", "grpo", "dr_grpo", "dapo", "rloo"])
    def test_come_back_from_what_is_written(self, algorithm):
        named = dict(model="m", prompts="p", reward=("a", "b:c"), algorithm=algorithm, stop=("x",), learning_rate=3e-5)
        config = config_of("align", named | {"responses_per_prompt": 4}, where="test")
        written = written_settings("align", config)
        assert written.pop("stage") == "align"
        plain = json.loads(json.dumps({name: value for name, value in written.items() if value is not None}))
        assert config_of("align", plain, where="test") == config

    def test_places_are_kept_as_whole_paths(self, model, folder):
        run = proximo.align(model, "rewards.py:score", "prompts.jsonl", run_dir="run", quiet=True, **ALIGN)
        stage, config = read_stage_config(RunDirectory(run.path))
        assert stage == "align"
        assert config.prompts == str(folder / "prompts.jsonl")
        assert config.reward == (f"{folder / 'rewards.py'}:score",)


class TestCommandLine:
    def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(self, model, folder, capsys):
        settings = dict(model=str(model), prompts="prompts.jsonl", reward=("rewards.py:score",), checkpoint_every=2)
        config = config_of("align", ALIGN | settings, where="test")
        whole = run_stage("align", config, QUIET, "whole")
        with cut_at_rollout(5):  # three rollouts and a look at samples have passed
            run_stage("align", config, QUIET, "cut")
        code, _, error = said_by(capsys, "resume", "cut", "--quiet")
        assert code == 2
        assert "--allow-import" in error
        assert said_by(capsys, "resume", "cut", "--quiet", "--allow-import")[0] == 0
        assert numbers(folder / "cut") == numbers(whole.path)
        for name, tensor in weights(whole.path).items():
            assert torch.equal(tensor, weights(folder / "cut")[name])
        assert Path("cut/samples.jsonl").read_text() == Path("whole/samples.jsonl").read_text()

    def test_align_evaluate_sample_and_chat(self, model, folder, capsys, monkeypatch):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in ALIGN.items()]
        words = ["--model", str(model), "--reward", "rewards.py:score", "--prompts", "prompts.jsonl", *flags]
        code, out, error = said_by(capsys, "align", *words, "--algorithm", "grpo", "--run-dir", "run", "--json")
        assert code == 0, error
        assert json.loads(out)["iteration"] == 4
        assert "proximo evaluate" in error
        against = ["--against", str(model), "--reward", "rewards.py:score", "--prompts", "prompts.jsonl", "--json"]
        code, out, error = said_by(capsys, "evaluate", "run", *against, "--max-new-tokens", "5")
        assert code == 0, error
        result = json.loads(out)
        assert result["n_prompts"] == 6
        assert 0 <= result["win_rate"] <= 1
        assert result["best_of_reward_mean"] >= result["reward_mean_against"]
        code, out, _ = said_by(
            capsys, "sample", "run", "--prompts", "prompts.jsonl", "--n", "2", "--max-new-tokens", "3"
        )
        rows = [json.loads(line) for line in out.splitlines()]
        assert (code, len(rows)) == (0, 12)
        assert all(row["n_tokens"] <= 3 for row in rows)
        monkeypatch.setattr("builtins.input", iter(["the cat", ""]).__next__)
        monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
        monkeypatch.setattr("proximo.cli_models._asked", iter(["the cat", ""]).__next__)
        code, out, error = said_by(capsys, "chat", "run", "--max-new-tokens", "4")
        assert code == 0
        assert "no chat template" in error
        assert len(out.splitlines()) == 1

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["align", "--algorithm", "pop"], "no algorithm 'pop'"),
            (["align"], "align needs model"),
            (["sft"], "sft needs model"),
            (["sft", "--model", "nothing/here/at/all", "--data", "texts.jsonl"], "no model folder"),
            (["reward", "--config", "missing.toml"], "missing.toml cannot be read"),
            (["demo", "all"], "no demo 'all'"),
        ],
    )
    def test_bad_words_get_one_message(self, folder, capsys, words, said):
        code, _, error = said_by(capsys, *words)
        assert code == 2
        assert said in error
        assert "Traceback" not in error

    def test_evaluating_a_language_run_says_what_is_needed(self, model, folder, capsys):
        proximo.sft(model, "texts.jsonl", run_dir="sft", quiet=True, threads=1, batch_size=2)
        code, _, error = said_by(capsys, "evaluate", "sft")
        assert code == 2
        assert "--against" in error
        code, _, error = said_by(capsys, "watch", "sft")
        assert code == 2
        assert "proximo chat" in error

    def test_a_language_run_has_a_report(self, model, folder, capsys):
        proximo.sft(model, "texts.jsonl", run_dir="sft", quiet=True, threads=1, batch_size=2)
        code, out, _ = said_by(capsys, "report", "sft")
        assert code == 0
        assert out.startswith("# sft: sft")
        assert "held_out_loss" in out
        assert (folder / "sft" / "report" / "loss.png").is_file()
