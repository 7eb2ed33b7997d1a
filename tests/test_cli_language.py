"""The commands of the language stages: chat templates from files, notes about data and tokenizers, an AI judge."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import proximo
from proximo.collect.data import DataNote
from proximo.models.folders import load_tokenizer
from tests.chat_endpoint import Endpoint, longer_is_better
from tests.commands import said_by
from tests.tiny_language import CHAT_TEMPLATE, save_tiny, tiny_tokenizer

WORDS = ("cat", "dog", "bird", "fish", "tree", "house")
SMALL = ("--threads", "1", "--batch-size", "2", "--hold-out", "0.3")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model without a chat template, in a working folder with data."""
    monkeypatch.chdir(tmp_path)
    answer = {"role": "assistant", "content": "sleeps ."}
    write("chats.jsonl", [{"messages": [user(f"the {word}"), answer]} for word in WORDS])
    write("asked.jsonl", [{"prompt": [user(f"the {word}")]} for word in WORDS])
    write("prompts.jsonl", [{"prompt": f"the {word}"} for word in WORDS])
    pairs = [{"prompt": [user(f"the {word}")], "chosen": "sleeps .", "rejected": "eats red red ."} for word in WORDS]
    write("pairs.jsonl", [*pairs, pairs[0] | {"rejected": "sleeps ."}])
    write("texts.jsonl", [{"prompt": "the cat", "completion": "sleeps ."}] * 4)
    Path("chat.jinja").write_text(CHAT_TEMPLATE)
    Path("rewards.py").write_text("def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    return str(save_tiny(tmp_path / "model"))


class TestChatTemplate:
    def test_of_a_file_is_saved_so_that_later_stages_need_no_flag(self, model, capsys):
        code, _, error = said_by(capsys, "sft", "--model", model, "--data", "chats.jsonl", *SMALL)
        assert code == 2
        assert "chats.jsonl, line 1: the prompt is a list of messages" in error
        assert "chat_template" in error
        template = ("--chat-template", "chat.jinja")
        code, _, error = said_by(
            capsys, "sft", "--model", model, "--data", "chats.jsonl", *SMALL, *template, "--run-dir", "sft"
        )
        assert code == 0, error
        assert load_tokenizer("sft").chat_template == CHAT_TEMPLATE
        assert str(Path("chat.jinja").absolute()) in Path("sft/config.toml").read_text()
        code, out, error = said_by(capsys, "sample", "sft", "--prompts", "asked.jsonl", "--max-new-tokens", "3")
        assert code == 0, error
        assert json.loads(out.splitlines()[0])["prompt"] == [user("the cat")]

    @pytest.mark.parametrize("stage", ["reward", "dpo"])
    def test_of_a_file_serves_preferences_too(self, model, capsys, stage):
        words = ("--model", model, "--data", "pairs.jsonl", *SMALL, "--run-dir", "run")
        assert said_by(capsys, stage, *words)[0] == 2
        code, _, error = said_by(capsys, stage, *words, "--chat-template", "chat.jinja")
        assert code == 0, error
        assert load_tokenizer("run").chat_template == CHAT_TEMPLATE

    def test_of_a_file_serves_prompts(self, model, capsys):
        words = ("--model", model, "--prompts", "asked.jsonl", "--reward", "rewards.py:score", "--run-dir", "run")
        small = ("--n-iterations", "1", "--prompts-per-iteration", "4", "--batch-size", "4", "--max-new-tokens", "5")
        assert said_by(capsys, "align", *words, *small)[0] == 2
        template = ("--chat-template", "chat.jinja")
        code, _, error = said_by(capsys, "align", *words, *small, *template)
        assert code == 0, error
        assert load_tokenizer("run").chat_template == CHAT_TEMPLATE
        against = ("--against", model, "--prompts", "asked.jsonl", "--reward", "rewards.py:score")
        against += ("--max-new-tokens", "5")
        assert said_by(capsys, "evaluate", model, *against)[0] == 2
        assert said_by(capsys, "evaluate", model, *against, *template)[0] == 0
        asked = ("sample", model, "--prompts", "asked.jsonl", "--max-new-tokens", "3")
        assert said_by(capsys, *asked)[0] == 2
        assert said_by(capsys, *asked, *template)[0] == 0

    def test_that_is_not_there_is_told_by_name(self, model, capsys):
        code, _, error = said_by(
            capsys, "sft", "--model", model, "--data", "chats.jsonl", "--chat-template", "chatt.jinja"
        )
        assert code == 2
        assert "chatt.jinja (setting chat_template) cannot be read" in error
        assert "Traceback" not in error

    def test_lets_a_model_chat(self, model, capsys, monkeypatch):
        for words, remark in (((), True), (("--chat-template", "chat.jinja"), False)):
            monkeypatch.setattr("proximo.cli_models._asked", iter(["the cat", ""]).__next__)
            code, _, error = said_by(capsys, "chat", model, "--max-new-tokens", "3", *words)
            assert code == 0
            assert ("no chat template" in error) == remark


class TestNotes:
    WORDS = ("reward", "--data", "pairs.jsonl", "--chat-template", "chat.jinja", *SMALL)

    def test_are_one_line_each(self, model, capsys):
        code, _, error = said_by(capsys, *self.WORDS, "--model", model)
        assert code == 0
        (line,) = [line for line in error.splitlines() if "alike" in line]
        assert line == f"note: {Path('pairs.jsonl').absolute()}: 1 of 7 rows have chosen and rejected alike; dropped."
        assert "Warning" not in error
        assert "warn(" not in error

    def test_are_not_shown_where_all_is_to_be_quiet(self, model, capsys):
        code, _, error = said_by(capsys, *self.WORDS, "--model", model, "--quiet")
        assert (code, error) == (0, "")

    def test_are_warnings_in_python(self, model):
        with pytest.warns(DataNote, match="1 of 7 rows"):
            proximo.dpo(model, "pairs.jsonl", chat_template="chat.jinja", quiet=True, threads=1, batch_size=2)

    def test_other_warnings_stay_as_they_are(self, model, capsys, monkeypatch):
        from proximo.stage_display import StageDisplay

        seen = []
        monkeypatch.setattr(warnings, "showwarning", lambda message, *rest, **named: seen.append(str(message)))
        with StageDisplay.choose(quiet=False).notes():
            warnings.simplefilter("always")
            warnings.warn("something else", UserWarning, stacklevel=1)
            warnings.warn("about the data", DataNote, stacklevel=1)
        assert seen == ["something else"]
        assert capsys.readouterr().err == "note: about the data\n"


class TestTokenizer:
    @pytest.mark.parametrize("stage", ["sft", "align"])
    def test_pad_that_is_eos_is_said_in_the_plan(self, model, capsys, stage):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(model)
        words = ["--model", model, "--threads", "1", "--batch-size", "2"]
        if stage == "sft":
            words += ["--data", "texts.jsonl"]
        else:
            words += ["--prompts", "prompts.jsonl", "--reward", "rewards.py:score", "--n-iterations", "1"]
            words += ["--prompts-per-iteration", "2", "--max-new-tokens", "4"]
        code, _, error = said_by(capsys, stage, *words)
        assert code == 0, error
        assert "PAD is the EOS token, which is harmless" in error

    @pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "align", "sample"])
    def test_eos_that_the_model_does_not_know_is_refused_everywhere(self, model, capsys, stage):
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"eos_token": "<end>"})
        tokenizer.save_pretrained(model)
        data = {"sft": "texts.jsonl", "align": "prompts.jsonl", "sample": "prompts.jsonl"}.get(stage, "pairs.jsonl")
        flag = "--prompts" if stage in ("align", "sample") else "--data"
        named = [model] if stage == "sample" else ["--model", model]
        code, _, error = said_by(capsys, stage, *named, flag, data)
        assert code == 2
        assert "EOS token '<end>'" in error

    def test_no_eos_at_all_is_refused_where_an_end_is_learned(self, model, capsys):
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        tokenizer.save_pretrained(model)
        code, _, error = said_by(capsys, "sft", "--model", model, "--data", "texts.jsonl")
        assert code == 2
        assert "no EOS token" in error


class TestJudge:
    @pytest.fixture
    def judge(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
        monkeypatch.setenv("OPENAI_API_KEY", "key")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        endpoint = Endpoint()
        endpoint.reply = longer_is_better
        yield ("--judge-url", endpoint.url, "--judge-model", "judge-1", "--judge-rubric", "rubric.txt")
        endpoint.close()

    @pytest.fixture
    def against(self, model: str, tmp_path: Path) -> tuple[str, ...]:
        Path("rubric.txt").write_text("Length counts.")
        other = str(save_tiny(tmp_path / "other", seed=1))
        return ("evaluate", model, "--against", other, "--prompts", "prompts.jsonl", "--max-new-tokens", "6")

    def test_stands_beside_the_score(self, against, judge, capsys):
        words = (*against, "--judge", *judge, "--reward", "rewards.py:score")
        code, out, error = said_by(capsys, *words, "--json")
        assert code == 0, error
        result = json.loads(out)
        assert result["judge_win_rate"] == pytest.approx(result["win_rate"])  # both go by length
        assert 0 < result["win_rate"] < 1
        code, out, _ = said_by(capsys, *words)
        by_score, by_judge = [line for line in out.splitlines() if line.startswith("win rate")]
        assert by_score.removesuffix(" by score") == by_judge.removesuffix(" by the judge judge-1")

    def test_does_without_a_score(self, against, judge, capsys):
        code, out, error = said_by(capsys, *against, "--judge", *judge)
        assert code == 0, error
        assert "by the judge" in out
        assert "by score" not in out
        assert "best of" not in out

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ((), "needs --reward REWARD (as for proximo align), or --judge"),
            (("--judge",), "--judge-model NAME and --judge-rubric FILE"),
            (("--reward", "judge", "--judge-mode", "pair"), "Use --judge instead"),
        ],
    )
    def test_what_is_missing_is_asked_for(self, against, capsys, words, said):
        code, _, error = said_by(capsys, *against, *words)
        assert code == 2
        assert said in error

    def test_help_speaks_of_best_of_n_and_of_the_judge(self, model, capsys):
        code, out, _ = said_by(capsys, "evaluate", "--against", "x", "--help")
        assert code == 0
        assert "--best-of" in out
        assert "(best-of-n)" in " ".join(out.split())
        assert "--judge-rubric" in out
