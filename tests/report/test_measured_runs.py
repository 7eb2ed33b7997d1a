"""The diagnosis of runs that were really made, by benchmarks/diagnosis.py, and trimmed to what rules look at."""

import json
from pathlib import Path

import pytest

from proximo.report.diagnosis import diagnose
from proximo.report.language_diagnosis import diagnose_align

RUNS = json.loads((Path(__file__).parent / "measured_runs.json").read_text())


def findings_of(run, n_rows=None):
    columns = run["columns"]
    length = len(next(iter(columns.values())))
    rows = [{name: values[row] for name, values in columns.items() if values[row] is not None} for row in range(length)]
    return (diagnose_align if run["kind"] == "align" else diagnose)(rows[:n_rows], run["settings"])


@pytest.mark.parametrize("run", [run for run in RUNS if run["must"] != ["healthy"]], ids=lambda run: run["run"])
def test_a_fault_is_named(run):
    found = {finding.name: finding for finding in findings_of(run)}
    assert set(run["must"]) <= set(found)
    for name in run["must"]:
        assert any(digit in found[name].seen for digit in "0123456789")
        assert "nan" not in found[name].seen


@pytest.mark.parametrize("run", [run for run in RUNS if run["must"] == ["healthy"]], ids=lambda run: run["run"])
def test_a_healthy_run_is_called_healthy(run):
    first, *others = findings_of(run)
    assert (first.name, first.severity) == ("healthy", "good")
    assert {other.severity for other in others} <= {"note"}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["run"])
def test_nothing_is_said_of_the_first_iterations_but_that_it_is_too_early(run):
    assert {finding.name for finding in findings_of(run, 5)} <= {"too_early", "no_episode_finished", "not_finite"} | {
        "observations_out_of_scale",
        "rewards_out_of_scale",
        "rewards_missing",
    }
