"""Atari games (`ALE/Pong-v5`) as they are learned from pixels: one game for people, and ale-py's vector of them.

The preprocessing of record (Mnih et al. 2015; Machado et al. 2018, section 5, for what is left out): up to 30 no-ops
and FIRE (where the game has it) after a reset, each action for 4 frames, the maximum of the last two, 84x84 grey by
area, the last 4 of these as observation, 108,000 frames at most. An action is never repeated by chance unless
`repeat_action_probability` is asked for, as in the runs that PPO's published scores are from (the ids themselves
have 0.25). Rewards are the game's own and an episode is a whole game: that losing a life is an end, and that only
the signs of rewards count, belongs to learning (`episodic_life`, `sign_rewards`).
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from proximo.collect.child_process import n_cores
from proximo.errors import UserError

MOST_FRAMES = 108_000
"""Frames of one game: half an hour at 60 a second."""


def is_atari(env_id: str) -> bool:
    """Whether this is a game of the Arcade Learning Environment."""
    return env_id.startswith("ALE/")


def register_games(env_id: str) -> None:
    """Make the ids `ALE/...` known to Gymnasium.

    Raises:
        UserError: if ale-py is not installed, or too old for its vector environment.
    """
    try:
        import ale_py
    except ImportError as error:
        raise UserError(
            f"{env_id} needs ale-py, which is not installed.\n"
            'Install it with: pip install -c constraints.txt -e ".[atari]"'
        ) from error
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner on standard error
    if not hasattr(ale_py, "ALEVectorInterface"):
        raise UserError(
            f"{env_id} needs a newer ale-py than {ale_py.__version__}: one with a vector environment.\n"
            'Install it with: pip install -c constraints.txt -e ".[atari]"'
        )


def vector_arguments(
    n_envs: int, env_kwargs: dict[str, Any], *, max_episode_steps: int | None, episodic_life: bool
) -> dict[str, Any]:
    """How ale-py's vector environment is made for the same task as `AtariGame`.

    `life_loss_info` rather than its own `episodic_life`, with which every life lost ends in a whole new game: what
    comes after the first life would never be seen (ale-py 0.12). One thread per core steps the games.
    """
    frames = MOST_FRAMES if max_episode_steps is None else max_episode_steps * env_kwargs.get("frameskip", 4)
    return {
        "repeat_action_probability": 0.0,
        "reward_clipping": False,
        "life_loss_info": episodic_life,
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "max_num_frames_per_episode": frames,
        "num_threads": min(n_cores(), n_envs),
        **env_kwargs,
    }


class AtariGame(gym.Env):
    """One whole game with the game's own rewards: for evaluation, videos, and training in this process.

    The arguments are those of `ale_py.AtariVectorEnv` by their names, and its observations are these but for the
    rounding of a pixel; `mode` and `difficulty` are this one's alone. Every random choice comes from the seed of
    `reset`, so an episode can be played again.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 15}  # noqa: RUF012  # Gymnasium's own pattern

    def __init__(
        self,
        env_id: str,
        *,
        render_mode: str | None = None,
        repeat_action_probability: float = 0.0,
        full_action_space: bool = False,
        max_num_frames_per_episode: int = MOST_FRAMES,
        frameskip: int = 4,
        stack_num: int = 4,
        img_height: int = 84,
        img_width: int = 84,
        noop_max: int = 30,
        use_fire_reset: bool = True,
        mode: int | None = None,
        difficulty: int | None = None,
    ) -> None:
        """Load the game."""
        chosen = {name: value for name, value in (("mode", mode), ("difficulty", difficulty)) if value is not None}
        self._game = gym.make(
            env_id,
            disable_env_checker=True,
            frameskip=1,
            repeat_action_probability=repeat_action_probability,
            full_action_space=full_action_space,
            max_num_frames_per_episode=0,  # counted here, without the no-ops, as the vector environment does
            obs_type="grayscale",
            render_mode=render_mode,
            **chosen,
        ).unwrapped
        ale = self._game.ale  # type: ignore[attr-defined]  # untyped
        self._ale = ale
        self._actions = ale.getLegalActionSet() if full_action_space else ale.getMinimalActionSet()
        self._fire = next((a for a in self._actions if a.name == "FIRE"), None) if use_fire_reset else None
        self._noop = next(a for a in self._actions if a.name == "NOOP")
        self._most_frames, self._frameskip, self._noop_max = max_num_frames_per_episode, frameskip, noop_max
        height, width = ale.getScreenDims()
        self._screens = np.zeros((2, height, width), np.uint8)
        self._rows, self._columns = _area_weights(height, img_height), _area_weights(width, img_width)
        self._stack = np.zeros((stack_num, img_height, img_width), np.uint8)
        self._n_frames = 0
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0, 255, self._stack.shape, np.uint8)
        self.action_space = gym.spaces.Discrete(len(self._actions))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a game, some no-ops in."""
        super().reset(seed=seed)
        self._game.reset(seed=seed, options=options)
        n_noops = int(self.np_random.integers(max(self._noop_max, 1)))
        if self._fire is not None:
            self._ale.act(self._fire)
            n_noops -= 1
        for _ in range(n_noops):
            self._ale.act(self._noop)
            if self._ale.game_over():
                self._ale.reset_game()
        self._n_frames = 0
        self._stack[:] = 0
        self._screens[:] = 0
        self._ale.getScreenGrayscale(self._screens[0])
        return self._observed(), self._info()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take an action for `frameskip` frames."""
        reward, terminated = 0.0, False
        for left in reversed(range(self._frameskip)):
            reward += self._ale.act(self._actions[int(action)])
            self._n_frames += 1
            terminated = bool(self._ale.game_over())
            ends = terminated or self._n_frames >= self._most_frames
            if left < 2 or ends:
                self._ale.getScreenGrayscale(self._screens[left % 2])
            if ends:
                break
        truncated = self._n_frames >= self._most_frames and not terminated
        return self._observed(), reward, terminated, truncated, self._info()

    def render(self) -> Any:
        """The screen in color, as `render_mode` asks."""
        return self._game.render()

    def close(self) -> None:
        """Let go of the emulator."""
        self._game.close()

    def _observed(self) -> np.ndarray:
        """Put what is on the screen behind the frames before it; return them all."""
        screen = self._screens.max(0).astype(np.float32)
        self._stack[:-1] = self._stack[1:]
        (rows, row_weights), (columns, column_weights) = self._rows, self._columns
        narrow = np.einsum("hik,ik->hi", screen[:, columns], column_weights)
        self._stack[-1] = np.rint(np.einsum("jkw,jk->jw", narrow[rows], row_weights))
        return self._stack.copy()

    def _info(self) -> dict[str, Any]:
        return {"lives": self._ale.lives()}


def _area_weights(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels each pixel of a smaller image is the mean of, `[after, K]`, and their shares in it."""
    edges = np.arange(after + 1) * before / after
    covered = edges[:-1, None].astype(int) + np.arange(math.ceil(before / after) + 1)
    shares = np.minimum(edges[1:, None], covered + 1) - np.maximum(edges[:-1, None], covered)
    shares = shares.clip(0.0) * after / before
    return covered.clip(max=before - 1), shares.astype(np.float32)
