"""A language model learns what a Python function rewards: GRPO on a tiny model, in seconds.

    python examples/reward_function.py

The function is all there is to write. For a model of your own: proximo.align("MODEL", score, "prompts.jsonl").
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tiny_model import ANIMALS, THINGS, save_tiny_model, write_rows

import proximo
from proximo.runs.metrics import read_metrics


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """One point for each animal that is named, none for naming it again, and one less for each thing."""
    animals = [len(set(response.split()) & set(ANIMALS)) for response in responses]
    things = [sum(word in THINGS for word in response.split()) for response in responses]
    return [float(n - m) for n, m in zip(animals, things, strict=True)]


def main(n_iterations: int = 40) -> tuple[float, float]:
    """Train, show samples of before and after, and return the mean reward of both."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny_model(folder / "model")
        prompts = write_rows(folder / "prompts.jsonl", ({"prompt": f"i see the {word}"} for word in ANIMALS + THINGS))
        run = proximo.align(
            model,
            score,
            prompts,
            algorithm="grpo",
            run_dir=folder / "run",
            n_iterations=n_iterations,
            prompts_per_iteration=16,
            responses_per_prompt=8,
            max_new_tokens=8,
            learning_rate=1e-2,
            beta=0.01,
            threads=1,
        )
        rows = read_metrics(run.path / "metrics.jsonl")
    first, last = float(rows[0]["reward_mean"] or 0.0), float(rows[-1]["reward_mean"] or 0.0)
    print(f"mean reward {first:.2f} at first, {last:.2f} after {n_iterations} iterations")
    return first, last


if __name__ == "__main__":
    main()
