"""What may be searched, and between which limits.

A `Range` is searched as a number, a `Choice` by the place of its option. Both say where a value stands on an axis of a
picture, from 0 at the bottom to 1 at the top.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from proximo.algorithms.ppo import PPO
from proximo.errors import UserError, nearest, shown
from proximo.models.control import ActorCritic
from proximo.training.config import ControlConfig, settings_of

if TYPE_CHECKING:
    from optuna.trial import Trial

FEWEST_ITERATIONS = 8
"""A trial has at least so many: longer rollouts are not tried (but for the ones to begin with)."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; with `from_one` these are the distances from 1, as a discount has it."""

    low: float
    high: float
    log: bool = False
    from_one: bool = False

    def including(self, value: float) -> Range | None:
        """The range that reaches this value as well; None if its logarithm does not."""
        number = self._number(value)
        if self.log and not number > 0.0:
            return None
        return replace(self, low=min(self.low, number), high=max(self.high, number))

    def parameters(self, name: str, value: float) -> dict[str, Any]:
        """What a study holds for this value."""
        return {self._key(name): self._number(value)}

    def suggest(self, trial: Trial, name: str) -> float:
        """The value that a study proposes, to four digits."""
        number = trial.suggest_float(self._key(name), self.low, self.high, log=self.log)
        digits = float(f"{number:.4g}")
        return float(f"{1.0 - digits:.8g}") if self.from_one else digits

    def position(self, value: float) -> float:
        """Where a value stands on an axis; 1 is its top."""
        low, high, number = self.low, self.high, self._number(value)
        if self.log:
            low, high, number = math.log(low), math.log(high), math.log(max(number, 1e-300))
        place = (number - low) / (high - low) if high > low else 0.5
        return 1.0 - place if self.from_one else place

    def ticks(self) -> list[tuple[float, str]]:
        """Places on the axis, and what to write there: powers of ten on a logarithmic one, and both ends."""
        inner = [self.low + share * (self.high - self.low) for share in (0.25, 0.5, 0.75)]
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            inner = [10.0**power for power in powers]
        ends = [self.low, self.high]
        numbers = ends + [each for each in inner if all(abs(self._apart(each, end)) > 0.07 for end in ends)]
        values = [1.0 - each if self.from_one else each for each in numbers]
        return [(self.position(value), f"{value:.4g}") for value in values]

    def _apart(self, one: float, other: float) -> float:
        values = [1.0 - each if self.from_one else each for each in (one, other)]
        return self.position(values[0]) - self.position(values[1])

    def _number(self, value: float) -> float:
        return round(1.0 - value, 12) if self.from_one else value

    def _key(self, name: str) -> str:
        return f"one_minus_{name}" if self.from_one else name


@dataclass(frozen=True)
class Choice:
    """One of some options; neighbours are alike where they are `ordered`."""

    options: tuple[Any, ...]
    ordered: bool = True

    def including(self, value: Any) -> Choice:
        """The choice with this option as well, at its place."""
        if value in self.options:
            return self
        options = (*self.options, value)
        return replace(self, options=tuple(sorted(options)) if self.ordered else options)

    def parameters(self, name: str, value: Any) -> dict[str, Any]:
        """What a study holds for this option: the place of an ordered one, the word for another."""
        place = self.options.index(value)
        return {name: place if self.ordered else self._labels()[place]}

    def suggest(self, trial: Trial, name: str) -> Any:
        """The option that a study proposes."""
        if self.ordered:
            return self.options[trial.suggest_int(name, 0, len(self.options) - 1)]
        labels = self._labels()
        return self.options[labels.index(trial.suggest_categorical(name, labels))]

    def position(self, value: Any) -> float:
        """Where an option stands on an axis."""
        if value in self.options:
            return self.options.index(value) / max(1, len(self.options) - 1)
        # A batch that had to be smaller than any option, to fit into its rollout.
        below = sum(option < value for option in self.options)
        return max(0.0, below - 0.5) / max(1, len(self.options) - 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Places on the axis, and what to write there."""
        return [(self.position(option), label) for option, label in zip(self.options, self._labels(), strict=True)]

    def _labels(self) -> list[str]:
        return [in_short(option) for option in self.options]


Searched = Range | Choice

SPACE: dict[str, Searched] = {
    "learning_rate": Range(1e-5, 1e-2, log=True),
    "learning_rate_schedule": Choice(("constant", "linear"), ordered=False),
    "gamma": Range(1e-4, 0.1, log=True, from_one=True),
    "gae_lambda": Range(0.8, 1.0),
    "clip_epsilon": Range(0.1, 0.4),
    "entropy_coef": Choice((0.0, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03)),
    "value_coef": Range(0.2, 1.0),
    "max_grad_norm": Range(0.3, 5.0, log=True),
    "max_kl": Range(1e-3, 0.1, log=True),
    "n_epochs": Choice((2, 4, 6, 10, 15, 20)),
    "rollout_length": Choice((16, 32, 64, 128, 256, 512, 1024, 2048)),
    "batch_size": Choice((32, 64, 128, 256, 512, 1024, 2048)),
    "hidden_sizes": Choice(((32, 32), (64, 64), (128, 128), (256, 256))),
    "activation": Choice(("tanh", "relu"), ordered=False),
    "log_std_init": Range(-3.0, 0.5),
    "normalize_observations": Choice((False, True), ordered=False),
    "normalize_rewards": Choice((False, True), ordered=False),
    "normalize_advantages": Choice((False, True), ordered=False),
    "orthogonal_init": Choice((False, True), ordered=False),
    "clip_schedule": Choice(("constant", "linear"), ordered=False),
}
"""Every setting that can be searched; the limits are wide around what is used for PPO (Andrychowicz et al. 2021, What
Matters in On-Policy Reinforcement Learning; the tuned files of RL Baselines3 Zoo)."""

ONLY_IF_NAMED = ("normalize_advantages", "orthogonal_init", "clip_schedule")


def search_space(
    base: ControlConfig, policy: ActorCritic, *, fixed: Collection[str], named: Sequence[str] | None
) -> dict[str, Searched]:
    """What is searched around `base`: the settings `named`, by default all that do something here and are not fixed.

    The value of `base` is always within the limits, so that a search can begin with it.

    Raises:
        UserError: for a setting that cannot be searched, does nothing here, or is fixed as well.
    """
    settings = settings_of(base)
    for name in named or ():
        if name not in SPACE:
            closest = nearest(name, SPACE, count=1)
            hint = f" Did you mean {closest[0]!r}?" if closest else ""
            raise UserError(f"{shown(name)} is no setting that can be searched.{hint} There are: {', '.join(SPACE)}.")
        if name in fixed:
            raise UserError(f"{name} is to be searched and has a fixed value as well. Leave one of them out.")
        why = _why_not(name, base, policy)
        if why:
            raise UserError(f"{name} cannot be searched: {why}. Leave it out of the settings to search.")
    wanted = [name for name in SPACE if name not in (*fixed, *ONLY_IF_NAMED)] if named is None else list(named)
    space = {name: _fitted(name, base) for name in SPACE if name in wanted and not _why_not(name, base, policy)}
    found = {
        name: searched for name, limits in space.items() if (searched := limits.including(settings_value(base, name)))
    }
    for name in named or ():
        if name not in found:
            raise UserError(
                f"{name} is {settings[name]:g} to begin with, which has no logarithm. Begin with another value: "
                "--config FILE.toml, or leave it out of the settings to search."
            )
    if not found:
        raise UserError("Nothing is left to search: every setting is fixed. Leave a flag out, or name --settings.")
    return found


def settings_value(config: ControlConfig, name: str) -> Any:
    """The value of a setting, as the options of a choice are written."""
    value = settings_of(config)[name]
    return tuple(value) if isinstance(value, list) else value


def _why_not(name: str, base: ControlConfig, policy: ActorCritic) -> str:
    """Why searching a setting is to no purpose here; empty if it is not."""
    if name not in settings_of(base):
        return f"{base.algorithm_name} does not have it"
    if (
        name in ("clip_epsilon", "clip_schedule")
        and isinstance(base.algorithm, PPO)
        and base.algorithm.objective != "clip"
    ):
        return "PPO-Penalty does not clip"
    if name in ("hidden_sizes", "activation", "normalize_observations") and policy.encoder is not None:
        return "the networks see images"
    if name == "log_std_init" and policy.log_std is None:
        return "the actions have no standard deviation of their own"
    if name == "normalize_rewards" and base.network.sign_rewards:
        return "sign_rewards is on"
    return ""


def _fitted(name: str, base: ControlConfig) -> Searched:
    """The limits of a setting that fit into the steps of a trial."""
    limits = SPACE[name]
    if name not in ("rollout_length", "batch_size"):
        return limits
    assert isinstance(limits, Choice)
    longest = base.total_steps // FEWEST_ITERATIONS
    per_option = base.environment.n_envs if name == "rollout_length" else 1
    options = [option for option in limits.options if option * per_option <= longest]
    if name == "rollout_length":  # whole pieces, with memory
        options = [option for option in options if option % (base.sequence_length or 1) == 0]
    return replace(limits, options=tuple(options) or (settings_value(base, name),))


def fitting(settings: dict[str, Any], base: ControlConfig) -> dict[str, Any]:
    """The same settings with a batch that fits into its rollout."""
    n_steps = base.environment.n_envs * settings.get("rollout_length", base.rollout_length)
    size = settings.get("batch_size", base.batch_size)
    if not hasattr(base.algorithm, "batch_size") or size <= n_steps:
        return settings
    return settings | {"batch_size": n_steps}


def in_short(value: Any) -> str:
    """A setting in few characters."""
    if isinstance(value, (tuple, list)):
        return "x".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
