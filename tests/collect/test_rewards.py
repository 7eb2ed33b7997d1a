"""Sources of reward: what reaches the function, what comes back, and what happens when it misbehaves."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proximo.collect.reward_process import describe
from proximo.collect.rewards import CallableReward, FunctionReward, Scores, WeightedReward
from proximo.errors import UserError
from tests.collect.scoring import ask, ended

SOURCE = """
import asyncio, os, subprocess, sys, time
from neighbour_of_rewards import PENALTY

def length(prompts, responses):
    return [len(response) - PENALTY for response in responses]

def exact(prompts, responses, answer, bonus=("none",)):
    return [float(r == a) + (b == "yes") for r, a, b in zip(responses, answer, bonus)]

def everything(prompts, responses, **columns):
    print(sorted(columns.items()))
    return [len(columns)] * len(responses)

def recognizes(prompts, responses):
    chat = [{"role": "user", "content": "\\ud83d \\u2028 \\u00fc"}]
    return [float(prompts == [chat] and responses == ["\\x00\\n"])]

async def slow_and_polite(prompts, responses):
    await asyncio.sleep(0.01)
    return [0.5 for _ in responses]

def odd(prompts, responses):
    class Half:
        def __float__(self):
            return 0.5
    return [float("nan"), float("inf"), None, "1.0", [1], True, 3, Half(), 0]

def fails_on_bad(prompts, responses):
    return [int(response) for response in responses]

def hangs_on_bad(prompts, responses):
    if "bad" in responses:
        with open("pid_of_helper", "w") as file:
            file.write(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)
    return [1.0] * len(responses)

def raises_then_hangs(prompts, responses):
    if len(responses) > 1:
        raise RuntimeError("one by one, please")
    if responses == ["bad"]:
        time.sleep(60)
    return [1.0]

def exits_on_bad(prompts, responses):
    if "bad" in responses:
        os._exit(3)
    return [1.0] * len(responses)

def stops_politely(prompts, responses):
    sys.exit(4)

def chatty(prompts, responses):
    print("hello")
    os.write(1, b"straight to the descriptor\\n")
    subprocess.run(["echo", "from a child"])
    return [float(sys.stdin.read() == "")] * len(responses)

def short(prompts, responses):
    return [1.0] * (len(responses) - 1)

def lonely(prompts, responses):
    return 1.0

def process(prompts, responses):
    return [os.getpid(), float("torch" in sys.modules)]

def of_one_argument(prompts):
    return [1.0]

TABLE = [1.0]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    (tmp_path / "neighbour_of_rewards.py").write_text("PENALTY = 2\n")
    (tmp_path / "queue.py").write_text("raise RuntimeError('this is not the standard library')\n")
    package = tmp_path / "garden"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "scoring.py").write_text(SOURCE)
    (package / "broken.py").write_text("import os\n\nraise RuntimeError('no reward today')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def reward(folder: Path) -> Iterator[Callable[..., FunctionReward]]:
    opened: list[FunctionReward] = []

    def opening(name: str, **kwargs: Any) -> FunctionReward:
        opened.append(FunctionReward(f"my_rewards.py:{name}", **kwargs))
        return opened[-1]

    yield opening
    for one in opened:
        one.close()


class TestValues:
    def test_they_pass_through_and_zero_is_a_score(self, reward: Callable[..., FunctionReward]):
        source = reward("length")
        assert ask(source, "", "ab", "abc") == ([-2.0, 0.0, 1.0], [])
        assert source.name == "my_rewards.length"
        assert ask(source) == ([], [])

    def test_what_is_no_finite_number_is_no_score(self, reward: Callable[..., FunctionReward]):
        values, problems = ask(reward("odd"), *"abcdefghi")
        assert values == [None] * 5 + [1.0, 3.0, 0.5, 0.0]
        assert [problem.partition(":")[0] for problem in problems] == [f"response {i}" for i in range(5)]
        for problem, word in zip(problems, ("nan", "inf", "None", "'1.0'", "list"), strict=True):
            assert word in problem

    def test_a_problem_is_told_once_and_not_more_than_a_few(self):
        scores = Scores.of([(None, ""), (None, "b"), (1.0, ""), (None, "b")])
        assert scores == ([None, None, 1.0, None], ["response 1: b"])
        assert len(Scores.of((None, f"problem {i}") for i in range(100)).problems) == 5

    def test_columns_reach_the_function_that_takes_them(self, reward: Callable[..., FunctionReward]):
        source = reward("exact")
        assert ask(source, "4", "5", answer=["4", "6"], bonus=["no", "yes"], more=[{}, {}]).values == [1.0, 1.0]
        assert ask(reward("everything"), "4", a=[[1]], b=[None], prompts=["in the way"]).values == [2.0]
        with pytest.raises(UserError, match=r"'answer'.*it has: answers.*Did you mean answers\?"):
            ask(source, "4", answers=["4"])
        with pytest.raises(UserError, match=r"'answer'.*cannot be sent"):
            ask(source, "4", answer=[object()])
        assert ask(source, "4", answer=["4"], unused=[object()]).values == [1.0]

    def test_chat_and_odd_text_arrive_as_they_are(self, reward: Callable[..., FunctionReward]):
        chat = [{"role": "user", "content": "\ud83d \u2028 ü"}]
        assert reward("recognizes")([chat], ["\x00\n"], {}).values == [1.0]

    def test_async(self, reward: Callable[..., FunctionReward]):
        source = reward("slow_and_polite")
        assert [ask(source, "a", "b").values for _ in range(2)] == [[0.5, 0.5]] * 2

    def test_a_module_and_large_batches(self, folder: Path):
        source = FunctionReward("garden.scoring:length")
        assert source.name == "garden.scoring.length"
        assert ask(source, "x" * 3_000_000, "").values == [2_999_998.0, -2.0]
        source.close()


class TestMisbehaviour:
    def test_one_of_many_raises(self, reward: Callable[..., FunctionReward]):
        values, problems = ask(reward("fails_on_bad"), "1", "x", "3")
        assert values == [1.0, None, 3.0]
        assert len(problems) == 1
        assert problems[0].startswith("response 1: ValueError: invalid literal")
        assert "my_rewards.py, line 30: return [int(response)" in problems[0]

    def test_the_last_line_is_the_users_own(self):
        def own():
            Path("/no/such/file").read_text()  # raises within pathlib

        with pytest.raises(FileNotFoundError) as caught:
            own()
        assert "test_rewards.py, line" in describe(caught.value)
        assert 'Path("/no/such/file").read_text()' in describe(caught.value)

    def test_a_hang_is_killed_with_all_it_has_started(self, folder: Path, reward: Callable[..., FunctionReward]):
        source = reward("hangs_on_bad", timeout=1.0)
        begin = time.monotonic()
        assert ask(source, "good", "bad") == ([None, None], ["response 0: no answer within 1 s"])
        assert time.monotonic() - begin < 5
        assert ended(int((folder / "pid_of_helper").read_text()))
        assert ask(source, "good") == ([1.0], [])

    def test_a_hang_after_an_exception_leaves_what_was_scored(self, reward: Callable[..., FunctionReward]):
        source = reward("raises_then_hangs", timeout=1.0)
        begin = time.monotonic()
        values, problems = ask(source, "good", "bad", "good", "bad")
        assert time.monotonic() - begin < 5
        assert (values, problems) == ([1.0, None, None, None], ["response 1: no answer within 1 s"])

    def test_the_end_of_the_process(self, reward: Callable[..., FunctionReward]):
        source = reward("exits_on_bad")
        assert ask(source, "a", "bad") == ([None, None], ["response 0: its process ended with exit code 3"])
        assert ask(source, "a") == ([1.0], [])

    def test_an_end_between_two_calls_costs_nothing(self, reward: Callable[..., FunctionReward]):
        source = reward("process")
        first = ask(source, "a", "b").values
        assert first[1] == 0.0  # no torch
        os.kill(int(first[0]), signal.SIGKILL)
        os.waitid(os.P_PID, int(first[0]), os.WEXITED | os.WNOWAIT)
        assert ask(source, "a", "b").values[0] not in (None, first[0])

    def test_sys_exit_is_an_exception_like_others(self, reward: Callable[..., FunctionReward]):
        source = reward("stops_politely")
        assert "SystemExit: 4" in ask(source, "a").problems[0]

    def test_prints_go_to_standard_error(
        self, reward: Callable[..., FunctionReward], capfd: pytest.CaptureFixture[str]
    ):
        assert ask(reward("chatty"), "a", "b") == ([1.0, 1.0], [])
        out, err = capfd.readouterr()
        assert out == ""
        assert err.split("\n")[:3] == ["hello", "straight to the descriptor", "from a child"]

    @pytest.mark.parametrize(
        ("name", "got"), [("short", r"length 1 for 2 responses"), ("lonely", "a value of type float")]
    )
    def test_a_wrong_return_is_a_mistake_to_mend(self, reward: Callable[..., FunctionReward], name: str, got: str):
        with pytest.raises(UserError, match=f"{name} returned {'.*' + got}.*Wanted is.*list of one float"):
            ask(reward(name), "a", "b")

    def test_close_ends_the_process(self, reward: Callable[..., FunctionReward]):
        source = reward("process")
        pid = int(ask(source, "a", "b").values[0])
        source.close()
        assert not Path(f"/proc/{pid}").exists()
        source.close()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("my_rewards.py:lenght", r"no function named 'lenght'. Did you mean length\?"),
        ("my_rewards.py:TABLE", "TABLE is a list, not a function"),
        ("my_reward.py:length", r"There is no file .*my_reward.py. Did you mean my_rewards.py"),
        ("my_rewards.py:of_one_argument", r"signature \(prompts\), which does not take the prompts and the responses"),
        ("garden.scorin:length", r"No module named 'garden.scorin'.* Did you mean scoring\?"),
        ("garden.broken:length", r"no reward today \(broken.py, line 3: raise RuntimeError"),
        ("my_rewards.py", "names no reward function: write my_file.py:score"),
    ],
)
def test_what_is_not_there_is_said_at_once(folder: Path, place: str, words: str):
    with pytest.raises(UserError, match=words):
        FunctionReward(place)


class TestCallable:
    def test_the_same_rules(self):
        def half(prompts, responses, weight):
            if "bad" in responses:
                raise KeyError("bad")
            return [w / 2 for w in weight]

        values, problems = ask(CallableReward(half), "a", "bad", "c", weight=[1, 1, 0], other=[1, 2, 3])
        assert values == [0.5, None, 0.0]
        assert "response 1: KeyError: 'bad' (test_rewards.py, line" in problems[0]
        with pytest.raises(UserError, match=r"type ndarray \(.tolist\(\) makes a list of it\)"):
            ask(CallableReward(lambda prompts, responses: np.ones(1)), "a")
        with pytest.raises(UserError, match="does not take the prompts"):
            CallableReward(lambda prompts: [1.0])
        with pytest.raises(UserError, match="timeout is 0"):
            CallableReward(half, timeout=0)

    def test_async_calls_share_one_loop(self):
        loops = []

        async def score(prompts, responses):
            loops.append(asyncio.get_running_loop())
            return [1.0]

        source = CallableReward(score)
        assert [ask(source, "a").values for _ in range(2)] == [[1.0], [1.0]]
        assert loops[0] is loops[1]
        source.close()
        assert loops[0].is_closed()

    def test_a_hang_is_left_alone_and_refused_the_next_time(self):
        source = CallableReward(lambda prompts, responses: time.sleep(1.0) or [1.0] * len(responses), timeout=0.1)
        values, problems = ask(source, "a", "b")
        assert values == [None, None]
        assert "within 0.1 s (in this process it cannot be stopped" in problems[0]
        with pytest.raises(UserError, match="still hangs in an earlier call"):
            ask(source, "a")
        source.close()


class TestWeighted:
    def test_the_sum_by_hand(self):
        def first(prompts, responses):
            return [1.0, 2.0, None, 0.0]

        def second(prompts, responses):
            return [10.0, "x", 1.0, 0.0]

        source = WeightedReward([CallableReward(first), CallableReward(second)], [2.0, -0.5])
        values, problems = ask(source, *"abcd")
        assert values == [-3.0, None, None, 0.0]
        assert source.parts == [[1.0, 2.0, None, 0.0], [10.0, None, 1.0, 0.0]]
        assert [problem.partition(" (")[0][:18] for problem in problems] == ["first: response 2:", "second: response 1"]

    def test_a_weight_for_each(self):
        source = CallableReward(lambda prompts, responses: [1.0])
        with pytest.raises(UserError, match="2 rewards and 1 reward weights"):
            WeightedReward([source, source], [1.0])
        with pytest.raises(UserError, match=r"weight .* is nan"):
            WeightedReward([source], [float("nan")])
