"""Weights that never learn may be held in half the memory; what learns stays in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from proximo.errors import UserError
from proximo.models.folders import load_causal_lm
from proximo.runs.checkpoint import newest_checkpoint
from proximo.training import align
from proximo.training.align_config import AlignConfig
from proximo.training.roles import models_of
from tests.tiny_language import save_tiny_scalar
from tests.training.aligning import everything_of, run_in, share_of_wanted, trained

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
LOW = dict(precision="bfloat16", frozen_precision="bfloat16")


def test_it_is_refused_where_computing_is_in_float32(config_with: Callable[..., AlignConfig]) -> None:
    with pytest.raises(UserError, match="frozen_precision is 'bfloat16', but precision is 'auto' on cpu"):
        align.start(config_with(frozen_precision="bfloat16"), share_of_wanted)


def test_reference_and_reward_are_held_in_bfloat16_and_what_learns_in_float32(
    config_with: Callable[..., AlignConfig], tmp_path: Path
) -> None:
    place = save_tiny_scalar(tmp_path / "rm", seed=3)
    config = config_with(reward=(str(place),), **LOW)
    state = align.start(config)
    assert state.policy.reference is not None
    assert {p.dtype for p in state.policy.reference.parameters()} == {torch.bfloat16}
    (model,) = models_of(state.reward)
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in state.policy.parameters() if p.requires_grad} == {torch.float32}
    high = config_with(reward=(str(place),), precision="bfloat16")
    plain = align.plan(high, align.start(high))["memory"]
    assert _mib(align.plan(config, state)["memory"], "reference") == pytest.approx(
        _mib(plain, "reference") / 2, abs=0.1
    )
    rows = list(align.iterate(config, run_in(tmp_path / "run"), state))
    assert abs(rows[0]["kl_to_reference"]) < 0.2  # rounding, over five tokens
    assert rows[-1]["reward_mean"] is not None


def _mib(words: str, role: str) -> float:
    return float(words.split(f"{role} ")[1].split(" MiB")[0])


def test_adapters_learn_in_float32_on_a_base_in_bfloat16(
    config_with: Callable[..., AlignConfig], tmp_path: Path
) -> None:
    config = config_with(sharing="lora", checkpoint_every=2, learning_rate=3e-2, **LOW)
    state = align.start(config, share_of_wanted)
    learned = {name: p for name, p in state.policy.named_parameters() if p.requires_grad}
    assert {p.dtype for p in learned.values()} == {torch.float32}
    frozen = {p.dtype for name, p in state.policy.named_parameters() if name not in learned}
    assert frozen == {torch.bfloat16}
    before = {name: p.detach().clone() for name, p in state.policy.named_parameters()}
    rows = list(align.iterate(config, run_in(tmp_path / "run"), state))
    assert rows[0]["kl_to_reference"] == 0.0  # the base is the reference, in the same precision
    assert rows[-1]["kl_to_reference"] != 0.0
    moved = {name for name, p in state.policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= learned.keys()
    assert any("lora_B" in name for name in moved)

    run = run_in(tmp_path / "result")
    align.finish(config, run, state)
    merged = load_causal_lm(run.path)
    base = dict(load_causal_lm(config.model).named_parameters())
    change = max(float((p - base[name]).detach().abs().max()) for name, p in merged.named_parameters())
    assert change > 1e-3


def test_a_run_on_a_base_in_bfloat16_goes_on_exactly(config_with: Callable[..., AlignConfig], tmp_path: Path) -> None:
    config = config_with(sharing="lora", checkpoint_every=2, **LOW)
    whole, _ = trained(config, tmp_path / "whole")
    halves = run_in(tmp_path / "halves")
    rows = align.iterate(config, halves, align.start(config, share_of_wanted))
    next(rows), next(rows)
    resumed = align.restore(config, newest_checkpoint(halves.checkpoints), share_of_wanted)
    list(align.iterate(config, halves, resumed))
    expected, found = everything_of(whole), everything_of(resumed)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_reward_adapter_finds_its_base_in_either_precision(
    config_with: Callable[..., AlignConfig], tmp_path: Path
) -> None:
    from tests.training.test_reward_adapter import reward_of_kind

    base, rm = reward_of_kind("llama", tmp_path)
    config = config_with(sharing="lora", model=str(base), reward=(str(rm),), normalize_rewards_on=0, **LOW)
    (model,) = models_of(align.start(config).reward)
    assert model.on_base
    good, bad = model(["the cat", "the dog"], ["is good", "is bad"], {}).values
    assert (good or 0.0) > (bad or 0.0) + 1.0
