"""From what a person writes (`CartPole-v1`, `my_file.py:MyEnv`, `package.module:MyEnv`, a callable) to environments."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.error import DependencyNotInstalled

from proximo.collect.atari import AtariGame, is_atari, register_games
from proximo.collect.envs import close_quietly
from proximo.collect.packed_env import ActionMask, packed
from proximo.collect.several import refuse_several
from proximo.errors import UserError, in_words, nearest

Env = str | type[gym.Env] | Callable[..., Any]
"""A Gymnasium id, `my_file.py:MyEnv`, `package.module:MyEnv`, an environment class, or a factory."""

EnvFactory = Callable[..., gym.Env]
"""Makes one environment; takes `render_mode=` and whatever `env_kwargs` holds."""

EXTRA_OF_MODULE = {
    "ale_py": "atari",
    "Box2D": "box2d",
    "mujoco": "mujoco",
    "pygame": "video",
    "pettingzoo": "agents",
    "mpe2": "agents",
}
"""The extra of Proximo that installs a module which some environment needs."""


def names_code(env_id: str) -> bool:
    """Whether making `env_id` imports code that the name points to (a file or a module)."""
    return ":" in env_id


def environment_source(env: Env | None) -> tuple[str, EnvFactory]:
    """A name to write down and a factory, for whatever stands for an environment."""
    if env is None:
        raise UserError("No environment: name one, such as CartPole-v1.")
    if isinstance(env, str):
        return env, find_factory(env)
    if not callable(env):
        raise UserError(
            f"An environment is named by a string, a class or a function that makes one, not by {type(env).__name__}. "
            "Give the class, or lambda: MyEnv(...)."
        )
    module, name = getattr(env, "__module__", "?"), getattr(env, "__qualname__", type(env).__name__)
    return f"{module}:{name}", env


def find_factory(env_id: str) -> EnvFactory:
    """Return what makes environments of this name, having checked that the name means something.

    `file.py:Class` and `package.module:Class` import that file or module. `module:Id-v0` is Gymnasium's own
    way to import a module that registers `Id-v0`. `ALE/Pong-v5` is the game as `collect/atari.py` shows it to a
    policy, not its bare screen.

    Raises:
        UserError: if there is no such environment, file, module or class, with the nearest names.
    """
    if is_atari(env_id):
        register_games(env_id)
        _check_registered(env_id)
        return partial(AtariGame, env_id)
    if not names_code(env_id):
        _check_registered(env_id)
        return lambda **kwargs: gym.make(env_id, disable_env_checker=True, **kwargs)
    place, _, name = env_id.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if hasattr(module, name):
        factory = getattr(module, name)
        if not callable(factory):
            raise UserError(f"{env_id}: {name} is a {type(factory).__name__}, not a class or function.")
        return factory  # type: ignore[return-value]
    if name in gym.registry:
        return lambda **kwargs: gym.make(name, disable_env_checker=True, **kwargs)
    own = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, gym.Env)]
    raise UserError(
        f"{place} has no class, function or registered environment named {name!r}."
        + _did_you_mean(nearest(name, [*own, *(key for key in vars(module) if not key.startswith("_"))]))
    )


def make_env(
    factory: EnvFactory,
    env_id: str,
    env_kwargs: dict[str, Any],
    *,
    max_episode_steps: int | None = None,
    render_mode: str | None = None,
) -> gym.Env:
    """Make one environment.

    Raises:
        UserError: if it cannot be made: what is missing and the command that installs it, or what it said.
    """
    kwargs = dict(env_kwargs) if render_mode is None else {**env_kwargs, "render_mode": render_mode}
    try:
        env = factory(**kwargs)
    except (DependencyNotInstalled, ImportError) as error:
        raise UserError(_missing_package(env_id, error)) from error
    except UserError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"{env_id} could not be made with {kwargs or 'no arguments'}: {in_words(error)}") from error
    if not isinstance(env, gym.Env):
        refuse_several(env, env_id)
        raise UserError(
            f"{env_id} made a {type(env).__name__}, which is not a gymnasium.Env. "
            "Derive the class from gymnasium.Env (the old gym package is another one)."
        )
    for name in ("observation_space", "action_space"):
        if not isinstance(getattr(env, name, None), gym.Space):
            raise UserError(
                f"{env_id} has no {name}. Set it in the class or in __init__, to a gymnasium.spaces.Box, say."
            )
    if max_episode_steps is not None:
        if isinstance(env, gym.wrappers.TimeLimit):
            env = env.env  # the limit asked for takes the place of the environment's own
        env = gym.wrappers.TimeLimit(env, max_episode_steps)
    return env


def make_packed_env(
    factory: EnvFactory,
    env_id: str,
    env_kwargs: dict[str, Any],
    *,
    max_episode_steps: int | None = None,
    render_mode: str | None = None,
    action_mask: ActionMask = "auto",
) -> gym.Env:
    """Make one environment; as a `PackedEnv` where its spaces are more than arrays, or some actions are masked.

    Raises:
        UserError: if it cannot be made, or one of its spaces cannot be learned from.
    """
    env = make_env(factory, env_id, env_kwargs, max_episode_steps=max_episode_steps, render_mode=render_mode)
    try:
        return packed(env, action_mask)
    except UserError as error:
        close_quietly(env_id, [env])
        raise UserError(f"{env_id}: {error}") from error


def _check_registered(env_id: str) -> None:
    """Look the id up, and offer the nearest ones if it is not there."""
    if env_id in gym.registry:
        return
    versions = sorted(key for key in gym.registry if key.rsplit("-v", 1)[0] == env_id.rsplit("-v", 1)[0])
    wanted_name = env_id.rsplit("-v", 1)[0]
    newest: dict[str, str] = {}
    for key in gym.registry:
        name, _, version = key.rpartition("-v")
        if name and version.isdigit() and int(version) >= int(newest.get(name, "-v-1").rpartition("-v")[2] or -1):
            newest[name] = key
    candidates = versions or [newest[name] for name in nearest(wanted_name, newest)]
    raise UserError(
        f"There is no environment {env_id!r}."
        + _did_you_mean(candidates)
        + "\nYour own environment is named by its place: my_file.py:MyEnv or package.module:MyEnv."
        + "\nAll ids: python -c 'import gymnasium; gymnasium.pprint_registry()'"
    )


def _import_file(path: Path) -> Any:
    """Import a Python file under a name of its own; the same file is imported once."""
    try:
        path = path.expanduser().resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, too long a name, a NUL in it
        raise UserError(f"There is no file {path} ({error}). Write where it is: my_file.py:MyEnv.") from error
    if not is_file:
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"There is no file {path}." + _did_you_mean(nearest(path.name, siblings)))
    name = f"_proximo_env_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.parent))  # for good, as for a script: it may import its neighbours later
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        extra = EXTRA_OF_MODULE.get((getattr(error, "name", None) or "").partition(".")[0])
        mend = "" if extra is None else f'. Install it with: pip install -c constraints.txt -e ".[{extra}]"'
        raise UserError(f"{path} could not be imported: {in_words(error)}{mend}") from error
    return module


def _import_module(name: str) -> Any:
    """Import a module, looking in the current folder first, as `python -m` does."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = EXTRA_OF_MODULE.get(name.partition(".")[0])
        mend = "It must be installed, or lie in the folder where the command is run."
        if extra is not None:
            mend = f'Install it with: pip install -c constraints.txt -e ".[{extra}]"'
        raise UserError(f"The module {name!r} could not be imported: {error}. {mend}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"The module {name!r} could not be imported: {in_words(error)}") from error
    finally:
        if added:
            sys.path.remove(here)


def _did_you_mean(names: list[str]) -> str:
    return f" Did you mean {' or '.join(names)}?" if names else ""


def _missing_package(env_id: str, error: Exception) -> str:
    """Name the package and the one command that installs it, where it is in an extra of ours."""
    text = str(error)
    chain: BaseException | None = error
    while chain is not None:
        text += f" {chain} {getattr(chain, 'name', '')}"
        chain = chain.__cause__ or chain.__context__
    missing = "not installed" in text or "No module named" in text
    for module, extra in EXTRA_OF_MODULE.items():
        if missing and module.lower() in text.lower():
            command = f'Install it with: pip install -c constraints.txt -e ".[{extra}]"'
            return f"{env_id} needs {module}, which is not installed.\n{command}"
    return f"{env_id} cannot be made for want of a package: {error}"
