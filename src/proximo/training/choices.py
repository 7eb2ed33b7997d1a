"""What `auto` stands for: chosen before the run starts, shown in its plan, and written into its config.toml.

So a resumed run takes the same. What numbers hang on is chosen by rules alone, and only the number of threads is
measured: it changes no number of a compiled update, and of large networks the last digits (name it, where two runs must
be the same to those).
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from proximo.algorithms.adam import NonFiniteUpdateError
from proximo.algorithms.ppo import PPO, UpdatePath
from proximo.collect.atari import is_atari
from proximo.collect.child_process import n_cores
from proximo.collect.envs import close_quietly
from proximo.collect.make import EnvFactory, make_packed_env
from proximo.collect.native import comes_back_exactly
from proximo.collect.packed_env import ActionMask, mask_of
from proximo.errors import UserError, in_words
from proximo.models.control import ActorCritic
from proximo.training.agents_config import SEVERAL
from proximo.training.agents_evaluate import action_mask_of
from proximo.training.compiled_acting import CompiledNetwork
from proximo.training.config import ControlConfig, EnvironmentConfig
from proximo.training.estimate import minibatch_seconds

MINIBATCHES_THAT_PAY = 30_000
"""From about here, sooner with large minibatches, compiling has paid the first time already; later runs have it from
the disk (docs/performance.md)."""

MINIBATCHES_WITH_MEMORY_THAT_PAY = 1_000
"""Each saves some milliseconds where there is a loop over time."""

SHORTEST_PIECE = 16
"""Steps below which a rollout is not cut by itself: what is further back is not learned to be remembered."""

NATIVE_FROM = 8
"""Environments from which a vector version pays (docs/performance.md)."""


def with_environments_chosen(config: ControlConfig, factory: EnvFactory) -> ControlConfig:
    """Replace vectorization `auto`, action_mask `auto`, and what a policy with memory learns from in one piece.

    Workers where their number is given; native where that is the same task and resumes as exactly, and for Atari's
    games, which gain most; else serial.
    Masks where the environment has them.

    Raises:
        UserError: if it has to be looked at, and cannot be made.
    """
    task = config.environment
    if task.vectorization == "auto":
        exact = task.n_envs >= NATIVE_FROM and comes_back_exactly(task.env_id)
        # Of a single step all may be resets.
        native = not task.restarts_allowed and config.rollout_length > 1 and (exact or is_atari(task.env_id))
        chosen = "native" if native else "serial"
        task = replace(task, vectorization=chosen if task.n_workers is None else "workers")
    if isinstance(config, SEVERAL):
        mask = action_mask_of(config, factory) if task.action_mask == "auto" else task.action_mask
        task = replace(task, action_mask=mask)
    elif task.action_mask == "auto":
        task = replace(task, action_mask=_action_mask(task, factory, config.seed))
    return replace(config, environment=task, sequence_length=_sequence_length(config))


def _sequence_length(config: ControlConfig) -> int | None:
    """The longest piece of a rollout of which a minibatch holds one; all of it where that would be next to nothing.

    A row is never cut to fit a minibatch, so longer pieces would make fewer and larger minibatches than were asked for.
    """
    if config.network.memory == "none" or config.sequence_length is not None:
        return config.sequence_length
    length, most = config.rollout_length, max(config.batch_size, 1)
    longest = max(n for n in range(1, length + 1) if length % n == 0 and n <= most)
    return longest if longest >= min(SHORTEST_PIECE, length) else length


def _action_mask(task: EnvironmentConfig, factory: EnvFactory, seed: int) -> ActionMask:
    """Where one environment says which actions are possible."""
    if task.vectorization not in ("serial", "workers"):
        return "none"
    env = make_packed_env(factory, task.env_id, task.env_kwargs, max_episode_steps=task.max_episode_steps)
    try:
        return mask_of(env, seed)
    finally:
        close_quietly(task.env_id, [env])


def with_update_chosen(
    config: ControlConfig, policy: ActorCritic, say: Callable[[str], object] = lambda text: None
) -> ControlConfig:
    """Replace update_path `auto` and threads 0; `say` is told where that takes long.

    Raises:
        UserError: if a path is asked for that cannot be: for this policy, on this device, or without numba.
    """
    if not isinstance(config.algorithm, PPO):
        return config if config.threads else replace(config, threads=1 if policy.encoder is None else n_cores())
    if config.intrinsic.explores:
        config = _with_eager(config)
        assert isinstance(config.algorithm, PPO)
    asked = path = config.algorithm.update_path
    if path == "auto":
        path = _path(config, policy)
    fits = policy.is_plain or (policy.has_memory and path == "compiled")
    if path in ("fused", "compiled") and not (fits and config.device == "cpu"):
        raise UserError(
            f"update_path is '{path}', which is for perceptrons on the CPU, with one choice or one Gaussian and "
            f"neither masks nor memory; this policy is another one, or on {config.device}. Use auto or eager."
        )
    config = replace(config, algorithm=replace(config.algorithm, update_path=path))
    if path == "compiled":
        if reason := why_not_compiled():
            raise UserError(
                f"update_path is 'compiled', which needs numba and scipy: {reason}. "
                f'Install them with: pip install -c constraints.txt -e ".[fast]", or set update_path to '
                f"{'fused' if policy.memory is None else 'eager'} (a run that is resumed has it in its config.toml)."
            )
        try:
            with _told_after(1.5, lambda: say("Compiling the update, for the first time on this machine ...")):
                _compile(config, policy)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            return _without_the_compiler(config, policy, error, was_asked=asked == "compiled", say=say)
    if config.threads:
        return config
    threads = 1
    if path == "compiled" and policy.is_plain:
        threads = min(2, n_cores())
    elif policy.encoder is not None and config.device == "cpu":
        threads = _faster(config, policy, [n_cores(), 1])
    return replace(config, threads=threads)


def _compile(config: ControlConfig, policy: ActorCritic) -> None:
    """Compile and load before the run: SciPy's BLAS must be there when its threads are set."""
    if policy.memory is not None:
        policy.memory.compiled = True
    _faster(config, policy, [1])
    if policy.is_plain:
        CompiledNetwork(policy, policy.actor)(policy.blank(1).astype(np.float32))


def _with_eager(config: ControlConfig) -> ControlConfig:
    """The only path of the update that knows of an intrinsic reward."""
    assert isinstance(config.algorithm, PPO)
    if config.algorithm.update_path not in ("auto", "eager"):
        raise UserError(
            f"update_path is '{config.algorithm.update_path}', which knows nothing of exploration "
            f"'{config.intrinsic.exploration}'. Use auto or eager."
        )
    return replace(config, algorithm=replace(config.algorithm, update_path="eager"))


def _without_the_compiler(
    config: ControlConfig, policy: ActorCritic, error: Exception, *, was_asked: bool, say: Callable[[str], object]
) -> ControlConfig:
    """What to do where numba is there and fails."""
    kernels = "algorithms/kernels.py" if policy.memory is None else "models/recurrence_kernels.py"
    folder = os.environ.get("NUMBA_CACHE_DIR", f"__pycache__ beside proximo/{kernels}")
    said = (
        f"the update could not be compiled: {in_words(error)}. If NUMBA_DISABLE_JIT is set, unset it; otherwise what "
        f"numba keeps in {folder} may be damaged: delete it"
    )
    instead: UpdatePath = "fused" if policy.memory is None else "eager"
    if was_asked:
        raise UserError(f"update_path is 'compiled', but {said}, or use update_path {instead}.") from error
    if policy.memory is not None:
        policy.memory.compiled = False
    say(f"{said[0].upper()}{said[1:]}. This run takes the {instead} update.")
    assert isinstance(config.algorithm, PPO)
    return with_update_chosen(replace(config, algorithm=replace(config.algorithm, update_path=instead)), policy)


def _load_the_compiler() -> None:

    import proximo.algorithms.kernels  # noqa: F401


def why_not_compiled() -> str:
    """What keeps numba from compiling, in words; empty if nothing does."""
    try:
        _load_the_compiler()
    except Exception as error:  # not installed, of a version that does not fit NumPy's, no cache: it may be anything
        return in_words(error)
    return ""


def _path(config: ControlConfig, policy: ActorCritic) -> UpdatePath:
    assert isinstance(config.algorithm, PPO)
    if config.device != "cpu":
        if isinstance(config, SEVERAL):
            return "eager"
        can_graph = config.algorithm.can_graph and not policy.has_memory
        return "graphed" if config.device.startswith("cuda") and can_graph else "eager"
    if not config.algorithm.can_fuse or not (policy.is_plain or policy.has_memory):
        return "eager"
    if isinstance(config, SEVERAL):
        return "fused"
    iterations = config.total_steps // config.steps_per_iteration
    n_minibatches = iterations * config.algorithm.n_epochs * config.minibatches_per_epoch
    otherwise: UpdatePath = "eager" if policy.has_memory else "fused"
    pays = MINIBATCHES_WITH_MEMORY_THAT_PAY if policy.has_memory else MINIBATCHES_THAT_PAY
    return "compiled" if n_minibatches >= pays and not why_not_compiled() else otherwise


def _faster(config: ControlConfig, policy: ActorCritic, counts: list[int]) -> int:
    """The number of threads, of these and within the cores, that an update takes least time with.

    The first one, unless another takes a tenth less.
    """
    seen = torch.from_numpy(policy.blank(1))
    before = torch.get_num_threads()
    times = {}
    try:
        for count in counts:
            if count <= n_cores():
                torch.set_num_threads(count)
                times[count] = minibatch_seconds(copy.deepcopy(policy), seen, config)
    except NonFiniteUpdateError:  # the run will say so, and what may mend it
        return counts[0]
    finally:
        torch.set_num_threads(before)
    return min(times, key=lambda count: times[count] * (1.0 if count == counts[0] else 1.1))


@contextmanager
def _told_after(seconds: float, tell: Callable[[], object]) -> Iterator[None]:
    """Tell what is going on if it takes longer than so many seconds."""
    timer = threading.Timer(seconds, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
