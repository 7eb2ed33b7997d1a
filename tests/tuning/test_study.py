"""The study on the disk: what it proposes, what it gives up, and what a kill leaves of it. Nothing is trained here."""

from __future__ import annotations

import math
import sys

import pytest

from proximo.errors import UserError
from proximo.training.config import ControlConfig
from proximo.tuning.space import Choice, Range
from proximo.tuning.study import JOURNAL_NAME, Study, import_optuna

SPACE = {
    "learning_rate": Range(1e-5, 1e-2, log=True),
    "gamma": Range(1e-4, 0.1, log=True, from_one=True),
    "n_epochs": Choice((2, 5, 10)),
    "activation": Choice(("tanh", "relu"), ordered=False),
}
N_TRIALS = 14  # more than the ten that are drawn at random


def opened(path, seed=0, described=None):
    path.mkdir(exist_ok=True)
    return Study(path, ControlConfig(seed=seed), SPACE, described or {"steps": 100})


def score_of(config):
    return -abs(math.log10(config.algorithm.learning_rate) + 3.3) - 0.1 * config.algorithm.n_epochs


def work_on(study, n_trials=N_TRIALS):
    """Score trials by a formula until so many are done; one of them fails."""
    while sum(record.counts for record in study.records()) < n_trials:
        trial, config = study.propose()
        study.report(trial, 1, score_of(config))
        if config.algorithm.learning_rate < 2e-5:
            study.fail(trial, "too slow", 1.0)
        else:
            study.finish(trial, [score_of(config)], 1.0)


def done(study):
    return [(record.settings, record.score, record.state) for record in study.records() if record.counts]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    study = opened(tmp_path_factory.mktemp("undisturbed"))
    work_on(study)
    return done(study)


def test_it_begins_with_the_settings_given(undisturbed):
    assert undisturbed[0][0] == {"learning_rate": 3e-4, "gamma": 0.99, "n_epochs": 10, "activation": "tanh"}


def test_the_same_seed_proposes_the_same_and_another_one_does_not(undisturbed, tmp_path):
    same, other = opened(tmp_path / "same"), opened(tmp_path / "other", seed=1)
    work_on(same)
    work_on(other)
    assert done(same) == undisturbed
    assert done(other)[0] == undisturbed[0]
    assert all(one != another for one, another in zip(done(other)[1:], undisturbed[1:], strict=True))


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.35, 0.5, 0.63, 0.77, 0.9, 0.97, 0.999])
def test_a_study_killed_at_any_byte_goes_on_as_if_it_had_not_been(undisturbed, tmp_path, share):
    work_on(opened(tmp_path))
    journal = tmp_path / JOURNAL_NAME
    whole = journal.read_bytes()
    journal.write_bytes(whole[: int(share * len(whole))])
    again = opened(tmp_path)
    work_on(again)
    assert done(again) == undisturbed
    assert sum(record.state == "interrupted" for record in again.records()) <= 1


def test_a_trial_that_ran_is_marked_and_run_again_once(tmp_path):
    before = opened(tmp_path)
    work_on(before, 3)
    _, lost = before.propose()
    for _ in range(2):  # the second time nothing is running
        study = opened(tmp_path)
        assert [record.state for record in study.records()] == ["finished"] * 3 + ["interrupted"]
    trial, again = study.propose()
    assert again == lost
    study.finish(trial, [0.0], 1.0)
    assert study.propose()[1] != lost


def test_a_trial_below_the_median_of_five_is_given_up(tmp_path):
    study = opened(tmp_path)
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        trial, _ = study.propose()
        assert study.report(trial, 3, value)  # nothing to compare with yet
        study.finish(trial, [value], 1.0)
    low, _ = study.propose()
    assert study.report(low, 2, 0.0)  # too early to say
    assert not study.report(low, 3, 2.9)
    study.prune(low, 1.0)
    high, _ = study.propose()
    assert study.report(high, 3, 3.1)
    record = study.records()[low.number]
    assert (record.state, record.score, record.reached) == ("pruned", None, (3, 2.9))


def test_other_settings_are_refused(tmp_path):
    opened(tmp_path, described={"gamma": 0.9, "seeds": 1})
    with pytest.raises(UserError, match=r"other settings.*gamma was 0\.9 and is 0\.8"):
        opened(tmp_path, described={"gamma": 0.8, "seeds": 1})


@pytest.mark.parametrize("line", [b"not json\n", b"{}\n", b'{"op_code": 77, "worker_id": "x"}\n', b"[1]\n"])
def test_a_damaged_journal_is_told_in_words(tmp_path, line):
    work_on(opened(tmp_path), 1)
    journal = tmp_path / JOURNAL_NAME
    first, rest = journal.read_bytes().split(b"\n", 1)
    journal.write_bytes(first + b"\n" + line + rest)
    with pytest.raises(UserError, match="is damaged"):
        opened(tmp_path)


def test_without_optuna_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install .*\[tune\]"):
        import_optuna()
