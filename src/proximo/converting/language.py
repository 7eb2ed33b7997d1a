"""TRL and OpenRLHF: settings of alignment runs."""

from __future__ import annotations

import math

from proximo.converting.draft import Draft
from proximo.converting.reading import count, number, truth, whole
from proximo.errors import UserError, shown

_TRAINING_IDLE = (
    *("output_dir", "overwrite_output_dir", "logging_*", "log_*", "save_*", "eval_*", "do_*", "report_to", "run_name"),
    *("push_to_hub*", "hub_*", "dataloader_*", "deepspeed", "fsdp*", "ddp_*", "torch_*", "remove_unused_columns"),
    *(
        "disable_tqdm",
        "use_liger_kernel",
        "vllm_*",
        "use_vllm",
        "ds3_*",
        "local_rank",
        "include_*",
        "per_device_eval_*",
    ),
    *("dataset_num_proc", "exp_name", "project", "trackio_*", "wandb_*", "tf32", "no_cuda", "use_cpu", "jit_mode_eval"),
    *("num_sample_generations", "local_rollout_forward_batch_size", "use_transformers_paged", "cache_implementation"),
    *("num_generations_eval", "num_completions_to_print", "attn_implementation", "shuffle_dataset", "full_determinism"),
)

_TRAINING_WITHOUT = {
    "warmup_ratio": "the learning rate has no warm-up here.",
    "warmup_steps": "the learning rate has no warm-up here.",
    "weight_decay": "Adam has no weight decay here.",
    "fp16": "there are float32 and bfloat16 (--precision).",
    "neftune_noise_alpha": "there is no noise on embeddings here.",
    "optim_args": "there is Adam alone.",
    "dataset_name": "prompts are a file or folder here: set prompts.",
    "dataset_config": "prompts are a file or folder here: set prompts.",
    "model_init_kwargs": "the model is loaded by its folder or id alone; trust_remote_code stays off.",
}

_SAMPLING_WITHOUT = {
    "top_k": "nothing but temperature is applied to the logits here, or log-probs would not be those of the policy.",
    "min_p": "see top_k.",
    "generation_kwargs": "see top_k.",
}


def from_trl_ppo(draft: Draft) -> None:
    """TRL's PPOConfig (trl.experimental.ppo)."""
    draft.put("algorithm", "ppo")
    _places(draft, "sft_model_path", "reward_model_path")
    per_step = _count(draft, "per_device_train_batch_size", 8) * _count(draft, "gradient_accumulation_steps", 1)
    batch = _count(draft, "batch_size", per_step)
    draft.put("prompts_per_iteration", batch, "per_device_train_batch_size x gradient_accumulation_steps")
    draft.put("responses_per_prompt", 1)
    draft.put("batch_size", max(1, batch // _count(draft, "num_mini_batches", 1)))
    draft.put("n_epochs", _count(draft, "num_ppo_epochs", 4))
    if (episodes := draft.take("total_episodes")) is not None:
        draft.put("n_iterations", math.ceil(whole("total_episodes", episodes) / batch), "total_episodes over the batch")
    else:
        draft.take("num_train_epochs")
        draft.say("total_episodes is not there: set n_iterations to it over prompts_per_iteration.")
    draft.put("max_new_tokens", _count(draft, "response_length", 53))
    draft.put("temperature", number("temperature", draft.take("temperature", 0.7)))
    draft.put("missing_eos_penalty", number("missing_eos_penalty", draft.take("missing_eos_penalty", 0.0)))
    draft.put("beta", number("kl_coef", draft.take("kl_coef", 0.05)))
    draft.put("kl_in", "reward")
    numbers = (("cliprange", "clip_epsilon", 0.2), ("cliprange_value", "value_clip_epsilon", 0.2))
    for theirs, ours, default in (*numbers, ("gamma", "gamma", 1.0), ("lam", "gae_lambda", 0.95)):
        draft.put(ours, number(theirs, draft.take(theirs, default)))
    coefficient = number("vf_coef", draft.take("vf_coef", 0.1))
    draft.put("value_coef", coefficient / 2, f"theirs is {coefficient:g}, of half the squared error")
    _optimizer(draft, 3e-6)
    draft.put("normalize_rewards_on", 0, "TRL takes the reward model's scores as they are")
    if draft.take("kl_estimator", "k1") != "k1":
        draft.say("kl_estimator k3 in the reward: k1 is taken; k3 is for the loss here (kl_in loss_k3).")
    ends = draft.take("stop_token"), draft.take("stop_token_id")
    if ends[0] != "eos":
        draft.say(
            f"stop_token is {shown(ends[0])}, stop_token_id {shown(ends[1])}: here a response ends at the EOS token "
            "(or --no-stop-at-eos), and at the texts of --stop."
        )
    draft.without_counterpart({"whiten_rewards": "rewards are not whitened here."} | _TRAINING_WITHOUT)
    shaping = {name: "reward shaping belongs into the reward function." for name in draft.theirs if "shaping" in name}
    draft.without_counterpart(shaping)
    draft.not_needed(*_TRAINING_IDLE, "world_size", "num_total_batches", "reward_shaping_*")
    draft.not_needed("micro_batch_size", "local_batch_size", "local_mini_batch_size", "mini_batch_size")
    draft.not_needed("model_adapter_name", "ref_adapter_name", "processing_class", "kl_estimator")
    draft.say(
        "Advantages: TRL whitens them once over the batch, Proximo in each minibatch (--no-normalize-advantages leaves "
        "them). TRL's PPO reads max_grad_norm nowhere; here the gradient is clipped to it (1.0)."
    )
    draft.say(
        "Processes: the sizes are those of one; multiply prompts_per_iteration and batch_size where there were more."
    )


def from_trl_grpo(draft: Draft) -> None:
    """TRL's GRPOConfig."""
    draft.put("algorithm", "grpo")
    _places(draft, "model_name_or_path", "reward_model_name_or_path")
    each, steps = _count(draft, "per_device_train_batch_size", 8), _count(draft, "gradient_accumulation_steps", 1)
    per_generation = _count(draft, "steps_per_generation", steps)
    responses = _count(draft, "generation_batch_size", each * per_generation)
    group, epochs = _count(draft, "num_generations", 8), _count(draft, "num_iterations", 1)
    if responses % group:
        raise UserError(
            f"A generation has {responses} responses, which num_generations {group} does not divide; TRL refuses that, "
            "too. Mend per_device_train_batch_size, steps_per_generation or num_generations."
        )
    draft.put("prompts_per_iteration", responses // group, f"{responses} responses, {group} to each prompt")
    draft.put("responses_per_prompt", group)
    draft.put("batch_size", min(each * steps, responses), "responses per step of the optimizer")
    draft.put("n_epochs", epochs)
    most = whole("max_steps", draft.take("max_steps", -1))
    if most > 0:
        updates = max(1, responses // (each * steps)) * epochs
        draft.put("n_iterations", max(1, most // updates), f"max_steps over {updates} steps per generation")
    else:
        draft.say(f"n_iterations is not set: it is the rows of the dataset x num_train_epochs / {responses // group}.")
    draft.take("num_train_epochs")
    draft.put("max_new_tokens", _count(draft, "max_completion_length", 256))
    if (longest := draft.take("max_prompt_length")) is not None:
        draft.put("max_prompt_tokens", whole("max_prompt_length", longest))
        draft.put("over_long", "truncate")
    draft.put("temperature", number("temperature", draft.take("temperature", 1.0)))
    draft.put("beta", number("beta", draft.take("beta", 0.0)))
    draft.put("kl_in", "loss_k3")
    draft.put("clip_epsilon", number("epsilon", draft.take("epsilon", 0.2)))
    if (high := draft.take("epsilon_high")) is not None:
        draft.put("clip_epsilon_high", number("epsilon_high", high))
    if (delta := draft.take("delta")) is not None:
        draft.put("dual_clip", number("delta", delta), "delta: the same bound, where the advantage is negative")
    _loss_of_grpo(draft)
    _optimizer(draft, 1e-6)
    draft.put("max_grad_norm", number("max_grad_norm", draft.take("max_grad_norm", 1.0)))
    if truth("mask_truncated_completions", draft.take("mask_truncated_completions", False)):
        draft.put("truncation", "mask")
    if weights := draft.take("reward_weights"):
        draft.say(f"reward_weights {shown(weights)}: set reward_weights beside the rewards.")
    draft.put("normalize_rewards_on", 0, "TRL takes scores as they are")
    for name in ("top_p", "repetition_penalty"):
        if number(name, draft.take(name, 1.0)) != 1:
            draft.say(f"{name}: nothing but temperature is applied to the logits here.")
    draft.without_counterpart(_SAMPLING_WITHOUT | _TRAINING_WITHOUT | _GRPO_WITHOUT)
    draft.not_needed(*_TRAINING_IDLE, "reward_funcs", "disable_dropout", "ref_model_*", "sapo_*", "max_tool_*")
    draft.not_needed("cast_lm_head_to_fp32", "multi_objective_aggregation", "chat_template_kwargs", "scale_rewards")
    draft.say(
        "Processes: the sizes are those of one; multiply prompts_per_iteration and batch_size where there were more."
    )


_GRPO_WITHOUT = {
    "sync_ref_model": "the reference never moves here.",
    "tools": "there are no tools here.",
}


def _loss_of_grpo(draft: Draft) -> None:
    """loss_type and scale_rewards as weighing and baseline."""
    loss = str(draft.take("loss_type", "dapo"))
    weighing = {"grpo": "rows", "dapo": "steps", "bnpo": "steps", "dr_grpo": "longest"}
    if loss not in weighing:
        draft.say(f"loss_type {loss} is not here; the clipped loss over all tokens (dapo) is taken. Do not compare.")
    if loss == "bnpo":
        draft.say("loss_type bnpo: the mean is over the whole minibatch here, however it is cut (as dapo in TRL).")
    draft.put("weighing", weighing.get(loss, "steps"), f"loss_type {loss}")
    scale = str(draft.take("scale_rewards", "group")).lower()
    baseline = {"group": "group_std", "true": "group_std", "none": "group_mean", "false": "group_mean"}
    if scale not in baseline:
        draft.say(f"scale_rewards {scale}: there are the group's standard deviation and none; the former is taken.")
    draft.put("baseline", baseline.get(scale, "group_std"), f"scale_rewards {scale}")
    if str(draft.take("importance_sampling_level", "token")) != "token":
        draft.say("importance_sampling_level sequence (GSPO) is not here: ratios are per token. Do not compare.")
    if number("top_entropy_quantile", draft.take("top_entropy_quantile", 1.0)) != 1:
        draft.say("top_entropy_quantile: all tokens count here.")


# --- OpenRLHF ---------------------------------------------------------------------------------------------------

_ESTIMATORS = {"gae": "ppo", "group_norm": "grpo", "dr_grpo": "dr_grpo", "rloo": "rloo"}
_OPENRLHF_IDLE = (
    *("vllm_*", "ref_num_*", "actor_num_*", "critic_num_*", "reward_num_*", "colocate_*", "zero_stage", "adam_offload"),
    *("save_*", "ckpt_path", "load_checkpoint", "use_wandb", "wandb_*", "use_tensorboard", "logging_steps", "eval_*"),
    *("flash_attn", "attn_implementation", "packing_samples", "ring_*", "enable_*", "async_*", "deepspeed_*", "ray_*"),
    *(
        "micro_rollout_batch_size",
        "disable_*",
        "input_key",
        "label_key",
        "apply_chat_template",
        "max_ckpt_*",
        "overlap_*",
    ),
)


def from_openrlhf(draft: Draft) -> None:
    """Flags of OpenRLHF's train_ppo_ray, by their names."""
    estimator = str(draft.take("advantage_estimator", "gae"))
    if estimator not in _ESTIMATORS:
        raise UserError(f"advantage_estimator is {estimator}, which is not here. There are: {', '.join(_ESTIMATORS)}.")
    algorithm = _ESTIMATORS[estimator]
    draft.put("algorithm", algorithm)
    _places(draft, "pretrain", "reward_pretrain")
    if prompts := draft.take("prompt_data"):
        draft.put("prompts", str(prompts))
    group, rollout = _count(draft, "n_samples_per_prompt", 1), _count(draft, "rollout_batch_size", 1024)
    draft.put("prompts_per_iteration", rollout)
    draft.put("responses_per_prompt", group)
    draft.put("batch_size", min(_count(draft, "train_batch_size", 128), rollout * group), "responses")
    draft.put("n_epochs", _count(draft, "max_epochs", 1))
    episodes, samples = _count(draft, "num_episodes", 1), draft.take("max_samples")
    if samples is not None:
        total = whole("max_samples", samples) * episodes
        draft.put("n_iterations", max(1, total // rollout), "max_samples x num_episodes over the rollout")
    else:
        draft.say(f"n_iterations is not set: it is the number of prompts x {episodes} / {rollout}.")
    draft.put("max_new_tokens", _count(draft, "generate_max_len", 1024))
    draft.put("max_prompt_tokens", _count(draft, "prompt_max_len", 1024))
    draft.put("temperature", number("temperature", draft.take("temperature", 1.0)))
    _kl_of_openrlhf(draft)
    _losses_of_openrlhf(draft, algorithm)
    draft.put("max_grad_norm", number("max_norm", draft.take("max_norm", 1.0)))
    if (seed := draft.take("seed")) is not None:
        draft.put("seed", whole("seed", seed))
    draft.put("normalize_rewards_on", 256 if draft.take("normalize_reward") else 0)
    if truth("gradient_checkpointing", draft.take("gradient_checkpointing", False)):
        draft.put("gradient_checkpointing", True)
    if number("top_p", draft.take("top_p", 1.0)) != 1:
        draft.say("top_p: nothing but temperature is applied to the logits here.")
    draft.without_counterpart(
        {
            "reward_clip_range": "scores are not clipped here.",
            "l2": "Adam has no weight decay here.",
            "lr_warmup_ratio": "the learning rate has no warm-up here.",
            "remote_rm_url": "an endpoint is asked with --reward judge, or by a function of yours.",
            "dynamic_filtering": "groups that are all alike are counted (groups_alike), not replaced.",
        }
    )
    draft.take("micro_train_batch_size")
    draft.take("lr_scheduler")
    draft.not_needed(*_OPENRLHF_IDLE, "bf16", "param_dtype", "agent_func_path", "lora_rank", "load_in_4bit")


def _losses_of_openrlhf(draft: Draft, algorithm: str) -> None:
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
    draft.put("learning_rate", number("actor_learning_rate", draft.take("actor_learning_rate", 1e-6)))
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
            f"critic_learning_rate {rate}: actor and critic learn at one rate here; value_coef weighs the critic."
        )


def _kl_of_openrlhf(draft: Draft) -> None:
    draft.put("beta", number("init_kl_coef", draft.take("init_kl_coef", 0.01)))
    estimator, in_loss = str(draft.take("kl_estimator", "k1")), truth("use_kl_loss", draft.take("use_kl_loss", False))
    draft.put("kl_in", f"loss_{estimator}" if in_loss and estimator in ("k2", "k3") else "reward")
    if not in_loss and estimator != "k1":
        draft.say(f"kl_estimator {estimator} in the reward: k1 is taken.")
    if (target := draft.take("kl_target")) is not None:
        draft.put("beta_control", "adaptive")
        draft.put("beta_target", number("kl_target", target))
        draft.put("beta_horizon", number("kl_horizon", draft.take("kl_horizon", 10_000)))


# --- what they share ----------------------------------------------------------------------------------------------


def _count(draft: Draft, name: str, default: int) -> int:
    return count(name, draft.take(name, default))


def _places(draft: Draft, model: str, reward: str) -> None:
    """Which model, and which reward model."""
    for name, ours in ((model, "model"), (reward, "reward")):
        if (place := draft.take(name)) is None:
            draft.say(f"{ours} is not there: set it, or give --{ours}.")
        else:
            draft.put(ours, str(place) if ours == "model" else [str(place)])
    if "prompt_data" not in draft.theirs:
        draft.say("prompts is not there: set it, or give --prompts.")
    if draft.take("use_peft"):
        draft.put("sharing", "lora")
        draft.put("lora_rank", _count(draft, "lora_r", 16))
        draft.put("lora_alpha", number("lora_alpha", draft.take("lora_alpha", 32)))
        draft.say("LoRA: adapters on every linear layer, policy, critic and reference on one base.")
    draft.not_needed("lora_*", "load_in_*bit", "trust_remote_code", "model_revision", "torch_dtype", "dtype")


def _optimizer(draft: Draft, rate: float) -> None:
    """Learning rate, schedule, seed and precision of Hugging Face's TrainingArguments."""
    draft.put("learning_rate", number("learning_rate", draft.take("learning_rate", rate)))
    schedule = str(draft.take("lr_scheduler_type", "linear"))
    if schedule not in ("linear", "constant"):
        draft.say(f"lr_scheduler_type {schedule}: there are constant and linear here; linear is taken.")
    draft.put("learning_rate_schedule", "constant" if schedule == "constant" else "linear")
    draft.put("seed", whole("seed", draft.take("seed", 42)))
    if truth("gradient_checkpointing", draft.take("gradient_checkpointing", False)):
        draft.put("gradient_checkpointing", True)
    if (half := draft.take("bf16")) is not None:
        draft.say("bf16: --device cuda computes in bfloat16 over float32 weights; on a CPU, give --precision bfloat16.")
        truth("bf16", half)
    epsilon = number("adam_epsilon", draft.take("adam_epsilon", 1e-8))
    draft.say(f"Adam: epsilon is 1e-5 here, theirs {epsilon:g}; betas are 0.9 and 0.999.")
    draft.not_needed("adam_beta1", "adam_beta2", "optim", "lr_scheduler_kwargs", "gradient_checkpointing_kwargs")
