"""TRL: settings of alignment runs, and what OpenRLHF's share with them."""

from __future__ import annotations

import math

from proximo.converting.draft import Draft
from proximo.converting.reading import count, number, truth, whole
from proximo.errors import UserError, shown

_TRAINING_IDLE = (
    *("output_dir", "overwrite_output_dir", "logging_*", "log_*", "save_*", "eval_*", "do_*", "report_to", "run_name"),
    *("push_to_hub*", "hub_*", "dataloader_*", "deepspeed", "fsdp*", "ddp_*", "remove_unused_columns", "disable_tqdm"),
    *("torch_compile*", "torch_empty_cache_steps", "use_liger_kernel", "use_vllm", "ds3_*", "local_rank", "include_*"),
    *("vllm_mode", "vllm_server_*", "vllm_gpu_*", "vllm_tensor_*", "vllm_max_*", "vllm_enable_*", "vllm_model_impl"),
    *("per_device_eval_*", "dataset_num_proc", "exp_name", "project", "trackio_*", "wandb_*", "tf32", "no_cuda"),
    *("use_cpu", "jit_mode_eval", "num_sample_generations", "local_rollout_forward_batch_size", "full_determinism"),
    *("use_transformers_paged", "cache_implementation", "num_generations_eval", "num_completions_to_print"),
    *("attn_implementation", "gradient_checkpointing_kwargs", "trust_remote_code", "model_revision", "lora_task_type"),
)
"""Where results go, and how and where things are computed."""

_NO_WARM_UP = "the learning rate has no warm-up here."
_ADAPTERS = "adapters are on every linear layer here, without dropout, of plain LoRA."
_HELD_IN = (
    "weights are float32 here (--precision computes in bfloat16, --frozen-precision holds those that never learn)."
)

_TRAINING_WITHOUT = {
    "warmup_ratio": _NO_WARM_UP,
    "warmup_steps": _NO_WARM_UP,
    "weight_decay": "Adam has no weight decay here.",
    "fp16": "there are float32 and bfloat16 (--precision).",
    "neftune_noise_alpha": "there is no noise on embeddings here.",
    "optim": "there is Adam alone.",
    "optim_args": "there is Adam alone.",
    "adam_beta1": "Adam's is 0.9 here.",
    "adam_beta2": "Adam's is 0.999 here.",
    "lr_scheduler_kwargs": "there are constant and linear here.",
    "dataset_name": "prompts are a file or folder here: set prompts.",
    "dataset_config": "prompts are a file or folder here: set prompts.",
    "shuffle_dataset": "prompts are shuffled here.",
    "model_init_kwargs": "the model is loaded by its folder or id alone; trust_remote_code stays off.",
    "lora_dropout": _ADAPTERS,
    "lora_target_modules": _ADAPTERS,
    "lora_target_parameters": _ADAPTERS,
    "lora_modules_to_save": _ADAPTERS,
    "use_rslora": _ADAPTERS,
    "use_dora": _ADAPTERS,
    "load_in_4bit": "weights are not quantized here.",
    "load_in_8bit": "weights are not quantized here.",
    "torch_dtype": _HELD_IN,
    "dtype": _HELD_IN,
    "vllm_importance_sampling_correction": "what samples is what learns here, so that there is nothing to correct.",
    "vllm_importance_sampling_cap": "see vllm_importance_sampling_correction.",
    "vllm_importance_sampling_mode": "see vllm_importance_sampling_correction.",
}

_TRAINING_DEFAULTS = {
    "optim": "adamw",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "lora_dropout": 0.05,
    "lora_target_modules": "all-linear",
    "shuffle_dataset": True,
    "torch_dtype": "float32",
    "dtype": "float32",
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_cap": 3.0,
    "vllm_importance_sampling_mode": "sequence_mask",
}

_SAMPLING_WITHOUT = {
    "top_k": "nothing but temperature is applied to the logits here, or log-probs would not be those of the policy.",
    "min_p": "see top_k.",
    "generation_kwargs": "see top_k.",
}


def from_trl_ppo(draft: Draft) -> None:
    """TRL's PPOConfig (trl.experimental.ppo)."""
    draft.put("algorithm", "ppo")
    places(draft, "sft_model_path", "reward_model_path")
    _adapters(draft)
    each, steps = counted(draft, "per_device_train_batch_size", 8), counted(draft, "gradient_accumulation_steps", 1)
    batch = counted(draft, "batch_size", each * steps)
    draft.put("prompts_per_iteration", batch, "per_device_train_batch_size x gradient_accumulation_steps")
    draft.put("responses_per_prompt", 1)
    draft.put("batch_size", _step_of_trl_ppo(draft, each, steps, batch), "responses per step of the optimizer")
    draft.put("n_epochs", counted(draft, "num_ppo_epochs", 4))
    if (episodes := draft.take("total_episodes")) is not None:
        draft.put("n_iterations", math.ceil(whole("total_episodes", episodes) / batch), "total_episodes over the batch")
    else:
        draft.take("num_train_epochs")
        draft.say("total_episodes is not there: set n_iterations to it over prompts_per_iteration.")
    draft.put("max_new_tokens", counted(draft, "response_length", 53))
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
    if (norm := number("max_grad_norm", draft.take("max_grad_norm", 1.0))) > 0:
        draft.put("max_grad_norm", norm, "which TRL's PPO does not read")
    draft.put("normalize_rewards_on", 0, "TRL takes the reward model's scores as they are")
    if draft.take("kl_estimator", "k1") != "k1":
        draft.say("kl_estimator k3 in the reward: k1 is taken; k3 is for the loss here (kl_in loss_k3).")
    ends = draft.take("stop_token"), draft.take("stop_token_id")
    if ends[0] != "eos":
        draft.say(
            f"stop_token is {shown(ends[0])}, stop_token_id {shown(ends[1])}: here a response ends at the EOS token "
            "(or --no-stop-at-eos), and at the texts of --stop."
        )
    draft.without_counterpart({"whiten_rewards": "rewards are not whitened here."})
    _training(draft)
    shaping = {name: "reward shaping belongs into the reward function." for name in draft.theirs if "shaping" in name}
    draft.without_counterpart(shaping)
    draft.not_needed(*_TRAINING_IDLE, "world_size", "num_total_batches", "reward_shaping_*")
    draft.not_needed("micro_batch_size", "local_batch_size", "local_mini_batch_size", "mini_batch_size")
    draft.not_needed("model_adapter_name", "ref_adapter_name", "processing_class", "kl_estimator")
    draft.say(
        "Advantages: TRL whitens them once over the batch, Proximo in each minibatch (--no-normalize-advantages leaves "
        "them). TRL's PPO reads max_grad_norm nowhere; here the gradient is clipped to it."
    )
    draft.say(
        "Processes: the sizes are those of one; multiply prompts_per_iteration and batch_size where there were more."
    )


def _step_of_trl_ppo(draft: Draft, each: int, steps: int, batch: int) -> int:
    """Responses per step of the optimizer: one is taken after `steps` micro-batches, across borders of minibatches."""
    minibatch = max(1, batch // counted(draft, "num_mini_batches", 1))
    per_step = min(batch, steps * min(each, minibatch))
    if per_step != minibatch:
        draft.say(
            f"batch_size: TRL's minibatch is {minibatch}, but its optimizer steps after gradient_accumulation_steps "
            f"{steps} micro-batches of {min(each, minibatch)}, across minibatches: {per_step} responses to a step."
        )
    return per_step


def from_trl_grpo(draft: Draft) -> None:
    """TRL's GRPOConfig."""
    draft.put("algorithm", "grpo")
    places(draft, "model_name_or_path", "reward_model_name_or_path")
    _adapters(draft)
    each, steps = counted(draft, "per_device_train_batch_size", 8), counted(draft, "gradient_accumulation_steps", 1)
    per_generation = counted(draft, "steps_per_generation", steps)
    responses = counted(draft, "generation_batch_size", each * per_generation)
    group, epochs = counted(draft, "num_generations", 8), counted(draft, "num_iterations", 1)
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
    draft.put("max_new_tokens", counted(draft, "max_completion_length", 256))
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
    draft.without_counterpart(_SAMPLING_WITHOUT | _GRPO_WITHOUT, _GRPO_DEFAULTS)
    _training(draft)
    draft.not_needed(*_TRAINING_IDLE, "reward_funcs", "disable_dropout", "ref_model_*", "sapo_*", "max_tool_*")
    draft.not_needed("cast_lm_head_to_fp32")
    draft.say(
        "Processes: the sizes are those of one; multiply prompts_per_iteration and batch_size where there were more."
    )


_GRPO_WITHOUT = {
    "sync_ref_model": "the reference never moves here.",
    "tools": "there are no tools here.",
    "multi_objective_aggregation": "rewards are added up by their weights, then the group is normalized.",
    "chat_template_kwargs": "the template is filled with the messages alone.",
}
_GRPO_DEFAULTS = {"multi_objective_aggregation": "sum_then_normalize"}


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


# --- what they share ----------------------------------------------------------------------------------------------


def counted(draft: Draft, name: str, default: int) -> int:
    """A setting of theirs that is a whole number from 1 on."""
    return count(name, draft.take(name, default))


def _split(places: object) -> list[str]:
    """Reward models, several of which OpenRLHF takes with commas between them."""
    parts = places if isinstance(places, list) else str(places).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def places(draft: Draft, model: str, reward: str) -> None:
    """Which model, and which reward model."""
    for name, ours in ((model, "model"), (reward, "reward")):
        if (place := draft.take(name)) is None:
            draft.say(f"{ours} is not there: set it, or give --{ours}.")
        else:
            draft.put(ours, str(place) if ours == "model" else _split(place))
    if "prompt_data" not in draft.theirs:
        draft.say("prompts is not there: set it, or give --prompts.")


def _adapters(draft: Draft) -> None:
    """LoRA, which TRL has with use_peft alone."""
    if truth("use_peft", draft.take("use_peft", False)):
        draft.put("sharing", "lora")
        draft.put("lora_rank", counted(draft, "lora_r", 16))
        draft.put("lora_alpha", number("lora_alpha", draft.take("lora_alpha", 32)))
        draft.say("LoRA: adapters on every linear layer, without dropout; policy, critic and reference on one base.")
        return
    if any(name.startswith("lora_") for name in draft.theirs):
        draft.say("lora_*: without use_peft TRL reads them not, and all weights learn, as here.")
    for name in ("lora_r", "lora_alpha", *(name for name in _TRAINING_WITHOUT if _TRAINING_WITHOUT[name] is _ADAPTERS)):
        draft.take(name)  # of no effect without use_peft


def _training(draft: Draft) -> None:
    """What Hugging Face's TrainingArguments and TRL's ModelConfig have beyond Proximo."""
    if str(draft.theirs.get("optim", "")).startswith("adamw_torch"):
        draft.take("optim")
    draft.without_counterpart(_TRAINING_WITHOUT, _TRAINING_DEFAULTS)


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
    draft.say(f"Adam: epsilon is 1e-5 here, theirs {epsilon:g}. Betas are 0.9 and 0.999 here.")
