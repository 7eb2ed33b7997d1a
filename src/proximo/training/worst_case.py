"""The largest steps that a language run may come to, tried before the first: memory runs out now, or not later.

Nothing is learned and nothing changes: gradients are thrown away, no optimizer takes a step, and whatever is drawn is
drawn from generators of our own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proximo.algorithms.ppo import PPO
from proximo.collect.generate import TOKENS_AT_ONCE, TOKENS_SIDE_BY_SIDE, draw
from proximo.collect.tokens import left_padded
from proximo.core.batch import Batch
from proximo.core.kl import ReferenceKL
from proximo.errors import UserError
from proximo.models.cache import new_cache
from proximo.models.language import LanguagePolicy
from proximo.models.rows import position_ids
from proximo.training import supervised
from proximo.training.align import AlignState
from proximo.training.align_config import AlignConfig
from proximo.training.memory import advice, ran_out

LONGEST_TRIAL = 60.0
"""Seconds that the trial may take on a CPU; where it would take more, it is left out, and the plan says so."""

LONGEST_SHARE = 0.02
"""Share of a run that the trial may take on a CPU where it takes more than a second."""

FIRST_PROBE = 64
"""Tokens by which a CPU's speed is first measured."""

LONGEST_PROBE = 1.0
"""Seconds after which a measurement counts; what takes less is mostly overhead, and is repeated with more tokens."""


@dataclass(frozen=True)
class Part:
    """Something that needs memory, in its worst case."""

    doing: str
    """What it is, in words."""
    setting: str
    """The setting that bounds it; "" for none."""
    attempt: Callable[[int], None]
    """Does it with the setting at a value, and leaves nothing behind."""
    size: int
    """The setting's value, or the largest that can come to anything."""
    smallest: int
    """The least value that makes a difference."""
    tokens: int
    """About how many tokens pass through the model, those without gradient counted a third."""


def try_worst_case(stage: str, module: Any, config: Any, state: Any) -> dict[str, str]:
    """Try the largest microbatch, the fullest cache and the largest scoring of a run that has not begun.

    On a CPU the time is estimated first, and the trial left out where it would take more than `LONGEST_TRIAL` seconds,
    or more than a second and `LONGEST_SHARE` of the run: an iteration does at least as much.

    Args:
        stage: sft, reward, dpo or align.
        module: of the stage.
        config: its settings.
        state: as `module.start` made it; all of it is the same afterwards.

    Returns:
        What was tried, in words for the plan.

    Raises:
        UserError: if something does not fit into memory, with the settings that do.
    """
    if stage == "align":
        parts, n_iterations = _parts_of_align(config, state), config.n_iterations
        probe = partial(_probe, config, state, parts[0].smallest)
    else:
        rows = _rows(state)
        parts, n_iterations = [_part_of_texts(module, config, state)], supervised.n_iterations(config, len(rows))
        probe = partial(_probe_texts, module, config, state)
    try:
        seconds = 0.0
        if config.device == "cpu":
            seconds = _seconds(probe, parts[0].size, sum(part.tokens for part in parts))
        if seconds > LONGEST_TRIAL or (seconds > 1.0 and LONGEST_SHARE * n_iterations < 1.0):
            return {"worst case": f"not tried: that would take about {seconds:.0f} s here"}
        found = [(part, largest_that_fits(part.attempt, part.size, part.smallest)) for part in parts]
    finally:
        state.optimizer.zero_grad()
    if any(fits < part.size for part, fits in found):
        raise UserError(_refusal(stage, config, found))
    return {"worst case": f"it fits: {', '.join(part.doing for part in parts)}"}


def largest_that_fits(attempt: Callable[[int], None], size: int, smallest: int = 1) -> int:
    """Halve `size` until the attempt does not run out of memory, down to `smallest`; 0 if even that is too much."""
    while not _fits(attempt, size):
        if size <= smallest:
            return 0
        size = max(smallest, size // 2)
    return size


def _fits(attempt: Callable[[int], None], size: int) -> bool:
    fits = True
    try:
        attempt(size)
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        fits = False
    # Only here is the error gone, and with it the tensors of the frames that it came through.
    if not fits:
        gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return fits


def _seconds(probe: Callable[[int], int], most: int, tokens: int) -> float:
    """Seconds that learning from so many tokens takes, by steps of up to `most` tokens; 0 where not even these fit."""
    size, done = FIRST_PROBE, 0

    def attempt(size: int) -> None:
        nonlocal done
        done = probe(size)

    while True:
        began = time.perf_counter()
        if not _fits(attempt, min(size, most)):
            return 0.0  # the trial will say it
        taken = time.perf_counter() - began
        estimate = taken / done * tokens
        if estimate <= 1.0 or taken >= LONGEST_PROBE or size >= most:
            return estimate
        size *= 2


def _refusal(stage: str, config: Any, found: list[tuple[Part, int]]) -> str:
    lines = []
    for part, fits in found:
        if fits == part.size:
            continue
        way = f"set {part.setting} to {fits}" if fits else "no setting of it is small enough"
        lines.append(f"- {part.doing}: {way}" if part.setting else f"- {part.doing}")
    hopeless = any(fits == 0 for _, fits in found)
    return (
        f"The largest steps of this run do not fit into the memory of {config.device}. Nothing was trained. Too much "
        "is:\n" + "\n".join(lines) + (f"\n{advice(stage, config)}" if hopeless else "")
    )


# --- align --------------------------------------------------------------------------------------------------------


def _parts_of_align(config: AlignConfig, state: AlignState) -> list[Part]:
    """Learning, sampling and scoring, with the longest prompt and the longest response there can be."""
    algorithm, generation = config.algorithm, config.generation
    prompt = max(len(row.token_ids) for row in state.prompts)
    longest, n = prompt + generation.max_new_tokens, config.responses_per_iteration
    length = longest - 1  # of what is observed: the last token is only acted
    at_once = _largest_minibatch(n, algorithm.batch_size)
    budget = min(at_once, algorithm.microbatch_size or at_once) * length
    budget = min(algorithm.microbatch_tokens or budget, budget)
    learned = [rows * columns for rows, columns in _shapes(config, at_once, length, budget)]
    side = min(generation.generation_batch_size or max(1, TOKENS_SIDE_BY_SIDE // longest), n)
    scored = min(n, max(1, TOKENS_AT_ONCE // longest))
    return [
        Part(
            f"learning from {max(learned):,} tokens at once, in rows of up to {length}",
            "microbatch_tokens",
            lambda tokens: _learn_within(config, state, at_once, length, tokens),
            budget,
            length,
            sum(learned),
        ),
        Part(
            f"sampling {side} responses side by side, {longest} tokens each with the prompt",
            "generation_batch_size",
            partial(_sample, config, state),
            side,
            1,
            side * prompt // (3 * min(side, config.n_per_prompt)),
        ),
        Part(
            f"scoring {scored} responses at once, {longest} tokens each with the prompt",
            "",
            lambda rows: _score(config, state, rows, longest),
            scored,
            scored,
            scored * longest // 3,
        ),
    ]


def _largest_minibatch(n_rows: int, batch_size: int) -> int:
    """Rows of the largest minibatch that `core.batch.minibatch_indices` makes."""
    return -(-n_rows // max(1, round(n_rows / batch_size)))


def _shapes(config: AlignConfig, n_rows: int, longest: int, budget: int) -> list[tuple[int, int]]:
    """Rows and columns of the worst microbatches within a budget of tokens: the longest rows, and the most tokens.

    They are one and the same but for budgets that the longest row does not divide.
    """
    most = min(n_rows, config.algorithm.microbatch_size or n_rows)

    def rows(length: int) -> int:
        return min(most, max(1, budget // length))

    fullest = max(range(1, longest + 1), key=lambda length: (rows(length) * length, length))
    lengths = [longest] if rows(longest) * longest > 0.9 * rows(fullest) * fullest else [longest, fullest]
    return [(rows(length), length) for length in lengths]


def _learn_within(config: AlignConfig, state: AlignState, n_rows: int, longest: int, budget: int) -> None:
    for rows, length in _shapes(config, n_rows, longest, budget):
        _learn(config, state, rows, length)


def _learn(config: AlignConfig, state: AlignState, rows: int, length: int) -> None:
    """The forward and backward pass of an update on one microbatch of this shape; no step is taken."""
    batch = _batch(config, state, rows, length)
    algorithm = replace(config.algorithm, n_epochs=1, batch_size=rows, microbatch_size=None, microbatch_tokens=None)
    kl = None
    if config.kl_in != "reward" and config.beta > 0:
        kl = ReferenceKL(state.beta, "k2" if config.kl_in == "loss_k2" else "k3")
    common = (state.policy, _NoStep(state.optimizer), batch, torch.Generator())
    if isinstance(algorithm, PPO):
        algorithm.update(*common, reference_kl=kl)
    else:
        algorithm.update(*common, longest=config.generation.max_new_tokens, reference_kl=kl)


def _probe(config: AlignConfig, state: AlignState, longest: int, tokens: int) -> int:
    """Learn from about so many tokens, in rows of up to `longest`; how many they were."""
    rows, length = max(1, tokens // longest), min(longest, tokens)
    _learn(config, state, rows, length)
    return rows * length


class _NoStep:
    """An optimizer that takes no step."""

    def __init__(self, optimizer: Any) -> None:
        self.learning_rate = 0.0
        self._optimizer = optimizer

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def clipped_step(self, max_grad_norm: float) -> float:
        del max_grad_norm
        return 0.0


def _batch(config: AlignConfig, state: AlignState, rows: int, length: int) -> Batch:
    """Rows of tokens, all of this length, that end with the longest responses there can be."""
    tokens = _tokens(state, rows, length + 1)
    zeros = torch.zeros(rows, length, device=tokens.device)
    response = torch.arange(length, device=tokens.device) >= length - config.generation.max_new_tokens
    mask = response.expand(rows, length)
    done = torch.arange(length, device=tokens.device).expand(rows, length) == length - 1
    values = zeros if state.policy.has_critic else None
    return Batch(
        observations={"tokens": tokens[:, :-1], "attention": torch.ones_like(mask)},
        actions=tokens[:, 1:],
        mask=mask,
        rewards=zeros,
        log_probs=zeros,
        values=values,
        next_values=values,
        terminated=done,
        done=done,
        ref_log_probs=zeros if config.beta > 0 else None,
        group=torch.arange(rows, device=tokens.device) // config.n_per_prompt,
    )


def _tokens(state: AlignState, rows: int, length: int) -> Tensor:
    """The longest prompt over and over `[rows, length]`."""
    ids = max((row.token_ids for row in state.prompts), key=len)
    repeated = (ids * (length // len(ids) + 1))[:length]
    return torch.tensor(repeated, device=_device(state.policy)).repeat(rows, 1)


@torch.no_grad()
def _sample(config: AlignConfig, state: AlignState, n_rows: int) -> None:
    """Read the longest prompts, fill the cache to its end, and draw a token, as `collect.generate.sample` does."""
    policy, n_per_prompt = state.policy, config.n_per_prompt if n_rows >= config.n_per_prompt else 1
    by_length = sorted((row.token_ids for row in state.prompts), key=len, reverse=True)
    n_prompts = max(1, n_rows // n_per_prompt)
    prompts = [by_length[number % len(by_length)] for number in range(n_prompts)]
    prompts = [*prompts[: max(1, n_prompts - 1)], *[by_length[-1]] * (n_prompts > 1)]  # a shorter one asks for a mask
    tokens, attention = (tensor.to(_device(policy)) for tensor in left_padded(prompts))
    capacity = tokens.shape[1] + config.generation.max_new_tokens
    padded = not bool(attention.all())
    cache = new_cache(policy.actor, capacity)
    with policy.precision():
        logits = policy.next_logits(tokens, attention.long() if padded else None, position_ids(attention), cache)
        if n_per_prompt > 1:
            cache.batch_repeat_interleave(n_per_prompt)
            logits = logits.repeat_interleave(n_per_prompt, 0)
        drawn = draw(logits.log_softmax(-1), torch.Generator(tokens.device).manual_seed(0))
        for layer in cache.layers:
            if hasattr(layer, "all_keys"):  # as if all but the last token were there
                layer.length = capacity - 1
                layer._show()
        filled = attention.new_ones(len(drawn), capacity - attention.shape[1])
        mask = torch.cat([attention.repeat_interleave(n_per_prompt, 0), filled], 1)
        if cache.get_seq_length() < capacity - 1:  # caches of transformers' own hold what they have read
            mask = mask[:, : cache.get_seq_length() + 1]
        places = position_ids(mask)[:, -1:]
        policy.next_logits(drawn[:, None], mask.long() if padded else None, places, cache)


def _score(config: AlignConfig, state: AlignState, rows: int, longest: int) -> None:
    """Score whole texts, as after sampling."""
    tokens = _tokens(state, rows, longest)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    response = (torch.arange(longest, device=tokens.device) >= longest - config.generation.max_new_tokens) & attention
    policy = state.policy
    policy.score(tokens, attention, response, with_reference=config.beta > 0, with_policy=policy.autocast)


def _device(policy: LanguagePolicy) -> torch.device:
    return next(policy.parameters()).device


# --- sft, reward, dpo -----------------------------------------------------------------------------------------------


def _part_of_texts(module: Any, config: Any, state: Any) -> Part:
    """Learning from the longest rows of the data."""
    rows = _rows(state)
    n = _largest_minibatch(len(rows), config.batch_size)
    numbers = sorted(range(len(rows)), key=lambda number: -_length(rows[number]))[:n]
    longest = _length(rows[numbers[0]])
    if getattr(config, "packing", False):
        longest = max(longest, config.max_length)
    budget = min(config.microbatch_tokens or n * longest, n * longest)
    return Part(
        f"learning from up to {max(budget, longest):,} tokens at once, rows of up to {longest}",
        "microbatch_tokens",
        lambda tokens: _learn_texts(module, replace(config, microbatch_tokens=tokens), state, numbers),
        budget,
        longest,
        2 * max(budget, longest),
    )


def _rows(state: Any) -> list[Any]:
    """What a stage learns from: examples, or pairs of answers."""
    return state.examples if hasattr(state, "examples") else state.pairs


def _length(row: Any) -> int:
    """Tokens of an example, or of both answers of a pair, padding counted."""
    return len(row.token_ids) if hasattr(row, "token_ids") else 2 * max(len(row.chosen), len(row.rejected))


def _learn_texts(module: Any, config: Any, state: Any, numbers: list[int]) -> None:
    """The forward and backward pass on the worst pieces of rows: the one of the longest, and the one of the most."""
    step = module._step(config, state, numbers)
    pieces = list(step.pieces)
    for piece in [pieces[0]] if len(pieces) == 1 else [pieces[0], max(pieces, key=len)]:
        supervised.accumulate_gradients(state.optimizer, [piece], step.shares_of)


def _probe_texts(module: Any, config: Any, state: Any, tokens: int) -> int:
    """Learn from about so many tokens, the shortest rows first; how many they were."""
    rows = _rows(state)
    numbers, done = [], 0
    for number in sorted(range(len(rows)), key=lambda number: _length(rows[number])):
        if numbers and done + _length(rows[number]) > tokens:
            break
        numbers.append(number)
        done += _length(rows[number])
    step = module._step(replace(config, microbatch_tokens=None), state, numbers)
    supervised.accumulate_gradients(state.optimizer, step.pieces, step.shares_of)
    return done
