"""A reward model that is an adapter on the policy's own base: one set of frozen weights for all four roles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from proximo.collect.data import PromptRow
from proximo.collect.generate import generate
from proximo.collect.reward_model import RewardModel, score_rows
from proximo.errors import UserError
from proximo.models.adapters import REWARD_ADAPTER, LoraConfig, adapter_state
from proximo.models.folders import load_causal_lm, load_scalar_model
from proximo.runs.checkpoint import newest_checkpoint
from proximo.training import align, reward
from proximo.training.align_config import AlignConfig
from proximo.training.reward import RewardConfig
from proximo.training.roles import memory_in_words, models_of
from tests.tiny_language import Kind, save_tiny
from tests.training.aligning import GENERATION, everything_of, run_in

ROWS = [[7, 8, 9, 2], [11, 12, 2], [17, 18, 19, 20, 21, 2]]


def reward_of_kind(kind: Kind, folder: Path, *, rank: int = 2) -> tuple[Path, Path]:
    """A base, and a reward model trained on it as an adapter."""
    base = save_tiny(folder / "base", kind)
    pairs = folder / "pairs.jsonl"
    words = ("cat", "dog", "bird", "fish", "tree", "house")
    rows = [{"prompt": f"the {word}", "chosen": "is good", "rejected": "is bad"} for word in words]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RewardConfig(
        model=str(base), data=str(pairs), lora=True, lora_rank=rank, n_epochs=4, learning_rate=3e-2, batch_size=3
    )
    run = run_in(folder / "rm")
    state = reward.start(config)
    list(reward.iterate(config, run, state))
    reward.finish(config, run, state)
    return base, run.path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return reward_of_kind("llama", tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def config(trained: tuple[Path, Path], config_with: Callable[..., AlignConfig]) -> AlignConfig:
    base, rm = trained
    return config_with(sharing="lora", model=str(base), reward=(str(rm),), normalize_rewards_on=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_reads_the_adapter_and_scores_as_the_merged_model_does(kind: Kind, tmp_path: Path) -> None:
    import peft

    base, rm = reward_of_kind(kind, tmp_path)
    expected = score_rows(load_scalar_model(rm), ROWS, budget=None)
    plain = load_scalar_model(base, fresh_head=True)
    assert not torch.allclose(score_rows(plain, ROWS, budget=None), expected, atol=1e-2)
    theirs = peft.PeftModel.from_pretrained(plain, str(rm / REWARD_ADAPTER)).eval()
    found = score_rows(theirs.base_model.model, ROWS, budget=None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_all_roles_are_on_one_base_and_the_reward_scores_as_by_itself(config: AlignConfig) -> None:
    state = align.start(config)
    (model,) = models_of(state.reward)
    assert model.on_base
    assert "policy, critic, reward; reference is the base" in memory_in_words(state.policy, state.reward)
    learned = {name for name, p in state.policy.named_parameters() if p.requires_grad}
    assert not any(".reward." in name for name in learned)
    texts, prompts = ["is good", "is bad", "dog"], ["the cat", "the dog", "a"]
    whole = RewardModel(config.reward[0])(list(prompts), texts, {})
    with torch.no_grad():  # whatever the policy has become
        for name, value in adapter_state(state.policy.actor, "policy").items():
            value.normal_(generator=torch.Generator().manual_seed(len(name)))
    shared = model(list(prompts), texts, {})
    assert shared.values == pytest.approx(whole.values, abs=1e-4)
    assert shared.values[0] > shared.values[1] + 1.0  # it has learned something


def test_the_critic_begins_as_the_reward(config: AlignConfig) -> None:
    state = align.start(config)
    batch, answers = generate(
        state.policy,
        state.tokenizer,
        [PromptRow("the cat", [7, 8], {}), PromptRow("a", [9], {})],
        state.reward,
        GENERATION,
        torch.Generator().manual_seed(0),
    )
    assert batch.next_values is not None
    last = batch.next_values[batch.done]  # of the whole text, which the reward model scores
    assert last.tolist() == pytest.approx(answers.scores, abs=1e-4)
    other = align.start(dataclasses.replace(config, critic_from="model"))
    assert other.policy.value_head is not None
    assert float(other.policy.value_head.weight.detach().abs().sum()) == 0.0


def test_training_leaves_the_reward_and_the_base_as_they_are(config: AlignConfig, tmp_path: Path) -> None:
    state = align.start(config)
    frozen = {name: p.clone() for name, p in state.policy.named_parameters() if not p.requires_grad}
    assert any(".reward." in name for name in frozen)
    assert any("base_layer" in name for name in frozen)
    before = everything_of(state)
    moved = {name: tensor.clone() for name, tensor in before.items()}
    run = run_in(tmp_path / "run")
    list(align.iterate(config, run, state))
    now = dict(state.policy.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert any(not torch.equal(everything_of(state)[name], moved[name]) for name in moved if ".policy." in name)
    align.finish(config, run, state)
    assert not any("lora" in name or "reward" in name for name in _names_in(run.path / "model.safetensors"))


def _names_in(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def test_two_and_two_iterations_are_four(config: AlignConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, checkpoint_every=2)
    whole = align.start(config)
    list(align.iterate(config, run_in(tmp_path / "whole"), whole))
    halves = run_in(tmp_path / "halves")
    rows = align.iterate(config, halves, align.start(config))
    next(rows), next(rows)
    resumed = align.restore(config, newest_checkpoint(halves.checkpoints))
    assert resumed.iteration == 2
    list(align.iterate(config, halves, resumed))
    expected, found = everything_of(whole), everything_of(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_resumed_run_insists_on_the_adapter(trained: tuple[Path, Path], config: AlignConfig, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "rm"
    shutil.copytree(trained[1], copy)
    config = dataclasses.replace(config, reward=(str(copy),))
    run = run_in(tmp_path / "run")
    list(align.iterate(config, run, align.start(config)))
    found = newest_checkpoint(run.checkpoints)
    assert align.restore(config, found).iteration == config.n_iterations
    file = copy / REWARD_ADAPTER / "adapter_model.safetensors"
    save_file({name: 3 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match="is not the one that this run began with"):
        align.restore(config, found)


def test_a_base_that_differs_by_less_than_bfloat16_is_another_one(
    trained: tuple[Path, Path], config: AlignConfig, tmp_path: Path
) -> None:
    import shutil

    base: Any = load_causal_lm(trained[0])
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[0, 0] *= 1 + 1e-6
    shutil.copytree(trained[0], tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    state = align.start(dataclasses.replace(config, model=str(tmp_path / "base")))
    assert not models_of(state.reward)[0].on_base


def test_an_adapter_of_another_base_is_used_as_the_whole_model_that_it_is(
    trained: tuple[Path, Path], config: AlignConfig, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", seed=5)
    state = align.start(dataclasses.replace(config, model=str(other)))
    (model,) = models_of(state.reward)
    assert not model.on_base
    expected = RewardModel(trained[1])(["the cat"], ["is good"], {}).values
    assert model(["the cat"], ["is good"], {}).values == pytest.approx(expected)


def test_another_rank_than_the_policys_is_no_obstacle(config: AlignConfig) -> None:
    state = align.start(dataclasses.replace(config, lora=LoraConfig(lora_rank=3)))
    assert models_of(state.reward)[0].on_base
    assert state.policy.value_head is not None
    assert float(state.policy.value_head.weight.detach().abs().sum()) == 0.0  # the critic begins anew


@pytest.mark.parametrize("damage", ["weights", "settings", "rank"])
def test_a_damaged_adapter_is_refused(damage: str, trained: tuple[Path, Path], config: AlignConfig, tmp_path: Path):
    import shutil

    copy = tmp_path / "rm"
    shutil.copytree(trained[1], copy)
    folder = copy / REWARD_ADAPTER
    if damage == "weights":
        (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    else:
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["r"] = "two" if damage == "settings" else 5
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"adapter.*is damaged.*whole reward model"):
        align.start(dataclasses.replace(config, reward=(str(copy),)))
