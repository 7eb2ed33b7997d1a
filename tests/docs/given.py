"""Files that pages about language models take for granted: a tiny model, and data in words that it knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny_language import save_tiny, save_tiny_scalar

WORDS = ("cat", "dog", "bird", "fish", "tree", "house", "sun", "moon")


def write_language() -> None:
    """`model`, `chats.jsonl`, `preferences.jsonl`, `prompts.jsonl` and `my_reward.py` in the working folder."""
    save_tiny(Path("model"), chat=True)
    asked = [f"the {word}" for word in WORDS]
    answer = {"role": "assistant", "content": "sleeps ."}
    write("chats.jsonl", [{"messages": [{"role": "user", "content": text}, answer]} for text in asked])
    pairs = [("sleeps .", "eats red red ."), ("runs here .", "not not .")]
    write("preferences.jsonl", [{"prompt": text, "chosen": a, "rejected": b} for text in asked for a, b in pairs])
    write("prompts.jsonl", [{"prompt": text, "answer": "sleeps"} for text in asked])
    Path("my_reward.py").write_text(
        "def score(prompts, responses, **columns):\n    return [float(len(text)) for text in responses]\n"
    )


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _write_ppo(folder: Path) -> None:
    import proximo

    sizes = dict(n_iterations=2, prompts_per_iteration=4, batch_size=4, max_new_tokens=32, n_samples=1)
    proximo.align("model", "my_reward.py:score", "prompts.jsonl", run_dir=folder, quiet=True, **sizes)


LANGUAGE_RUNS: dict[str, Callable[[Path], Any]] = {
    "sft": lambda folder: save_tiny(folder, chat=True),
    "rm": lambda folder: save_tiny_scalar(folder, chat=True),
    "ppo": _write_ppo,
}
"""Results of earlier stages, made where a page names one that none of its commands makes."""
