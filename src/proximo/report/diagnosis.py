"""What is wrong with a run, in words: pure rules over its metrics.

A rule looks at the evidence and returns a finding or None. A new rule is one function, listed in `RULES`.
Healthy runs do odd things as well (a solved task makes the explained variance meaningless, a learning rate
that decays to 0 stops all movement), so a rule looks only where its number means something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from proximo.report.evidence import COLLAPSE_LOSS, FEWEST_EPISODES, FEWEST_ITERATIONS, Evidence, is_number
from proximo.report.records import Row
from proximo.report.words import number, percent, plural

Severity = Literal["problem", "warning", "note", "good"]
"""`problem`: the run failed or will. `warning`: it suffers. `note`: worth knowing. `good`: as it should be."""

COLLAPSE_GAIN = 0.30
"""There must have been something to lose: a peak this far above the start."""
COLLAPSE_NOISE = 4.5
"""The luckiest of many means lies 2.5 standard deviations above the truth, and the last one may lie 2 below."""
COLLAPSED_ENTROPY = 0.05
"""With a twentieth of the first entropy left, about one action in a hundred is another than the usual one."""
STAYS_COLLAPSED = 0.10
"""An entropy that comes back above a tenth was a dip."""
EARLY_SHARE = 1 / 3
"""Certainty in the first third of the budget is early; later it is what learning leads to."""
REACHED_SHARE = 0.70
"""A policy that is certain and has most of its later best return has solved the task, not given up."""
HIGH_KL = 0.05
"""Sound updates end between 0.003 and 0.03; at this the policy that collected is no guide for the next."""
HIGH_CLIP_FRACTION = 0.40
"""Sound updates clip 5 to 30 % of the steps; beyond this, most of the batch has no gradient any more."""
LOW_KL = 1e-5
"""Hundreds of times below a sound update: the policy is practically the same afterwards."""
LOW_CLIP_FRACTION = 0.002
"""Not one step in 500 comes near the edge of the clip range."""
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
KL_STOP_SHARE = 0.5
"""A brake that is used in most iterations is no brake, but the speed limit."""
KL_STOP_UPDATES = 1 / 3
"""With less than a third of the planned gradient steps, most of each rollout's worth is thrown away."""
ENVIRONMENT_SHARE = 0.70
"""From here, a faster environment speeds up a run more than anything else can."""
UPDATE_SHARE = 0.90
"""From here, even an environment that costs nothing would not be felt."""
SLOW_ENVIRONMENT_SECONDS = 1e-3
"""Worker processes are for environments slower than about this a step: see `vectorization`."""
ENDLESS_STEPS = 5000
"""Steps of each environment without one finished episode; the usual limits lie between 200 and 1,000."""


@dataclass(frozen=True)
class Finding:
    """Something a run shows, what it usually means, and what to turn."""

    name: str
    """Snake case, the same in every release."""
    severity: Severity
    """How bad it is."""
    seen: str
    """What was seen, with the numbers and the iteration."""
    meaning: str
    """What that usually means."""
    advice: str
    """The settings to turn; empty where nothing needs to be done."""


def diagnose(rows: Sequence[Row], settings: dict[str, Any]) -> list[Finding]:
    """Return what the metrics show, worst first.

    A run without problems and warnings gets one finding that says what went well, or that it is too early.

    Args:
        rows: the metrics, one row per iteration, as `read_metrics` returns them.
        settings: the flat settings of the run, as in its `config.toml`.
    """
    evidence = Evidence(rows, settings)
    findings = [finding for rule in RULES if (finding := rule(evidence)) is not None] if rows else []
    if not any(finding.severity in ("problem", "warning") for finding in findings):
        findings.insert(0, _sound(evidence))
    order = ("problem", "warning", "good", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


# --- the rules, causes before what they cause -------------------------------------------------------------------


def not_finite(evidence: Evidence) -> Finding | None:
    """Losses that are no numbers."""
    bad = np.zeros(len(evidence.rows), bool)
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl"):
        bad |= np.array([name in row and row[name] is None for row in evidence.rows])
    if not bad.any():
        return None
    first = int(bad.argmax())
    return Finding(
        "not_finite",
        "problem",
        f"A loss is not a number in {int(bad.sum())} of {len(bad):,} iterations, first in {evidence.at(first)}.",
        "The numbers broke: an update or a reward was too large for floating point.",
        _advice(
            f"lower {evidence.setting('learning_rate')} or {evidence.setting('max_grad_norm')}",
            evidence.switch_on("normalize_observations"),
            evidence.switch_on("normalize_rewards"),
        ),
    )


def updates_too_small(evidence: Evidence) -> Finding | None:
    """The policy stands still, although the learning rate has not decayed and there is something to learn."""
    kl, clipped = (evidence.median(name, evidence.is_active) for name in ("approx_kl", "clip_fraction"))
    if kl is None or not evidence.is_flat:
        return None
    if abs(kl) >= LOW_KL or (clipped or 0.0) >= LOW_CLIP_FRACTION:
        return None
    return Finding(
        "updates_too_small",
        "problem",
        f"An update moves the policy by a KL of {number(kl)} (median of {_count(evidence.is_active)} iterations); "
        f"{percent(clipped or 0.0)} of the steps are clipped; the return stays near {number(_final(evidence))}.",
        "The updates are far too small to learn anything from.",
        _advice(
            f"raise {evidence.setting('learning_rate', '0.0003')} or {evidence.setting('n_epochs')}",
            f"raise {evidence.setting('target_kl')}" if is_number(evidence.settings.get("target_kl")) else "",
        ),
    )


def updates_too_large(evidence: Evidence) -> Finding | None:
    """Each update moves the policy further than its data can tell."""
    kl, clipped = (evidence.median(name, evidence.is_active) for name in ("approx_kl", "clip_fraction"))
    is_kl_high = kl is not None and kl > HIGH_KL
    is_clip_high = clipped is not None and clipped > HIGH_CLIP_FRACTION
    if len(evidence.rows) < FEWEST_ITERATIONS or not (is_kl_high or is_clip_high):
        return None
    kls = np.where(evidence.is_active, evidence.column("approx_kl"), np.nan)
    peak = f", at most {number(float(np.nanmax(kls)))} in {evidence.at(int(np.nanargmax(kls)))}" if kl else ""
    good = evidence.has_learned
    return Finding(
        "updates_too_large",
        "warning" if is_kl_high or not good else "note",
        f"The KL of an update is {number(kl)}{peak}, and {percent(clipped or 0.0)} of the steps are clipped "
        f"(medians of {_count(evidence.is_active)} iterations). Usual are 0.003 to 0.03, and 5 to 30 %.",
        "Each update moves the policy further than its rollout can vouch for, and returns may collapse."
        + (" This run learned nonetheless; another seed may not." if good else ""),
        _advice(
            f"lower {evidence.setting('learning_rate')} or {evidence.setting('n_epochs')}",
            f"raise {evidence.setting('batch_size')}",
            evidence.limit_kl(),
        ),
    )


def entropy_collapsed(evidence: Evidence) -> Finding | None:
    """Discrete actions: the policy is certain early, and of the wrong thing."""
    entropy, progress = evidence.column("entropy"), evidence.progress
    known = np.flatnonzero(np.isfinite(entropy))
    if progress is None or len(known) < FEWEST_ITERATIONS or entropy[known].min() < -1e-3:
        return None  # below 0: continuous actions, whose entropy has no zero to collapse to
    first = float(entropy[known[0]])
    low = known[entropy[known] < COLLAPSED_ENTROPY * first]
    if first <= 0 or len(low) == 0 or not evidence.share_done[low[0]] <= EARLY_SHARE:
        return None
    row = int(low[0])
    if float(np.nanmedian(entropy[row:])) > STAYS_COLLAPSED * first:
        return None
    # The mean return trails by its window of episodes: ask again when that has passed.
    episodes = evidence.column("n_episodes")
    caught_up = np.flatnonzero(episodes >= episodes[row] + FEWEST_EPISODES)
    then = evidence.column("return_mean")[int(caught_up[0]) if len(caught_up) else progress.final_row]
    gain = progress.best - progress.start
    if not evidence.is_flat and not then < progress.start + REACHED_SHARE * gain:
        return None
    is_stuck = evidence.is_flat or progress.final < progress.start + REACHED_SHARE * gain
    return Finding(
        "entropy_collapsed",
        "problem" if is_stuck else "warning",
        f"The entropy fell from {number(first)} to {number(float(entropy[row]))} nats by {evidence.at(row)}, with a "
        f"return of {number(float(then))}; the best later was {number(progress.best)}.",
        "The policy became certain before it had found anything better, and no longer explores.",
        _advice(
            f"raise {evidence.setting('entropy_coef', '0.01')}",
            f"lower {evidence.setting('learning_rate')}",
            evidence.switch_on("normalize_rewards", " if rewards are large"),
        ),
    )


def return_collapsed(evidence: Evidence) -> Finding | None:
    """The return was clearly better than it is."""
    progress = evidence.progress
    if progress is None or len(evidence.rows) < FEWEST_ITERATIONS or progress.n_episodes < FEWEST_EPISODES:
        return None
    lost = progress.best - progress.final
    had = progress.best - min(progress.start, progress.final)
    if lost < COLLAPSE_GAIN * progress.scale or lost < COLLAPSE_LOSS * had:
        return None
    if progress.noise is None or lost < COLLAPSE_NOISE * progress.noise:
        return None
    kl = evidence.column("approx_kl_max")
    after = kl[progress.best_row : progress.final_row + 1]
    jump = ""
    if np.isfinite(after).any():
        row = progress.best_row + int(np.nanargmax(after))
        jump = f" The largest update since moved the policy by a KL of {number(float(kl[row]))}, in {evidence.at(row)}."
    return Finding(
        "return_collapsed",
        "problem",
        f"The mean return was {number(progress.best)} in {evidence.at(progress.best_row)} and is "
        f"{number(progress.final)} in {evidence.at(progress.final_row)}.{jump}",
        "One bad update, or several, destroyed what was learned; the policy then collects bad data and cannot "
        "find back.",
        _advice(
            f"lower {evidence.setting('learning_rate')} or {evidence.setting('n_epochs')}",
            ""
            if evidence.settings.get("learning_rate_schedule") == "linear"
            else 'set learning_rate_schedule to "linear", which lets it decay',
            evidence.limit_kl(),
        )
        + " The checkpoint named in checkpoints/best may still have the better policy.",
    )


def returns_flat(evidence: Evidence) -> Finding | None:
    """Nothing was learned."""
    progress = evidence.progress
    if progress is None or not evidence.is_flat:
        return None
    returns, lengths = evidence.column("return_mean"), evidence.column("length_mean")
    if _spread(lengths) == 0 and _spread(returns) == 0:
        return Finding(
            "episodes_all_cut_off",
            "problem",
            f"Every episode has {number(float(np.nanmax(lengths)))} steps and a return of {number(progress.final)}, in "
            f"all {progress.n_episodes:,} episodes up to {evidence.at(progress.final_row)}.",
            "Every episode ends in the time limit and scores the same: the goal was never reached, so there is "
            "nothing to learn from.",
            _advice(
                f"explore more: raise {evidence.setting('entropy_coef', '0.01')}",
                "give rewards on the way to the goal",
                f"raise {evidence.setting('max_episode_steps')}",
            ),
        )
    return Finding(
        "returns_flat",
        "problem",
        f"The mean return was {number(progress.start)} in {evidence.at(progress.start_row)}, is "
        f"{number(progress.final)} in {evidence.at(progress.final_row)}, and never passed {number(progress.best)}.",
        "The policy does not improve, unless this is the best that the task allows.",
        "First mend what the other findings show, and run proximo check-env. "
        + _advice(
            f"try another {evidence.setting('learning_rate', '0.0003')}",
            f"raise {evidence.setting('rollout_length')} or {evidence.setting('entropy_coef')}",
            evidence.switch_on("normalize_observations"),
            evidence.switch_on("normalize_rewards"),
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
        _advice(
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
        _advice(
            evidence.switch_on("normalize_rewards"),
            f"lower {evidence.setting('learning_rate')} or {evidence.setting('gamma')}",
            f"lower {evidence.setting('max_grad_norm')}",
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


def kl_stop_dominates(evidence: Evidence) -> Finding | None:
    """Most updates are cut short."""
    stopped, taken = evidence.column("kl_stopped"), evidence.column("n_updates")
    if len(evidence.rows) < FEWEST_ITERATIONS or not np.isfinite(stopped).any():
        return None
    share = float(np.nanmean(stopped > 0))
    if share <= KL_STOP_SHARE:
        return None
    if not np.isfinite(taken).any():
        return None
    planned = evidence.planned_updates or float(np.nanmax(taken))
    done = float(np.nanmedian(taken)) / max(planned, 1.0)
    return Finding(
        "kl_stop_dominates",
        "warning" if done < KL_STOP_UPDATES else "note",
        f"target_kl ended {percent(share)} of all updates early; half of them took at most "
        f"{float(np.nanmedian(taken)):,.0f} of {planned:,.0f} planned gradient steps.",
        "The KL stop, meant for the exception, decides how much is learned from each rollout."
        if done < KL_STOP_UPDATES
        else "The KL stop does its work often. That costs a part of each rollout, and is no fault by itself.",
        f"Lower {evidence.setting('learning_rate')} or {evidence.setting('n_epochs')}, or raise "
        f"{evidence.setting('target_kl')}.",
    )


def time_is_lopsided(evidence: Evidence) -> Finding | None:
    """Nearly all of the time goes to one of the two phases."""
    late = np.arange(len(evidence.rows)) >= len(evidence.rows) // 2  # the first iterations also warm up
    collecting = float(np.nansum(evidence.column("seconds_collecting")[late]))
    updating = float(np.nansum(evidence.column("seconds_updating")[late]))
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
            + (f", {number(1e6 * per_step)} microseconds a step." if per_step else "."),
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


RULES: tuple[Callable[[Evidence], Finding | None], ...] = (
    not_finite,
    updates_too_small,
    updates_too_large,
    entropy_collapsed,
    return_collapsed,
    critic_explains_nothing,
    value_loss_exploded,
    returns_flat,
    no_episode_finished,
    kl_stop_dominates,
    time_is_lopsided,
)
"""Every rule, causes before what they cause."""


# --- what rules share -------------------------------------------------------------------------------------------


def _sound(evidence: Evidence) -> Finding:
    """What to say of a run that no rule complains about."""
    progress = evidence.progress
    if progress is None or len(evidence.rows) < FEWEST_ITERATIONS:
        return Finding(
            "too_early",
            "note",
            f"There are {plural(len(evidence.rows), 'iteration')}, with "
            f"{plural(progress.n_episodes if progress else 0, 'finished episode')}.",
            "Too few to say anything about learning.",
            "Look again later.",
        )
    if not evidence.has_learned:
        return Finding(
            "nothing_wrong_yet",
            "note",
            f"The mean return went from {number(progress.start)} in {evidence.at(progress.start_row)} to "
            f"{number(progress.final)} in {evidence.at(progress.final_row)}; the best was {number(progress.best)}.",
            "No sign of a fault, and no clear progress yet either.",
            "",
        )
    return Finding(
        "healthy",
        "good",
        f"The mean return rose from {number(progress.start)} in {evidence.at(progress.start_row)} to "
        f"{number(progress.final)} in {evidence.at(progress.final_row)}; the best was {number(progress.best)} in "
        f"{evidence.at(progress.best_row)}.",
        "The policy learns, and its metrics look sound.",
        "",
    )


def _advice(*parts: str) -> str:
    """Join what there is to advise into one sentence."""
    said = "; ".join(part for part in parts if part)
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def _final(evidence: Evidence) -> float | None:
    return None if evidence.progress is None else evidence.progress.final


def _count(mask: np.ndarray) -> str:
    return f"{int(mask.sum()):,}"


def _spread(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max() - finite.min()) if len(finite) else math.nan


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
