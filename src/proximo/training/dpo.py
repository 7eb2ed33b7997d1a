"""Direct preference optimization (Rafailov et al. 2023): a language model learns from pairs, without a reward model.

The reference is the model as it begins. Its log-probabilities of all answers are computed once, before the first
step, and kept: no second model is ever in memory. Margins in the data are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proximo.algorithms.adam import FlatAdam
from proximo.collect.data import Pair
from proximo.core.losses import dpo
from proximo.errors import UserError, in_range
from proximo.models.adapters import merged_state
from proximo.models.folders import save_model
from proximo.models.language import LanguagePolicy
from proximo.runs.checkpoint import Checkpoint
from proximo.runs.directory import RunDirectory
from proximo.training import supervised
from proximo.training.reward import UNMEASURED, pair_pieces, read_pairs, texts_of
from proximo.training.sft import causal_policy
from proximo.training.supervised import EVALUATION_TOKENS, Metrics, Step, SupervisedConfig
from proximo.training.texts import Text, in_rows, sums_of_texts, token_log_probs

STAGE = "dpo"


@dataclass(frozen=True)
class DPOConfig(SupervisedConfig):
    """Everything that a run of direct preference optimization needs to be run again."""

    learning_rate: float = 1e-6
    """Step size of Adam at its highest."""
    beta: float = 0.1
    """How strongly the model is held to the reference: implicit rewards are beta times the log-ratio to it."""
    label_smoothing: float = 0.0
    """Share of the preferences taken to be wrong (conservative DPO)."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        super().__post_init__()
        in_range("beta", self.beta, above=0.0, usual="0.1")
        in_range("label_smoothing", self.label_smoothing, at_least=0.0, below=0.5, usual="0.0")


@dataclass
class DPOState:
    """Everything that changes while a run goes on, and what it was made from."""

    policy: LanguagePolicy
    tokenizer: Any
    pairs: list[Pair]
    held_out: list[Pair]
    reference: Tensor
    """[P, 2]: log-probabilities of the chosen and rejected answers under the reference, nats."""
    held_out_reference: Tensor
    """The same for what is held out."""
    optimizer: FlatAdam
    stands_on: str
    iteration: int = 0
    seconds: float = 0.0
    saved_at: int = 0
    skipped_in_a_row: int = 0


def start(config: DPOConfig) -> DPOState:
    """Check the data, load the model, score all answers under the reference, and make the state before the first step.

    Raises:
        UserError: for whatever is missing or does not fit, before any weights are loaded where possible.
    """
    state = _loaded(config)
    state.reference = score_pairs(config, state.policy, state.pairs)
    state.held_out_reference = score_pairs(config, state.policy, state.held_out)
    return state


def _loaded(config: DPOConfig) -> DPOState:
    """The state but for what the reference says."""
    tokenizer, pairs, held_out = read_pairs(STAGE, config)
    policy = causal_policy(config)
    on = supervised.fingerprint(policy, texts_of(pairs))
    optimizer = FlatAdam(policy, learning_rate=config.learning_rate, eps=1e-8)
    return DPOState(policy, tokenizer, pairs, held_out, torch.zeros(0, 2), torch.zeros(0, 2), optimizer, on)


@torch.no_grad()
def score_pairs(config: DPOConfig, policy: LanguagePolicy, pairs: Sequence[Pair]) -> Tensor:
    """Log-probabilities `[P, 2]` of the chosen and rejected answers under the present weights, on the CPU.

    Raises:
        UserError: if one of them is not finite.
    """
    found = torch.zeros(len(pairs), 2)
    cut = replace(config, microbatch_tokens=config.microbatch_tokens or EVALUATION_TOKENS)
    for piece in pair_pieces(cut, pairs):
        found[piece] = torch.stack(_answers(config, policy, [pairs[number] for number in piece]), 1).cpu()
    bad = int((~found.isfinite()).any(1).sum())
    if bad:
        raise UserError(
            f"{config.model} gives {bad} of {len(pairs)} pairs a probability of 0 or NaN. Are its weights damaged, or "
            "precision too low? Try precision float32."
        )
    return found


def _answers(config: DPOConfig, policy: LanguagePolicy, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of chosen and rejected answers `[P]`, with gradient."""
    texts = [Text(ids, pair.n_prompt) for ids, pair in zip(texts_of(pairs), [*pairs, *pairs], strict=True)]
    rows = in_rows(texts, [[number] for number in range(len(texts))], config.device)
    sums = sums_of_texts(token_log_probs(policy, rows), rows, len(texts))
    chosen, rejected = sums.chunk(2)
    return chosen, rejected


def plan(config: DPOConfig, state: DPOState) -> dict[str, str]:
    """What will be done, and what it takes, in words."""
    words = supervised.plan_in_words(config, state.policy, len(state.pairs), len(state.held_out))
    return words | {
        "tokens": f"longest answer with its prompt {max(map(len, texts_of(state.pairs)))}",
        "loss": f"DPO, beta {config.beta:g}, label smoothing {config.label_smoothing:g}",
        "reference": f"{config.model} as it is now; its log-probabilities are known, and it is not kept in memory",
    }


def iterate(
    config: DPOConfig, run: RunDirectory, state: DPOState, stopping: Callable[[], object] = lambda: False
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


def _step(config: DPOConfig, state: DPOState, numbers: list[int]) -> Step:
    pairs = [state.pairs[number] for number in numbers]
    shares = partial(_shares, config, state.policy, pairs, state.reference[numbers])
    return Step(pair_pieces(config, pairs), shares, texts_of(pairs))


def finished(config: DPOConfig, state: DPOState) -> bool:
    """Whether the last step is done."""
    return state.iteration >= supervised.n_iterations(config, len(state.pairs))


def _shares(
    config: DPOConfig, policy: LanguagePolicy, pairs: Sequence[Pair], reference: Tensor, piece: list[int]
) -> dict[str, Tensor]:
    """The share that some of the pairs have in the means over all of them."""
    chosen, rejected = _answers(config, policy, [pairs[number] for number in piece])
    means = _means(config, chosen, rejected, reference[piece].to(chosen.device))
    return {name: value * (len(piece) / len(pairs)) for name, value in means.items()}


def _means(config: DPOConfig, chosen: Tensor, rejected: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """The loss, and what it shows: log-ratios to the reference in nats, the margin in units of implicit reward."""
    ref_chosen, ref_rejected = reference.unbind(1)
    loss = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=config.beta, label_smoothing=config.label_smoothing)
    chosen_ratio, rejected_ratio = (chosen - ref_chosen).detach(), (rejected - ref_rejected).detach()
    return {
        "loss": loss,
        "accuracy": (chosen_ratio > rejected_ratio).float().mean(),
        "margin_mean": config.beta * (chosen_ratio - rejected_ratio).mean(),
        "chosen_log_ratio": chosen_ratio.mean(),
        "rejected_log_ratio": rejected_ratio.mean(),
    }


def held_out_metrics(config: DPOConfig, state: DPOState) -> dict[str, float | None]:
    """Loss and accuracy on the pairs that are held out; None if there are none."""
    if not state.held_out:
        return UNMEASURED
    chosen, rejected = score_pairs(config, state.policy, state.held_out).unbind(1)
    means = _means(config, chosen, rejected, state.held_out_reference)
    return {f"held_out_{name}": float(means[name]) for name in ("loss", "accuracy")}


def save(config: DPOConfig, run: RunDirectory, state: DPOState) -> None:
    """Write a checkpoint: what learns, what the reference says, and everything that decides what comes next."""
    reference = {"pairs": state.reference, "held_out": state.held_out_reference}
    supervised.save_progress(config, run, state, state.policy, state.stands_on, {"reference": reference})


def restore(config: DPOConfig, checkpoint: Checkpoint) -> DPOState:
    """The state of a checkpoint."""
    state = _loaded(config)
    supervised.load_progress(config, checkpoint, state, state.policy, state.stands_on)
    state.reference = checkpoint.tensors["reference"]["pairs"]
    state.held_out_reference = checkpoint.tensors["reference"]["held_out"]
    return state


def finish(config: DPOConfig, run: RunDirectory, state: DPOState) -> dict[str, str]:
    """Write the model into the run directory itself, as `save_pretrained` does; return facts about the result."""
    weights = merged_state(state.policy.actor, "policy") if config.lora else None
    save_model(run.path, state.policy.actor, state.tokenizer, weights)
    facts = {"model": str(run.path)}
    accuracy = held_out_metrics(config, state)["held_out_accuracy"]
    if accuracy is None:
        return facts
    return {"held-out accuracy": f"{100 * accuracy:.1f} % of {len(state.held_out)} pairs", **facts}
