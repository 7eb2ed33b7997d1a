"""How fast PPO could be on this machine: environments measured alone, plus arithmetic at the measured rate.

    python benchmarks/limit.py '{"env_id": "CartPole-v1", "n_envs": 8, "batch_size": 256, "n_epochs": 20}'

With W the weights of actor and critic, E epochs, M steps per minibatch, n parameters, one step takes at least

    T = t_environment + (2 + 6 E) W / P + (1 + E) n_tanh t_tanh + (E / M) 28 n / B        limit = 1 / T

2 W FLOP to act and 6 W per epoch (2 W forward, 4 W backward); P, the FLOP/s of matrix products of the very shapes of a
minibatch; n_tanh units, each with a tanh per pass at t_tanh; 28 bytes that Adam has to read and write per parameter at
B bytes/s. Tanh and Adam are timed on one core and divided by the number of cores, as if splitting were free.
t_environment: the bare environments stepped with random actions. Where one environment's step takes longer than
`SPLIT_FROM` and there are several, their time is divided by the number of cores, as if splitting were free; a
vector version of the environment's own is taken as it is. The smaller of the two counts.

Left out is all that a program could in principle do without: copies, sampling, log-probabilities, GAE, bookkeeping.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SPLIT_FROM = 30e-6
"""Seconds per step from which environments are taken to be worth splitting over cores."""
ADAM_BYTES = 28
"""Read parameter, gradient and both moments, write parameter and moments: 7 floats of 4 bytes."""
HIDDEN = (64, 64)

Layer = tuple[int, int]
"""Inputs and outputs of a linear layer."""
Product = tuple[int, int, int]
"""(r, k, c): a matrix product [r, k] x [k, c] of 2 r k c FLOP."""


# --- arithmetic -----------------------------------------------------------------------------------------------------


def perceptron(n_inputs: int, n_outputs: int, hidden: tuple[int, ...] = HIDDEN) -> list[Layer]:
    return list(itertools.pairwise((n_inputs, *hidden, n_outputs)))


def actor_and_critic(n_inputs: int, n_actions: int, hidden: tuple[int, ...] = HIDDEN) -> list[Layer]:
    """Two networks that share nothing."""
    return perceptron(n_inputs, n_actions, hidden) + perceptron(n_inputs, 1, hidden)


def count_weights(layers: list[Layer]) -> int:
    """Multiply weights: W."""
    return sum(inputs * outputs for inputs, outputs in layers)


def count_parameters(layers: list[Layer]) -> int:
    """Weights and biases: n."""
    return count_weights(layers) + sum(outputs for _, outputs in layers)


def perceptron_flops(weights: int, n_epochs: int) -> int:
    """FLOP per environment step: (2 + 6 E) W."""
    return (2 + 6 * n_epochs) * weights


def perceptron_products(layers: list[Layer], batch_size: int) -> list[Product]:
    """Of one minibatch: forward, gradient of the weights, gradient of the inputs."""
    forward = [(batch_size, inputs, outputs) for inputs, outputs in layers]
    return forward + [shape for r, k, c in forward for shape in ((k, r, c), (r, c, k))]


@dataclass(frozen=True)
class Convolution:
    """A square convolution without padding; `positions` it has in the picture."""

    channels: int
    filters: int
    kernel: int
    positions: int

    @property
    def inputs(self) -> int:
        return self.channels * self.kernel**2


NATURE_CONVOLUTIONS = (
    Convolution(4, 32, 8, 20 * 20),
    Convolution(32, 64, 4, 9 * 9),
    Convolution(64, 64, 3, 7 * 7),
)
"""Mnih et al. 2015, on 84 x 84 x 4; strides 4, 2, 1."""


def nature_forward(n_actions: int, batch_size: int) -> list[Product]:
    """The forward products of actor and critic on one Nature CNN, convolutions as products over unfolded patches."""
    unfolded = [(batch_size * c.positions, c.inputs, c.filters) for c in NATURE_CONVOLUTIONS]
    return [*unfolded, (batch_size, 64 * 7 * 7, 512), (batch_size, 512, n_actions + 1)]


def nature_products(n_actions: int, batch_size: int) -> list[Product]:
    """Of one minibatch; the first convolution needs no gradient of its inputs, the pixels."""
    forward = nature_forward(n_actions, batch_size)
    backward = [shape for r, k, c in forward for shape in ((k, r, c), (r, c, k))]
    return [*forward, backward[0], *backward[2:]]


def products_flops(products: list[Product]) -> int:
    return sum(2 * r * k * c for r, k, c in products)


def nature_flops(n_actions: int, n_epochs: int) -> int:
    """FLOP per environment step: one pass to act, and forward and backward in every epoch."""
    return products_flops(nature_forward(n_actions, 1)) + n_epochs * products_flops(nature_products(n_actions, 1))


def nature_parameters(n_actions: int) -> int:
    forward = nature_forward(n_actions, 1)
    return sum(inputs * outputs + outputs for _, inputs, outputs in forward)


def seconds_per_step(
    *,
    environment: float,
    flops: float,
    flops_per_second: float,
    n_parameters: int,
    bytes_per_second: float,
    n_epochs: int,
    batch_size: int,
    n_tanh: int = 0,
    tanh_seconds: float = 0.0,
) -> dict[str, float]:
    """The parts of T, in seconds: see the top of this file."""
    return {
        "environment": environment,
        "products": flops / flops_per_second,
        "tanh": (1 + n_epochs) * n_tanh * tanh_seconds,
        "adam": n_epochs / batch_size * ADAM_BYTES * n_parameters / bytes_per_second,
    }


def environment_seconds(serial: float | None, native: float | None, *, n_envs: int, cores: int) -> float:
    """Seconds per environment step at best: one by one, split where that pays, or in the own vector version."""
    found = [] if native is None else [native]
    if serial is not None:
        splits = serial > SPLIT_FROM and n_envs > 1
        found.append(serial / min(cores, n_envs) if splits else serial)
    return min(found)


# --- measurements: the fastest of several, since only the machine may hold it up ------------------------------------


def fastest(function: Callable[[], object], seconds: float) -> float:
    """Seconds of one call: the fastest of many blocks of calls, of a millisecond or more each."""
    calls, blocks = 1, []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(blocks) < 3:
        began = time.perf_counter()
        for _ in range(calls):
            function()
        passed = time.perf_counter() - began
        if passed < 1e-3 and not blocks:
            calls *= 2
        else:
            blocks.append(passed / calls)
    return min(blocks)


def product_rate(products: list[Product], precision: str, threads: int, seconds: float) -> float:
    """FLOP/s over these products, each done in the fastest way there is: alone, two at once, or by NumPy."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    dtype, total = getattr(torch, precision), 0.0
    kinds = sorted(set(products))
    for kind in kinds:
        r, k, c = kind
        one = [torch.randn(shape).to(dtype) for shape in ((r, k), (k, c), (r, c))]
        two = [torch.randn(2, *tensor.shape).to(dtype) for tensor in one]
        ways = [
            fastest(lambda one=one: torch.mm(one[0], one[1], out=one[2]), seconds / 3),
            fastest(lambda two=two: torch.bmm(two[0], two[1], out=two[2]), seconds / 3) / 2,
        ]
        if precision == "float32":
            arrays = [tensor.numpy() for tensor in one]
            ways.append(fastest(lambda a=arrays: np.matmul(a[0], a[1], out=a[2]), seconds / 3))
        total += products.count(kind) * min(ways)
    return products_flops(products) / total


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16; without them it is far slower than float32."""
    from records import processor_flags

    return bool({"amx_bf16", "avx512_bf16"} & set(processor_flags()))


def tanh_seconds(batch_size: int, seconds: float) -> float:
    """Seconds per tanh, of a minibatch of hidden units, in the fastest way there is: torch's, NumPy's or ours."""
    import numpy as np
    import torch

    values, out = torch.randn(batch_size, HIDDEN[0]), torch.empty(batch_size, HIDDEN[0])
    arrays = values.numpy(), out.numpy()
    ways = [lambda: torch.tanh(values, out=out), lambda: np.tanh(arrays[0], out=arrays[1])]
    try:
        from proximo.algorithms.kernels import activate
    except ImportError:  # without the extra
        pass
    else:
        nothing = np.zeros(HIDDEN[0], np.float32)
        activate(arrays[1], nothing, True)  # compiled
        ways.append(lambda: activate(arrays[1], nothing, True))
    return min(fastest(way, seconds / len(ways)) for way in ways) / values.numel()


def cache_rate(n_parameters: int, seconds: float) -> float:
    """Bytes/s of reading two vectors and writing one, all three together as large as what Adam touches."""
    import torch

    a, b, out = (torch.randn(-(-4 * n_parameters // 3)) for _ in range(3))
    return 12 * a.numel() / fastest(lambda: torch.add(a, b, out=out), seconds)


def serial_seconds(env_id: str, n_steps: int) -> float:
    """Seconds per step of one environment with random actions, resets included: the fastest of five stretches."""
    import gymnasium as gym

    env = gym.make(env_id, disable_env_checker=True)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(1000)]
    env.reset(seed=0)
    stretches = []
    for _ in range(5):
        began = time.perf_counter()
        for step in range(n_steps // 5):
            _, _, terminated, truncated, _ = env.step(actions[step % 1000])
            if terminated or truncated:
                env.reset()
        stretches.append((time.perf_counter() - began) / (n_steps // 5))
    env.close()
    return min(stretches)


def native_seconds(env_id: str, n_envs: int, n_steps: int) -> float | None:
    """The same of the environment's own vector version, per step of one environment; None where there is none.

    A step that only resets is none.
    """
    import gymnasium as gym
    from gymnasium.vector import AutoresetMode

    spec = gym.registry.get(env_id)
    if spec is None or spec.vector_entry_point is None:
        return None
    envs = gym.make_vec(env_id, n_envs, vectorization_mode="vector_entry_point")
    envs.action_space.seed(0)
    actions = [envs.action_space.sample() for _ in range(100)]
    envs.reset(seed=0)
    stretches = []
    length = max(1, n_steps // (5 * n_envs))
    for _ in range(5):
        ends = []
        began = time.perf_counter()
        for step in range(length):
            ends.append(envs.step(actions[step % 100])[2:4])
        passed = time.perf_counter() - began
        n_resets = 0
        if envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP) is AutoresetMode.NEXT_STEP:
            n_resets = sum(int((terminated | truncated).sum()) for terminated, truncated in ends[:-1])
        stretches.append(passed / (length * n_envs - n_resets))
    envs.close()
    return min(stretches)


def spaces_of(env_id: str) -> tuple[tuple[int, ...], int, bool]:
    """Shape of observations, number of the actor's outputs, and whether actions are continuous."""
    import gymnasium as gym

    env = gym.make(env_id, disable_env_checker=True)
    observations, actions = env.observation_space.shape, env.action_space
    env.close()
    assert observations is not None
    if isinstance(actions, gym.spaces.Discrete):
        return observations, int(actions.n), False
    assert isinstance(actions, gym.spaces.Box)
    return observations, int(actions.shape[0]), True


def measure(task: dict[str, Any], *, seconds: float = 0.3, n_steps: int = 20_000) -> dict[str, Any]:
    """The limit of a task, with all that it was computed from.

    Args:
        task: `env_id`, `n_envs`, `batch_size`, `n_epochs`; `cnn` true for a Nature CNN.
        seconds: how long each kind of product is tried, in each way.
        n_steps: how many environment steps are timed.
    """
    import torch

    cores = os.cpu_count() or 1
    observations, n_actions, is_continuous = spaces_of(task["env_id"])
    # Pixels come scaled and stacked from the vector version alone, and that work belongs to the task.
    serial = None if task.get("cnn") else serial_seconds(task["env_id"], n_steps)
    native = native_seconds(task["env_id"], task["n_envs"], n_steps)
    if task.get("cnn"):
        # The rate of products this large no longer grows with the rows; a whole minibatch would take minutes.
        products = nature_products(n_actions, min(16, task["batch_size"]))
        flops, n_parameters = nature_flops(n_actions, task["n_epochs"]), nature_parameters(n_actions)
        n_tanh, precisions = 0, ("float32", *(("bfloat16",) if multiplies_bfloat16() else ()))
    else:
        layers = actor_and_critic(observations[0], n_actions)
        products = perceptron_products(layers, task["batch_size"])
        flops = perceptron_flops(count_weights(layers), task["n_epochs"])
        n_parameters = count_parameters(layers) + (n_actions if is_continuous else 0)
        n_tanh, precisions = 2 * sum(HIDDEN), ("float32",)
    rates = {
        precision: {threads: product_rate(products, precision, threads, seconds) for threads in sorted({1, cores})}
        for precision in precisions
    }
    torch.set_num_threads(1)
    measured: dict[str, Any] = dict(
        environment=environment_seconds(serial, native, n_envs=task["n_envs"], cores=cores),
        flops=flops,
        n_parameters=n_parameters,
        bytes_per_second=cores * cache_rate(n_parameters, seconds),
        n_tanh=n_tanh,
        tanh_seconds=tanh_seconds(task["batch_size"], seconds) / cores if n_tanh else 0.0,
    )
    parts = {
        precision: seconds_per_step(
            **measured,
            flops_per_second=max(of_threads.values()),
            n_epochs=task["n_epochs"],
            batch_size=task["batch_size"],
        )
        for precision, of_threads in rates.items()
    }
    return {
        **measured,
        "environment_serial": serial,
        "environment_native": native,
        "cores": cores,
        "flops_per_second": {
            precision: {str(threads): rate for threads, rate in of_threads.items()}
            for precision, of_threads in rates.items()
        },
        "parts": parts,
        "steps_per_second": {precision: 1 / sum(of_parts.values()) for precision, of_parts in parts.items()},
    }


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    if "ALE/" in wanted["env_id"]:
        import ale_py  # noqa: F401  (registers its environments)
    how = {name: wanted.pop(name) for name in ("seconds", "n_steps") if name in wanted}
    print(json.dumps(measure(wanted, **how)))
