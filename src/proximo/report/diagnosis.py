"""What is wrong with a run, in words: pure rules over its metrics.

A rule looks at the evidence and returns a finding or None. A new rule is one function, listed in `RULES`.
Healthy runs do odd things as well (a solved task makes the explained variance meaningless, a learning rate
that decays to 0 stops all movement), so a rule looks only where its number means something. How often the rules are
right is measured by benchmarks/diagnosis.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from proximo.report.diagnosis_sizes import (
    advantages_degenerate,
    critic_explains_nothing,
    observations_out_of_scale,
    rewards_out_of_scale,
    value_loss_dwarfs,
    value_loss_exploded,
)
from proximo.report.diagnosis_task import no_episode_finished, returns_flat, time_is_lopsided
from proximo.report.diagnosis_update import (
    entropy_collapsed,
    entropy_held_up,
    kl_stop_dominates,
    not_finite,
    return_collapsed,
    updates_too_large,
    updates_too_small,
)
from proximo.report.evidence import FEWEST_ITERATIONS, Evidence
from proximo.report.finding import Finding
from proximo.report.records import Row
from proximo.report.words import number, plural


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


RULES: tuple[Callable[[Evidence], Finding | None], ...] = (
    not_finite,
    observations_out_of_scale,
    rewards_out_of_scale,
    value_loss_dwarfs,
    updates_too_small,
    updates_too_large,
    entropy_collapsed,
    entropy_held_up,
    return_collapsed,
    critic_explains_nothing,
    value_loss_exploded,
    advantages_degenerate,
    returns_flat,
    no_episode_finished,
    kl_stop_dominates,
    time_is_lopsided,
)
"""Every rule, causes before what they cause."""


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
