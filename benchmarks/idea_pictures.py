"""The pictures of docs/how-ppo-works.md: the clip, how wide, beside the penalty, and lambda's bias and variance.

    python benchmarks/idea_pictures.py              # measure lambda where that is not done yet, then draw everything
    python benchmarks/idea_pictures.py --table      # only draw, from what is measured

Objectives are drawn from the functions that train (`proximo.core.losses`), by calling them at every point. For lambda,
episodes are sampled on the chain of known_chain.py, whose values are known; `proximo.core.advantages.gae` makes
advantages of them with critics that are wrong by known amounts, and mean and variance over the episodes are compared
with the true advantages, and with what they must be by linear algebra. Each (critic, lambda) is a line of
benchmarks/results/gae_lambda.jsonl, with machine, versions and commit.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import known_chain as chains
import numpy as np
import torch
from records import add_row, in_words, read_rows, write_between

from proximo.core.advantages import gae
from proximo.core.distributions import Categorical
from proximo.core.losses import clipped_surrogate, kl_penalized_surrogate

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gae_lambda.jsonl"
PICTURES = HERE.parent / "docs" / "pictures"
PAGE = "how-ppo-works.md"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#A8457F", "#6b6b6b"

SEED = 0
LAMBDAS = [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0]
CRITICS = {"exact": 0.0, "close": 0.25, "poor": 1.0}
"""Standard deviation of the critics' errors, over that of the true values."""
N_GROUPS, GROUP_SIZE, LENGTH = 20, 500, 200
"""Episodes per state and action: groups, of which error bars are made, of so many; and their longest length."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only draw, from what is measured")
    arguments = parser.parse_args()
    if not arguments.table:
        measure()
    draw_objective()
    draw_epsilon()
    draw_penalty()
    rows = read_rows(RESULTS)
    if rows:
        draw_lambda(rows)
        write_between("lambda", table(rows) + in_words(rows), PAGE)


# ------------------------------------------------------------------------------------------- lambda, measured


def measure() -> None:
    """Every critic and lambda that has no line yet, over the same episodes."""
    done = {(row["critic"], row["gae_lambda"]) for row in read_rows(RESULTS)}
    missing = [(critic, each) for critic in CRITICS for each in LAMBDAS if (critic, each) not in done]
    if not missing:
        return
    chain = chains.the_chain()
    samples = sampled_estimates(chain, missing)
    for critic, gae_lambda in missing:
        exact = chains.exact_moments(chain, critic_named(chain, critic), gae_lambda)
        found = summary(samples[critic, gae_lambda], chains.true_advantages(chain))
        row: dict[str, Any] = dict(critic=critic, error=CRITICS[critic], gae_lambda=gae_lambda, seed=SEED)
        row |= dict(n_episodes_per_pair=N_GROUPS * GROUP_SIZE, gamma=chains.GAMMA, **found)
        row["exact"] = exact_summary(exact, chains.true_advantages(chain))
        add_row(RESULTS, row, "numpy")
        print(critic, gae_lambda, found, row["exact"], flush=True)


def critic_named(chain: chains.Chain, critic: str) -> np.ndarray:
    return chains.critic_with_errors(chain, CRITICS[critic], seed=SEED)


def sampled_estimates(
    chain: chains.Chain, wanted: list[tuple[str, float]], n: int = N_GROUPS * GROUP_SIZE
) -> dict[tuple[str, float], np.ndarray]:
    """GAE at the first step of `n` episodes from every state and action, `[n, S, A]`."""
    generator = np.random.default_rng(SEED)
    found = {each: np.zeros((n, chains.N_STATES, 2)) for each in wanted}
    for state in range(chains.N_STATES):
        for action in range(2):
            walks = chains.sample_walks(chain, state, action, n, LENGTH, generator)
            for critic, gae_lambda in wanted:
                estimates = first_advantages(walks, critic_named(chain, critic), gae_lambda)
                found[critic, gae_lambda][:, state, action] = estimates
    return found


def first_advantages(walks: chains.Walks, critic: np.ndarray, gae_lambda: float) -> np.ndarray:
    """GAE at the first step of each episode, by the function that trains; one that is cut off is bootstrapped."""
    done = walks.terminated.copy()
    done[:, -1] |= walks.mask[:, -1]
    arrays = (walks.rewards, critic[walks.before], critic[walks.after], walks.terminated, done, walks.mask)
    tensors = [torch.from_numpy(array) for array in arrays]
    return gae(*tensors, gamma=chains.GAMMA, gae_lambda=gae_lambda)[:, 0].numpy()


def summary(estimates: np.ndarray, truth: np.ndarray) -> dict[str, list[float]]:
    """Squared bias, the part of it between actions, and variance: mean over groups of episodes, and its standard error.

    The squared mean error of a group of n is too large by variance / n on average, which is taken off again.
    """
    groups = estimates.reshape(-1, GROUP_SIZE, *truth.shape)
    bias, variance = groups.mean(1) - truth, groups.var(1, ddof=1)
    noise = variance / GROUP_SIZE
    other = noise[..., ::-1]  # of two actions: the bias between them is their difference, times the other's share
    noise_between = (1.0 - chains.POLICY) ** 2 * (noise + other)
    between = np.array([chains.bias_between_actions(each) for each in bias])
    per_group = {
        "bias_squared": bias**2 - noise,
        "bias_squared_between_actions": between**2 - noise_between,
        "variance": variance,
    }
    means = {name: np.array([chains.mean_over_pairs(each) for each in of]) for name, of in per_group.items()}
    means["mean_squared_error"] = means["bias_squared"] + means["variance"]
    return {name: [float(of.mean()), float(of.std(ddof=1) / len(of) ** 0.5)] for name, of in means.items()}


def exact_summary(moments: chains.Moments, truth: np.ndarray) -> dict[str, float]:
    """The same four numbers without sampling."""
    bias = moments.mean - truth
    found = {
        "bias_squared": chains.mean_over_pairs(bias**2),
        "bias_squared_between_actions": chains.mean_over_pairs(chains.bias_between_actions(bias) ** 2),
        "variance": chains.mean_over_pairs(moments.variance),
    }
    return found | {"mean_squared_error": found["bias_squared"] + found["variance"]}


def table(rows: list[dict]) -> list[str]:
    lines = [
        "| critic | lambda | bias², all | bias², between actions | variance | error of one | of the mean of 256 |",
        "|---|---|---|---|---|---|---|",
    ]
    for critic in CRITICS:
        for row in sorted((row for row in rows if row["critic"] == critic), key=lambda row: row["gae_lambda"]):
            if row["gae_lambda"] not in ((0.0, 0.5, 0.8, 0.9, 0.95, 1.0) if critic == "poor" else (0.0, 0.95, 1.0)):
                continue
            cells = [with_error(row[name]) for name in ("bias_squared", "bias_squared_between_actions", "variance")]
            cells += [with_error(row["mean_squared_error"]), f"{1000.0 * error_of_mean(row, 256):.2f}"]
            lines.append(f"| {critic} | {row['gae_lambda']:g} | " + " | ".join(cells) + " |")
    n = rows[0]["n_episodes_per_pair"]
    words = "In thousandths; a return is 1 at most. ± is one standard error. "
    lines += ["", f"{words}{n:,} episodes from each of 18 pairs of state and action, seed {SEED}."]
    return lines


def with_error(found: list[float]) -> str:
    mean, error = (1000.0 * number for number in found)
    return f"{0.0 if abs(mean) < 0.005 else mean:.2f} ± {error:.2f}"


def error_of_mean(row: dict, n: int) -> float:
    """What is wrong between actions with the mean of `n` estimates: the bias stays, the variance is divided."""
    return row["bias_squared_between_actions"][0] + row["variance"][0] / n


# -------------------------------------------------------------------------------------------------- pictures


def figure_of(n_columns: int, width: float = 4.0, height: float = 3.3) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n_columns, height), layout="constrained")
    axes = figure.subplots(1, n_columns, squeeze=False)[0]
    for axis in axes:
        axis.tick_params(labelsize=8.5)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, name: str) -> None:
    figure.savefig(PICTURES / name, dpi=110)


def objective(ratios: np.ndarray, advantage: float, epsilon: float) -> np.ndarray:
    """The clipped objective at each ratio, one call of the loss for each."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    found = []
    for ratio in ratios:
        log_prob, old = torch.tensor([[float(ratio)]]).log(), torch.zeros(1, 1)
        loss = clipped_surrogate(log_prob, old, torch.full((1, 1), advantage), mask, clip_epsilon=epsilon).loss
        found.append(-float(loss))
    return np.array(found)


def draw_pieces(axis: Any, advantage: float, epsilon: float, highest: float, color: str = BLUE) -> None:
    """The objective: solid where it has a gradient, dotted where it is flat."""
    for low, high in ((0.01, 1 - epsilon), (1 - epsilon, 1 + epsilon), (1 + epsilon, highest)):
        ratios = np.linspace(low, high, 30)
        heights = objective(ratios, advantage, epsilon)
        if np.ptp(heights) < 1e-6:
            axis.plot(ratios, heights, color=ORANGE, linewidth=2.6, linestyle=(0, (1, 1.2)), label="gradient zero")
        else:
            axis.plot(ratios, heights, color=color, linewidth=2.4, label="gradient whole")


def draw_objective() -> None:
    """The clipped objective for a good action and for a bad one."""
    figure, axes = figure_of(2, width=4.6)
    epsilon, highest = 0.2, 2.0
    words = [
        (
            1.0,
            "advantage +1: made more likely",
            (1.3, 0.9, "far enough"),
            (0.05, 0.62, "the wrong side:\nbrought back"),
        ),
        (
            -1.0,
            "advantage −1: made less likely",
            (0.1, -0.66, "far enough"),
            (1.38, -1.2, "the wrong side:\nbrought back"),
        ),
    ]
    for axis, (advantage, title, enough, wrong) in zip(axes, words, strict=True):
        axis.axvspan(1 - epsilon, 1 + epsilon, color=BLUE, alpha=0.09, linewidth=0)
        line = np.array([0.0, highest])
        axis.plot(line, line * advantage, color=PINK, linewidth=1.2, linestyle="--", label="not clipped, r A")
        draw_pieces(axis, advantage, epsilon, highest)
        axis.plot(1.0, advantage, "o", color="black", markersize=5)
        axis.text(*enough, color=ORANGE, fontsize=9)
        axis.text(*wrong, color=BLUE, fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("probability ratio r", fontsize=9)
        axis.set_xticks([0, 0.8, 1, 1.2, 2], ["0", "1 − ε", "1", "1 + ε", "2"])
        axis.set_xlim(0, highest)
    axes[0].set_ylabel("objective", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    save(figure, "clip_objective.png")


def draw_epsilon() -> None:
    """What three widths of the band let through."""
    figure, axes = figure_of(3, width=3.4, height=3.0)
    for axis, epsilon in zip(axes, (0.1, 0.2, 0.3), strict=True):
        axis.axvspan(1 - epsilon, 1 + epsilon, color=BLUE, alpha=0.09, linewidth=0)
        for advantage in (1.0, -1.0):
            draw_pieces(axis, advantage, epsilon, 1.6)
            place = (0.55, 0.22) if advantage > 0 else (1.22, -0.95)
            axis.text(*place, f"A = {advantage:+.0f}".replace("-", "−"), fontsize=9, color=GREY)
        axis.set_title(f"epsilon {epsilon}: ratios from {1 - epsilon:.1f} to {1 + epsilon:.1f}", fontsize=9.5)
        axis.set_xlim(0.5, 1.5)
        axis.set_ylim(-1.6, 1.5)
        axis.set_xlabel("probability ratio r", fontsize=9)
    axes[0].set_ylabel("objective", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    save(figure, "clip_epsilon.png")


OLD_PROBABILITY = 0.5


def expected_objective(probability: float, kind: str, amount: float) -> float:
    """The objective of a state with two actions, of advantages +1 and -1, drawn as often as the old policy does."""
    new = Categorical(torch.tensor([probability, 1.0 - probability]).log().expand(1, 2, 2))
    old = Categorical(torch.tensor([OLD_PROBABILITY, 1.0 - OLD_PROBABILITY]).log().expand(1, 2, 2))
    actions, mask = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    advantages = torch.tensor([[1.0, -1.0]])
    arguments = (new.log_prob(actions), old.log_prob(actions), advantages)
    if kind == "clip":
        return -float(clipped_surrogate(*arguments, mask, clip_epsilon=amount).loss)
    return -float(kl_penalized_surrogate(*arguments, old.kl(new), mask, kl_coef=amount).loss)


def draw_penalty() -> None:
    """The clip beside the penalty, on a policy of two actions."""
    figure, axes = figure_of(2, width=4.6)
    probabilities = np.linspace(0.3, 0.97, 120)
    plain = [expected_objective(p, "penalty", 0.0) for p in probabilities]
    curves = [
        ("clip", [(0.1, GREEN), (0.2, BLUE), (0.3, ORANGE)], "epsilon", "PPO-Clip: nothing is gained beyond the band"),
        ("penalty", [(0.5, ORANGE), (1.0, BLUE), (3.0, GREEN)], "beta", "PPO-Penalty: going on costs more and more"),
    ]
    for axis, (kind, amounts, name, title) in zip(axes, curves, strict=True):
        axis.plot(probabilities, plain, color=PINK, linestyle="--", linewidth=1.2, label="neither")
        for amount, color in amounts:
            heights = [expected_objective(p, kind, amount) for p in probabilities]
            axis.plot(probabilities, heights, color=color, linewidth=2, label=f"{name} {amount}")
            if kind == "penalty":
                best = int(np.argmax(heights))
                axis.plot(probabilities[best], heights[best], "o", color=color, markersize=5)
        axis.axvline(OLD_PROBABILITY, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(-0.5, 0.95)
        axis.set_xlabel("new probability of the good action (old: 0.5)", fontsize=9)
        axis.legend(fontsize=8.5, frameon=False, loc="upper left")
    axes[0].set_ylabel("objective", fontsize=9)
    save(figure, "clip_and_penalty.png")


def draw_lambda(rows: list[dict]) -> None:
    """Bias and variance over lambda; the error for three critics; the error of means of several samples."""
    figure, axes = figure_of(3, width=4.0, height=3.7)
    chain = chains.the_chain()
    grid = np.linspace(0.0, 1.0, 101)
    exact = {
        critic: [exact_summary(chains.exact_moments(chain, critic_named(chain, critic), each), truth) for each in grid]
        for truth in [chains.true_advantages(chain)]
        for critic in CRITICS
    }
    by_critic = {critic: [row for row in rows if row["critic"] == critic] for critic in CRITICS}
    parts = [
        ("bias_squared", PINK, "bias², all of it"),
        ("bias_squared_between_actions", ORANGE, "bias², between actions"),
        ("variance", BLUE, "variance"),
    ]
    for name, color, label in parts:
        curve(axes[0], grid, exact["poor"], by_critic["poor"], name, color, label)
    for critic, color in zip(CRITICS, (GREEN, BLUE, ORANGE), strict=True):
        label = f"{critic} critic (error {CRITICS[critic]:g})"
        curve(axes[1], grid, exact[critic], by_critic[critic], "mean_squared_error", color, label)
    for n, color in ((1, BLUE), (16, GREEN), (256, ORANGE)):
        lines = [one["bias_squared_between_actions"] + one["variance"] / n for one in exact["poor"]]
        axes[2].plot(grid, lines, color=color, linewidth=1.8, label=f"mean of {n}" if n > 1 else "one sample")
        axes[2].plot(grid[np.argmin(lines)], min(lines), "o", color=color, markersize=7, markerfacecolor="white")
        found = [(row["gae_lambda"], error_of_mean(row, n)) for row in by_critic["poor"]]
        axes[2].plot(*np.array(found).T, ".", color=color, markersize=6)
    axes[0].set_title("a poor critic: what lambda trades", fontsize=10)
    axes[1].set_title("error of one advantage, bias² + variance", fontsize=10)
    axes[2].set_title("poor critic: error between actions", fontsize=10)
    for axis in axes:
        axis.set_xlabel("gae_lambda", fontsize=9)
        axis.set_ylim(bottom=0.0)
        axis.legend(fontsize=8.5, frameon=False, loc="upper left")
    axes[2].set_yscale("log")
    axes[2].set_ylim(2e-4, 2.0)
    save(figure, "gae_lambda.png")


def curve(axis: Any, grid: np.ndarray, exact: list[dict], rows: list[dict], name: str, color: str, label: str) -> None:
    """A line by linear algebra, its lowest point where that is the matter, and what was measured with error bars."""
    heights = [one[name] for one in exact]
    axis.plot(grid, heights, color=color, linewidth=1.8, label=label)
    if name == "mean_squared_error":
        axis.plot(grid[np.argmin(heights)], min(heights), "o", color=color, markersize=7, markerfacecolor="white")
    found = np.array([(row["gae_lambda"], *row[name]) for row in rows])
    axis.errorbar(found[:, 0], found[:, 1], 2.0 * found[:, 2], fmt=".", color=color, markersize=5, elinewidth=1.0)


if __name__ == "__main__":
    main()
