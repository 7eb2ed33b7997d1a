"""What a language run needs, told before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from proximo.errors import UserError
from proximo.language import run_stage
from proximo.models.folders import load_causal_lm
from proximo.stage_display import StageDisplay
from proximo.training import memory
from proximo.training.align_config import ALGORITHMS, AlignConfig
from proximo.training.dpo import DPOConfig
from proximo.training.sft import SFTConfig
from tests.tiny_language import Kind, save_tiny


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_parameters_are_counted_from_the_config_alone(kind: Kind, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", kind)
    expected = sum(parameter.numel() for parameter in load_causal_lm(folder).parameters())
    (folder / "model.safetensors").unlink()
    assert memory.n_parameters(str(folder)) == expected


def test_what_is_no_model_is_left_for_loading_to_explain(tmp_path: Path) -> None:
    assert memory.n_parameters(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("stage", "config", "expected"),
    [
        ("sft", SFTConfig(), 16),  # weights, gradient, two moments
        ("sft", SFTConfig(lora=True), 4),
        ("dpo", DPOConfig(), 16),
        ("align", AlignConfig(), 16 + 4 + 16),  # policy, reference, critic
        ("align", AlignConfig(beta=0.0), 16 + 16),
        ("align", AlignConfig(sharing="trunk"), 16 + 4),
        ("align", AlignConfig(algorithm=ALGORITHMS["grpo"]), 16 + 4),
        ("align", AlignConfig(sharing="lora"), 4),
        ("align", AlignConfig(frozen_precision="bfloat16"), 16 + 2 + 16),
        ("align", AlignConfig(sharing="lora", frozen_precision="bfloat16"), 2),
    ],
)
def test_bytes_of_a_parameter_by_hand(stage: str, config: Any, expected: int) -> None:
    assert memory.bytes_each(stage, config) == expected


@pytest.mark.parametrize(
    ("stage", "config", "says"),
    [
        ("sft", SFTConfig(), ["sft run needs", "lora", "microbatch_tokens", "gradient_checkpointing"]),
        ("align", AlignConfig(), ["align run needs", "sharing lora", "beta 0", "generation_batch_size"]),
    ],
)
def test_a_model_too_large_is_named_before_training(
    stage: str, config: Any, says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").unlink()  # so that nothing can have been loaded
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(UserError) as caught:
        run_stage(stage, replace(config, model=str(folder)), StageDisplay.choose(quiet=True), tmp_path / "run")
    assert all(word in str(caught.value) for word in says)
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_is_told_with_what_to_lower() -> None:
    with (
        pytest.raises(UserError, match=r"not enough memory.*microbatch_tokens"),
        memory.enough_memory("align", AlignConfig()),
    ):
        torch.empty(2**62)
    with pytest.raises(RuntimeError, match="something else"), memory.enough_memory("align", AlignConfig()):
        raise RuntimeError("something else")


def test_some_memory_is_free_here() -> None:
    free = memory.free_memory("cpu")
    assert free is None or 2**20 < free < 2**50
