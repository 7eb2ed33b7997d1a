"""The commands that put language models to use: sample, chat, and evaluate --against."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from proximo.cli_language import EXIT_DONE, Outcome
from proximo.errors import HIGHEST_SEED, UserError, in_range
from proximo.language import config_of, read_stage_config
from proximo.process import check_device
from proximo.runs.directory import RunDirectory
from proximo.stage_display import StageDisplay
from proximo.training.align_config import JudgeConfig
from proximo.training.roles import reward_of


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
    if hasattr(sys.stdin, "reconfigure"):  # once: it cannot be done after the first line
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
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
