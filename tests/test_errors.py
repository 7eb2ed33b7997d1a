"""Checks of numbers of any size, and words that nobody may be there to read."""

from __future__ import annotations

import io
import sys

import pytest

from proximo.errors import UserError, in_range, tell


def test_whole_numbers_of_any_size_are_compared() -> None:
    in_range("seed", 10**400, at_least=0, whole=True, usual="1")
    with pytest.raises(UserError, match="n_envs is 1000"):
        in_range("n_envs", 10**400, at_least=1, at_most=10**6, whole=True, usual="8")


@pytest.mark.parametrize("value", [True, float("inf"), float("nan"), "8", 2.5])
def test_what_is_no_whole_number_is_refused(value) -> None:
    with pytest.raises(UserError, match="a whole number"):
        in_range("n_envs", value, at_least=0, whole=True, usual="8")


class Full(io.StringIO):
    """A stream on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("nobody", [None, Full()])
def test_telling_nobody_is_no_fault(
    nobody: Full | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", nobody)
    tell("unheard")
    assert capsys.readouterr().out == ""
