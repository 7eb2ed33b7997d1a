"""The commands that train language models: sft, reward, align, dpo, and demo align."""

from __future__ import annotations

import json
import shlex
import signal
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from proximo.errors import HIGHEST_SEED, UserError, in_range
from proximo.language import (
    StageRun,
    config_class,
    config_of,
    resume_stage,
    resume_words,
    run_stage,
)
from proximo.loggers.following import NO_LOGGERS, Loggers, flags_to_go_on
from proximo.runs.directory import RunDirectory
from proximo.stage_display import StageDisplay
from proximo.terminal import dashboard_port

EXIT_DONE, EXIT_INTERRUPTED = 0, 130

Outcome = tuple[int, str]
"""The exit code, and what goes to standard output."""

SUMMARIES = {
    "sft": "Fine-tune a causal language model on texts, completions or conversations.",
    "reward": "Train a reward model on preferences.",
    "align": "Optimize a language model against rewards, near where it began.",
    "dpo": "Optimize a language model on preferences directly.",
}


@dataclass(frozen=True)
class _Output:
    config: Path | None = None
    """A TOML file of settings; flags go over it."""
    run_dir: Path | None = None
    """Where to write; by default a new folder runs/STAGE/TIME-seedSEED."""
    quiet: bool = False
    """Show no progress and no notes."""
    dashboard: bool = False
    """Show the run in a browser while it goes on: a page on this machine, at an address that is printed."""
    dashboard_port: int | None = None
    """The port of that page; by default any free one."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""
    loggers: Annotated[Loggers, tyro.conf.OmitArgPrefixes] = NO_LOGGERS


def stage_command(stage: str, words: list[str]) -> Outcome:
    """`proximo sft | reward | align | dpo [--config FILE.toml] [flags]`: flags go over the file."""
    file = _last_value(words, "--config")
    from_file = _read_toml(Path(file)) if file else {}
    from_file.pop("stage", None)
    algorithm = None
    if stage == "align":
        named = _last_value(words, "--algorithm")
        words = _without(words, "--algorithm")
        algorithm = named or from_file.pop("algorithm", "ppo")
        from_file["algorithm"] = algorithm
    base = config_of(stage, from_file, where=file or f"proximo {stage}")
    given, config = _parse_stage(stage, words, base)
    display = StageDisplay.choose(quiet=given.quiet, dashboard_port=dashboard_port(given))
    with display.notes():
        run = run_stage(stage, config, display, given.run_dir, loggers=given.loggers)
    return finish_stage(run, display, as_json=given.json, loggers=given.loggers)


def _parse_stage(stage: str, words: list[str], base: Any) -> tuple[_Output, Any]:
    """Flags for every setting of the stage, and of the algorithm chosen."""
    settings_type = config_class(stage)
    fields: list[Any] = [
        ("settings", Annotated[settings_type, tyro.conf.OmitArgPrefixes], field(default=base)),
        ("output", Annotated[_Output, tyro.conf.OmitArgPrefixes], field(default_factory=_Output)),
    ]
    if stage == "align":
        kind = type(base.algorithm)
        fields.insert(1, ("learner", Annotated[kind, tyro.conf.OmitArgPrefixes], field(default=base.algorithm)))
    arguments = _dataclass_of(f"{stage.capitalize()}Arguments", fields)
    extra = " --algorithm ppo | grpo | dr_grpo | dapo | rloo chooses the algorithm." if stage == "align" else ""
    given: Any = tyro.cli(arguments, args=words, prog=f"proximo {stage}", description=SUMMARIES[stage] + extra)
    config = replace(given.settings, algorithm=given.learner) if stage == "align" else given.settings
    return given.output, config


def _dataclass_of(name: str, fields: list[Any]) -> Any:
    from dataclasses import make_dataclass

    return make_dataclass(name, fields, frozen=True)


def resume_command(
    run: Path, display: StageDisplay, *, allow_import: bool, as_json: bool, loggers: Loggers = NO_LOGGERS
) -> Outcome:
    """`proximo resume RUN` for a language run."""
    with display.notes():
        whole = resume_stage(run, display, allow_import=allow_import, loggers=loggers)
    return finish_stage(whole, display, as_json=as_json, loggers=loggers)


def finish_stage(run: StageRun, display: StageDisplay, *, as_json: bool, loggers: Loggers = NO_LOGGERS) -> Outcome:
    """Show the result, and say what may be typed next."""
    path = str(run.path)
    if run.interrupted_by is not None:
        facts = {"interrupted": f"by signal {run.interrupted_by}; all is saved"}
        words = [resume_words(run.path, run.stage, run.config), *flags_to_go_on(loggers)]
        display.result(facts, [" ".join(words)])
    else:
        page, findings = _reported(run)
        display.result(run.facts, _next(run.stage, path, run.config), findings, page)
    numbers = {name: value for name, value in run.metrics.items() if isinstance(value, int | float | None)}
    row = {"run": path, "stage": run.stage, "interrupted": run.interrupted_by is not None} | numbers
    text = json.dumps(row) if as_json else ""
    if run.interrupted_by is None:
        return EXIT_DONE, text
    return (EXIT_INTERRUPTED if run.interrupted_by == signal.SIGINT else 128 + run.interrupted_by), text


def _reported(run: StageRun) -> tuple[Path | None, list[str]]:
    """Write the page of a run, and say where it is and what it shows."""
    from proximo.baselines import baselines_of
    from proximo.report.report import write_report

    directory = RunDirectory(run.path)
    try:
        report = write_report([directory], with_pictures=False, baselines=baselines_of([directory]))
    except Exception as error:  # whatever it is: the run itself is done and saved
        return None, [f"! No report: {error if isinstance(error, UserError) else repr(error)}"]
    lines = [
        f"{'!' if finding.severity in ('problem', 'warning') else '-'} "
        f"{finding.seen} {finding.meaning} {finding.advice}".rstrip()
        for finding in report.runs[0].findings
    ]
    return report.page, lines


def _next(stage: str, path: str, config: Any) -> list[str]:
    path, model = shlex.quote(path), shlex.quote(config.model)
    if stage == "sft":
        return [
            f"proximo chat {path}",
            f"proximo reward --model {path} --data PREFERENCES.jsonl",
            f"proximo align --model {path} --reward REWARD --prompts PROMPTS.jsonl",
        ]
    if stage == "reward":
        return [f"proximo align --model {model} --reward {path} --prompts PROMPTS.jsonl"]
    rewards = shlex.join(getattr(config, "reward", ())) or "REWARD"
    rewards += f" --sandbox {shlex.quote(config.sandbox)}" if getattr(config, "sandbox", "") else ""
    prompts = shlex.quote(getattr(config, "prompts", "") or "PROMPTS.jsonl")
    return [
        f"proximo chat {path}",
        f"proximo evaluate {path} --against {model} --reward {rewards} --prompts {prompts}",
    ]


# --- the demo -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoArguments:
    """The whole language pipeline from nothing: SFT, a reward model from preferences, PPO, and a gold judge."""

    run_dir: Path | None = None
    """Where to write; by default a new folder runs/demo-align/TIME-seedSEED."""
    seed: int = 0
    """Seeds everything."""
    long: bool = False
    """The longer setting behind the numbers of docs/benchmarks.md: more data, and PPO with four betas, drawn as a
    frontier of reward against KL; ten times the work."""
    threads: int = 0
    """CPU threads for torch; 0 is one per core."""
    quiet: bool = False
    """Show no progress."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


def demo_command(words: list[str]) -> Outcome:
    """`proximo demo align`: minutes on a CPU, no download."""
    if not words or words[0] in ("-h", "--help"):
        return (
            EXIT_DONE,
            "proximo demo align    the whole language pipeline from nothing, in minutes on a CPU",
        )
    if words[0] != "align":
        raise UserError(f"There is no demo {words[0]!r}. There is one: proximo demo align")
    from proximo.demo.align import LONG, DemoConfig, run_demo
    from proximo.models.folders import transformers_module
    from proximo.runs.directory import new_run

    given = tyro.cli(DemoArguments, args=words[1:], prog="proximo demo align")
    in_range("seed", given.seed, at_least=0, at_most=HIGHEST_SEED, whole=True, usual="0")
    in_range("threads", given.threads, at_least=0, whole=True, usual="0")
    if given.run_dir is not None and given.run_dir.is_dir() and any(given.run_dir.iterdir()):
        raise UserError(
            f"{given.run_dir} exists and is not empty. The demo begins from nothing each time and writes over nothing: "
            "choose a new folder with --run-dir, or delete this one."
        )
    transformers_module()  # where it is missing, that is said before anything is written
    size = LONG if given.long else DemoConfig()
    config = replace(size, seed=given.seed, threads=given.threads)
    display = StageDisplay.choose(quiet=given.quiet)
    directory = new_run("demo-align", given.seed, given.run_dir)
    result = run_demo(directory.path, config, display)
    display.result(_demo_in_words(result), _demo_next(directory.path))
    return EXIT_DONE, json.dumps(result) if given.json else ""


def _demo_in_words(result: dict[str, Any]) -> dict[str, str]:
    accuracy, ceiling = result["reward_accuracy"], result["reward_accuracy_ceiling"]
    return {
        "reward model": f"right on {100 * accuracy:.1f} % of unseen pairs; label noise allows {100 * ceiling:.1f} %",
        "gold score": f"{result['reward_mean']:+.2f} after PPO, {result['reward_mean_against']:+.2f} after SFT, "
        f"{result['best_of_reward_mean']:+.2f} best of {result['best_of']} of SFT (0 is the corpus, 1 its spread)",
        "win rate": f"{100 * result['win_rate']:.1f} % over SFT on {result['n_judged']} unseen prompts",
        "KL to SFT": f"{result['kl_to_against']:.2f} nats per response",
        "ended": f"{100 * result['eos_fraction']:.1f} % of responses, {result['response_length_mean']:.0f} tokens long",
        **_frontier_in_words(result),
        "took": f"{result['seconds']:.0f} s",
        "everything": result["folder"],
    }


def _frontier_in_words(result: dict[str, Any]) -> dict[str, str]:
    if "frontier" not in result:
        return {}
    points = ", ".join(
        f"beta {p['beta']:g}: {p['reward_mean']:+.2f} at {p['kl_to_against']:.1f} nats" for p in result["frontier"]
    )
    return {"frontier": f"{points}; drawn in {result['folder']}/frontier.png"}


def _demo_next(folder: Path) -> list[str]:
    ppo, prompts = shlex.quote(f"{folder}/ppo"), shlex.quote(f"{folder}/data/held_out.jsonl")
    return [f"proximo sample {ppo} --prompts {prompts}", f"proximo chat {ppo}"]


# --- words ------------------------------------------------------------------------------------------------------


def _last_value(words: list[str], flag: str) -> str | None:
    """The value of a flag, `--flag value` or `--flag=value`; the last one where it is given twice."""
    found = None
    spellings = (flag, flag.replace("-", "_").replace("__", "--", 1))
    for index, word in enumerate(words):
        if word in spellings and index + 1 < len(words):
            found = words[index + 1]
        elif word.startswith(tuple(f"{each}=" for each in spellings)):
            found = word.partition("=")[2]
    return found


def _without(words: list[str], flag: str) -> list[str]:
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == flag:
            skip = True
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return kept


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"The config file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"The config file {path} is no valid TOML: {error}") from error
