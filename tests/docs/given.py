"""Files that pages about language models take for granted: a tiny model, and data in words that it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny_language import save_tiny

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
