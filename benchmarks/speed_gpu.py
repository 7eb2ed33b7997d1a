"""Steps per second on a GPU: CartPole on the device with 4,096 poles, and Atari's update beside a plain one in torch.

    python benchmarks/speed_gpu.py            # where there is no CUDA device, says so and ends
    python benchmarks/speed_gpu.py --table    # only write the table of docs/benchmarks.md

`cartpole`: collecting and learning as `proximo train CartPole-v1 --vectorization device` does, 4,096 poles x 32 steps,
4 epochs of 4 minibatches, networks of 2 x 64; steps per second of whole iterations, and the share of each phase.
`atari`: one update of 64 environments x 128 steps of 4 x 84 x 84 pictures, Nature CNN, 4 epochs of 4 minibatches, on
the path `graphed`, against the same update as single-file PPOs write it: modules, torch.distributions, torch's Adam,
clip_grad_norm_, a number fetched per minibatch. Both get the same weights and batch, and take turns. The median of
`--rounds` is written down, with the first call, which captures the graphs, apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.ppo import PPO
from proximo.collect.device_envs import TorchCartPole
from proximo.collect.device_rollout import DeviceCarry, DeviceCollector
from proximo.core.batch import Batch, minibatch_indices
from proximo.core.distributions import Categorical
from proximo.core.policy import Evaluation
from proximo.models.control import ActorCritic, NetworkConfig

RESULTS = Path(__file__).parent / "results" / "speed_gpu.jsonl"
GOALS = {"cartpole": "1,000,000 steps/s", "atari": "3 times the plain update"}
SIZES: dict[str, dict[str, int]] = {
    "cartpole": dict(n_envs=4096, length=32, rounds=20),
    "atari": dict(n_envs=64, length=128, rounds=10),
}
TINY: dict[str, dict[str, int]] = {
    "cartpole": dict(n_envs=8, length=4, rounds=2),
    "atari": dict(n_envs=2, length=4, rounds=2),
}


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long it takes until the device has done it."""
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    began = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - began


# --- CartPole ---------------------------------------------------------------------------------------------


def measure_cartpole(device: torch.device, *, n_envs: int, length: int, rounds: int) -> dict[str, Any]:
    """Whole iterations: collecting, then learning."""
    n_steps = n_envs * length
    envs = TorchCartPole(n_envs, device, seed=0)
    space = (envs.observation_space, envs.action_space)
    policy = ActorCritic(*space, NetworkConfig(), torch.Generator().manual_seed(0)).to(device)
    algorithm = PPO(n_epochs=4, batch_size=n_steps // 4, learning_rate=1e-3, gamma=0.98, update_path="graphed")
    optimizer = FlatAdam(policy, learning_rate=algorithm.learning_rate)
    carry = DeviceCarry.start(envs.reset())
    acting, shuffling = (torch.Generator(device).manual_seed(seed) for seed in (1, 2))
    collector = DeviceCollector(policy, envs, carry, length, acting, gamma=algorithm.gamma)
    batches: list[Batch] = []

    def collect() -> None:
        batches[:] = [collector.collect()[0]]

    def learn() -> None:
        algorithm.update(policy, optimizer, batches[0], shuffling)

    collecting, learning = [], []
    for _ in range(rounds + 1):
        collecting.append(seconds_of(collect, device))
        learning.append(seconds_of(learn, device))
    collected, learned = statistics.median(collecting[1:]), statistics.median(learning[1:])
    return {
        "steps_per_second": n_steps / (collected + learned),
        "steps_per_second_collecting": n_steps / collected,
        "share_collecting": collected / (collected + learned),
        "share_updating": learned / (collected + learned),
        "seconds_first": collecting[0] + learning[0],
    }


# --- Atari's update ---------------------------------------------------------------------------------------


class NatureCNN(nn.Module):
    """The convolutions of Mnih et al. 2015 under an actor and a critic of one layer each; pictures are uint8."""

    has_memory = False

    def __init__(self, n_actions: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU()),
        )
        self.actor, self.critic = nn.Linear(512, n_actions), nn.Linear(512, 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(pictures.float() / 255.0)
        return self.actor(features), self.critic(features).squeeze(-1)

    def evaluate(self, batch: Batch) -> Evaluation:
        assert isinstance(batch.observations, Tensor)
        logits, values = self(batch.observations.flatten(0, 1))
        shape = batch.mask.shape
        distribution = Categorical(logits.unflatten(0, shape))
        log_probs = distribution.log_prob(batch.actions)
        return Evaluation(log_probs, distribution.entropy(), values.unflatten(0, shape), distribution)

    def plain(self, batch: Batch) -> None:
        return None

    def row_lengths(self, batch: Batch) -> list[int]:
        return [1] * len(batch.mask)


def pictures(policy: NatureCNN, device: torch.device, n_envs: int, length: int) -> Batch:
    """What `policy` might have collected: random pictures and rewards, no end of an episode."""
    generator = torch.Generator(device).manual_seed(0)
    observations = torch.empty(n_envs, length, 4, 84, 84, dtype=torch.uint8, device=device)
    observations.random_(0, 256, generator=generator)
    rewards = torch.empty(n_envs, length, device=device).normal_(generator=generator)
    flags = torch.zeros(n_envs, length, dtype=torch.bool, device=device)
    with torch.no_grad():
        parts = [policy(part) for part in observations.flatten(0, 1).split(1024)]
        logits, values = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    acting = Categorical(logits.unflatten(0, (n_envs, length)))
    actions, values = acting.sample(generator), values.unflatten(0, (n_envs, length))
    return Batch(observations, actions, ~flags, rewards, acting.log_prob(actions), values, values, flags, flags)


def plain_update(policy: NatureCNN, optimizer: torch.optim.Adam, batch: Batch, algorithm: PPO) -> None:
    """PPO-Clip's update without any of our care for speed: every operation by itself, the host asked at every one."""
    rows, _ = algorithm._estimated(policy, batch)  # the same advantages and targets for both
    steps, returns = rows.batch, rows.returns
    assert returns is not None
    assert isinstance(steps.observations, Tensor)
    clip = algorithm.clip_epsilon
    for _ in range(algorithm.n_epochs):
        for part in minibatch_indices(len(returns), algorithm.batch_size, torch.Generator()):
            index = part.to(returns.device)
            logits, values = policy(steps.observations[index].squeeze(1))
            distribution = torch.distributions.Categorical(logits=logits)
            log_ratio = distribution.log_prob(steps.actions[index, 0]) - steps.log_probs[index, 0]
            ratio = log_ratio.exp()
            ((ratio - 1.0).abs() > clip).float().mean().item()  # the clip fraction, for a log
            advantages = rows.advantages[index, 0]
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
            value_loss = (values - returns[index, 0]).square().mean()
            loss = policy_loss + algorithm.value_coef * value_loss
            loss = loss - algorithm.entropy_coef * distribution.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), algorithm.max_grad_norm)
            optimizer.step()


def measure_atari(device: torch.device, *, n_envs: int, length: int, rounds: int) -> dict[str, Any]:
    """Our update and the plain one, by turns."""
    torch.manual_seed(0)
    ours, plain = NatureCNN().to(device), NatureCNN().to(device)
    plain.load_state_dict(ours.state_dict())
    batch = pictures(ours, device, n_envs, length)
    size = n_envs * length // 4
    algorithm = PPO(n_epochs=4, batch_size=size, learning_rate=2.5e-4, entropy_coef=0.01, update_path="graphed")
    flat = FlatAdam(ours, learning_rate=algorithm.learning_rate)
    adam = torch.optim.Adam(plain.parameters(), lr=algorithm.learning_rate, eps=1e-5)
    shuffling = torch.Generator(device).manual_seed(2)
    seconds: dict[str, list[float]] = {"graphed": [], "plain": []}
    for _ in range(rounds + 1):
        graphed = seconds_of(lambda: algorithm.update(ours, flat, batch, shuffling), device)
        seconds["graphed"].append(graphed)
        seconds["plain"].append(seconds_of(lambda: plain_update(plain, adam, batch, algorithm), device))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["graphed"][1:], seconds["plain"][1:], strict=True)]
    return {
        "steps_per_second_graphed": n_envs * length / medians["graphed"],
        "steps_per_second_plain": n_envs * length / medians["plain"],
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "seconds_first": seconds["graphed"][0],
    }


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {"cartpole": measure_cartpole, "atari": measure_atari}


# --- what is written down ---------------------------------------------------------------------------------


def write_table() -> None:
    """The last measurement of each task on each GPU."""
    from records import in_words, read_rows, write_between

    rows = {(row["task"], row["gpu"]): row for row in read_rows(RESULTS)}
    lines = ["| task | GPU | measured | goal |", "|---|---|---|---|"]
    for (task, gpu), row in sorted(rows.items()):
        if task == "cartpole":
            said = f"{row['steps_per_second']:,.0f} steps/s ({row['share_collecting']:.0%} of the time collecting)"
        else:
            said = f"{row['ratio']:.2f} times ({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f})"
        lines.append(f"| {task} | {gpu} | {said} | {GOALS[task]} |")
    write_between("speed on a GPU", lines + in_words(list(rows.values())) if rows else ["Not measured yet."])


def main() -> None:
    """Measure and write down, or say that there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--tiny-on-cpu", action="store_true", help=argparse.SUPPRESS)  # that it runs, no speed at all
    arguments = parser.parse_args()
    if arguments.table:
        write_table()
        return
    if arguments.tiny_on_cpu:
        torch.set_num_threads(1)
        for task in arguments.tasks:
            print(json.dumps({"task": task} | MEASURES[task](torch.device("cpu"), **TINY[task])))
        return
    if not torch.cuda.is_available():
        print("no GPU here: skipped")
        return
    from records import add_row

    device = torch.device("cuda:0")
    for task in arguments.tasks:
        measured = MEASURES[task](device, **SIZES[task])
        about = {"task": task, "gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, **SIZES[task]}
        add_row(RESULTS, about | measured)
        print(json.dumps(about | measured))
    write_table()


if __name__ == "__main__":
    main()
