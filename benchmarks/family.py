"""PPO and its relatives on the same tasks and seeds; what clipping does and what happens without it; TRPO's cost.

    python benchmarks/family.py                 # everything that is not done yet, two runs at a time
    python benchmarks/family.py --cost          # only the timing of TRPO's update against PPO's
    python benchmarks/family.py --table         # only write docs/family.md and its pictures from the results

Each finished (task, variant, seed) is one line of benchmarks/results/family.jsonl, with settings, curve, machine,
versions and commit; what is there is not run again. The score is the mean return of 20 deterministic episodes of the
final policy (seed 0 of evaluation). Seconds are of the processor (`time.process_time`), not of the clock on the wall:
the machine may be doing other things.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from records import add_row, in_words, read_rows, write_between

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "family.jsonl"
SEEDS = range(5)

CONSTANT: dict[str, Any] = dict(learning_rate_schedule="constant")
TASKS: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(total_steps=100_000, n_envs=8, rollout_length=32, gamma=0.98),
    "Pendulum-v1": dict(total_steps=60_000, n_envs=4, rollout_length=512, gamma=0.9),
    "Hopper-v5": dict(total_steps=60_000, n_envs=8, rollout_length=256, gamma=0.99),
}
MANY_EPOCHS: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(gae_lambda=0.8, n_epochs=20, batch_size=256, learning_rate=1e-3),
    "Pendulum-v1": dict(gae_lambda=0.95, n_epochs=10, batch_size=64, learning_rate=1e-3),
    "Hopper-v5": dict(gae_lambda=0.95, n_epochs=10, batch_size=128, learning_rate=3e-4),
}
"""The presets' settings, with constant schedules (and rollouts half as long on Pendulum-v1)."""
UNCLIPPED = dict(clip_epsilon=0.999999, clip_epsilon_high=1e9)
"""The widest band there is, [1e-6, 1e9]: the same loss, the same steps, and no ratio that it holds back."""
ONE_STEP: dict[str, dict[str, dict[str, Any]]] = {
    "a2c": {
        "CartPole-v1": dict(rollout_length=16, learning_rate=4e-3),
        "Pendulum-v1": dict(rollout_length=64, learning_rate=4e-3, gae_lambda=0.95, normalize_advantages=True),
    },
    "reinforce": {
        "CartPole-v1": dict(rollout_length=64, learning_rate=5e-3),
        "Pendulum-v1": dict(rollout_length=200, learning_rate=5e-3, normalize_advantages=True),
    },
}
"""One gradient per rollout wants shorter rollouts and longer steps; REINFORCE wants episodes that end in them."""

RELATIVES = ["reinforce", "a2c", "trpo", "ppo", "ppo-penalty", "ppo-kl-adaptive"]
CLIPS = [0.05, 0.1, 0.2, 0.3, 0.5]
RATES = [3e-4, 1e-3, 3e-3]
EPOCHS = [1, 5, 20]
"""Learning rates and passes over each rollout at which CartPole-v1 is learned with the clip and without."""


def clip_name(epsilon: float) -> str:
    return "ppo" if epsilon == 0.2 else f"ppo-clip-{epsilon}"


def grid_name(kind: str, what: str, value: float) -> str:
    """`ppo` or `ppo-unclipped` at another learning rate (`lr`) or number of passes (`epochs`) than the task's own."""
    own = {"lr": 1e-3, "epochs": 20}[what]
    return kind if value == own else f"{kind}-{what}-{value:g}"


def settings_for(task: str, variant: str) -> dict[str, Any]:
    """What `proximo.train` is given, beside the seed."""
    common = TASKS[task] | CONSTANT
    if variant in ONE_STEP:
        return common | ONE_STEP[variant][task] | dict(algorithm=variant)
    if variant == "trpo":
        epochs = MANY_EPOCHS[task]
        return common | dict(algorithm="trpo", **epochs)
    settings = common | MANY_EPOCHS[task] | dict(clip_schedule="constant", clip_epsilon=0.2)
    if variant == "ppo-penalty":
        return settings | dict(objective="kl_penalty")
    if variant == "ppo-kl-adaptive":
        return settings | dict(learning_rate_schedule="kl_adaptive")
    if variant.startswith("ppo-clip-"):
        return settings | dict(clip_epsilon=float(variant.removeprefix("ppo-clip-")))
    kind, _, rate = variant.partition("-lr-")
    kind, _, n_epochs = kind.partition("-epochs-")
    settings |= dict(learning_rate=float(rate)) if rate else {}
    settings |= dict(n_epochs=int(n_epochs)) if n_epochs else {}
    return settings | (UNCLIPPED if kind == "ppo-unclipped" else {})


def variants_of(task: str) -> list[str]:
    if task == "Hopper-v5":
        return ["ppo", "ppo-unclipped"]
    names = [*RELATIVES, *map(clip_name, CLIPS), "ppo-unclipped"]
    if task == "CartPole-v1":
        for kind in ("ppo", "ppo-unclipped"):
            names += [grid_name(kind, "lr", rate) for rate in RATES]
            names += [grid_name(kind, "epochs", n) for n in EPOCHS]
    return list(dict.fromkeys(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cost", action="store_true", help="only time the updates")
    parser.add_argument("--table", action="store_true", help="only write the page and the pictures")
    parser.add_argument("--one", nargs=2, metavar=("TASK", "SEED"), help="run all of a task and seed in this process")
    arguments = parser.parse_args()
    if arguments.one:
        run_all_of(arguments.one[0], int(arguments.one[1]))
        return
    if not (arguments.table or arguments.cost):
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(run_in_subprocess, [(task, seed) for seed in SEEDS for task in TASKS]))
    if arguments.cost or not (arguments.table or read_rows(RESULTS, kind="cost")):
        for task in TASKS:
            measure_cost(task)
    write_page()


def runs(**which: object) -> list[dict]:
    """Finished runs; of one that two processes did at once, the last."""
    found = read_rows(RESULTS, kind="run", **which)
    return list({(row["task"], row["variant"], row["seed"]): row for row in found}.values())


def run_in_subprocess(one: tuple[str, int]) -> None:
    """A process of its own, which may be killed: the next call goes on with what is not done yet."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = subprocess.run([sys.executable, __file__, "--one", *map(str, one)], check=False, env=environment).returncode
    print(*one, f"exit {code}", flush=True)


def run_all_of(task: str, seed: int) -> None:
    with_kl_of_each_update()
    for variant in variants_of(task):
        if not runs(task=task, variant=variant, seed=seed):
            run_one(task, variant, seed)


def run_one(task: str, variant: str, seed: int) -> None:
    import proximo
    from proximo.runs.directory import RunDirectory
    from proximo.runs.metrics import read_metrics

    settings = settings_for(task, variant)
    began, ended_early = time.process_time(), ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        try:
            assert not proximo.train(task, seed=seed, run_dir=path, quiet=True, **settings).interrupted_by
        except proximo.UserError as error:  # updates that are not finite, one after the other
            ended_early = str(error).replace(folder, "")
        seconds = time.process_time() - began
        score = proximo.evaluate(path, episodes=20, seed=0)["return_mean"]
        metrics: Any = read_metrics(RunDirectory(path).metrics_path)
    metrics = [row for row in metrics if "kl_of_update" in row]  # not those that were left out
    returns = [row["return_mean"] for row in metrics if row["return_mean"] is not None]
    row = {
        "kind": "run",
        "task": task,
        "variant": variant,
        "seed": seed,
        "env_steps": metrics[-1]["env_steps"],
        "n_iterations": len(metrics),
        "ended_early": ended_early,
        "score": round(score, 2),
        "best_in_training": round(max(returns), 2),
        "kl_median": significant(float(np.median([row["kl_of_update"] for row in metrics]))),
        "kl_max": significant(max(row["kl_of_update"] for row in metrics)),
        "process_seconds": round(seconds, 1),
        "settings": settings,
        "curve": curve_of(metrics),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    add_row(RESULTS, row, "numpy", "gymnasium", *(["mujoco"] if task == "Hopper-v5" else []))
    print(task, variant, seed, row["score"], row["kl_max"], row["process_seconds"], ended_early[:80], flush=True)


def with_kl_of_each_update() -> None:
    """Let every algorithm measure the exact mean KL(old || new) of its whole update, over the steps of its rollout."""
    from proximo.algorithms.a2c import A2C
    from proximo.algorithms.ppo import PPO
    from proximo.algorithms.reinforce import Reinforce
    from proximo.algorithms.trpo import TRPO

    for kind in (PPO, A2C, Reinforce, TRPO):
        kind.update = _measured(kind.update)


def _measured(update: Callable[..., dict]) -> Callable[..., dict]:
    import torch

    from proximo.core.masked import masked_mean

    def measured(self: Any, policy: Any, optimizer: Any, batch: Any, generator: Any) -> dict:
        with torch.no_grad():
            old = policy.evaluate(batch).distribution.frozen()
        metrics = update(self, policy, optimizer, batch, generator)
        with torch.no_grad():
            new = policy.evaluate(batch)
            kl = masked_mean(old.kl(new.distribution), batch.mask)
        after = float(masked_mean(new.entropy, batch.mask))
        return metrics | {"kl_of_update": float(kl), "entropy_after": after}

    return measured


def curve_of(metrics: list[dict], n_points: int = 40) -> list[list[float | None]]:
    """Points of steps, return, KL (the largest since the point before) and entropy."""
    ends = np.unique(np.linspace(1, len(metrics), n_points).round().astype(int))
    points = []
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        row, kls = metrics[last - 1], [row["kl_of_update"] for row in metrics[first:last]]
        reached = None if row["return_mean"] is None else round(row["return_mean"], 2)
        points.append([row["env_steps"], reached, significant(max(kls)), significant(row["entropy_after"])])
    return points


def significant(value: float) -> float:
    return float(f"{value:.4g}")


# --- the cost of an update ---------------------------------------------------------------------------------


def measure_cost(task: str, n_pairs: int = 15) -> None:
    """Updates of the same policy on the same rollout, PPO's and TRPO's turn by turn, in seconds of the processor."""
    import torch

    from proximo.algorithms.ppo import PPO
    from proximo.algorithms.trpo import TRPO
    from proximo.collect.make import find_factory
    from proximo.collect.rollout import rollout
    from proximo.training.config import ControlConfig, with_settings
    from proximo.training.control import start
    from proximo.training.environments import make_envs

    torch.set_num_threads(1)
    settings = settings_for(task, "ppo") | {"env_id": task, "vectorization": "serial", "action_mask": "none"}
    config = with_settings(ControlConfig(), settings, where="family.py")
    envs: Any = make_envs(config, find_factory(task))
    state = start(config, envs)
    carry: Any = state.carry
    batch, _ = rollout(
        state.policy, envs, carry, config.rollout_length, state.action_generator, gamma=config.algorithm.gamma
    )
    envs.close()
    shared: dict[str, Any] = MANY_EPOCHS[task] | {"gamma": TASKS[task]["gamma"]}
    alone: dict[str, Any] = shared | {"n_epochs": 1, "batch_size": batch.n_valid}
    updates = {
        "ppo, eager": PPO(update_path="eager", **shared),
        "ppo, fused": PPO(update_path="fused", **shared),
        "trpo": TRPO(**shared),
        "trpo, policy alone": TRPO(**alone),
    }
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for turn in range(n_pairs + 1):
        for name, algorithm in updates.items():
            taken = _seconds_of(algorithm, state.policy, batch)
            seconds[name] += [taken] if turn else []  # the first turn warms up
    row = {"kind": "cost", "task": task, "n_steps": batch.n_valid, "seconds": seconds, "settings": shared}
    add_row(RESULTS, row, "numpy", "gymnasium")


def _seconds_of(algorithm: Any, policy: Any, batch: Any) -> float:
    import torch

    from proximo.algorithms.adam import FlatAdam

    policy = copy.deepcopy(policy)
    optimizer = FlatAdam(policy, learning_rate=algorithm.learning_rate)
    generator = torch.Generator().manual_seed(0)
    began = time.process_time()
    algorithm.update(policy, optimizer, batch, generator)
    return time.process_time() - began


# --- the page ----------------------------------------------------------------------------------------------


def write_page() -> None:
    """Write the tables and pictures of docs/family.md from the results."""
    write_between("relatives", table_of(RELATIVES, TWO_TASKS), page=PAGE)
    write_between("clipping", table_of([*map(clip_name, CLIPS), "ppo-unclipped"], TWO_TASKS), page=PAGE)
    write_between("collapse", collapse_table(), page=PAGE)
    write_between("cost", cost_table(), page=PAGE)
    write_between("machine", in_words(read_rows(RESULTS))[1:], page=PAGE)
    PICTURES.mkdir(exist_ok=True)
    draw_relatives()
    draw_clipping()
    draw_collapse()
    draw_grid()
    draw_trust_region()


def table_of(variants: list[str], tasks: list[str]) -> list[str]:
    """Scores per seed, and the KL of an update."""
    lines = [
        "| task | variant | mean score | per seed | KL of an update: median, largest | seconds |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [line_of(task, variant) for task in tasks for variant in variants]


def line_of(task: str, variant: str) -> str:
    done = sorted(runs(task=task, variant=variant), key=lambda row: row["seed"])
    if not done:
        return f"| {task} | {variant} | not run yet | | | |"
    scores = [row["score"] for row in done]
    missing = "" if len(done) == len(SEEDS) else f" ({len(done)} of {len(SEEDS)} seeds)"
    kl = f"{np.median([row['kl_median'] for row in done]):.2g}, {max(row['kl_max'] for row in done):.2g}"
    each = ", ".join(f"{row['score']:.0f}" for row in done)
    seconds = np.median([row["process_seconds"] for row in done])
    return f"| {task} | {variant} | **{np.mean(scores):.0f}**{missing} | {each} | {kl} | {seconds:.0f} |"


def collapse_table() -> list[str]:
    """What is left at the end of what was once reached, with the clip and without."""
    lines = [
        "| task | learning rate | epochs | clip | final score per seed | best in training per seed | median KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, variant in [*((task, kind) for task in TASKS for kind in KINDS), *(("CartPole-v1", v) for v in GRID)]:
        done = sorted(runs(task=task, variant=variant), key=lambda row: row["seed"])
        if not done:
            continue
        settings = done[0]["settings"]
        scores, best = (", ".join(f"{row[name]:.0f}" for row in done) for name in ("score", "best_in_training"))
        kl = np.median([row["kl_median"] for row in done])
        clip = "none" if "unclipped" in variant else "0.2"
        rate, epochs = settings["learning_rate"], settings["n_epochs"]
        lines.append(f"| {task} | {rate:g} | {epochs} | {clip} | {scores} | {best} | {kl:.2g} |")
    return lines


def cost_table() -> list[str]:
    lines = [
        "| task | steps per update | PPO, eager (s) | PPO, fused (s) | TRPO (s) | its policy alone (s) | "
        "TRPO / PPO eager | TRPO / PPO fused | policy alone / PPO eager |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in read_rows(RESULTS, kind="cost"):
        seconds = {name: np.array(values) for name, values in row["seconds"].items()}
        eager, fused, trpo, alone = seconds.values()
        middle = " | ".join(f"{np.median(column):.3f}" for column in (eager, fused, trpo, alone))
        ratios = " | ".join(f"**{np.median(one / other):.2f}**" for one, other in ((trpo, eager), (trpo, fused)))
        last = f"**{np.median(alone / eager):.2f}**"
        lines.append(f"| {row['task']} | {row['n_steps']:,} | {middle} | {ratios} | {last} |")
    return lines


PAGE = "family.md"
PICTURES = HERE.parent / "docs" / "pictures"
TWO_TASKS = ["CartPole-v1", "Pendulum-v1"]
KINDS = ["ppo", "ppo-unclipped"]
GRID = [
    grid_name(kind, what, value)
    for what, values in (("lr", [3e-4, 3e-3]), ("epochs", [1, 5]))
    for value in values
    for kind in KINDS
]
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
WITH_AND_WITHOUT = [("ppo", "clip 0.2", "#0072B2"), ("ppo-unclipped", "no clip", "#D00000")]
STEPS, RETURN, KL, ENTROPY = range(4)


def figure_of(n_rows: int, n_columns: int, width: float = 4.2, height: float = 2.7) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:g}k")
    return figure, axes


def curve(axis: Any, task: str, variant: str, column: int, color: str, label: str | None = None) -> None:
    """The median over seeds, and a band from the lowest to the highest."""
    done = [row["curve"] for row in runs(task=task, variant=variant)]
    if not done:
        return
    steps = np.array([point[STEPS] for point in max(done, key=len)], float)
    known = [np.array([point for point in points if point[column] is not None], float) for points in done]
    lines = np.array([np.interp(steps, points[:, STEPS], points[:, column], left=np.nan) for points in known])
    shown = ~np.isnan(lines).any(0)
    lines = np.maximum(lines, LOWEST_KL) if column == KL else lines
    steps, lines = steps[shown], lines[:, shown]
    axis.plot(steps, np.median(lines, 0), color=color, label=label or variant, linewidth=1.4)
    axis.fill_between(steps, lines.min(0), lines.max(0), color=color, alpha=BAND, linewidth=0)


BAND = 0.09
LOWEST_KL = 1e-6
"""What is drawn for less: an update that changes nothing has none."""


def draw_relatives() -> None:
    figure, axes = figure_of(2, 2)
    for column, task in enumerate(TWO_TASKS):
        for variant, color in zip(RELATIVES, COLORS, strict=False):
            curve(axes[0, column], task, variant, RETURN, color)
            curve(axes[1, column], task, variant, KL, color)
        axes[0, column].set_title(task, fontsize=10)
        axes[1, column].set_yscale("log")
        axes[1, column].set_xlabel("environment steps", fontsize=8)
    axes[0, 0].set_ylabel("return in training", fontsize=8)
    axes[1, 0].set_ylabel("KL(old || new) of an update", fontsize=8)
    _save_with_legend(figure, axes[0, 0], "family_relatives.png", n_columns=6)


def draw_clipping() -> None:
    figure, axes = figure_of(2, 2)
    shades = ["#08306B", "#2171B5", "#41AB5D", "#E69F00", "#CC79A7"]
    for column, task in enumerate(TWO_TASKS):
        for epsilon, color in zip(CLIPS, shades, strict=True):
            for row, what in enumerate((RETURN, KL)):
                curve(axes[row, column], task, clip_name(epsilon), what, color, f"clip {epsilon}")
        for row, what in enumerate((RETURN, KL)):
            curve(axes[row, column], task, "ppo-unclipped", what, "#D00000", "no clip")
        axes[0, column].set_title(task, fontsize=10)
        axes[1, column].set_yscale("log")
        axes[1, column].set_xlabel("environment steps", fontsize=8)
    axes[0, 0].set_ylabel("return in training", fontsize=8)
    axes[1, 0].set_ylabel("KL(old || new) of an update", fontsize=8)
    _save_with_legend(figure, axes[0, 0], "family_clipping.png", n_columns=6)


def draw_collapse() -> None:
    """The same epochs, steps and seeds with the clip and without."""
    figure, axes = figure_of(3, len(TASKS), width=3.6, height=2.2)
    for column, task in enumerate(TASKS):
        for variant, label, color in WITH_AND_WITHOUT:
            for row, what in enumerate((RETURN, KL, ENTROPY)):
                curve(axes[row, column], task, variant, what, color, label)
        axes[0, column].set_title(task, fontsize=10)
        axes[1, column].set_yscale("log")
        axes[2, column].set_xlabel("environment steps", fontsize=8)
    for row, words in enumerate(("return in training", "KL(old || new)\nof an update", "entropy (nats)")):
        axes[row, 0].set_ylabel(words, fontsize=8)
    _save_with_legend(figure, axes[0, 0], "family_collapse.png", n_columns=2)


def draw_grid() -> None:
    """Final scores on CartPole-v1 over learning rates and over epochs: every seed is a point."""
    figure, axes = figure_of(1, 2, height=3.0)
    for axis, what, values, words in (
        (axes[0, 0], "lr", RATES, "learning rate (20 epochs)"),
        (axes[0, 1], "epochs", EPOCHS, "epochs per rollout (learning rate 0.001)"),
    ):
        for (kind, label, color), shift in zip(WITH_AND_WITHOUT, (-0.1, 0.1), strict=True):
            names = [grid_name(kind, what, value) for value in values]
            scores = [[row["score"] for row in runs(task="CartPole-v1", variant=name)] for name in names]
            for place, points in enumerate(scores):
                axis.scatter([place + shift] * len(points), points, color=color, s=18, alpha=0.6, linewidth=0)
            means = [np.mean(points) if points else np.nan for points in scores]
            axis.plot(np.arange(len(values)) + shift, means, color=color, label=label)
        axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axis.set_xlabel(words, fontsize=8)
        axis.set_ylim(0, 520)
    axes[0, 0].set_ylabel("final score, CartPole-v1", fontsize=8)
    _save_with_legend(figure, axes[0, 0], "family_grid.png", n_columns=2)


def draw_trust_region() -> None:
    """TRPO's KL of every update beside its limit, and PPO's; and what an update costs."""
    figure, axes = figure_of(1, 3, width=3.6, height=2.9)
    for axis, task in zip(axes[0], TWO_TASKS, strict=False):
        for variant, color in (("ppo", "#0072B2"), ("trpo", "#009E73")):
            curve(axis, task, variant, KL, color)
        axis.axhline(0.01, color="black", linewidth=0.9, linestyle="--", label="TRPO's limit, 0.01")
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter("")
        axis.set_ylim(2e-3, 0.3)
        axis.set_title(f"KL of an update, {task}", fontsize=9)
        axis.set_xlabel("environment steps", fontsize=8)
    costs = read_rows(RESULTS, kind="cost")
    axis = axes[0, 2]
    for place, row in enumerate(costs):
        eager = np.array(row["seconds"]["ppo, eager"])
        for shift, (name, color) in enumerate(COST_COLORS.items()):
            ratios = np.array(row["seconds"][name]) / eager
            height = float(np.median(ratios))
            spread = np.abs(np.quantile(ratios, [0.25, 0.75]) - height)[:, None]
            bar = dict(width=0.26, color=color, yerr=spread, ecolor="#444444", error_kw=dict(linewidth=0.8))
            axis.bar(place + 0.28 * (shift - 1), height, **bar, label=None if place else name)
    axis.axhline(1.0, color="#0072B2", linewidth=0.9, label="PPO, eager")
    axis.set_xticks(range(len(costs)), [row["task"] for row in costs], fontsize=7)
    axis.set_title("cost of an update, PPO eager = 1", fontsize=9)
    axis.set_ylim(0, 1.5)
    axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper center")
    _save_with_legend(figure, axes[0, 0], "family_trust_region.png", n_columns=3)


COST_COLORS = {"ppo, fused": "#56B4E9", "trpo": "#009E73", "trpo, policy alone": "#A6D854"}


def _save_with_legend(figure: Any, axis: Any, name: str, n_columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=n_columns, fontsize=8, frameon=False)
    figure.savefig(PICTURES / name, dpi=110)


if __name__ == "__main__":
    main()
