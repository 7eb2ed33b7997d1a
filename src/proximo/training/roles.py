"""The four roles of an alignment run: policy, reference, critic and reward, loaded and put together."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from proximo.algorithms.ppo import PPO
from proximo.collect.code_reward import CodeReward
from proximo.collect.judge import JudgeReward
from proximo.collect.reward_model import RewardModel, same_tokens, scale_of
from proximo.collect.rewards import (
    CallableReward,
    FunctionReward,
    Reward,
    WeightedReward,
    check_columns,
    kind_of_reward,
)
from proximo.errors import UserError
from proximo.models.adapters import adapter_state, add_adapter, copy_adapter, has_reward_adapter
from proximo.models.folders import (
    context_length,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    transformers_module,
)
from proximo.models.language import LanguagePolicy, enable_gradient_checkpointing
from proximo.training.align_config import AlignConfig


class Roles(NamedTuple):
    """Who takes part in an alignment run."""

    policy: LanguagePolicy
    """The policy, with its reference and its critic."""
    reward: Reward
    began: RewardModel | None
    """The reward model that the critic began as, if it did."""


def build_roles(
    config: AlignConfig,
    function: Callable[..., Any] | None = None,
    *,
    n_tokens: int | None = None,
    columns: Collection[str] = (),
) -> Roles:
    """Load policy, reference, critic and reward as the config shares them.

    Args:
        config: the settings.
        function: scores responses, in place of `config.reward`.
        n_tokens: of the longest text that a critic may have to read, if it is known.
        columns: of the data, beside the prompts.

    Raises:
        UserError: if one of them cannot be had, or the reward lacks a column; a reward that is no model is tried before
            any weights are loaded.
    """
    on_base = config.sharing == "lora" and any(has_reward_adapter(place) for place in config.reward)
    reward: Reward | None = None
    if function is not None:
        reward = CallableReward(function, timeout=config.reward_timeout)
    elif not on_base:
        reward = reward_of(config)
    try:
        if reward is not None:
            check_columns(reward, columns)
        policy = build_policy(config, n_tokens=n_tokens)
        if reward is None:
            reward = reward_of(config, base=policy.actor)
            check_columns(reward, columns)
            began = _begin_critic(config, policy, reward)
        else:
            place = critic_place(config, n_tokens)[0] if policy.critic is not None else ""
            began = next((model for model in models_of(reward) if model.place == place), None)
        if config.critic_from == "reward" and config.sharing == "lora" and began is None:
            raise UserError(
                "critic_from is 'reward', but with sharing lora the critic is an adapter, and no reward is an adapter "
                "for this very base of the same lora_rank and lora_alpha. Use critic_from 'model', or make one with: "
                "proximo reward --lora"
            )
    except BaseException:
        if reward is not None:
            reward.close()  # a reward function's process would stay behind
        raise
    return Roles(policy, reward, began)


def build_policy(config: AlignConfig, *, n_tokens: int | None = None) -> LanguagePolicy:
    """Load the roles as the config shares them; a critic must be able to read texts of `n_tokens`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # of new heads and adapters: libraries draw them from the global generator
        frozen = getattr(torch, config.frozen_precision)
        held = frozen if config.sharing == "lora" else torch.float32
        actor: Any = load_causal_lm(config.model, dtype=held, device=config.device)
        width = actor.config.get_text_config().hidden_size
        critic = value_head = reference = None
        wants_critic = isinstance(config.algorithm, PPO)
        if config.sharing == "lora":
            add_adapter(actor, "policy", config.lora)
            if wants_critic:
                add_adapter(actor, "value", config.lora)
        else:
            actor.requires_grad_(True)
            if config.beta > 0:
                reference = load_causal_lm(config.model, dtype=frozen, device=config.device)
                reference.requires_grad_(False)
        if wants_critic and config.sharing == "separate":
            critic = _critic(config, n_tokens)
        elif wants_critic:
            value_head = nn.Linear(width, 1, device=config.device)
            nn.init.zeros_(value_head.weight)
            nn.init.zeros_(value_head.bias)
    policy = LanguagePolicy(
        actor,
        sharing=config.sharing,
        critic=critic,
        value_head=value_head,
        reference=reference,
        temperature=config.generation.temperature,
        autocast=config.autocast,
    )
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(policy)
    return policy


@torch.no_grad()
def _critic(config: AlignConfig, n_tokens: int | None) -> nn.Module:
    """A value network of its own: from the reward model where there is one that fits, else from the policy's own."""
    place, why_not = critic_place(config, n_tokens)
    if config.critic_from == "reward" and why_not:
        raise UserError(f"critic_from is 'reward', but {why_not}. Use critic_from 'model'.")
    if place:
        critic: Any = load_scalar_model(place, device=config.device)
        critic.score = _normalized_head(critic.score, *scale_of(critic.config, place), weight_of(config, place))
    else:
        critic = load_scalar_model(config.model, device=config.device, fresh_head=True)
        nn.init.zeros_(critic.score.weight)
    return critic.requires_grad_(True)


def critic_place(config: AlignConfig, n_tokens: int | None = None) -> tuple[str, str]:
    """The reward model that a separate critic begins as, or "" for the policy's own weights; and why it is not one.

    It is the first one, where it reads the policy's tokens, knows all of them, and can take as long texts.

    Args:
        config: the settings.
        n_tokens: of the longest text; if it is not known, the reward model must take what the policy can take.
    """
    places = [place for place in config.reward if kind_of_reward(place) == "model"]
    if config.critic_from == "model":
        return "", ""
    if not places:
        return "", "no reward is a model"
    place = places[0]
    if not same_tokens(load_tokenizer(place), load_tokenizer(config.model, config.chat_template)):
        return "", f"the tokenizer (or chat template) of the reward model {place} is not the policy's"
    theirs, ours = model_config(place), model_config(config.model)
    known, wanted = (int(each.get_text_config().vocab_size) for each in (theirs, ours))
    if known < wanted:
        return "", f"the reward model {place} knows {known} tokens and the policy {wanted}"
    limit = context_of(theirs)
    longest = context_of(ours) if n_tokens is None else n_tokens
    if limit is not None and (longest is None or limit < longest):
        return "", f"the reward model {place} takes {limit} tokens, and texts here may have {longest or 'more'}"
    return place, ""


def value_head_of(policy: LanguagePolicy) -> Any:
    """The linear layer that says the critic's values."""
    critic: Any = policy.critic
    return policy.value_head if critic is None else critic.score


def critic_in_words(config: AlignConfig, n_tokens: int | None = None) -> str:
    """What a separate critic begins as."""
    place, why_not = critic_place(config, n_tokens)
    own = f"begins as {config.model} with a new head"
    return f"begins as the reward model {place}" if place else f"{own}: {why_not}" if why_not else own


def model_config(place: str) -> Any:
    """The config of a model's folder or hub id, without its weights.

    Raises:
        UserError: if there is none.
    """
    try:
        return transformers_module().AutoConfig.from_pretrained(
            place, local_files_only=Path(place).is_dir(), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The config.json of the model {place} cannot be read: {error}") from error


def context_of(model_config: Any) -> int | None:
    """Most tokens that the model of a config can take, where it has a limit."""
    return context_length(SimpleNamespace(config=model_config))


@torch.no_grad()
def _normalized_head(head: nn.Linear, mean: float, std: float, weight: float) -> nn.Linear:
    """A head that says in the units of the reward what another one says in raw scores."""
    own = torch.zeros(1, device=head.weight.device) if head.bias is None else head.bias
    made = nn.Linear(head.in_features, 1, device=head.weight.device)
    made.weight.copy_(head.weight * (weight / std))
    made.bias.copy_((own - mean) * (weight / std))
    return made


def weight_of(config: AlignConfig, place: str) -> float:
    """What the scores of a reward count for in the sum."""
    return config.reward_weights[config.reward.index(place)] if config.reward_weights else 1.0


@torch.no_grad()
def _begin_critic(config: AlignConfig, policy: LanguagePolicy, reward: Reward) -> RewardModel | None:
    """Let the adapter of the critic, and its head, begin as those of the reward where they are of one size."""
    models = [model for model in models_of(reward) if model.on_base]
    if policy.value_head is None or not models or config.critic_from == "model":
        return None
    actor, model = policy.actor, models[0]
    theirs, ours = (
        sorted(tuple(weight.shape) for weight in adapter_state(actor, name).values()) for name in ("reward", "value")
    )
    if theirs != ours or model.lora_alpha != config.lora.lora_alpha:
        return None
    copy_adapter(actor, "reward", "value")
    head = _normalized_head(model.model.score, model.mean, model.std, weight_of(config, model.place))
    policy.value_head.load_state_dict(head.state_dict())
    return model


def reward_of(config: AlignConfig, base: Any = None) -> Reward:
    """The rewards that a config names, added up.

    `base` is a causal model with adapters: a reward model that is an adapter of the same base is put on it.

    Raises:
        UserError: if none is named, or one cannot be had.
    """
    if not config.reward:
        raise UserError(
            "align needs a reward: --reward FOLDER (a reward model), --reward my_file.py:score (a function), --reward "
            "judge, or --reward code:tests (programs with tests)."
        )
    rewards = [_one_reward(config, place, base) for place in config.reward]
    if len(rewards) == 1 and not config.reward_weights:
        return rewards[0]
    return WeightedReward(rewards, config.reward_weights or [1.0] * len(rewards))


def gold_of(config: AlignConfig) -> Reward | None:
    """The judge that is only looked at, if there is one."""
    if not config.gold:
        return None
    rewards = [_one_reward(config, place, None) for place in config.gold]
    return rewards[0] if len(rewards) == 1 else WeightedReward(rewards, [1.0] * len(rewards))


def _one_reward(config: AlignConfig, place: str, base: Any) -> Reward:
    kind = kind_of_reward(place)
    if kind == "function":
        return FunctionReward(place, timeout=config.reward_timeout)
    if kind == "code":
        return CodeReward(place, config.sandbox, timeout=config.sandbox_timeout)
    if kind == "model":
        held = getattr(torch, config.frozen_precision)
        return RewardModel(place, device=config.device, dtype=held, autocast=config.autocast, base=base)
    judge = config.judge
    if not judge.judge_model or not judge.judge_rubric:
        raise UserError("--reward judge needs --judge-model NAME and --judge-rubric FILE (and --judge-url).")
    return JudgeReward(
        judge.judge_url,
        judge.judge_model,
        Path(judge.judge_rubric),
        mode=judge.judge_mode,
        api_key_variable=judge.judge_api_key_variable,
        timeout=judge.judge_timeout,
        n_parallel=judge.judge_parallel,
        retries=judge.judge_retries,
    )


def models_of(reward: Reward) -> list[RewardModel]:
    """The reward models among the sources of a reward."""
    parts = reward.rewards if isinstance(reward, WeightedReward) else [reward]
    return [part for part in parts if isinstance(part, RewardModel)]


def memory_in_words(policy: LanguagePolicy, reward: Reward) -> str:
    """How much each role's weights take, with what learning adds: gradient and two moments for each that learns."""
    learning = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)

    def size(module: Any) -> float:
        return 0.0 if module is None else sum(p.numel() * p.element_size() for p in module.parameters()) / 2**20

    head = size(policy.value_head)
    models = models_of(reward)
    roles = {"policy": size(policy.actor)}
    if policy.sharing == "lora":
        also = ", critic" if policy.has_critic else ""
        also += ", reward" if any(model.on_base for model in models) else ""
        roles = {f"base with adapters (policy{also}; reference is the base)": size(policy.actor) + head}
    else:
        roles["reference"] = size(policy.reference)
        roles["critic"] = size(policy.critic) + head
    roles["reward"] = sum(size(model.model) for model in models)
    roles["gradients and Adam"] = 3 * learning / 2**20
    used = {name: number for name, number in roles.items() if number}
    return ", ".join(f"{name} {number:,.1f} MiB" for name, number in used.items()) + (
        f": {sum(used.values()):,.1f} MiB, activations not counted"
    )
