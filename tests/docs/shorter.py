"""What the test of the snippets does otherwise than a reader: all of it stands here.

Long commands are run with fewer steps, placeholders become something real, and some commands are not run at all.
"""

from __future__ import annotations

import re
from typing import Any

LIMITS: dict[str, dict[str, int]] = {
    "train": {"total_steps": 4096},
    "tune": {"trials": 1, "steps": 4096, "episodes": 2},
    "evaluate": {"episodes": 2},
    "record": {"episodes": 3},
    "watch": {"episodes": 1},
    "align": {"n_iterations": 2, "prompts_per_iteration": 4, "responses_per_prompt": 2, "batch_size": 4}
    | {"max_new_tokens": 32, "n_samples": 1, "normalize_rewards_on": 16},
    "sft": {"batch_size": 2, "n_epochs": 1},
    "reward": {"batch_size": 2},
    "dpo": {"batch_size": 2},
    "sample": {"max_new_tokens": 8},
    "compare": {"max_new_tokens": 8},
    "chat": {"max_new_tokens": 8},
    "check-env": {"steps": 200},
}
"""No setting of these commands, and of the functions of the same names, is larger here."""

SPECIAL: list[tuple[str, dict[str, int]]] = [
    (r"^train mpe2", {"total_steps": 1024}),
    (r"^resume .*--total-steps", {"total_steps": 6144}),  # more than the runs of the test have
    (r"^train .*--exploration rnd", {"total_steps": 6144}),  # what its warm-up takes, and an iteration
]
"""Limits for commands that are slower than others, or need more."""

NOT_RUN: list[tuple[str, str]] = [
    (r"^pip ", "installs"),
    (r"^(pytest|ruff|git|mkdocs|jupyter|minari) ", "no command of Proximo's"),
    (r"^python3? -m (venv|pip) ", "installs"),
    (r"^python3? benchmarks/", "a benchmark, which has a machine to itself; that it is there is checked"),
    (r"^python3? examples/", "the tests of the examples run it, small; that it is there is checked"),
    (r"^proximo doctor", "half a minute; tests/test_doctor.py runs it"),
    (r"^proximo demo align", "minutes; tests/demo/test_align.py runs all of it, small"),
    (r"^proximo (train|evaluate) .*ALE[/-]", "images take minutes on a CPU; tests/test_atari_runs.py trains on games"),
    (r"--device[ =]cuda", "needs a GPU; its settings are checked"),
    (r"DATASET_ID", "needs a data set that Minari has downloaded; its words are checked"),
    (r"--dashboard|--wandb|--trackio", "serves a page, or needs an account; its words are checked"),
    (r"--against MODEL --judge|judge_url|--judge-model", "needs a judge that answers; its words are checked"),
]
"""Commands that are only looked at, and why."""

RUN_PLACEHOLDER = re.compile(r"RUN_?(?P<number>\d*)")
"""RUN is the run that a command of the page has made last; RUN1, RUN2, ... are short ones made for the test."""

PLACEHOLDERS = {"MODEL": "model", "ENV": "CartPole-v1"}


def why_not_run(command: str) -> str | None:
    """The reason why a command is only looked at; None where it is run."""
    return next((reason for pattern, reason in NOT_RUN if re.search(pattern, command)), None)


def limited(command: str, given: dict[str, Any], words: str = "") -> dict[str, Any]:
    """The settings that are to be added to those of a snippet; `words` is all of a command."""
    limits = LIMITS.get(command, {})
    for pattern, special in SPECIAL:
        limits = limits | special if re.search(pattern, words) else limits
    return {name: most for name, most in limits.items() if _is_more(given.get(name), most)}


def _is_more(value: Any, most: int) -> bool:
    try:
        return value is None or float(value) > most
    except (TypeError, ValueError):
        return True
