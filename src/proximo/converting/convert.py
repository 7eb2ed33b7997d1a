"""From a file of another library to a TOML file for `proximo train --config` or `align --config`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w

from proximo.converting.control import from_cleanrl, from_sb3, present_name
from proximo.converting.draft import Draft
from proximo.converting.language import from_trl_grpo, from_trl_ppo
from proximo.converting.openrlhf import flat_names, from_openrlhf
from proximo.converting.reading import read_mapping, visible
from proximo.errors import UserError, nearest, one_of, shown
from proximo.language import config_of
from proximo.training.config import ControlConfig, with_settings

Kind = Literal["auto", "sb3", "sb3-recurrent", "cleanrl", "cleanrl-continuous", "trl-ppo", "trl-grpo", "openrlhf"]


@dataclass(frozen=True)
class Converted:
    """Settings of ours, and what there is to say about them."""

    command: Literal["train", "align"]
    """Which command takes them."""
    kind: str
    """Whose settings they were."""
    settings: dict[str, Any]
    """Ours, by their names."""
    because: dict[str, str]
    """What is said beside some of them."""
    remarks: list[str]
    """What differs, or has no counterpart and matters."""
    idle: list[str]
    """Theirs that have no counterpart and need none."""
    unknown: list[str]
    """Theirs that are not known, and may matter."""
    source: str
    """The file, and the entry in it."""

    @property
    def toml(self) -> str:
        """The settings as a file for `--config`, remarks as comments."""
        words = ["proximo", self.command]
        head = [f"From {self.source} ({_NAMES[self.kind]}), for: {' '.join(words)} --config THIS_FILE", ""]
        head += self.remarks
        if self.unknown:
            head.append(f"NOT KNOWN, and left out: {', '.join(self.unknown)}. See whether they matter.")
        if self.idle:
            head.append(f"Of no matter to what is learned: {', '.join(self.idle)}.")
        lines = [line for remark in head for line in _comment(remark)] + [""]
        tables = {name: value for name, value in self.settings.items() if isinstance(value, dict)}
        for name, value in self.settings.items():
            if name not in tables:
                beside = f"  # {_plain(self.because[name])}" if name in self.because else ""
                lines.append(f"{name} = {_toml_value(value)}{beside}")
        return _escaped("\n".join(lines) + "\n" + (f"\n{tomli_w.dumps(tables)}" if tables else ""))


_NAMES = {
    "sb3": "Stable-Baselines3 or RL Baselines3 Zoo",
    "sb3-recurrent": "RecurrentPPO of sb3-contrib",
    "cleanrl": "CleanRL",
    "cleanrl-continuous": "CleanRL's script for continuous actions",
    "trl-ppo": "TRL's PPOConfig",
    "trl-grpo": "TRL's GRPOConfig",
    "openrlhf": "OpenRLHF",
}

_SIGNS: dict[str, set[str]] = {
    "sb3": {"n_timesteps", "n_steps", "n_envs", "policy", "clip_range", "clip_range_vf", "ent_coef", "policy_kwargs"}
    | {"normalize", "use_sde", "sde_sample_freq", "normalize_advantage", "env_wrapper", "frame_stack", "n_epochs"},
    "cleanrl": {"num_envs", "num_steps", "num_minibatches", "update_epochs", "clip_coef", "anneal_lr", "norm_adv"}
    | {"clip_vloss", "total_timesteps", "ent_coef"},
    "trl-ppo": {"num_ppo_epochs", "cliprange", "cliprange_value", "kl_coef", "response_length", "lam", "total_episodes"}
    | {"num_mini_batches", "whiten_rewards", "missing_eos_penalty", "sft_model_path", "reward_model_path"}
    | {"kl_estimator"},
    "trl-grpo": {"num_generations", "max_completion_length", "epsilon", "epsilon_high", "loss_type", "scale_rewards"}
    | {"mask_truncated_completions", "num_iterations", "max_prompt_length", "steps_per_generation", "beta"},
    "openrlhf": {"init_kl_coef", "eps_clip", "n_samples_per_prompt", "rollout_batch_size", "train_batch_size"}
    | {"actor_learning_rate", "critic_learning_rate", "generate_max_len", "prompt_max_len", "advantage_estimator"}
    | {"lambd", "reward_pretrain", "value_clip"},
}
"""Names by which the settings of a library are known."""

_OTHERS: dict[str, set[str]] = {
    "an off-policy algorithm (DQN, DDPG, TD3, SAC, TQC, ...)": {"buffer_size", "learning_starts", "train_freq", "tau"}
    | {"target_update_interval", "exploration_fraction", "replay_buffer_class", "gradient_steps", "action_noise"},
    "A2C": {"use_rms_prop", "rms_prop_eps"},
    "TRPO": {"cg_max_steps", "cg_damping", "line_search_shrinking_factor", "n_critic_updates", "sub_sampling_factor"},
    "ARS": {"n_delta", "n_top", "delta_std"},
}
_OTHER_FILES = ("a2c", "ars", "ddpg", "dqn", "her", "qrdqn", "sac", "td3", "tqc", "trpo", "crossq")
_ALGORITHMS = {"ppo": "sb3", "ppo_lstm": "sb3-recurrent", "recurrent_ppo": "sb3-recurrent"}


def convert(path: str | Path, env: str | None = None, kind: Kind = "auto") -> Converted:
    """Read the settings of another library and say what they are here.

    Args:
        path: a YAML or JSON file: hyperparameters of RL Baselines3 Zoo, arguments of SB3's `PPO`, CleanRL's arguments,
            TRL's PPOConfig or GRPOConfig, or OpenRLHF's flags by their names, flat or dotted.
        env: the environment; in a file of RL Zoo, which entry.
        kind: whose settings they are, where that cannot be told by their names.

    Raises:
        UserError: where the file cannot be read, has settings of another algorithm, or none that is known.
    """
    path = Path(path)
    one_of("kind", kind, get_args(Kind))
    theirs = read_mapping(path)
    source, asked_env = visible(path.name), env
    if any(re.search(r"-v\d+$", name) for name in theirs):
        for name, value in theirs.items():
            if not isinstance(value, dict):
                raise UserError(
                    f"{visible(path)}: the entry {visible(name)} is {visible(shown(value))}, not a table of settings."
                )
    if all(isinstance(value, dict) for value in theirs.values()):
        entry, theirs = _entry(path, theirs, env)
        source += f", {visible(entry)}"
        env = env or (entry if entry not in ("atari", "default", "defaults") else None)
    theirs = {str(name).removeprefix("--").replace("-", "_"): value for name, value in theirs.items()}
    theirs, has_dotted = flat_names(theirs)
    asked = kind
    kind = _kind_of(path, theirs, kind)
    draft = Draft(theirs)
    draft.take("algo")
    if source not in (visible(path.name), f"{visible(path.name)}, {visible(env)}"):
        draft.say(f"There is no entry {env} in {visible(path.name)}: this is {source.rpartition(', ')[2]}'s.")
    if kind.startswith(("sb3", "cleanrl")):
        env = env or draft.theirs.pop("env_id", None) or draft.theirs.pop("env", None)
        env = _renamed(draft, str(env)) if env is not None else None
        if env is None:
            draft.say("No environment is named: give it, as in proximo train ENV --config THIS_FILE.")
        if kind.startswith("cleanrl"):
            from_cleanrl(draft, env, asked=asked)
        else:
            from_sb3(draft, env, recurrent=kind == "sb3-recurrent")
        with_settings(ControlConfig(), draft.settings, where=f"{source}, as settings of Proximo")
        return _done(draft, "train", kind, source)
    if asked_env is not None:
        raise UserError(
            f"--env {visible(asked_env)} was given, but {visible(path)} has settings of a language model "
            f"({_NAMES[kind]})."
        )
    read: Callable[[Draft], None] = {
        "trl-ppo": from_trl_ppo,
        "trl-grpo": from_trl_grpo,
        "openrlhf": lambda draft: from_openrlhf(draft, has_dotted=has_dotted),
    }[kind]
    read(draft)
    config_of("align", draft.settings, where=f"{source}, as settings of Proximo")
    return _done(draft, "align", kind, source)


def _done(draft: Draft, command: Literal["train", "align"], kind: str, source: str) -> Converted:
    found = Converted(
        command, kind, draft.settings, draft.because, draft.remarks, sorted(draft.idle), draft.unknown, source
    )
    try:
        found.toml.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{source} has text that cannot be written in UTF-8: {error.reason}.") from error
    return found


def _entry(path: Path, entries: dict[str, Any], env: str | None) -> tuple[str, dict[str, Any]]:
    """The entry of a file of RL Zoo that is meant."""
    if env is None:
        if len(entries) == 1:
            return next(iter(entries.items()))
        named = next((name for name in entries if "-v" in name), next(iter(entries)))
        raise UserError(f"{visible(path)} has {len(entries)} entries. Say which: --env {shlex.quote(visible(named))}")
    if env in entries:
        return env, entries[env]
    base = env.rpartition("-v")[0]
    alike = [name for name in entries if base and name.rpartition("-v")[0] == base]
    if len(alike) == 1:
        return alike[0], entries[alike[0]]
    if (env.startswith("ALE/") or "NoFrameskip" in env) and "atari" in entries:
        return "atari", entries["atari"]
    for name in ("default", "defaults"):
        if name in entries:
            return name, entries[name]
    close = nearest(env, entries)
    hint = f" Did you mean {visible(' or '.join(close))}?" if close else f" It has: {_listed(entries, 20)}."
    raise UserError(f"{visible(path)} has no entry {env!r}.{hint}")


def _listed(names: dict[str, Any], most: int) -> str:
    return ", ".join(map(visible, list(names)[:most]))


def _kind_of(path: Path, theirs: dict[str, Any], kind: Kind) -> Any:
    """Whose settings they are, by their names, the name of the file, and `algo` where it is there."""
    algorithm = str(theirs.get("algo", "")).lower()
    if algorithm and algorithm not in _ALGORITHMS:
        raise UserError(
            f"{visible(path)} is for {visible(algorithm)}; Proximo has PPO: {', '.join(_ALGORITHMS)} can be converted."
        )
    for name, signs in _OTHERS.items():
        if found := sorted(signs & set(theirs)):
            raise UserError(
                f"{visible(path)} has settings of {name}: {', '.join(found)}. Only those of PPO can be converted."
            )
    if kind != "auto":
        return kind
    if path.stem.lower() in _OTHER_FILES:
        raise UserError(
            f"{visible(path.name)} is RL Zoo's file of {path.stem.upper()}. Only settings of PPO can be converted: "
            "ppo.yml and ppo_lstm.yml. If it is PPO's, add --kind sb3."
        )
    matches = {name: len(signs & set(theirs)) for name, signs in _SIGNS.items()}
    best = max(matches.values())
    found = [name for name, count in matches.items() if count == best]
    if best == 0 or len(found) > 1:
        raise UserError(
            f"{visible(path)} does not show whose settings it has (it begins with {_listed(theirs, 6)}). "
            f"Say so: --kind {' | '.join(get_args(Kind)[1:])}"
        )
    is_recurrent = path.stem == "ppo_lstm" or _ALGORITHMS.get(algorithm) == "sb3-recurrent"
    return "sb3-recurrent" if found[0] == "sb3" and is_recurrent else found[0]


def _renamed(draft: Draft, env: str) -> str:
    name, remark = present_name(env)
    if remark:
        draft.say(remark)
    return name


# --- TOML ---------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Text that stays within its comment, whatever a stranger's file has in its names."""
    shown = re.sub(r"[^\x20-\x7e\u00a0-\ud7ff]+", " ", text)
    return "".join(each if each.isprintable() else " " for each in shown).strip()


def _comment(text: str) -> list[str]:
    import textwrap

    return [f"# {line}" for line in textwrap.wrap(_plain(text), 110)] if text else ["#"]


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, float):
        return f"{value!r}" if value != int(value) or abs(value) >= 1e15 else f"{value:.1f}"
    if isinstance(value, str):
        return _escaped(tomli_w.dumps({"x": value}).removeprefix("x = ").strip())
    return json.dumps(value)


def _escaped(text: str) -> str:
    """TOML in ASCII, whatever a terminal or a file makes of other letters: these stand as escapes."""
    return re.sub(r"[^\x00-\x7e\ud800-\udfff]", _escape, text)


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
