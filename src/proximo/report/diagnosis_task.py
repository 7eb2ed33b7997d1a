"""Rules of the diagnosis about the task: what its episodes and rewards are like, and how fast it is."""

from __future__ import annotations

import math

import numpy as np

from proximo.report.evidence import FEWEST_ITERATIONS, Evidence
from proximo.report.finding import Finding, advice
from proximo.report.words import number, percent

ENVIRONMENT_SHARE = 0.70
"""From here, a faster environment speeds up a run more than anything else can."""
UPDATE_SHARE = 0.90
"""From here, even an environment that costs nothing would not be felt."""
SLOW_ENVIRONMENT_SECONDS = 1e-3
"""Worker processes are for environments slower than about this a step: see `vectorization`."""
ENDLESS_STEPS = 5000
"""Steps of each environment without one finished episode; the usual limits lie between 200 and 1,000."""


def returns_flat(evidence: Evidence) -> Finding | None:
    """Nothing was learned."""
    progress = evidence.progress
    if progress is None or not evidence.is_flat:
        return None
    returns, lengths = evidence.column("return_mean"), evidence.column("length_mean")
    ends = evidence.median("terminated_share")
    always_cut = spread(lengths) == 0 and not (ends or 0.0) > 0
    if spread(returns) == 0 and not always_cut:
        return Finding(
            "rewards_constant",
            "problem",
            f"Every one of {progress.n_episodes:,} episodes up to {evidence.at(progress.final_row)} has a return of "
            f"{number(progress.final)}, whatever was done in its {number(evidence.median('length_mean'))} steps.",
            "The reward tells nothing apart: nothing can be learned from it.",
            advice(
                "see by proximo check-env that the reward hangs on the actions", "give rewards on the way to the goal"
            ),
        )
    if spread(returns) == 0:
        had_learned = evidence.settings.get("init_from") is not None
        return Finding(
            "episodes_all_cut_off",
            "note" if had_learned else "problem",
            f"Every episode has {number(float(np.nanmax(lengths)))} steps and a return of {number(progress.final)}, in "
            f"all {progress.n_episodes:,} episodes up to {evidence.at(progress.final_row)}.",
            "Every episode ends in the time limit and scores the same. The policy that this run began with may have "
            "solved the task already; else the goal was never reached, and there is nothing to learn from."
            if had_learned
            else "Every episode ends in the time limit and scores the same: the goal was never reached, so there is "
            "nothing to learn from, unless lasting so long is the goal.",
            advice(
                f"explore more: raise {evidence.setting('entropy_coef', '0.01')}",
                "give rewards on the way to the goal",
                f"raise {evidence.setting('max_episode_steps')}",
            ),
        )
    return Finding(
        "returns_flat",
        "problem",
        f"The mean return was {number(progress.start)} in {evidence.at(progress.start_row)}, is "
        f"{number(progress.final)} in {evidence.at(progress.final_row)}, and never passed {number(progress.best)}."
        + (" Every episode ran into the time limit." if ends == 0 else ""),
        "The policy does not improve, unless this is the best that the task allows.",
        "First mend what the other findings show, and run proximo check-env. "
        + advice(
            f"try another {evidence.setting('learning_rate', '0.0003')}",
            f"raise {evidence.setting('rollout_length')} or {evidence.setting('entropy_coef')}",
            evidence.switch_on("normalize_observations"),
            evidence.switch_on("normalize_rewards"),
        ),
    )


def no_episode_finished(evidence: Evidence) -> Finding | None:
    """There are steps, but no episode has ended."""
    if evidence.progress is not None:
        return None
    steps = evidence.column("env_steps")
    n_envs = evidence.settings.get("n_envs")
    if not np.isfinite(steps).any():
        return None
    each = float(np.nanmax(steps)) / (n_envs if isinstance(n_envs, int) and n_envs > 0 else 1)
    is_endless = each >= ENDLESS_STEPS
    return Finding(
        "no_episode_finished",
        "problem" if is_endless else "note",
        f"No episode has finished after {number(float(np.nanmax(steps)))} steps, {number(each)} per environment, by "
        f"{evidence.at(len(evidence.rows) - 1)}.",
        "The environment seems never to end an episode." if is_endless else "It may just be too early.",
        "Set max_episode_steps, to 1000 for example, or let the environment return terminated or truncated."
        if is_endless
        else "Wait; if episodes have no end of their own, set max_episode_steps.",
    )


def time_is_lopsided(evidence: Evidence) -> Finding | None:
    """Nearly all of the time goes to one of the two phases."""
    late = np.arange(len(evidence.rows)) >= len(evidence.rows) // 2  # the first iterations also warm up
    collecting = float(np.nansum(evidence.column("seconds_collecting")[late]))
    updating = float(np.nansum(evidence.column("seconds_updating")[late]))
    stepping = float(np.nansum(evidence.column("seconds_environment")[late]))
    size = evidence.rollout_size
    if collecting + updating <= 0 or len(evidence.rows) < FEWEST_ITERATIONS:
        return None
    share = collecting / (collecting + updating)
    if share >= ENVIRONMENT_SHARE:
        per_step = collecting / (int(late.sum()) * size) if size else None
        is_slow = per_step is not None and per_step >= SLOW_ENVIRONMENT_SECONDS
        return Finding(
            "environment_dominates",
            "note",
            f"Collecting takes {percent(share)} of the time"
            + (f", {number(1e6 * per_step)} microseconds a step" if per_step else "")
            + (f"; {percent(min(stepping / collecting, 1.0))} of that is the environment's own." if stepping else "."),
            "The environment sets the pace; updates hardly count.",
            'Set vectorization to "workers", which steps environments on all cores.'
            # Several agents, and games, are stepped serially.
            if is_slow
            and evidence.settings.get("vectorization") != "workers"
            and not {"agents", "latest_share"} & set(evidence.settings)
            else f"Raise {evidence.setting('n_envs')}, or make the environment's step() faster.",
        )
    if 1 - share >= UPDATE_SHARE:
        return Finding(
            "updates_dominate",
            "note",
            f"Updating takes {percent(1 - share)} of the time.",
            "The environment is so fast that gradient steps set the pace.",
            f"Raise {evidence.setting('batch_size')}, or lower {evidence.setting('n_epochs')}.",
        )
    return None


def spread(values: np.ndarray) -> float:
    """Largest less smallest of the known values, NaN where there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.max() - finite.min()) if len(finite) else math.nan
