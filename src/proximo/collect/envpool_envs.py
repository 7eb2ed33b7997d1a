"""EnvPool's environments (C++ threads) as a Gymnasium vector environment, for `native.py`."""

from __future__ import annotations

import importlib.util
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from proximo.errors import UserError, in_words


class EnvPoolEnvs:
    """N environments of EnvPool's `make_gymnasium`; ended ones reset in the next step.

    The spaces are those of Gymnasium's environment of the same id, so that a policy fits both. Rows come back in the
    order of the environments.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 (as in gymnasium.vector.VectorEnv)

    def __init__(self, env_id: str, n_envs: int, n_threads: int, options: dict[str, Any]) -> None:
        """Make the environments.

        Raises:
            UserError: if EnvPool is not installed, does not have this one, or has it with other spaces.
        """
        if importlib.util.find_spec("envpool") is None:
            raise UserError(
                "vectorization is 'envpool', but EnvPool is not installed. "
                'Install it with: pip install -c constraints.txt -e ".[envpool]"'
            )
        try:
            import envpool  # pyright: ignore[reportMissingImports]
        except (ImportError, OSError) as error:
            raise UserError(f"vectorization is 'envpool', but EnvPool cannot be loaded: {in_words(error)}") from error
        if env_id not in envpool.list_all_envs():
            raise UserError(f"vectorization is 'envpool', but EnvPool has no {env_id}. Use auto, serial or workers.")
        self.num_envs = n_envs
        self._options = {"num_envs": n_envs, "num_threads": n_threads, **options}
        self._env_id = env_id
        example = gym.make(env_id)
        self.single_observation_space, self.single_action_space = example.observation_space, example.action_space
        example.close()
        self._pool = self._make(0)
        theirs = (self._pool.observation_space, self._pool.action_space)
        if [_shape(space) for space in theirs] != [_shape(example.observation_space), _shape(example.action_space)]:
            raise UserError(
                f"EnvPool's {env_id} has observations {theirs[0]} and actions {theirs[1]}, Gymnasium's "
                f"{example.observation_space} and {example.action_space}: another task. Use another vectorization."
            )
        self._action_dtype = theirs[1].dtype

    @property
    def unwrapped(self) -> EnvPoolEnvs:
        """Itself."""
        return self

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin fresh episodes in all environments; EnvPool takes a seed when it is made, so it is made anew."""
        del options
        self._pool.close()
        self._pool = self._make(0 if seed is None else seed % 2**31)
        observations, info = self._pool.reset()
        return observations[np.argsort(info["env_id"])], {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Step all environments, or reset those that ended in the step before."""
        results = self._pool.step(actions.astype(self._action_dtype, copy=False))
        order = np.argsort(results[4]["env_id"])
        observations, rewards, terminated, truncated = (column[order] for column in results[:4])
        return observations, rewards, terminated, truncated, {}

    def close(self) -> None:
        """Free everything."""
        self._pool.close()

    def _make(self, seed: int) -> Any:
        import envpool  # pyright: ignore[reportMissingImports]

        try:
            return envpool.make_gymnasium(self._env_id, seed=seed, **self._options)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise UserError(f"EnvPool could not make {self._env_id}: {in_words(error)}") from error


def _shape(space: gym.Space) -> Any:
    return int(space.n) if isinstance(space, gym.spaces.Discrete) else space.shape
