"""Controls of the story task, for benchmarks/language_tasks.py: python benchmarks/story_controls.py SEED THREADS

The last line of the output is one JSON object with a list of controls: shuffled labels, a constant reward, a huge beta,
and over-optimization (a reward model of 200 pairs, beta 0, many iterations).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from proximo.demo.align import DemoConfig, judge, reward_accuracy, train_ppo, train_reward, train_sft
from proximo.demo.stories import label_preferences, shuffled_labels, write_corpus
from proximo.errors import UserError
from proximo.report.report import write_language_report
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import read_metrics
from proximo.stage_display import StageDisplay

HUGE_BETA = 50.0
FEW_PAIRS, MANY_ITERATIONS = 200, 120


def constant(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that says nothing."""
    return [1.0] * len(responses)


def main(seed: int, threads: int) -> None:
    display = StageDisplay.choose(quiet=True)
    config = DemoConfig(seed=seed, threads=threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_corpus(folder / "data", n_stories=config.n_stories, n_prompts=config.n_prompts, seed=seed)
        sft = train_sft(folder, data["stories"], config, display).path

        def aligned(called: str, reward: str, **changes: Any) -> tuple[dict[str, Any], Path]:
            run = train_ppo(folder / called, data["prompts"], config, display, sft, reward, **changes)
            found = judge(run.path, sft, data["held_out"], config)
            kept = {"win_rate": found["win_rate"], "gold": found["reward_mean"], "kl": found["kl_to_against"]}
            return {"control": called} | kept, run.path

        good = train_reward(folder, config, display, sft)

        def at_random(*given: Any) -> list[dict[str, str]]:
            return shuffled_labels(label_preferences(*given), seed)

        shuffled = train_reward(folder, config, display, sft, label=at_random, name="bad")
        controls = []
        row, _ = aligned("shuffled labels", str(shuffled.path))
        controls.append(row | {"reward_accuracy": reward_accuracy(shuffled.path, config)[0]})
        for where in ("reward", "loss_k2"):
            called = f"beta {HUGE_BETA:g}, in the {where.replace('_', ', ')}"
            row, _ = aligned(called, str(good.path), beta=HUGE_BETA, kl_in=where)
            controls.append(row | {"reward_accuracy": reward_accuracy(good.path, config)[0]})
        try:
            aligned("constant reward", f"{__file__}:constant")
        except UserError as error:
            controls.append({"control": "constant reward", "said": "refused: " + str(error).split(":")[0]})
        few = DemoConfig(n_pairs=FEW_PAIRS, seed=seed, threads=threads)
        weak = train_reward(folder, few, display, sft, name="few")
        row, path = aligned(f"{FEW_PAIRS} pairs, beta 0", str(weak.path), beta=0.0, n_iterations=MANY_ITERATIONS)
        controls.append(row | {"reward_accuracy": reward_accuracy(weak.path, config)[0]} | over_optimization(path))
    print(json.dumps({"seed": seed, "controls": controls}))


def over_optimization(path: Path) -> dict[str, Any]:
    """Proxy and gold over the run, and what the report finds."""
    run = RunDirectory(path)
    metrics = read_metrics(run.metrics_path)
    gold = [float(row["gold_mean"] or 0.0) for row in metrics]
    proxy = [float(row["reward_mean"] or 0.0) for row in metrics]
    best = max(range(len(gold)), key=gold.__getitem__)
    findings = "; ".join(one.name for one in write_language_report(path)) or "nothing"
    return {
        "proxy": proxy,
        "gold_by_iteration": gold,
        "said": f"gold {gold[0]:+.2f}, {gold[best]:+.2f} in iteration {best + 1}, {gold[-1]:+.2f} at the end; proxy "
        f"{proxy[0]:+.2f}, {proxy[best]:+.2f}, {proxy[-1]:+.2f}; report: {findings}",
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
