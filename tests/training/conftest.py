"""Small alignment runs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proximo.models.adapters import LoraConfig
from proximo.training.align_config import ALGORITHMS, AlignConfig
from tests.tiny_language import WORDS, save_tiny
from tests.training.aligning import GENERATION


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What syncing is for is tested with the checkpoints."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts of one to three words."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    texts = [" ".join(WORDS[k : k + 1 + k % 3]) for k in range(6)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def config_with(model: Path, prompts: Path) -> Callable[..., AlignConfig]:
    """A small run with some settings of its own; names of the algorithm's settings are looked up there."""

    def make(algorithm: str = "ppo", **changes: Any) -> AlignConfig:
        common = dict(learning_rate=1e-2, batch_size=4, n_epochs=2) | changes
        chosen = ALGORITHMS[algorithm]
        own = {name: common.pop(name) for name in list(common) if hasattr(chosen, name)}
        small = dict(model=str(model), prompts=str(prompts), generation=GENERATION, n_iterations=4, n_samples=0)
        small |= dict(prompts_per_iteration=8, responses_per_prompt=1 if algorithm == "ppo" else 2, debug=True)
        small |= dict(threads=1, lora=LoraConfig(lora_rank=2), algorithm=dataclasses.replace(chosen, **own))
        return AlignConfig(**(small | common))

    return make
