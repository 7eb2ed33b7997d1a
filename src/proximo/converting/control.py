"""Stable-Baselines3, RL Baselines3 Zoo and CleanRL: settings of control runs."""

from __future__ import annotations

import re
from typing import Any

from proximo.converting.draft import Draft
from proximo.converting.reading import Word, count, expression, number, truth, whole, without_none
from proximo.errors import UserError, shown

_IDLE = ("verbose", "tensorboard_log", "device", "stats_window_size", "_init_setup_model", "rollout_buffer_*")

_SB3 = "SB3's default"
_CONTRIB = "sb3-contrib's default"


def from_sb3(draft: Draft, env_id: str | None, *, recurrent: bool) -> None:
    """Arguments of `PPO(...)`, or `RecurrentPPO(...)`, and what RL Zoo writes beside them."""
    policy = str(draft.take("policy", ""))
    recurrent = recurrent or "Lstm" in policy
    whose = _CONTRIB if recurrent else _SB3
    if env_id is not None:
        draft.put("env_id", env_id)
    _sizes(draft, whose, recurrent=recurrent)
    rates = (("learning_rate", "learning_rate", "learning_rate_schedule", 3e-4),)
    for theirs, ours, schedule, default in (*rates, ("clip_range", "clip_epsilon", "clip_schedule", 0.2)):
        _scheduled(draft, theirs, ours, schedule, default, whose)
    for theirs, ours, default in _NUMBERS:
        given = draft.take(theirs)
        draft.put(ours, number(theirs, default if given is None else given), whose if given is None else "")
    normalizes = truth("normalize_advantage", draft.take("normalize_advantage", True))
    draft.put("normalize_advantages", normalizes)
    _value_clip(draft)
    if (kl := draft.take("target_kl")) is not None:
        draft.put("target_kl", number("target_kl", kl))
        draft.say("target_kl: both stop at 1.5 times it; SB3 by the minibatch's KL, as here.")
    if (seed := draft.take("seed")) is not None:
        draft.put("seed", whole("seed", seed))
    _normalizers(draft)
    same = ["Adam with epsilon 1e-5"] if _networks(draft, policy, recurrent=recurrent) else []
    same += ["advantages normalized per minibatch"] if normalizes else []
    _environment(draft, env_id)
    draft.not_needed(*_IDLE)
    draft.say(
        f"The same in both: {', '.join([*same, 'a value loss without the factor 1/2'])}, the value of the true last "
        "observation where an episode is truncated."
    )


_NUMBERS = (
    ("gamma", "gamma", 0.99),
    ("gae_lambda", "gae_lambda", 0.95),
    ("ent_coef", "entropy_coef", 0.0),
    ("vf_coef", "value_coef", 0.5),
    ("max_grad_norm", "max_grad_norm", 0.5),
)


def _sizes(draft: Draft, whose: str, *, recurrent: bool) -> None:
    """Steps in all, per rollout and per minibatch."""
    given = {name: draft.take(name) for name in ("n_timesteps", "n_envs", "n_steps", "batch_size", "n_epochs")}
    by_default = {"n_timesteps": 1_000_000, "n_envs": 1, "n_steps": 128 if recurrent else 2048}
    by_default |= {"batch_size": 128 if recurrent else 64, "n_epochs": 10}
    sizes = {name: count(name, by_default[name] if value is None else value) for name, value in given.items()}
    said = {name: "" if given[name] is not None else whose for name in given}
    rollout = sizes["n_envs"] * sizes["n_steps"]
    if given["n_timesteps"] is None:
        said["n_timesteps"] = "there was none"
        draft.say("n_timesteps is not there (SB3 has it in model.learn): set total_steps.")
    if sizes["n_timesteps"] < rollout:
        draft.say(f"n_timesteps {sizes['n_timesteps']} is less than a rollout; SB3 plays one whole rollout, as here.")
        sizes["n_timesteps"] = rollout
    elif sizes["n_timesteps"] % rollout:
        draft.say("n_timesteps is no multiple of a rollout: SB3 goes past it by the rest, Proximo stops before it.")
    if sizes["batch_size"] > rollout:
        said["batch_size"] = f"theirs is {sizes['batch_size']}, of which a rollout of {rollout} fills one minibatch"
        sizes["batch_size"] = rollout
    elif rollout % sizes["batch_size"]:
        draft.say(
            "batch_size does not divide a rollout: SB3's last minibatch is small, here all are of nearly one size."
        )
    draft.put("total_steps", sizes["n_timesteps"], said["n_timesteps"])
    draft.put("n_envs", sizes["n_envs"], said["n_envs"] and "RL Zoo's default")
    draft.put("rollout_length", sizes["n_steps"], said["n_steps"])
    draft.put("batch_size", sizes["batch_size"], said["batch_size"])
    draft.put("n_epochs", sizes["n_epochs"], said["n_epochs"])


def _scheduled(draft: Draft, theirs: str, ours: str, schedule: str, default: float, whose: str) -> None:
    """A number, or one that RL Zoo brings down to 0: lin_3e-4."""
    given = draft.take(theirs)
    kind, value = "constant", default if given is None else given
    if isinstance(value, str) and "_" in value:
        kind, _, value = value.partition("_")
        if kind != "lin":
            draft.say(f"{theirs} = {given}: schedules are constant or linear here; linear is taken.")
        kind = "linear"
    draft.put(ours, number(theirs, value), whose if given is None else "")
    draft.put(schedule, kind)


def _value_clip(draft: Draft) -> None:
    given = draft.take("clip_range_vf")
    if given is None or (isinstance(given, (int, float)) and given < 0):
        draft.put("value_clip_epsilon", "none")
        return
    if isinstance(given, str) and given.startswith("lin_"):
        draft.say(f"clip_range_vf = {given}: it does not go down here.")
        given = given.removeprefix("lin_")
    draft.put("value_clip_epsilon", number("clip_range_vf", given))
    draft.say(
        "clip_range_vf: SB3 takes the clipped value error alone, Proximo the worse of both (as OpenAI baselines)."
    )


def _normalizers(draft: Draft) -> None:
    """VecNormalize, as RL Zoo has it: true, or a text or table of its arguments."""
    given = draft.take("normalize", False)
    kwargs = expression("normalize_kwargs", draft.take("normalize_kwargs", {}))
    is_on = truth("normalize", given) if isinstance(given, (bool, int)) else True
    if not isinstance(given, (bool, int)):
        kwargs = expression("normalize", given) | kwargs
    draft.put("normalize_observations", is_on and truth("norm_obs", kwargs.pop("norm_obs", True)))
    draft.put("normalize_rewards", is_on and truth("norm_reward", kwargs.pop("norm_reward", True)))
    for theirs, ours in (("clip_obs", "clip_observation"), ("clip_reward", "clip_reward")):
        if theirs in kwargs:
            draft.put(ours, number(theirs, kwargs.pop(theirs)))
    if "gamma" in kwargs:
        kwargs.pop("gamma")
        draft.say("VecNormalize's gamma: the reward scale takes the run's own gamma here.")
    kwargs.pop("epsilon", None)
    kwargs.pop("training", None)
    if kwargs:
        draft.say(f"normalize has {', '.join(sorted(kwargs))}, which Proximo does not know.")
    if is_on:
        draft.say(
            "VecNormalize changes its moments at every step of a rollout, Proximo's normalizer between rollouts, so "
            "that the first ratio is 1. Both clip at 10. Here it is saved with the policy, and frozen in evaluation."
        )


_ACTIVATIONS = {"ReLU": "relu", "Tanh": "tanh"}


def _networks(draft: Draft, policy: str, *, recurrent: bool) -> bool:
    """policy, policy_kwargs and the arguments of gSDE; whether the optimizer is SB3's own."""
    kwargs = expression("policy_kwargs", draft.take("policy_kwargs", {}))
    arch = kwargs.pop("net_arch", None)
    if arch is None and policy.startswith("Cnn"):
        draft.say("CnnPolicy: --encoder auto takes the same Nature CNN for images, shared by actor and critic.")
    else:
        draft.put("hidden_sizes", _hidden_sizes(draft, arch), _SB3 if arch is None else "")
    activation = kwargs.pop("activation_fn", Word("nn.Tanh"))
    name = str(activation).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        draft.say(f"activation_fn {activation}: there are tanh and relu here; relu is taken.")
    draft.put("activation", _ACTIVATIONS.get(name, "relu"))
    draft.put("orthogonal_init", truth("ortho_init", kwargs.pop("ortho_init", True)))
    draft.put("log_std_init", number("log_std_init", kwargs.pop("log_std_init", 0.0)))
    draft.put("rescale_actions", False, "SB3's policies act in the environment's own units")
    _noise(draft, kwargs)
    if recurrent:
        _memory(draft, kwargs)
    is_theirs = _optimizer(draft, kwargs)
    for name, reason in _POLICY_KWARGS.items():
        if (value := kwargs.pop(name, None)) is not None:
            draft.say(f"policy_kwargs {name} = {shown(value)}: {reason}")
    if kwargs:
        draft.say(f"policy_kwargs has {', '.join(sorted(kwargs))}, which Proximo does not know.")
    return is_theirs


def _optimizer(draft: Draft, kwargs: dict[str, Any]) -> bool:
    """optimizer_class and optimizer_kwargs; whether they leave SB3's Adam with epsilon 1e-5."""
    chosen, given = kwargs.pop("optimizer_class", None), kwargs.pop("optimizer_kwargs", None)
    is_adam = chosen is None or str(chosen).rpartition(".")[2] == "Adam"
    if not is_adam:
        draft.say(f"policy_kwargs optimizer_class = {shown(chosen)}: there is Adam alone.")
    if given is None:
        return is_adam
    if is_adam and isinstance(given, dict):
        theirs = {"eps": 1e-8, "betas": [0.9, 0.999]} | given
        said = ", ".join(f"{name} {shown(value)}" for name, value in theirs.items())
        draft.say(
            f"policy_kwargs optimizer_kwargs: SB3's epsilon of 1e-5 holds only without them, theirs has {said}. Here "
            "Adam has eps 1e-5 and betas 0.9 and 0.999."
        )
    else:
        draft.say(f"policy_kwargs optimizer_kwargs = {shown(given)}: Adam has eps 1e-5 and betas 0.9 and 0.999 here.")
    return False


_POLICY_KWARGS = {
    "features_extractor_class": "networks are perceptrons or CNNs by --encoder; another one means editing "
    "models/networks.py.",
    "features_extractor_kwargs": "see features_extractor_class.",
    "share_features_extractor": "actor and critic share what sees images, and nothing else.",
    "normalize_images": "bytes are always divided by 255.",
    "full_std": "gsde always has a deviation for each feature and action.",
    "use_expln": "gsde has the exponential alone.",
    "squash_output": "a squashed Gaussian is --distribution squashed_gaussian, without gsde.",
}


def _hidden_sizes(draft: Draft, arch: Any) -> list[int]:
    """Widths from [64, 64], dict(pi=..., vf=...), or the [dict(pi=..., vf=...)] of older versions."""
    if arch is None:
        return [64, 64]
    parts = arch if isinstance(arch, list) else [arch]
    shared = [part for part in parts if not isinstance(part, dict)]
    tables = [part for part in parts if isinstance(part, dict)]
    if not tables:
        return [whole("net_arch", size) for size in shared]
    actor, critic = tables[-1].get("pi", []), tables[-1].get("vf", [])
    if not isinstance(actor, list) or not isinstance(critic, list):
        raise UserError(f"net_arch is {shown(arch)}; pi and vf must be lists of widths.")
    if shared:
        draft.say(f"net_arch begins with {shared}, shared by actor and critic: each has its own here.")
    if actor != critic:
        draft.say(f"net_arch has {critic} for the critic: both have the actor's widths here.")
    return [whole("net_arch", size) for size in shared + actor]


def _noise(draft: Draft, kwargs: dict[str, Any]) -> None:
    uses_sde = truth("use_sde", draft.take("use_sde", kwargs.pop("use_sde", False)))
    frequency = draft.take("sde_sample_freq", -1)
    if uses_sde:
        draft.put("distribution", "gsde")
        draft.put("sde_sample_freq", whole("sde_sample_freq", frequency))
        draft.say("gsde: log_std_init is that at features of mean square 1 here; SB3's grows with the width.")
    else:
        draft.put("distribution", "gaussian")


def _memory(draft: Draft, kwargs: dict[str, Any]) -> None:
    draft.put("memory", "lstm")
    draft.put("memory_size", whole("lstm_hidden_size", kwargs.pop("lstm_hidden_size", 256)))
    draft.put("memory_layers", whole("n_lstm_layers", kwargs.pop("n_lstm_layers", 1)))
    draft.put("shared_memory", truth("shared_lstm", kwargs.pop("shared_lstm", False)))
    if not truth("enable_critic_lstm", kwargs.pop("enable_critic_lstm", True)) and not draft.settings["shared_memory"]:
        draft.say("enable_critic_lstm False: the critic has an LSTM here. --shared-memory gives both the same one.")
    kwargs.pop("lstm_kwargs", None)
    draft.say("Memory: pieces of sequence_length steps are learned from, sb3-contrib cuts where its minibatches end.")


def _environment(draft: Draft, env_id: str | None) -> None:
    """Wrappers, frames and arguments of the environment."""
    if kwargs := draft.take("env_kwargs"):
        draft.put("env_kwargs", without_none(expression("env_kwargs", kwargs)))
    wrapper, frames = draft.take("env_wrapper"), draft.take("frame_stack")
    if env_id is not None and env_id.startswith("ALE/"):
        draft.put("vectorization", "native")
        draft.put("episodic_life", "terminal_on_life_loss': False" not in repr(wrapper))
        draft.put("sign_rewards", "clip_reward': False" not in repr(wrapper))
        draft.say("AtariWrapper and frame_stack 4: games ALE/... come so, without a wrapper (docs/atari.md).")
    else:
        if wrapper:
            draft.say(
                f"env_wrapper {shown(wrapper)}: write a function that makes the environment and wraps it, and name it: "
                "proximo train my_env.py:make"
            )
        if frames:
            draft.say(f"frame_stack {frames}: wrap the environment in gymnasium.wrappers.FrameStackObservation.")
    draft.without_counterpart(
        {
            "vec_env_wrapper": "there are no wrappers of vectors here; wrap the environment.",
            "callback": "there are no callbacks here; the loop is short, in training/control.py.",
            "monitor_kwargs": "episodes are counted in the environment's own rewards without a Monitor.",
            "vec_env_kwargs": "see vectorization.",
        }
    )


# --- CleanRL --------------------------------------------------------------------------------------------------

_CLEANRL_IDLE = ("cuda", "torch_deterministic", "track", "wandb_*", "capture_video", "save_model", "upload_model")
_CLEANRL_IDLE += ("hf_entity", "exp_name", "batch_size", "minibatch_size", "num_iterations", "num_updates", "gym_id")

_PPO = dict(
    total_timesteps=500_000,
    num_envs=4,
    num_steps=128,
    num_minibatches=4,
    update_epochs=4,
    learning_rate=2.5e-4,
    clip_coef=0.2,
    ent_coef=0.01,
    gamma=0.99,
    gae_lambda=0.95,
    max_grad_norm=0.5,
    vf_coef=0.5,
    anneal_lr=True,
    clip_vloss=True,
    norm_adv=True,
)
_CLEANRL: dict[str, dict[str, Any]] = {
    "ppo.py": _PPO,
    "ppo_atari.py": _PPO | dict(total_timesteps=10_000_000, num_envs=8, clip_coef=0.1),
    "ppo_continuous_action.py": _PPO
    | dict(total_timesteps=1_000_000, num_envs=1, num_steps=2048, num_minibatches=32, update_epochs=10)
    | dict(learning_rate=3e-4, ent_coef=0.0),
}
"""What CleanRL's scripts take where nothing is given."""


def _script(draft: Draft, env_id: str | None, asked: str) -> str:
    """The script whose arguments these are: by its name, else as asked for, else by the environment's actions.

    Raises:
        UserError: where nothing tells.
    """
    named = str(draft.theirs.get("exp_name", ""))
    is_named = named == "ppo" or named.startswith("ppo_")
    if asked == "cleanrl-continuous" or (is_named and "continuous" in named):
        return "ppo_continuous_action.py"
    if (is_named and "atari" in named) or (env_id or "").startswith("ALE/"):
        return "ppo_atari.py"
    if is_named:
        if named != "ppo":
            draft.say(f"exp_name {named}: the defaults of ppo.py are taken, and its own network is not here.")
        return "ppo.py"
    if asked == "cleanrl":
        draft.say("exp_name names no script, and --kind cleanrl is given: the defaults of ppo.py are taken.")
        return "ppo.py"
    continuous = _acts_continuously(env_id)
    if continuous is None:
        raise UserError(
            "exp_name names none of CleanRL's scripts, and the environment cannot be asked what its actions are. The "
            "scripts have other defaults: say --kind cleanrl (ppo.py) or --kind cleanrl-continuous "
            "(ppo_continuous_action.py)."
        )
    script = "ppo_continuous_action.py" if continuous else "ppo.py"
    draft.say(f"exp_name names no script: {env_id} has {'' if continuous else 'no '}continuous actions, so {script}.")
    return script


def _acts_continuously(env_id: str | None) -> bool | None:
    """Whether a registered environment's actions are numbers in a box; None where it cannot be made."""
    import gymnasium

    if env_id is None or env_id not in gymnasium.registry:  # no name that would import a module
        return None
    try:
        env = gymnasium.make(env_id)
    except Exception:  # whatever an environment's own code raises where its library is not there
        return None
    space = env.action_space
    env.close()
    return isinstance(space, gymnasium.spaces.Box)


def from_cleanrl(draft: Draft, env_id: str | None, *, asked: str = "auto") -> None:
    """The arguments of ppo.py, ppo_atari.py and ppo_continuous_action.py."""
    env_id = env_id or draft.theirs.get("env_id") or draft.theirs.get("gym_id")
    env_id = None if env_id is None else str(env_id)
    script = _script(draft, env_id, asked)
    continuous = script == "ppo_continuous_action.py"
    draft.take("env_id")
    if env_id is not None:
        draft.put("env_id", env_id)
    whose = {name: f"{script}'s default" for name in _CLEANRL[script] if draft.theirs.get(name) is None}
    theirs = {name: draft.take(name, default) for name, default in _CLEANRL[script].items()}

    sizes = ("num_envs", "num_steps", "num_minibatches", "total_timesteps", "update_epochs")
    sized = {name: count(name, theirs[name]) for name in sizes}
    names = (("total_timesteps", "total_steps"), ("num_envs", "n_envs"), ("num_steps", "rollout_length"))
    for name, ours in (*names, ("update_epochs", "n_epochs")):
        draft.put(ours, sized[name], whose.get(name, ""))
    batch = max(1, sized["num_envs"] * sized["num_steps"] // sized["num_minibatches"])
    beside = f", {whose['num_minibatches']}" if "num_minibatches" in whose else ""
    draft.put("batch_size", batch, f"{sized['num_minibatches']} minibatches{beside}")
    draft.put("learning_rate", number("learning_rate", theirs["learning_rate"]), whose.get("learning_rate", ""))
    anneals = truth("anneal_lr", theirs["anneal_lr"])
    draft.put("learning_rate_schedule", "linear" if anneals else "constant", whose.get("anneal_lr", ""))
    clip = number("clip_coef", theirs["clip_coef"])
    draft.put("clip_epsilon", clip, whose.get("clip_coef", ""))
    draft.put("clip_schedule", "constant")
    numbers = (("gamma", "gamma"), ("gae_lambda", "gae_lambda"), ("max_grad_norm", "max_grad_norm"))
    for name, ours in (*numbers, ("ent_coef", "entropy_coef")):
        draft.put(ours, number(name, theirs[name]), whose.get(name, ""))
    coefficient = number("vf_coef", theirs["vf_coef"])
    whose_value = whose.get("vf_coef", "theirs")
    draft.put("value_coef", coefficient / 2, f"{whose_value} is {coefficient:g}, of half the squared error")
    clips = truth("clip_vloss", theirs["clip_vloss"])
    draft.put("value_clip_epsilon", clip if clips else "none", whose.get("clip_vloss", ""))
    draft.put("normalize_advantages", truth("norm_adv", theirs["norm_adv"]), whose.get("norm_adv", ""))
    if (kl := draft.take("target_kl")) is not None:
        draft.put("target_kl", number("target_kl", kl) / 1.5, "CleanRL stops at its own, Proximo at 1.5 times this")
        draft.say("target_kl: CleanRL looks once an epoch, at its last minibatch; Proximo after every minibatch.")
    if (seed := draft.take("seed")) is not None:
        draft.put("seed", whole("seed", seed))
    _cleanrl_script(draft, script)
    draft.put("normalize_observations", continuous, "its script wraps the environment so" if continuous else "")
    draft.put("normalize_rewards", continuous)
    draft.put("rescale_actions", False, "CleanRL's policies act in the environment's own units")
    draft.not_needed(*_CLEANRL_IDLE)
    draft.say(
        "Truncation: CleanRL takes a time limit for an end of the task; Proximo goes on with the value of the last "
        "observation. Where episodes are truncated, expect other (as a rule better) values."
    )


def _cleanrl_script(draft: Draft, script: str) -> None:
    """Networks and wrappers that stand in a script itself."""
    if script == "ppo_atari.py":
        draft.put("sign_rewards", True)
    draft.put("hidden_sizes", [64, 64])
    draft.put("activation", "tanh")


# --- names of environments ------------------------------------------------------------------------------------

_NO_FRAMESKIP = re.compile(r"(?P<game>\w+)NoFrameskip-v4")


def present_name(env_id: str) -> tuple[str, str]:
    """The name that Gymnasium has today for an environment of older files, and a remark where it is another."""
    import gymnasium

    if found := _NO_FRAMESKIP.fullmatch(env_id):
        return f"ALE/{found['game']}-v5", f"{env_id} is ALE/{found['game']}-v5 here, without sticky actions."
    base, dash, version = env_id.rpartition("-v")
    if not dash or not version.isdigit() or ":" in env_id or "/" in env_id:
        return env_id, ""
    versions = [int(name.rpartition("-v")[2]) for name in gymnasium.registry if name.rpartition("-v")[0] == base]
    newest = max(versions, default=int(version))
    if newest <= int(version):
        return env_id, ""
    return f"{base}-v{newest}", f"{env_id} is old: {base}-v{newest} is named instead, whose returns may differ."
