"""The flags that the commands have, as their own help says."""

from __future__ import annotations

import contextlib
import io
import os
import re
from functools import cache

VARIANTS: dict[str, list[list[str]]] = {
    "train": [
        *(["CartPole-v1", "--algorithm", name] for name in ("ppo", "a2c", "reinforce", "trpo")),
        ["mpe2.simple_spread_v3:parallel_env"],
        ["pettingzoo.classic.tictactoe_v3:env"],
    ],
    "align": [["--algorithm", name] for name in ("ppo", "grpo")],
    "clone": [["CartPole-v1"]],
    "evaluate": [[], ["--against", "model"]],
    "demo": [["align"]],
    "tune": [["CartPole-v1"]],
}
"""Words after which a command has flags of its own."""


@cache
def flags_of(command: str) -> frozenset[str]:
    """All flags of a command, written as `--total-steps`."""
    from proximo import cli

    found = {"--help"}
    os.environ["COLUMNS"] = "200"
    for words in VARIANTS.get(command, [[]]):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            cli.main([command, *words, "--help"])
        found |= set(re.findall(r"--[a-z][a-z0-9-]*", out.getvalue()))
    return frozenset(found)
