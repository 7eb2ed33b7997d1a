"""The language stages: `sft`, `reward`, `align`, `dpo` for Python callers, and the one way all four are driven."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, overload

import torch

from proximo import api
from proximo.api import Run
from proximo.baselines import served
from proximo.collect.make import Env
from proximo.collect.rewards import kind_of_reward
from proximo.errors import UserError, nearest, shown, tell
from proximo.loggers.following import NO_LOGGERS, Loggers, ResumeLoggers, following, refuse_missing, taken_from
from proximo.models.folders import tokenizer_in_words
from proximo.process import check_device, noted_signals
from proximo.runs.checkpoint import finish_save, newest_checkpoint
from proximo.runs.directory import RunDirectory, new_run, open_run, read_config, write_config
from proximo.runs.lock import locked
from proximo.runs.manifest import differences
from proximo.runs.metrics import read_metrics, truncate_metrics
from proximo.stage_display import StageDisplay
from proximo.training.config import changed_settings, settings_of, with_settings
from proximo.training.memory import check_fits, enough_memory
from proximo.training.worst_case import try_worst_case

STAGES = ("sft", "reward", "align", "dpo")

PLACES = ("model", "data", "prompts", "chat_template")
"""Settings that may name a file or folder; they are kept as absolute paths, so that a run can be resumed anywhere."""


@dataclass(frozen=True)
class StageRun:
    """A language run, whole or until it was interrupted. Once it is whole, its folder is an ordinary model folder."""

    path: Path
    """The run directory, and the `save_pretrained` folder."""
    stage: str
    """sft, reward, align or dpo."""
    config: Any
    """The settings it was trained with."""
    metrics: dict[str, Any]
    """The last iteration's metrics."""
    facts: dict[str, str]
    """What came out of it, in words."""
    interrupted_by: int | None = None
    """The signal that ended it early; None if it came to its end."""


def sft(model: str | Path, data: str | Path, *, run_dir: str | Path | None = None, **settings: Any) -> StageRun:
    """Fine-tune a causal language model on texts, prompts with completions, or conversations.

    Args:
        model: a `save_pretrained` folder or a hub id.
        data: a .jsonl or .parquet file, or a folder that `datasets` saved, with the column `messages`, the columns
            `prompt` and `completion`, or the column `text`.
        run_dir: where to write; by default a new folder `runs/sft/<time>-seed<seed>`.
        settings: any setting of `proximo sft --help` by its name, `quiet`, and `tensorboard`, `wandb`, `trackio`.

    Raises:
        UserError: for whatever does not fit, before training where possible.
    """
    return _run("sft", {"model": _place("model", model), "data": _place("data", data)}, run_dir, settings)


def reward(model: str | Path, data: str | Path, *, run_dir: str | Path | None = None, **settings: Any) -> StageRun:
    """Train a reward model on preferences: columns `prompt`, `chosen`, `rejected`, and `margin` if there is one.

    Args and errors are those of `sft`.
    """
    return _run("reward", {"model": _place("model", model), "data": _place("data", data)}, run_dir, settings)


def dpo(model: str | Path, data: str | Path, *, run_dir: str | Path | None = None, **settings: Any) -> StageRun:
    """Optimize a model on preferences directly (Rafailov et al. 2023); data as for `reward`.

    Args and errors are those of `sft`.
    """
    return _run("dpo", {"model": _place("model", model), "data": _place("data", data)}, run_dir, settings)


def align(
    model: str | Path,
    reward: str | Path | Callable[..., Any] | Sequence[str | Path],
    prompts: str | Path,
    *,
    algorithm: str = "ppo",
    run_dir: str | Path | None = None,
    **settings: Any,
) -> StageRun:
    """Optimize a language model against rewards, held near where it began by a KL penalty.

    Args:
        model: a `save_pretrained` folder or a hub id; also the reference.
        reward: a reward model's folder, `my_file.py:function`, `package.module:function`, "judge", "code:COLUMN"
            (with `sandbox`), several of these, or a function `score(prompts, responses, **columns)` that returns a list
            of numbers or None.
        prompts: a file or folder as for `sft`, with the column `prompt`.
        algorithm: ppo, grpo, dr_grpo, dapo or rloo.
        run_dir: where to write; by default a new folder `runs/align/<time>-seed<seed>`.
        settings: any setting of `proximo align --help` by its name, `quiet`, and `tensorboard`, `wandb`, `trackio`.

    Raises:
        UserError: for whatever does not fit, before training where possible.
    """
    named: dict[str, Any] = {"model": _place("model", model), "prompts": _place("prompts", prompts)}
    function = None
    if callable(reward):
        function = reward
    else:
        named["reward"] = _reward_places(reward)
    return _run("align", named, run_dir, settings | {"algorithm": algorithm}, function)


@overload
def resume(
    run: str | Path | Run,
    env: Env | None = None,
    *,
    allow_import: bool = False,
    total_steps: int | None = None,
    quiet: bool = False,
    tensorboard: bool | None = None,
    wandb: bool = False,
    trackio: bool = False,
) -> Run: ...


@overload
def resume(
    run: str | Path | StageRun,
    *,
    reward: Callable[..., Any] | None,
    allow_import: bool = False,
    quiet: bool = False,
    tensorboard: bool | None = None,
    wandb: bool = False,
    trackio: bool = False,
) -> StageRun: ...


def resume(
    run: str | Path | Run | StageRun,
    env: Env | None = None,
    *,
    reward: Callable[..., Any] | None = None,
    allow_import: bool = False,
    total_steps: int | None = None,
    quiet: bool = False,
    tensorboard: bool | None = None,
    wandb: bool = False,
    trackio: bool = False,
) -> Run | StageRun:
    """Go on exactly where a run stopped, of control or of a language stage.

    Args:
        run: the run, or its directory.
        env: the environment, where the run's own name for it is not a registered Gymnasium id.
        reward: the function that scores responses, where `proximo.align` was given one; for language runs only.
        allow_import: import the file or module that the run names; only for runs of your own.
        total_steps: train a control run up to this many steps instead of the number it was begun with.
        quiet: print nothing.
        tensorboard: write event files for TensorBoard; by default if the run has some.
        wandb: send its metrics to Weights & Biases, also where it was sent there before.
        trackio: the same of Trackio.

    Raises:
        UserError: if there is no run, no sound checkpoint, or the environment or the reward cannot be had.
    """
    loggers = ResumeLoggers(tensorboard=tensorboard, wandb=wandb, trackio=trackio)
    directory = open_run(run if isinstance(run, str | Path) else run.path)
    if stage_of(directory) is None:
        if reward is not None:
            raise UserError(f"{directory.path} is a control run: its rewards are its environment's. Leave reward out.")
        return api.resume(
            directory.path, env, allow_import=allow_import, total_steps=total_steps, quiet=quiet, loggers=loggers
        )
    refuse_control_settings(directory.path, env=env, total_steps=total_steps)
    display, chosen = StageDisplay.choose(quiet=quiet), loggers.of(directory)
    return unless_interrupted(resume_stage(directory.path, display, reward, allow_import=allow_import, loggers=chosen))


def _place(name: str, value: Any) -> str:
    """A folder, a file or a hub id as text."""
    if not isinstance(value, str | Path):
        saved = " Save it with its save_pretrained, its tokenizer beside it." if name == "model" else ""
        raise UserError(f"{name} is a {type(value).__name__}; it must be a folder, a file or a hub id, as text.{saved}")
    return str(value)


def _reward_places(reward: Any) -> tuple[str, ...]:
    """Where rewards come from, if they are no function of the caller's."""
    places = list(reward) if isinstance(reward, list | tuple) else [reward]
    if any(callable(place) for place in places):
        raise UserError(
            "reward is a list with a function in it, but a function object stands alone. Call the others inside of "
            "it, or name each by its place: reward=['my_file.py:first', 'my_file.py:second']."
        )
    if not places or not all(isinstance(place, str | Path) for place in places):
        raise UserError(
            f"reward is {reward!r}; it must be a reward model's folder, 'my_file.py:function', 'judge', a list of "
            "these, or a function."
        )
    return tuple(str(place) for place in places)


def _run(
    stage: str,
    named: dict[str, Any],
    run_dir: str | Path | None,
    settings: dict[str, Any],
    function: Callable[..., Any] | None = None,
) -> StageRun:
    settings = dict(settings)
    display = StageDisplay.choose(quiet=bool(settings.pop("quiet", False)))
    loggers = taken_from(settings, where=f"proximo.{stage}()")
    config = config_of(stage, named | settings, where=f"proximo.{stage}()")
    run = run_stage(stage, config, display, run_dir, function, loggers)
    return unless_interrupted(run)


def unless_interrupted(run: StageRun) -> StageRun:
    """What a signal asked for is done (all is saved): now let Python callers have their KeyboardInterrupt."""
    if run.interrupted_by is not None:
        raise KeyboardInterrupt(f"{run.path} is saved. Go on with it: {resume_words(run.path, run.stage, run.config)}")
    return run


def resume_words(path: Path, stage: str, config: Any) -> str:
    """What to type to go on with a run; Python where its reward is a function object."""
    if stage == "align" and not config.reward:
        return f"proximo.resume({str(path)!r}, reward=function)"
    trust = ["--allow-import"] if _needing_leave(config) else []
    return shlex.join(["proximo", "resume", str(path), *trust])


def _needing_leave(config: Any) -> list[str]:
    """The rewards that a stranger's run must not bring along: functions, programs, judges (they get keys and files)."""
    places = getattr(config, "reward", ()) + getattr(config, "gold", ())
    return [place for place in places if kind_of_reward(place) in ("function", "code", "judge")]


# --- settings ---------------------------------------------------------------------------------------------------


def stage_module(stage: str) -> Any:
    """The module of a stage, imported when it is needed: it brings in transformers."""
    return import_module(f"proximo.training.{stage}")


def config_class(stage: str) -> Any:
    """The settings of a stage."""
    module = stage_module(stage)
    return next(
        value for name, value in vars(module).items() if name.lower() == f"{stage}config" and isinstance(value, type)
    )


def config_of(stage: str, settings: dict[str, Any], *, where: str) -> Any:
    """The config of a stage from flat settings; `algorithm` names the settings to begin with.

    Raises:
        UserError: for an unknown name or an impossible value.
    """
    settings = dict(settings)
    for name in set(settings) & set(_LISTS_OF_WORDS):
        settings[name] = _words(name, settings[name], where)
    base = config_class(stage)()
    if stage == "align":
        base = replace(base, algorithm=algorithm_named(settings.pop("algorithm", "ppo")))
    return with_settings(base, settings, where=where)


_LISTS_OF_WORDS = ("reward", "gold", "stop")
"""Settings of several words, which may be given as a single one."""


def _words(name: str, value: Any, where: str) -> Any:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and not all(isinstance(word, str) for word in value):
        raise UserError(f"{where}: {name} is {shown(value)}; it must be text, or a list of texts.")
    return value


def algorithm_named(name: Any) -> Any:
    """The settings of PPO or a relative by its name.

    Raises:
        UserError: if there is none of this name, with the nearest ones.
    """
    from proximo.training.align_config import ALGORITHMS

    if not isinstance(name, str) or name not in ALGORITHMS:
        close = nearest(str(name), ALGORITHMS, count=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        listed = ", ".join(ALGORITHMS)
        raise UserError(f"There is no algorithm {shown(name)} for language models.{hint} There are: {listed}.")
    return ALGORITHMS[name]


def written_settings(stage: str, config: Any) -> dict[str, Any]:
    """What config.toml holds: the stage, the algorithm's kind, and every setting by its name.

    TOML has no None: it is left out, and written as "none" where something else is the default.
    """
    kind = {"algorithm": type(config.algorithm).__name__.lower()} if stage == "align" else {}
    defaults = settings_of(config_of(stage, kind, where="the defaults"))
    settings = settings_of(config)
    nones = {name: "none" for name, value in settings.items() if value is None and defaults.get(name) is not None}
    return {"stage": stage} | kind | settings | nones


def stage_of(run: RunDirectory) -> str | None:
    """The stage of a language run; None for a control run."""
    stage = read_config(run).get("stage")
    return stage if stage in STAGES else None


def read_stage_config(run: RunDirectory) -> tuple[str, Any]:
    """The stage of a run and its config.

    Raises:
        UserError: if its config.toml is damaged, or it is no language run.
    """
    settings = read_config(run)
    stage = settings.pop("stage", None)
    if stage not in STAGES:
        raise UserError(f"{run.path} is no language run.")
    return stage, config_of(stage, settings, where=str(run.config_path))


def _absolute(config: Any) -> Any:
    changes: dict[str, Any] = {}
    for entry in fields(config):
        value: Any = getattr(config, entry.name)
        if entry.name in PLACES and isinstance(value, str) and value and _exists(value):
            changes[entry.name] = str(Path(value).expanduser().absolute())
        elif entry.name in ("reward", "gold") and isinstance(value, tuple):
            changes[entry.name] = tuple(_absolute_reward(place) for place in value)
    sandbox = getattr(config, "sandbox", "")
    first = sandbox.partition(" ")[0]
    if "/" in first and Path(first).is_file():  # where else it is searched for on the PATH
        changes["sandbox"] = shlex.quote(str(Path(first).absolute())) + sandbox[len(first) :]
    judge = getattr(config, "judge", None)
    if judge is not None and judge.judge_rubric and _exists(judge.judge_rubric):
        changes["judge"] = replace(judge, judge_rubric=str(Path(judge.judge_rubric).absolute()))
    return replace(config, **changes)


def _absolute_reward(place: str) -> str:
    file, colon, function = place.rpartition(":") if kind_of_reward(place) == "function" else (place, "", "")
    return f"{Path(file).expanduser().absolute()}{colon}{function}" if _exists(file) else place


def _exists(place: str) -> bool:
    """Whether a name leads to a file or folder; one that is too long for any system does not."""
    try:
        return Path(place).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


# --- driving ----------------------------------------------------------------------------------------------------


def run_stage(
    stage: str,
    config: Any,
    display: StageDisplay,
    run_dir: str | Path | None,
    function: Callable[..., Any] | None = None,
    loggers: Loggers = NO_LOGGERS,
) -> StageRun:
    """Train a new run of a stage; a run directory that nothing was written to does not stay behind."""
    refuse_missing(loggers)
    module = stage_module(stage)
    config = _absolute(config)
    with _threads(config), enough_memory(stage, config):
        if config.model:
            check_fits(stage, config)
        directory = new_run(stage, config.seed, None if run_dir is None else Path(run_dir))
        try:
            state = module.start(config, function) if stage == "align" else module.start(config)
            tried = _tried(stage, module, config, state)
        except BaseException:
            with suppress(OSError):
                directory.path.rmdir()
            raise
        with locked(directory):
            write_config(directory, written_settings(stage, config))
            module.save(config, directory, state)  # so that it can be resumed from its first moment on
            facts = module.plan(config, state) | tried | _tokenizer_facts(state)
            display.facts({"stage": stage} | facts | {"run directory": str(directory.path)})
            with following(directory, loggers, display.say, resumed=False) as follow:
                return _to_the_end(stage, module, config, directory, state, display, follow)


def _tried(stage: str, module: Any, config: Any, state: Any) -> dict[str, str]:
    """Try the worst case of a run's settings; where it does not fit, the rewards are closed."""
    try:
        return try_worst_case(stage, module, config, state)
    except BaseException:
        for reward in _rewards_of(state):
            reward.close()
        raise


def _rewards_of(state: Any) -> list[Any]:
    return [source for name in ("reward", "gold") if (source := getattr(state, name, None)) is not None]


def _tokenizer_facts(state: Any) -> dict[str, str]:
    """What is to be said about the tokenizer beside its model, if anything."""
    model = state.policy.actor if hasattr(state, "policy") else state.model
    words = tokenizer_in_words(state.tokenizer, model.config)
    return {"tokenizer": words} if words else {}


def resume_stage(
    run: str | Path,
    display: StageDisplay,
    function: Callable[..., Any] | None = None,
    *,
    allow_import: bool = False,
    loggers: Loggers = NO_LOGGERS,
) -> StageRun:
    """Go on exactly where a language run stopped.

    Raises:
        UserError: if the run names code as its reward and nobody has allowed that, or cannot be read.
    """
    directory = open_run(run)
    stage, config = read_stage_config(directory)
    _check_rewards(directory, stage, config, function, allow_import=allow_import)
    module = stage_module(stage)
    with _threads(config), enough_memory(stage, config), locked(directory):
        checkpoint = newest_checkpoint(directory.checkpoints)
        state = module.restore(config, checkpoint, function) if stage == "align" else module.restore(config, checkpoint)
        finish_save(directory.checkpoints, checkpoint, keep_last=config.keep_checkpoints, keep_every=config.keep_every)
        truncate_metrics(directory.metrics_path, state.iteration)
        for reason in checkpoint.skipped:
            tell(f"skipped a damaged checkpoint: {reason}")  # also where the display is quiet
        changed = changed_settings(checkpoint.state.get("settings"), config)
        level = "\n".join(filter(None, [changed or _exactness(config, function), differences(checkpoint.versions)]))
        display.facts(
            {"run directory": str(directory.path), "goes on at": f"iteration {state.iteration}", "resume": level}
        )
        with following(directory, loggers, display.say, resumed=True) as follow:
            return _to_the_end(stage, module, config, directory, state, display, follow)


def _exactness(config: Any, function: Callable[..., Any] | None) -> str:
    """How exactly a language run goes on, in words."""
    if config.device != "cpu":
        return "statistical: a GPU adds numbers up in no fixed order"
    kinds = {kind_of_reward(place) for place in getattr(config, "reward", ())}
    if "judge" in kinds:
        return "statistical: an AI judge does not always answer alike; everything else is back as it was"
    if "code" in kinds:
        return "exact, where the programs and their tests come out as they did (time limits may not)"
    if "function" in kinds or function is not None:
        return "exact, where the reward function gives the same scores to the same responses"
    return "exact"


def _check_rewards(
    directory: RunDirectory, stage: str, config: Any, function: Callable[..., Any] | None, *, allow_import: bool
) -> None:
    """Refuse to resume without the reward that the run had, or with one that nobody has allowed."""
    if function is not None and not callable(function):
        raise UserError(f"reward is {function!r}; to resume a run it must be a function, or left out.")
    if function is not None and stage != "align":
        raise UserError(f"{directory.path} is a run of proximo {stage}, which asks for no reward. Leave reward out.")
    if function is not None and config.reward:
        raise UserError(
            f"The reward of this run is {' + '.join(config.reward)}, as its config says: it goes on with that. Leave "
            "reward out, or begin a new run with the function."
        )
    if stage == "align" and function is None and not config.reward:
        raise UserError(
            "This run's reward was a function of the program that began it. Go on from there: "
            f"{resume_words(directory.path, stage, config)}"
        )
    asked = config.gold if stage == "align" and function is not None else None
    places = [place for place in _needing_leave(config) if asked is None or place in asked]
    if places and not allow_import:
        does = {
            "function": "runs that code",
            "code": f"runs programs that the model writes, by the command: {config.sandbox or '(none)'}",
            "judge": f"sends texts, the rubric {config.judge.judge_rubric or '(none)'} and the key in "
            f"${config.judge.judge_api_key_variable} (where there is one) to {config.judge.judge_url}",
        }
        each = [f"This run's reward is {place!r}: resuming it {does[kind_of_reward(place)]}" for place in places]
        raise UserError("\n".join(each) + "\nIf the run is your own, add --allow-import (Python: allow_import=True).")


def refuse_control_settings(run: Path, **given: Any) -> None:
    """Raise UserError for settings of `resume` that mean something for control runs only."""
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"{run} is a language run, where {name} means nothing: it ends after the iterations or epochs that it "
                f"was begun with. Leave {name} out; to train longer, begin a new run from {run} as its model."
            )


def _to_the_end(
    stage: str,
    module: Any,
    config: Any,
    directory: RunDirectory,
    state: Any,
    display: StageDisplay,
    follow: Callable[[], None],
) -> StageRun:
    interrupted_by = None
    row: dict[str, Any] = {}
    try:
        with (
            served(directory, written_settings(stage, config), display.dashboard_port),
            noted_signals() as received,
            display.live(stage, state.iteration) as show,
        ):
            for row in module.iterate(config, directory, state, lambda: received):
                show(row, getattr(state, "samples", []))
                follow()
            if received and not module.finished(config, state):
                interrupted_by = received[0]
    finally:
        for reward in _rewards_of(state):
            reward.close()
    if not row:
        rows = read_metrics(directory.metrics_path)
        row = dict(rows[-1]) if rows else {}
    facts = {} if interrupted_by is not None else module.finish(config, directory, state)
    return StageRun(directory.path, stage, config, row, facts, interrupted_by)


@contextmanager
def _threads(config: Any) -> Iterator[None]:
    """Give torch the run's number of threads (0: as many as it likes), and back what it had."""
    check_device(config.device)
    before = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
