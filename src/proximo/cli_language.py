"""The commands about language models: sft, reward, align, dpo, sample, chat, and their evaluation."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import tomllib
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from proximo.api import check_device
from proximo.errors import HIGHEST_SEED, UserError, in_range
from proximo.language import (
    StageRun,
    config_class,
    config_of,
    read_stage_config,
    resume_stage,
    resume_words,
    run_stage,
)
from proximo.runs.directory import RunDirectory
from proximo.stage_display import StageDisplay
from proximo.training.align_config import JudgeConfig
from proximo.training.roles import reward_of

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
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


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
    display = StageDisplay.choose(quiet=given.quiet)
    with display.notes():
        run = run_stage(stage, config, display, given.run_dir)
    return finish_stage(run, display, as_json=given.json)


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


def resume_command(run: Path, *, allow_import: bool, quiet: bool, as_json: bool) -> Outcome:
    """`proximo resume RUN` for a language run."""
    display = StageDisplay.choose(quiet=quiet)
    with display.notes():
        whole = resume_stage(run, display, allow_import=allow_import)
    return finish_stage(whole, display, as_json=as_json)


def finish_stage(run: StageRun, display: StageDisplay, *, as_json: bool) -> Outcome:
    """Show the result, and say what may be typed next."""
    path = str(run.path)
    if run.interrupted_by is not None:
        facts = {"interrupted": f"by signal {run.interrupted_by}; all is saved"}
        display.result(facts, [resume_words(run.path, run.stage, run.config)])
    else:
        drawn, findings = _reported(run)
        display.result(run.facts | drawn, _next(run.stage, path, run.config), findings)
    numbers = {name: value for name, value in run.metrics.items() if isinstance(value, int | float | None)}
    row = {"run": path, "stage": run.stage, "interrupted": run.interrupted_by is not None} | numbers
    text = json.dumps(row) if as_json else ""
    if run.interrupted_by is None:
        return EXIT_DONE, text
    return (EXIT_INTERRUPTED if run.interrupted_by == signal.SIGINT else 128 + run.interrupted_by), text


def _reported(run: StageRun) -> tuple[dict[str, str], list[str]]:
    """Draw the pictures of a run, and say what they show."""
    from proximo.report.report import write_language_report

    try:
        findings = write_language_report(run.path)
    except Exception as error:  # whatever it is: the run itself is done and saved
        return {}, [f"! No pictures: {error if isinstance(error, UserError) else repr(error)}"]
    lines = [
        f"{'!' if finding.severity in ('problem', 'warning') else '-'} "
        f"{finding.seen} {finding.meaning} {finding.advice}".rstrip()
        for finding in findings
    ]
    return {"pictures": str(run.path / "report")}, lines


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


# --- sample, chat, evaluate -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleArguments:
    """Let a model answer prompts; one JSON object per response on standard output."""

    model: tyro.conf.Positional[str]
    """A model folder, a run, or a hub id."""
    prompts: Path
    """A .jsonl or .parquet file, or a folder that datasets saved, with a column `prompt`."""
    n: int = 1
    """Responses to each prompt."""
    max_new_tokens: int | None = None
    """Longest response, in tokens; by default what the run was trained with, or 128."""
    temperature: float | None = None
    """Of sampling; below 1 is more predictable; by default what the run was trained with, or 1."""
    stop: tuple[str, ...] | None = None
    """A response also ends where one of these appears; by default what the run was trained with."""
    batch_size: int | None = None
    """Responses sampled side by side; by default as many as have room for 131,072 tokens."""
    chat_template: str = ""
    """A Jinja file that says how messages are written, in place of the tokenizer's own template."""
    seed: int = 0
    """Fixes the responses."""
    device: str = "cpu"
    """Where the model is."""


def sample_command(words: list[str]) -> Outcome:
    """`proximo sample MODEL --prompts FILE`."""
    from proximo.collect.data import read_prompts
    from proximo.collect.generate import GenerationConfig
    from proximo.models.folders import context_length, load_tokenizer
    from proximo.training.compare import NoReward, answers_of, load_for_sampling

    given = tyro.cli(SampleArguments, args=words, prog="proximo sample")
    _check_given(given)
    in_range("n", given.n, at_least=1, whole=True, usual="1")
    generation = _generation_of(given, GenerationConfig(max_new_tokens=128))
    generation = replace(generation, generation_batch_size=given.batch_size)
    tokenizer = load_tokenizer(given.model, given.chat_template)
    with StageDisplay.choose(quiet=False).notes():
        rows = read_prompts(given.prompts, tokenizer, max_tokens=None, over_long="error")
    policy = load_for_sampling(given.model, temperature=generation.temperature, device=given.device)
    _check_room(context_length(policy.actor), max(len(row.token_ids) for row in rows), generation.max_new_tokens)
    answers = answers_of(policy, tokenizer, rows, NoReward(), generation, n_per_prompt=given.n, seed=given.seed)
    names = ("prompt", "response", "n_tokens", "ended")
    columns = (answers.prompts, answers.texts, answers.n_tokens, answers.ended)
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in zip(*columns, strict=True)]
    return EXIT_DONE, "\n".join(lines)


def _check_given(given: SampleArguments | ChatArguments | CompareArguments) -> None:
    """Refuse what no model is needed to see through."""
    in_range("seed", given.seed, at_least=0, at_most=HIGHEST_SEED, whole=True, usual="0")
    check_device(given.device)


def _check_room(limit: int | None, longest: int, new: int, whose: str = "The model") -> None:
    if limit is not None and longest + new > limit:
        set_lower = f"Set --max-new-tokens {limit - longest}, or shorten" if longest < limit else "Shorten"
        raise UserError(
            f"{whose}'s context is {limit} tokens, but the longest prompt ({longest}) and --max-new-tokens ({new}) "
            f"come to {longest + new}. {set_lower} the prompts."
        )


def _context_of(place: str) -> int | None:
    """The context of a model whose weights are not loaded yet; loading will say what is wrong with it, if anything."""
    from types import SimpleNamespace

    from proximo.models.folders import context_length
    from proximo.training.supervised import model_config

    try:
        return context_length(SimpleNamespace(config=model_config(place)))
    except UserError:
        return None


@dataclass(frozen=True)
class ChatArguments:
    """Talk to a model; an empty line, Ctrl-D or Ctrl-C ends it."""

    model: tyro.conf.Positional[str]
    """A model folder, a run, or a hub id."""
    system: str | None = None
    """A system message to begin with, for models with a chat template."""
    chat_template: str = ""
    """A Jinja file that says how messages are written, in place of the tokenizer's own template."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; by default what the run was trained with, or 256."""
    temperature: float | None = None
    """Of sampling; below 1 is more predictable; by default what the run was trained with, or 0.7."""
    seed: int = 0
    """Fixes the answers."""
    device: str = "cpu"
    """Where the model is."""


def chat_command(words: list[str]) -> Outcome:
    """`proximo chat MODEL`: a conversation; without a chat template each line is continued by itself."""
    import torch

    from proximo.collect.generate import GenerationConfig, end_tokens, response_texts, sample
    from proximo.collect.tokens import encode_prompt
    from proximo.models.folders import check_token_ids, context_length, load_tokenizer
    from proximo.training.compare import load_for_sampling

    given = tyro.cli(ChatArguments, args=words, prog="proximo chat")
    _check_given(given)
    tokenizer = load_tokenizer(given.model, given.chat_template)
    settings = _generation_of(given, GenerationConfig(max_new_tokens=256, temperature=0.7))
    policy = load_for_sampling(given.model, temperature=settings.temperature, device=given.device)
    generator = torch.Generator(given.device).manual_seed(given.seed)
    limit = context_length(policy.actor)
    talks = tokenizer.chat_template is not None
    messages = [{"role": "system", "content": _whole(given.system)}] if given.system and talks else []
    if not talks:
        unheard = ", and the system message is left out" if given.system else ""
        print(f"This model has no chat template: it goes on with each line by itself{unheard}.", file=sys.stderr)
    while line := _asked():
        messages.append({"role": "user", "content": line})
        ids = encode_prompt(tokenizer, messages if talks else line)
        check_token_ids(max(ids), policy.actor.config, f"The tokenizer of {given.model}")
        room = settings.max_new_tokens if limit is None else min(settings.max_new_tokens, limit - len(ids))
        if room < 1:
            print(f"The conversation has filled the model's context of {limit} tokens.", file=sys.stderr)
            break
        responses = sample(policy, tokenizer, [ids], replace(settings, max_new_tokens=room), generator)
        (text,) = response_texts(tokenizer, responses, end_tokens(policy.actor, tokenizer), settings.stop)
        messages.append({"role": "assistant", "content": text})
        print(text, flush=True)
    return EXIT_DONE, ""


def _asked() -> str:
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        return _whole(input("> " if sys.stdin.isatty() else "").strip())
    except (EOFError, KeyboardInterrupt):
        return ""


def _whole(text: str) -> str:
    """Text with a replacement character for each half of a surrogate pair, which no tokenizer takes."""
    return "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in text)


@dataclass(frozen=True)
class CompareArguments:
    """Compare a language model with another one, such as what it began as, by a reward, an AI judge, or both."""

    model: tyro.conf.Positional[str]
    """A model folder, a run, or a hub id."""
    against: str
    """The model to compare with."""
    prompts: Path
    """A .jsonl or .parquet file, or a folder that datasets saved, with a column `prompt`."""
    reward: tuple[str, ...] = ()
    """Where scores come from, as for proximo align; the win rate is the share of prompts with the higher score."""
    sandbox: str = ""
    """The command in which --reward code:COLUMN runs programs, as for proximo align."""
    sandbox_timeout: float = 10.0
    """Seconds after which such a program is stopped."""
    judge: bool = False
    """Show both responses to an AI judge, in both orders, and count which it finds better."""
    judge_settings: Annotated[JudgeConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=JudgeConfig)
    episodes: int = 256
    """Prompts to answer, at most."""
    best_of: int = 4
    """Show also the mean of the best score among so many responses of the other model to each prompt (best-of-n)."""
    max_new_tokens: int | None = None
    """Longest response; by default what the run was trained with."""
    temperature: float | None = None
    """Of sampling; by default what the run was trained with."""
    chat_template: str = ""
    """A Jinja file that says how messages are written, in place of the tokenizer's own template."""
    seed: int = 0
    """Fixes the responses."""
    device: str = "cpu"
    """Where the models are."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


def compare_command(words: list[str]) -> Outcome:
    """`proximo evaluate MODEL --against MODEL --reward REWARD --prompts FILE`, or --judge in place of the reward."""
    from proximo.collect.data import read_prompts
    from proximo.collect.generate import GenerationConfig
    from proximo.models.folders import load_tokenizer
    from proximo.training.compare import compare

    given = tyro.cli(CompareArguments, args=words, prog="proximo evaluate")
    if not given.reward and not given.judge:
        raise UserError("Comparing two models needs --reward REWARD (as for proximo align), or --judge, or both.")
    _check_given(given)
    in_range("episodes", given.episodes, at_least=1, whole=True, usual="256")
    generation = _generation_of(given, GenerationConfig())
    tokenizer = load_tokenizer(given.model, given.chat_template)
    with StageDisplay.choose(quiet=False).notes():
        rows = read_prompts(given.prompts, tokenizer, max_tokens=None, over_long="error")[: given.episodes]
    longest = max(len(row.token_ids) for row in rows)
    for place in (given.model, given.against):
        _check_room(_context_of(place), longest, generation.max_new_tokens, f"The model {place}")
    with ExitStack() as opened:
        reward, judge = _sources(given, opened)
        result = compare(
            given.model,
            given.against,
            tokenizer,
            rows,
            reward,
            generation,
            judge=judge,
            best_of=given.best_of,
            seed=given.seed,
            device=given.device,
        )
    return EXIT_DONE, json.dumps(result) if given.json else "\n".join(_compared_in_words(given, result))


def _sources(given: CompareArguments, opened: ExitStack) -> tuple[Any, Any]:
    """The reward and the judge asked for, or None; `opened` closes them."""
    settings = asdict(given.judge_settings)

    def source(places: tuple[str, ...], mode: str) -> Any:
        named = {"reward": places, "device": given.device} | settings | {"judge_mode": mode}
        named |= {"sandbox": given.sandbox, "sandbox_timeout": given.sandbox_timeout}
        found = reward_of(config_of("align", named, where="proximo evaluate"))
        opened.callback(found.close)
        return found

    if "judge" in given.reward and given.judge_settings.judge_mode == "pair":
        raise UserError("--reward judge --judge-mode pair has nothing to compare with here. Use --judge instead.")
    judge = source(("judge",), "pair") if given.judge else None
    return source(given.reward, "score") if given.reward else None, judge


def _generation_of(given: SampleArguments | ChatArguments | CompareArguments, generation: Any) -> Any:
    """How to sample: as the run was trained, but for what is given; `generation` is for what is no run."""
    directory = RunDirectory(Path(given.model))
    if directory.config_path.is_file():
        stage, config = read_stage_config(directory)
        generation = config.generation if stage == "align" else generation
    for name in ("max_new_tokens", "temperature", "stop"):
        if getattr(given, name, None) is not None:
            generation = replace(generation, **{name: getattr(given, name)})
    return generation


def _compared_in_words(given: CompareArguments, result: dict[str, Any]) -> list[str]:
    def rate(of: str) -> str:
        return f"{100 * result[f'{of}win_rate']:.1f} % +- {100 * result[f'{of}win_rate_standard_error']:.1f}"

    lines = [f"{given.model} against {given.against}: {result['n_prompts']} prompts, seed {result['seed']}"]
    if result["win_rate"] is not None:
        lines += [
            f"win rate {rate('')} by score",
            f"reward   {result['reward_mean']:.4g} against {result['reward_mean_against']:.4g}"
            f" (best of {result['best_of']}: {result['best_of_reward_mean']:.4g})",
        ]
    if result["judge_win_rate"] is not None:
        lines.append(f"win rate {rate('judge_')} by the judge {given.judge_settings.judge_model}")
    lines += [
        f"KL       {result['kl_to_against']:.3g} nats per response",
        f"ended    {100 * result['eos_fraction']:.1f} % against {100 * result['eos_fraction_against']:.1f} %",
        f"length   {result['response_length_mean']:.1f} tokens against {result['response_length_mean_against']:.1f}",
    ]
    for name, what in (("missing", "score"), ("judge_missing", "verdict")):
        if result[name]:
            lines.append(f"no {what} for {result[name]} prompts")
    return lines


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
    from proximo.runs.directory import new_run

    given = tyro.cli(DemoArguments, args=words[1:], prog="proximo demo align")
    in_range("seed", given.seed, at_least=0, at_most=HIGHEST_SEED, whole=True, usual="0")
    in_range("threads", given.threads, at_least=0, whole=True, usual="0")
    if given.run_dir is not None and given.run_dir.is_dir() and any(given.run_dir.iterdir()):
        raise UserError(
            f"{given.run_dir} exists and is not empty. The demo begins from nothing each time and writes over nothing: "
            "choose a new folder with --run-dir, or delete this one."
        )
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
