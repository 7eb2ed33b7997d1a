"""The driver of `kernels.py`: PPO-Clip's epochs for plain perceptrons on the CPU in machine code, all in one call.

It does what `fused.py` does, minibatch for minibatch; the actor and the critic have a thread each where that is faster.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.fused import (
    METRICS,
    ROUNDING,
    ClipSettings,
    Columns,
    bad_gradient,
    bad_loss,
    columns_of,
    parameters_of,
    summary,
    vectors_of,
    views,
)
from proximo.algorithms.update import Minibatch
from proximo.core.batch import minibatch_indices
from proximo.core.policy import PlainActorCritic

if TYPE_CHECKING:  # numba is an extra
    from proximo.algorithms import kernels


def run_compiled_epochs(
    plain: PlainActorCritic,
    optimizer: FlatAdam,
    everything: Minibatch,
    settings: ClipSettings,
    generator: torch.Generator,
) -> dict[str, float]:
    """Do what `run_fused_epochs` does; `optimizer.pace` says on how many threads."""
    from proximo.algorithms import kernels

    optimizer.check_gradients()
    columns = columns_of(plain, everything, optimizer)
    rows, states = [], []
    for _ in range(settings.n_epochs):
        states.append(generator.get_state())
        rows.append(minibatch_indices(len(columns.inputs), settings.batch_size, generator))
    sizes = np.array([len(part) for part in rows[0]])
    metrics = np.zeros((len(sizes) * settings.n_epochs, kernels.N_METRICS))
    networks, dtype = compiled_networks(plain, optimizer), columns.inputs.dtype
    arguments = (
        networks,
        kernels.Adam(*views(*vectors_of(optimizer)), optimizer.n_steps),  # pyright: ignore[reportCallIssue]
        _compiled_steps(columns, plain.log_std is None),
        torch.cat([part for epoch in rows for part in epoch]).numpy(),
        np.cumsum(np.tile(sizes, settings.n_epochs)),
        _numbers(settings, optimizer, dtype),
        _room(networks.actor_widths, int(sizes.max()), dtype),
        _room(networks.critic_widths, int(sizes.max()), dtype),
        metrics,
        np.zeros(128, np.int64),
    )
    verdict, n_seen = _run(optimizer, arguments)
    seen, last_epoch = metrics[:n_seen], (n_seen - 1) // len(sizes)
    n_steps = n_seen if verdict == kernels.DONE else n_seen - 1
    optimizer.n_steps += n_steps
    if last_epoch + 1 < settings.n_epochs:  # the reference draws no order that it does not use
        generator.set_state(states[last_epoch + 1])
    norms = np.sqrt(seen[:, kernels.ACTOR_SQUARES] + seen[:, kernels.CRITIC_SQUARES])
    if verdict == kernels.BAD_LOSS:
        raise bad_loss(*seen[-1, kernels.POLICY_LOSS : kernels.VALUE_LOSS + 1])
    if verdict == kernels.BAD_GRADIENT:
        raise bad_gradient(norms[-1], seen[-1, kernels.KL])
    stopped = verdict == kernels.KL_STOP
    return summary(seen[:, : len(METRICS)], last_epoch * len(sizes), norms[:n_steps].tolist(), stopped)


def _run(optimizer: FlatAdam, arguments: tuple[Any, ...]) -> tuple[int, int]:
    """How it ended, and how many minibatches were looked at."""
    from proximo.algorithms import kernels

    if optimizer.pace is None:
        optimizer.pace = Pace(torch.get_num_threads())
    n_threads = optimizer.pace.n_threads()
    began = perf_counter()
    if n_threads == 1:
        verdict, n_seen = kernels.run(kernels.BOTH, *arguments)
    else:
        try:  # whoever ends by an exception (Ctrl-C in between) must not leave the other one waiting
            critic = _second_thread().submit(_unless_raised, kernels.CRITIC, arguments)
            verdict, n_seen = kernels.run(kernels.ACTOR, *arguments)
        except BaseException:
            kernels.abandon(arguments[-1], kernels.ACTOR)
            raise
        critic.result()
    optimizer.pace.took(n_threads, (perf_counter() - began) / n_seen)
    return verdict, n_seen


def _unless_raised(who: int, arguments: tuple[Any, ...]) -> tuple[int, int]:
    from proximo.algorithms import kernels

    try:
        return kernels.run(who, *arguments)
    except BaseException:
        kernels.abandon(arguments[-1], who)
        raise


class Pace:
    """Which of one thread and two is faster, looked at again now and then: the other core may get other work.

    The numbers of an update do not hang on it.
    """

    LOOK_AGAIN = 64
    """Updates from one look at the slower way to the next; 16 times as many where it takes more than half longer."""

    def __init__(self, most: int) -> None:
        """Try both twice, if so many are allowed: the first time warms up."""
        self._most = most
        self._due = [1, 2, 1, 2]
        self._times: dict[int, float] = {}
        self._n_until_look = self.LOOK_AGAIN

    def n_threads(self) -> int:
        """How many threads the next update takes."""
        if self._most < 2:
            return 1
        if self._due:
            return self._due.pop(0)
        faster, slower = sorted((1, 2), key=lambda count: self._times.get(count, math.inf))
        self._n_until_look -= 1
        if self._n_until_look > 0:
            return faster
        is_far = self._times.get(slower, math.inf) > 1.5 * self._times.get(faster, math.inf)
        self._n_until_look = self.LOOK_AGAIN * (16 if is_far else 1)
        return slower

    def took(self, n_threads: int, seconds: float) -> None:
        """Note how long a minibatch took."""
        self._times[n_threads] = seconds


@cache
def _second_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "proximo-critic")


if hasattr(os, "register_at_fork"):  # a fork has the executor without its thread, and would wait for it for ever
    os.register_at_fork(after_in_child=_second_thread.cache_clear)


def _compiled_steps(columns: Columns, is_discrete: bool) -> kernels.Steps:
    from proximo.algorithms import kernels

    nothing = np.zeros((1, 1), columns.inputs.dtype)
    discrete = columns.actions.astype(np.int64) if is_discrete else np.zeros(1, np.int64)
    return kernels.Steps(columns.inputs, discrete, nothing if is_discrete else columns.actions, *columns[2:])


def compiled_networks(plain: PlainActorCritic, optimizer: FlatAdam) -> kernels.Networks:
    """Where the networks are in the optimizer's vectors."""
    from proximo.algorithms import kernels

    def place(parameter: Tensor) -> int:
        return (parameter.data_ptr() - optimizer.weights.data_ptr()) // optimizer.weights.element_size()

    def places(layers: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
        return np.array([[place(weight), place(bias)] for weight, bias in layers])

    def widths(layers: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
        return np.array([layers[0][0].shape[1], *(len(bias) for _, bias in layers)])

    return kernels.Networks(
        places(plain.actor),
        widths(plain.actor),
        places(plain.critic),
        widths(plain.critic),
        -1 if plain.log_std is None else place(plain.log_std),
        min(map(place, parameters_of(plain.critic))),
        plain.activation == "tanh",
    )


def _numbers(settings: ClipSettings, optimizer: FlatAdam, dtype: np.dtype) -> kernels.Numbers:
    from proximo.algorithms import kernels

    spread = ROUNDING * np.finfo(dtype).eps if settings.normalize_advantages else -1.0
    numbers = (
        optimizer.learning_rate,
        *optimizer.betas,
        optimizer.eps,
        settings.clip_epsilon,
        settings.value_coef,
        math.inf if settings.value_clip_epsilon is None else settings.value_clip_epsilon,
        settings.entropy_coef,
        settings.max_grad_norm,
        math.inf if settings.target_kl is None else 1.5 * settings.target_kl,
        spread,
    )
    return kernels.Numbers(*(dtype.type(number) for number in numbers))


def _room(widths: np.ndarray, n: int, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """Arrays for one network to work in: inputs, hidden layers, gradients between them, outputs, theirs, advantages."""
    widest, n_hidden = int(widths[1:-1].max(initial=1)), max(len(widths) - 2, 1)
    shapes = ((n, widths[0]), (n_hidden, n * widest), (2, n * widest), (n * widths[-1],), (n * widths[-1],), (n,))
    return tuple(np.empty(shape, dtype) for shape in shapes)
