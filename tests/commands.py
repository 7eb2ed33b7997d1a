"""Commands run in this process, and language runs that are cut in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from proximo import cli
from proximo.training import align


def said_by(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """The exit code of a command, and what it wrote to standard output and standard error: never a traceback."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    out, error = capsys.readouterr()
    assert "Traceback" not in out + error
    return int(ended.value.code or 0), out, error


class CutError(Exception):
    """Ends a run in the middle."""


@contextmanager
def cut_at_rollout(number: int) -> Iterator[None]:
    """Within, an alignment run ends when it samples for the given time (a look at samples counts too)."""
    real, calls = align.generate, []

    def failing(*arguments: Any, **named: Any) -> Any:
        calls.append(0)
        if len(calls) == number:
            raise CutError
        return real(*arguments, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(align, "generate", failing)
        with pytest.raises(CutError):
            yield
