"""What the language commands refuse in words, and what they tell people to type next."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import proximo
from proximo import cli_language, cli_models, language
from proximo.errors import UserError
from proximo.language import StageRun, config_of
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import read_metrics
from proximo.stage_display import StageDisplay
from proximo.training.align_config import AlignConfig
from tests.commands import cut_at_rollout, said_by
from tests.tiny_language import save_tiny, tiny_model, tiny_tokenizer

QUIET = StageDisplay.choose(quiet=True)
ALIGN = dict(
    n_iterations=3, prompts_per_iteration=2, batch_size=2, max_new_tokens=4, n_samples=0, threads=1, quiet=True
)
BIG = "99999999999999999999"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model in a working folder with prompts and a reward."""
    monkeypatch.chdir(tmp_path)
    write("prompts.jsonl", [{"prompt": f"the {word}"} for word in ("cat", "dog", "bird")])
    write("texts.jsonl", [{"prompt": "the cat", "completion": "sleeps ."}] * 2)
    Path("rw.py").write_text("def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    return str(save_tiny(tmp_path / "model"))


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(text)) for text in responses]


def rewards_of(path: Path) -> list[Any]:
    return [row["reward_mean"] for row in read_metrics(RunDirectory(path).metrics_path)]


class TestResume:
    def test_of_a_run_with_a_function_goes_on_with_it(self, model):
        whole = proximo.align(model, length, "prompts.jsonl", run_dir="whole", **ALIGN)
        with cut_at_rollout(2):
            proximo.align(model, length, "prompts.jsonl", run_dir="cut", **ALIGN)
        with pytest.raises(UserError, match=r"Go on from there: proximo\.resume\('.*cut', reward=function\)"):
            proximo.resume("cut", quiet=True)
        with pytest.raises(UserError, match=r"reward is 3; .* function"):
            proximo.resume("cut", reward=3, quiet=True)
        run = proximo.resume("cut", reward=length, quiet=True)
        assert isinstance(run, StageRun)
        assert rewards_of(Path("cut")) == rewards_of(whole.path)

    @pytest.mark.parametrize(
        ("changed", "level"),
        [
            ({"reward": ("folder",)}, "exact"),
            ({"reward": ("folder", "rw.py:score")}, "exact, where the reward function gives the same scores"),
            ({"reward": ("code:tests", "rw.py:score")}, "exact, where the programs and their tests come out"),
            ({"reward": ("rw.py:score", "judge")}, "statistical: an AI judge"),
            ({"reward": ("folder",), "device": "cuda"}, "statistical: a GPU"),
        ],
    )
    def test_says_how_exact_it_can_be(self, changed, level):
        config = replace(AlignConfig(), **changed)
        assert language._exactness(config, None).startswith(level)
        assert level != "exact" or language._exactness(config, length).startswith("exact, where the reward function")

    def test_refuses_what_belongs_to_the_other_kind(self, model, capsys):
        run = proximo.sft(model, "texts.jsonl", batch_size=2, hold_out=0.0, threads=1, run_dir="sft", quiet=True)
        for flags, name in ((("--total-steps", "5"), "total_steps"), (("--env", "x"), "env")):
            code, _, error = said_by(capsys, "resume", "sft", *flags)
            assert code == 2
            assert f"language run, where {name} means nothing" in error
        with pytest.raises(UserError, match="asks for no reward"):
            proximo.resume(run, reward=length, quiet=True)
        for load in (proximo.load, proximo.evaluate):
            with pytest.raises(UserError, match="is a language run"):
                load("sft")
        with pytest.raises(UserError, match=r"AutoModelForCausalLM\.from_pretrained\('.*sft'\)"):
            proximo.load(run)

    def test_of_a_control_run_takes_no_reward(self, tmp_path):
        settings = dict(total_steps=64, n_envs=1, rollout_length=64, batch_size=64, quiet=True)
        run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", **settings)
        with pytest.raises(UserError, match="control run: its rewards are its environment's"):
            proximo.resume(run.path, reward=length)
        assert proximo.resume(run, quiet=True).env_steps == 64

    @pytest.mark.parametrize(("reward", "ends"), [("rw.py:score", " --allow-import"), ("model", "")])
    def test_is_told_after_a_stop_as_it_works(self, model, capsys, reward, ends):
        config = config_of("align", {"model": model, "reward": reward, "prompts": "my prompts.jsonl"}, where="test")
        assert config.reward == (reward,)
        run = StageRun(Path("my runs/a"), "align", config, {}, {}, signal.SIGINT)
        cli_language.finish_stage(run, StageDisplay.choose(quiet=False), as_json=False)
        assert f"proximo resume 'my runs/a'{ends}\n" in capsys.readouterr().err + "\n"
        for command in cli_language._next("align", str(run.path), config):
            assert "my runs/a" in shlex.split(command)
        assert "my prompts.jsonl" in shlex.split(command)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"reward": None}, "reward is None"),
            ({"reward": 3}, "reward is 3"),
            ({"reward": []}, r"reward is \[\]"),
            ({"reward": [length, length]}, "a function object stands alone"),
            ({"model": torch.nn.Linear(1, 1)}, "model is a Linear; .* save_pretrained"),
            ({"prompts": ["a"]}, "prompts is a list"),
            ({"reward": "rw.py:score", "stop": [""]}, "stop has ''"),
            ({"reward": "rw.py:score", "stop": [3]}, "stop is .3."),
            ({"reward": "rw.py:score", "reward_timeout": 1e300}, "timeout is 1e.300"),
        ],
    )
    def test_of_align_in_python(self, model, arguments, said):
        named: dict[str, Any] = {"model": model, "reward": length, "prompts": "prompts.jsonl"} | ALIGN | arguments
        with pytest.raises(UserError, match=said):
            proximo.align(**named, run_dir="run")
        assert not Path("run").exists()

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("sample", "--prompts", "prompts.jsonl", "--n", "0"), "n is 0"),
            (("sample", "--prompts", "prompts.jsonl", "--n", "-1"), "n is -1"),
            (("sample", "--prompts", "prompts.jsonl", "--seed", BIG), f"seed is {BIG}"),
            (("sample", "--prompts", "prompts.jsonl", "--stop", ""), "stop has ''"),
            (("chat", "--max-new-tokens", "0"), "max_new_tokens is 0"),
            (("chat", "--seed", BIG), f"seed is {BIG}"),
            (("chat", "--device", "cuda:77"), "device is 'cuda:77'"),
            (("sample", "--prompts", "prompts.jsonl", "--device", "cuda:77"), "device is 'cuda:77'"),
        ],
    )
    def test_of_sample_and_chat(self, model, capsys, words, said):
        code, _, error = said_by(capsys, words[0], model, *words[1:])
        assert code == 2
        assert said in error

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--episodes", "0"), "episodes is 0"),
            (("--episodes", "-1"), "episodes is -1"),
            (("--seed", BIG), f"seed is {BIG}"),
            (("--device", "cuda:77"), "device is 'cuda:77'"),
            (("--max-new-tokens", "63"), "Set --max-new-tokens 62, or shorten"),
            (("--max-new-tokens", "30"), "small's context is 16 tokens"),
        ],
    )
    def test_of_evaluate(self, model, capsys, tmp_path, words, said):
        save_tiny(tmp_path / "small", context=16)
        against = ("--against", "small", "--prompts", "prompts.jsonl", "--reward", "rw.py:score")
        code, _, error = said_by(capsys, "evaluate", model, *against, *words)
        assert code == 2
        assert said in error

    @pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
    def test_of_a_seed_that_no_generator_takes(self, model, capsys, stage):
        code, _, error = said_by(capsys, stage, "--model", model, "--data", "texts.jsonl", "--seed", BIG)
        assert code == 2
        assert f"seed is {BIG}" in error

    def test_of_the_demo_come_before_it_begins(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        Path("there").mkdir()
        Path("there/file").touch()
        for words, said in ((("--seed", "-1"), "seed is -1"), (("--run-dir", "there"), "writes over nothing")):
            code, _, error = said_by(capsys, "demo", "align", *words)
            assert code == 2
            assert said in error
            assert "1 of 4" not in error
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "transformers", None)
            code, _, error = said_by(capsys, "demo", "align")
        assert (code, "extra 'language'" in error, "1 of 4" in error) == (2, True, False)
        assert [each.name for each in tmp_path.iterdir()] == ["there"]

    def test_of_a_model_of_nan(self, model, capsys, tmp_path):
        broken = tiny_model()
        broken.lm_head.weight.data[3, 3] = float("nan")
        broken.save_pretrained(tmp_path / "nan")
        tiny_tokenizer().save_pretrained(tmp_path / "nan")
        code, out, error = said_by(capsys, "sample", "nan", "--prompts", "prompts.jsonl", "--max-new-tokens", "3")
        assert (code, out) == (2, "")
        assert "gives NaN for the next token" in error

    def test_of_rows_over_the_context_advise_nothing_beyond_it(self, model, capsys):
        write("texts.jsonl", [{"prompt": "the cat", "completion": "sleeps " * 70}])
        code, _, error = said_by(capsys, "sft", "--model", model, "--data", "texts.jsonl")
        assert code == 2
        assert "as far as the model's context goes" in error
        assert "to 73" not in error


class TestChat:
    def test_takes_half_characters_and_says_that_nobody_hears_the_system_message(self, model, capsys, monkeypatch):
        lines = iter(["the \ud800 cat", EOFError()])

        def asked(prompt: str) -> str:
            line = next(lines)
            if isinstance(line, EOFError):
                raise line
            return line

        monkeypatch.setattr("builtins.input", asked)
        code, out, error = said_by(capsys, "chat", model, "--max-new-tokens", "3", "--system", "be good")
        assert code == 0, error
        assert len(out.splitlines()) == 1
        assert "the system message is left out" in error

    def test_hears_every_line_of_a_pipe_and_characters_that_are_none(self, model):
        words = [sys.executable, "-m", "proximo", "chat", model, "--max-new-tokens", "2"]
        process = subprocess.run(words, input=b"the cat\nthe \xff dog\nthe bird\n\n", capture_output=True, check=False)
        assert process.returncode == 0, process.stderr.decode()
        assert len(process.stdout.splitlines()) == 3

    def test_writes_a_replacement_character(self):
        assert cli_models._whole("a\ud800b\U0001f600\udfff") == "a\ufffdb\U0001f600\ufffd"

    def test_refuses_tokens_that_the_model_does_not_know(self, model, capsys, monkeypatch):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["unicorn"])
        tokenizer.save_pretrained(model)
        monkeypatch.setattr("proximo.cli_models._asked", iter(["the unicorn", ""]).__next__)
        code, _, error = said_by(capsys, "chat", model, "--max-new-tokens", "3")
        assert code == 2
        assert "do not belong together" in error
