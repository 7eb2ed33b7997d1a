"""The alignment loop: missing scores are counted, and what does not fit is refused before training."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from proximo.errors import UserError
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.training.align import plan, save, start
from proximo.training.align_config import AlignConfig, JudgeConfig
from proximo.training.roles import build_policy
from tests.tiny_language import save_tiny, save_tiny_scalar, tiny_model, tiny_tokenizer
from tests.training.aligning import (
    GENERATION,
    share_of_wanted,
    trained,
)

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# --- scores that are missing, or say nothing ----------------------------------------------------------------------


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_missing_scores_are_counted_and_masked_and_too_many_stop_the_run(config_with, tmp_path, missing):
    def reward(prompts: list[str], responses: list[str]) -> list[float | None]:
        return [missing if k % 4 == 1 else float(k % 4 == 2) for k in range(len(responses))]

    with pytest.raises(UserError, match=r"iteration 1, 2 of 8 responses got no score, more than max_missing_rewards"):
        trained(config_with(), tmp_path / "strict", reward)
    _, rows = trained(config_with(max_missing_rewards=0.25, n_iterations=1), tmp_path / "lenient", reward)
    assert rows[0]["rewards_missing"] == 2
    assert rows[0]["advantage_rows"] == 0.75
    assert rows[0]["reward_mean"] == pytest.approx(2 / 6)  # the zeros are scores


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_an_iteration_without_any_score_is_survived_where_that_is_allowed(config_with, tmp_path, algorithm):
    config = config_with(algorithm, max_missing_rewards=1.0, n_iterations=1)
    state, rows = trained(config, tmp_path / "run", lambda prompts, responses: [None] * len(responses))
    assert rows[0]["reward_mean"] is None
    assert rows[0]["advantage_rows"] == 0.0
    assert torch.isfinite(state.optimizer.weights).all()


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_one_score_for_all_at_the_beginning_is_told(config_with, tmp_path, score):
    with pytest.raises(UserError, match=rf"first 8 responses got the same score, {score:g}"):
        trained(config_with(), tmp_path / "run", lambda prompts, responses: [score] * len(responses))


# --- bad inputs ---------------------------------------------------------------------------------------------------


def refused(config: AlignConfig, message: str, reward: Any = share_of_wanted) -> None:
    with pytest.raises(UserError, match=message):
        start(config, reward)


def test_what_is_missing_is_asked_for(config_with):
    refused(config_with(model=""), "align needs model")
    refused(config_with(prompts=""), "align needs prompts")
    refused(config_with(), "align needs a reward", None)
    refused(config_with(model="/nowhere/at/all"), "There is no model folder")
    refused(config_with(reward=("judge",), judge=JudgeConfig()), "--judge-model", None)


def test_numbers_that_do_not_fit_each_other_are_refused(config_with):
    refused(config_with(batch_size=9), r"batch_size is 9, but an iteration has only 8 responses \(8 prompts x 1\)")
    refused(config_with("grpo", responses_per_prompt=1), "responses_per_prompt is 1")
    assert config_with("grpo", responses_per_prompt=None).n_per_prompt == 8
    refused(config_with(sharing="trunk", value_pretraining_iterations=1), "value_pretraining_iterations")
    refused(config_with("grpo", value_pretraining_iterations=1), "value_pretraining_iterations")
    with pytest.raises(UserError, match="1 rewards and 2 reward_weights"):
        config_with(reward=("a.py:f",), reward_weights=(1.0, 2.0))


def test_a_context_too_small_is_told_with_what_would_fit(config_with, tmp_path):
    small = save_tiny(tmp_path / "small", context=7)
    refused(config_with(model=str(small)), r"context is 7 .*longest prompt \(3 tokens\).* max_new_tokens to at most 4")
    tiny = save_tiny(tmp_path / "tiny", context=3)
    refused(config_with(model=str(tiny)), "context is 3 .*shorter prompts")
    fits = dataclasses.replace(GENERATION, max_new_tokens=4)
    assert start(config_with(model=str(small), generation=fits), share_of_wanted).iteration == 0


def test_a_tokenizer_of_another_model_is_told(config_with, tmp_path):
    small = tiny_model()
    small.resize_token_embeddings(8)
    small.save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    refused(config_with(model=str(tmp_path / "small")), "do not belong together")


def test_folders_with_another_head_are_refused(config_with, tmp_path, model):
    scalar = save_tiny_scalar(tmp_path / "scalar", seed=3)
    refused(config_with(model=str(scalar)), "not a causal language model")
    with pytest.raises(UserError, match="not a reward model"):
        build_policy(config_with(reward=(str(model),)))
    with pytest.raises(UserError, match="critic_from is 'reward'"):
        build_policy(config_with(critic_from="reward"))


def test_a_critic_begins_as_the_reward_model_or_at_zero(config_with, tmp_path):
    scalar = save_tiny_scalar(tmp_path / "scalar", seed=3)
    from_reward: Any = build_policy(config_with(reward=(str(scalar),))).critic
    from_model: Any = build_policy(config_with(reward=(str(scalar),), critic_from="model")).critic
    assert from_reward.score.weight.abs().min() > 0
    assert not torch.equal(from_reward.model.embed_tokens.weight, from_model.model.embed_tokens.weight)
    assert from_model.score.weight.abs().max() == 0
    assert all(p.requires_grad for p in from_reward.parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta", -1.0), ("n_iterations", 0), ("max_missing_rewards", 1.5), ("sharing", "shared"), ("kl_in", "k3")],
)
def test_an_impossible_setting_is_refused_by_name_with_its_value(name, value):
    with pytest.raises(UserError, match=rf"^{name} is {value!r}"):
        AlignConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("beta_control", "adaptiv"), ("critic_from", "rewards"), ("precision", "bf16")]
)
def test_nor_is_a_misspelt_word_taken_for_another(name, value):
    with pytest.raises(UserError, match=rf"^{name} is {value!r}"):
        AlignConfig(**{name: value})


def test_the_plan_counts_what_memory_is_for(config_with):
    config = config_with(sharing="lora")
    told = plan(config, start(config, share_of_wanted))
    assert "reference is the base" in told["memory"]
    assert "6 from" in told["prompts"]
    separate = config_with()
    assert "reference " in plan(separate, start(separate, share_of_wanted))["memory"]


def test_a_saved_run_can_be_saved_again(config_with, tmp_path):
    config = config_with(n_iterations=1)
    state, _ = trained(config, tmp_path / "run")
    state.iteration = 2
    save(config, RunDirectory(tmp_path / "run"), state)
    assert newest_checkpoint(RunDirectory(tmp_path / "run").checkpoints).state["iteration"] == 2
