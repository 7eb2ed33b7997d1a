"""The command line: `proximo train CartPole-v1` and its siblings."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import tyro

from proximo.cli_arguments import (
    CheckEnvArguments,
    DoctorArguments,
    PresetsArguments,
    ResumeArguments,
    parse,
)
from proximo.errors import UserError, nearest, shown, tell
from proximo.lines import fitted, width_of
from proximo.loggers.following import NO_LOGGERS, Loggers, flags_to_go_on
from proximo.runs import files

USAGE = """\
proximo trains policies with proximal policy optimization.

  proximo train ENV         learn a control task          ENV: Gymnasium id, my_file.py:MyEnv, package.module:MyEnv
  proximo train ENV --init-from RUN   ... beginning from the policy of another run
  proximo record RUN        episodes of a policy, in a file
  proximo clone ENV         a policy from recorded episodes or a Minari dataset, to begin from
  proximo resume RUN        go on exactly where it stopped
  proximo evaluate RUN      episodes with frozen weights and normalizer
  proximo watch RUN         a video of the policy
  proximo export RUN        the policy as an ONNX or torch file that needs no Proximo
  proximo report RUN...     a page with curves and a diagnosis; several runs are compared
  proximo check-env ENV     what is wrong with my environment, before training on it
  proximo doctor            versions, cores, GPU, disk, extras, and how to mend what is missing
  proximo tune ENV          search for settings, with Optuna; the best ones as a file for train --config
  proximo presets           environments with tuned settings, their sources and measured scores
  proximo convert FILE      settings of RL Zoo, SB3, CleanRL, TRL or OpenRLHF as a file for --config

  proximo demo align        a language model aligned from nothing, on a CPU, in minutes
  proximo sft               fine-tune a language model on texts or conversations
  proximo reward            a reward model from preferences
  proximo align             PPO, GRPO or RLOO against a reward model, a function or an AI judge
  proximo dpo               direct preference optimization
  proximo sample | chat     let a language model answer prompts; talk to it
  proximo evaluate MODEL --against MODEL   win rate, KL and best-of-n by a reward

proximo COMMAND --help tells more. Start with: proximo train CartPole-v1
"""

EXIT_DONE, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 2, 130


DATA = (["convert"], ["sample"])
"""The commands that say TOML or JSON, whose lines stay whole on a terminal too."""

Outcome = tuple[int, str]
"""Exit code, and what a command has to say on standard output."""


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 bad input, 130 interrupted with a checkpoint saved."""
    words = sys.argv[1:] if arguments is None else arguments
    _prepare_streams()
    try:
        # What environments print must not come between the braces of the JSON.
        with _output_to_errors() if "--json" in words else contextlib.nullcontext():
            code, text = _dispatch(words)
        _say(text, as_it_is="--json" in words or words[:1] in DATA)
    except (SystemExit, BrokenPipeError) as error:  # Tyro prints help by itself, and its reader may have gone
        if isinstance(error, BrokenPipeError) and not {"-h", "--help"} & set(words):
            raise
        _say("")
        code = error.code if isinstance(error, SystemExit) else EXIT_DONE
    except UserError as error:
        tell(f"proximo: {error}")
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt as error:
        tell(f"proximo: {error if error.args else 'interrupted'}")
        code = EXIT_INTERRUPTED
    sys.exit(code)


def _prepare_streams() -> None:
    """Let text of any alphabet through, and let no file that is opened take the number of a closed stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


@contextlib.contextmanager
def _output_to_errors() -> Iterator[None]:
    """Standard output goes to standard error, also that of libraries and of processes that are started."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def _say(text: str, *, as_it_is: bool = False) -> None:
    """Print what a command has said; a reader that has gone (`| head`) is no fault, a full disk is one."""
    width = None if as_it_is else width_of(sys.stdout)
    try:
        print(fitted(text, width), end="\n" if text else "", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again when it ends
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"Standard output could not be written: {error.strerror}.") from error


def _dispatch(words: list[str]) -> Outcome:
    if not words or words[0] in ("-h", "--help", "help"):
        return (EXIT_DONE if words else EXIT_BAD_INPUT), USAGE.rstrip()
    if words[0] in ("-V", "--version", "version"):
        import proximo

        return EXIT_DONE, f"proximo {proximo.__version__}"
    command = COMMANDS.get(words[0])
    if command is None:
        closest = nearest(words[0], COMMANDS, count=1)
        hint = f" Did you mean {closest[0]!r}?" if closest else ""
        raise UserError(f"There is no command {words[0]!r}.{hint}\nCommands: {', '.join(COMMANDS)}")
    return command(words[1:])


# --- train ------------------------------------------------------------------------------------------------


def _train(words: list[str]) -> Outcome:
    """`proximo train ENV [--config FILE.toml] [flags]`: flags go over the file, the file over tuned settings."""
    from proximo.api import train_with
    from proximo.terminal import Display, dashboard_port
    from proximo.training.config import train_arguments

    read = _control_settings(words, "train", train_arguments)
    display = Display.choose(quiet=read.output.quiet, dashboard_port=dashboard_port(read.output))
    run = train_with(read.config, read.factory, display, read.output.run_dir, read.source, read.output.loggers)
    return _finish(run, display, as_json=read.output.json, loggers=read.output.loggers)


_ABOUT_DASHBOARD = ("--dashboard", "--no-dashboard", "--dashboard-port")
_LOGGERS = ("--tensorboard", "--wandb", "--trackio")


@dataclass(frozen=True)
class _Read:
    """What the words after `train` and `tune` come to."""

    config: Any
    factory: Any
    source: str
    """Where the settings come from."""
    flags: list[str]
    """The flags that set a setting."""
    output: Any
    given: Any
    """Everything that was parsed."""


def _control_settings(words: list[str], command: str, arguments: Callable[[Any], Any]) -> _Read:
    """Settings, from tuned ones, a file and flags; `arguments` says which flags there are, around tuned settings."""
    from proximo.api import make_to_look_at
    from proximo.collect.make import environment_source
    from proximo.presets import resolve_settings
    from proximo.training.config import ControlConfig, with_settings

    file = _config_file(words)
    from_file = _read_toml(file) if file else {}
    named = words[0] if words and not words[0].startswith("-") else None
    env_id = named or from_file.get("env_id")
    wants_help = any(word in ("-h", "--help") for word in words)
    if env_id is None and not wants_help:
        raise UserError(
            f"proximo {command} needs an environment right after it, such as: proximo {command} CartPole-v1"
        )
    base, source, factory = ControlConfig(), "", None
    in_file = from_file.get("env_kwargs", {})
    if not isinstance(in_file, dict):
        raise UserError(f"{file}: env_kwargs must be a table, not {shown(in_file)}")
    kwargs = in_file | _json_object("--env-kwargs", _flag_value(words, "--env-kwargs"))
    if env_id is not None:
        env_id, factory = environment_source(env_id)
        made = factory
        is_on_device = (_flag_value(words, "--vectorization") or from_file.get("vectorization")) == "device"
        on_device = (_flag_value(words, "--device") or from_file.get("device") or "cpu") if is_on_device else None
        base, source = resolve_settings(env_id, lambda: make_to_look_at(made, env_id, kwargs, on_device))
        named_algorithm = _flag_value(words, "--algorithm")
        chosen = {} if named_algorithm is None else {"algorithm": named_algorithm}
        changes = from_file | {"env_id": env_id, "env_kwargs": kwargs} | chosen
        base = with_settings(base, changes, where=str(file) if file else f"proximo {command}")
        source += f"; changed by {file}" if file else ""

    rest = words[1:] if named else words
    given = tyro.cli(arguments(base), args=rest, prog=f"proximo {command} {env_id or 'ENV'}")
    final = replace(given.settings, algorithm=given.learner)
    assert factory is not None
    about_output = ("--config", "--run-dir", "--quiet", "--json", "--seed", *_ABOUT_DASHBOARD, *_LOGGERS)
    flags = [_flag_name(word) for word in rest if word.startswith("--")]
    flags = [flag for flag in flags if flag not in about_output]
    source += f"; changed by {', '.join(flags)}" if flags else ""
    return _Read(final, factory, source, flags, given.output, given)


def _tune(words: list[str]) -> Outcome:
    from proximo.cli_tuning import refuse_folder, tune_arguments, tune_command

    refuse_folder(words)
    read = _control_settings(words, "tune", tune_arguments)
    command = shlex.join(["proximo", "tune", *words])
    return tune_command(read.config, read.factory, read.given.tuning, read.output, read.flags, command)


def _resume(words: list[str]) -> Outcome:
    from proximo.api import resume_with
    from proximo.runs.directory import is_language_run
    from proximo.terminal import Display, dashboard_port

    given = parse(ResumeArguments, words, "resume")
    port = dashboard_port(given)
    if is_language_run(given.run):
        from proximo.cli_language import resume_command
        from proximo.language import refuse_control_settings
        from proximo.stage_display import StageDisplay

        refuse_control_settings(given.run, env=given.env, total_steps=given.total_steps)
        display = StageDisplay.choose(quiet=given.quiet, dashboard_port=port)
        return resume_command(
            given.run, display, allow_import=given.allow_import, as_json=given.json, loggers=given.loggers()
        )
    display, loggers = Display.choose(quiet=given.quiet, dashboard_port=port), given.loggers()
    run = resume_with(
        given.run,
        given.env,
        display,
        allow_import=given.allow_import,
        total_steps=given.total_steps,
        loggers=loggers,
    )
    return _finish(run, display, as_json=given.json, env=given.env, loggers=loggers)


def _finish(run: Any, display: Any, *, as_json: bool, env: str | None = None, loggers: Loggers = NO_LOGGERS) -> Outcome:
    """Write the page of the run, show the result, and say what may be typed next."""
    from proximo.baselines import baselines_of
    from proximo.report.report import write_report
    from proximo.runs.checkpoint import newest_checkpoint
    from proximo.runs.directory import RunDirectory
    from proximo.saved_run import needs_trust

    directory = RunDirectory(run.path)
    facts = _result_facts(run)
    page, findings = None, []
    if run.env_steps:
        try:
            facts["checkpoint"] = str(newest_checkpoint(directory.checkpoints).path)
            report = write_report([directory], with_pictures=False, baselines=baselines_of([directory]))
            page = report.page
            findings = [
                f"{'!' if finding.severity in ('problem', 'warning') else '-'} "
                f"{finding.seen} {finding.meaning} {finding.advice}".rstrip()
                for finding in report.runs[0].findings
            ]
        except Exception as error:  # whatever it is: the run itself is done and saved
            findings = [f"! No report: {error if isinstance(error, UserError) else repr(error)}"]
    path = shlex.quote(str(run.path))
    named = f" --env {shlex.quote(env)}" if env else " --allow-import" if needs_trust(run.config) else ""
    commands = [f"proximo {word} {path}{named}" for word in ("evaluate", "watch")]
    if run.interrupted_by is not None:
        commands.insert(0, " ".join([f"proximo resume {path}{named}", *flags_to_go_on(loggers)]))
    else:
        commands.append(f"proximo report {path}")
    display.result(facts, page, findings, commands)
    told = {
        "run": str(run.path),
        "env_id": run.config.environment.env_id,
        "env_steps": run.env_steps,
        "return_mean": run.return_mean,
        "seconds": run.seconds,
        "interrupted": run.interrupted_by is not None,
    }
    code = EXIT_DONE
    if run.interrupted_by is not None:
        code = EXIT_INTERRUPTED if run.interrupted_by == signal.SIGINT else 128 + run.interrupted_by
    return code, json.dumps(told) if as_json else ""


def _result_facts(run: Any) -> dict[str, str]:
    """The result in words, with the threshold that the environment itself calls solved."""
    import gymnasium

    speed = f"{run.env_steps:,} steps in {run.seconds:.1f} s ({run.env_steps / max(run.seconds, 1e-9):,.0f} steps/s)"
    ended = {} if run.interrupted_by is None else {"interrupted": f"by signal {run.interrupted_by}; all is saved"}
    if run.return_mean is None:
        return ended | {"result": "no episode has ended yet", "took": speed} | _where_time_went(run)
    count = run.return_episodes
    result = f"mean return {run.return_mean:.4g} over the last {count} training episode{'s' * (count != 1)}"
    spec = gymnasium.registry.get(run.config.environment.env_id)
    threshold = spec.reward_threshold if spec else None
    if threshold is not None:
        reached = run.return_mean >= threshold
        verdict = "not solved yet" if not reached else "solved" if count >= 100 else "too few to call it solved"
        result += f": {verdict} ({run.config.environment.env_id} counts as solved at {threshold:g})"
    return ended | {"result": result, "took": speed} | _where_time_went(run)


def _where_time_went(run: Any) -> dict[str, str]:
    """The share of time per phase, of this session."""
    phases = run.phases
    total = sum(phases.get(f"seconds_{name}", 0.0) for name in ("collecting", "updating", "overhead"))
    if not total:
        return {}
    stepping, acting = phases["seconds_environment"], phases["seconds_acting"]
    parts = {"environments": stepping, "acting": acting}
    if not stepping:  # on a device they cannot be told apart
        parts = {"collecting": phases["seconds_collecting"]}
    parts["update"] = phases["seconds_updating"]
    parts["the rest"] = total - sum(parts.values())
    return {"time": ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())}


# --- the other commands -----------------------------------------------------------------------------------


def _evaluate(words: list[str]) -> Outcome:
    from proximo.cli_runs import evaluate_command

    return evaluate_command(words)


def _watch(words: list[str]) -> Outcome:
    from proximo.cli_runs import watch_command

    return watch_command(words)


def _report(words: list[str]) -> Outcome:
    from proximo.cli_runs import report_command

    return report_command(words)


def _check_env(words: list[str]) -> Outcome:
    from dataclasses import asdict

    from proximo.collect.check import check_environment, format_report
    from proximo.collect.make import find_factory, make_env, make_packed_env
    from proximo.collect.packed_env import ActionMask
    from proximo.collect.replay import load_record, replay_record

    given = parse(CheckEnvArguments, words, "check-env")
    kwargs = _json_object("--env-kwargs", given.env_kwargs)
    factory = find_factory(given.env)

    if given.replay is not None:
        record = load_record(given.replay)
        kwargs = record.get("env_kwargs", {}) | kwargs
        limit = given.max_episode_steps or record.get("max_episode_steps")
        mask = record.get("action_mask")
        options: dict[str, Any] = {"action_mask": mask} if mask in get_args(ActionMask) else {}
        said = replay_record(
            lambda: make_packed_env(factory, given.env, kwargs, max_episode_steps=limit, **options), record
        )
        return EXIT_DONE, json.dumps({"replay": said}) if given.json else said
    report = check_environment(
        lambda: make_env(factory, given.env, kwargs, max_episode_steps=given.max_episode_steps),
        given.env,
        n_steps=given.steps,
        seed=given.seed,
    )
    told = {"env_id": given.env, "ok": report.ok, **asdict(report)}
    return EXIT_DONE if report.ok else EXIT_BAD_INPUT, json.dumps(told) if given.json else format_report(report)


def _doctor(words: list[str]) -> Outcome:
    from dataclasses import asdict

    from proximo.doctor import diagnose_machine, main_text

    given = parse(DoctorArguments, words, "doctor")
    if given.json:
        entries = diagnose_machine(speed=given.speed)
        is_ready = all(entry.status != "problem" for entry in entries)
        text = json.dumps({"entries": [asdict(entry) for entry in entries]})
    else:
        text, is_ready = main_text(speed=given.speed)
    return EXIT_DONE if is_ready else EXIT_BAD_INPUT, text


def _presets(words: list[str]) -> Outcome:
    from proximo.presets import ATARI, PRESETS

    parse(PresetsArguments, words, "presets")
    lines = [f"{'environment':<25}  {'steps':>10}  measured score"]
    for env_id, preset in (PRESETS | {"ALE/...": ATARI}).items():
        lines.append(f"{env_id:<25}  {preset.settings['total_steps']:>10,}  {preset.score}")
        lines.append(f"    {preset.source}")
    return EXIT_DONE, "\n".join(lines)


def _clone(words: list[str]) -> Outcome:
    from proximo.cli_from_data import clone_command

    file = _config_file(words)
    from_file = _read_toml(file) if file else {}
    named = words[0] if words and not words[0].startswith("-") else None
    env_id = named or from_file.get("env_id")
    if env_id is None and not any(word in ("-h", "--help") for word in words):
        raise UserError("proximo clone needs an environment right after it: proximo clone CartPole-v1 --data FILE.npz")
    kwargs = from_file.get("env_kwargs", {}) | _json_object("--env-kwargs", _flag_value(words, "--env-kwargs"))
    return clone_command(env_id, words[1:] if named else words, from_file, kwargs)


def _record(words: list[str]) -> Outcome:
    from proximo.cli_from_data import record_command

    return record_command(words)


def _convert(words: list[str]) -> Outcome:
    from proximo.cli_convert import convert_command

    return convert_command(words)


def _language(name: str, *first: str) -> Callable[[list[str]], Outcome]:
    """A command of cli_language, which is imported when it is called: it brings in transformers."""

    def command(words: list[str]) -> Outcome:
        from proximo import cli_language

        return getattr(cli_language, name)(*first, words)

    return command


def _sample(words: list[str]) -> Outcome:
    from proximo.cli_models import sample_command

    return sample_command(words)


def _chat(words: list[str]) -> Outcome:
    from proximo.cli_models import chat_command

    return chat_command(words)


def _export(words: list[str]) -> Outcome:
    from proximo.cli_export import export_command

    return export_command(words)


COMMANDS: dict[str, Callable[[list[str]], Outcome]] = {
    "train": _train,
    "resume": _resume,
    "tune": _tune,
    "evaluate": _evaluate,
    "watch": _watch,
    "export": _export,
    "report": _report,
    "check-env": _check_env,
    "doctor": _doctor,
    "presets": _presets,
    "convert": _convert,
    "clone": _clone,
    "record": _record,
    "sft": _language("stage_command", "sft"),
    "reward": _language("stage_command", "reward"),
    "align": _language("stage_command", "align"),
    "dpo": _language("stage_command", "dpo"),
    "sample": _sample,
    "chat": _chat,
    "demo": _language("demo_command"),
}


def _config_file(words: list[str]) -> Path | None:
    value = _flag_value(words, "--config")
    return None if value is None else Path(value)


def _flag_value(words: list[str], flag: str) -> str | None:
    """The value of a flag that is needed before the others can be understood; the last one counts, as in tyro."""
    value = None
    for index, word in enumerate(words):
        if word.startswith("--") and _flag_name(word) == flag:
            _, equals, joined = word.partition("=")
            value = joined if equals else next(iter(words[index + 1 :]), None)
    return value


def _flag_name(word: str) -> str:
    """`--run_dir=x` as `--run-dir`: a flag may be written either way."""
    return word.partition("=")[0].replace("_", "-")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"The config file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or a number of thousands of digits
        raise UserError(f"{path} is not a TOML file: {error}. A line looks like: learning_rate = 0.001") from error


def _json_object(flag: str, text: str | None) -> dict[str, Any]:
    try:
        value = files.parse_json((text or "{}").encode("utf-8", "surrogatepass"), allow_nan=True)
    except ValueError as error:
        raise UserError(f"{flag} is not JSON ({error}); it looks like: {flag} '{{\"hardcore\": true}}'") from error
    if not isinstance(value, dict):
        raise UserError(f"{flag} must be a JSON object, not {shown(value)}")
    return value


if __name__ == "__main__":
    main()
