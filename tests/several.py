"""Small environments of several agents whose every number is known, for tests."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv


class Mortal(ParallelEnv):
    """Three agents that leave at their own times, in their own ways; nothing is random.

    `ends` has for each agent its last step and how it ends there. An agent sees its number, the step and the episode,
    and gets 100 for its number, 10 for the episode and 1 for the step.
    """

    metadata = {"name": "mortal"}  # noqa: RUF012
    ends = {"a": (2, "terminated"), "b": (3, "truncated"), "c": (5, "both")}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.possible_agents = list(self.ends)
        self.agents: list[str] = []
        self.episode = -1
        self.given: list[dict[str, Any]] = []
        self.render_mode = render_mode

    @cache  # noqa: B019
    def observation_space(self, agent):
        return spaces.Box(0.0, 1000.0, (3,), np.float32)

    @cache  # noqa: B019
    def action_space(self, agent):
        return spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        self.agents = list(self.possible_agents)
        self.t = 0
        self.episode += 1
        return {agent: self.see(agent) for agent in self.agents}, {agent: {} for agent in self.agents}

    def step(self, actions):
        assert set(actions) == set(self.agents), f"actions for {set(actions)}, and {set(self.agents)} are there"
        self.given.append(dict(actions))
        self.t += 1
        here = list(self.agents)
        is_last = {agent: self.t == self.ends[agent][0] for agent in here}
        how = {agent: self.ends[agent][1] for agent in here}
        self.agents = [agent for agent in here if not is_last[agent]]
        return (
            {agent: self.see(agent) for agent in here},
            {agent: float(self.see(agent) @ [100.0, 1.0, 10.0]) for agent in here},
            {agent: is_last[agent] and how[agent] != "truncated" for agent in here},
            {agent: is_last[agent] and how[agent] != "terminated" for agent in here},
            {agent: {} for agent in here},
        )

    def see(self, agent):
        return np.array([self.possible_agents.index(agent), self.t, self.episode], np.float32)


class Random(ParallelEnv):
    """Two agents that see noise, are paid by noise and by what both do, and leave by chance; all hangs on the seed."""

    metadata = {"name": "random"}  # noqa: RUF012

    def __init__(self) -> None:
        self.possible_agents = ["left", "right"]
        self.agents: list[str] = []

    @cache  # noqa: B019
    def observation_space(self, agent):
        return spaces.Box(-np.inf, np.inf, (2,), np.float32)

    @cache  # noqa: B019
    def action_space(self, agent):
        return spaces.Discrete(3)

    def state(self):
        return self.hidden

    def reset(self, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        self.hidden = self.rng.normal(size=4)
        return self.see(self.agents), {agent: {} for agent in self.agents}

    def step(self, actions):
        here = list(self.agents)
        self.hidden = self.rng.normal(size=4) + sum(actions.values())
        ends = {agent: bool(self.rng.random() < 0.2) for agent in here}
        cuts = {agent: bool(self.rng.random() < 0.1) for agent in here}
        self.agents = [agent for agent in here if not (ends[agent] or cuts[agent])]
        rewards = {agent: float(self.rng.normal() + actions[agent]) for agent in here}
        return self.see(here), rewards, ends, cuts, {agent: {} for agent in here}

    def see(self, agents):
        return {agent: self.rng.normal(size=2).astype(np.float32) for agent in agents}


class Differ(ParallelEnv):
    """Two agents that see nothing, and are paid 1 each where they do not do the same: at best 8 an episode."""

    metadata = {"name": "differ"}  # noqa: RUF012

    def __init__(self) -> None:
        self.possible_agents = ["one", "two"]
        self.agents: list[str] = []

    @cache  # noqa: B019
    def observation_space(self, agent):
        return spaces.Box(-1.0, 1.0, (1,), np.float32)

    @cache  # noqa: B019
    def action_space(self, agent):
        return spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        self.agents, self.t = list(self.possible_agents), 0
        return {agent: np.zeros(1, np.float32) for agent in self.agents}, {agent: {} for agent in self.agents}

    def step(self, actions):
        here, self.t = list(self.agents), self.t + 1
        reward = float(actions["one"] != actions["two"])
        over = self.t == 8
        self.agents = [] if over else here
        seen = {agent: np.zeros(1, np.float32) for agent in here}
        return seen, dict.fromkeys(here, reward), dict.fromkeys(here, over), dict.fromkeys(here, False), {}


class Luck(ParallelEnv):
    """Two agents that should each name the bit it sees, in a team whose common reward is mostly luck.

    One step an episode. The reward of both is 1 for each bit that was named, at best 2, and `luck` more or less, by the
    toss of a coin that only the state shows. An agent's own observation says nothing of the other's bit or the coin.
    """

    metadata = {"name": "luck"}  # noqa: RUF012
    luck = 10.0

    def __init__(self, render_mode: str | None = None) -> None:
        self.possible_agents = ["one", "two"]
        self.agents: list[str] = []
        self.render_mode = render_mode

    @cache  # noqa: B019
    def observation_space(self, agent):
        return spaces.Box(-1.0, 1.0, (1,), np.float32)

    @cache  # noqa: B019
    def action_space(self, agent):
        return spaces.Discrete(2)

    def state(self):
        return np.array([*self.bits, self.coin], np.float32)

    def reset(self, seed=None, options=None):
        rng = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        self.bits, self.coin = rng.choice([-1.0, 1.0], 2), float(rng.choice([-1.0, 1.0]))
        return self.see(), {agent: {} for agent in self.agents}

    def step(self, actions):
        here, self.agents = self.agents, []
        right = sum((actions[agent] == 1) == (bit > 0) for agent, bit in zip(here, self.bits, strict=True))
        reward = float(right + self.luck * self.coin)
        ends = dict.fromkeys(here, True)
        return self.see(), dict.fromkeys(here, reward), ends, dict.fromkeys(here, False), {agent: {} for agent in here}

    def see(self):
        return {a: np.array([bit], np.float32) for a, bit in zip(self.possible_agents, self.bits, strict=True)}


class Kinds(ParallelEnv):
    """A pusher of numbers and a chooser with a mask: agents of different spaces. Only what is possible may be done."""

    metadata = {"name": "kinds"}  # noqa: RUF012

    def __init__(self) -> None:
        self.possible_agents = ["pusher", "chooser"]
        self.agents: list[str] = []

    @cache  # noqa: B019
    def observation_space(self, agent):
        if agent == "pusher":
            return spaces.Box(-1.0, 1.0, (2, 2), np.float32)
        return spaces.Dict({"where": spaces.Discrete(4), "action_mask": spaces.MultiBinary(3)})

    @cache  # noqa: B019
    def action_space(self, agent):
        return spaces.Box(-2.0, 2.0, (1,), np.float32) if agent == "pusher" else spaces.Discrete(3)

    def reset(self, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.agents, self.t = list(self.possible_agents), 0
        return self.see(), {agent: {} for agent in self.agents}

    def step(self, actions):
        assert abs(float(actions["pusher"][0])) <= 2.0
        assert self.mask[int(actions["chooser"])] == 1
        here, self.t = list(self.agents), self.t + 1
        over = self.t == 6
        self.agents = [] if over else here
        rewards = {"pusher": -abs(float(actions["pusher"][0]) - 1.0), "chooser": float(actions["chooser"])}
        return self.see(), rewards, dict.fromkeys(here, False), dict.fromkeys(here, over), {agent: {} for agent in here}

    def see(self):
        self.mask = np.ones(3, np.int8)
        self.mask[self.t % 3] = 0
        chooser = {"where": int(self.rng.integers(4)), "action_mask": self.mask.copy()}
        return {"pusher": self.rng.uniform(-1, 1, (2, 2)).astype(np.float32), "chooser": chooser}
