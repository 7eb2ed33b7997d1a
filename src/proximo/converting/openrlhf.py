"""OpenRLHF: flags of its train_ppo_ray, flat (0.9, early 0.10) or dotted (from 0.10.2)."""

from __future__ import annotations

from typing import Any

from proximo.converting.draft import Draft
from proximo.converting.language import counted, places
from proximo.converting.reading import number, truth, whole
from proximo.errors import UserError, shown

_ROLES = ("actor", "critic", "ref", "reward")
_DOTTED: dict[str, str] = {
    "actor.model_name_or_path": "pretrain",
    "reward.model_name_or_path": "reward_pretrain",
    "ref.model_name_or_path": "ref_pretrain",
    "critic.model_name_or_path": "critic_pretrain",
    "reward.remote_url": "remote_rm_url",
    "actor.gradient_checkpointing_enable": "gradient_checkpointing",
    "actor.gradient_checkpointing_reentrant": "gradient_checkpointing_use_reentrant",
    "ds.lora.rank": "lora_rank",
    "ds.lora.alpha": "lora_alpha",
    "ds.lora.dropout": "lora_dropout",
    "ds.lora.target_modules": "target_modules",
    "train.colocate_all": "colocate_all_models",
    "vllm.enforce_eager": "enforce_eager",
    "vllm.enable_prefix_caching": "enable_prefix_caching",
    "ds.enable_sleep": "deepspeed_enable_sleep",
    "ds.tensor_parallel_size": "ds_tensor_parallel_size",
    "ds.ring_attn_head_stride": "ring_head_stride",
    "rollout.max_new_tokens": "generate_max_len",
    "rollout.batch_size": "rollout_batch_size",
    "rollout.micro_batch_size": "micro_rollout_batch_size",
    "rollout.max_tokens_per_gpu": "rollout_max_tokens_per_gpu",
    "data.prompt_dataset": "prompt_data",
    "data.prompt_probs": "prompt_data_probs",
    "train.batch_size": "train_batch_size",
    "train.micro_batch_size": "micro_train_batch_size",
    "train.max_tokens_per_gpu": "train_max_tokens_per_gpu",
    "train.full_determinism_enable": "full_determinism",
    "train.async_enable": "async_train",
    "train.partial_rollout_enable": "partial_rollout",
    "train.dynamic_batch_enable": "use_dynamic_batch",
    "ckpt.output_dir": "save_path",
    "ckpt.path": "ckpt_path",
    "ckpt.save_steps": "save_steps",
    "ckpt.save_hf": "save_hf_ckpt",
    "ckpt.disable_ds": "disable_ds_ckpt",
    "ckpt.max_num": "max_ckpt_num",
    "ckpt.max_mem": "max_ckpt_mem",
    "ckpt.load_enable": "load_checkpoint",
    "ckpt.best_metric_key": "best_metric_key",
    "logger.wandb.key": "use_wandb",
    "logger.tensorboard_dir": "use_tensorboard",
    "logger.logging_steps": "logging_steps",
    "algo.advantage.estimator": "advantage_estimator",
    "algo.advantage.gamma": "gamma",
    "algo.advantage.lambd": "lambd",
    "algo.advantage.no_std_norm": "no_advantage_std_norm",
    "algo.advantage.is_correction_enable": "enable_vllm_is_correction",
    "algo.advantage.is_correction_type": "vllm_is_correction_type",
    "algo.advantage.is_correction_threshold": "vllm_is_truncated_threshold",
    "algo.kl.init_coef": "init_kl_coef",
    "algo.kl.target": "kl_target",
    "algo.kl.horizon": "kl_horizon",
    "algo.kl.estimator": "kl_estimator",
    "algo.kl.use_loss": "use_kl_loss",
    "algo.dynamic_filtering_enable": "dynamic_filtering",
    "algo.dynamic_filtering_range": "dynamic_filtering_reward_range",
    "actor.entropy_coef": "entropy_loss_coef",
    "critic.freezing_steps": "freezing_actor_steps",
    "ref.offload": "ref_offload",
    "reward.offload": "ref_reward_offload",
    "reward.normalize_enable": "normalize_reward",
    "reward.clip_range": "reward_clip_range",
    "actor.adam.lr": "actor_learning_rate",
    "critic.adam.lr": "critic_learning_rate",
    "actor.adam.betas": "adam_betas",
    "actor.adam.eps": "adam_eps",
    "actor.adam.weight_decay": "l2",
    **{f"{role}.{name}": f"{role}_{name}" for role in _ROLES for name in ("num_nodes", "num_gpus_per_node")},
    **{f"logger.wandb.{name}": f"wandb_{name}" for name in ("org", "group", "project", "run_name")},
    **{f"eval.{name}": f"eval_{name}" for name in ("dataset", "split", "steps", "temperature", "n_samples_per_prompt")},
    **{f"vllm.{name}": f"vllm_{name}" for name in ("num_engines", "tensor_parallel_size", "sync_backend")},
    **{f"vllm.{name}": f"vllm_{name}" for name in ("sync_with_ray", "gpu_memory_utilization", "enable_sleep")},
    **{f"ds.{name}": name for name in ("attn_implementation", "use_liger_kernel", "load_in_4bit", "zero_stage")},
    **{f"ds.{name}": name for name in ("param_dtype", "adam_offload", "zpg", "overlap_comm", "grad_accum_dtype")},
    **{f"ds.{name}": name for name in ("deepcompile", "ring_attn_size", "packing_samples", "value_head_prefix")},
    **{f"ds.{name}": name for name in ("use_universal_ckpt", "experts_implementation")},
    **{
        f"rollout.{name}": name for name in ("temperature", "top_p", "n_samples_per_prompt", "vllm_generate_batch_size")
    },
    **{f"data.{name}": name for name in ("prompt_split", "input_key", "label_key", "image_key", "input_template")},
    **{f"data.{name}": name for name in ("apply_chat_template", "max_len", "max_samples", "max_images_per_prompt")},
    **{f"data.{name}": name for name in ("dataloader_num_workers", "disable_fast_tokenizer")},
    **{f"train.{name}": name for name in ("colocate_actor_ref", "colocate_critic_reward", "max_epochs", "seed")},
    **{f"train.{name}": name for name in ("num_episodes", "async_queue_size", "enable_ema", "ema_beta")},
    **{f"train.{name}": name for name in ("agent_func_path",)},
    **{f"actor.{name}": name for name in ("eps_clip", "eps_clip_low_high", "dual_clip", "policy_loss_type", "optim")},
    **{f"actor.{name}": name for name in ("aux_loss_coef", "lr_scheduler", "lr_warmup_ratio", "min_lr_ratio")},
    **{f"actor.{name}": name for name in ("max_norm", "freeze_visual_encoder")},
    **{f"critic.{name}": name for name in ("value_clip", "save_value_network")},
    **{f"reward.{name}": name for name in ("overlong_buffer_len", "overlong_penalty_factor")},
    **{f"reward.{name}": name for name in ("stop_properly_penalty_coef",)},
}
"""The names of OpenRLHF 0.10.2 and those before it. What is not here is told as not known."""

_ESTIMATORS = {"gae": "ppo", "group_norm": "grpo", "dr_grpo": "dr_grpo", "rloo": "rloo"}
_IDLE = (
    *("vllm_num_*", "vllm_tensor_*", "vllm_sync_*", "vllm_gpu_*", "vllm_enable_sleep", "vllm_generate_batch_size"),
    *(f"{role}_num_{each}" for role in _ROLES for each in ("nodes", "gpus_per_node")),
    *("colocate_*", "zero_stage", "zpg", "adam_offload", "ref_offload", "ref_reward_offload", "actor_init_on_gpu"),
    *("save_*", "ckpt_path", "load_checkpoint", "max_ckpt_*", "disable_ds_ckpt", "use_universal_ckpt", "eval_*"),
    *("use_ds_universal_ckpt", "best_metric_key", "use_wandb", "wandb_*", "use_tensorboard", "logging_steps", "perf"),
    *("flash_attn", "attn_implementation", "use_liger_kernel", "packing_samples", "ring_*", "deepspeed_enable_sleep"),
    *("overlap_comm", "deepcompile", "ds_tensor_parallel_size", "enable_prefix_caching", "enforce_eager", "local_rank"),
    *("micro_rollout_batch_size", "micro_train_batch_size", "use_dynamic_batch", "rollout_max_tokens_per_gpu"),
    *("train_max_tokens_per_gpu", "rollout_tasks_per_gpu", "gradient_checkpointing_use_reentrant", "full_determinism"),
    *("disable_fast_tokenizer", "dataloader_num_workers", "value_head_prefix", "experts_implementation", "use_ms"),
    *("ray_*", "save_value_network"),
)

_ADAPTERS = "adapters are on every linear layer here, without dropout."
_CORRECTION = "what samples is what learns here, so that there is nothing to correct."
_DATA = "prompts are one file or folder here, read whole."
_IMAGES = "there are no images here."
_WITHOUT = {
    "reward_clip_range": "scores are not clipped here.",
    "l2": "Adam has no weight decay here.",
    "optim": "there is Adam alone.",
    "remote_rm_url": "an endpoint is asked with --reward judge, or by a function of yours.",
    "agent_func_path": "a response is one turn here; its reward can be a function of yours (--reward my_file.py:name).",
    "async_train": "sampling and learning take turns here, so that the first ratio is 1. Do not compare.",
    "async_queue_size": "see async_train.",
    "partial_rollout": "see async_train.",
    "dynamic_filtering": "groups that are all alike are counted (groups_alike), not replaced.",
    "dynamic_filtering_reward_range": "see dynamic_filtering.",
    "apply_chat_template": "a prompt that is a list of messages takes the chat template here; a text stays as it is.",
    "input_template": "write prompts out as they should be, or give --chat-template.",
    "label_key": "a reward function is given the other columns of a prompt by their names.",
    "prompt_data_probs": _DATA,
    "prompt_split": _DATA,
    "ref_pretrain": "the reference is the model as it begins.",
    "critic_pretrain": "the critic begins as the reward model or the model (critic_from).",
    "load_in_4bit": "weights are not quantized here.",
    "lora_dropout": _ADAPTERS,
    "target_modules": _ADAPTERS,
    "enable_ema": "there is no average of weights here.",
    "ema_beta": "see enable_ema.",
    "enable_vllm_is_correction": _CORRECTION,
    "vllm_is_correction_type": _CORRECTION,
    "vllm_is_truncated_threshold": _CORRECTION,
    "policy_loss_type": "ratios are per token here (PPO). Do not compare.",
    "aux_loss_coef": "there is no balancing loss here.",
    "ptx_coef": "there is no pretraining loss here.",
    "no_advantage_std_norm": "set baseline (group_mean), or --no-normalize-advantages.",
    "overlong_buffer_len": "take points off in a reward function.",
    "overlong_penalty_factor": "see overlong_buffer_len.",
    "stop_properly_penalty_coef": "missing_eos_penalty takes points from a response that does not end.",
    "image_key": _IMAGES,
    "max_images_per_prompt": _IMAGES,
    "freeze_visual_encoder": _IMAGES,
    "param_dtype": "weights are float32 here; --precision bfloat16 computes in it.",
    "grad_accum_dtype": "gradients are float32 here.",
}
_DEFAULTS = {
    "reward_clip_range": (-10, 10),
    "optim": "adam",
    "async_queue_size": 1,
    "dynamic_filtering_reward_range": (0, 1),
    "prompt_split": "train",
    "target_modules": "all-linear",
    "ema_beta": 0.992,
    "vllm_is_correction_type": "tis",
    "policy_loss_type": "ppo",
    "ptx_coef": 0.05,
    "overlong_penalty_factor": 1,
    "image_key": "images",
    "param_dtype": "bf16",
}


def flat_names(theirs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The settings by OpenRLHF's flat names, and whether dotted ones of 0.10.2 were among them."""
    known = [name for name in theirs if name in _DOTTED and _DOTTED[name] not in theirs]
    return {_DOTTED[name] if name in known else name: value for name, value in theirs.items()}, bool(known)


def from_openrlhf(draft: Draft, *, has_dotted: bool) -> None:
    """Flags of OpenRLHF's train_ppo_ray, by their names."""
    estimator = str(draft.take("advantage_estimator", "gae"))
    if estimator not in _ESTIMATORS:
        raise UserError(
            f"advantage_estimator is {shown(estimator)}, which is not here. There are: {', '.join(_ESTIMATORS)}."
        )
    algorithm = _ESTIMATORS[estimator]
    draft.put("algorithm", algorithm)
    places(draft, "pretrain", "reward_pretrain")
    _prompts(draft)
    _adapters(draft)
    _sizes(draft)
    _lengths(draft, has_dotted=has_dotted)
    draft.put("temperature", number("temperature", draft.take("temperature", 1.0)))
    _kl(draft)
    _losses(draft, algorithm)
    _optimizer(draft)
    if (seed := draft.take("seed")) is not None:
        draft.put("seed", whole("seed", seed))
    draft.put("normalize_rewards_on", 256 if truth("normalize_reward", draft.take("normalize_reward", False)) else 0)
    if truth("gradient_checkpointing", draft.take("gradient_checkpointing", False)):
        draft.put("gradient_checkpointing", True)
    if number("top_p", draft.take("top_p", 1.0)) != 1:
        draft.say("top_p: nothing but temperature is applied to the logits here.")
    if truth("bf16", draft.take("bf16", False)):
        draft.say("bf16: --device cuda computes in bfloat16 over float32 weights; on a CPU, give --precision bfloat16.")
    draft.without_counterpart(_WITHOUT, _DEFAULTS)
    draft.not_needed(*_IDLE)


def _prompts(draft: Draft) -> None:
    if prompts := draft.take("prompt_data"):
        draft.put("prompts", str(prompts))
    if (key := draft.take("input_key", "input")) != "prompt":
        draft.say(f"input_key {shown(key)}: the column is `prompt` here; name it so in the file of prompts.")


def _adapters(draft: Draft) -> None:
    rank, alpha = whole("lora_rank", draft.take("lora_rank", 0)), number("lora_alpha", draft.take("lora_alpha", 16))
    if rank > 0:
        draft.put("sharing", "lora")
        draft.put("lora_rank", rank)
        draft.put("lora_alpha", alpha)
        draft.say("LoRA: adapters on every linear layer, without dropout; policy, critic and reference on one base.")


_NO_CAP = 10**8
"""OpenRLHF's max_samples where none is given."""


def _sizes(draft: Draft) -> None:
    """Prompts and responses per rollout and step, and how many rollouts."""
    group, rollout = counted(draft, "n_samples_per_prompt", 1), counted(draft, "rollout_batch_size", 1024)
    draft.put("prompts_per_iteration", rollout)
    draft.put("responses_per_prompt", group)
    draft.put("batch_size", min(counted(draft, "train_batch_size", 128), rollout * group), "responses")
    draft.put("n_epochs", counted(draft, "max_epochs", 1))
    episodes, most = counted(draft, "num_episodes", 1), counted(draft, "max_samples", _NO_CAP)
    if most >= _NO_CAP:
        draft.say(f"n_iterations is not set: it is the number of prompts x {episodes} / {rollout}.")
        return
    draft.put("n_iterations", max(1, most * episodes // rollout), "max_samples x num_episodes over the rollout")
    draft.say(
        f"max_samples {most} is only a cap: where there are fewer prompts, n_iterations is their number x {episodes} / "
        f"{rollout}."
    )


def _lengths(draft: Draft, *, has_dotted: bool) -> None:
    """Tokens of prompt and response; from 0.10.2 there is one bound for both together."""
    both, response = draft.take("max_len"), draft.take("generate_max_len")
    prompt = draft.take("prompt_max_len")
    if has_dotted and both is None and prompt is None:
        both = 2048
    if response is not None or both is None:
        draft.put("max_new_tokens", 1024 if response is None else whole("generate_max_len", response))
    if prompt is not None or both is None:
        draft.put("max_prompt_tokens", 1024 if prompt is None else whole("prompt_max_len", prompt))
    if both is not None:
        missing = [name for name in ("max_new_tokens", "max_prompt_tokens") if name not in draft.settings]
        draft.say(
            f"max_len {whole('max_len', both)} bounds prompt and response together; here each has its own bound"
            + (f": set {' and '.join(missing)}." if missing else ".")
        )


def _optimizer(draft: Draft) -> None:
    """Learning rate, its schedule, and what is different in Adam."""
    draft.put("learning_rate", number("actor_learning_rate", draft.take("actor_learning_rate", 1e-6)))
    draft.put("max_grad_norm", number("max_norm", draft.take("max_norm", 1.0)))
    given = draft.take("lr_scheduler")
    schedule = "cosine_with_min_lr" if given is None else str(given)
    whose = " (OpenRLHF's default)" if given is None else ""
    warm_up = number("lr_warmup_ratio", draft.take("lr_warmup_ratio", 0.03))
    least = number("min_lr_ratio", draft.take("min_lr_ratio", 0.1))
    draft.put("learning_rate_schedule", "constant" if schedule == "constant" else "linear", f"lr_scheduler {schedule}")
    if schedule not in ("constant", "linear"):
        draft.say(
            f"lr_scheduler {schedule}{whose}: there are constant and linear here; linear to 0 is taken. "
            f"cosine_with_min_lr ends at min_lr_ratio {least:g} of the rate."
        )
    if warm_up > 0:
        draft.say(f"lr_warmup_ratio {warm_up:g}: the learning rate has no warm-up here.")
    betas, epsilon = draft.take("adam_betas", [0.9, 0.95]), number("adam_eps", draft.take("adam_eps", 1e-8))
    draft.say(f"Adam: theirs has betas {shown(betas)} and epsilon {epsilon:g}, here they are 0.9, 0.999 and 1e-5.")


def _losses(draft: Draft, algorithm: str) -> None:
    """The band of the ratio, and the critic."""
    both = draft.take("eps_clip_low_high")
    clip = draft.take("eps_clip", 0.2)
    both = both.split() if isinstance(both, str) else both
    if both is not None and (not isinstance(both, list) or len(both) != 2):
        raise UserError(f"eps_clip_low_high is {shown(both)}; it must be two numbers.")
    low, high = both or (clip, None)
    draft.put("clip_epsilon", number("eps_clip", low))
    if high is not None:
        draft.put("clip_epsilon_high", number("eps_clip_low_high", high))
    if (dual := draft.take("dual_clip")) is not None:
        draft.put("dual_clip", number("dual_clip", dual))
    draft.put("entropy_coef", number("entropy_loss_coef", draft.take("entropy_loss_coef", 0.0)))
    critic = {name: draft.take(name) for name in ("value_clip", "lambd", "gamma", "critic_learning_rate")}
    frozen = whole("freezing_actor_steps", draft.take("freezing_actor_steps", 0))
    if algorithm != "ppo":
        return
    for name, ours, default in (("value_clip", "value_clip_epsilon", 0.5), ("lambd", "gae_lambda", 1.0)):
        draft.put(ours, number(name, default if critic[name] is None else critic[name]))
    draft.put("gamma", number("gamma", 1.0 if critic["gamma"] is None else critic["gamma"]))
    if frozen > 0:
        draft.put("value_pretraining_iterations", frozen)
    if (rate := critic["critic_learning_rate"]) is not None:
        draft.say(
            f"critic_learning_rate {shown(rate)}: actor and critic learn at one rate here; value_coef weighs the "
            "critic."
        )


def _kl(draft: Draft) -> None:
    draft.put("beta", number("init_kl_coef", draft.take("init_kl_coef", 0.01)))
    estimator, in_loss = str(draft.take("kl_estimator", "k1")), truth("use_kl_loss", draft.take("use_kl_loss", False))
    draft.put("kl_in", f"loss_{estimator}" if in_loss and estimator in ("k2", "k3") else "reward")
    if not in_loss and estimator != "k1":
        draft.say(f"kl_estimator {estimator} in the reward: k1 is taken.")
    if (target := draft.take("kl_target")) is not None:
        draft.put("beta_control", "adaptive")
        draft.put("beta_target", number("kl_target", target))
        draft.put("beta_horizon", number("kl_horizon", draft.take("kl_horizon", 10_000)))
