"""Training a reward model: of two answers to a prompt, the better one is to get the higher score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from proximo.algorithms.adam import FlatAdam
from proximo.collect.data import Pair, read_preferences
from proximo.collect.reward_model import last_scores, score_rows
from proximo.collect.tokens import pieces_within, right_padded
from proximo.core.losses import pairwise
from proximo.errors import in_range, one_of
from proximo.models.adapters import add_adapter, merged_state, save_reward_adapter
from proximo.models.folders import REWARD_SCALE, load_scalar_model, load_tokenizer, save_model
from proximo.models.language import checkpoint_activations
from proximo.runs.checkpoint import Checkpoint
from proximo.runs.directory import RunDirectory
from proximo.training import supervised
from proximo.training.supervised import EVALUATION_TOKENS, Metrics, Step, SupervisedConfig

STAGE = "reward"

UNMEASURED: Metrics = {"held_out_loss": None, "held_out_accuracy": None}
"""Metrics of what is held out, where it is not looked at."""

SCALE_PAIRS = 2048
"""The scale of scores is measured on at most this many pairs."""


@dataclass(frozen=True)
class RewardConfig(SupervisedConfig):
    """Everything that the training of a reward model needs to be run again."""

    centring_coef: float = 0.01
    """Weight of the term that keeps scores around 0 (Eisenstein et al. 2023)."""
    normalize_on: Literal["chosen_rejected", "chosen", "none"] = "chosen_rejected"
    """What scores get mean 0 and standard deviation 1 on in the end: all answers, the chosen ones, or `none`."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        super().__post_init__()
        in_range("centring_coef", self.centring_coef, at_least=0.0, usual="0.01")
        one_of("normalize_on", self.normalize_on, ("chosen_rejected", "chosen", "none"))


@dataclass
class RewardState:
    """Everything that changes while a run goes on, and what it was made from."""

    model: Any
    tokenizer: Any
    pairs: list[Pair]
    held_out: list[Pair]
    optimizer: FlatAdam
    stands_on: str
    iteration: int = 0
    seconds: float = 0.0
    saved_at: int = 0
    skipped_in_a_row: int = 0


def start(config: RewardConfig) -> RewardState:
    """Check the data, load the model, and make the state before the first step.

    Raises:
        UserError: for whatever is missing or does not fit, before any weights are loaded where possible.
    """
    tokenizer, pairs, held_out = read_pairs(STAGE, config)
    model = _scalar_model(config)
    on = supervised.fingerprint(model, texts_of(pairs))
    optimizer = FlatAdam(model, learning_rate=config.learning_rate, eps=1e-8)
    return RewardState(model, tokenizer, pairs, held_out, optimizer, on)


def read_pairs(stage: str, config: SupervisedConfig) -> tuple[Any, list[Pair], list[Pair]]:
    """Read and check preferences; return the tokenizer, the pairs to learn from and those to measure on."""
    supervised.check_named(stage, config)
    tokenizer = load_tokenizer(config.model, config.chat_template)
    limit = supervised.longest_allowed(config)
    found = read_preferences(Path(config.data), tokenizer, max_tokens=limit, over_long=config.over_long)
    supervised.check_tokens(config, texts_of(found))
    prompts = [tuple(pair.chosen[: pair.n_prompt]) for pair in found]
    return tokenizer, *supervised.held_out(found, prompts, config.hold_out, config.seed)


def texts_of(pairs: Sequence[Pair]) -> list[list[int]]:
    """All chosen texts, and then all rejected ones."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def pair_pieces(config: SupervisedConfig, pairs: Sequence[Pair]) -> list[list[int]]:
    """Cut pairs into pieces within the budget of tokens, both answers counted."""
    return pieces_within([2 * max(len(pair.chosen), len(pair.rejected)) for pair in pairs], config.microbatch_tokens)


def _scalar_model(config: RewardConfig) -> Any:
    """A reward model to go on with, or a language model with a new head; the head always learns as a whole."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # libraries draw heads and adapters from the global generator
        model: Any = load_scalar_model(config.model, fresh_head=not _is_reward_model(config.model))
        if config.lora:
            add_adapter(model.base_model, "reward", config.adapter)
        else:
            model.requires_grad_(True)
    model.score.requires_grad_(True)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model.to(config.device)


def _is_reward_model(place: str) -> bool:
    """Whether the model has a head for scores already."""
    names = supervised.model_config(place).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in names)


def plan(config: RewardConfig, state: RewardState) -> dict[str, str]:
    """What will be done, and what it takes, in words."""
    words = supervised.plan_in_words(config, state.model, len(state.pairs), len(state.held_out))
    margins = sum(pair.margin != 0.0 for pair in state.pairs)
    return words | {
        "tokens": f"longest answer with its prompt {max(map(len, texts_of(state.pairs)))}",
        "loss": f"Bradley-Terry, {margins or 'no'} pairs with margins, centring {config.centring_coef:g}",
    }


def iterate(
    config: RewardConfig, run: RunDirectory, state: RewardState, stopping: Callable[[], object] = lambda: False
) -> Iterator[Metrics]:
    """Train to the end of the last epoch, yielding the metrics of each step once they are written.

    Raises:
        UserError: if the loss becomes non-finite.
    """
    return supervised.steps(
        config,
        run,
        state,
        len(state.pairs),
        step_on=partial(_step, config, state),
        measure=partial(held_out_metrics, config, state),
        unmeasured=UNMEASURED,
        save=partial(save, config, run, state),
        stopping=stopping,
    )


def _step(config: RewardConfig, state: RewardState, numbers: list[int]) -> Step:
    pairs = [state.pairs[number] for number in numbers]
    shares = partial(_shares, config, state.model, pairs)
    return Step(pair_pieces(config, pairs), shares, texts_of(pairs))


def finished(config: RewardConfig, state: RewardState) -> bool:
    """Whether the last step is done."""
    return state.iteration >= supervised.n_iterations(config, len(state.pairs))


def _shares(config: RewardConfig, model: Any, pairs: Sequence[Pair], piece: Sequence[int]) -> dict[str, Tensor]:
    """The share that some of the pairs have in the means over all of them."""
    own = [pairs[number] for number in piece]
    tokens, attention = (tensor.to(config.device) for tensor in right_padded(texts_of(own)))
    with config.precision_context:
        chosen, rejected = last_scores(model, tokens, attention).chunk(2)
    margin = torch.tensor([pair.margin for pair in own], device=chosen.device)
    means = _means(chosen, rejected, margin, config.centring_coef)
    return {name: value * (len(own) / len(pairs)) for name, value in means.items()}


def _means(chosen: Tensor, rejected: Tensor, margin: Tensor, centring_coef: float) -> dict[str, Tensor]:
    difference = (chosen - rejected).detach()
    return {
        "loss": pairwise(chosen, rejected, margin=margin, centring_coef=centring_coef),
        "accuracy": (difference > 0).float().mean(),
        "score_mean": (chosen + rejected).detach().mean() / 2,
        "margin_mean": difference.mean(),
    }


def held_out_metrics(config: RewardConfig, state: RewardState) -> dict[str, float | None]:
    """Loss and accuracy on the pairs that are held out; None if there are none."""
    if not state.held_out:
        return UNMEASURED
    chosen, rejected = _score(config, state.model, state.held_out)
    margin = torch.tensor([pair.margin for pair in state.held_out])
    means = _means(chosen, rejected, margin, config.centring_coef)
    return {f"held_out_{name}": float(means[name]) for name in ("loss", "accuracy")}


def _score(config: RewardConfig, model: Any, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Raw scores of chosen and rejected answers `[P]`, without gradient."""
    budget = config.microbatch_tokens or EVALUATION_TOKENS
    chosen, rejected = score_rows(model, texts_of(pairs), budget=budget, autocast=config.autocast).chunk(2)
    return chosen, rejected


def save(config: RewardConfig, run: RunDirectory, state: RewardState) -> None:
    """Write a checkpoint: what learns, and everything that decides what comes next."""
    supervised.save_progress(config, run, state, state.model, state.stands_on)


def restore(config: RewardConfig, checkpoint: Checkpoint) -> RewardState:
    """The state of a checkpoint."""
    state = start(config)
    supervised.load_progress(config, checkpoint, state, state.model, state.stands_on)
    return state


def finish(config: RewardConfig, run: RunDirectory, state: RewardState) -> dict[str, str]:
    """Write the model into the run directory itself, with the scale of its scores; return facts about the result."""
    scale = _measured_scale(config, state)
    setattr(state.model.config, REWARD_SCALE, scale)
    pad = state.tokenizer.pad_token_id
    state.model.config.pad_token_id = state.tokenizer.eos_token_id if pad is None else pad
    weights = merged_state(state.model, "reward") if config.lora else None
    save_model(run.path, state.model, state.tokenizer, weights)
    if config.lora:
        save_reward_adapter(run.path, state.model, config.model, config.adapter)
    facts = {"model": str(run.path)}
    if scale is not None:
        facts["scores"] = f"mean {scale['mean']:.4g}, standard deviation {scale['std']:.4g}; kept with the model"
    accuracy = held_out_metrics(config, state)["held_out_accuracy"]
    if accuracy is None:
        return facts
    return {"held-out accuracy": f"{100 * accuracy:.1f} % of {len(state.held_out)} pairs", **facts}


def _measured_scale(config: RewardConfig, state: RewardState) -> dict[str, float] | None:
    """Mean and standard deviation of raw scores: of held-out pairs first, filled up with pairs that were learned."""
    if config.normalize_on == "none":
        return None
    chosen, rejected = _score(config, state.model, (state.held_out + state.pairs)[:SCALE_PAIRS])
    scores = (chosen if config.normalize_on == "chosen" else torch.cat([chosen, rejected])).double()
    std = float(scores.std(correction=0))
    # Scores that are all alike have no scale of their own.
    return {"mean": float(scores.mean()), "std": std if math.isfinite(std) and std > 1e-8 else 1.0}
