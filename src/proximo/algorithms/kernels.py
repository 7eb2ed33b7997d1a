"""The arithmetic of `fused.py` in machine code by numba: all epochs of an update in one call, on one core or two.

The actor and the critic of a plain actor-critic share nothing but the norm that their gradient is clipped by. So
each has a thread of its own where there are two; they meet once per minibatch, to add their squares, and stop or step
by the same numbers. One thread does the same in turn, bit for bit.
"""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from proximo.machine_code import jit, tanh

MACHINE_CODE = "f0e01cab2ae17063"
"""The digest of machine_code.py: what numba keeps on the disk is made anew where this very file has changed."""

KL, POLICY_LOSS, VALUE_LOSS, ENTROPY, CLIPPED, ACTOR_SQUARES, CRITIC_SQUARES, N_METRICS = range(8)
"""Columns of the table of metrics, a row per minibatch."""

ACTOR, CRITIC, BOTH = range(3)
"""Whose part of the work a call does."""

DONE, KL_STOP, BAD_LOSS, BAD_GRADIENT, ABANDONED = range(5)
"""How an update ended."""


class Networks(NamedTuple):
    """Where everything is in the flat vectors: `[n_layers, 2]` places of weight and bias, `[n_layers + 1]` widths."""

    actor_places: np.ndarray
    actor_widths: np.ndarray
    critic_places: np.ndarray
    critic_widths: np.ndarray
    log_std_place: int
    """-1 for a categorical policy."""
    critic_start: int
    """What is before it belongs to the actor, the rest to the critic."""
    is_tanh: bool


class Adam(NamedTuple):
    """The four vectors, and where the steps are."""

    weights: np.ndarray
    gradient: np.ndarray
    first_moment: np.ndarray
    second_moment: np.ndarray
    n_steps: int


class Steps(NamedTuple):
    """A rollout's steps `[n, ...]`; `discrete` or `continuous` actions, the other one empty."""

    inputs: np.ndarray
    discrete: np.ndarray
    continuous: np.ndarray
    old_log_probs: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    old_values: np.ndarray


class Numbers(NamedTuple):
    """Settings, as floats of the weights' kind; infinity where there is no such limit."""

    learning_rate: Any
    beta1: Any
    beta2: Any
    eps: Any
    clip_epsilon: Any
    value_coef: Any
    value_clip_epsilon: Any
    entropy_coef: Any
    max_grad_norm: Any
    most_kl: Any
    smallest_spread: Any
    """Times the largest advantage: below it advantages differ by rounding alone; negative: never normalize."""


@intrinsic
def _publish(typing_context: Any, array: Any, place: Any, value: Any) -> Any:
    """Store into an int64 array what another thread waits for, after everything that was written before."""

    def write(context, builder, signature, arguments):
        kind = signature.args[0]
        view = context.make_array(kind)(context, builder, arguments[0])
        pointer = cgutils.get_item_pointer(context, builder, kind, view, [arguments[1]])
        builder.store_atomic(arguments[2], pointer, ordering="release", align=8)
        return context.get_dummy_value()

    return types.void(types.Array(types.int64, 1, "C"), types.intp, types.int64), write


@intrinsic
def _published(typing_context: Any, array: Any, place: Any) -> Any:
    """Read what another thread has published, before anything that is read afterwards."""

    def read(context, builder, signature, arguments):
        kind = signature.args[0]
        view = context.make_array(kind)(context, builder, arguments[0])
        pointer = cgutils.get_item_pointer(context, builder, kind, view, [arguments[1]])
        return builder.load_atomic(pointer, ordering="acquire", align=8)

    return types.int64(types.Array(types.int64, 1, "C"), types.intp), read


_give_way = types.ExternalFunction("sched_yield", types.int32()) if os.name == "posix" else njit(lambda: 0)


@jit
def _wait(arrived, place, count):
    """Wait for another thread; after about 20 us let others have this core meanwhile. False: it will not come."""
    n_looks = 0
    there = _published(arrived, place)  # pyright: ignore[reportCallIssue]
    while 0 <= there < count:
        n_looks += 1
        if n_looks > 4096:
            _give_way()
        there = _published(arrived, place)  # pyright: ignore[reportCallIssue]
    return there > 0


@jit
def abandon(arrived, who):
    """Say that `who` will not come to where the other thread waits: something was raised."""
    _publish(arrived, who * 64, -1)  # pyright: ignore[reportCallIssue]


@jit
def activate(rows, bias, is_tanh):
    """Add the bias to each row and apply tanh, or ReLU, in place."""
    zero = rows.dtype.type(0)
    for i in range(rows.shape[0]):
        row = rows[i]
        if is_tanh:
            for j in range(row.size):
                row[j] = tanh(row[j] + bias[j])
        else:
            for j in range(row.size):
                x = row[j] + bias[j]
                row[j] = zero if x < zero else x


@jit
def _through_activation(gradient, activated, is_tanh):
    zero, one = gradient.dtype.type(0), gradient.dtype.type(1)
    for i in range(gradient.shape[0]):
        g, h = gradient[i], activated[i]
        if is_tanh:
            for j in range(g.size):
                g[j] *= one - h[j] * h[j]
        else:
            for j in range(g.size):
                g[j] = g[j] if h[j] > zero else zero


@jit
def _sum_rows(rows, sums):
    sums[:] = 0
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(row.size):
            sums[j] += row[j]


@jit
def _forward(weights, places, widths, inputs, hidden, outputs, is_tanh):
    """Fill `hidden[layer]` and `outputs`."""
    last = widths.size - 2
    before = inputs
    n = inputs.shape[0]
    for layer in range(last + 1):
        fan_in, fan_out = widths[layer], widths[layer + 1]
        weight = weights[places[layer, 0] : places[layer, 0] + fan_in * fan_out].reshape(fan_out, fan_in)
        bias = weights[places[layer, 1] : places[layer, 1] + fan_out]
        after = outputs if layer == last else hidden[layer, : n * fan_out].reshape(n, fan_out)
        np.dot(before, weight.T, after)
        if layer < last:
            activate(after, bias, is_tanh)
        else:
            for i in range(n):
                for j in range(fan_out):
                    after[i, j] += bias[j]
        before = after


@jit
def outputs_of(weights, places, widths, observations, shift, scale, limit, is_tanh):
    """Logits, means or values `[n, k]` at `observations` `[n, F]`, shifted, scaled and clipped before."""
    n, n_inputs = observations.shape
    inputs, outputs = np.empty((n, n_inputs), weights.dtype), np.empty((n, widths[-1]), weights.dtype)
    for i in range(n):
        for j in range(n_inputs):
            x = (observations[i, j] - shift[j]) * scale[j]
            x = limit if x > limit else x  # a NaN stays one
            inputs[i, j] = -limit if x < -limit else x
    hidden = np.empty((widths.size, n * widths.max()), weights.dtype)
    _forward(weights, places, widths, inputs, hidden, outputs, is_tanh)
    return outputs


@jit
def _backward(weights, gradient, places, widths, inputs, hidden, to_outputs, spare, is_tanh):
    """Write the gradient of every layer, from the one to the outputs; `spare` is `[2, ...]` for what is between."""
    n = inputs.shape[0]
    flowing = to_outputs
    for layer in range(widths.size - 2, -1, -1):
        fan_in, fan_out = widths[layer], widths[layer + 1]
        first = places[layer, 0]
        before = inputs if layer == 0 else hidden[layer - 1, : n * fan_in].reshape(n, fan_in)
        np.dot(flowing.T, before, gradient[first : first + fan_in * fan_out].reshape(fan_out, fan_in))
        _sum_rows(flowing, gradient[places[layer, 1] : places[layer, 1] + fan_out])
        if layer == 0:
            return
        earlier = spare[layer % 2, : n * fan_in].reshape(n, fan_in)
        np.dot(flowing, weights[first : first + fan_in * fan_out].reshape(fan_out, fan_in), earlier)
        _through_activation(earlier, before, is_tanh)
        flowing = earlier


@jit
def _normalized(advantages, rows, smallest_spread, result):
    """As `masked.whiten`: over the minibatch, with denominator n - 1; what differs by rounding alone becomes 0."""
    n = rows.size
    total, largest = 0.0, 0.0
    for i in range(n):
        result[i] = advantages[rows[i]]
        total += result[i]
        largest = max(largest, abs(result[i]))
    if smallest_spread < 0 or n < 2:
        return
    mean, squares = total / n, 0.0
    for i in range(n):
        squares += (result[i] - mean) ** 2
    spread = math.sqrt(squares / (n - 1))
    if spread <= smallest_spread * largest:
        spread = math.inf
    for i in range(n):
        result[i] = (result[i] - mean) / (spread + 1e-8)


@jit
def _clipped(log_ratio, advantage, clip_epsilon, sums):
    """Add to the metrics; the gradient of the clipped surrogate's negative to the log-probability."""
    ratio = math.exp(log_ratio)
    unclipped = ratio * advantage
    clipped = min(max(ratio, 1 - clip_epsilon), 1 + clip_epsilon) * advantage
    sums[KL] += math.expm1(log_ratio) - log_ratio
    sums[POLICY_LOSS] -= clipped if clipped < unclipped else unclipped
    sums[CLIPPED] += 1.0 if abs(ratio - 1) > clip_epsilon else 0.0
    # Where the clipped term is the smaller one the ratio is outside the band, and the gradient zero. A NaN is never
    # greater: it gets through.
    return 0.0 if unclipped > clipped else -unclipped


@jit
def _categorical(logits, steps, rows, advantages, numbers, sums, to_logits):
    """`d log p(a) / d logits = onehot(a) - p`; `d H / d logits = -p (log p + H)`."""
    n, k = logits.shape
    for i in range(n):
        row, p = logits[i], to_logits[i]  # probabilities first, gradients in their place at the end
        highest = row[0]
        for j in range(k):
            highest = max(highest, row[j])
        total = 0.0
        for j in range(k):
            p[j] = math.exp(row[j] - highest)
            total += p[j]
        normalizer = highest + math.log(total)
        entropy = 0.0
        for j in range(k):
            p[j] /= total
            entropy -= p[j] * (row[j] - normalizer)
        sums[ENTROPY] += entropy
        action = steps.discrete[rows[i]]
        log_ratio = row[action] - normalizer - steps.old_log_probs[rows[i]]
        weight = _clipped(log_ratio, advantages[i], numbers.clip_epsilon, sums) / n
        for j in range(k):
            p[j] *= numbers.entropy_coef / n * (row[j] - normalizer + entropy) - weight
        p[action] += weight


@jit
def _gaussian(means, log_std, steps, rows, advantages, numbers, sums, to_means, to_log_std):
    """`d log p / d mean = z / std`, `d log p / d log_std = z^2 - 1`, `d H / d log_std = 1`; z standardized."""
    n, k = means.shape
    inverse_std = np.exp(-log_std)
    constant = 0.0
    for j in range(k):
        constant += log_std[j] + 0.9189385332046727
        to_log_std[j] = -numbers.entropy_coef
    sums[ENTROPY] += n * (constant + 0.5 * k)
    for i in range(n):
        squares = 0.0
        for j in range(k):
            z = (steps.continuous[rows[i], j] - means[i, j]) * inverse_std[j]
            squares += z * z
        log_ratio = -0.5 * squares - constant - steps.old_log_probs[rows[i]]
        weight = _clipped(log_ratio, advantages[i], numbers.clip_epsilon, sums) / n
        for j in range(k):
            z = (steps.continuous[rows[i], j] - means[i, j]) * inverse_std[j]
            to_means[i, j] = weight * z * inverse_std[j]
            to_log_std[j] += weight * (z * z - 1)


@jit
def _value(values, steps, rows, numbers, to_values):
    """Write the gradient of value_coef times the value loss; return the value loss."""
    n = rows.size
    total = 0.0
    limit = numbers.value_clip_epsilon
    for i in range(n):
        target, old = steps.returns[rows[i]], steps.old_values[rows[i]]
        error = values[i, 0] - target
        squared, slope = error * error, error
        if limit < math.inf:
            change = values[i, 0] - old
            clipped_error = old + min(max(change, -limit), limit) - target
            if not squared >= clipped_error * clipped_error:  # one that is NaN gets through
                squared = clipped_error * clipped_error
                slope = clipped_error if abs(change) <= limit else 0.0 * clipped_error
        total += squared
        to_values[i, 0] = slope * (2 * numbers.value_coef / n)
    return total / n


@jit
def _sum_of_squares(vector):
    total = vector.dtype.type(0)
    for i in range(vector.size):
        total += vector[i] * vector[i]
    return total


@jit
def _step(adam, first, last, n_steps, scale, numbers):
    """One step of Adam on a part of the vectors, the gradient scaled first."""
    kind = adam.weights.dtype.type
    weights, gradient = adam.weights[first:last], adam.gradient[first:last]
    first_moment, second_moment = adam.first_moment[first:last], adam.second_moment[first:last]
    factor = kind(scale)
    keep1, keep2 = numbers.beta1, numbers.beta2
    take1, take2 = kind(1) - keep1, kind(1) - keep2
    size = kind(numbers.learning_rate / (1 - float(keep1) ** n_steps))
    correction = kind(1 / math.sqrt(1 - float(keep2) ** n_steps))
    eps = numbers.eps
    for i in range(weights.size):
        g = gradient[i] * factor
        m = first_moment[i] + (g - first_moment[i]) * take1
        v = second_moment[i] * keep2 + g * g * take2
        first_moment[i] = m
        second_moment[i] = v
        weights[i] -= size * m / (math.sqrt(v) * correction + eps)


@jit
def _gradient(is_actor, networks, adam, steps, rows, numbers, room, row):
    """One network's gradient, the sum of its squares, and its metrics of one minibatch."""
    inputs, hidden, spare, outputs, to_outputs, advantages = room
    places = networks.actor_places if is_actor else networks.critic_places
    widths = networks.actor_widths if is_actor else networks.critic_widths
    n, k = rows.size, widths[-1]
    some = inputs[:n]
    for i in range(n):
        for j in range(some.shape[1]):
            some[i, j] = steps.inputs[rows[i], j]
    outs = outputs[: n * k].reshape(n, k)
    slopes = to_outputs[: n * k].reshape(n, k)
    _forward(adam.weights, places, widths, some, hidden, outs, networks.is_tanh)
    if is_actor:
        _actor_slopes(networks, adam, steps, rows, numbers, advantages, outs, slopes, row)
    else:
        row[VALUE_LOSS] = _value(outs, steps, rows, numbers, slopes)
    _backward(adam.weights, adam.gradient, places, widths, some, hidden, slopes, spare, networks.is_tanh)
    first = 0 if is_actor else networks.critic_start
    last = networks.critic_start if is_actor else adam.gradient.size
    row[ACTOR_SQUARES if is_actor else CRITIC_SQUARES] = _sum_of_squares(adam.gradient[first:last])


@jit
def _actor_slopes(networks, adam, steps, rows, numbers, advantages, outs, slopes, row):
    """The gradient to the actor's outputs, and the metrics."""
    n, k = outs.shape
    _normalized(steps.advantages, rows, numbers.smallest_spread, advantages)
    row[KL] = row[POLICY_LOSS] = row[ENTROPY] = row[CLIPPED] = 0.0
    place = networks.log_std_place
    if place < 0:
        _categorical(outs, steps, rows, advantages, numbers, row, slopes)
    else:
        log_std, to_log_std = adam.weights[place : place + k], adam.gradient[place : place + k]
        _gaussian(outs, log_std, steps, rows, advantages, numbers, row, slopes, to_log_std)
    row[KL] /= n
    row[POLICY_LOSS] /= n
    row[ENTROPY] /= n
    row[CLIPPED] /= n


@partial(jit, fastmath=False)  # `reassoc` takes x - x for 0, and so a sum that is NaN for finite
def _verdict(row, most_kl):
    if not (row[VALUE_LOSS] < math.inf and abs(row[POLICY_LOSS]) < math.inf):
        return BAD_LOSS
    if row[KL] > most_kl:
        return KL_STOP
    # A ratio that is infinite where its advantage is above 0 is clipped, and has a gradient that is no number.
    is_good = row[KL] < math.inf and row[ACTOR_SQUARES] + row[CRITIC_SQUARES] < math.inf
    return DONE if is_good else BAD_GRADIENT


@jit
def run(who, networks, adam, steps, order, ends, numbers, actor_room, critic_room, metrics, arrived):
    """Go through minibatches `order[ends[k - 1]:ends[k]]`; return how it ended, and how many were looked at.

    `who` is ACTOR, CRITIC (at the same time, from two threads, over the same arrays) or BOTH.
    """
    for k in range(ends.size):
        rows = order[(ends[k - 1] if k else 0) : ends[k]]
        row = metrics[k]
        for part in range(ACTOR, CRITIC + 1):
            if who in (part, BOTH):
                room = actor_room if part == ACTOR else critic_room
                _gradient(part == ACTOR, networks, adam, steps, rows, numbers, room, row)
        if who != BOTH:
            _publish(arrived, who * 64, k + 1)  # pyright: ignore[reportCallIssue]
            if not _wait(arrived, (1 - who) * 64, k + 1):
                return ABANDONED, k + 1
        verdict = _verdict(row, numbers.most_kl)
        if verdict != DONE:
            return verdict, k + 1
        norm = math.sqrt(row[ACTOR_SQUARES] + row[CRITIC_SQUARES])
        scale = min(1.0, numbers.max_grad_norm / (norm + 1e-6))
        first = networks.critic_start if who == CRITIC else 0
        last = networks.critic_start if who == ACTOR else adam.weights.size
        _step(adam, first, last, adam.n_steps + k + 1, scale, numbers)
    return DONE, ends.size
