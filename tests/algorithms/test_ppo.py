"""PPO whole: against an independent update, its schedules, its coefficient, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, distributions, nn

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.ppo import PPO
from proximo.core.batch import Batch
from proximo.errors import UserError

# --- an independent update ---------------------------------------------------------------------------------


def reference_advantages(batch: Batch, gamma: float, gae_lambda: float) -> Tensor:
    """The sum of discounted TD errors to the end of each episode, step by step."""
    result = torch.zeros_like(batch.rewards)
    for b, t in batch.mask.nonzero().tolist():
        weight = 1.0
        for s in range(t, batch.mask.shape[1]):
            if not batch.mask[b, s]:
                continue
            future = 0.0 if batch.terminated[b, s] else batch.next_values[b, s]
            result[b, t] += weight * (batch.rewards[b, s] + gamma * future - batch.values[b, s])
            if batch.done[b, s]:
                break
            weight *= gamma * gae_lambda
    return result


def reference_distribution(policy, observations: Tensor):
    outputs, values = policy.heads(observations)
    if policy.log_std is None:
        return distributions.Categorical(logits=outputs), values
    return distributions.Independent(distributions.Normal(outputs, policy.log_std.exp().expand_as(outputs)), 1), values


def reference_losses(policy, frozen, steps: dict[str, Tensor], settings: PPO) -> dict[str, Tensor]:
    """The losses and metrics of one minibatch, every step of it valid; `frozen` is the policy that collected."""
    now, values = reference_distribution(policy, steps["observations"])
    log_ratio = now.log_prob(steps["actions"]) - steps["log_probs"]
    ratio, e = log_ratio.exp(), settings.clip_epsilon
    a = steps["advantages"]
    if settings.normalize_advantages:
        a = (a - a.mean()) / (a.std() + 1e-8)
    clip_fraction = ((ratio > 1 + e) | (ratio < 1 - e)).double().mean()
    if settings.objective == "clip":
        policy_loss = -(torch.where(a > 0, ratio.clamp(max=1 + e), ratio.clamp(min=1 - e)) * a).mean()
    else:
        old, _ = reference_distribution(frozen, steps["observations"])
        policy_loss = settings.kl_coef * distributions.kl_divergence(old, now).mean() - (ratio * a).mean()
        clip_fraction = torch.zeros(())
    error = (values - steps["targets"]) ** 2
    if settings.value_clip_epsilon is not None:
        low, high = (steps["values"] + side * settings.value_clip_epsilon for side in (-1, 1))
        error = torch.stack([error, (values.clamp(low, high) - steps["targets"]) ** 2]).amax(0)
    return {
        "policy_loss": policy_loss,
        "value_loss": error.mean(),
        "entropy": now.entropy().mean(),
        "clip_fraction": clip_fraction,
        "approx_kl": (ratio - 1 - log_ratio).mean(),
    }


def reference_update(policy, batch: Batch, settings: PPO, seed: int) -> dict[str, float]:
    """PPO as a page of ordinary PyTorch."""
    steps = {name: getattr(batch, name)[batch.mask] for name in ("observations", "actions", "log_probs", "values")}
    steps["advantages"] = reference_advantages(batch, settings.gamma, settings.gae_lambda)[batch.mask]
    steps["targets"] = steps["advantages"] + steps["values"]
    frozen = copy.deepcopy(policy).requires_grad_(False)
    adam = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate, eps=1e-5)
    generator = torch.Generator().manual_seed(seed)
    n = len(steps["targets"])
    n_minibatches = max(1, round(n / settings.batch_size))
    norms, epoch = [], []
    for _ in range(settings.n_epochs):
        order = torch.randperm(n, generator=generator).tolist()
        epoch = []
        for k in range(n_minibatches):
            size = n // n_minibatches + (k < n % n_minibatches)
            rows, order = order[:size], order[size:]
            losses = reference_losses(policy, frozen, {name: t[rows] for name, t in steps.items()}, settings)
            total = losses["policy_loss"] + settings.value_coef * losses["value_loss"]
            adam.zero_grad()
            (total - settings.entropy_coef * losses["entropy"]).backward()
            norms.append(float(nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)))
            adam.step()
            epoch.append(losses)
    result = {name: sum(float(losses[name].detach()) for losses in epoch) / len(epoch) for name in epoch[0]}
    if settings.objective == "kl_penalty":
        old, new = (reference_distribution(p, steps["observations"])[0] for p in (frozen, policy))
        result["kl_old_new"] = float(distributions.kl_divergence(old, new).mean().detach())
    unexplained = steps["advantages"].var(correction=0) / steps["targets"].var(correction=0)
    counts = {"grad_norm": sum(norms) / len(norms), "n_updates": len(norms)}
    return result | counts | {"explained_variance": 1 - float(unexplained)}


COMMON = dict(learning_rate=0.03, n_epochs=4, batch_size=15, gamma=0.97, gae_lambda=0.9, entropy_coef=0.02)


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"value_clip_epsilon": 0.1},
        {"normalize_advantages": False, "value_coef": 2.0, "max_grad_norm": 1e6},
        {"objective": "kl_penalty", "kl_coef": 0.7},
        {"objective": "kl_penalty", "kl_coef": 5.0, "value_clip_epsilon": 0.1},
    ],
    ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()) or "plain",
)
def test_a_whole_update_is_that_of_ordinary_pytorch(tiny_policy, make_batch, kind, settings):
    algorithm = PPO(**(COMMON | settings))
    ours, theirs = tiny_policy(kind), tiny_policy(kind)
    batch = make_batch(ours)
    metrics = algorithm.update(ours, FlatAdam(ours, learning_rate=0.0), batch, torch.Generator().manual_seed(5))
    expected = reference_update(theirs, batch, algorithm, seed=5)
    torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=0, atol=1e-10)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    # The comparison is about something: the policy went far, and the gradient was clipped or the ratio was.
    assert metrics["approx_kl"] > 0.003
    assert metrics["clip_fraction"] > 0.1 or algorithm.objective == "kl_penalty"


def test_two_updates_in_a_row_go_on_with_the_same_moments(tiny_policy, make_batch):
    algorithm = PPO(**COMMON)
    policy = tiny_policy()
    optimizer = FlatAdam(policy, learning_rate=0.0)
    for seed in range(2):
        algorithm.update(policy, optimizer, make_batch(policy, seed=seed), torch.Generator().manual_seed(seed))
    assert optimizer.n_steps == 2 * 4 * round(make_batch(policy).n_valid / 15)
    assert optimizer.learning_rate == 0.03


# --- by hand -----------------------------------------------------------------------------------------------


def one_step(policy, **fields: float) -> Batch:
    """A single step that `policy` just took at the observation 0."""
    numbers = {"rewards": 0.0, "values": 0.0, "next_values": 0.0} | fields
    row = {name: torch.full((1, 1), value, dtype=torch.float64) for name, value in numbers.items()}
    yes, no = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    observations, actions = torch.zeros(1, 1, 3, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.long)
    blank = Batch(observations, actions, yes, log_probs=row["rewards"], terminated=no, done=no, **row)
    return dataclasses.replace(blank, log_probs=policy.evaluate(blank).log_probs.detach())


def update_once(policy, batch: Batch, **settings) -> dict[str, float]:
    algorithm = PPO(**({"n_epochs": 1} | settings))
    return algorithm.update(policy, FlatAdam(policy, learning_rate=0.0), batch, torch.Generator())


def with_critic_at(policy, value: float):
    with torch.no_grad():
        policy.critic.weight.zero_()
        policy.critic.bias.fill_(value)
    return policy


def test_the_target_of_the_critic_is_advantages_plus_values_of_collection_time(tiny_policy):
    policy = with_critic_at(tiny_policy(), 7.0)
    batch = one_step(policy, rewards=1.0, values=2.0, next_values=3.0)
    # delta = 1 + 0.5 * 3 - 2 = 0.5; the target is 0.5 + 2, not 0.5 + 7, and 7 - 2.5 = 4.5
    metrics = update_once(policy, batch, gamma=0.5)
    assert metrics["value_loss"] == pytest.approx(4.5**2)


def test_value_clipping_is_around_the_values_of_collection_time(tiny_policy):
    # Target 2.5 as above; V_old = 2, so the critic at 2.4 is clipped to 2.1: max(0.1^2, 0.4^2)
    policy = with_critic_at(tiny_policy(), 2.4)
    batch = one_step(policy, rewards=1.0, values=2.0, next_values=3.0)
    metrics = update_once(policy, batch, gamma=0.5, value_clip_epsilon=0.1)
    assert metrics["value_loss"] == pytest.approx(0.4**2)


def test_the_step_moves_every_part_in_its_direction(tiny_policy):
    # A good action becomes likelier, a bad one rarer; the critic goes to its target; entropy is a bonus.
    def after(**settings) -> tuple[float, float, float]:
        policy = with_critic_at(tiny_policy(), 0.0)
        reward = settings.pop("reward")
        batch = one_step(policy, rewards=reward)
        before = policy.evaluate(batch)
        update_once(policy, batch, learning_rate=1e-3, **settings)
        now = policy.evaluate(batch)
        return tuple(float((getattr(now, x) - getattr(before, x)).detach()) for x in ("log_probs", "values", "entropy"))

    log_prob, value, _ = after(reward=1.0)
    assert log_prob > 0
    assert value > 0
    log_prob, value, _ = after(reward=-1.0)
    assert log_prob < 0
    assert value < 0
    _, value, entropy = after(reward=0.0, entropy_coef=1.0)
    assert entropy > 0
    assert value == pytest.approx(0.0, abs=1e-4)  # at its target already


def test_the_old_log_probabilities_are_those_of_the_batch(tiny_policy):
    policy = tiny_policy()
    batch = one_step(policy)
    moved = dataclasses.replace(batch, log_probs=batch.log_probs - math.log(1.5))
    metrics = update_once(policy, moved)
    assert metrics["approx_kl"] == pytest.approx(0.5 - math.log(1.5))  # k3 at ratio 1.5
    assert metrics["clip_fraction"] == 1.0


def test_the_entropy_metric_is_the_exact_one(tiny_policy):
    policy = tiny_policy()
    with torch.no_grad():
        policy.actor.weight.zero_()
        policy.actor.bias.zero_()
    assert update_once(policy, one_step(policy))["entropy"] == pytest.approx(math.log(4))


@pytest.mark.parametrize("change", ["mean", "std"])
def test_the_penalty_sees_every_part_of_the_policy_move(tiny_policy, make_batch, change):
    # A policy may hand out its log_std parameter itself; the old distribution must not move along with it.
    policy = tiny_policy("continuous")
    batch = make_batch(policy)
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    moved = policy.log_std if change == "std" else policy.actor.bias
    moved.requires_grad_(True)
    before = copy.deepcopy(policy)
    metrics = update_once(policy, batch, objective="kl_penalty", learning_rate=0.1, n_epochs=3)
    assert not torch.equal(moved, dict(before.named_parameters())[{"std": "log_std", "mean": "actor.bias"}[change]])
    old, new = (reference_distribution(p, batch.observations[batch.mask])[0] for p in (before, policy))
    exact = float(distributions.kl_divergence(old, new).mean().detach())
    assert exact > 0.01
    assert metrics["kl_old_new"] == pytest.approx(exact, rel=1e-9)


def test_a_heavier_penalty_keeps_the_policy_closer(tiny_policy, make_batch):
    reached = []
    for kl_coef in (0.0, 3.0, 100.0):
        policy = tiny_policy("continuous")
        batch = make_batch(policy)
        metrics = update_once(policy, batch, objective="kl_penalty", kl_coef=kl_coef, learning_rate=0.02, n_epochs=10)
        assert metrics["kl_coef"] == kl_coef
        reached.append(metrics["kl_old_new"])
    assert reached[0] > 2 * reached[1] > 4 * reached[2] > 0


def test_a_two_armed_bandit_is_learned(tiny_policy):
    # One state, four actions; action 2 pays 1, the others nothing. Collect, update, again.
    policy = tiny_policy()
    optimizer = FlatAdam(policy, learning_rate=0.0)
    generator = torch.Generator().manual_seed(0)
    algorithm = PPO(learning_rate=0.03, n_epochs=4, batch_size=64)
    everywhere = torch.ones(64, 1, dtype=torch.bool)
    observations, zeros = torch.zeros(64, 1, 3).double(), torch.zeros(64, 1).double()
    for _ in range(12):
        with torch.no_grad():
            outputs, values = policy.heads(observations)
        acting = distributions.Categorical(logits=outputs)
        actions = torch.multinomial(acting.probs[:, 0], 1, generator=generator)
        rewards = (actions == 2).double()
        log_probs = acting.log_prob(actions)
        batch = Batch(observations, actions, everywhere, rewards, log_probs, values, zeros, everywhere, everywhere)
        algorithm.update(policy, optimizer, batch, generator)
    outputs, values = policy.heads(observations[:1])
    assert outputs.softmax(-1)[0, 0, 2] > 0.9
    assert float(values.detach()) == pytest.approx(1.0, abs=0.2)


# --- schedules and beta ------------------------------------------------------------------------------------


def test_schedules_are_a_function_of_what_remains_alone():
    algorithm = PPO(learning_rate=0.1, clip_epsilon=0.4, learning_rate_schedule="linear", clip_schedule="linear")
    for remaining in (1.0, 0.75, 0.5, 0.125):
        now = algorithm.at(remaining, 1.0)
        assert now.learning_rate == pytest.approx(0.1 * remaining)
        assert now.clip_epsilon == pytest.approx(0.4 * remaining)
    end = algorithm.at(0.0, 1.0)  # a rounding below 0, too, must not make an impossible setting
    assert 0 < end.learning_rate < 1e-8
    assert 0 < end.clip_epsilon < 1e-8
    assert algorithm.at(-1e-12, 1.0).learning_rate > 0


@pytest.mark.parametrize(("rate", "clip"), [("linear", "constant"), ("constant", "linear"), ("constant", "constant")])
def test_each_schedule_is_its_own(rate, clip):
    base = PPO(learning_rate=0.1, clip_epsilon=0.4, learning_rate_schedule=rate, clip_schedule=clip)
    now = base.at(0.5, 2.5)
    assert now.learning_rate == (0.05 if rate == "linear" else 0.1)
    assert now.clip_epsilon == (0.2 if clip == "linear" else 0.4)
    assert now.kl_coef == 2.5
    untouched = {"learning_rate": 0.1, "clip_epsilon": 0.4, "kl_coef": base.kl_coef}
    assert dataclasses.replace(now, **untouched) == base


def test_the_update_uses_the_learning_rate_in_force(tiny_policy):
    policy = tiny_policy()
    optimizer = FlatAdam(policy, learning_rate=123.0)
    algorithm = PPO(learning_rate=0.1, learning_rate_schedule="linear", n_epochs=1)
    algorithm.at(0.25, 1.0).update(policy, optimizer, one_step(policy), torch.Generator())
    assert optimizer.learning_rate == 0.025


@pytest.mark.parametrize(("reached", "coef"), [(0.0151, 1.2), (0.0149, 0.6), (0.0067, 0.6), (0.0066, 0.3)])
def test_beta_is_doubled_or_halved_around_the_target(reached, coef):
    algorithm = PPO(objective="kl_penalty", kl_target=0.01, kl_coef=123.0).at(0.5, 0.6)
    assert algorithm.next_kl_coef({"kl_old_new": reached}) == pytest.approx(coef)


def test_beta_stays_where_it_is_not_used():
    assert PPO(kl_coef=0.7).next_kl_coef({"approx_kl": 100.0}) == 0.7


def test_beta_follows_the_kl_that_the_update_itself_reached(tiny_policy, make_batch):
    policy = tiny_policy("continuous")
    algorithm = PPO(objective="kl_penalty", kl_target=1e-6, learning_rate=0.05)
    optimizer = FlatAdam(policy, learning_rate=0.0)
    metrics = algorithm.update(policy, optimizer, make_batch(policy), torch.Generator().manual_seed(0))
    assert algorithm.next_kl_coef(metrics) == 2.0


# --- impossible settings -----------------------------------------------------------------------------------

IMPOSSIBLE = {
    "clip_epsilon": (-1, 0.0, 1.0, math.nan, math.inf, "0.2", True, None),
    "learning_rate": (0.0, -3e-4, math.nan, math.inf, None),
    "learning_rate_schedule": ("liner", None, ""),
    "clip_schedule": ("cosine",),
    "update_path": ("fast", None),
    "objective": ("clipped", "kl"),
    "n_epochs": (0, -1, 2.5, None),
    "batch_size": (0, -64, 64.5, None),
    "microbatch_size": (0, -1, 1.5),
    "gamma": (-0.1, 1.01, math.nan, None),
    "gae_lambda": (-0.1, 1.01, None),
    "value_coef": (-0.5, math.inf, None),
    "entropy_coef": (-0.01, None),
    "max_grad_norm": (0.0, -0.5, None),
    "value_clip_epsilon": (0.0, -0.2),
    "target_kl": (0.0, -0.01),
    "kl_coef": (-1.0, math.nan, None),
    "kl_target": (0.0, None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in IMPOSSIBLE.items() for value in bad])
def test_an_impossible_setting_is_refused_by_name_with_its_value(name, value):
    with pytest.raises(UserError, match=rf"^{name} is ") as refused:
        PPO(**{name: value})
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gamma": 1.0, "gae_lambda": 1.0},
        {"gamma": 0, "gae_lambda": 0},
        {"n_epochs": 1, "batch_size": 1, "microbatch_size": 1},
        {"value_coef": 0.0, "entropy_coef": 0.0, "kl_coef": 0.0},
        {"value_clip_epsilon": None, "target_kl": None, "microbatch_size": None},
    ],
)
def test_settings_at_their_limits_are_accepted(settings):
    assert vars(PPO(**settings)).items() >= settings.items()


def test_a_near_miss_is_told_the_right_word():
    with pytest.raises(UserError, match="Did you mean 'linear'"):
        PPO(learning_rate_schedule="liner")  # type: ignore[arg-type]


# --- imports -----------------------------------------------------------------------------------------------


def test_core_and_algorithms_load_nothing_heavier_than_torch():
    code = """
import pkgutil, importlib, sys, torch
before = set(sys.modules)
import proximo.core, proximo.algorithms
for package in (proximo.core, proximo.algorithms):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if module.name != "proximo.algorithms.kernels":  # loaded where a run is compiled
            importlib.import_module(module.name)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    loaded = set(ran.stdout.split())
    assert "proximo" in loaded
    heavy = {"gymnasium", "matplotlib", "rich", "tyro", "safetensors", "scipy", "pandas", "PIL", "imageio", "numba"}
    assert not loaded & (heavy | {"mujoco", "pygame", "transformers", "tomli_w", "beartype"})
