"""Behaviour cloning of a control policy: demonstrations in, the actor-critic that PPO would begin with out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.algorithms.cloning import ReturnsToGo, fit_values, imitate, most_likely_log_std, returns_to_go
from proximo.collect.demonstrations import Demonstrations
from proximo.core.batch import Batch, minibatch_indices
from proximo.core.distributions import DiagonalGaussian, SquashedGaussian
from proximo.errors import UserError, in_range
from proximo.models.control import ActorCritic
from proximo.models.packing import Leaf, PackedActions, leaves
from proximo.runs.checkpoint import save_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import append_metrics
from proximo.training.config import ControlConfig, recorded, settings_of
from proximo.training.control import describe_policy

Metrics = dict[str, Any]

BOUND_MARGIN = 1e-3
"""Of half the range: a squashed Gaussian or a Beta reaches its bounds only in the limit, so actions that stand on them
count as so far inside, where their density is finite and one of them does not outweigh all others."""

ROWS_AT_ONCE = 8192
"""Steps that are scored at a time without gradient."""


@dataclass(frozen=True)
class CloneConfig:
    """How a policy is cloned; its networks, normalizers and discount are those of the environment's own settings."""

    n_epochs: int = 200
    """Passes over the data, at most, for the policy and again for the critic."""
    patience: int = 20
    """Epochs without a better result on what is held out, after which it ends; the best weights are kept."""
    batch_size: int = 64
    """Steps per minibatch; more are faster where there are hundreds of thousands of steps."""
    learning_rate: float = 1e-3
    """Step size of Adam."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""
    hold_out: float = 0.1
    """Share of the episodes that are not learned from, to measure on; 0 learns from all, for n_epochs."""
    log_std_min: float = -2.0
    """Lowest logarithm of a Gaussian's standard deviation that is a weight. Demonstrations without noise would make it
    smaller and smaller, and PPO explores with what is left of it."""
    fit_critic: bool = True
    """Let the critic learn the discounted returns of the data, so that PPO begins with one that knows something."""
    eval_episodes: int = 20
    """Episodes that the clone is evaluated on at the end; 0 for none."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        for name in ("n_epochs", "patience", "batch_size"):
            in_range(name, getattr(self, name), at_least=1, whole=True, usual=str(getattr(CloneConfig, name)))
        in_range("learning_rate", self.learning_rate, above=0.0, at_most=1.0, usual="0.001")
        in_range("max_grad_norm", self.max_grad_norm, above=0.0, usual="1.0")
        in_range("hold_out", self.hold_out, at_least=0.0, at_most=0.9, usual="0.1")
        in_range("log_std_min", self.log_std_min, at_least=-20.0, at_most=2.0, usual="-2.0")
        in_range("eval_episodes", self.eval_episodes, at_least=0, whole=True, usual="20")


@dataclass(frozen=True)
class CloningData:
    """Demonstrations as tensors, in the policy's units."""

    batch: Batch
    """`[N, 1]`; of its fields only observations, actions and mask mean anything."""
    actions: np.ndarray
    """`[N, *A]`: the demonstrated actions as the environment's."""
    learned: Tensor
    """Numbers of the steps to learn from."""
    held_out: Tensor
    """And to measure on; may be none."""
    values: ReturnsToGo
    """In scaled reward units."""
    after: Tensor
    """`[E, *O]`: the observation at which the critic stands for what follows each episode."""
    episode_of: Tensor
    """`[N]`: the number of each step's episode."""


def new_policy(config: ControlConfig, observations: spaces.Space, actions: spaces.Space) -> ActorCritic:
    """The actor-critic that `train` would begin with, of random weights."""
    weights = np.random.SeedSequence([config.seed, 0xC107E]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(weights[0]))
    return ActorCritic(observations, actions, config.network, generator).to(config.device)


def prepare(config: ControlConfig, cloning: CloneConfig, policy: ActorCritic, data: Demonstrations) -> CloningData:
    """Set the policy's normalizers by the data that is learned from, and lay the data out.

    Raises:
        UserError: if a demonstrated action is one that its mask forbids.
    """
    device = torch.device(config.device)
    learned, held_out = split(data.lengths, cloning.hold_out, config.seed)
    batch = _batch(policy, data, device)
    if config.network.normalize_observations:
        assert isinstance(batch.observations, Tensor)
        for rows in torch.from_numpy(learned).to(device).split(ROWS_AT_ONCE):
            policy.update_observation_moments(batch.observations[rows, 0])
    rewards = _scaled_rewards(config, policy, data, learned)
    values = returns_to_go(
        rewards,
        torch.from_numpy(data.terminated),
        torch.from_numpy(data.ends),
        config.algorithm.gamma,
        ends_are_seen=data.final_observations is not None,
    )
    after = data.observations[data.ends] if data.final_observations is None else data.final_observations
    laid_out = CloningData(
        batch,
        data.actions,
        torch.from_numpy(learned).to(device),
        torch.from_numpy(held_out).to(device),
        ReturnsToGo(*(part.to(device, torch.float32) for part in values)),
        torch.from_numpy(after).to(device),
        torch.from_numpy(data.episode_of).to(device),
    )
    log_probs = log_likelihoods(policy, batch)
    if torch.isneginf(log_probs).any():
        step = int(torch.isneginf(log_probs).nonzero()[0])
        raise UserError(
            f"{data.step_in_words(step)} takes an action that its action mask forbids. Mend the mask or leave it out "
            "(--action-mask none)."
        )
    return laid_out


def split(lengths: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the steps to learn from and of those held out: whole episodes, of one alone its last part.

    At least one episode is held out where `share` is above 0, and at least one is left; a single step is learned from.
    """
    n_episodes, n_steps = len(lengths), int(lengths.sum())
    if share == 0.0 or n_steps == 1:
        return np.arange(n_steps), np.arange(0)
    if n_episodes == 1:
        first = min(max(1, n_steps - round(share * n_steps)), n_steps - 1)
        return np.arange(first), np.arange(first, n_steps)
    count = min(max(1, round(share * n_episodes)), n_episodes - 1)
    chosen = np.random.default_rng([seed, 0x5EED]).permutation(n_episodes)[:count]
    is_out = np.repeat(np.isin(np.arange(n_episodes), chosen), lengths)
    return np.flatnonzero(~is_out), np.flatnonzero(is_out)


def _batch(policy: ActorCritic, data: Demonstrations, device: torch.device) -> Batch:
    n_steps = len(data.actions)
    nothing = torch.zeros((n_steps, 1), device=device)
    return Batch(
        observations=torch.from_numpy(data.observations).unsqueeze(1).to(device),
        actions=torch.from_numpy(sampled_actions(policy, data.actions)).unsqueeze(1).to(device),
        mask=torch.ones((n_steps, 1), dtype=torch.bool, device=device),
        rewards=nothing,
        log_probs=nothing,
        values=None,
        next_values=None,
        terminated=nothing.bool(),
        done=nothing.bool(),
    )


def sampled_actions(policy: ActorCritic, actions: np.ndarray) -> np.ndarray:
    """What the policy would have sampled where the environment got `actions` `[N, *A]`.

    On the bounds of a squashed Gaussian or a Beta: see `BOUND_MARGIN`.
    """
    if policy.config.distribution != "gaussian":
        low, high = _number_bounds(policy.action_space)
        margin = BOUND_MARGIN * np.where(np.isfinite(high - low), high - low, 0.0) / 2
        rows = actions.reshape(len(actions), -1).astype(np.float64)
        actions = rows.clip(low + margin, high - margin).reshape(actions.shape)
    return policy.head.from_environment(actions)


def _number_bounds(space: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest number of each column of an action; infinite where it is a choice."""
    lows, highs = [], []
    for leaf in _leaves_of(space):
        low = high = np.full(leaf.space.shape or (1,), np.inf)
        low, high = (leaf.space.low, leaf.space.high) if isinstance(leaf.space, spaces.Box) else (-low, high)
        lows.append(low.astype(np.float64).ravel())
        highs.append(high.astype(np.float64).ravel())
    return np.concatenate(lows), np.concatenate(highs)


def _leaves_of(space: spaces.Space) -> list[Leaf]:
    return list(leaves(space.source if isinstance(space, PackedActions) else space, "action"))


def _scaled_rewards(config: ControlConfig, policy: ActorCritic, data: Demonstrations, learned: np.ndarray) -> Tensor:
    """Rewards `[N]` as a rollout would scale them; sets the reward scale by the steps that are learned from."""
    rewards, network = torch.from_numpy(data.rewards), config.network
    if network.sign_rewards:
        return rewards.sign()
    if not network.normalize_rewards:
        return rewards
    running, discounted, ends = 0.0, np.empty(len(rewards)), set(data.ends.tolist())
    for step, reward in enumerate(data.rewards.tolist()):
        running = reward + config.algorithm.gamma * running
        discounted[step] = running
        running = 0.0 if step in ends else running
    policy.update_return_moments(torch.from_numpy(discounted[learned]).to(config.device))
    return (rewards / policy.reward_scale).clamp(-network.clip_reward, network.clip_reward)


# --- learning -------------------------------------------------------------------------------------------------------


def clone(
    config: ControlConfig,
    cloning: CloneConfig,
    run: RunDirectory,
    policy: ActorCritic,
    data: CloningData,
    stopping: Callable[[], object] = lambda: False,
) -> Iterator[Metrics]:
    """Fit the actor, then the critic, yielding the metrics of each epoch once they are written.

    Raises:
        UserError: if the loss is not finite, or the disk refuses.
    """
    seeds = np.random.SeedSequence([config.seed, 0xC10]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(seeds[0]))
    began, iteration = time.perf_counter(), 0
    for phase_of in (_actor_phase, _critic_phase) if cloning.fit_critic else (_actor_phase,):
        for row in _epochs(cloning, phase_of(cloning, policy, data), data.learned, generator, stopping):
            iteration += 1
            full = {"iteration": iteration, **row, "seconds": time.perf_counter() - began}
            append_metrics(run.metrics_path, full)
            yield full
        if stopping():
            break
    policy.requires_grad_(True)


@dataclass(frozen=True)
class _Phase:
    """One of actor and critic: its weights, a step on a minibatch, and what is measured of it, higher being better."""

    word: str
    weights: list[Tensor]
    begin_epoch: Callable[[], None]
    step_on: Callable[[Tensor], float]
    of_losses: Callable[[float], Metrics]
    """The metrics of the mean loss of an epoch."""
    measure: Callable[[], Metrics]
    goal_of: Callable[[Metrics], float | None]
    """What of it decides; None where nothing is held out."""


def _epochs(
    cloning: CloneConfig, phase: _Phase, rows: Tensor, generator: torch.Generator, stopping: Callable[[], object]
) -> Iterator[Metrics]:
    """Learn until the measured goal is no longer bettered, and put the best weights back."""
    best, best_epoch = phase.goal_of(phase.measure()), 0
    kept = [weight.detach().clone() for weight in phase.weights]
    for epoch in range(1, cloning.n_epochs + 1):
        phase.begin_epoch()
        minibatches = minibatch_indices(len(rows), cloning.batch_size, generator)
        try:
            losses = [phase.step_on(rows[chosen.to(rows.device)]) for chosen in minibatches]
        except NonFiniteUpdateError as error:
            raise UserError(
                f"Cloning the {phase.word} broke in epoch {epoch}: {error}. Lower learning_rate (now "
                f"{cloning.learning_rate:g}), or look for wild numbers in the data."
            ) from error
        measured = phase.measure()
        score = phase.goal_of(measured)
        is_best = score is None or best is None or score > best  # without a measure the last weights are the ones
        if is_best:
            best, best_epoch = score, epoch
            kept = [weight.detach().clone() for weight in phase.weights]
        yield {
            "phase": phase.word,
            "epoch": epoch,
            **phase.of_losses(float(np.mean(losses))),
            **measured,
            "is_best": is_best,
        }
        if stopping() or epoch - best_epoch >= cloning.patience:
            break
    with torch.no_grad():
        for weight, best_weight in zip(phase.weights, kept, strict=True):
            weight.copy_(best_weight)


def _learning(policy: ActorCritic, weights: list[Tensor], rate: float) -> FlatAdam:
    """An optimizer of these weights alone."""
    own = {id(weight) for weight in weights}
    for weight in policy.parameters():
        weight.requires_grad_(id(weight) in own)
    return FlatAdam(policy, learning_rate=rate)


def _actor_phase(cloning: CloneConfig, policy: ActorCritic, data: CloningData) -> _Phase:
    weights = policy.policy_weights()
    optimizer = _learning(policy, weights, cloning.learning_rate)

    def step_on(rows: Tensor) -> float:
        loss = imitate(policy, optimizer, data.batch[rows], cloning.max_grad_norm)
        _keep_above(policy, cloning.log_std_min)
        return loss

    return _Phase(
        "actor",
        weights,
        begin_epoch=lambda: _set_log_std(policy, data, cloning.log_std_min),
        step_on=step_on,
        of_losses=lambda loss: {"log_prob_learned": -loss - policy.head.log_scale},
        measure=lambda: measure_actor(policy, data, data.held_out),
        goal_of=lambda measured: measured.get("log_prob_held_out"),
    )


@torch.no_grad()
def _set_log_std(policy: ActorCritic, data: CloningData, lowest: float) -> None:
    """Standard deviations that are the same for all states: what is most likely under the present means, at once.

    Steps of Adam alone would take thousands of minibatches for it.
    """
    if policy.log_std is None or isinstance(policy.action_space, PackedActions):
        return
    means = []
    for rows in data.learned.split(ROWS_AT_ONCE):
        distribution = policy.evaluate(data.batch[rows]).distribution
        assert isinstance(distribution, DiagonalGaussian | SquashedGaussian)
        means.append(distribution.mean[:, 0])
    policy.log_std.copy_(most_likely_log_std(data.batch.actions[data.learned, 0], torch.cat(means)))
    _keep_above(policy, lowest)


@torch.no_grad()
def _keep_above(policy: ActorCritic, lowest: float) -> None:
    if policy.log_std is not None:
        policy.log_std.clamp_(min=lowest)


def _critic_phase(cloning: CloneConfig, policy: ActorCritic, data: CloningData) -> _Phase:
    """Least squares on returns-to-go; what comes after an episode that was cut off is looked up anew in each epoch."""
    weights = policy.critic_weights()
    scale = _begin_at_the_mean(policy, data.values)
    optimizer = _learning(policy, weights, cloning.learning_rate)
    targets = value_targets(policy, data)

    def begin_epoch() -> None:
        targets.copy_(value_targets(policy, data))

    def step_on(rows: Tensor) -> float:
        return fit_values(policy, optimizer, data.batch[rows], targets[rows].unsqueeze(1), scale, cloning.max_grad_norm)

    return _Phase(
        "critic",
        weights,
        begin_epoch=begin_epoch,
        step_on=step_on,
        of_losses=lambda loss: {"value_loss": loss},
        measure=lambda: measure_critic(policy, data, data.held_out),
        goal_of=lambda measured: -measured["value_loss_held_out"] if measured else None,
    )


@torch.no_grad()
def _begin_at_the_mean(policy: ActorCritic, values: ReturnsToGo) -> float:
    """Let the critic's outputs be about the mean of what it shall learn, and as wide; return that width.

    The mean m is where a constant critic stays: m = mean(sums) + m mean(weights).
    """
    share = min(float(values.weights.mean()), 0.999)  # without a discount, and only episodes cut off, there is none
    mean = float(values.sums.mean()) / (1.0 - share)
    spread = max(float((values.sums + values.weights * mean).std(correction=0)), 1e-3 * abs(mean), 1e-6)
    last_weight, last_bias = policy.layers(policy.critic)[-1]
    last_weight.mul_(spread)
    last_bias.fill_(mean)
    return spread


# --- measuring ------------------------------------------------------------------------------------------------------


def value_targets(policy: ActorCritic, data: CloningData) -> Tensor:
    """Returns-to-go `[N]` in scaled reward units, with the present critic for what nobody has seen."""
    after = torch.cat([policy.scaled_values(rows) for rows in data.after.split(ROWS_AT_ONCE)])
    return data.values.sums + data.values.weights * after[data.episode_of]


@torch.no_grad()
def log_likelihoods(policy: ActorCritic, batch: Batch) -> Tensor:
    """Log-probability `[N]` of each demonstrated action, in the policy's units."""
    numbers = torch.arange(len(batch.mask), device=batch.mask.device).split(ROWS_AT_ONCE)
    return torch.cat([policy.evaluate(batch[rows]).log_probs[:, 0] for rows in numbers])


def measure_actor(policy: ActorCritic, data: CloningData, steps: Tensor) -> Metrics:
    """How well the policy foretells demonstrated actions at these steps; nothing where there are none.

    Mean log-probability (of continuous actions the log-density in the environment's units), and for choices the share
    of steps where the most likely action is the demonstrated one, for numbers the root mean square difference.
    """
    if not len(steps):
        return {}
    log_prob = float(log_likelihoods(policy, data.batch[steps]).double().mean()) - policy.head.log_scale
    assert isinstance(data.batch.observations, Tensor)
    chosen = np.concatenate(
        [policy.choose(data.batch.observations[rows, 0], deterministic=True) for rows in steps.split(ROWS_AT_ONCE)]
    )
    off = chosen.astype(np.float64) - data.actions[steps.cpu().numpy()]
    off = off.reshape(len(off), -1)
    if not any(isinstance(leaf.space, spaces.Box) for leaf in _leaves_of(policy.action_space)):
        return {"log_prob_held_out": log_prob, "accuracy_held_out": float((off == 0).all(1).mean())}
    return {"log_prob_held_out": log_prob, "error_held_out": float(np.sqrt(np.square(off).mean()))}


def measure_critic(policy: ActorCritic, data: CloningData, steps: Tensor) -> Metrics:
    """How well the critic foretells returns-to-go at these steps; nothing where there are none.

    The mean squared error (scaled reward units), and the share of the variance that is explained, 1 minus the error
    over the variance: a critic that is off by a constant is told. Returns that are all the same have no such share.
    """
    if not len(steps):
        return {}
    assert isinstance(data.batch.observations, Tensor)
    targets = value_targets(policy, data)[steps].double()
    values = torch.cat(
        [policy.scaled_values(data.batch.observations[rows, 0]) for rows in steps.split(ROWS_AT_ONCE)]
    ).double()
    variance, error = float(targets.var(correction=0)), float((targets - values).square().mean())
    told = {"value_loss_held_out": error}
    if variance > 1e-6 * float(targets.square().mean()):
        told["value_r2_held_out"] = 1.0 - error / variance
    return told


# --- the result -----------------------------------------------------------------------------------------------------


def save(config: ControlConfig, cloning: CloneConfig, run: RunDirectory, policy: ActorCritic, facts: Metrics) -> None:
    """Write the policy as the checkpoint of step 0, with how it was cloned.

    Raises:
        DiskError: if the disk refuses.
    """
    described = {
        "settings": recorded(config),
        "policy": describe_policy(policy),
        "clone": {"settings": settings_of(cloning), **facts},
    }
    save_checkpoint(run.checkpoints, 0, {"policy": dict(policy.state_dict())}, described)
