"""The study on the disk: Optuna's, in a journal of one line per change that survives a kill at any moment.

Optuna's other storage, SQLite, would work as well, but brings in SQLAlchemy and Alembic when it is used, and its file
cannot be read with the eye. The journal is appended to, and flushed to the disk each time; a line that a kill has cut
short is taken away before the study goes on. Only one process writes to it (`runs/lock.py`), so Optuna's lock, which a
kill leaves behind, is not needed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from proximo.doctor import install_command
from proximo.errors import UserError, in_words, shown
from proximo.runs import files
from proximo.training.config import ControlConfig, with_settings
from proximo.tuning.space import Searched, fitting, settings_value
from proximo.tuning.trial import REPORTS

if TYPE_CHECKING:
    from optuna.study import Study as OptunaStudy
    from optuna.trial import FrozenTrial, Trial

JOURNAL_NAME = "study.journal"

TRIALS_BEFORE_PRUNING = 5
"""Trials that come to their end before one is given up, so that there is a median to speak of."""
SHARE_BEFORE_PRUNING = 0.3
"""Of its first run, before a trial may be given up: early returns say little."""

_NOT_OURS = (KeyError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
"""What Optuna raises for lines that it has not written."""

State = Literal["finished", "pruned", "failed", "interrupted", "running", "waiting"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial, as the study has it."""

    number: int
    state: State
    """`finished` has a score; `pruned` was given up; `failed` says why in `reason`; `interrupted` is run again."""
    score: float | None
    """Mean return of the final policies, over evaluation episodes and seeds."""
    scores: tuple[float, ...]
    """The same by seed."""
    settings: dict[str, Any]
    """The settings searched, as they were trained with."""
    seconds: float
    """How long it took."""
    reached: tuple[int, float] | None
    """Its last report: tenths of its runs done, and the mean return of training there."""
    reason: str = ""

    @property
    def counts(self) -> bool:
        """Whether it is one of the trials that were asked for."""
        return self.state in ("finished", "pruned", "failed")


def import_optuna() -> Any:
    """Import Optuna, and keep it from talking.

    Raises:
        UserError: with the command that installs it.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(f"Tuning needs Optuna ({error}). Install it with: {install_command('tune')}") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class Study:
    """A study: proposes settings, is told how they do, and decides which trials are given up.

    What it proposes hangs on the seed, on how many trials there were before, and on what they scored: the same study,
    one trial at a time, goes the same way, also where it was killed and taken up again.
    """

    def __init__(self, path: Path, base: ControlConfig, space: dict[str, Searched], described: dict[str, Any]) -> None:
        """Open the study in the folder `path`, or begin it there.

        Args:
            path: the folder, which the caller holds the lock of.
            base: the settings to begin with; what is not searched stays as it is there.
            space: what is searched.
            described: everything that scores hang on, as JSON has it; a study of before must say the same.

        Raises:
            UserError: if the journal is damaged, cannot be written, or says something else.
        """
        optuna = import_optuna()
        self._optuna, self._base, self._space = optuna, base, space
        self._journal = path / JOURNAL_NAME
        try:
            self._study: OptunaStudy = _opened(optuna, self._journal)
            before = self._study.user_attrs.get("described")
            if before is None:
                self._study.set_user_attr("described", described)
                before = self._study.user_attrs["described"]
        except OSError as error:
            raise UserError(
                f"{self._journal} cannot be written: {files.reason(error)}. Choose another folder."
            ) from error
        except _NOT_OURS as error:
            raise UserError(
                f"{self._journal} is damaged: {in_words(error)}. Restore it from a copy, or begin a study in another "
                "folder (--run-dir)."
            ) from error
        _refuse_other_settings(self._journal, before, described)
        self._study.pruner = optuna.pruners.MedianPruner(
            n_startup_trials=TRIALS_BEFORE_PRUNING, n_warmup_steps=int(SHARE_BEFORE_PRUNING * REPORTS)
        )
        if not self._study.trials:
            start = {}
            for name, searched in space.items():
                start |= searched.parameters(name, settings_value(base, name))
            self._study.enqueue_trial(start, user_attrs={"start": True})
        self._take_up()

    def _take_up(self) -> None:
        """Mark what was running when the study was killed as failed, and queue it to be run again, once."""
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state.name == "RUNNING":
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
        again = {trial.user_attrs.get("again") for trial in trials}
        for trial in self._study.get_trials(deepcopy=False):
            if _state_of(trial) == "interrupted" and trial.number not in again:
                parameters = trial.system_attrs.get("fixed_params", {}) | trial.params
                start = {"start": True} if "start" in trial.user_attrs else {}
                self._study.enqueue_trial(parameters, user_attrs={"again": trial.number, **start})

    def propose(self) -> tuple[Trial, ControlConfig]:
        """Begin the next trial: its handle, and the settings to train with."""
        done = [trial for trial in self._study.get_trials(deepcopy=False) if _state_of(trial) != "interrupted"]
        position = sum(trial.state.name != "WAITING" for trial in done)
        (seed,) = np.random.SeedSequence([self._base.seed, 0x74756E65, position]).generate_state(1)
        self._study.sampler = self._optuna.samplers.TPESampler(seed=int(seed))
        trial = self._study.ask()
        values = {name: searched.suggest(trial, name) for name, searched in self._space.items()}
        config = self._base
        if "start" not in trial.user_attrs:
            config = with_settings(config, fitting(values, config), where=f"trial {trial.number}")
        settings = {name: settings_value(config, name) for name in self._space}
        trial.set_user_attr("settings", settings)
        return trial, config

    def report(self, trial: Trial, step: int, value: float) -> bool:
        """Note how a trial does; return whether it goes on."""
        trial.report(value, step)
        return not trial.should_prune()

    def finish(self, trial: Trial, scores: list[float], seconds: float) -> None:
        """End a trial that has its scores."""
        trial.set_user_attr("scores", scores)
        trial.set_user_attr("seconds", seconds)
        self._study.tell(trial, float(np.mean(scores)))

    def prune(self, trial: Trial, seconds: float) -> None:
        """End a trial that was given up."""
        trial.set_user_attr("seconds", seconds)
        self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)

    def fail(self, trial: Trial, reason: str, seconds: float) -> None:
        """End a trial that went wrong."""
        trial.set_user_attr("seconds", seconds)
        trial.set_user_attr("reason", reason or "it does not say why")
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)

    def interrupt(self, trial: Trial) -> None:
        """End a trial that is to be run again when the study is taken up."""
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)

    def records(self) -> list[TrialRecord]:
        """Every trial that has begun, in their order."""
        trials = self._study.get_trials(deepcopy=False)
        return [_record(trial) for trial in trials if trial.state.name != "WAITING"]

    def config_of(self, record: TrialRecord) -> ControlConfig:
        """The settings that a trial was trained with."""
        return with_settings(self._base, record.settings, where=f"trial {record.number}")


class _OneWriter:
    """What Optuna takes for its lock: the folder is locked already."""

    def acquire(self) -> bool:
        """Have it."""
        return True

    def release(self) -> None:
        """Let it go."""


def _opened(optuna: Any, journal: Path) -> OptunaStudy:
    from optuna.storages.journal import JournalFileBackend

    _mend_tail(journal)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal), lock_obj=cast(Any, _OneWriter())))
    return optuna.create_study(storage=storage, study_name="proximo", direction="maximize", load_if_exists=True)


def _mend_tail(journal: Path) -> None:
    """Let the journal end with its last whole line: Optuna would write on behind the torn one."""
    if not journal.exists():
        return
    data = journal.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(journal, whole)


def _refuse_other_settings(journal: Path, before: dict[str, Any], described: dict[str, Any]) -> None:
    """A study of other settings cannot be gone on with.

    Raises:
        UserError: with what is different.
    """
    now = json.loads(json.dumps(described, default=repr))
    changed = [
        f"{name} was {shown(before.get(name))} and is {shown(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            f"{journal} holds a study with other settings, whose scores cannot be compared: {', '.join(changed)}. Give "
            "the command that began it to go on with it, or another --run-dir."
        )


def _state_of(trial: FrozenTrial) -> State:
    if trial.state.name == "FAIL":
        return "failed" if "reason" in trial.user_attrs else "interrupted"
    names: dict[str, State] = {"COMPLETE": "finished", "PRUNED": "pruned", "RUNNING": "running", "WAITING": "waiting"}
    return names[trial.state.name]


def _record(trial: FrozenTrial) -> TrialRecord:
    facts = trial.user_attrs
    step = trial.last_step
    state = _state_of(trial)
    return TrialRecord(
        number=trial.number,
        state=state,
        score=trial.value if state == "finished" else None,
        scores=tuple(facts.get("scores", ())),
        settings=facts.get("settings", {}),
        seconds=facts.get("seconds", 0.0),
        reached=None if step is None else (step, trial.intermediate_values[step]),
        reason=facts.get("reason", ""),
    )
