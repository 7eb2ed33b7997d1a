"""What is wrong with an alignment run, in words: pure rules over its metrics, as in `diagnosis.py`.

Every mean here is over a window of a tenth of the run, and is held against its noise: `course.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from proximo.report.course import RISEN_NOISE, Course, course_of
from proximo.report.diagnosis_update import (
    COLLAPSED_ENTROPY,
    EARLY_SHARE,
    HIGH_KL,
    LOW_CLIP_FRACTION,
    LOW_KL,
    REACHED_SHARE,
    leap,
    not_finite,
)
from proximo.report.evidence import FEWEST_ITERATIONS, FLAT_AFTER_SHARE, Evidence
from proximo.report.finding import Finding
from proximo.report.records import Row
from proximo.report.words import number, percent, plural

FALLEN_NOISE = 4.0
"""A peak is the luckiest of many means, about two standard deviations too high, so it takes more than a rise does."""
FALLEN_SHARE = 0.10
"""A fall of less than a tenth of what was gained before is no reason to go back."""
KL_LIMIT = 20.0
"""Nats per response: reported gold scores of over-optimized reward models turn down between about 10 and 50."""
STILL_KL = 1e-3
"""At a thousandth of a nat per response, two policies cannot be told apart by thousands of responses."""
STEEP_KL = 10.0
"""Below this, policies are close enough to the reference that even a steep rise is only the beginning."""
STEEP_RISE = 1.8
"""KL that goes straight up doubles in the second half of a run; one that its penalty holds bends long before."""
TARGET_FACTOR = 2.0
"""Adaptive beta swings around its target by less than a half; at twice the target it has lost hold."""
ENDS_RARELY = 0.5
"""With half of the responses cut off, half of the scores are for torsos."""
LOST_ENDS = 0.15
"""Losing the end of every seventh response is more than a few long answers."""
NEAR_LIMIT = 0.80
"""A mean length at four fifths of max_new_tokens has many responses at the limit."""
GROWN = 1.3
"""Lengths of responses waver by a tenth; a third more is growth."""
MUCH_GROWN = 1.5
"""Half as long again is more than the first lessons of a reward take."""
MUCH_REPEATED = 0.15
"""In sound text one piece of three tokens in twenty stood before, if any; in loops it is most of them."""
MORE_REPEATED = 0.10
"""What the model did before it was aligned is no fault of the reward's."""
CONSTANT_STD = 1e-3
"""Scores that differ in their fourth digit tell responses apart by rounding."""
SATURATED_STD = 0.15
"""With a seventh of the first spread left after a rise, one response in a hundred fails where each passes or fails."""
COLLAPSED_STD = 0.05
"""With a twentieth of the first spread left and nothing gained, nearly all responses get the same score."""
MANY_MISSING = 0.05
"""One response in twenty without a score is a fault of the reward's, not an accident."""
MANY_LEFT_OUT = 0.25
"""Losing every fourth response makes a rollout cost a third more than it need."""
MANY_ALIKE = 0.70
"""With more than two thirds of the groups without a difference, three times the responses are sampled that teach."""
HIGH_CLIP_FRACTION = 0.30
"""Tokens are clipped more rarely than actions of control tasks: sound updates stay under a tenth."""


def diagnose_align(rows: Sequence[Row], settings: dict[str, Any]) -> list[Finding]:
    """Return what the metrics of an alignment run show, worst first; see `diagnosis.diagnose`.

    Iterations in which only the critic learned are passed over.
    """
    pretraining = settings.get("value_pretraining_iterations")
    evidence = Evidence(rows[pretraining if isinstance(pretraining, int) else 0 :], settings)
    findings = [finding for rule in RULES if (finding := rule(evidence)) is not None] if evidence.rows else []
    if not any(finding.severity in ("problem", "warning") for finding in findings):
        findings.insert(0, _sound(evidence))
    order = ("problem", "warning", "good", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


# --- the rules, causes before what they cause -------------------------------------------------------------------


def over_optimization(evidence: Evidence) -> Finding | None:
    """The reward goes on rising while the gold score, which nothing learns from, has turned down."""
    gold, reward = _gold_and_reward(evidence)
    if gold is None or reward is None:
        return None
    fallen = gold.peak - gold.late
    margin = max(FALLEN_NOISE * math.sqrt(2.0) * gold.noise, FALLEN_SHARE * (gold.peak - gold.early), 1e-9)
    reward_then = reward.at(gold.peak_row)
    if fallen <= margin or reward.late - reward_then <= reward.chance:
        return None
    kl, distance = course_of(evidence, "kl_to_reference"), ""
    if kl is not None:
        distance = (
            f" The KL to the reference was {number(kl.at(gold.peak_row))} nats then and is {number(kl.late)} now."
        )
    peak = evidence.at(gold.peak_row)
    return Finding(
        "over_optimization",
        "problem",
        f"gold_mean was best around {peak}, {number(gold.peak)}, and is {number(gold.late)} at "
        f"{evidence.at(gold.last_row)}, while the reward rose from {number(reward_then)} to {number(reward.late)} "
        f"(means of {gold.window} iterations).{distance}",
        "The policy exploits the reward: it finds what scores high and is not better. What was learned after the peak "
        "is not worth having.",
        f"Go back to about {peak}: a checkpoint from there (keep_checkpoints keeps more of them), or a new run with "
        f"n_iterations {evidence.iterations[gold.peak_row]:.0f}; {_hold_nearer(evidence)}.",
    )


def kl_ran_away(evidence: Evidence) -> Finding | None:
    """The policy is far from the reference, or on its way there; where a gold score agrees, it may be."""
    kl, reward = course_of(evidence, "kl_to_reference"), course_of(evidence, "reward_mean")
    gold, _ = _gold_and_reward(evidence)
    if kl is None or (gold is not None and (gold.has_risen or over_optimization(evidence))):
        return None
    halfway = float(kl.means[len(kl.means) // 2])
    is_steep = kl.late >= STEEP_KL and kl.late >= STEEP_RISE * max(halfway, 0.0)
    limit = KL_LIMIT
    target = _number_set(evidence, "beta_target")
    if evidence.settings.get("beta_control") == "adaptive" and target is not None:
        limit = TARGET_FACTOR * target
        is_steep = False  # it is steered, and may still be on its way to the target
    if not (is_steep or kl.late >= limit):
        return None
    how = f"The KL to the reference is {number(kl.late)} nats per response at {evidence.at(kl.last_row)}"
    how += f"; halfway it was {number(halfway)}" + (", and it goes on rising at this pace" if is_steep else "")
    if reward is not None and reward.has_risen:
        return Finding(
            "over_optimization_likely",
            "warning",
            f"{how}. The reward rose from {number(reward.early)} to {number(reward.late)}.",
            "So far from where it began, a policy has usually begun to exploit the reward: scores go up, and answers "
            "get worse. Read samples.md.",
            f"{_sentence(_hold_nearer(evidence))}; compare an earlier checkpoint; set gold to a second judge, and the "
            "report will say where the two part.",
        )
    return Finding(
        "kl_ran_away",
        "warning",
        f"{how}, and the reward is no higher than at first.",
        "The policy drifts away from the reference and gets nothing for it.",
        f"{_sentence(_hold_nearer(evidence))}; lower {evidence.setting('learning_rate')}.",
    )


def responses_do_not_end(evidence: Evidence) -> Finding | None:
    """Responses run into max_new_tokens, more and more, or from the beginning."""
    ends, lengths = course_of(evidence, "eos_fraction"), course_of(evidence, "response_length_mean")
    if ends is None or lengths is None or evidence.settings.get("stop_at_eos") is False:
        return None
    near = NEAR_LIMIT * (_number_set(evidence, "max_new_tokens") or math.inf)
    has_grown = lengths.late >= near and lengths.late >= GROWN * lengths.early
    has_lost = ends.early - ends.late >= max(LOST_ENDS, ends.chance)
    if not (has_grown or has_lost or ends.late < ENDS_RARELY):
        return None
    return Finding(
        "responses_do_not_end",
        "warning",
        f"{percent(ends.late)} of the responses end by themselves at {evidence.at(ends.last_row)}; at first "
        f"{percent(ends.early)} did. Their mean length went from {number(lengths.early)} to {number(lengths.late)} "
        f"tokens.",
        "The reward pays for length, or for not ending; what is cut off is scored unfinished."
        if has_grown or has_lost
        else "The model does not know how to end, or has too little room to; what is cut off is scored unfinished.",
        f"Set {evidence.setting('missing_eos_penalty', '1')}, in units of the reward; raise "
        f"{evidence.setting('max_new_tokens')}; see that the reward does not grow with length, and that sft learned "
        "the end token.",
    )


def responses_grow(evidence: Evidence) -> Finding | None:
    """Responses that still end become longer and longer."""
    lengths = course_of(evidence, "response_length_mean")
    if lengths is None or responses_do_not_end(evidence) is not None:
        return None
    # The first iteration, for lengths may change within a few; a single one has more luck in it than a mean.
    chance = lengths.chance * math.sqrt(lengths.window)
    if lengths.late < MUCH_GROWN * lengths.first or lengths.late - lengths.first <= chance:
        return None
    ends = course_of(evidence, "eos_fraction")
    ending = "" if ends is None else f", and {percent(ends.late)} of them end by themselves"
    return Finding(
        "responses_grow",
        "note",
        f"Responses have {number(lengths.late)} tokens at {evidence.at(lengths.last_row)}; at first they had "
        f"{number(lengths.first)}{ending}.",
        "The reward pays for length. That is sound where longer answers are better ones, and else the easiest way to "
        "please a reward model.",
        "Read samples.md; take something off the reward per token, or train the reward model on pairs whose better "
        "answer is not the longer one.",
    )


def text_repeats(evidence: Evidence) -> Finding | None:
    """Responses say the same again and again."""
    repeated, reward = course_of(evidence, "repetition"), course_of(evidence, "reward_mean")
    if repeated is None or repeated.late < MUCH_REPEATED or repeated.late - repeated.early < MORE_REPEATED:
        return None
    paid = reward is not None and reward.has_risen
    return Finding(
        "text_repeats",
        "warning",
        f"{percent(repeated.late)} of all pieces of three tokens stood in the same response before, at "
        f"{evidence.at(repeated.last_row)}; at first {percent(repeated.early)}.",
        "The policy says the same again and again" + (", and the reward pays for it." if paid else "."),
        f"{_sentence(_hold_nearer(evidence))}; take something off the reward for repetition.",
    )


def entropy_collapsed(evidence: Evidence) -> Finding | None:
    """The policy says nearly always the same, and not because it has found what to say."""
    entropy, reward = course_of(evidence, "entropy"), course_of(evidence, "reward_mean")
    if entropy is None or reward is None or not entropy.early > 0:
        return None
    above = np.flatnonzero(entropy.means > COLLAPSED_ENTROPY * entropy.early)
    first = int(above[-1]) + 1 if len(above) else 0
    if first >= len(entropy.means):
        return None
    row = int(entropy.rows[first])
    then, gain = reward.at(row), reward.peak - reward.early
    was_solved = gain > reward.chance and then >= reward.early + REACHED_SHARE * gain
    is_early = _share_done(evidence, row) <= EARLY_SHARE
    if was_solved or (reward.has_risen and not is_early):
        return None
    return Finding(
        "entropy_collapsed",
        "warning" if reward.has_risen else "problem",
        f"The entropy fell from {number(entropy.early)} to {number(float(entropy.means[first]))} nats per token by "
        f"{evidence.at(row)}, with a reward of {number(then)}; it began at {number(reward.early)} and is "
        f"{number(reward.late)} now.",
        "The policy became certain before it had found anything better: responses to a prompt are all alike, so there "
        "is nothing to compare.",
        f"Lower {evidence.setting('learning_rate')}; raise {evidence.setting('beta', '0.05')} or "
        f"{evidence.setting('entropy_coef', '0.001')}; set clip_epsilon_high to 0.28, which lets rare tokens grow.",
    )


def reward_tells_nothing_apart(evidence: Evidence) -> Finding | None:
    """Nearly all responses get the same score."""
    spread, reward = course_of(evidence, "reward_std"), course_of(evidence, "reward_mean")
    if spread is None or reward is None or not _is_saturated(spread, reward):
        return None
    seen = (
        f"The scores of an iteration differ by {number(spread.late)} (standard deviation) at "
        f"{evidence.at(spread.last_row)}, around {number(reward.late)}; at first by {number(spread.early)}, around "
        f"{number(reward.early)}."
    )
    if reward.has_risen:
        return Finding(
            "reward_saturated",
            "note",
            seen,
            "Nearly all responses get the highest score there is: there is hardly anything left to learn.",
            "Stop here, or give harder prompts or a finer reward.",
        )
    return Finding(
        "reward_constant",
        "warning",
        seen,
        "The reward gives every response the same score, so nothing tells what to do more of.",
        "See that the reward reads the right column and was trained to the end; give it responses of different worth "
        "by hand; give prompts that the model can answer at times.",
    )


def rewards_missing(evidence: Evidence) -> Finding | None:
    """Responses that got no score."""
    missing = _share_missing(evidence)
    if missing is None or not missing > MANY_MISSING:
        return None
    counts = evidence.column("rewards_missing")
    worst = int(np.nanargmax(counts))
    return Finding(
        "rewards_missing",
        "warning",
        f"{percent(missing)} of all responses got no score; most in {evidence.at(worst)}, "
        f"{number(float(counts[worst]))}.",
        "They count for nothing; if it is always the same kind of response, the policy learns nothing about that kind.",
        f"Mend the reward: it fails, answers too late or says nothing; raise {evidence.setting('reward_timeout')} if "
        "it is slow.",
    )


def responses_left_out(evidence: Evidence) -> Finding | None:
    """Responses with a score from which nothing is learned all the same."""
    learned = course_of(evidence, "advantage_rows")
    if learned is None:
        return None
    left_out = 1.0 - learned.late - (_share_missing(evidence) or 0.0)
    if not left_out > MANY_LEFT_OUT:
        return None
    return Finding(
        "responses_left_out",
        "warning",
        f"Nothing is learned from {percent(left_out)} of the responses at {evidence.at(learned.last_row)}, although "
        "they have a score.",
        "They were cut off by max_new_tokens, and truncation is set to leave such responses out.",
        f'Raise {evidence.setting("max_new_tokens")}; or set truncation to "terminate" with a missing_eos_penalty, '
        "so that the policy learns to end.",
    )


def groups_all_alike(evidence: Evidence) -> Finding | None:
    """Without a critic: groups whose responses all got the same score, which have no advantages."""
    alike, reward = course_of(evidence, "groups_alike"), course_of(evidence, "reward_mean")
    if alike is None or alike.late <= MANY_ALIKE:
        return None
    has_risen = reward is not None and reward.has_risen
    return Finding(
        "groups_all_alike",
        "note" if has_risen else "warning",
        f"In {percent(alike.late)} of the groups at {evidence.at(alike.last_row)}, all responses got the same score; "
        f"at first in {percent(alike.early)}.",
        "Most prompts are too easy by now: what they teach has been learned."
        if has_risen
        else "Most prompts are too hard, or too easy, for responses to differ: they teach nothing.",
        f"Choose prompts that the model answers well at times; raise {evidence.setting('responses_per_prompt', '8')}.",
    )


def updates_too_large(evidence: Evidence) -> Finding | None:
    """Each update moves the policy further than its responses can tell."""
    kl, clipped = (evidence.median(name, evidence.is_active) for name in ("approx_kl", "clip_fraction"))
    is_too_large = (kl or 0.0) > HIGH_KL or (clipped or 0.0) > HIGH_CLIP_FRACTION
    if len(evidence.rows) < FEWEST_ITERATIONS:
        return None
    if not is_too_large:
        return _one_update_too_large(evidence)
    return Finding(
        "updates_too_large",
        "warning",
        f"The approx_kl of an update is {number(kl)} nats per token, and {percent(clipped or 0.0)} of the tokens are "
        f"clipped (medians of {int(evidence.is_active.sum()):,} iterations). Usual are 0.0003 to 0.03, and up to 10 %.",
        "Each update moves the policy further than its responses can vouch for; rewards waver, or collapse.",
        f"Lower {evidence.setting('learning_rate')} or {evidence.setting('n_epochs')}; raise "
        f"{evidence.setting('batch_size')}; {evidence.limit_kl()}.",
    )


def _one_update_too_large(evidence: Evidence) -> Finding | None:
    """One update that leaves nothing of the policy, in a run whose updates are small otherwise."""
    row = leap(evidence)
    if row is None:
        return None
    return Finding(
        "updates_too_large",
        "warning",
        f"The update of {evidence.at(row)} moved the policy by an approx_kl of "
        f"{number(float(evidence.column('approx_kl')[row]))} nats per token. Usual are 0.0003 to 0.03.",
        "One update made another policy of what there was, further than its responses can vouch for.",
        f"Lower {evidence.setting('learning_rate')} or {evidence.setting('n_epochs')}; raise "
        f"{evidence.setting('batch_size')}; {evidence.limit_kl()}.",
    )


def updates_too_small(evidence: Evidence) -> Finding | None:
    """The policy stands still, although there is something to learn."""
    kl, clipped = (evidence.median(name, evidence.is_active) for name in ("approx_kl", "clip_fraction"))
    # The first minibatch is measured before its step: with one step per rollout the numbers are always 0.
    steps = evidence.median("n_updates")
    distance = course_of(evidence, "kl_to_reference")
    # Where nothing has moved, a reward that rose did so by luck.
    is_still = distance is not None and abs(distance.late) < STILL_KL
    if kl is None or (steps is not None and steps < 2) or not (is_still or _is_flat(evidence)):
        return None
    if abs(kl) >= LOW_KL or (clipped or 0.0) >= LOW_CLIP_FRACTION:
        return None
    return Finding(
        "updates_too_small",
        "problem",
        f"An update moves the policy by an approx_kl of {number(kl)} nats per token (median of "
        f"{int(evidence.is_active.sum()):,} iterations), and clips {percent(clipped or 0.0)} of the tokens.",
        "The updates are far too small to learn anything from.",
        f"Raise {evidence.setting('learning_rate')}, tenfold to begin with, or {evidence.setting('n_epochs')}.",
    )


def reward_flat(evidence: Evidence) -> Finding | None:
    """Nothing was learned."""
    reward = course_of(evidence, "reward_mean")
    if reward is None or not _is_flat(evidence):
        return None
    return Finding(
        "reward_flat",
        "problem",
        f"The reward was {number(reward.early)} at {evidence.at(reward.first_row)}, is {number(reward.late)} at "
        f"{evidence.at(reward.last_row)}, and never passed {number(reward.peak)} (means of {reward.window} "
        "iterations).",
        "The policy does not improve, unless this is the best that the reward allows.",
        f"First mend what the other findings show. Raise {evidence.setting('learning_rate')} or "
        f"{evidence.setting('prompts_per_iteration')}; lower {evidence.setting('beta')}; see by proximo sample that "
        "the model answers well at times.",
    )


def critic_explains_nothing(evidence: Evidence) -> Finding | None:
    """PPO: the value function is no better than a constant."""
    explained, reward = evidence.column("explained_variance"), course_of(evidence, "reward_mean")
    spread = course_of(evidence, "reward_std")
    late = np.isfinite(explained) & (np.arange(len(explained)) >= len(explained) // 2)
    if reward is None or late.sum() < FEWEST_ITERATIONS // 2 or (spread and _is_saturated(spread, reward)):
        return None
    middle = float(np.median(explained[late]))
    if middle > 0.0:
        return None
    first = evidence.at(int(np.flatnonzero(late)[0]))
    can_pretrain = evidence.settings.get("sharing") != "trunk"
    pretrain = f"raise {evidence.setting('value_pretraining_iterations', '10')}; " if can_pretrain else ""
    return Finding(
        "critic_explains_nothing",
        "note" if reward.has_risen else "warning",
        f"The explained variance is {number(middle)} (median from {first} on).",
        "The value function foresees scores no better than their mean, so advantages are noisier than they need be."
        + (" This run learned nonetheless." if reward.has_risen else ""),
        f"Raise {evidence.setting('value_coef')} or {evidence.setting('n_epochs')}; {pretrain}or do without a critic: "
        "--algorithm grpo or rloo.",
    )


RULES: tuple[Callable[[Evidence], Finding | None], ...] = (
    not_finite,
    over_optimization,
    kl_ran_away,
    responses_do_not_end,
    responses_grow,
    text_repeats,
    entropy_collapsed,
    reward_tells_nothing_apart,
    rewards_missing,
    responses_left_out,
    groups_all_alike,
    updates_too_large,
    updates_too_small,
    reward_flat,
    critic_explains_nothing,
)
"""Every rule, causes before what they cause."""


# --- what rules share -------------------------------------------------------------------------------------------


def _gold_and_reward(evidence: Evidence) -> tuple[Course | None, Course | None]:
    """How both went where both are known, or two times None."""
    known = np.isfinite(evidence.column("gold_mean")) & np.isfinite(evidence.column("reward_mean"))
    return course_of(evidence, "gold_mean", known), course_of(evidence, "reward_mean", known)


def _is_saturated(spread: Course, reward: Course) -> bool:
    size = max(abs(reward.early), abs(reward.late))
    left = SATURATED_STD if reward.has_risen else COLLAPSED_STD
    return spread.late <= max(left * max(spread.early, spread.first), CONSTANT_STD * size)


def _is_flat(evidence: Evidence) -> bool:
    """Whether enough was tried, and the reward is where it was, and was never higher by more than chance."""
    reward = course_of(evidence, "reward_mean")
    if reward is None or _share_done(evidence, len(evidence.rows) - 1) < FLAT_AFTER_SHARE:
        return False
    return not reward.has_risen and reward.peak - reward.early <= FALLEN_NOISE / RISEN_NOISE * reward.chance


def _share_done(evidence: Evidence, row: int) -> float:
    return float(evidence.iterations[row]) / (_number_set(evidence, "n_iterations") or len(evidence.rows))


def _number_set(evidence: Evidence, name: str) -> float | None:
    value = evidence.settings.get(name)
    return float(value) if isinstance(value, int | float) else None


def _share_missing(evidence: Evidence) -> float | None:
    """Share of all responses without a score; every iteration has the same number of responses."""
    missing = evidence.column("rewards_missing")
    per_iteration = evidence.column("n_responses") / np.maximum(evidence.iterations, 1.0)
    known = np.isfinite(missing) & np.isfinite(per_iteration)
    asked = float(per_iteration[known].sum())
    return float(missing[known].sum()) / asked if asked > 0 else None


def _hold_nearer(evidence: Evidence) -> str:
    """What holds a policy near the reference."""
    if evidence.settings.get("beta_control") == "adaptive":
        beta = f"lower {evidence.setting('beta_target', '6')} or {evidence.setting('beta_horizon')}"
    else:
        beta = f'raise {evidence.setting("beta", "0.05")}, or set beta_control to "adaptive"'
    return f"{beta}; train the reward model on more data, and on answers of this policy"


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}"


def _sound(evidence: Evidence) -> Finding:
    """What to say of a run that no rule complains about."""
    reward, kl = course_of(evidence, "reward_mean"), course_of(evidence, "kl_to_reference")
    if reward is None:
        seen = f"There are {plural(len(evidence.rows), 'iteration')} with a reward that the policy learned from."
        return Finding("too_early", "note", seen, "Too few to say anything about learning.", "Look again later.")
    went = (
        f"The reward went from {number(reward.early)} at {evidence.at(reward.first_row)} to {number(reward.late)} at "
        f"{evidence.at(reward.last_row)}"
    )
    went += "." if kl is None else f", at a KL to the reference of {number(kl.late)} nats per response."
    if reward.has_risen:
        return Finding("healthy", "good", went, "The policy learns, and its metrics look sound.", "")
    return Finding("nothing_wrong_yet", "note", went, "No sign of a fault, and no clear progress yet either.", "")
