"""Supervised fine-tuning: a language model learns to write the completions of a set of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proximo.algorithms.adam import FlatAdam
from proximo.collect.data import Example, read_examples
from proximo.collect.tokens import pieces_within
from proximo.core.losses import token_nll
from proximo.errors import UserError
from proximo.models.adapters import add_adapter, merged_state
from proximo.models.folders import load_causal_lm, load_tokenizer, save_model
from proximo.models.language import LanguagePolicy, enable_gradient_checkpointing
from proximo.runs.checkpoint import Checkpoint
from proximo.runs.directory import RunDirectory
from proximo.training import supervised
from proximo.training.supervised import EVALUATION_TOKENS, Metrics, Step, SupervisedConfig
from proximo.training.texts import Text, in_rows, packed_rows, token_log_probs

STAGE = "sft"


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig):
    """Everything that a run of supervised fine-tuning needs to be run again."""

    learning_rate: float = 2e-5
    """Step size of Adam at its highest."""
    completion_only: bool = True
    """Learn the completions alone; otherwise the prompts, too."""
    packing: bool = False
    """Put several texts into one row of max_length tokens, each looking at itself alone: no padding, same gradient."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        super().__post_init__()
        if self.packing and self.max_length is None:
            raise UserError("packing needs max_length, the length of a row: set 1024, say.")


@dataclass
class SFTState:
    """Everything that changes while a run goes on, and what it was made from."""

    policy: LanguagePolicy
    tokenizer: Any
    examples: list[Example]
    held_out: list[Example]
    optimizer: FlatAdam
    stands_on: str
    iteration: int = 0
    seconds: float = 0.0
    saved_at: int = 0
    skipped_in_a_row: int = 0


def start(config: SFTConfig) -> SFTState:
    """Check the data, load the model, and make the state before the first step.

    Raises:
        UserError: for whatever is missing or does not fit, before any weights are loaded where possible.
    """
    supervised.check_named(STAGE, config)
    tokenizer = load_tokenizer(config.model, config.chat_template)
    limit = supervised.longest_allowed(config)
    found = read_examples(Path(config.data), tokenizer, max_tokens=limit, over_long=config.over_long)
    supervised.check_tokens(config, [example.token_ids for example in found])
    prompts = [tuple(each.token_ids[: each.n_prompt] or each.token_ids) for each in found]
    examples, held_out = supervised.held_out(found, prompts, config.hold_out, config.seed)
    policy = causal_policy(config)
    _check_packing(config, policy)
    on = supervised.fingerprint(policy, [example.token_ids for example in examples])
    optimizer = FlatAdam(policy, learning_rate=config.learning_rate, eps=1e-8)
    return SFTState(policy, tokenizer, examples, held_out, optimizer, on)


def causal_policy(config: SupervisedConfig) -> LanguagePolicy:
    """Load a causal language model that learns, whole or by adapters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # peft draws new adapters from the global generator
        actor = load_causal_lm(config.model, device="cpu")
        if config.lora:
            add_adapter(actor, "policy", config.adapter)
        else:
            actor.requires_grad_(True)
    policy = LanguagePolicy(
        actor.to(config.device), sharing="lora" if config.lora else "separate", autocast=config.autocast
    )
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(policy)
    return policy


def _check_packing(config: SFTConfig, policy: LanguagePolicy) -> None:
    """A mask of our own takes the place of the model's, so it must be one that looks back without end."""
    window = getattr(policy.actor.config.get_text_config(), "sliding_window", None)
    if config.packing and window is not None and config.max_length is not None and config.max_length > window:
        raise UserError(
            f"packing would let {config.model} look further back than its sliding window of {window} tokens. Set "
            f"max_length to at most {window}, or leave packing off."
        )


def plan(config: SFTConfig, state: SFTState) -> dict[str, str]:
    """What will be done, and what it takes, in words."""
    texts = _texts(config, state.examples)
    words = supervised.plan_in_words(config, state.policy, len(state.examples), len(state.held_out))
    learned, whole = sum(text.n_scored for text in texts), sum(len(text.token_ids) for text in texts)
    longest = max(len(text.token_ids) for text in texts)
    layout = f"packed into rows of {config.max_length}" if config.packing else "padded"
    return words | {"tokens": f"{learned:,} of {whole:,} are learned; longest row {longest}; {layout}"}


def iterate(
    config: SFTConfig, run: RunDirectory, state: SFTState, stopping: Callable[[], object] = lambda: False
) -> Iterator[Metrics]:
    """Train to the end of the last epoch, yielding the metrics of each step once they are written.

    Raises:
        UserError: if the loss becomes non-finite.
    """
    return supervised.steps(
        config,
        run,
        state,
        len(state.examples),
        step_on=partial(_step, config, state),
        measure=lambda: {"held_out_loss": held_out_loss(config, state)},
        unmeasured={"held_out_loss": None},
        save=partial(save, config, run, state),
        stopping=stopping,
    )


def _step(config: SFTConfig, state: SFTState, numbers: list[int]) -> Step:
    texts = _texts(config, [state.examples[number] for number in numbers])
    shares = partial(_shares, state.policy, texts, sum(text.n_scored for text in texts), config.device)
    return Step(_pieces(config, texts), shares, [text.token_ids for text in texts])


def finished(config: SFTConfig, state: SFTState) -> bool:
    """Whether the last step is done."""
    return state.iteration >= supervised.n_iterations(config, len(state.examples))


def _texts(config: SFTConfig, examples: Sequence[Example]) -> list[Text]:
    return [Text(each.token_ids, each.n_prompt if config.completion_only else 0) for each in examples]


def _pieces(config: SFTConfig, texts: Sequence[Text], budget: int | None = None) -> list[list[list[int]]]:
    """Cut texts into pieces within the budget of tokens; a piece is rows, and a row the numbers of its texts."""
    lengths = [len(text.token_ids) for text in texts]
    if config.packing and config.max_length is not None:
        rows = packed_rows(lengths, config.max_length)
    else:
        rows = [[number] for number in range(len(texts))]
    in_row = [sum(lengths[number] for number in row) for row in rows]
    pieces = pieces_within(in_row, config.microbatch_tokens or budget)
    return [[rows[number] for number in piece] for piece in pieces]


def _shares(
    policy: LanguagePolicy, texts: Sequence[Text], n_scored: int, device: str, piece: list[list[int]]
) -> dict[str, Tensor]:
    """The share that some of the texts have in the mean over all `n_scored` tokens."""
    rows = in_rows(texts, piece, device)
    log_probs = token_log_probs(policy, rows)
    return {"loss": token_nll(log_probs, rows.scored, denominator=float(max(n_scored, 1)))}


@torch.no_grad()
def held_out_loss(config: SFTConfig, state: SFTState) -> float | None:
    """Mean negative log-likelihood per token (nats) of what is held out; None if nothing is."""
    texts = _texts(config, state.held_out)
    n_scored = sum(text.n_scored for text in texts)
    if not n_scored:
        return None
    pieces = _pieces(config, texts, EVALUATION_TOKENS)
    return sum(float(_shares(state.policy, texts, n_scored, config.device, piece)["loss"]) for piece in pieces)


def save(config: SFTConfig, run: RunDirectory, state: SFTState) -> None:
    """Write a checkpoint: what learns, and everything that decides what comes next."""
    supervised.save_progress(config, run, state, state.policy, state.stands_on)


def restore(config: SFTConfig, checkpoint: Checkpoint) -> SFTState:
    """The state of a checkpoint."""
    state = start(config)
    supervised.load_progress(config, checkpoint, state, state.policy, state.stands_on)
    return state


def finish(config: SFTConfig, run: RunDirectory, state: SFTState) -> dict[str, str]:
    """Write the model into the run directory itself, as `save_pretrained` does; return facts about the result."""
    weights = merged_state(state.policy.actor, "policy") if config.lora else None
    save_model(run.path, state.policy.actor, state.tokenizer, weights)
    loss = held_out_loss(config, state)
    measured = {} if loss is None else {"held-out loss": f"{loss:.4f} nats per token"}
    return measured | {"model": str(run.path)}
