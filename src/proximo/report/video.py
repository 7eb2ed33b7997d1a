"""Videos of a policy at work: mp4 where there is an encoder, GIF where there is none."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TypeGuard, TypeVar

import gymnasium as gym
import numpy as np

from proximo.collect.envs import evaluation_episode_seed
from proximo.collect.make import EXTRA_OF_MODULE
from proximo.errors import UserError, in_range
from proximo.runs import files

DEFAULT_MAX_STEPS = 5000
"""Steps over all episodes of one video: an episode without an end must not fill the disk."""
GIF_MOST_FRAMES = 300
"""A GIF keeps every frame nearly whole, so it holds this many at most."""
GIF_LONGEST_SIDE = 360
"""Pixels; larger frames are scaled down for a GIF."""
GIF_FRAMES_PER_SECOND = 25.0
"""Faster GIFs are slowed down by many viewers."""

_USUAL_FRAMES_PER_SECOND = 30.0

Result = TypeVar("Result")


class Actor(Protocol):
    """What a video asks of a policy."""

    def __call__(self, observation: np.ndarray, *, deterministic: bool, seed: int | None, is_first: bool) -> Any:
        """Choose an action for one observation; `is_first`: it is the first of an episode."""
        ...


def record_video(
    policy: Actor,
    make_env: Callable[[], gym.Env],
    path_without_suffix: Path,
    *,
    n_episodes: int = 1,
    seed: int = 0,
    max_steps: int = DEFAULT_MAX_STEPS,
    deterministic: bool = True,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Film `n_episodes` episodes one after the other, and return the file: `.mp4`, or `.gif` without an encoder.

    An mp4 is H.264 in yuv420p, which everything plays, at the environment's own `render_fps`. Each episode
    has one frame for its beginning and one for each step. An existing file is not overwritten: the new one
    gets `-2` after its name.

    Args:
        policy: chooses the actions.
        make_env: makes one environment with `render_mode="rgb_array"`.
        path_without_suffix: the file to write, without `.mp4`; its folder is made if need be.
        n_episodes: episodes to film.
        seed: fixes the episodes, which are those of an evaluation with this seed, and sampled actions.
        max_steps: steps over all episodes after which the film ends.
        deterministic: take the most likely action; False samples.
        tell: is called with a sentence for the user, such as that this is only a GIF; by default it is
            printed to standard error.

    Raises:
        UserError: if the environment cannot render, or fails, or a package it needs for that is missing; if
            the file cannot be written; if a number is out of range.
    """
    in_range("episodes", n_episodes, at_least=1, usual="1")
    in_range("seed", seed, at_least=0, usual="0")
    in_range("max_steps", max_steps, at_least=1, usual=str(DEFAULT_MAX_STEPS))
    _prepare_headless_rendering()
    env = _explained("made", make_env)
    try:
        frames_per_second = _frames_per_second(env)
        frames = _frames(policy, env, n_episodes, seed, max_steps, deterministic)
        encoder = _mp4_encoder()
        write = _write_gif if encoder is None else encoder
        path = _free_path(path_without_suffix, ".gif" if encoder is None else ".mp4")
        _write_whole(path, lambda temporary: write(frames, temporary, frames_per_second))
    finally:
        # Closing a half-made OpenGL context may fail too, and would hide what went wrong before.
        with suppress(Exception, SystemExit):
            env.close()
    if encoder is None:
        (tell or _print_to_stderr)(
            f"No video encoder is installed, so {path} is a GIF: smaller, coarser and at most "
            f"{GIF_MOST_FRAMES} frames. For an mp4: {_install('video')}"
        )
    return path


# --- playing --------------------------------------------------------------------------------------------------


def _frames(
    policy: Actor, env: gym.Env, n_episodes: int, seed: int, max_steps: int, deterministic: bool
) -> Iterator[np.ndarray]:
    """Play, and yield the frames `[height, width, 3]` uint8, all of one even-sided shape."""
    shape: tuple[int, ...] | None = None
    n_steps = 0
    for episode in range(n_episodes):
        if n_steps >= max_steps:
            return
        reset_seed = evaluation_episode_seed(seed, episode)
        observation, _ = _explained("reset", lambda: env.reset(seed=reset_seed))  # noqa: B023 (called at once)
        ended, is_first = False, True
        frame = _frame(env)
        shape = shape or frame.shape
        yield _same_shape(frame, shape)
        while not ended and n_steps < max_steps:
            n_steps += 1
            noise = None if deterministic else seed + n_steps
            action = policy(observation, deterministic=deterministic, seed=noise, is_first=is_first)
            is_first = False
            observation, _, terminated, truncated, _ = _explained("stepped", lambda: env.step(action))  # noqa: B023
            ended = bool(terminated or truncated)
            yield _same_shape(_frame(env), shape)


def _frame(env: gym.Env) -> np.ndarray:
    """Render one frame as RGB, cut to even sides: yuv420p halves both."""
    rendered: Any = _explained("rendered", lambda: _render(env))
    if rendered is None:
        raise UserError(_cannot_render(env))
    frame = np.asarray(rendered)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] not in (3, 4) or min(frame.shape[:2]) < 2:
        raise UserError(
            f"The environment's render() returned {type(rendered).__name__} of shape {frame.shape} and type "
            f"{frame.dtype}; with render_mode='rgb_array' it must return an array [height, width, 3] of uint8."
        )
    height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
    return np.ascontiguousarray(frame[:height, :width, :3])


def _render(env: gym.Env) -> Any:
    try:
        return env.render()
    except NotImplementedError:  # what gymnasium.Env does where an environment has no render() of its own
        return None


def _same_shape(frame: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if frame.shape != shape:
        raise UserError(
            f"The environment's frames change their size, from {shape[1]} x {shape[0]} to {frame.shape[1]} x "
            f"{frame.shape[0]}. A video needs frames of one size."
        )
    return frame


def _frames_per_second(env: gym.Env) -> float:
    value = (env.metadata or {}).get("render_fps")
    if isinstance(value, (int, float, np.number)) and math.isfinite(value) and value > 0:
        return float(value)
    return _USUAL_FRAMES_PER_SECOND


# --- writing --------------------------------------------------------------------------------------------------


def _mp4_encoder() -> Callable[[Iterable[np.ndarray], Path, float], None] | None:
    """Return a function that writes an mp4, or None where no encoder is installed."""
    try:
        import_module("imageio")
        imageio_ffmpeg = import_module("imageio_ffmpeg")
        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return None

    def write(frames: Iterable[np.ndarray], path: Path, frames_per_second: float) -> None:
        writer: Any = None
        try:
            for frame in frames:
                if writer is None:
                    writer = imageio_ffmpeg.write_frames(
                        str(path),
                        (frame.shape[1], frame.shape[0]),
                        fps=frames_per_second,
                        codec="libx264",
                        pix_fmt_out="yuv420p",
                        quality=7,
                        macro_block_size=1,
                        ffmpeg_log_level="error",
                        # The index first, so that a browser plays it while it loads.
                        output_params=["-movflags", "+faststart"],
                    )
                    writer.send(None)
                writer.send(frame)
        finally:
            if writer is not None:
                writer.close()

    return write


def _write_gif(frames: Iterable[np.ndarray], path: Path, frames_per_second: float) -> None:
    """Write a GIF that takes as long as the episode does, with as many of its frames as fit."""
    from PIL import Image

    stride = math.ceil(frames_per_second / GIF_FRAMES_PER_SECOND)
    images: list[Any] = []
    for index, frame in enumerate(frames):
        if index % stride:
            continue
        image = Image.fromarray(frame)
        image.thumbnail((GIF_LONGEST_SIDE, GIF_LONGEST_SIDE), Image.Resampling.LANCZOS)
        images.append(image.quantize(colors=128, method=Image.Quantize.MEDIANCUT))
        if len(images) > GIF_MOST_FRAMES:
            images = images[::2]
            stride *= 2
    # GIFs count in hundredths of a second, and viewers take less than two of them for ten.
    milliseconds = max(20, round(100 * stride / frames_per_second) * 10)
    images[0].save(
        path, format="GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0, disposal=1
    )


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside `path` and give the finished file its name, so that half a film is never found."""
    temporary = path.with_name(f"{files.temporary_beside(path).name}{path.suffix}")
    try:
        files.make_folders(path.parent)
        write(temporary)
        temporary.rename(path)
    except OSError as error:
        raise UserError(
            f"The video {path} could not be written: {error.strerror or str(error)[:300]}. "
            "Free some space there, or let this user write there."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _free_path(path_without_suffix: Path, suffix: str) -> Path:
    """Return the first of NAME, NAME-2, NAME-3 ... that nothing has."""
    number, path = 1, path_without_suffix.with_name(f"{path_without_suffix.name}{suffix}")
    while os.path.lexists(path):
        number += 1
        path = path_without_suffix.with_name(f"{path_without_suffix.name}-{number}{suffix}")
    return path


# --- what can go wrong ----------------------------------------------------------------------------------------


def _prepare_headless_rendering() -> None:
    """Let pygame and MuJoCo draw without a display, unless the user has decided otherwise."""
    # pygame greets on standard output, where --json promises one object and nothing else.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    has_display = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if sys.platform.startswith("linux") and not has_display:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        # Left to itself, Gymnasium tries GLFW first, which seems to work and then cannot draw.
        os.environ.setdefault("MUJOCO_GL", "egl")


def _explained(doing: str, call: Callable[[], Result]) -> Result:
    """Call something of the environment's; say in words what went wrong."""
    try:
        return call()
    except UserError as error:
        if doing == "made" and _takes_no_render_mode(error.__cause__):  # `make_env` has said it in other words
            raise UserError(_explanation(doing, error.__cause__)) from error
        raise
    except (Exception, SystemExit) as error:
        raise UserError(_explanation(doing, error)) from error


def _takes_no_render_mode(error: BaseException | None) -> TypeGuard[TypeError]:
    refusals = ("unexpected keyword argument 'render_mode'", "takes no arguments", "takes no keyword arguments")
    return isinstance(error, TypeError) and any(words in str(error) for words in refusals)


def _explanation(doing: str, error: BaseException) -> str:
    chain = _chain(error)
    if doing == "made" and _takes_no_render_mode(error):
        return (
            f"The environment cannot render: its constructor takes no render_mode ({error}). "
            "Let __init__ take render_mode=None and keep it, as gymnasium.Env asks."
        )
    if any(isinstance(each, ImportError) for each in chain):
        said = " ".join(f"{each} {getattr(each, 'name', '') or ''}" for each in chain)
        for module, extra in EXTRA_OF_MODULE.items():
            if module.lower() in said.lower():
                return f"The environment needs {module} to render, which is not installed. {_install(extra)}"
    if doing in ("reset", "rendered") and any(_is_from_mujoco(each) for each in chain):
        _quieten_half_made_viewers(chain)
        return _no_gl_message(error)
    return f"The environment could not be {doing}: {type(error).__name__}: {error}"


def _cannot_render(env: gym.Env) -> str:
    modes = (env.metadata or {}).get("render_modes") or []
    if "rgb_array" not in modes:
        offered = f"it offers {', '.join(map(repr, modes))}" if modes else "it offers none"
        return (
            f"The environment has no render_mode 'rgb_array' ({offered}), so there is nothing to film. "
            "Let its render() return an array [height, width, 3] of uint8, and add 'rgb_array' to "
            "metadata['render_modes']."
        )
    if env.render_mode != "rgb_array":
        return (
            f"The environment was made with render_mode {env.render_mode!r}, so its render() returns no "
            "picture. It must be made with render_mode='rgb_array'."
        )
    return (
        "The environment's render() returned None. With render_mode='rgb_array' it must return an array "
        "[height, width, 3] of uint8."
    )


def _no_gl_message(error: BaseException) -> str:
    backend = os.environ.get("MUJOCO_GL", "")
    now = f"with MUJOCO_GL={backend}" if backend else "and MUJOCO_GL is not set"
    words = str(error).strip().split("\n")[0][:200] or "no reason given"
    return (
        f"MuJoCo could not draw {now}: {type(error).__name__}: {words}\n"
        "Without a display it needs one of two OpenGL libraries:\n"
        "  MUJOCO_GL=egl      on the GPU, or in software with Mesa: apt-get install libegl1 libgl1-mesa-dri\n"
        "  MUJOCO_GL=osmesa   on the CPU alone: apt-get install libosmesa6\n"
        "Install one, set the variable before the command, and try again."
    )


def _is_from_mujoco(error: BaseException) -> bool:
    """Whether the error, or a line it came through, belongs to MuJoCo's rendering."""
    modules = [type(error).__module__]
    trace = error.__traceback__
    while trace is not None:
        modules.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return any(
        name.split(".")[0] in ("mujoco", "OpenGL", "glfw") or name.startswith("gymnasium.envs.mujoco.mujoco_rendering")
        for name in modules
    )


def _quieten_half_made_viewers(chain: list[BaseException]) -> None:
    """Let viewers that failed while they were made be forgotten without a traceback of their own.

    Gymnasium's viewer frees its OpenGL context when it is deleted, also where it never got one.
    """
    for error in chain:
        trace = error.__traceback__
        while trace is not None:
            owner: Any = trace.tb_frame.f_locals.get("self")
            if type(owner).__name__ == "OffScreenViewer" and not hasattr(owner, "opengl_context"):
                owner.opengl_context = SimpleNamespace(free=lambda: None)
            trace = trace.tb_next


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error, and those that led to it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _install(extra: str) -> str:
    return f'Install it with: pip install -c constraints.txt -e ".[{extra}]"'


def _print_to_stderr(message: str) -> None:
    print(message, file=sys.stderr)
