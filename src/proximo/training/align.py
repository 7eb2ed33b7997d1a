"""The alignment loop: prompts, responses, rewards, update. The learner is the one that learns CartPole."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.algorithms.grpo import GRPO
from proximo.algorithms.ppo import PPO
from proximo.collect.data import PromptRow, read_prompts
from proximo.collect.generate import Answers, check_ends, columns_of, end_tokens, generate, token_texts
from proximo.collect.repetition import repetition
from proximo.collect.reward_model import score_responses
from proximo.collect.rewards import Reward, check_columns
from proximo.core.batch import Batch
from proximo.core.kl import ProportionalKL, ReferenceKL
from proximo.errors import DiskError, UserError, tell
from proximo.models.adapters import merged_state
from proximo.models.folders import check_token_ids, load_tokenizer, save_model
from proximo.models.language import LanguagePolicy
from proximo.runs.checkpoint import Checkpoint, prune_checkpoints, save_checkpoint
from proximo.runs.contents import take_counters
from proximo.runs.directory import RunDirectory
from proximo.runs.files import parse_json, reason, replace_file
from proximo.runs.keeping import Keeper
from proximo.runs.metrics import sync_metrics
from proximo.training.align_config import AlignConfig, check_together
from proximo.training.config import recorded
from proximo.training.digests import check_digests, digests_of
from proximo.training.reward_scale import normalize_rewards, scales_in_words
from proximo.training.roles import (
    build_roles,
    context_of,
    critic_in_words,
    gold_of,
    memory_in_words,
    model_config,
    models_of,
)
from proximo.training.skipping import leave_out

STAGE = "align"

Metrics = dict[str, Any]
Algorithm = PPO | GRPO


@dataclass
class AlignState:
    """Everything that changes while an alignment run goes on, and what it was made from."""

    policy: LanguagePolicy
    tokenizer: Any
    prompts: list[PromptRow]
    reward: Reward
    gold: Reward | None
    """A second opinion that is only looked at."""
    optimizer: FlatAdam
    sampling: torch.Generator
    shuffling: torch.Generator
    beta: float
    digests: dict[str, str]
    """SHA-256 of what a run must find again when it goes on: `prompts`, and `reference`, whose weights never move."""
    notes: dict[str, str] = field(default_factory=dict)
    """What `plan` says beyond the settings."""
    iteration: int = 0
    n_prompts_used: int = 0
    n_responses: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    saved_at: int = 0
    skipped_in_a_row: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)
    """The latest look at the fixed prompts, for whoever shows it."""


# --- the beginning ----------------------------------------------------------------------------------------------


def start(config: AlignConfig, reward: Callable[..., Any] | None = None) -> AlignState:
    """Check the data, load the models, and make the state before the first prompt.

    `reward` is a function of the caller's, in place of `config.reward`.

    Raises:
        UserError: for whatever is missing or does not fit, before any weights are loaded where possible.
    """
    return _start(config, reward, is_new=True)


def _start(config: AlignConfig, reward: Callable[..., Any] | None, *, is_new: bool) -> AlignState:
    """The state before the first prompt; with the scales that reward models came with where the run is not new."""
    check_together(config)
    if reward is not None and config.reward:
        raise UserError(f"There are two rewards: a function, and {' + '.join(config.reward)}. Give one of them.")
    if not config.model or not config.prompts:
        missing = "model" if not config.model else "prompts"
        raise UserError(f"align needs {missing}: proximo align --model MODEL --reward REWARD --prompts FILE")
    tokenizer = load_tokenizer(config.model, config.chat_template)
    prompts = _prompts(config, tokenizer)
    _check_context(config, prompts)
    n_tokens = max(len(row.token_ids) for row in prompts) + config.generation.max_new_tokens
    columns = columns_of(prompts)
    with ExitStack() as opened:  # the processes and threads of rewards must not outlive a failure
        gold = gold_of(config)
        if gold is not None:
            opened.callback(gold.close)
            check_columns(gold, columns)
        roles = build_roles(config, reward, n_tokens=n_tokens, columns=columns)
        policy = roles.policy
        opened.callback(roles.reward.close)
        check_ends(policy.actor, tokenizer, config.generation)
        notes = {"critic": critic_in_words(config, n_tokens)} if policy.critic is not None else {}
        if is_new and config.normalize_rewards_on:
            numbers = next_prompts(len(prompts), 0, config.normalize_rewards_on, config.seed)
            normalize_rewards(config, roles, tokenizer, [prompts[number] for number in numbers])
        opened.pop_all()
    streams = torch.Generator().manual_seed(config.seed)
    sampling, shuffling = (int(torch.randint(2**62, (), generator=streams)) for _ in range(2))
    return AlignState(
        policy=policy,
        tokenizer=tokenizer,
        prompts=prompts,
        reward=roles.reward,
        gold=gold,
        optimizer=FlatAdam(policy, learning_rate=config.algorithm.learning_rate),
        sampling=torch.Generator(config.device).manual_seed(sampling),
        shuffling=torch.Generator().manual_seed(shuffling),
        beta=config.beta,
        digests=digests_of(config, policy, prompts),
        notes=notes,
    )


def _prompts(config: AlignConfig, tokenizer: Any) -> list[PromptRow]:
    """The prompts; those that leave no room for a response in the model's context are dropped or cut if asked for."""
    limit = config.max_prompt_tokens
    room = context_of(model_config(config.model))
    new = config.generation.max_new_tokens
    if limit is None and room is not None and config.over_long != "error":  # else `_check_context` says what would fit
        limit = room - new
        if limit < 1:
            raise UserError(
                f"The model's context is {room} tokens, and max_new_tokens is {new}: no room is left for a prompt. "
                f"Set max_new_tokens to at most {room // 2}, say."
            )
    return read_prompts(Path(config.prompts), tokenizer, max_tokens=limit, over_long=config.over_long)


def _check_context(config: AlignConfig, prompts: list[PromptRow]) -> None:
    ours = model_config(config.model)
    limit = context_of(ours)
    longest = max(len(row.token_ids) for row in prompts)
    new = config.generation.max_new_tokens
    if limit is not None and longest + new > limit:
        advice = f"max_new_tokens to at most {limit - longest}" if longest < limit else "shorter prompts"
        raise UserError(
            f"The model's context is {limit} tokens, but the longest prompt ({longest} tokens) and max_new_tokens "
            f"({new}) come to {longest + new}. Set {advice}, or over_long to drop or truncate "
            f"(max_prompt_tokens to at most {max(1, limit - new)}, where it is given)."
        )
    check_token_ids(max(max(row.token_ids) for row in prompts), ours, f"The tokenizer of {config.model}")


def plan(config: AlignConfig, state: AlignState) -> dict[str, str]:
    """What will be done, and what it takes, in words."""
    learner = "PPO with a critic"
    if isinstance(config.algorithm, GRPO):
        learner = f"critic-free, baseline {config.algorithm.baseline}, loss over {config.algorithm.weighing}"
    kl = f"beta {config.beta:g} ({config.beta_control}), in the {config.kl_in.replace('_', ', ')}"
    longest = max(len(row.token_ids) for row in state.prompts)
    return {
        "model": f"{config.model}   ({_count(state.policy.actor)} parameters)",
        "algorithm": f"{learner}, {config.n_iterations} iterations of {config.prompts_per_iteration} prompts x "
        f"{config.n_per_prompt}, seed {config.seed}",
        "prompts": f"{len(state.prompts):,} from {config.prompts}, longest {longest} tokens",
        "reward": " + ".join(config.reward) or state.reward.name,
        **scales_in_words(config, models_of(state.reward)),
        "KL": kl if config.beta else "beta 0: no reference in memory",
        **state.notes,
        "memory": memory_in_words(state.policy, state.reward),
    }


def _count(model: nn.Module) -> str:
    number = sum(parameter.numel() for parameter in model.parameters())
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


# --- the loop ---------------------------------------------------------------------------------------------------


def iterate(
    config: AlignConfig, run: RunDirectory, state: AlignState, stopping: Callable[[], object] = lambda: False
) -> Iterator[Metrics]:
    """Train to the last iteration, yielding the metrics of each one once they are written.

    A checkpoint is saved whenever one is due, at the end, and before it ends early because `stopping()` is true. A disk
    that is full holds nothing up: what it refuses is kept and tried again (`runs/keeping.py`).

    Raises:
        UserError: if too many responses get no score, too many updates in a row are not finite, or the disk refuses
            too often.
    """
    keeper, stopped = Keeper(run.metrics_path, may_rest=config.checkpoint_every is None), False
    while not (finished(config, state) or stopped):
        began = time.perf_counter()
        batch, answers, gold_mean = _collect(config, state)
        _check_answers(config, state, answers)
        collected = time.perf_counter()
        if config.debug:
            _check_ratios(state.policy, batch)
        try:
            metrics = _update(config, state, batch)
        except NonFiniteUpdateError as error:
            metrics = _left_out(config, run, state, batch, error)
        else:
            state.skipped_in_a_row = 0
        state.iteration += 1
        state.n_responses += len(answers.texts)
        state.n_tokens += sum(answers.n_tokens)
        updated = time.perf_counter()
        row = _row(config, state, batch, answers) | gold_mean | metrics
        row |= _clocks(state, answers, began, collected, updated)
        if config.beta_control == "adaptive" and row["kl_to_reference"] is not None:
            control = ProportionalKL(state.beta, config.beta_target, config.beta_horizon)
            state.beta = control.updated(row["kl_to_reference"], len(answers.texts)).coef
        if config.n_samples and (state.iteration % config.samples_every == 0 or finished(config, state)):
            state.samples = look(config, state)
            _keep_samples(run.path / "samples.jsonl", state)
        stopped, ended = bool(stopping()), finished(config, state)
        due = state.iteration - state.saved_at >= _checkpoint_interval(config)
        keeper.keep(
            row,
            partial(save, config, run, state),
            is_due=stopped or ended or due,
            is_sound=not state.skipped_in_a_row,
            is_last=ended,
            is_urgent=stopped,
        )
        yield row


def finished(config: AlignConfig, state: AlignState) -> bool:
    """Whether the last iteration is done."""
    return state.iteration >= config.n_iterations


def next_prompts(n: int, used: int, count: int, seed: int) -> list[int]:
    """Numbers of the next `count` of `n` prompts after `used`: all of them in a fresh random order per pass."""
    passes = range(used // n, (used + count - 1) // n + 1)
    order = [number for one_pass in passes for number in _order(n, seed, one_pass)]
    first = used - passes[0] * n
    return order[first : first + count]


def _order(n: int, seed: int, one_pass: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + one_pass) % 2**63)
    return torch.randperm(n, generator=generator).tolist()


def _collect(config: AlignConfig, state: AlignState) -> tuple[Batch, Answers, Metrics]:
    count = config.prompts_per_iteration
    chosen = next_prompts(len(state.prompts), state.n_prompts_used, count, config.seed)
    state.n_prompts_used += count
    rows = [state.prompts[number] for number in chosen]
    batch, answers = generate(
        state.policy,
        state.tokenizer,
        rows,
        state.reward,
        config.generation,
        state.sampling,
        n_per_prompt=config.n_per_prompt,
        reward_beta=state.beta if config.kl_in == "reward" else 0.0,
        with_reference=config.beta > 0,
    )
    if state.gold is None:
        return batch, answers, {}
    asked = [row for row in rows for _ in range(config.n_per_prompt)]
    ends = torch.tensor(end_tokens(state.policy.actor, state.tokenizer), device=batch.actions.device)
    by_itself = torch.isin(batch.actions[batch.done], ends).tolist()  # not at a stop string
    ended = [over and own for over, own in zip(answers.ended, by_itself, strict=True)]
    found = score_responses(state.gold, answers.prompts, answers.texts, columns_of(asked), ended).values
    scores = [score for score in found if score is not None]
    return batch, answers, {"gold_mean": sum(scores) / len(scores) if scores else None}


def _update(config: AlignConfig, state: AlignState, batch: Batch) -> Metrics:
    remaining = 1.0 - state.iteration / config.n_iterations
    reference_kl = None
    if config.kl_in != "reward" and config.beta > 0:
        reference_kl = ReferenceKL(state.beta, "k2" if config.kl_in == "loss_k2" else "k3")
    common = (state.policy, state.optimizer, batch, state.shuffling)
    if isinstance(config.algorithm, PPO):
        algorithm = config.algorithm.at(remaining, config.algorithm.kl_coef)
        learn_policy = state.iteration >= config.value_pretraining_iterations
        if config.value_pretraining_iterations and state.iteration == config.value_pretraining_iterations:
            state.optimizer.restart()  # the policy's first steps must not be those of an Adam that has long run
        metrics = algorithm.update(
            *common, reference_kl=reference_kl if learn_policy else None, learn_policy=learn_policy
        )
        return metrics | {"learning_rate": algorithm.learning_rate}
    grpo = config.algorithm.at(remaining)
    metrics = grpo.update(*common, longest=config.generation.max_new_tokens, reference_kl=reference_kl)
    return metrics | {"learning_rate": grpo.learning_rate}


def _check_answers(config: AlignConfig, state: AlignState, answers: Answers) -> None:
    """Stop where too many scores are missing, or none tells responses apart at the very beginning."""
    missing = sum(score is None for score in answers.scores)
    said = "\n".join(answers.problems[:5])
    if missing > config.max_missing_rewards * len(answers.scores):
        raise UserError(
            f"In iteration {state.iteration + 1}, {missing} of {len(answers.scores)} responses got no score, more than "
            f"max_missing_rewards ({config.max_missing_rewards:g}) allows. The last checkpoint is sound. The reward "
            f"says:\n{said}"
        )
    scores = {score for score in answers.scores if score is not None}
    if state.iteration == 0 and len(scores) == 1 and len(answers.scores) >= 8:
        raise UserError(
            f"Every one of the first {len(answers.scores)} responses got the same score, {scores.pop():g}: there is "
            "nothing to learn from. Mend the reward (does it read the right column? is the task too hard for the "
            "model to succeed even once?)."
        )


def _check_ratios(policy: LanguagePolicy, batch: Batch) -> None:
    with torch.no_grad():
        log_ratio = policy.evaluate(batch).log_probs - batch.log_probs
    error = float(log_ratio.expm1().abs()[batch.mask].max()) if bool(batch.mask.any()) else 0.0
    limit = 0.05 if policy.autocast else 1e-3
    if not error < limit:
        raise AssertionError(f"before the first update a probability ratio is {1 + error}, not 1")


def _row(config: AlignConfig, state: AlignState, batch: Batch, answers: Answers) -> Metrics:
    scores = [score for score in answers.scores if score is not None]
    n = len(answers.texts)
    kl = answers.kl_to_reference
    return {
        "iteration": state.iteration,
        "n_iterations": config.n_iterations,
        "n_responses": state.n_responses,
        "reward_mean": sum(scores) / len(scores) if scores else None,
        "reward_std": float(torch.tensor(scores, dtype=torch.float64).std(correction=0)) if scores else None,
        "rewards_missing": n - len(scores),
        "kl_to_reference": None if kl is None else sum(kl) / n,
        "beta": state.beta,
        "response_length_mean": sum(answers.n_tokens) / n,
        "eos_fraction": sum(answers.ended) / n,
        "advantage_rows": float(batch.mask.any(1).float().mean()),
        "repetition": repetition(batch.actions, batch.done, answers.n_tokens),
    } | _alike(config, answers)


def _alike(config: AlignConfig, answers: Answers) -> Metrics:
    """The share of groups whose responses all got the same score, and so teach nothing where they are compared."""
    size = config.n_per_prompt
    if size < 2:
        return {}
    groups = [answers.scores[first : first + size] for first in range(0, len(answers.scores), size)]
    return {"groups_alike": sum(len(set(group)) == 1 for group in groups) / len(groups)}


def _clocks(state: AlignState, answers: Answers, began: float, collected: float, updated: float) -> Metrics:
    state.seconds += updated - began
    return {
        "seconds": state.seconds,
        "tokens_per_second": sum(answers.n_tokens) / max(updated - began, 1e-9),
        "seconds_collecting": collected - began,
        "seconds_updating": updated - collected,
    }


@torch.no_grad()
def look(config: AlignConfig, state: AlignState) -> list[dict[str, Any]]:
    """Answer the first few prompts, always with the same seed, and score the answers; training is not touched."""
    rows = state.prompts[: config.n_samples]
    device = next(state.policy.parameters()).device
    batch, answers = generate(
        state.policy,
        state.tokenizer,
        rows,
        state.reward,
        replace(config.generation, generation_batch_size=None),
        torch.Generator(device).manual_seed(config.seed),
        n_per_prompt=2 if config.judge.judge_mode == "pair" and "judge" in config.reward else 1,
        with_reference=config.beta > 0,
    )
    kl: Sequence[float | None] = answers.kl_to_reference or [None] * len(answers.texts)
    samples: list[dict[str, Any]] = [
        {"iteration": state.iteration, "prompt": prompt, "response": text, "score": score, "kl": distance}
        for prompt, text, score, distance in zip(answers.prompts, answers.texts, answers.scores, kl, strict=True)
    ]
    if batch.ref_log_probs is not None:
        for row, sample in enumerate(samples):
            sample |= _token_by_token(batch, row, answers.n_tokens[row], state.tokenizer)
    return samples


def _token_by_token(batch: Batch, row: int, count: int, tokenizer: Any) -> dict[str, Any]:
    """The tokens of a response, and how much likelier each is to the policy than to the reference, log pi - log pi_ref.

    They are found by where the response ends: the mask is empty where it got no score.
    """
    assert batch.ref_log_probs is not None
    end = int(batch.done[row].nonzero()[-1]) + 1
    response = slice(end - count, end)
    ratios = (batch.log_probs[row, response] - batch.ref_log_probs[row, response]).double().tolist()
    tokens = token_texts(tokenizer, batch.actions[row, response].tolist())
    return {"tokens": tokens, "log_ratios": [round(ratio, 4) if math.isfinite(ratio) else 0.0 for ratio in ratios]}


def _keep_samples(path: Path, state: AlignState) -> None:
    """Write the samples down once, also where a resumed run comes by the same iteration again."""
    known = path.read_bytes().split(b"\n") if path.exists() else []
    kept = [line for line in known if _iteration_of(line) < state.iteration]
    lines = [json.dumps(sample, ensure_ascii=False).encode(errors="backslashreplace") for sample in state.samples]
    try:
        replace_file(path, b"\n".join([*kept, *lines]) + b"\n")
    except OSError as error:
        tell(f"proximo: the samples of iteration {state.iteration} could not be written: {reason(error)}")


def _iteration_of(line: bytes) -> float:
    """The iteration of a line of samples; infinity for a broken one, which a crash may have left behind."""
    try:
        return float(parse_json(line, allow_nan=True)["iteration"])
    except (ValueError, TypeError, LookupError):
        return math.inf


def _left_out(
    config: AlignConfig, run: RunDirectory, state: AlignState, batch: Batch, error: NonFiniteUpdateError
) -> Metrics:
    """Go on without this update. Raises UserError if it was one too many in a row."""
    mends = (
        f"Usual mends, in a new run: a lower learning_rate (it is {config.algorithm.learning_rate:g}), precision "
        "float32, a higher beta."
    )
    return leave_out(run, state, error, batch, most=config.max_skipped_updates, mends=mends)


# --- the end, and between -----------------------------------------------------------------------------------------


def _checkpoint_interval(config: AlignConfig) -> int:
    return config.checkpoint_every or max(1, math.ceil(config.n_iterations / 10))


def save(config: AlignConfig, run: RunDirectory, state: AlignState) -> None:
    """Write a checkpoint: what learns, and everything that decides what comes next.

    Raises:
        DiskError: if the disk refuses; it may be tried again.
    """
    saved_at = state.saved_at
    try:
        _save(config, run, state)
    except DiskError:
        state.saved_at = saved_at
        raise


def _save(config: AlignConfig, run: RunDirectory, state: AlignState) -> None:
    state.saved_at = state.iteration
    learning = {name: p for name, p in state.policy.named_parameters() if p.requires_grad}
    tensors = {
        "policy": {name: parameter.detach() for name, parameter in learning.items()},
        "optimizer": state.optimizer.state_dict(),
        "generators": {"sampling": state.sampling.get_state(), "shuffling": state.shuffling.get_state()},
    }
    described = {name: getattr(state, name) for name in _COUNTERS} | {"stage": STAGE}
    described["digests"] = state.digests
    described["settings"] = recorded(config)
    described["reward_scales"] = [[model.mean, model.std] for model in models_of(state.reward)]
    sync_metrics(run.metrics_path)
    save_checkpoint(run.checkpoints, state.iteration, tensors, described)
    prune_checkpoints(run.checkpoints, config.keep_checkpoints, config.keep_every)


_COUNTERS = (
    "beta",
    "iteration",
    "n_prompts_used",
    "n_responses",
    "n_tokens",
    "skipped_in_a_row",
    "seconds",
    "saved_at",
)


def restore(config: AlignConfig, checkpoint: Checkpoint, reward: Callable[..., Any] | None = None) -> AlignState:
    """The state of a checkpoint."""
    state = _start(config, reward, is_new=False)
    try:
        began_with = checkpoint.state.get("digests")
        check_digests(config, began_with if isinstance(began_with, dict) else {}, state.digests)
        _load(checkpoint, state)
    except BaseException:
        close(state)
        raise
    return state


def _load(checkpoint: Checkpoint, state: AlignState) -> None:
    try:
        _take(checkpoint, state)
    except (KeyError, ValueError, RuntimeError, TypeError, OverflowError, AttributeError) as error:
        raise UserError(f"{checkpoint.path} does not fit this run ({error}). Begin a new run.") from error


def _take(checkpoint: Checkpoint, state: AlignState) -> None:
    learning = {name: p for name, p in state.policy.named_parameters() if p.requires_grad}
    saved = checkpoint.tensors["policy"]
    if saved.keys() != learning.keys() or any(saved[name].shape != p.shape for name, p in learning.items()):
        raise UserError(
            f"{checkpoint.path} does not fit this run's config.toml: its weights are of other names or shapes. Bring "
            "model, sharing and lora_rank back to what they were, or begin a new run."
        )
    with torch.no_grad():
        for name, parameter in learning.items():
            parameter.copy_(saved[name])
    state.optimizer.load_state_dict(checkpoint.tensors["optimizer"])
    state.sampling.set_state(checkpoint.tensors["generators"]["sampling"])
    state.shuffling.set_state(checkpoint.tensors["generators"]["shuffling"])
    take_counters(state, checkpoint.state, _COUNTERS)
    for model, (mean, std) in zip(models_of(state.reward), checkpoint.state["reward_scales"], strict=True):
        model.mean, model.std = float(mean), float(std)


def close(state: AlignState) -> None:
    """End the processes and threads of the rewards."""
    for source in (state.reward, state.gold):
        if source is not None:
            source.close()


def finish(config: AlignConfig, run: RunDirectory, state: AlignState) -> dict[str, str]:
    """Write the model into the run directory itself, as `save_pretrained` does; return facts about the result."""
    weights = merged_state(state.policy.actor, "policy") if config.sharing == "lora" else None
    save_model(run.path, state.policy.actor, state.tokenizer, weights)
    return {"model": f"{run.path} (AutoModelForCausalLM.from_pretrained loads it)"}
