"""`ParallelEnvs`: PettingZoo's parallel environments, in which all agents act at once, as rows of one batch per policy.

Agents that share a policy are a `Group`, and each agent in each environment is a row of its group's arrays: B is
environments times agents, environment by environment. Whoever has died, or does not take part in an episode, is a row
that is not valid (`Step.valid`) until the environment is reset, which is when none of its agents is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from gymnasium import spaces

from proximo.collect.envs import LONGEST_REPLAY, EnvironmentFault, Snapshot, SpacePolicy, Step, close_quietly
from proximo.collect.envs import episode_seed as seed_of
from proximo.collect.packed_env import ActionMask
from proximo.collect.returned_values import SpaceCheck, end_of, reward_of, shown
from proximo.collect.several import action_of, agents_of, blank_row, policy_spaces, row_dtype, row_of, spaces_of
from proximo.errors import UserError, in_words, with_traceback
from proximo.models.agents import tagged, with_agent_id
from proximo.models.packing import is_image

Sharing = Literal["shared", "by_space", "independent"]
"""Which agents share a policy: all; those whose spaces are equal; none."""

RETURNS = "(observations, rewards, terminations, truncations, infos), each a dict by agent"


@dataclass(frozen=True)
class Group:
    """Agents that share a policy, and the spaces that it has."""

    name: str
    agents: tuple[str, ...]
    observation_space: spaces.Box
    action_space: spaces.Space
    has_ids: bool
    """Whether each is told its number."""
    box: spaces.Box | None = None
    """The environment's own space, where an observation is the one-hot number of the agent and then that, flat."""

    @property
    def n_own(self) -> int:
        """How many numbers an observation is."""
        return int(np.prod(self.observation_space.shape))


class JointEpisode(NamedTuple):
    """An episode that has ended: what each agent got (NaN for one that took no part), and its steps."""

    env_index: int
    returns: tuple[float, ...]
    length: int


class _Rows:
    """The arrays of one group: see `Step`."""

    def __init__(self, group: Group, n_envs: int, n_state: int, *, is_central: bool) -> None:
        n, space = n_envs * len(group.agents), group.observation_space
        self.blank = blank_row(space)
        if is_central:
            self.blank = np.concatenate([self.blank.ravel().astype(np.float32), np.zeros(n_state, np.float32)])
        self.dtype = np.dtype(np.float32) if is_central else row_dtype(space)
        self.observations = np.repeat(self.blank[None], n, 0)
        self.final = self.observations.copy()
        self.rewards = np.zeros(n)
        self.terminated, self.truncated, self.valid = (np.zeros(n, bool) for _ in range(3))
        self.check = SpaceCheck.of(space)


def grouped(
    env: Any, env_id: str, sharing: Sharing, *, agent_id: bool, action_mask: ActionMask = "auto"
) -> dict[str, Group]:
    """The groups of an environment's agents, by name.

    Raises:
        UserError: if agents that are to share a policy have other spaces, or one cannot be learned from.
    """
    agents = agents_of(env, env_id)
    found = {agent: spaces_of(env, env_id, agent) for agent in agents}
    members: dict[str, list[str]] = {}
    for agent in agents:
        alike = [name for name, others in members.items() if found[others[0]] == found[agent]]
        if sharing == "shared" and members and not alike:
            first = agents[0]
            raise UserError(
                f"{env_id}: agents is 'shared', but the spaces of {first} and {agent} are not equal: observations "
                f"{found[first][0]} and {found[agent][0]}, actions {found[first][1]} and {found[agent][1]}. Use "
                "--agents by_space (equal ones share a policy) or --agents independent, or let the environment pad "
                "them to one shape."
            )
        if alike and sharing != "independent":
            members[alike[0]].append(agent)
        else:
            members["shared" if sharing == "shared" else agent] = [agent]
    groups = {}
    for name, names in members.items():
        seen, acts = found[names[0]]
        has_ids = agent_id and len(names) > 1
        box = seen if has_ids and isinstance(seen, spaces.Box) and not is_image(seen) else None
        seen = with_agent_id(seen, len(names)) if has_ids else seen
        rows, actions = policy_spaces(seen, acts, action_mask, f"{env_id}, agent {names[0]}")
        groups[name] = Group(name, tuple(names), rows, actions, has_ids, None if getattr(rows, "options", ()) else box)
    return groups


def _own_row(group: Group, agent: str, observation: Any, info: Any, *, is_over: bool) -> np.ndarray:
    """What one agent sees, as its policy sees it.

    Raises:
        ValueError: if it does not fit its space, or no action is possible.
    """
    number = group.agents.index(agent)
    if group.box is None:
        seen = tagged(observation, number) if group.has_ids else observation
        return row_of(group.observation_space, seen, info, is_over=is_over)
    # As PackedObservations would have it (keys in sorted order), in a tenth of the time.
    row = np.zeros(group.n_own, np.float32)
    row[number] = 1.0
    row[len(group.agents) :] = row_of(group.box, observation, info, is_over=is_over).ravel()
    return row


class ParallelEnvs:
    """N parallel environments in this process, stepped one after the other.

    Episode e of environment i is seeded by `episode_seed(seed, i, e)`, and the joint actions since each reset are
    kept, so an open episode can be rebuilt by playing it again (unless it is longer than `LONGEST_REPLAY`).
    """

    def __init__(
        self,
        make: Callable[[], Any],
        n_envs: int,
        seed: int,
        *,
        name: str = "the environment",
        sharing: Sharing = "shared",
        agent_id: bool = True,
        is_central: bool = False,
        action_mask: ActionMask = "auto",
        max_episode_steps: int | None = None,
        on_space_violation: SpacePolicy = "raise",
    ) -> None:
        """Make the environments.

        With `is_central` the state of the environment stands behind each agent's own observation: `env.state()`, or,
        where there is none, the observations of all agents one after the other (zeros for those that are not there).

        Raises:
            UserError: if something about the environments is not as PettingZoo has it.
        """
        self.n_envs = n_envs
        self.faults: list[EnvironmentFault] = []
        self.n_restarts = 0
        self.warnings: list[str] = []
        self.ended: list[JointEpisode] = []
        """Episodes that ended since somebody last emptied the list."""
        self._name, self._seed, self._on_violation = name, seed, on_space_violation
        self._limit = max_episode_steps
        self._envs = [make() for _ in range(n_envs)]
        if len({id(env) for env in self._envs}) < n_envs:
            raise UserError(f"{name}: the factory gave the same environment twice; it must make a new one each time.")
        self.agents = agents_of(self._envs[0], name)
        self.groups = grouped(self._envs[0], name, sharing, agent_id=agent_id, action_mask=action_mask)
        self._group_of = {agent: group for group in self.groups.values() for agent in group.agents}
        self._has_own_state, self.n_state = False, 0
        self._state_sizes = [self._group_of[agent].n_own for agent in self.agents]
        self._is_central = is_central
        if is_central:
            self._look_for_state()
        self._rows = {
            name: _Rows(group, n_envs, self.n_state, is_central=is_central) for name, group in self.groups.items()
        }
        self._live: list[list[str]] = [[] for _ in range(n_envs)]
        self._took_part: list[tuple[str, ...]] = [()] * n_envs
        self._episodes = np.zeros(n_envs, np.int64)
        self._lengths = np.zeros(n_envs, np.int64)
        self._returns = np.zeros((n_envs, len(self.agents)))
        self._history: list[list[dict[str, np.ndarray]]] = [[] for _ in range(n_envs)]

    def in_words(self) -> str:
        """Agents, observations and actions."""
        parts = []
        for group in self.groups.values():
            seen, acts = group.observation_space, group.action_space
            actions = f"{acts.n} actions" if isinstance(acts, spaces.Discrete) else f"actions {shown(acts)}"
            names = ", ".join(group.agents)
            parts.append(f"{names if len(names) <= 60 else f'{len(group.agents)} agents'}: {seen.shape}, {actions}")
        state = f"; the critic also sees a state of {self.n_state}" if self._is_central else ""
        return f"({len(self.agents)} agents, {len(self.groups)} policies: {'; '.join(parts)}{state})"

    def reset(self) -> dict[str, np.ndarray]:
        """Begin episode 0 of each environment; return observations `[N * agents, *O]` of each group.

        Raises:
            UserError: if an environment raises or returns what it must not.
        """
        self._episodes[:] = 0
        for index in range(self.n_envs):
            self._begin_episode(index)
        return {name: rows.observations for name, rows in self._rows.items()}

    def step(self, actions: dict[str, np.ndarray]) -> dict[str, Step]:
        """Step each environment with the actions `[N * agents, *A]` of each group; those of the dead are not used.

        Raises:
            UserError: if an environment raises or returns what it must not.
        """
        over = [self._step_one(index, self._actions_for(index, actions)) for index in range(self.n_envs)]
        self._check_values()
        for rows in self._rows.values():
            np.copyto(rows.observations, rows.final)
        for index in np.flatnonzero(over):
            took_part = self._took_part[index]
            returns = (
                float(value) if agent in took_part else float("nan")
                for agent, value in zip(self.agents, self._returns[index], strict=True)
            )
            self.ended.append(JointEpisode(int(index), tuple(returns), int(self._lengths[index])))
            self._episodes[index] += 1
            self._begin_episode(int(index))
        return {
            name: Step(rows.observations, rows.rewards, rows.terminated, rows.truncated, rows.final, rows.valid)
            for name, rows in self._rows.items()
        }

    def snapshot(self) -> Snapshot:
        """Episode numbers, the open episodes' actions, and the observations and returns they have led to.

        `lengths` is how many actions each open episode has, or -1 where they have been forgotten: such an episode
        cannot be come back to.
        """
        lengths = [-1 if len(h) != n else int(n) for h, n in zip(self._history, self._lengths, strict=True)]
        arrays = {
            "episodes": self._episodes.copy(),
            "lengths": np.array(lengths),
            "returns": self._returns.copy(),
        }
        for name, rows in self._rows.items():
            arrays[f"observations/{name}"] = rows.observations.copy()
            given = [step[name] for history, n in zip(self._history, lengths, strict=True) if n > 0 for step in history]
            if given:
                arrays[f"actions/{name}"] = np.stack(given)
        return Snapshot(arrays, {})

    def restore(self, snapshot: Snapshot) -> tuple[dict[str, np.ndarray], list[int]]:
        """Play the open episodes again and compare where they lead, bit for bit.

        Returns:
            The observations, and the environments that had to begin a fresh episode: they did not come back to the same
            observations and returns, or their actions were forgotten.

        Raises:
            ValueError: if it is of other environments.
            UserError: if one cannot be reset.
        """
        arrays = snapshot.arrays
        lengths = arrays["lengths"].tolist()
        n_actions = sum(max(0, length) for length in lengths)
        for name in self.groups:
            if n_actions and len(arrays[f"actions/{name}"]) != n_actions:
                raise ValueError("its open episodes are longer or shorter than the actions that it has for them")
        if len(lengths) != self.n_envs or arrays["returns"].shape != self._returns.shape:
            raise ValueError(f"it is of {len(lengths)} environments, not {self.n_envs}")
        self._episodes[:] = arrays["episodes"]
        fresh, first = [], 0
        for index, length in enumerate(lengths):
            self._begin_episode(index)
            steps = range(first, first + max(0, length))
            first = steps.stop
            given = [{name: arrays[f"actions/{name}"][step] for name in self.groups} for step in steps]
            if length < 0 or not self._came_back(index, given, arrays):
                self._episodes[index] += 1
                self._begin_episode(index)
                fresh.append(index)
        return {name: rows.observations for name, rows in self._rows.items()}, fresh

    def close(self) -> None:
        """Close each environment; one that fails to is told of on standard error."""
        close_quietly(self._name, self._envs)

    # --- one environment ----------------------------------------------------------------------------------

    def _begin_episode(self, index: int) -> None:
        self._lengths[index], self._returns[index], self._history[index] = 0, 0.0, []
        env = self._envs[index]
        try:
            result = env.reset(seed=seed_of(self._seed, index, int(self._episodes[index])))
            agents = list(env.agents)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self._fault(index, f"reset() raised {with_traceback(error)}") from error
        if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, dict) for part in result)):
            raise self._fault(index, "reset() must return (observations, infos), each a dict by agent")
        observations, infos = result
        if strange := [agent for agent in agents if agent not in self._group_of]:
            raise self._fault(index, f"after reset(), env.agents has {strange[0]!r}, which is not in possible_agents")
        if not agents:
            raise self._fault(index, "after reset(), env.agents is empty: an episode needs somebody who acts")
        self._live[index] = [agent for agent in self.agents if agent in agents]
        self._took_part[index] = tuple(self._live[index])
        for agent in self.agents:
            if agent not in agents:
                rows, row = self._place(index, agent)
                rows.observations[row] = rows.blank
            elif agent not in observations:
                raise self._fault(index, f"reset() returned no observation for {agent!r}, which is in env.agents")
        self._store(index, self._live[index], observations, infos, {}, "observations")
        self._check_values("observations", only=index)

    def _step_one(self, index: int, actions: dict[str, np.ndarray]) -> bool:
        """Step one environment into the rows; whether its episode is over."""
        env, live = self._envs[index], self._live[index]
        for rows in self._rows.values():  # those who are not seen any more stay as they were
            rows.final[self._rows_of(index, rows)] = rows.observations[self._rows_of(index, rows)]
        given = {}
        for agent in live:
            group = self._group_of[agent]
            given[agent] = action_of(group.action_space, actions[group.name][group.agents.index(agent)])
        if len(self._history[index]) == self._lengths[index]:  # or it has been forgotten
            self._history[index].append(actions)
            if len(self._history[index]) > LONGEST_REPLAY:
                self._history[index] = []
        self._lengths[index] += 1
        try:
            result = env.step(given)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self._fault(index, f"step() raised {with_traceback(error)}") from error
        if not (isinstance(result, tuple) and len(result) == 5 and all(isinstance(part, dict) for part in result)):
            raise self._fault(index, f"step() must return {RETURNS}")
        observations, _, _, _, infos = result
        ends = self._take_in(index, live, result)
        self._check_agents(index, live, ends, result)
        seen = [agent for agent in live if agent in observations]
        self._store(index, seen, observations, infos, ends, "final")
        self._live[index] = [agent for agent in live if not ends[agent]]
        return not self._live[index]

    def _take_in(self, index: int, live: list[str], result: Any) -> dict[str, bool]:
        """Write rewards and ends into the rows of one environment; return whose episode is over."""
        observations, rewards, terminations, truncations, _ = result
        is_cut = self._limit is not None and self._lengths[index] >= self._limit
        ends = {}
        for place, agent in enumerate(self.agents):
            rows, row = self._place(index, agent)
            rows.valid[row] = agent in live
            rows.rewards[row], rows.terminated[row], rows.truncated[row] = 0.0, False, False
            if agent not in live:
                continue
            for word, part in (("rewards", rewards), ("terminations", terminations), ("truncations", truncations)):
                if agent not in part:
                    raise self._fault(index, f"step() returned {word} without {agent!r}, which has acted")
            reward = reward_of(rewards[agent])
            if reward is None or not np.isfinite(reward):
                raise self._fault(index, f"the reward of {agent} must be a finite number, not {shown(rewards[agent])}")
            terminated, truncated = end_of(terminations[agent]), end_of(truncations[agent])
            if terminated is None or truncated is None:
                raise self._fault(index, f"the termination and truncation of {agent} must be True or False")
            truncated = truncated or bool(is_cut and not terminated)
            if agent not in observations and not terminated:
                raise self._fault(index, f"step() returned no observation for {agent!r}, which has not terminated")
            rows.rewards[row], rows.terminated[row], rows.truncated[row] = reward, terminated, truncated
            self._returns[index, place] += reward
            ends[agent] = terminated or truncated
        return ends

    def _check_agents(self, index: int, live: list[str], ends: dict[str, bool], result: Any) -> None:
        """Agents may only leave, and must say how."""
        env, (_, _, terminations, truncations, _) = self._envs[index], result
        for agent in env.agents:
            is_back = not (terminations.get(agent, True) or truncations.get(agent, True))
            if agent not in self._took_part[index] or (agent not in live and is_back):
                when = "appeared" if agent not in self._took_part[index] else "came back after it had ended"
                raise self._fault(
                    index,
                    f"the agent {agent!r} {when} in the middle of an episode, which Proximo does not know. Let every "
                    "agent be there from reset() on, and have those that wait see that they do",
                )
        for agent in live:
            if not ends[agent] and agent not in env.agents:
                raise self._fault(
                    index,
                    f"the agent {agent!r} is gone from env.agents without having been terminated or truncated: an end "
                    "of which nothing says what it means. Set one of the two in the step in which it leaves",
                )

    def _store(
        self,
        index: int,
        agents: list[str],
        observations: dict[str, Any],
        infos: dict[str, Any],
        ends: dict[str, bool],
        where: Literal["observations", "final"],
    ) -> None:
        """Write observations into the rows, and behind them the state, where the critic sees it."""
        flat: dict[str, np.ndarray] = {}
        for agent in agents:
            group = self._group_of[agent]
            rows, row = self._place(index, agent)
            try:
                own = _own_row(group, agent, observations[agent], infos.get(agent), is_over=ends.get(agent, False))
            except ValueError as error:
                raise self._fault(index, f"agent {agent}: {error}") from error
            if self._is_central:
                flat[agent] = own.ravel()
                getattr(rows, where)[row, : group.n_own] = flat[agent]
            else:
                getattr(rows, where)[row] = own
        if self._is_central:
            state = self._state(index, flat)
            for agent in agents:
                rows, row = self._place(index, agent)
                getattr(rows, where)[row, self._group_of[agent].n_own :] = state

    def _state(self, index: int, flat: dict[str, np.ndarray]) -> np.ndarray:
        """The state of one environment `[S]`."""
        if not self._has_own_state:
            parts = zip(self.agents, self._state_sizes, strict=True)
            return np.concatenate([flat.get(agent, np.zeros(size, np.float32)) for agent, size in parts])
        try:
            state = np.asarray(self._envs[index].state()).ravel()
        except Exception as error:
            raise self._fault(index, f"state() raised {with_traceback(error)}") from error
        if state.shape != (self.n_state,) or state.dtype.kind not in "fiub":
            raise self._fault(index, f"state() returned {state.size} of {state.dtype}, not {self.n_state} numbers")
        if not np.isfinite(state).all():
            raise self._fault(index, "state() returned a value that is not finite")
        return state

    def _look_for_state(self) -> None:
        """How many numbers the state is, found out by a reset."""
        env = self._envs[0]
        try:
            env.reset(seed=seed_of(self._seed, 0, 0))
            state = np.asarray(env.state())
        except NotImplementedError:
            self.n_state = sum(self._state_sizes)
            return
        except Exception as error:
            raise UserError(f"{self._name}: reset() and state(), for the critic, raised {in_words(error)}") from error
        if state.dtype.kind not in "fiub" or not state.size:
            raise UserError(
                f"{self._name}: critic is 'central', but state() returns {shown(state)}, which is no array of numbers. "
                "Let it return one, or leave it out: the observations of all agents then stand for it."
            )
        self._has_own_state, self.n_state = True, int(state.size)

    def _came_back(self, index: int, given: list[dict[str, np.ndarray]], arrays: dict[str, np.ndarray]) -> bool:
        """Step one environment through its open episode; whether it ends where it did, with the same returns."""
        try:
            for actions in given:
                if self._step_one(index, actions):
                    return False
                for rows in self._rows.values():
                    np.copyto(rows.observations[self._rows_of(index, rows)], rows.final[self._rows_of(index, rows)])
        except UserError:  # an environment that cannot be played again is reported by the caller
            return False
        same = (
            rows.observations[self._rows_of(index, rows)].tobytes()
            == arrays[f"observations/{name}"][self._rows_of(index, rows)].tobytes()
            for name, rows in self._rows.items()
        )
        return all(same) and bool((self._returns[index] == arrays["returns"][index]).all())

    # --- places -------------------------------------------------------------------------------------------

    def _place(self, index: int, agent: str) -> tuple[_Rows, int]:
        group = self._group_of[agent]
        return self._rows[group.name], index * len(group.agents) + group.agents.index(agent)

    def _rows_of(self, index: int, rows: _Rows) -> slice:
        n_agents = len(rows.rewards) // self.n_envs
        return slice(index * n_agents, (index + 1) * n_agents)

    def rows_of(self, index: int, group: str) -> slice:
        """The rows of one environment in the arrays of a group."""
        return self._rows_of(index, self._rows[group])

    def _actions_for(self, index: int, actions: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: actions[name][self._rows_of(index, rows)].copy() for name, rows in self._rows.items()}

    def _check_values(self, where: Literal["observations", "final"] = "final", only: int | None = None) -> None:
        """Refuse observations that are not finite, or outside of their space, which may be told instead."""
        for name, rows in self._rows.items():
            group, seen = self.groups[name], getattr(rows, where)
            own = seen.reshape(len(seen), -1)[:, : group.n_own].reshape(-1, *group.observation_space.shape)
            if rows.check.fits(own):
                continue
            for row, observation in enumerate(own):
                index, agent = divmod(row, len(group.agents))
                problem = rows.check.first_problem(observation)
                if problem is None or only not in (None, index):
                    continue
                said = f"agent {group.agents[agent]}: {problem[0]}"
                if not (problem[1] and self._on_violation == "warn"):
                    hint = "; --on-space-violation warn lets training go on" if problem[1] else ""
                    raise self._fault(index, said + hint)
                if not self.warnings:
                    self.warnings.append(f"{self._where(index)}: {said} (said once; training goes on)")

    def _where(self, index: int) -> str:
        episode = int(self._episodes[index])
        seed = seed_of(self._seed, index, episode)
        return f"{self._name}, environment {index}, episode {episode} (seed {seed}), step {self._lengths[index]}"

    def _fault(self, index: int, problem: str) -> UserError:
        return UserError(f"{self._where(index)}: {problem}.")
