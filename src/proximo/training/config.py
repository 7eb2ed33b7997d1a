"""The settings of a control run: frozen dataclasses in code, flat names everywhere else.

Every setting has one name, unique among all of them: the same word is the command-line flag, the TOML key
and the keyword of `proximo.train`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from proximo.algorithms.a2c import A2C
from proximo.algorithms.ppo import PPO, UpdatePath
from proximo.algorithms.reinforce import Reinforce
from proximo.algorithms.rnd import IntrinsicConfig
from proximo.algorithms.trpo import TRPO
from proximo.collect.atari import is_atari
from proximo.collect.envs import SpacePolicy
from proximo.collect.packed_env import ActionMask
from proximo.errors import HIGHEST_SEED, UserError, in_range, nearest, one_of, shown
from proximo.loggers.following import NO_LOGGERS, Loggers
from proximo.models.actions import distribution_name
from proximo.models.control import NetworkConfig

Vectorization = Literal["auto", "serial", "workers", "native", "envpool", "device"]

Algorithm = PPO | A2C | Reinforce | TRPO

ALGORITHMS: dict[str, Algorithm] = {"ppo": PPO(), "a2c": A2C(), "reinforce": Reinforce(), "trpo": TRPO()}
"""By the names that `--algorithm` takes, with the settings to begin with."""

_MOST_STEPS_BETWEEN_CHECKPOINTS = 250_000


@dataclass(frozen=True)
class EnvironmentConfig:
    """The task, and how many copies of it run how."""

    env_id: Annotated[str, tyro.conf.Suppress] = "CartPole-v1"
    """Gymnasium id, my_file.py:MyEnv, or package.module:MyEnv."""
    env_kwargs: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Arguments for making the environment (in a config file: a table [env_kwargs])."""
    n_envs: int = 8
    """Environments that run side by side."""
    vectorization: Vectorization = "auto"
    """`serial`: in this process; `workers`: worker processes over shared memory, for environments slower than
    about 1 ms a step; `native`: the environment's own vector version; `envpool`: EnvPool's, in threads of C++;
    `device`: one that lives on --device; `auto`: native from 8 environments on where that is the same task and a run
    can go on from it exactly, workers where n_workers is given, else serial."""
    n_workers: int | None = None
    """Worker processes; by default one per CPU core, at most n_envs."""
    episodic_life: bool = False
    """Atari, native: losing a life is an end for learning. Returns and evaluation are over whole games all the same."""
    max_episode_steps: int | None = None
    """Truncate episodes after this many steps; by default whatever the environment does."""
    action_mask: ActionMask = "auto"
    """Where the environment says which choices are possible: `info["action_mask"]`, `observation["action_mask"]`, or
    nowhere; `auto` looks for it before the run."""
    on_space_violation: SpacePolicy = "raise"
    """An observation outside the bounds of its own space stops the run, or is told once (`warn`)."""
    on_environment_fault: Literal["raise", "restart"] = "raise"
    """An environment that raises, returns what it must not, or, with workers, hangs or dies: stops the run, or is made
    anew, its episode cut before the step that failed."""
    max_restarts: int = 20
    """Environments that may be made anew within a run; one more fault stops it."""
    step_timeout: float = 60.0
    """Seconds that one reset or step may take in a worker process; then it is held to hang."""

    @property
    def can_be_named(self) -> bool:
        """Whether `env_id` leads back to the environment: not to a lambda, or a class of the program that ran."""
        return "<" not in self.env_id and not self.env_id.startswith("__main__:")

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        in_range("n_envs", self.n_envs, at_least=1, at_most=10**6, whole=True, usual="8")
        in_range("n_workers", self.n_workers, optional=True, at_least=1, whole=True, usual="one per CPU core")
        in_range(
            "max_episode_steps", self.max_episode_steps, optional=True, at_least=1, whole=True, usual="none at all"
        )
        one_of("vectorization", self.vectorization, typing.get_args(Vectorization))
        one_of("action_mask", self.action_mask, typing.get_args(ActionMask))
        one_of("on_space_violation", self.on_space_violation, ("raise", "warn"))
        one_of("on_environment_fault", self.on_environment_fault, ("raise", "restart"))
        in_range("max_restarts", self.max_restarts, at_least=1, whole=True, usual="20")
        in_range("step_timeout", self.step_timeout, above=0.0, at_most=86_400.0, usual="60")
        if self.n_workers is not None and self.vectorization not in ("auto", "workers"):
            raise UserError(
                f"n_workers is {self.n_workers}, which is for --vectorization workers, and this is "
                f"{self.vectorization}. Leave one of them out."
            )
        if self.episodic_life and not (is_atari(self.env_id) and self.vectorization in ("auto", "native")):
            raise UserError(
                f"episodic_life is on, which is for games ALE/... with --vectorization native; this is {self.env_id} "
                f"with {self.vectorization}. Turn it off (--no-episodic-life)."
            )
        if self.action_mask in ("info", "observation") and self.vectorization in ("native", "envpool", "device"):
            raise UserError(
                f"action_mask is {self.action_mask!r}, but a {self.vectorization} vector environment hands over no "
                "masks here. Use --vectorization serial or workers, or --action-mask none."
            )
        if self.on_environment_fault == "restart" and self.vectorization in ("native", "envpool", "device"):
            raise UserError(
                f"on_environment_fault is restart, but the environments of a {self.vectorization} vector environment "
                "cannot be made anew one by one. Use --vectorization serial or workers."
            )

    @property
    def restarts_allowed(self) -> int:
        """How many environments may be made anew; 0 where a fault stops the run."""
        return self.max_restarts if self.on_environment_fault == "restart" else 0


@dataclass(frozen=True)
class ControlConfig:
    """Everything that a control run needs to be run again."""

    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    intrinsic: IntrinsicConfig = field(default_factory=IntrinsicConfig)
    algorithm: Annotated[Algorithm, tyro.conf.Suppress] = field(default_factory=PPO)
    total_steps: int = 1_000_000
    """Environment steps in all, over all environments; the run ends before it would go past them."""
    rollout_length: int = 256
    """Steps per environment and iteration."""
    sequence_length: int | None = None
    """With memory: steps that are learned from in one piece, beginning with what was remembered then. It must divide
    rollout_length; by default the longest that does and is no longer than batch_size."""
    init_from: str | None = None
    """Begin with weights and normalizers of this run's policy, or of one of its checkpoints: RUN/checkpoints/best."""
    seed: int = 0
    """Seeds the weights, the actions, the minibatches, and each episode of each environment."""
    checkpoint_every: int | None = None
    """Environment steps between checkpoints; by default a tenth of total_steps, and 250,000 at most."""
    keep_checkpoints: int = 3
    """How many checkpoints to keep, the best one not counted."""
    keep_every: int | None = None
    """Also keep the first checkpoint at or after each multiple of this many steps, for good."""
    max_skipped_updates: int = 3
    """Updates in a row that may be left out because their loss or gradient is not finite; one more ends the run."""
    stop_at_return: float | None = None
    """End early once the mean return of the last 100 episodes reaches this."""
    device: str = "cpu"
    """Where the networks are: cpu, cuda, cuda:1, ... Small networks are fastest on the CPU."""
    threads: int = 0
    """CPU threads of the update: torch's, NumPy's where it is `fused`, and of the compiled one at most so many: it
    measures as it goes whether two are faster, and is the same on one. 0: chosen before the run starts: one for
    small networks, measured for images."""
    debug: bool = False
    """Check at each iteration that every probability ratio is 1 before the first update."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        in_range("total_steps", self.total_steps, at_least=1, at_most=10**18, whole=True, usual="1000000")
        in_range("rollout_length", self.rollout_length, at_least=1, at_most=10**9, whole=True, usual="256")
        in_range("seed", self.seed, at_least=0, at_most=HIGHEST_SEED, whole=True, usual="1")
        in_range(
            "checkpoint_every",
            self.checkpoint_every,
            optional=True,
            at_least=1,
            whole=True,
            usual="a tenth of total_steps",
        )
        in_range("keep_checkpoints", self.keep_checkpoints, at_least=1, whole=True, usual="3")
        in_range("keep_every", self.keep_every, optional=True, at_least=1, whole=True, usual="left out")
        in_range("max_skipped_updates", self.max_skipped_updates, at_least=0, whole=True, usual="3")
        in_range("stop_at_return", self.stop_at_return, optional=True, usual="none at all")
        in_range("threads", self.threads, at_least=0, at_most=1024, whole=True, usual="0")
        if isinstance(self.algorithm, PPO) and self.algorithm.gae_lambda_per_step is not None:
            raise UserError("gae_lambda_per_step is for language models; leave it out, and set gae_lambda.")
        self._check_sequences()
        self._check_exploration()
        self._check_budget()  # last: with what cannot be, no budget would help

    def _check_sequences(self) -> None:
        """What a policy with memory learns from in one piece."""
        in_range(
            "sequence_length",
            self.sequence_length,
            optional=True,
            at_least=1,
            at_most=self.rollout_length,
            whole=True,
            usual=f"{self.rollout_length}, all of rollout_length",
        )
        if self.sequence_length is not None and self.network.memory == "none":
            raise UserError("sequence_length is for policies with memory. Set memory to gru or lstm, or leave it out.")
        if self.network.memory != "none" and self.environment.vectorization == "device":
            raise UserError(
                f"memory is {self.network.memory!r}, which environments on a device do not go with yet. Use another "
                "vectorization, or leave memory out."
            )
        if self.rollout_length % self.piece_length:
            raise UserError(
                f"sequence_length is {self.sequence_length}, which does not divide rollout_length, "
                f"{self.rollout_length}. Choose one that does, such as "
                f"{max(n for n in range(1, self.piece_length) if self.rollout_length % n == 0)}."
            )

    def _check_exploration(self) -> None:
        """Refuse runs in which nothing would read an intrinsic reward; the algorithm is looked at when one begins."""
        if not self.intrinsic.explores:
            return
        said = f"exploration is '{self.intrinsic.exploration}'"
        if self.network.memory != "none":
            raise UserError(
                f"{said}, which a policy with memory does not have yet (memory is '{self.network.memory}'). Use "
                "--memory none, or --exploration none."
            )
        if self.environment.vectorization == "device":
            raise UserError(
                f"{said}, which environments on a device do not have here. Use --vectorization serial, workers or "
                "native, or --exploration none."
            )

    def _check_budget(self) -> None:
        """Sizes that must hold each other: minibatch, rollout and run."""
        if self.batch_size > self.steps_per_iteration:
            raise UserError(
                f"batch_size is {self.batch_size}, but a rollout has only {self.steps_per_iteration} steps "
                f"(n_envs {self.environment.n_envs} x rollout_length {self.rollout_length}). Set batch_size to at "
                f"most {self.steps_per_iteration}, or rollout_length to at least "
                f"{-(-self.batch_size // self.environment.n_envs)}."
            )
        if self.steps_per_iteration > self.total_steps:
            raise UserError(
                f"total_steps is {self.total_steps}, but one iteration alone takes {self.steps_per_iteration} steps "
                f"(n_envs {self.environment.n_envs} x rollout_length {self.rollout_length}). Set total_steps to at "
                f"least {self.steps_per_iteration}, or rollout_length to at most "
                f"{max(1, self.total_steps // self.environment.n_envs)}."
            )
        warming = self.intrinsic.warmup_rollouts if self.intrinsic.explores else 0
        if self.total_steps < (warming + 1) * self.steps_per_iteration:
            raise UserError(
                f"total_steps is {self.total_steps}, but the {warming} warmup_rollouts of exploration "
                f"'{self.intrinsic.exploration}' take {warming * self.steps_per_iteration} steps, and an iteration "
                f"that learns {self.steps_per_iteration} more. Set total_steps to at least "
                f"{(warming + 1) * self.steps_per_iteration}, or fewer warmup_rollouts."
            )

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps in one rollout."""
        return self.environment.n_envs * self.rollout_length

    @property
    def piece_length(self) -> int:
        """Steps in a row that a policy with memory learns from in one piece."""
        return self.sequence_length or self.rollout_length

    @property
    def minibatches_per_epoch(self) -> int:
        """Minibatches that a rollout is cut into; with memory each holds one whole piece at least."""
        longest = self.piece_length if self.network.memory != "none" else 1
        n_rows = self.steps_per_iteration / longest
        return max(1, round(n_rows / max(1, round(self.batch_size / longest))))

    @property
    def algorithm_name(self) -> str:
        """The name that `--algorithm` takes."""
        return type(self.algorithm).__name__.lower()

    @property
    def batch_size(self) -> int:
        """Steps per minibatch: all of a rollout, for algorithms that have none."""
        return getattr(self.algorithm, "batch_size", self.steps_per_iteration)

    @property
    def update_path(self) -> UpdatePath:
        """How the gradient is come by; only PPO has a choice."""
        return self.algorithm.update_path if isinstance(self.algorithm, PPO) else "eager"

    @property
    def checkpoint_interval(self) -> int:
        """Environment steps between checkpoints."""
        by_default = min(self.total_steps // 10, _MOST_STEPS_BETWEEN_CHECKPOINTS)
        return self.checkpoint_every or max(by_default, self.steps_per_iteration)


@dataclass(frozen=True)
class _TrainOutput:
    algorithm: Literal["ppo", "a2c", "reinforce", "trpo"] = "ppo"
    """What learns; the settings shown are those of the one named."""
    config: Path | None = None
    """A TOML file of settings; flags go over it."""
    run_dir: Path | None = None
    """Where to write; by default a new folder runs/ENV/TIME-seedSEED."""
    env_kwargs: str = "{}"
    """Arguments for making the environment, as a JSON object."""
    quiet: bool = False
    """Show no progress."""
    dashboard: bool = False
    """Show the run in a browser while it goes on: a page on this machine, at an address that is printed."""
    dashboard_port: int | None = None
    """The port of that page; by default any free one."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""
    loggers: Annotated[Loggers, tyro.conf.OmitArgPrefixes] = NO_LOGGERS


def train_arguments(base: ControlConfig) -> Any:
    """The flags of `proximo train`: every setting of the run and of its algorithm, with the values of `base`."""
    output = _TrainOutput(algorithm=base.algorithm_name)  # type: ignore[arg-type]
    without = dataclasses.replace(base, algorithm=A2C())  # no batch_size to check before the learner's own is read
    arguments = dataclasses.make_dataclass(
        "TrainArguments",
        [
            ("settings", Annotated[type(base), tyro.conf.OmitArgPrefixes], field(default=without)),
            ("learner", Annotated[type(base.algorithm), tyro.conf.OmitArgPrefixes], field(default=base.algorithm)),
            ("output", Annotated[_TrainOutput, tyro.conf.OmitArgPrefixes], field(default=output)),
        ],
        frozen=True,
    )
    arguments.__doc__ = "Learn a control task. The defaults shown are those of the environment named."
    return arguments


def settings_of(config: object) -> dict[str, Any]:
    """Every setting of a config by its own name; nested dataclasses are walked through."""
    settings: dict[str, Any] = {"algorithm": config.algorithm_name} if isinstance(config, ControlConfig) else {}
    for entry in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            settings |= settings_of(value)
        else:
            settings[entry.name] = list(value) if isinstance(value, tuple) else value
    return settings


_NO_NUMBER_HANGS_ON = (
    *("checkpoint_every", "keep_checkpoints", "keep_every", "max_restarts", "max_skipped_updates", "step_timeout"),
    *("n_workers", "on_environment_fault", "reward_timeout", "judge_timeout", "judge_parallel", "debug"),
    "total_steps",  # a schedule does, but whoever resumes with another number has just asked for that
    "init_from",  # it is read once: the first checkpoint has its weights
)


def recorded(config: object) -> dict[str, Any]:
    """The settings that numbers hang on, as JSON has them, for a checkpoint to remember."""
    settings = {name: value for name, value in settings_of(config).items() if name not in _NO_NUMBER_HANGS_ON}
    if settings.get("vectorization") in ("auto", "serial", "workers"):
        settings["vectorization"] = "serial or workers"  # number for number the same
    if settings.get("update_path") == "compiled":
        settings.pop("threads", None)  # the same on one as on two
    return json.loads(json.dumps(settings, default=repr))


def changed_settings(before: object, config: object) -> str:
    """What a checkpoint's `recorded` settings have become since, in words; empty if they are the same."""
    now = recorded(config)
    was = before if isinstance(before, dict) else now
    changed = [  # 1 and 1.0 are the same
        f"{name} was {was[name]} and is {value}"
        for name, value in now.items()
        if name in was and was[name] != value  # what is not there is younger than the checkpoint
    ]
    return f"its state is back, but with other settings it goes another way: {', '.join(changed)}" if changed else ""


def with_algorithm(config: ControlConfig, name: Any, *, where: str) -> Any:
    """Return `config` with the algorithm of this name: its own settings, and the discount that belongs to the task.

    Raises:
        UserError: if there is none of this name, with the nearest one.
    """
    if not isinstance(name, str) or name not in ALGORITHMS:
        closest = nearest(str(name), ALGORITHMS, count=1)
        hint = f" Did you mean {closest[0]!r}?" if closest else ""
        raise UserError(f"{where}: there is no algorithm {shown(name)}.{hint} There are: {', '.join(ALGORITHMS)}.")
    if name == config.algorithm_name:
        return config
    algorithm = dataclasses.replace(ALGORITHMS[name], gamma=config.algorithm.gamma)
    if isinstance(algorithm, (PPO, TRPO)) and algorithm.batch_size > config.steps_per_iteration:
        algorithm = dataclasses.replace(algorithm, batch_size=config.steps_per_iteration)
    return dataclasses.replace(config, algorithm=algorithm)


Config = TypeVar("Config")


def with_settings(config: Config, settings: dict[str, Any], *, where: str) -> Config:
    """Return `config` with some settings changed.

    `where` says in messages where the settings come from ("config.toml", "proximo.train()").

    Raises:
        UserError: for an unknown name (with the nearest one), a value of the wrong type, or an impossible one.
    """
    if isinstance(config, ControlConfig) and "algorithm" in settings:
        config = with_algorithm(config, settings["algorithm"], where=where)
        settings = {name: value for name, value in settings.items() if name != "algorithm"}
    if "distribution" in settings:
        settings = settings | {"distribution": distribution_name(settings["distribution"])}
    known = settings_of(config)
    for name in settings:
        if name not in known:
            closest = nearest(name, known, count=1)
            hint = f" Did you mean {closest[0]!r}?" if closest else ""
            owners = [other for other, algorithm in ALGORITHMS.items() if name in settings_of(algorithm)]
            if isinstance(config, ControlConfig) and owners:
                hint = f" It is one of {' and '.join(owners)}, and the algorithm is {config.algorithm_name}."
            raise UserError(f"{where}: there is no setting {name!r}.{hint}")
    return _replaced(config, settings, where)


def _replaced(config: Any, settings: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(type(config))
    changes = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            changes[entry.name] = _replaced(value, settings, where)
        elif entry.name in settings:
            changes[entry.name] = _typed(entry.name, settings[entry.name], hints[entry.name], where)
    return dataclasses.replace(config, **changes)


def _typed(name: str, value: Any, hint: Any, where: str) -> Any:
    """Check a value against its annotation: exact, but an integer may stand for a float."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value == "none" and type(None) in options and str not in options:
        return None  # for TOML, which has no other word for it
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is Literal and value in typing.get_args(option):
            return value
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            # One that fits into no float goes on as it is, to be refused for its size.
            return float(value) if abs(value) <= sys.float_info.max or isinstance(value, float) else value
        if option is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(value)
        if isinstance(origin, type) and isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
            return value
    wanted = " or ".join(
        "none"
        if option is type(None)
        else ", ".join(map(repr, typing.get_args(option)))
        if typing.get_origin(option) is Literal
        else getattr(option, "__name__", str(option))
        for option in options
    )
    raise UserError(f"{where}: {name} is {shown(value)}; it must be {wanted}.")
