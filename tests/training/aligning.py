"""Small alignment runs, rewards for them, and what to compare of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from proximo.collect.generate import GenerationConfig
from proximo.runs.directory import RunDirectory
from proximo.training.align import AlignState, iterate, start
from proximo.training.align_config import AlignConfig
from tests.tiny_language import WORDS

CLOCKS = ("seconds", "tokens_per_second", "seconds_collecting", "seconds_updating")
GENERATION = GenerationConfig(max_new_tokens=5, temperature=0.9)
Rows = list[dict[str, Any]]


def share_of_wanted(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of words that are one of eight."""
    return [sum(word in WORDS[:8] for word in text.split()) / max(len(text.split()), 1) for text in responses]


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(text.split())) for text in responses]


def run_in(folder: Path) -> RunDirectory:
    folder.mkdir(parents=True)
    return RunDirectory(folder)


def trained(config: AlignConfig, folder: Path, reward: Any = share_of_wanted) -> tuple[AlignState, Rows]:
    state = start(config, reward)
    return state, list(iterate(config, run_in(folder), state))


def without_clocks(rows: Rows) -> Rows:
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]


def everything_of(state: AlignState) -> dict[str, torch.Tensor]:
    """Every tensor that a run's future depends on."""
    return (
        {name: p.detach() for name, p in state.policy.named_parameters()}
        | {f"optimizer {name}": tensor for name, tensor in state.optimizer.state_dict().items()}
        | {"sampling": state.sampling.get_state(), "shuffling": state.shuffling.get_state()}
    )


def off_the_reference(state: AlignState) -> None:
    """Move the policy away from where it began, and let the check of the first iteration be over."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        state.optimizer.weights += 0.1 * torch.randn(state.optimizer.weights.shape, generator=generator)
    state.iteration = 1
