"""Rules of the diagnosis about sizes: of observations, rewards and advantages, and of what the critic makes of them."""

from __future__ import annotations

import numpy as np

from proximo.report.evidence import FEWEST_ITERATIONS, Evidence, is_number
from proximo.report.finding import Finding, advice
from proximo.report.words import number

LARGE_OBSERVATION = 100.0
"""Networks begin with weights for numbers around 1; one of a hundred saturates the first layer by itself."""
SMALL_OBSERVATION = 0.01
"""Numbers that are all below this hardly move what the first layer gives."""
OBSERVATIONS_APART = 100.0
"""The smaller of two numbers that lie two orders of magnitude apart is drowned by the other one."""
LARGE_VALUES = 1000.0
"""A critic begins around 0 and moves by its learning rate a step: targets of thousands are far away."""
SMALL_VALUES = 0.1
"""The outputs of a critic that has learned nothing are about as large, and drown rewards that are smaller."""
CLIPPED_GRADIENT = 500.0
"""Where the gradient is cut to a five-hundredth, what is left of the actor's share is near the epsilon of Adam."""
DEGENERATE_ADVANTAGES = 0.02
"""With a fiftieth of their first spread left, advantages are what rounding and the critic's errors make."""
POOR_EXPLAINED_VARIANCE = 0.10
"""Below this the advantages are hardly better than plain returns."""
SAME_RETURN = 0.005
"""Mean returns that move less than this share of their size come from episodes that all score alike."""
NEGLIGIBLE_VALUE_LOSS = 0.05
"""A critic whose error fell to a twentieth has learned; its explained variance then compares noise with noise."""
SMALLEST_ROLLOUT = 128
"""The explained variance of a handful of steps is chance."""
VALUE_LOSS_FACTOR = 100.0
"""Value losses follow the square of the returns; a hundred times beyond that is an explosion."""


def observations_out_of_scale(evidence: Evidence) -> Finding | None:
    """Numbers of an observation that are of very different size, or all large or small, and nothing normalizes them."""
    largest, smallest = evidence.median("observation_largest"), evidence.median("observation_smallest")
    if largest is None or smallest is None or evidence.settings.get("normalize_observations") is True:
        return None
    is_apart = smallest > 0 and largest >= OBSERVATIONS_APART * smallest
    if not (is_apart or largest >= LARGE_OBSERVATION or 0 < largest < SMALL_OBSERVATION):
        return None
    return Finding(
        "observations_out_of_scale",
        "note" if evidence.has_learned else "problem" if evidence.is_flat else "warning",
        f"The largest number of an observation reaches {number(largest)}, the smallest {number(smallest)} (medians "
        f"over the rollouts up to {evidence.at(len(evidence.rows) - 1)}), and normalize_observations is off.",
        "The network takes numbers around 1 best: it sees the large ones alone, and the small ones not at all."
        if is_apart
        else "The network takes numbers around 1 best, and these are far from it.",
        advice(evidence.switch_on("normalize_observations"), "or give observations in other units"),
    )


def rewards_out_of_scale(evidence: Evidence) -> Finding | None:
    """Returns that are far from 1 in size, and nothing normalizes rewards."""
    rewards = evidence.column("reward_largest")
    finite = rewards[np.isfinite(rewards)]
    if len(finite) == 0 or not finite.max() > 0 or evidence.settings.get("normalize_rewards") is True:
        return None
    lengths, gamma = evidence.column("length_mean"), evidence.settings.get("gamma")
    length = max(float(np.nanmax(lengths)), 1.0) if np.isfinite(lengths).any() else np.inf
    reach = min(1.0 / (1.0 - gamma), length) if is_number(gamma) and 0 <= gamma < 1 else length
    # Of a return only what lies within the reach of gamma is to be foreseen.
    foreseen = np.minimum(reach / np.maximum(lengths, 1.0), 1.0) * np.abs(evidence.column("return_mean"))
    foreseen = foreseen[np.isfinite(foreseen)]
    large = max(float(np.median(finite)), float(np.median(foreseen)) if is_number(gamma) and len(foreseen) else 0.0)
    small = float(finite.max()) * reach
    if not (large >= LARGE_VALUES or small < SMALL_VALUES):
        return None
    size = f"about {number(large)}" if large >= LARGE_VALUES else f"below {number(small)}"
    return Finding(
        "rewards_out_of_scale",
        "note" if evidence.has_learned else "problem" if evidence.is_flat else "warning",
        f"The largest reward is {number(float(finite.max()))} and the critic has to foresee discounted returns of "
        f"{size} (up to {evidence.at(len(evidence.rows) - 1)}); normalize_rewards is off. The value loss is "
        f"{number(evidence.median('value_loss'))} (median).",
        "The critic cannot reach targets so far away, and its gradient drowns that of the policy."
        if large >= LARGE_VALUES
        else "The errors of an untrained critic are larger than the returns, and its gradient is next to nothing.",
        advice(evidence.switch_on("normalize_rewards"), "or give rewards in other units"),
    )


def value_loss_dwarfs(evidence: Evidence) -> Finding | None:
    """The gradient of the value loss is so large that clipping leaves nothing of the policy's."""
    norm, limit = evidence.median("grad_norm", evidence.is_active), evidence.settings.get("max_grad_norm")
    loss, weight = evidence.median("value_loss"), evidence.settings.get("value_coef")
    if norm is None or loss is None or not is_number(limit) or not limit > 0 or not is_number(weight):
        return None
    if len(evidence.rows) < FEWEST_ITERATIONS or not norm >= CLIPPED_GRADIENT * limit:
        return None
    return Finding(
        "value_loss_dwarfs",
        "note" if evidence.has_learned else "warning",
        f"The gradient has a norm of {number(norm)}, and max_grad_norm cuts it to {number(limit)} (median of "
        f"{len(evidence.rows):,} iterations). value_coef times the value loss is {number(weight * loss)}, "
        f"the policy loss {number(evidence.median('policy_loss'))}.",
        "Both gradients are cut together, so the critic's leaves next to nothing of the policy's.",
        advice(
            evidence.switch_on("normalize_rewards"),
            f"lower {evidence.setting('value_coef', '0.5')}" if weight > 1 else "",
            f"raise {evidence.setting('max_grad_norm', '0.5')}",
        ),
    )


def advantages_degenerate(evidence: Evidence) -> Finding | None:
    """No action is better than another, as far as rewards and critic tell, and what is left is normalized up."""
    spread, is_normalized = evidence.column("advantage_std"), evidence.settings.get("normalize_advantages", True)
    known = np.flatnonzero(np.isfinite(spread))
    if len(known) < FEWEST_ITERATIONS or not evidence.is_flat or not is_normalized:
        return None
    first = float(spread[known[: max(len(known) // 10, 1)]].max())
    late = known[len(known) // 2 :]
    now = float(np.median(spread[late]))
    if not now <= DEGENERATE_ADVANTAGES * first:
        return None
    return Finding(
        "advantages_degenerate",
        "problem",
        f"The advantages have a standard deviation of {number(now)} (median from {evidence.at(int(late[0]))} on); at "
        f"first it was {number(first)}.",
        "No action leads to more than another, so what is left is the critic's error; normalize_advantages blows it "
        "up, and the policy learns chance.",
        advice(
            "give a reward that tells actions apart",
            f"explore more: raise {evidence.setting('entropy_coef', '0.01')}, or set exploration to rnd",
        ),
    )


def critic_explains_nothing(evidence: Evidence) -> Finding | None:
    """The value function is no better than a constant, although there is something to foresee."""
    explained, losses = evidence.column("explained_variance"), evidence.column("value_loss")
    size = evidence.rollout_size
    if evidence.progress is None or (size is not None and size < SMALLEST_ROLLOUT):
        return None
    late = np.arange(len(explained)) >= len(explained) // 2
    matters = late & np.isfinite(explained) & _returns_vary(evidence.column("return_mean"))
    if np.isfinite(losses).any():
        matters &= ~(losses < NEGLIGIBLE_VALUE_LOSS * np.nanpercentile(losses, 95))
    if matters.sum() < FEWEST_ITERATIONS // 2 or matters.sum() < 0.25 * late.sum():
        return None
    middle = float(np.median(explained[matters]))
    if middle >= POOR_EXPLAINED_VARIANCE:
        return None
    rows = np.flatnonzero(matters)
    return Finding(
        "critic_explains_nothing",
        "warning" if evidence.has_learned else "problem",
        f"The explained variance is {number(middle)} (median of {len(rows)} iterations, from "
        f"{evidence.at(int(rows[0]))} to {evidence.at(int(rows[-1]))}), with a value loss of "
        f"{number(evidence.median('value_loss', matters))}.",
        "The critic foresees the returns no better than their mean, so the advantages are mostly noise.",
        advice(
            evidence.switch_on("normalize_rewards", " if returns are large"),
            evidence.switch_on("normalize_observations", " if observations differ by orders of magnitude"),
            f"raise {evidence.setting('learning_rate')}, {evidence.setting('value_coef')} or "
            f"{evidence.setting('n_epochs')}",
            f"lower {evidence.setting('gamma')}, which makes returns reach less far",
        ),
    )


def value_loss_exploded(evidence: Evidence) -> Finding | None:
    """The critic's error grows far beyond what larger returns explain."""
    losses, progress = evidence.column("value_loss"), evidence.progress
    finite = np.flatnonzero(np.isfinite(losses))
    if len(finite) < FEWEST_ITERATIONS:
        return None
    tenth = max(len(finite) // 10, 3)
    before, now = float(np.median(losses[finite[:tenth]])), float(np.median(losses[finite[-tenth:]]))
    growth = 1.0
    if progress is not None and progress.start != 0:
        growth = max(1.0, min(abs(progress.final / progress.start), 1e6) ** 2)
    explained = evidence.median("explained_variance", finite[-tenth:])
    is_explained = explained is not None and explained >= 0.5
    if not before > 0 or now < VALUE_LOSS_FACTOR * growth * before or is_explained:
        return None
    return Finding(
        "value_loss_exploded",
        "problem",
        f"The value loss rose from {number(before)} to {number(now)} by {evidence.at(int(finite[-1]))}, "
        f"{number(now / before)} times as much.",
        "The critic chases targets that run away from it, or rewards have grown beyond its reach.",
        advice(
            evidence.switch_on("normalize_rewards"),
            f"lower {evidence.setting('learning_rate')} or {evidence.setting('gamma')}",
            f"lower {evidence.setting('max_grad_norm')}",
        ),
    )


def _returns_vary(returns: np.ndarray) -> np.ndarray:
    """Where mean returns move within a twentieth of the run to either side, `[n]`."""
    reach = max(len(returns) // 20, 1)
    padded = np.pad(returns, reach, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    known = np.isfinite(windows)
    high = np.where(known, windows, -np.inf).max(axis=1)
    low = np.where(known, windows, np.inf).min(axis=1)
    size = np.maximum(np.abs(high), np.abs(low))
    varies = np.zeros(len(returns), bool)
    some = known.any(axis=1)
    varies[some] = high[some] - low[some] > SAME_RETURN * size[some]
    return varies
