"""Reward functions that break the lines between the processes, or their own exceptions."""

from __future__ import annotations

from pathlib import Path

import pytest

from proximo.collect.reward_process import describe
from proximo.collect.rewards import CallableReward, FunctionReward
from proximo.errors import UserError

SOURCE = r"""
import os, time

def forks(prompts, responses):
    if not os.fork():
        return [9.0] * len(responses)
    os.wait()
    return [1.0] * len(responses)

def writes(prompts, responses):
    if "bad" in responses:
        for number in range(3, 20):
            try:
                os.write(number, b"hello\n")
            except OSError:
                pass
    return [2.0] * len(responses)
"""


@pytest.fixture
def place(tmp_path: Path) -> str:
    (tmp_path / "rw.py").write_text(SOURCE)
    return str(tmp_path / "rw.py")


def test_a_fork_that_comes_back_does_not_answer(place):
    source = FunctionReward(f"{place}:forks")
    for _ in range(2):
        assert source(["p", "p"], ["a", "b"], {}) == ([1.0, 1.0], [])
    source.close()


def test_what_is_no_answer_is_a_lost_one(place):
    source = FunctionReward(f"{place}:writes")
    values, problems = source(["p", "p"], ["a", "bad"], {})
    assert values == [None, None]
    assert "something that is no answer" in problems[0]
    assert source(["p"], ["a"], {}) == ([2.0], [])
    source.close()


def test_an_exception_that_cannot_be_shown_is_named():
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def score(prompts, responses):
        raise MuteError

    assert describe(MuteError()) == "MuteError: (its message cannot be shown)"
    values, problems = CallableReward(score)(["p"], ["a"], {})
    assert values == [None]
    assert "MuteError" in problems[0]


@pytest.mark.parametrize("timeout", [1e300, 86_401.0])
def test_a_timeout_beyond_a_day_is_refused(place, timeout):
    for make in (
        lambda: FunctionReward(f"{place}:forks", timeout=timeout),
        lambda: CallableReward(len, timeout=timeout),
    ):
        with pytest.raises(UserError, match="timeout is"):
            make()
