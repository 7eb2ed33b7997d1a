"""Rules of the diagnosis about updates: how far they go, and what becomes of the policy."""

from __future__ import annotations

import numpy as np

from proximo.report.evidence import COLLAPSE_LOSS, FEWEST_EPISODES, FEWEST_ITERATIONS, Evidence, is_number
from proximo.report.finding import Finding, advice
from proximo.report.words import number, percent

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
LEAP = 0.5
"""Ten times beyond that, an action that had a chance of a half may have one of a tenth after a single update."""
HIGH_CLIP_FRACTION = 0.40
"""Sound updates clip 5 to 30 % of the steps; beyond this, most of the batch has no gradient any more."""
LOW_KL = 1e-5
"""Hundreds of times below a sound update: the policy is practically the same afterwards."""
LOW_CLIP_FRACTION = 0.002
"""Not one step in 500 comes near the edge of the clip range."""
HELD_UP_ENTROPY = 0.90
"""Discrete actions: with so much of the first entropy left, the better of two actions is taken two times in three."""
LARGE_ENTROPY_COEF = 0.03
"""Usual coefficients are 0 to 0.01; what lies beyond can hold a policy up."""
GROWN_ENTROPY = 0.5
"""Continuous actions: half a nat more is a standard deviation that is two thirds larger, where there is one action."""
KL_STOP_SHARE = 0.5
"""A brake that is used in most iterations is no brake, but the speed limit."""
KL_STOP_UPDATES = 1 / 3
"""With less than a third of the planned gradient steps, most of each rollout's worth is thrown away."""


def not_finite(evidence: Evidence) -> Finding | None:
    """Losses that are no numbers, and updates that were left out because of it."""
    bad = np.array([row.get("update_skipped") is True for row in evidence.rows])
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl"):
        bad |= np.array([name in row and row[name] is None for row in evidence.rows])
    if not bad.any():
        return None
    first = int(bad.argmax())
    return Finding(
        "not_finite",
        "problem",
        f"A loss or a gradient is not a number in {int(bad.sum())} of {len(bad):,} iterations, first in "
        f"{evidence.at(first)}.",
        "The numbers broke: an update or a reward was too large for floating point.",
        advice(
            f"lower {evidence.setting('learning_rate')} or {evidence.setting('max_grad_norm')}",
            evidence.switch_on("normalize_observations"),
            evidence.switch_on("normalize_rewards"),
        ),
    )


def updates_too_small(evidence: Evidence) -> Finding | None:
    """The policy stands still, although the learning rate has not decayed and there is something to learn."""
    kl, clipped = (evidence.median(name, evidence.is_active) for name in ("approx_kl", "clip_fraction"))
    if kl is None or evidence.has_learned or not evidence.is_judged:
        return None
    if abs(kl) >= LOW_KL or (clipped or 0.0) >= LOW_CLIP_FRACTION or leap(evidence) is not None:
        return None
    return Finding(
        "updates_too_small",
        "problem" if evidence.is_flat else "warning",
        f"An update moves the policy by a KL of {number(kl)} (median of {count(evidence.is_active)} iterations); "
        f"{percent(clipped or 0.0)} of the steps are clipped; the return is {number(final_return(evidence))}.",
        "The updates are far too small to learn anything from.",
        advice(
            f"raise {evidence.setting('learning_rate', '0.0003')} or {evidence.setting('n_epochs')}",
            f"raise {evidence.setting('target_kl')}" if is_number(evidence.settings.get("target_kl")) else "",
        ),
    )


def updates_too_large(evidence: Evidence) -> Finding | None:
    """Each update moves the policy further than its data can tell."""
    kl, clipped = (evidence.median(name, evidence.is_active) for name in ("approx_kl", "clip_fraction"))
    is_kl_high = kl is not None and kl > HIGH_KL
    is_clip_high = clipped is not None and clipped > HIGH_CLIP_FRACTION
    if len(evidence.rows) < FEWEST_ITERATIONS:
        return None
    if not (is_kl_high or is_clip_high):
        return _one_update_too_large(evidence)
    kls = np.where(evidence.is_active, evidence.column("approx_kl"), np.nan)
    peak = f", at most {number(float(np.nanmax(kls)))} in {evidence.at(int(np.nanargmax(kls)))}" if kl else ""
    good = evidence.has_learned
    return Finding(
        "updates_too_large",
        "warning" if is_kl_high or not good else "note",
        f"The KL of an update is {number(kl)}{peak}, and {percent(clipped or 0.0)} of the steps are clipped "
        f"(medians of {count(evidence.is_active)} iterations). Usual are 0.003 to 0.03, and 5 to 30 %.",
        "Each update moves the policy further than its rollout can vouch for, and returns may collapse."
        + (" This run learned nonetheless; another seed may not." if good else ""),
        advice(
            f"lower {evidence.setting('learning_rate')} or {evidence.setting('n_epochs')}",
            f"raise {evidence.setting('batch_size')}",
            evidence.limit_kl(),
        ),
    )


def leap(evidence: Evidence) -> int | None:
    """The row of the largest update, where it made another policy of what there was."""
    kls = evidence.column("approx_kl")
    known = np.isfinite(kls)
    return int(np.nanargmax(kls)) if known.any() and np.nanmax(kls) >= LEAP else None


def _one_update_too_large(evidence: Evidence) -> Finding | None:
    """One update that leaves nothing of the policy, in a run whose updates are small otherwise, and that fails."""
    row = leap(evidence)
    if row is None or evidence.has_learned:
        return None
    kl = number(float(evidence.column("approx_kl")[row]))
    return Finding(
        "updates_too_large",
        "warning",
        f"The update of {evidence.at(row)} moved the policy by a KL of {kl}, and the return is "
        f"{number(final_return(evidence))}. Usual are 0.003 to 0.03.",
        "One update made another policy of what there was, further than its rollout can vouch for; where that is "
        "certain of a poor action, nothing moves it any more.",
        advice(
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
        advice(
            f"raise {evidence.setting('entropy_coef', '0.01')}",
            f"lower {evidence.setting('learning_rate')}",
            evidence.switch_on("normalize_rewards", " if rewards are large"),
        ),
    )


def entropy_held_up(evidence: Evidence) -> Finding | None:
    """The entropy bonus keeps the policy from choosing anything."""
    entropy, coef = evidence.column("entropy"), evidence.settings.get("entropy_coef")
    known = np.flatnonzero(np.isfinite(entropy))
    if not is_number(coef) or coef < LARGE_ENTROPY_COEF or len(known) < FEWEST_ITERATIONS:
        return None
    first, now = float(entropy[known[0]]), float(np.median(entropy[known[len(known) // 2 :]]))
    is_held = 0 < HELD_UP_ENTROPY * first <= now
    if not (is_held or now - first > GROWN_ENTROPY):
        return None
    return Finding(
        "entropy_held_up",
        "note" if evidence.has_learned else "problem" if evidence.is_flat else "warning",
        f"The entropy was {number(first)} nats in {evidence.at(int(known[0]))} and is {number(now)} (median of the "
        f"second half, to {evidence.at(int(known[-1]))}), with an entropy_coef of {number(coef)}; the return is "
        f"{number(final_return(evidence))}.",
        "The bonus for being random weighs more than the reward, so the policy chooses nothing.",
        advice(f"lower {evidence.setting('entropy_coef', '0 to 0.01')}"),
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
        advice(
            f"lower {evidence.setting('learning_rate')} or {evidence.setting('n_epochs')}",
            ""
            if evidence.settings.get("learning_rate_schedule") == "linear"
            else 'set learning_rate_schedule to "linear", which lets it decay',
            evidence.limit_kl(),
        )
        + " The checkpoint named in checkpoints/best may still have the better policy.",
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


def final_return(evidence: Evidence) -> float | None:
    """The last mean return, None where no episode has finished."""
    return None if evidence.progress is None else evidence.progress.final


def count(mask: np.ndarray) -> str:
    """How often it is True, in words."""
    return f"{int(mask.sum()):,}"
