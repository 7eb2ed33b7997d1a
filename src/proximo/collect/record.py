"""Episodes written down while they are played, in the environment's own values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from proximo.collect.demonstrations import Recording
from proximo.collect.packed_env import PackedEnv
from proximo.models.packing import MASK_KEY, PackedObservations, Path, checked_mask, leaves, rebuilt


@dataclass
class NotedEpisode:
    """One episode: of each step a list with the values at the leaves of its space."""

    observations: list[list[np.ndarray]] = field(default_factory=list)
    """One more than steps."""
    actions: list[list[np.ndarray]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    """As many as observations, but for the end; empty where `info` has none."""
    terminated: bool = False
    truncated: bool = False


class Notebook(gym.Wrapper):
    """Writes down what goes to and comes from an environment, episode by episode."""

    def __init__(self, env: gym.Env, mask_options: Sequence[int] = ()) -> None:
        """`mask_options` are those of the choices, where `info["action_mask"]` is to be kept."""
        super().__init__(env)
        self.episodes: list[NotedEpisode] = []
        self._mask_options = mask_options
        self._seen = list(leaves(env.observation_space, "observation"))
        self._acts = list(leaves(env.action_space, "action"))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode."""
        result = self.env.reset(seed=seed) if options is None else self.env.reset(seed=seed, options=options)
        if isinstance(result, tuple) and len(result) == 2:  # else the caller says what is wrong with it
            self.episodes.append(NotedEpisode())
            self._see(*result)
        return result

    def step(self, action: Any) -> Any:
        """Take one action."""
        given = [np.array(leaf.of(action, "action")) for leaf in self._acts]  # before the environment changes it
        result = self.env.step(action)
        if isinstance(result, tuple) and len(result) == 5:
            observation, reward, terminated, truncated, info = result
            episode = self.episodes[-1]
            episode.actions.append(given)
            episode.rewards.append(float(reward))
            episode.terminated, episode.truncated = bool(terminated), bool(truncated)
            self._see(observation, info, is_over=bool(terminated or truncated))
        return result

    def _see(self, observation: Any, info: Any, *, is_over: bool = False) -> None:
        episode = self.episodes[-1]
        episode.observations.append([np.array(leaf.of(observation, "observation")) for leaf in self._seen])
        if self._mask_options and not is_over:
            episode.masks.append(checked_mask(info.get(MASK_KEY), self._mask_options))


def with_notebook(env: gym.Env) -> tuple[gym.Env, Notebook]:
    """The environment with a notebook inside, beneath what makes rows of its values."""
    if not isinstance(env, PackedEnv):
        notebook = Notebook(env)
        return notebook, notebook
    rows, options = env.observation_space, ()
    if isinstance(rows, PackedObservations) and not rows.mask_is_observed:
        options = rows.options
    notebook = Notebook(env.env, options)
    return env.around(notebook), notebook


def recording_of(notebook: Notebook, episodes: Sequence[NotedEpisode]) -> Recording:
    """These episodes of environments like the notebook's, one after the other."""
    seen, acts = notebook.env.observation_space, notebook.env.action_space
    ends = np.cumsum([len(episode.rewards) for episode in episodes]) - 1
    terminations, truncations = np.zeros(int(ends[-1]) + 1, bool), np.zeros(int(ends[-1]) + 1, bool)
    terminations[ends] = [episode.terminated for episode in episodes]
    truncations[ends] = [episode.truncated for episode in episodes]
    masks = [mask for episode in episodes for mask in episode.masks]
    return Recording(
        _stacked(seen, "observation", [step for episode in episodes for step in episode.observations[:-1]]),
        _stacked(acts, "action", [step for episode in episodes for step in episode.actions]),
        np.array([reward for episode in episodes for reward in episode.rewards]),
        terminations,
        truncations,
        _stacked(seen, "observation", [episode.observations[-1] for episode in episodes]),
        np.stack(masks) if masks else None,
        seen,
        acts,
    )


def _stacked(space: gym.Space, what: str, steps: list[list[np.ndarray]]) -> Any:
    """Values at the leaves, step by step, as a nested value of arrays."""
    parts: dict[Path, Any] = {
        leaf.path: np.stack([step[index] for step in steps]) for index, leaf in enumerate(leaves(space, what))
    }
    return rebuilt(space, parts, ())
