"""The loop of `tune`: ask the study for settings, let processes train them, tell it the scores."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proximo.api import complete_settings, unless_interrupted
from proximo.collect.envs import close_quietly
from proximo.collect.make import Env, EnvFactory
from proximo.collect.worker_handle import CLOSE_SECONDS, Worker
from proximo.collect.worker_process import pack
from proximo.errors import HIGHEST_SEED, UserError, in_range, in_words
from proximo.models.control import ActorCritic
from proximo.process import check_device, noted_signals
from proximo.report.words import number
from proximo.runs import files
from proximo.runs.directory import RUNS_ROOT, RunDirectory, folder_name, new_run
from proximo.runs.lock import locked
from proximo.saved_run import make_for
from proximo.terminal import PLAIN_LINE_EVERY, Display, duration
from proximo.training.choices import with_environments_chosen
from proximo.training.config import ControlConfig, recorded, with_settings
from proximo.tuning.result import Tuning, best_of, draw, write_best, write_trials
from proximo.tuning.space import Searched, in_short, search_space
from proximo.tuning.study import JOURNAL_NAME, Study, TrialRecord, import_optuna
from proximo.tuning.trial import REPORTS, Failed, Report, Scores, Task, serve

if TYPE_CHECKING:
    from optuna.trial import Trial

_LOOK_EVERY = 0.2
"""Seconds between two looks for a signal."""


@dataclass(frozen=True)
class TuneConfig:
    """How long and how a study searches."""

    trials: int = 20
    """Settings to try, with those of before where a study goes on."""
    steps: int | None = None
    """Environment steps of each run; by default total_steps."""
    seeds: int = 1
    """Runs per trial, with seeds from --seed on; its score is their mean."""
    jobs: int = 1
    """Trials side by side, each in a process of its own. With one, the same seed gives the same trials."""
    episodes: int = 20
    """Episodes that the last policy of a run is scored by, with the most likely actions."""
    settings: str | None = None
    """Names of the settings to search, with commas between them; by default all that matter for the task."""

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            UserError: naming the setting, its value and what is possible.
        """
        in_range("trials", self.trials, at_least=1, at_most=10**6, whole=True, usual="20 to 200")
        in_range("steps", self.steps, optional=True, at_least=1, whole=True, usual="a fifth of total_steps, or all")
        in_range("seeds", self.seeds, at_least=1, at_most=1000, whole=True, usual="1 to 5")
        in_range("jobs", self.jobs, at_least=1, at_most=1024, whole=True, usual="1, or the number of cores")
        in_range("episodes", self.episodes, at_least=1, whole=True, usual="20")

    @property
    def named(self) -> list[str] | None:
        """The settings to search, if they are named."""
        if self.settings is None:
            return None
        return [name.strip().replace("-", "_") for name in self.settings.split(",") if name.strip()]


def tune(
    env: Env | None = None,
    config: ControlConfig | None = None,
    *,
    trials: int = 20,
    steps: int | None = None,
    seeds: int = 1,
    jobs: int = 1,
    episodes: int = 20,
    settings: Sequence[str] | None = None,
    run_dir: str | Path | None = None,
    quiet: bool = False,
    **fixed: Any,
) -> Tuning:
    """Search for the settings of an environment, and return the best that were found.

    The same call again goes on where it stopped, or was killed.

    Args:
        env: as for `train`.
        config: the settings to begin with; without one, the tuned settings of the environment, or defaults.
        trials: settings to try, with those of before where a study goes on.
        steps: environment steps of each run; by default `total_steps`.
        seeds: runs per trial, with seeds from `seed` on; its score is their mean.
        jobs: trials side by side, each in a process of its own.
        episodes: episodes that the last policy of a run is scored by, with the most likely actions.
        settings: names of the settings to search; by default all that matter for the task.
        run_dir: where to write; by default `runs/<env>/tune-seed<seed>`.
        quiet: print nothing.
        fixed: settings by their names, as for `train`, which are held where they are.

    Raises:
        UserError: for bad input, a study of other settings in `run_dir`, or if no trial has come to an end.
    """
    if isinstance(settings, str):
        settings = [settings]
    named = None if settings is None else ",".join(settings)
    tuning = TuneConfig(trials, steps, seeds, jobs, episodes, named)
    base, factory, _ = complete_settings(env, config, fixed, where="proximo.tune()")
    display = Display.choose(quiet=quiet)
    return unless_interrupted(tune_with(base, factory, display, tuning, fixed=set(fixed), run_dir=run_dir))


def tune_with(
    base: ControlConfig,
    factory: EnvFactory,
    display: Display,
    tuning: TuneConfig,
    *,
    fixed: Collection[str],
    run_dir: str | Path | None,
    command: str = "the same call",
) -> Tuning:
    """Begin a study, or go on with it; `command` is what does so once more."""
    import_optuna()
    base = _of_a_trial(base, tuning, fixed)
    policy = _looked_at(base, factory)
    space = search_space(base, policy, fixed=fixed, named=tuning.named)
    described = recorded(base) | {"total_steps": base.total_steps, "seeds": tuning.seeds, "episodes": tuning.episodes}
    described |= {"searched": {name: repr(searched) for name, searched in space.items()}}
    path = _claimed(base, run_dir)
    with locked(RunDirectory(path)):
        study = Study(path, base, space, described)
        session = _Session(base, factory, display, tuning, path, study, space, time.perf_counter())
        session.plan()
        with noted_signals(f"ending the trials that run; {command} goes on") as received:
            session.run(received)
        return session.result(received[0] if received and session.left() else None, command)


def _of_a_trial(base: ControlConfig, tuning: TuneConfig, fixed: Collection[str]) -> ControlConfig:
    """The settings that every trial begins with."""
    if base.init_from is not None:
        raise UserError(
            f"init_from is {base.init_from}, but a search begins each trial from nothing: its networks are part of "
            "what is searched. Leave it out, and give it to proximo train with the best.toml that comes of this."
        )
    in_range("seed", base.seed, at_least=0, at_most=HIGHEST_SEED - tuning.seeds, whole=True, usual="0")
    if tuning.steps is None:
        return base
    if "total_steps" in fixed:
        raise UserError("steps and total_steps are both given, and mean the same. Leave one of them out.")
    return with_settings(base, {"total_steps": tuning.steps}, where="proximo tune")


def _looked_at(base: ControlConfig, factory: EnvFactory) -> ActorCritic:
    """The policy that would learn; making an environment of evaluation tells early what is wrong with it."""
    check_device(base.device)
    config = with_environments_chosen(base, factory)
    env = make_for(config, factory)
    try:
        return ActorCritic(env.observation_space, env.action_space, config.network)
    finally:
        close_quietly(config.environment.env_id, [env])


def _claimed(base: ControlConfig, run_dir: str | Path | None) -> Path:
    """The study's folder: one that holds a study, or a new one."""
    env_id = base.environment.env_id
    path = files.expanded(run_dir or RUNS_ROOT / folder_name(env_id) / f"tune-seed{base.seed}")
    if not (path / JOURNAL_NAME).is_file():
        new_run(env_id, base.seed, path)
    return path


@dataclass
class _Seat:
    """A process, and the trial it is at."""

    worker: Worker
    trial: Trial | None = None
    began: float = 0.0
    step: int = 0
    shown: float = 0.0
    """When its progress was shown last."""

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


@dataclass
class _Session:
    """A study while it is worked on."""

    base: ControlConfig
    factory: EnvFactory
    display: Display
    tuning: TuneConfig
    path: Path
    study: Study
    space: dict[str, Searched]
    began: float

    def plan(self) -> None:
        """Say what will be done."""
        done, tuning = self.tuning.trials - self.left(), self.tuning
        runs = "a run" if tuning.seeds == 1 else f"{tuning.seeds} runs"
        before = f"; {done} done before" if done else ""
        self.display.say(
            f"Tuning {self.base.environment.env_id}: {tuning.trials} trials of {runs} of {self.base.total_steps:,} "
            f"steps, seed {self.base.seed}{before}"
        )
        self.display.say(f"Searched: {', '.join(self.space)}\nFolder: {self.path}")

    def left(self) -> int:
        """How many trials are still to be done."""
        return max(0, self.tuning.trials - sum(record.counts for record in self.study.records()))

    def run(self, received: list[int]) -> None:
        """Work through the trials, until they are done or a signal has come."""
        if not self.left():
            return
        parcel = pack(self.factory, self.base.environment.env_id)
        with _seats(min(self.tuning.jobs, self.left())) as seats:
            while not received:
                busy = sum(seat.trial is not None for seat in seats)
                for seat in seats:
                    if seat.trial is None and busy < self.left():
                        self._begin(seat, parcel)
                        busy += 1
                if not busy:
                    return
                ready = wait([seat.worker.connection for seat in seats if seat.trial is not None], _LOOK_EVERY)
                for index, seat in enumerate(seats):
                    if seat.worker.connection in ready and not self._hear(seat):
                        seats[index] = _Seat(Worker.begin(index, index, index + 1, serve))
            for seat in seats:
                if seat.trial is not None:
                    self.study.interrupt(seat.trial)

    def _begin(self, seat: _Seat, parcel: Any) -> None:
        """Give a process its next trial."""
        seat.trial, config = self.study.propose()
        seat.began = seat.shown = time.perf_counter()
        seat.step = 0
        folder, tuning = self.path / "trials", self.tuning
        task = Task(parcel, config, folder, seat.trial.number, tuning.seeds, tuning.episodes, self.base.seed)
        seat.worker.send("trial", task)

    def _hear(self, seat: _Seat) -> bool:
        """Take in what a process says of its trial; whether there is still a process."""
        said, trial = seat.worker.receive(), seat.trial
        assert trial is not None
        if isinstance(said, Report):
            seat.step = said.step
            goes_on = self.study.report(trial, said.step, said.value)
            with suppress(OSError):  # that it is gone is heard next
                seat.worker.connection.send(goes_on)
            self._show(seat, said)
            if goes_on:
                return True
            self.study.prune(trial, seat.seconds)
        elif isinstance(said, Scores):
            try:
                self.study.finish(trial, said.values, seat.seconds)
            except ValueError:  # not a number, or infinite
                self.study.fail(trial, f"its score is {said.values}", seat.seconds)
        elif isinstance(said, Failed):
            self.study.fail(trial, said.reason, seat.seconds)
        else:
            self.study.fail(trial, f"its process {seat.worker.death()}", seat.seconds)
            seat.worker.end(0.0)
        seat.trial = None
        self._told(trial.number)
        return isinstance(said, tuple)

    def _told(self, trial_number: int) -> None:
        """Show a trial that has ended, and write down what there is now."""
        records = self.study.records()
        record, best = records[trial_number], best_of(records)
        write_trials(self.path, records)
        if best is not None and best.number == trial_number:
            self._write_best(best)
        ended = sum(each.counts for each in records)
        ending = self._ending(record, best)
        self.display.say(f"trial {record.number} ({ended}/{self.tuning.trials})  {ending}  {self._time_left()}")
        if record == best:
            changed = (f"{name} {in_short(value)}" for name, value in record.settings.items())
            self.display.say(f"    {'  '.join(changed)}")

    def _ending(self, record: TrialRecord, best: TrialRecord | None) -> str:
        """How a trial ended, in a few words."""
        if record.state == "finished":
            others = f"best {number(best.score)}, trial {best.number}" if best else ""
            return f"score {number(record.score)} ({'the best so far' if best == record else others})"
        if record.state == "pruned" and record.reached is not None:
            share = self._share(record.reached[0])
            return f"given up after {share:.0%} of its steps, at a return of {number(record.reached[1])}"
        return f"failed: {record.reason.splitlines()[0]}"

    def _share(self, step: int) -> float:
        """Of a trial's steps that are done at a report."""
        return step / (REPORTS * self.tuning.seeds)

    def _show(self, seat: _Seat, report: Report) -> None:
        """Show how a long trial does, now and then."""
        now = time.perf_counter()
        if seat.trial is not None and now - seat.shown >= PLAIN_LINE_EVERY:
            seat.shown = now
            so_far = f"{self._share(report.step):.0%}  return {number(report.value)}"
            self.display.say(f"trial {seat.trial.number}  {so_far}  {self._time_left(seat)}")

    def _time_left(self, running: _Seat | None = None) -> str:
        """By the mean time of the trials so far; before there is one, by the share of the one that runs."""
        times = [record.seconds for record in self.study.records() if record.counts]
        left = self.left()
        if times:
            passed = running.seconds if running else 0.0
            seconds = max(0.0, left * sum(times) / len(times) - passed)
        elif running and running.step:
            seconds = running.seconds * (left / self._share(running.step) - 1.0)
        else:
            return ""
        return f"{duration(seconds / min(self.tuning.jobs, max(1, left)))} left"

    def _write_best(self, best: TrialRecord) -> None:
        config = self.study.config_of(best)
        write_best(self.path, best, config, n_seeds=self.tuning.seeds, episodes=self.tuning.episodes)

    def result(self, signal_number: int | None, command: str) -> Tuning:
        """Write what the study has come to, and return it.

        Raises:
            UserError: if no trial has come to an end.
            KeyboardInterrupt: if there was no time for one.
        """
        records = self.study.records()
        best = best_of(records)
        if best is None and signal_number is not None:
            raise KeyboardInterrupt(f"no trial has ended yet; {command} goes on")
        if best is None:
            last = records[-1].reason if records else "there is none"
            raise UserError(f"All {len(records)} trials have failed; there is no best one. The last one: {last}")
        write_trials(self.path, records)
        self._write_best(best)
        title = (
            f"{self.base.environment.env_id}: {sum(record.counts for record in records)} trials of "
            f"{self.base.total_steps:,} steps, best score {number(best.score)}"
        )
        try:
            draw(self.path, records, self.space, title)
        except Exception as error:  # whatever it is: what was found is written
            self.display.say(f"! No picture: {error if isinstance(error, UserError) else in_words(error)}")
        seconds = time.perf_counter() - self.began
        config = self.study.config_of(best)
        return Tuning(self.path, config, best, tuple(records), seconds, signal_number)


@contextmanager
def _seats(count: int) -> Iterator[list[_Seat]]:
    """So many processes that wait for trials; whatever they are at, they end with the block."""
    seats: list[_Seat] = []
    try:
        for index in range(count):
            seats.append(_Seat(Worker.begin(index, index, index + 1, serve)))
        yield seats
    finally:
        for seat in seats:
            if seat.trial is None:
                seat.worker.send("close")
            elif not seat.worker.connection.closed:
                seat.worker.kill()
        deadline = time.monotonic() + CLOSE_SECONDS
        for seat in seats:
            seat.worker.end(deadline)
