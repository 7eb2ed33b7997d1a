"""What learning from a fixed set of texts has in common, whether by sft, reward or dpo.

All that decides which rows come next is the seed, the epoch and the iteration, so a resumed run goes on with the
very rows that an undisturbed one would have had.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.collect.data import OVER_LONG
from proximo.core.batch import minibatch_indices
from proximo.errors import HIGHEST_SEED, DiskError, UserError, in_range, one_of
from proximo.models.adapters import LoraConfig
from proximo.models.folders import check_token_ids, context_length, transformers_module
from proximo.runs.checkpoint import Checkpoint, prune_checkpoints, save_checkpoint
from proximo.runs.contents import take_counters
from proximo.runs.directory import RunDirectory
from proximo.runs.keeping import Keeper
from proximo.runs.metrics import sync_metrics
from proximo.training.config import recorded
from proximo.training.skipping import leave_out

Metrics = dict[str, Any]

EVALUATION_TOKENS = 16384
"""Tokens scored at a time without gradient, where `microbatch_tokens` does not say otherwise."""


@dataclass(frozen=True)
class SupervisedConfig:
    """The settings that sft, reward and dpo share."""

    model: str = ""
    """The model to begin with: a folder or hub id."""
    data: str = ""
    """What to learn from: a .jsonl or .parquet file, or a folder that datasets saved."""
    chat_template: str = ""
    """A Jinja file that says how messages are written; it takes the place of the tokenizer's own template, if any, and
    is saved with the result."""
    n_epochs: int = 1
    """Passes over the data, each in a fresh random order."""
    batch_size: int = 32
    """Rows per optimizer step; they differ by at most one between steps, so there is no small remainder."""
    learning_rate: float = 1e-5
    """Step size of Adam at its highest."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After the warmup: `constant`, or down to 0 in a line or half a cosine."""
    warmup_fraction: float = 0.03
    """Share of the run over which the learning rate rises from 0."""
    max_grad_norm: float = 1.0
    """The gradient of all weights together is scaled down to this norm."""
    microbatch_tokens: int | None = 8192
    """Cut each step into pieces of at most this many tokens, padding counted, to save memory; the gradient stays the
    same. None takes the whole step at once."""
    max_length: int | None = None
    """Longest row in tokens, prompt and answer together; by default whatever the model can take."""
    over_long: Literal["error", "drop", "truncate"] = "error"
    """What becomes of longer rows: refused before training, left out, or cut at the end."""
    hold_out: float = 0.05
    """Share of the prompts whose rows are kept out of training, to measure on."""
    lora: bool = False
    """Learn adapters on the frozen model in place of all its weights; the result is a whole model all the same."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """Adapters are scaled by this over their rank."""
    seed: int = 0
    """Seeds what is held out, the order of rows, and new heads and adapters."""
    checkpoint_every: int | None = None
    """Iterations between checkpoints; by default a tenth of all, more where saving would take too long."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    keep_every: int | None = None
    """Also keep the first checkpoint at or after each multiple of this many iterations, for good."""
    max_skipped_updates: int = 3
    """Steps in a row that may be left out because their loss or gradient is not finite; one more ends the run."""
    device: str = "cpu"
    """Where the model is: cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads for torch; 0 is one per core."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`bfloat16` computes in it over float32 weights; `auto` is float32 on the CPU and bfloat16 on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        for name in ("n_epochs", "batch_size", "keep_checkpoints", "lora_rank"):
            in_range(name, getattr(self, name), at_least=1, whole=True, usual=str(getattr(SupervisedConfig, name)))
        for name in ("microbatch_tokens", "checkpoint_every", "keep_every"):
            in_range(name, getattr(self, name), optional=True, at_least=1, whole=True, usual="left out")
        in_range("seed", self.seed, at_least=0, at_most=HIGHEST_SEED, whole=True, usual="0")
        in_range("threads", self.threads, at_least=0, whole=True, usual="0")
        in_range("max_skipped_updates", self.max_skipped_updates, at_least=0, whole=True, usual="3")
        for name in ("learning_rate", "max_grad_norm", "lora_alpha"):
            in_range(name, getattr(self, name), above=0.0, usual=str(getattr(SupervisedConfig, name)))
        in_range("max_length", self.max_length, optional=True, at_least=2, whole=True, usual="1024")
        in_range("warmup_fraction", self.warmup_fraction, at_least=0.0, at_most=1.0, usual="0.03")
        in_range("hold_out", self.hold_out, at_least=0.0, below=1.0, usual="0.05")
        one_of("learning_rate_schedule", self.learning_rate_schedule, ("constant", "linear", "cosine"))
        one_of("over_long", self.over_long, OVER_LONG)
        one_of("precision", self.precision, ("auto", "float32", "bfloat16"))

    @property
    def autocast(self) -> bool:
        """Whether to compute in bfloat16."""
        return self.precision == "bfloat16" or (self.precision == "auto" and self.device.startswith("cuda"))

    @property
    def adapter(self) -> LoraConfig:
        """The settings of adapters."""
        return LoraConfig(self.lora_rank, self.lora_alpha)

    @property
    def precision_context(self) -> Any:
        """A context that computes in the precision asked for."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16) if self.autocast else nullcontext()


# --- before the weights are loaded ------------------------------------------------------------------------------


def longest_allowed(config: SupervisedConfig) -> int | None:
    """Return the most tokens that a row may have: `max_length`, or what the model can take, or None for any number.

    Raises:
        UserError: if the model cannot take `max_length`.
    """
    limit = context_length(SimpleNamespace(config=model_config(config.model)))
    if config.max_length is None:
        return limit
    if limit is not None and config.max_length > limit:
        raise UserError(
            f"max_length is {config.max_length}, but {config.model} takes at most {limit} tokens. Set that."
        )
    return config.max_length


def check_tokens(config: SupervisedConfig, texts: Iterable[Sequence[int]]) -> None:
    """Raise UserError if the model does not know a token that the tokenizer has given."""
    highest = max(max(text) for text in texts)
    check_token_ids(highest, model_config(config.model), f"The tokenizer of {config.model}")


def check_named(stage: str, config: SupervisedConfig) -> None:
    """Raise UserError if model or data is not named at all."""
    for name in ("model", "data"):
        if not getattr(config, name):
            raise UserError(f"{stage} needs {name}: proximo {stage} --model MODEL --data FILE")


def model_config(place: str) -> Any:
    """The config of a model in a folder or on the hub, without its weights."""
    try:
        return transformers_module().AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"The config of the model {place} could not be loaded: {error}") from error


Row = TypeVar("Row")


def held_out(rows: Sequence[Row], prompts: Sequence[Hashable], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into those to learn from and those to measure on; rows of one prompt stay together.

    At least one prompt is held out if `share` is above 0 and there are two, and at least one is left.
    """
    different = list(dict.fromkeys(prompts))
    count = 0 if share == 0 else min(max(1, round(share * len(different))), len(different) - 1)
    order = torch.randperm(len(different), generator=_generator(seed, 0x4E1D)).tolist()
    kept_out = {different[index] for index in order[:count]}
    learned = [row for row, prompt in zip(rows, prompts, strict=True) if prompt not in kept_out]
    return learned, [row for row, prompt in zip(rows, prompts, strict=True) if prompt in kept_out]


# --- which rows, and how fast -----------------------------------------------------------------------------------


def iterations_per_epoch(config: SupervisedConfig, n_rows: int) -> int:
    """Optimizer steps in one pass over the data."""
    return max(1, round(n_rows / config.batch_size))


def n_iterations(config: SupervisedConfig, n_rows: int) -> int:
    """Optimizer steps in all."""
    return config.n_epochs * iterations_per_epoch(config, n_rows)


def rows_of(config: SupervisedConfig, iteration: int, n_rows: int) -> list[int]:
    """The numbers of the rows that an iteration learns from."""
    epoch, place = divmod(iteration, iterations_per_epoch(config, n_rows))
    return _minibatches(config.seed, epoch, n_rows, config.batch_size)[place].tolist()


@lru_cache(maxsize=2)
def _minibatches(seed: int, epoch: int, n_rows: int, batch_size: int) -> tuple[Tensor, ...]:
    return minibatch_indices(n_rows, batch_size, _generator(seed, 0xDA7A, epoch))


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]))


def learning_rate_at(config: SupervisedConfig, iteration: int, total: int) -> float:
    """The learning rate of an iteration, which is never 0, of `total`."""
    warmup = round(config.warmup_fraction * total)
    if iteration < warmup:
        return config.learning_rate * (iteration + 1) / (warmup + 1)
    remaining = (total - iteration) / (total - warmup)
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    if config.learning_rate_schedule == "linear":
        return config.learning_rate * remaining
    return config.learning_rate * 0.5 * (1.0 - math.cos(math.pi * remaining))


def due(config: SupervisedConfig, iteration: int, saved_at: int, total: int) -> bool:
    """Whether a checkpoint is due after `iteration` iterations."""
    interval = config.checkpoint_every or max(1, math.ceil(total / 10))
    return iteration >= total or iteration - saved_at >= interval


# --- a step -----------------------------------------------------------------------------------------------------

Piece = TypeVar("Piece")


def take_step(
    config: SupervisedConfig,
    optimizer: FlatAdam,
    pieces: Iterable[Piece],
    shares_of: Callable[[Piece], dict[str, Tensor]],
    iteration: int,
    total: int,
) -> dict[str, float]:
    """Take the optimizer step of a minibatch that is cut into pieces; return its metrics.

    `shares_of` gives a piece's shares of the whole minibatch's metrics, among them `loss`, to be minimized: they
    add up, however the minibatch is cut.

    Raises:
        NonFiniteUpdateError: if the loss or the gradient is not finite; the weights are as they were.
    """
    sums = accumulate_gradients(optimizer, pieces, shares_of)
    optimizer.learning_rate = learning_rate_at(config, iteration, total)
    if not math.isfinite(sums["loss"]):  # its gradient may be finite all the same, where a sigmoid is saturated
        raise NonFiniteUpdateError(f"the loss is {sums['loss']}")
    norm = optimizer.clipped_step(config.max_grad_norm)
    return sums | {"grad_norm": norm, "learning_rate": optimizer.learning_rate}


class Step(NamedTuple):
    """What one optimizer step learns from: a minibatch in pieces, the shares of each piece, and its texts in tokens."""

    pieces: Iterable[Any]
    shares_of: Callable[[Any], dict[str, Tensor]]
    token_ids: Sequence[Sequence[int]]


def steps(
    config: SupervisedConfig,
    run: RunDirectory,
    state: Any,
    n_rows: int,
    *,
    step_on: Callable[[list[int]], Step],
    measure: Callable[[], Metrics],
    unmeasured: Metrics,
    save: Callable[[], None],
    stopping: Callable[[], object],
) -> Iterator[Metrics]:
    """Train to the end of the last epoch, yielding the metrics of each step once they are written.

    Args:
        config: the settings.
        run: where metrics go.
        state: of the stage, with its `optimizer` and its counters.
        n_rows: how many rows there are to learn from.
        step_on: what to learn from rows of these numbers.
        measure: metrics of what is held out, at the end of each epoch.
        unmeasured: what stands for them elsewhere.
        save: writes a checkpoint.
        stopping: whether to save and end early.

    Raises:
        UserError: if too many steps in a row are not finite, or the disk refuses too often.
    """
    keeper, stopped = Keeper(run.metrics_path, may_rest=config.checkpoint_every is None), False
    total, per_epoch = n_iterations(config, n_rows), iterations_per_epoch(config, n_rows)
    while state.iteration < total and not stopped:
        began = time.perf_counter()
        step = step_on(rows_of(config, state.iteration, n_rows))
        try:
            metrics: Metrics = take_step(config, state.optimizer, step.pieces, step.shares_of, state.iteration, total)
        except NonFiniteUpdateError as error:
            metrics = _left_out(config, run, state, step, error)
        else:
            state.skipped_in_a_row = 0
        stepped = time.perf_counter()
        state.iteration += 1
        metrics |= measure() if state.iteration % per_epoch == 0 else unmeasured
        state.seconds += time.perf_counter() - began
        row = {
            "iteration": state.iteration,
            "n_iterations": total,
            "epoch": state.iteration / per_epoch,
            **metrics,
            "seconds": state.seconds,
            "tokens_per_second": sum(map(len, step.token_ids)) / max(stepped - began, 1e-9),
        }
        stopped, ended = bool(stopping()), state.iteration >= total
        is_due, is_sound = stopped or due(config, state.iteration, state.saved_at, total), not state.skipped_in_a_row
        keeper.keep(row, save, is_due=is_due, is_sound=is_sound, is_last=ended, is_urgent=stopped)
        yield row


def _left_out(
    config: SupervisedConfig, run: RunDirectory, state: Any, step: Step, error: NonFiniteUpdateError
) -> Metrics:
    """Go on without this step. Raises UserError if it was one too many in a row."""
    mends = (
        f"Usual mends, in a new run: a lower learning_rate (it is {config.learning_rate:g}), a higher "
        f"warmup_fraction (it is {config.warmup_fraction:g}), precision float32."
    )
    return leave_out(run, state, error, step.token_ids, most=config.max_skipped_updates, mends=mends)


def accumulate_gradients(
    optimizer: FlatAdam, pieces: Iterable[Piece], shares_of: Callable[[Piece], dict[str, Tensor]]
) -> dict[str, float]:
    """Backward through each piece; the gradients add up to the whole minibatch's, as the returned metrics do."""
    optimizer.zero_grad()
    sums: dict[str, Tensor] = {}
    for piece in pieces:
        shares = shares_of(piece)
        shares["loss"].backward()
        for name, value in shares.items():
            sums[name] = value.detach() + sums[name] if name in sums else value.detach()
    return {name: float(value) for name, value in sums.items()}


# --- saving and restoring ---------------------------------------------------------------------------------------

_COUNTERS = ("iteration", "skipped_in_a_row", "seconds", "saved_at")


def learning_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights that learn, by their names."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def fingerprint(module: nn.Module, texts: Iterable[Sequence[int]]) -> str:
    """What a run stands on and does not save: its frozen weights and its data, in a short text."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(np.array([len(text), *text], dtype=np.int64).tobytes())
    frozen = [float(p.double().sum()) for p in module.parameters() if not p.requires_grad]
    digest.update(np.array(frozen, dtype=np.float64).tobytes())
    return digest.hexdigest()


def save_progress(
    config: SupervisedConfig,
    run: RunDirectory,
    state: Any,
    module: nn.Module,
    stands_on: str,
    more: dict[str, dict[str, Tensor]] | None = None,
) -> None:
    """Write a checkpoint of a stage's state: what learns, the optimizer, the counters, and `more` tensors.

    Raises:
        DiskError: if the disk refuses; it may be tried again.
    """
    saved_at, state.saved_at = state.saved_at, state.iteration
    tensors = {"weights": learning_weights(module), "optimizer": state.optimizer.state_dict(), **(more or {})}
    described = {name: getattr(state, name) for name in _COUNTERS} | {
        "stands_on": stands_on,
        "settings": recorded(config),
    }
    try:
        sync_metrics(run.metrics_path)
        save_checkpoint(run.checkpoints, state.iteration, tensors, described)
        prune_checkpoints(run.checkpoints, config.keep_checkpoints, config.keep_every)
    except DiskError:
        state.saved_at = saved_at
        raise


def load_progress(config: SupervisedConfig, checkpoint: Checkpoint, state: Any, module: nn.Module, on: str) -> None:
    """Take over what `save_progress` wrote into a state as it was at the start.

    Raises:
        UserError: if data, frozen weights or shapes are not those that the run had.
    """
    if checkpoint.state.get("stands_on") != on:
        raise UserError(
            f"{checkpoint.path} was made with other data or another base model: {config.data} or {config.model} has "
            "been changed, or a setting that selects rows. Bring them back to what they were, or begin a new run."
        )
    weights, saved = learning_weights(module), checkpoint.tensors.get("weights", {})
    if weights.keys() != saved.keys() or any(saved[name].shape != weights[name].shape for name in weights):
        raise UserError(
            f"{checkpoint.path} does not fit this run's config.toml: its weights are of other names or shapes. Bring "
            "model, lora and lora_rank back to what they were, or begin a new run."
        )
    try:
        for name, weight in weights.items():
            weight.copy_(saved[name])
        state.optimizer.load_state_dict(checkpoint.tensors["optimizer"])
        take_counters(state, checkpoint.state, _COUNTERS)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{checkpoint.path} does not fit this run ({error}). Begin a new run.") from error


# --- words ------------------------------------------------------------------------------------------------------


def plan_in_words(config: SupervisedConfig, module: nn.Module, n_learned: int, n_held_out: int) -> dict[str, str]:
    """Model, data, and what learning will take."""
    numbers = [parameter.numel() for parameter in module.parameters()]
    learning = sum(weight.numel() for weight in learning_weights(module).values())
    share = f", of which {learning:,} in adapters learn" if config.lora else ""
    mib = 4 / 2**20  # all weights are float32, and so are gradients and Adam's two moments
    return {
        "model": f"{config.model}   ({sum(numbers):,} parameters{share})",
        "data": f"{n_learned:,} rows to learn from and {n_held_out:,} held out, from {config.data}",
        "steps": f"{n_iterations(config, n_learned):,} of {config.batch_size} rows, {config.n_epochs} epochs, "
        f"learning rate {config.learning_rate:g} ({config.learning_rate_schedule}), seed {config.seed}",
        "memory": f"weights {sum(numbers) * mib:,.1f} MiB, gradients and Adam {3 * learning * mib:,.1f} MiB, "
        "activations not counted",
    }
