"""The runs that benchmarks/diagnosis.py judges the diagnosis by: what is wrong with each, and what must be found.

A case is a task with settings. `must` names the findings that its fault is. `may` names what such a fault usually
brings with it: that is neither counted for nor against a rule. `when` says for some of the findings what must have
happened for the fault to count: a high learning rate does not ruin every seed.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

SEEDS = (0, 1, 2)
HELD_OUT_SEED = 2

When = Literal["failed", "collapsed", "certain", "never reached"]


@dataclass(frozen=True)
class Case:
    """A fault, or a healthy run where `must` is empty and `good` is the mean return, or reward, that it must reach."""

    name: str
    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    must: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    when: dict[str, When] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS

    @property
    def key(self) -> str:
        """What a run of it is called in the results, without the seed."""
        return f"{self.name}, {self.task}"


# --- control ------------------------------------------------------------------------------------------------------


class NoReward(gym.Env):
    """Walks of random length without any reward; or of one length, where `has_ends` is False."""

    observation_space = gym.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, has_ends: bool = True) -> None:
        self.has_ends = has_ends

    def _seen(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 4).astype(np.float32)

    def _reward(self) -> float:
        return 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._seen(), {}

    def step(self, action):
        self.steps += 1
        over = self.has_ends and bool(self.np_random.random() < 0.05)
        return self._seen(), self._reward(), over, self.steps >= 100, {}


class ChanceReward(NoReward):
    """Rewards that no action has any part in."""

    def _reward(self) -> float:
        return float(self.np_random.normal())


class SwellingReward(NoReward):
    """A reward that grows with the age of the environment: what was learned yesterday is worth nothing today."""

    age = 0

    def _reward(self) -> float:
        self.age += 1
        return 1.0025**self.age


class SwellingNoise(NoReward):
    """One for every step, beneath a noise that grows with the age of the environment, up to a thousand."""

    age = 0

    def _reward(self) -> float:
        self.age += 1
        return 1.0 + min(10 ** (self.age / 1000), 1e3) * float(self.np_random.standard_normal())


class Endless(NoReward):
    """Never ends an episode."""

    def step(self, action):
        return self._seen(), float(action), False, False, {}


class Slow(NoReward):
    """A step takes a millisecond, and the action is the reward."""

    def step(self, action):
        time.sleep(0.001)
        seen, _, over, cut, more = super().step(action)
        return seen, float(action), over, cut, more


class Scaled(gym.Wrapper):
    """An environment in other units."""

    def __init__(self, env: gym.Env, observation: Any = 1.0, offset: Any = 0.0, reward: float = 1.0) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, gym.spaces.Box)
        self.factor = np.asarray(observation, np.float64) * np.ones(env.observation_space.shape)
        self.offset, self.reward = np.asarray(offset, np.float64), reward
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)

    def _scaled(self, seen: np.ndarray) -> np.ndarray:
        return (seen * self.factor + self.offset).astype(np.float32)

    def reset(self, **keywords):
        seen, more = self.env.reset(**keywords)
        return self._scaled(seen), more

    def step(self, action):
        seen, reward, over, cut, more = self.env.step(action)
        return self._scaled(seen), float(reward) * self.reward, over, cut, more


@dataclass(frozen=True)
class Task:
    """Where a case is trained: `good` is a return that only a policy that has learned something reaches."""

    make: Any
    settings: dict[str, Any]
    good: float
    is_held_out: bool = False


SANE: dict[str, Any] = dict(
    n_envs=8, rollout_length=128, batch_size=128, n_epochs=10, gamma=0.99, gae_lambda=0.95, learning_rate=1e-3,
    learning_rate_schedule="constant", clip_epsilon=0.2, clip_schedule="constant", entropy_coef=0.0,
    normalize_observations=False, normalize_rewards=False, threads=1,
)  # fmt: skip
"""Settings that most libraries begin with, with shorter rollouts, larger minibatches and a higher learning rate."""

CARTPOLE = SANE | dict(total_steps=40_960)
PENDULUM = SANE | dict(total_steps=81_920, rollout_length=256, batch_size=256, gamma=0.9)
ACROBOT = SANE | dict(total_steps=61_440)
POLE = SANE | dict(total_steps=40_960)
TASKS = {
    "CartPole-v1": Task("CartPole-v1", CARTPOLE, 150.0),
    "Pendulum-v1": Task("Pendulum-v1", PENDULUM, -700.0),
    "Acrobot-v1": Task("Acrobot-v1", ACROBOT, -200.0, is_held_out=True),
    "InvertedPendulum-v5": Task("InvertedPendulum-v5", POLE, 100.0, is_held_out=True),
    "MountainCar-v0": Task("MountainCar-v0", SANE | dict(total_steps=40_960), -199.0),
    "MountainCarContinuous-v0": Task("MountainCarContinuous-v0", {}, 60.0, is_held_out=True),
    "LunarLander-v3": Task("LunarLander-v3", dict(total_steps=81_920), -120.0, is_held_out=True),
    "no reward": Task(NoReward, SANE | dict(total_steps=20_480), 1.0),
    "no reward, no end": Task(lambda: NoReward(has_ends=False), SANE | dict(total_steps=40_960), 1.0),
    "reward by chance": Task(ChanceReward, SANE | dict(total_steps=20_480), 1e9),
    "swelling reward": Task(SwellingReward, SANE | dict(total_steps=40_960), 1e99),
    "swelling noise": Task(SwellingNoise, SANE | dict(total_steps=40_960), 1e99),
    "endless": Task(Endless, SANE | dict(total_steps=61_440), 1.0),
    "slow": Task(Slow, SANE | dict(total_steps=10_240, n_envs=4, rollout_length=256, n_epochs=4), 1.0),
}
COMMON = ("returns_flat", "critic_explains_nothing", "return_collapsed", "entropy_collapsed", "updates_too_large")
"""What follows from many faults, where nothing is learned any more."""
FACTS = ("environment_dominates", "updates_dominate")
"""Where the time goes is measured, not concluded: true of healthy runs too."""


def units(case: str, task: str, **factors: Any) -> str:
    """Enter a task in other units, and return its name."""
    name = f"{task}, {case}"
    plain = TASKS[task]
    good = plain.good * factors.get("reward", 1.0)
    TASKS[name] = Task(lambda: Scaled(gym.make(task), **factors), plain.settings, good, plain.is_held_out)
    return name


def control_cases() -> list[Case]:
    """Every control case."""
    return [*_healthy(), *_sizes(), *_updates(), *_tasks()]


def _healthy() -> list[Case]:
    many = tuple(range(5))
    own = dict.fromkeys(SANE)  # None: what the preset says
    return [
        *(Case("sane settings", task, seeds=many) for task in ("CartPole-v1", "Pendulum-v1", "Acrobot-v1")),
        Case("sane settings", "InvertedPendulum-v5", seeds=many),
        Case("preset", "CartPole-v1", own | dict(total_steps=None, threads=1), seeds=many),
        Case("preset", "Pendulum-v1", own | dict(total_steps=None, threads=1)),
        Case("preset", "MountainCarContinuous-v0", dict(threads=1)),
        Case("preset, cut short", "LunarLander-v3", dict(threads=1)),
        Case("preset, cut short", "Acrobot-v1", own | dict(total_steps=151_552, threads=1)),
        Case("both normalizers", "CartPole-v1", dict(normalize_observations=True, normalize_rewards=True)),
        Case("both normalizers", "Pendulum-v1", dict(normalize_observations=True, normalize_rewards=True)),
        Case("both normalizers", "Acrobot-v1", dict(normalize_observations=True, normalize_rewards=True)),
        Case("entropy_coef 0.01", "CartPole-v1", dict(entropy_coef=0.01)),
        Case("short rollouts", "CartPole-v1", dict(rollout_length=64, batch_size=128)),
        Case("one environment", "CartPole-v1", dict(n_envs=1, rollout_length=2048)),
        Case("target_kl 0.02", "InvertedPendulum-v5", dict(target_kl=0.02)),
    ]


def _sizes() -> list[Case]:
    cases = []
    normalized = dict(normalize_observations=True, normalize_rewards=True)
    apart = {
        "CartPole-v1": [1e4, 1, 1, 1],
        "Pendulum-v1": [1, 1, 1e4],
        "Acrobot-v1": [1, 1, 1, 1, 1e4, 1],
        "InvertedPendulum-v5": [1, 1, 1e4, 1],
    }
    may = (*COMMON, "value_loss_dwarfs", "updates_too_small", "entropy_held_up", "advantages_degenerate")
    for task, factors in apart.items():
        name = units("one number x 1e4", task, observation=factors)
        cases.append(Case("units apart", name, must=("observations_out_of_scale",), may=may))
        cases.append(Case("units apart, normalized", name, normalized, seeds=(0, 2)))
    small = units("three numbers x 1e-4", "CartPole-v1", observation=[1, 1e-4, 1e-4, 1e-4])
    offset = units("far from 0", "InvertedPendulum-v5", offset=1e4)
    whole = units("all x 1e4", "CartPole-v1", observation=1e4)
    cases += [
        Case("units apart", name, must=("observations_out_of_scale",), may=may) for name in (small, offset, whole)
    ]
    for task in ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "InvertedPendulum-v5"):
        for factor in (1e4, 1e-4):
            name = units(f"reward x {factor:g}", task, reward=factor)
            cases.append(Case("reward scale", name, must=("rewards_out_of_scale",), may=may))
        name = units("reward x 1e4", task, reward=1e4)
        cases.append(Case("reward scale, normalized", name, normalized, seeds=(0, 2)))
    for task in ("CartPole-v1", "Acrobot-v1", "InvertedPendulum-v5"):
        cases.append(Case("value_coef 1e5", task, dict(value_coef=1e5), ("value_loss_dwarfs",), may))
    return cases


_HIGH_RATES = (("CartPole-v1", 0.03), ("Pendulum-v1", 0.01), ("Acrobot-v1", 0.01),
               ("InvertedPendulum-v5", 0.01))  # fmt: skip


def _updates() -> list[Case]:
    cases, may = [], (*COMMON, "value_loss_exploded", "advantages_degenerate", "episodes_all_cut_off")
    for task in ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "InvertedPendulum-v5"):
        lost = ("updates_too_large",)
        cases += [
            Case("learning rate 1e-8", task, dict(learning_rate=1e-8), ("updates_too_small",), may),
            Case(
                "learning rate 0.05",
                task,
                dict(learning_rate=0.05),
                (*lost, "entropy_collapsed"),
                may,
                {"entropy_collapsed": "certain"},
            ),
            Case("no critic learns", task, dict(value_coef=0.0), ("critic_explains_nothing",), may),
            Case("target_kl 1e-5", task, dict(target_kl=1e-5), ("kl_stop_dominates",), (*may, "updates_too_small")),
        ]
        if task != "InvertedPendulum-v5":
            many, both = dict(learning_rate=1e-2, n_epochs=30), (*lost, "return_collapsed")
            when: dict[str, When] = {"updates_too_large": "failed", "return_collapsed": "collapsed"}
            cases.append(Case("30 epochs, learning rate 0.01", task, many, both, may, when))
        cases.append(Case("entropy_coef 1", task, dict(entropy_coef=1.0), ("entropy_held_up",), may))
    lost = ("return_collapsed", "entropy_collapsed")
    when = {"return_collapsed": "collapsed", "entropy_collapsed": "certain"}
    for task, rate in _HIGH_RATES:
        settings = dict(learning_rate=rate, n_epochs=20, total_steps=max(61_440, TASKS[task].settings["total_steps"]))
        cases.append(Case(f"learning rate {rate:g}, 20 epochs", task, settings, lost, may, when))
    return cases


def _tasks() -> list[Case]:
    may = (*COMMON, "updates_too_small", "advantages_degenerate", "rewards_constant", "episodes_all_cut_off")
    nan = units("reward x 1e38", "CartPole-v1", reward=1e38)
    return [
        Case("no reward", "no reward", must=("rewards_constant", "advantages_degenerate"), may=may),
        Case("no reward", "no reward, no end", must=("episodes_all_cut_off", "advantages_degenerate"), may=may),
        Case("goal out of reach", "MountainCar-v0", must=("episodes_all_cut_off",), may=may,
             when={"episodes_all_cut_off": "never reached"}),
        Case("reward by chance", "reward by chance", must=("returns_flat", "critic_explains_nothing"), may=may),
        Case("swelling reward", "swelling reward", must=("rewards_out_of_scale",),
             may=(*may, "value_loss_exploded", "value_loss_dwarfs")),
        Case("swelling noise", "swelling noise", must=("value_loss_exploded",),
             may=(*may, "rewards_out_of_scale", "value_loss_dwarfs")),
        Case("endless", "endless", must=("no_episode_finished",), may=may),
        Case("slow", "slow", must=("environment_dominates",), may=may),
        Case("broken numbers", nan, must=("not_finite",), may=(*may, "rewards_out_of_scale", "value_loss_dwarfs")),
    ]  # fmt: skip


# --- language -----------------------------------------------------------------------------------------------------

NOUNS = ["cat", "dog", "bird", "fish", "tree", "house", "sun", "moon"]
VERBS = ["runs", "sleeps", "eats", "sees", "likes"]
ADJECTIVES = ["red", "blue", "green", "big", "small", "old", "new", "good", "bad"]
Score = Callable[[list[str], list[str]], list[float | None]]


def sentence(rng: Any) -> str:
    """A sentence of the small language that models are taught before they are aligned."""
    words = ["the", rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(VERBS)]
    if rng.random() < 0.6:
        words += ["the", rng.choice(ADJECTIVES), rng.choice(NOUNS)]
    if rng.random() < 0.4:
        words += ["and", "the", rng.choice(NOUNS), rng.choice(VERBS)]
    return " ".join([*words, "."])


def share_of(*wanted: str) -> Score:
    """The share of words that are wanted."""
    return lambda prompts, texts: [sum(w in wanted for w in t.split()) / max(len(t.split()), 1) for t in texts]


def count_of(*wanted: str) -> Score:
    """How many words are wanted: the more is said, the better."""
    return lambda prompts, texts: [float(sum(w in wanted for w in t.split())) for t in texts]


def has_word(*wanted: str) -> Score:
    """1 where a word is said at all."""
    return lambda prompts, texts: [float(any(w in wanted for w in t.split())) for t in texts]


def has_both(*wanted: str) -> Score:
    """1 where all of the words are said."""
    return lambda prompts, texts: [float(set(wanted) <= set(t.split())) for t in texts]


def length(prompts: list[str], texts: list[str]) -> list[float | None]:
    """The longer, the better."""
    return [len(t.split()) / 10 for t in texts]


def near_length(wanted: int) -> Score:
    """Best at so many words."""
    return lambda prompts, texts: [-abs(len(t.split()) - wanted) / 5 for t in texts]


def by_chance(prompts: list[str], texts: list[str]) -> list[float | None]:
    """Scores that have nothing to do with the text."""
    return np.random.default_rng(zlib.crc32(" | ".join(texts).encode())).normal(size=len(texts)).tolist()


def constant(prompts: list[str], texts: list[str]) -> list[float | None]:
    """The same for all but for rounding."""
    return [1.0 + 1e-9 * len(t) for t in texts]


def patchy(prompts: list[str], texts: list[str]) -> list[float | None]:
    """Nothing where a common word is said."""
    return [
        None if "cat" in t.split() or "dog" in t.split() else s
        for t, s in zip(texts, share_of("sun", "good")(prompts, texts), strict=True)
    ]


def sound(prompts: list[str], texts: list[str]) -> list[float]:
    """A gold score: different wanted words, less what is said twice or never ends."""
    scores = []
    for text in texts:
        words = text.split()
        scores.append(len({"good", "cat", "sun"}.intersection(words)) - 0.3 * (len(words) - len(set(words))))
    return scores


GOLD = (f"{Path(__file__).resolve()}:sound",)
TAUGHT: dict[str, Any] = dict(
    n_iterations=25, prompts_per_iteration=48, batch_size=48, n_epochs=2, learning_rate=1e-3, max_new_tokens=24,
    sharing="trunk", threads=1, n_samples=0, beta=0.1,
)  # fmt: skip
REWARDS: dict[str, Score] = {
    "share of words": share_of("good", "cat", "sun"),
    "share of other words": share_of("moon", "big", "eats"),
    "count of words": count_of("good", "cat", "sun"),
    "count of other words": count_of("bird", "small", "sees"),
    "count of one word": count_of("cat"),
    "count of another word": count_of("fish"),
    "has a word": has_word("good", "cat", "the"),
    "has another word": has_word("and", "fish", "tree"),
    "length": length,
    "near 16 words": near_length(16),
    "near 14 words": near_length(14),
    "near 6 words": near_length(6),
    "chance": by_chance,
    "constant": constant,
    "patchy": patchy,
    "two rare words": has_both("sun", "sees"),
}
HELD_OUT_REWARDS = ("share of other words", "count of other words", "count of another word", "has another word",
                    "near 14 words", "near 6 words")  # fmt: skip


def language_cases() -> list[Case]:
    """Every alignment case; its task is the reward."""
    may = ("over_optimization_likely", "kl_ran_away", "over_optimization", "responses_do_not_end", "responses_grow",
           "text_repeats", "reward_saturated", "critic_explains_nothing", "groups_all_alike")  # fmt: skip
    lost = (*may, "entropy_collapsed", "reward_flat", "updates_too_large", "reward_constant")
    free, five = dict(beta=1e-4, learning_rate=3e-3), tuple(range(5))
    roomy = dict(max_new_tokens=48, learning_rate=3e-3, beta=0.02, n_iterations=40)
    pairs = dict(algorithm="grpo", learning_rate=1e-4, responses_per_prompt=2, prompts_per_iteration=32)
    easy = dict(learning_rate=5e-3, beta=0.02, n_iterations=40)
    cases = [
        *(Case("sane settings", reward, seeds=five) for reward in ("share of words", "share of other words")),
        Case("sane settings", "near 6 words", seeds=five),
        Case("grpo", "share of words", dict(algorithm="grpo")),
        Case("adaptive beta", "share of other words", dict(beta_control="adaptive", beta_target=4.0)),
        Case("small steps, 4 epochs", "share of words", dict(learning_rate=5e-4, n_epochs=4)),
    ]
    for reward in ("count of words", "count of other words"):
        cases += [
            Case("hardly any beta", reward, free, ("over_optimization_likely",), lost),
            Case("hardly any beta, gold", reward, free | dict(gold=GOLD), ("over_optimization",), lost),
        ]
    for reward in ("count of one word", "count of another word"):
        cases.append(Case("hardly any beta", reward, free, ("text_repeats",), lost))
    for reward in ("has a word", "has another word"):
        cases.append(Case("easy reward", reward, easy, ("reward_saturated",), lost))
    for reward in ("near 16 words", "near 14 words"):
        cases.append(Case("pays for length", reward, roomy, ("responses_grow",), lost))
    return [
        *cases,
        Case("pays for length", "length", free, ("responses_do_not_end",), lost),
        Case("reward by chance", "chance", {}, ("reward_flat",), lost),
        Case("no brake", "chance", dict(beta=0.0001, learning_rate=0.01, n_iterations=40), ("kl_ran_away",), lost),
        Case("constant reward", "constant", {}, ("reward_constant",), lost),
        Case("missing answers", "patchy", dict(max_missing_rewards=1.0), ("rewards_missing",), lost),
        Case("learning rate 1e-9", "share of words", dict(learning_rate=1e-9), ("updates_too_small",), lost),
        Case("learning rate 0.1", "share of words", dict(learning_rate=0.1), ("updates_too_large",), lost),
        Case("learning rate 0.1", "share of other words", dict(learning_rate=0.1), ("updates_too_large",), lost),
        Case("no critic learns", "share of words", dict(value_coef=0.0), ("critic_explains_nothing",), lost),
        Case("too little room", "share of words", dict(max_new_tokens=6, truncation="mask"), ("responses_left_out",),
             lost),
        Case("hard prompts", "two rare words", pairs, ("groups_all_alike",), lost),
    ]  # fmt: skip
