"""The examples that people copy from, in a small form: each runs, and does what it says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

SCRIPTS = [
    "corridor",
    "masks",
    "memory",
    "self_play",
    "reward_function",
    "lora",
    "judge",
    "resume",
    "export",
    "sweep",
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in [*SCRIPTS, "tiny_model"]:  # a module of this name from elsewhere is none of ours
        monkeypatch.delitem(sys.modules, name, raising=False)


def example(name: str) -> ModuleType:
    module = importlib.import_module(name)
    assert Path(str(module.__file__)).parent == EXAMPLES
    return module


def test_each_is_listed_in_the_docs_and_begins_with_its_command() -> None:
    listed = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    for name in SCRIPTS:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert f"examples/{name}.py" in listed, name
        assert f"python examples/{name}.py\n" in text, name
        assert text.endswith('if __name__ == "__main__":\n    main()\n'), name


def test_a_custom_environment_is_learned(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("corridor").main(total_steps=12_000) == 0  # straight to the end
    assert "there after" in capsys.readouterr().out


def test_masked_actions_are_never_taken() -> None:
    masks = example("masks")
    env = masks.Heap()
    env.reset(seed=0)
    env.last = 2
    with pytest.raises(AssertionError, match="not possible"):
        env.step(1)  # so that the games below would have stopped
    assert 0.0 <= masks.main(total_steps=4096, games=40) <= 1.0


def test_the_heap_is_what_its_rules_say() -> None:
    env = example("masks").Heap()
    env.reset(seed=0)
    env.left, env.last = 3, 1
    assert env.mask().tolist() == [0, 1, 1]
    _, reward, over, _, _ = env.step(2)  # takes the last three
    assert (reward, over) == (1.0, True)
    env.left, env.last = 3, 1
    _, reward, over, _, _ = env.step(1)  # one is left, and the opponent takes it
    assert (reward, over) == (-1.0, True)
    env.left, env.last = 2, 3
    _, reward, over, _, _ = env.step(0)  # one is left, but one was just taken: the opponent cannot move
    assert (reward, over) == (1.0, True)


@pytest.mark.slow
def test_memory_is_what_the_maze_needs() -> None:
    found = example("memory").main(total_steps=20_480, episodes=100)
    assert found["gru"] > found["none"] + 0.3


def test_self_play_rates_past_selves() -> None:
    rated = example("self_play").main(total_steps=4096, games=4)
    names = [player["name"] for player in rated["players"]]
    assert names[0] == "random"
    assert "(latest)" in names[-1]
    assert rated["wins"] + rated["draws"] + rated["losses"] == 4


def test_a_reward_function_is_learned() -> None:
    reward_function = example("reward_function")
    assert reward_function.score(["i"] * 3, ["cat cat dog", "cup a", ". cat cup"]) == [2.0, -1.0, 0.0]
    first, last = reward_function.main(n_iterations=8)
    assert last > first + 0.3


def test_lora_learns_on_one_base() -> None:
    metrics = example("lora").main(n_iterations=2, n_texts=160)
    assert metrics["reward"]["accuracy"] > 0.8
    assert metrics["ppo"]["iteration"] == 2


def test_a_judge_scores_what_it_is_sent() -> None:
    first, last = example("judge").main(n_iterations=2)
    assert 0.0 < first < 1.0
    assert 0.0 < last < 1.0


def test_a_killed_run_ends_bit_for_bit_as_an_undisturbed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("resume").main(total_steps=8000, rows_before_kill=5)
    assert "the same, bit for bit" in capsys.readouterr().out


def test_an_exported_file_gives_equal_actions() -> None:
    pytest.importorskip("onnxruntime", reason='pip install -c constraints.txt -e ".[export]"')
    compared, different = example("export").main(total_steps=2048, episodes=2)
    assert compared > 10
    assert different == 0


def test_a_sweep_tries_every_pair(tmp_path: Path) -> None:
    found = example("sweep").main(total_steps=1024, seeds=(1,), out=tmp_path / "sweep")
    assert sorted((one["clip_epsilon"], one["learning_rate"]) for _, one in found) == [
        (0.1, 3e-4),
        (0.1, 3e-3),
        (0.3, 3e-4),
        (0.3, 3e-3),
    ]
    assert [score for score, _ in found] == sorted((score for score, _ in found), reverse=True)
    assert len(list((tmp_path / "sweep").iterdir())) == 4
