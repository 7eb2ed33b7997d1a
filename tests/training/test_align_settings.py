"""Alignment: settings that do nothing are refused in words, critics begin as what they can read, prompts fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from proximo.collect.generate import GenerationConfig
from proximo.collect.rewards import CallableReward
from proximo.errors import UserError
from proximo.models.folders import load_causal_lm
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.training import align
from proximo.training.align import plan, start
from proximo.training.align_config import AlignConfig, JudgeConfig
from proximo.training.roles import build_policy, build_roles, reward_of
from tests.tiny_language import WORDS, save_tiny, save_tiny_scalar, tiny_scalar_model, tiny_tokenizer
from tests.training.aligning import GENERATION, lengths, share_of_wanted, trained

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def refused(config: AlignConfig, message: str, reward: Any = share_of_wanted) -> None:
    with pytest.raises(UserError, match=message):
        start(config, reward)


# --- settings that do nothing -------------------------------------------------------------------------------------


def test_what_does_nothing_for_language_models_is_refused_with_what_is_meant(config_with):
    refused(config_with(kl_coef=0.2), r"kl_coef is 0.2.* Use beta\.")
    refused(config_with(kl_target=6.0), r"kl_target is 6.* Use beta_target, with beta_control adaptive")
    refused(config_with(objective="kl_penalty"), "objective is 'kl_penalty'.*beta as the weight")
    refused(config_with(update_path="fused", microbatch_tokens=None), "update_path is 'fused'")


def test_what_needs_a_critic_or_a_reference_is_refused_without_one(config_with):
    bootstrap = GenerationConfig(max_new_tokens=5, truncation="bootstrap")
    refused(config_with("grpo", generation=bootstrap), "truncation is 'bootstrap'.*there is no critic")
    refused(config_with(beta=0.0, beta_control="adaptive"), "beta_control is 'adaptive', but beta is 0")


def test_masking_every_response_is_refused(config_with):
    endless = GenerationConfig(max_new_tokens=5, stop_at_eos=False, truncation="mask")
    refused(config_with(generation=endless), "nothing could ever be learned")
    with_stop = dataclasses.replace(endless, stop=(WORDS[0],))
    assert start(config_with(generation=with_stop), share_of_wanted).iteration == 0


def test_a_judge_of_pairs_needs_pairs(config_with, tmp_path):
    (tmp_path / "rubric.txt").write_text("Length counts.")
    pairs = JudgeConfig(judge_mode="pair", judge_model="m", judge_rubric=str(tmp_path / "rubric.txt"))
    refused(config_with(reward=("judge",), judge=pairs), "responses_per_prompt is 1. Set responses_per_prompt", None)
    state = start(config_with(reward=("judge",), judge=pairs, responses_per_prompt=2), None)
    align.close(state)


def test_the_settings_of_the_judge_arrive(config_with, tmp_path, monkeypatch):
    (tmp_path / "rubric.txt").write_text("Length counts.")
    monkeypatch.setenv("MY_KEY", "secret")
    judge = JudgeConfig(
        judge_url="https://judge.invalid/v1",
        judge_model="m",
        judge_rubric=str(tmp_path / "rubric.txt"),
        judge_api_key_variable="MY_KEY",
        judge_timeout=7.0,
        judge_parallel=3,
        judge_retries=0,
    )
    found: Any = reward_of(config_with(reward=("judge",), judge=judge))
    assert (found._key(), found._timeout, found._retries, found._threads._max_workers) == ("secret", 7.0, 0, 3)
    found.close()
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match=r"MY_KEY, which is not set.*--judge-api-key-variable"):
        reward_of(config_with(reward=("judge",), judge=judge))
    for name, value in (("judge_timeout", 0.0), ("judge_parallel", 0), ("judge_retries", -1)):
        with pytest.raises(UserError, match=rf"^{name} is"):
            JudgeConfig(**{name: value})  # type: ignore[arg-type]


# --- what a critic begins as --------------------------------------------------------------------------------------


def reward_models(folder: Path) -> dict[str, str]:
    """Reward models that cannot be the critic of a tiny model."""
    chat = save_tiny_scalar(folder / "chat", seed=3, chat=True)
    small = tiny_scalar_model(seed=3)
    small.resize_token_embeddings(40)
    small.save_pretrained(folder / "small")
    tiny_tokenizer().save_pretrained(folder / "small")
    tiny_scalar_model(seed=3, context=7).save_pretrained(folder / "short")
    tiny_tokenizer().save_pretrained(folder / "short")
    return {
        str(chat): "tokenizer .* is not the policy's",
        str(folder / "small"): "knows 40 tokens",
        str(folder / "short"): "takes 7 tokens, and texts here may have 8",
    }


def test_a_reward_model_that_reads_other_tokens_is_no_critic(config_with, tmp_path):
    for place, why in reward_models(tmp_path).items():
        config = config_with(reward=(place,), prompts_per_iteration=8, n_iterations=1, max_missing_rewards=1.0)
        state = start(config)
        critic: Any = state.policy.critic
        assert critic.score.weight.abs().max() == 0  # the policy's own weights, with a new head
        own: Any = load_causal_lm(config.model)
        assert critic.model.embed_tokens.weight.equal(own.model.embed_tokens.weight)
        told = plan(config, state)["critic"]
        assert told.startswith(f"begins as {config.model}")
        with pytest.raises(UserError, match=rf"critic_from is 'reward', but .*{why}"):
            start(dataclasses.replace(config, critic_from="reward"))


def test_a_critic_of_a_short_context_is_one_where_texts_are_shorter(config_with, tmp_path):
    place = list(reward_models(tmp_path))[2]
    config = config_with(reward=(place,), generation=dataclasses.replace(GENERATION, max_new_tokens=4))
    state = start(config)  # three tokens of a prompt and four
    assert plan(config, state)["critic"] == f"begins as the reward model {place}"
    critic: Any = state.policy.critic
    assert critic.score.weight.abs().max() > 0
    own: Any = build_policy(config).critic  # it is not known how long texts are
    assert own.score.weight.abs().max() == 0


def test_a_critic_from_the_reward_is_refused_where_there_can_be_none(config_with, tmp_path):
    place = str(save_tiny_scalar(tmp_path / "r"))
    common = dict(critic_from="reward", reward=(place,))
    refused(config_with("grpo", **common), "critic_from is 'reward', but there is no critic", None)
    refused(config_with(sharing="trunk", **common), "critic_from is 'reward', but the critic is a head", None)
    with pytest.raises(UserError, match="with sharing lora the critic is an adapter"):
        build_roles(config_with(sharing="lora", **common))


# --- columns that are not there, prompts that are too long, and what is closed ------------------------------------


def test_the_context_is_the_limit_of_prompts_where_none_is_given(config_with, tmp_path):
    small = save_tiny(tmp_path / "small", context=7)  # two tokens beside five new ones
    dropped = start(config_with(model=str(small), over_long="drop"), share_of_wanted)
    assert [len(row.token_ids) for row in dropped.prompts] == [1, 2, 1, 2]
    cut = start(config_with(model=str(small), over_long="truncate"), share_of_wanted)
    assert [len(row.token_ids) for row in cut.prompts] == [1, 2, 2, 1, 2, 2]
    refused(config_with(model=str(small)), r"max_new_tokens to at most 4, or over_long to drop or truncate")
    refused(config_with(model=str(small), max_prompt_tokens=1), "max_prompt_tokens = 1")
    tiny = config_with(model=str(save_tiny(tmp_path / "tiny", context=5)), over_long="drop")
    refused(tiny, "no room is left for a prompt")


def test_gold_is_closed_where_a_later_step_fails(config_with, monkeypatch):
    closed = []

    class Gold(CallableReward):
        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(align, "gold_of", lambda config: Gold(share_of_wanted))
    monkeypatch.setattr(align, "check_ends", lambda *arguments: (_ for _ in ()).throw(UserError("no end")))
    refused(config_with(), "no end")
    assert len(closed) == 1


def test_gold_is_told_which_responses_ended(config_with, tmp_path, monkeypatch):
    asked = []

    def score(reward: Any, prompts: Any, texts: Any, columns: Any, ended: Any) -> Any:
        asked.append(ended)
        return reward(prompts, texts, columns)

    monkeypatch.setattr(align, "score_responses", score)
    monkeypatch.setattr(align, "gold_of", lambda config: CallableReward(share_of_wanted))
    config = config_with(n_iterations=1, prompts_per_iteration=64, generation=GenerationConfig(max_new_tokens=20))
    _, rows = trained(config, tmp_path / "run")
    assert sum(asked[0]) / 64 == rows[0]["eos_fraction"] > 0
    stop = GenerationConfig(max_new_tokens=20, stop_at_eos=False, stop=tuple(WORDS[:20]))
    _, rows = trained(dataclasses.replace(config, generation=stop), tmp_path / "stop", lengths)
    assert rows[0]["eos_fraction"] > 0.5
    assert sum(asked[1]) == 0


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_resumed_run_insists_on_its_reward_model(file, config_with, tmp_path):
    place = save_tiny_scalar(tmp_path / "r", seed=3)
    config = config_with(reward=(str(place),), n_iterations=1)
    trained(config, tmp_path / "run", None)
    found = newest_checkpoint(RunDirectory(tmp_path / "run").checkpoints)
    assert align.restore(config, found).iteration == 1
    if file == "config.json":
        read = json.loads((place / file).read_text())
        (place / file).write_text(json.dumps(read | {"proximo_reward_scale": {"mean": 1.0, "std": 2.0}}))
    else:
        save_tiny_scalar(place, seed=4)
    with pytest.raises(UserError, match=r"The reward model .* is not the one that this run began with"):
        align.restore(config, found)


def test_a_function_and_a_named_reward_are_one_too_many(config_with, tmp_path):
    place = save_tiny_scalar(tmp_path / "r", seed=3)
    refused(config_with(reward=(str(place),)), "There are two rewards: a function, and")


def test_a_scale_is_not_measured_on_a_handful(config_with):
    with pytest.raises(UserError, match="normalize_rewards_on is 3: so few"):
        config_with(normalize_rewards_on=3)


def test_a_reward_without_its_column_is_refused_before_any_weights_are_loaded(config_with, tmp_path, monkeypatch):
    def answered(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
        return [float(response == answer) for response, answer in zip(responses, answers, strict=True)]

    file = tmp_path / "rewards.py"
    file.write_text("def score(prompts, responses, answers):\n    return [0.0] * len(responses)\n")
    rows = [{"prompt": "the cat", "answer": "a"}, {"prompt": "the dog", "answer": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = config_with(prompts=str(tmp_path / "rows.jsonl"))
    monkeypatch.setattr("proximo.training.roles.build_policy", None)
    said = r"takes 'answers', but the data has no such column \(it has: answer\).* Did you mean answer\?"
    refused(config, said, answered)
    place = f"{file}:score"
    refused(dataclasses.replace(config, reward=(place,)), said, None)
    refused(dataclasses.replace(config, reward=(place, place), reward_weights=(1.0, 2.0)), said, None)
    refused(dataclasses.replace(config, gold=(place,)), said)
