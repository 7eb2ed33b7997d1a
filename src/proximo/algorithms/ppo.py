"""Proximal policy optimization (Schulman et al. 2017): PPO-Clip and PPO-Penalty."""

from __future__ import annotations

import copy
import typing
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from proximo.algorithms.adam import FlatAdam, Optimizer
from proximo.algorithms.compiled import run_compiled_epochs
from proximo.algorithms.fused import ClipSettings, can_fuse, run_fused_epochs
from proximo.algorithms.graphed import GraphedSettings, run_graphed_epochs
from proximo.algorithms.rnd import IntrinsicConfig
from proximo.algorithms.update import Epochs, Loss, Minibatch, estimated, run_epochs
from proximo.core.batch import Batch
from proximo.core.distributions import Distribution
from proximo.core.kl import AdaptiveKL, ReferenceKL
from proximo.core.losses import (
    SurrogateLoss,
    clipped_surrogate,
    clipped_value,
    kl_penalized_surrogate,
    reference_kl_loss,
    value_loss,
)
from proximo.core.masked import explained_variance, masked_mean
from proximo.core.policy import Evaluation, Policy
from proximo.errors import UserError, in_range, one_of

Schedule = Literal["constant", "linear"]
UpdatePath = Literal["auto", "eager", "fused", "compiled", "graphed"]


@dataclass(frozen=True)
class PPO:
    """Settings of PPO, and the update that follows them."""

    objective: Literal["clip", "kl_penalty"] = "clip"
    """Policy loss: `clip` is PPO-Clip (eq. 7 of the paper), `kl_penalty` is PPO-Penalty (eq. 8)."""
    learning_rate: float = 3e-4
    """Step size of Adam."""
    learning_rate_schedule: Literal["constant", "linear", "kl_adaptive"] = "constant"
    """`linear` brings the learning rate down to 0 at the end of the run; `kl_adaptive` divides it by 1.5 after an
    update whose approx_kl is above twice kl_target, and multiplies it by 1.5 after one below half of that, between 1e-6
    and 1e-2."""
    clip_epsilon: float = 0.2
    """The probability ratio may leave [1 - clip_epsilon, 1 + clip_epsilon] without reward for it."""
    clip_schedule: Schedule = "constant"
    """`linear` brings clip_epsilon down to 0 at the end of the run."""
    clip_epsilon_high: float | None = None
    """The upper end of the band is 1 plus this (clip-higher, DAPO); by default clip_epsilon."""
    dual_clip: float | None = None
    """Where the advantage is negative, the objective is at least this times it (Ye et al. 2020); none by default."""
    n_epochs: int = 10
    """Passes over each rollout."""
    batch_size: int = 64
    """Steps per minibatch (responses, for language models); minibatches differ in size by at most one."""
    gamma: float = 0.99
    """Discount per step."""
    gae_lambda: float = 0.95
    """Bias against variance of the advantages: 0 is the one-step TD error, 1 is Monte Carlo minus value."""
    value_gae_lambda: float | None = None
    """Another lambda for the critic's targets (VC-PPO, Yuan et al. 2025, has 1); by default gae_lambda."""
    gae_lambda_per_step: float | None = None
    """Language: lambda of a response of n tokens is 1 - 1 / (this * n) (VAPO, Yue et al. 2025, has 0.05); none by
    default."""
    normalize_advantages: bool = True
    """Shift and scale the advantages of each minibatch to mean 0 and standard deviation 1."""
    value_coef: float = 0.5
    """Weight of the value loss (the mean squared error, without a factor 1/2)."""
    value_clip_epsilon: float | None = None
    """Clip the critic's change to this many (scaled) reward units per update; none by default."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """The gradient of all weights together is scaled down to this norm."""
    target_kl: float | None = None
    """End the update of a rollout once a minibatch's approx_kl exceeds 1.5 times this; never by default."""
    kl_coef: float = 1.0
    """PPO-Penalty: the coefficient beta to begin with."""
    kl_target: float = 0.01
    """PPO-Penalty: beta is doubled above 1.5 times this KL (nats), halved below this over 1.5. What the `kl_adaptive`
    learning rate aims at, too."""
    update_path: UpdatePath = "auto"
    """`eager` lets torch derive the gradient, the reference; `fused` has it written out in NumPy, for plain perceptrons
    and PPO-Clip on the CPU; `compiled` is that in machine code, which takes some seconds to make the first time (with
    memory, its loops over time are);
    `graphed` replays a CUDA graph, for PPO-Clip; `auto` chooses before the run starts: graphed on CUDA, compiled for
    long runs where numba is installed, fused where that is possible."""
    microbatch_size: int | None = None
    """Cut minibatches into pieces of this size to save memory; the gradient stays the same."""
    microbatch_tokens: int | None = None
    """Language: cut minibatches into pieces of at most this many tokens, padding counted."""

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            UserError: naming the setting, its value, what is possible, and a usual value.
        """
        in_range("clip_epsilon", self.clip_epsilon, above=0.0, below=1.0, usual="0.2")
        in_range("learning_rate", self.learning_rate, above=0.0, usual="0.0003")
        in_range("n_epochs", self.n_epochs, at_least=1, whole=True, usual="10")
        in_range("batch_size", self.batch_size, at_least=1, whole=True, usual="64")
        in_range("gamma", self.gamma, at_least=0.0, at_most=1.0, usual="0.99")
        in_range("gae_lambda", self.gae_lambda, at_least=0.0, at_most=1.0, usual="0.95")
        in_range("value_coef", self.value_coef, at_least=0.0, usual="0.5")
        in_range("entropy_coef", self.entropy_coef, at_least=0.0, usual="0.0 to 0.01")
        in_range("max_grad_norm", self.max_grad_norm, above=0.0, usual="0.5")
        in_range("value_clip_epsilon", self.value_clip_epsilon, optional=True, above=0.0, usual="0.2, or none at all")
        in_range("target_kl", self.target_kl, optional=True, above=0.0, usual="0.01 to 0.05, or none at all")
        in_range("kl_coef", self.kl_coef, at_least=0.0, usual="1.0")
        in_range("kl_target", self.kl_target, above=0.0, usual="0.01")
        in_range("clip_epsilon_high", self.clip_epsilon_high, optional=True, above=0.0, usual="0.28, or none at all")
        in_range("dual_clip", self.dual_clip, optional=True, above=1.0, usual="3.0, or none at all")
        in_range("value_gae_lambda", self.value_gae_lambda, optional=True, at_least=0.0, at_most=1.0, usual="1.0")
        in_range("gae_lambda_per_step", self.gae_lambda_per_step, optional=True, above=0.0, usual="0.05")
        in_range("microbatch_tokens", self.microbatch_tokens, optional=True, at_least=1, whole=True, usual="8192")
        in_range("microbatch_size", self.microbatch_size, optional=True, at_least=1, whole=True, usual="none at all")
        one_of("learning_rate_schedule", self.learning_rate_schedule, ("constant", "linear", "kl_adaptive"))
        one_of("clip_schedule", self.clip_schedule, ("constant", "linear"))
        one_of("update_path", self.update_path, typing.get_args(UpdatePath))
        if self.update_path in ("fused", "compiled") and not self.can_fuse:
            raise UserError(
                f"update_path is '{self.update_path}', which knows neither objective 'kl_penalty' nor "
                "clip_epsilon_high, dual_clip or microbatches; use 'auto' or 'eager'."
            )
        if self.update_path == "graphed" and not self.can_graph:
            raise UserError(
                "update_path is 'graphed', which knows neither objective 'kl_penalty' nor microbatches; use 'auto' or "
                "'eager'."
            )
        one_of("objective", self.objective, ("clip", "kl_penalty"))

    @property
    def can_fuse(self) -> bool:
        """Whether the written-out gradient knows these settings."""
        plain = (self.clip_epsilon_high, self.dual_clip, self.microbatch_size, self.microbatch_tokens)
        return self.objective == "clip" and plain == (None, None, None, None)

    @property
    def can_graph(self) -> bool:
        """Whether a captured update knows these settings."""
        return self.objective == "clip" and (self.microbatch_size, self.microbatch_tokens) == (None, None)

    def at(self, remaining: float, kl_coef: float, rate_factor: float = 1.0) -> PPO:
        """Return the settings in force when `remaining` (1 at the start, 0 at the end) of the run is left.

        Schedules are a function of the run's own step count alone, so a resumed run goes on where they were;
        `rate_factor` is what `next_rate_factor` has come to.
        """
        remaining = max(remaining, 1e-8)
        if self.learning_rate_schedule == "linear":
            rate_factor = remaining
        clip_factor = remaining if self.clip_schedule == "linear" else 1.0
        now = copy.copy(self)  # `replace` would check every setting again, at each iteration
        high = None if self.clip_epsilon_high is None else self.clip_epsilon_high * clip_factor
        object.__setattr__(now, "learning_rate", self.learning_rate * rate_factor)
        object.__setattr__(now, "clip_epsilon", self.clip_epsilon * clip_factor)
        object.__setattr__(now, "clip_epsilon_high", high)
        object.__setattr__(now, "kl_coef", kl_coef)
        return now

    def next_kl_coef(self, metrics: dict[str, float]) -> float:
        """Return beta for the next iteration (PPO-Penalty), from the KL that the last update reached."""
        if self.objective == "clip":
            return self.kl_coef
        return AdaptiveKL(self.kl_coef, self.kl_target).updated(metrics["kl_old_new"]).coef

    def next_rate_factor(self, rate_factor: float, metrics: dict[str, float]) -> float:
        """What to multiply the learning rate by in the next iteration, from the KL of the last one (`kl_adaptive`).

        As the robotics libraries have it (Rudin et al. 2022, RSL-RL; there per minibatch).
        """
        if self.learning_rate_schedule != "kl_adaptive":
            return 1.0
        lowest, highest = 1e-6 / self.learning_rate, 1e-2 / self.learning_rate
        if metrics["approx_kl"] > 2.0 * self.kl_target:
            return max(rate_factor / 1.5, min(lowest, 1.0))
        if metrics["approx_kl"] < 0.5 * self.kl_target:
            return min(rate_factor * 1.5, max(highest, 1.0))
        return rate_factor

    def update(
        self,
        policy: Policy,
        optimizer: Optimizer,
        batch: Batch,
        generator: torch.Generator,
        *,
        reference_kl: ReferenceKL | None = None,
        learn_policy: bool = True,
        intrinsic: IntrinsicConfig | None = None,
    ) -> dict[str, float]:
        """Improve `policy` in place on one rollout; return metrics by their names.

        Advantages are GAE(gamma, gae_lambda); the critic's target is `advantages + values` of collection
        time (TD(lambda)). `generator` draws the order of the minibatches and nothing else.

        Args:
            policy: scores actions and states; its `has_memory` keeps rows whole.
            optimizer: over the policy's weights.
            batch: experience with values; with `ref_log_probs` for `reference_kl`.
            generator: draws the order of rows.
            reference_kl: a penalty in the loss for the distance to the reference.
            learn_policy: False fits the critic alone, to the rewards that followed (VC-PPO, Yuan et al. 2025)
                where value_gae_lambda says nothing else; its weights must not be shared with the actor.
            intrinsic: learn from the intrinsic rewards of the batch too, by a policy with a critic of them; this
                takes the eager path.

        Raises:
            NonFiniteUpdateError: if the loss or gradient is not finite; the weights stay finite.
            UserError: if a setting does not fit this policy.
        """
        optimizer.learning_rate = self.learning_rate
        if not learn_policy:
            value_lambda = 1.0 if self.value_gae_lambda is None else self.value_gae_lambda
            alone = replace(self, entropy_coef=0.0, value_gae_lambda=value_lambda)
            everything, quality = alone._estimated(policy, batch)
            everything = replace(everything, advantages=torch.zeros_like(everything.advantages))
            return alone._learn(policy, optimizer, everything, generator, None, quality)
        everything, quality = self._estimated(policy, batch, intrinsic)
        return self._learn(policy, optimizer, everything, generator, reference_kl, quality)

    def _learn(
        self,
        policy: Policy,
        optimizer: Optimizer,
        everything: Minibatch,
        generator: torch.Generator,
        reference_kl: ReferenceKL | None,
        quality: dict[str, float],
    ) -> dict[str, float]:
        """Go through the epochs by the path that fits."""
        is_eager = everything.intrinsic_returns is not None
        if not is_eager and self._is_graphed(policy, optimizer, everything, reference_kl):
            assert isinstance(optimizer, FlatAdam)
            metrics = run_graphed_epochs(policy, optimizer, everything, self._graphed_settings, generator)
            return metrics | quality
        may_fuse = self.can_fuse and reference_kl is None and not is_eager
        if self.update_path in ("auto", "fused", "compiled") and may_fuse:
            plain = policy.plain(everything.batch)
            if plain is not None and can_fuse(plain, optimizer):
                assert isinstance(optimizer, FlatAdam)
                arguments = (plain, optimizer, everything, self._clip_settings, generator)
                run = run_compiled_epochs if self.update_path == "compiled" else run_fused_epochs
                return run(*arguments) | quality
            if self.update_path != "auto" and everything.batch.hidden is None:
                raise UserError(
                    f"update_path is '{self.update_path}', but this policy is no plain perceptron on the CPU; use "
                    "'auto' or 'eager'."
                )
        if self.objective == "kl_penalty":
            everything = replace(everything, old_distribution=_old_distribution(policy, everything.batch))
        metrics = run_epochs(
            policy,
            optimizer,
            everything,
            partial(self._loss, reference_kl),
            Epochs(**{name: getattr(self, name) for name in Epochs._fields if hasattr(self, name)}),
            generator,
        )
        metrics |= quality
        if everything.intrinsic_returns is not None:
            foreseen, mask = everything.batch.intrinsic_values, everything.batch.mask
            assert foreseen is not None
            found = explained_variance(foreseen, everything.intrinsic_returns, mask)
            metrics["intrinsic_explained_variance"] = float(found)
        if everything.old_distribution is not None:
            metrics["kl_coef"] = self.kl_coef
            metrics["kl_old_new"] = _mean_kl(policy, everything, everything.old_distribution)
        return metrics

    def _is_graphed(
        self, policy: Policy, optimizer: Optimizer, everything: Minibatch, reference_kl: ReferenceKL | None
    ) -> bool:
        """Whether this update is captured: where that is asked for, and on CUDA where it can be."""
        on_cuda = everything.advantages.device.type == "cuda"
        if self.update_path != "graphed" and not (self.update_path == "auto" and on_cuda and self.can_graph):
            return False
        is_tensor = isinstance(everything.batch.observations, Tensor)
        possible = isinstance(optimizer, FlatAdam) and not policy.has_memory and reference_kl is None and is_tensor
        # Asked for it is tried with any module; by itself only with what is known to be fit for it.
        is_fit = self.update_path == "graphed" or getattr(policy, "can_be_captured", False)
        possible = possible and isinstance(policy, nn.Module)
        possible = possible and is_fit
        if not possible and self.update_path == "graphed":
            raise UserError(
                "update_path is 'graphed', which is for control: policies without memory, one tensor of observations, "
                "and no KL to a reference in the loss. Use 'auto' or 'eager'."
            )
        return possible

    def _estimated(
        self, policy: Policy, batch: Batch, intrinsic: IntrinsicConfig | None = None
    ) -> tuple[Minibatch, dict[str, float]]:
        """Advantages, the critic's targets, and metrics of the values of collection time."""
        gae_lambda: float | Tensor = self.gae_lambda
        if self.gae_lambda_per_step is not None:
            if not policy.has_memory:
                raise UserError("gae_lambda_per_step is for language models; leave it out, and set gae_lambda.")
            steps = batch.mask.sum(1).clamp(min=1).to(batch.rewards.dtype)
            gae_lambda = (1.0 - 1.0 / (self.gae_lambda_per_step * steps)).clamp(min=0.0)
        return estimated(
            policy,
            batch,
            gamma=self.gamma,
            gae_lambda=gae_lambda,
            value_gae_lambda=self.value_gae_lambda,
            intrinsic=intrinsic,
        )

    @property
    def _graphed_settings(self) -> GraphedSettings:
        return GraphedSettings(**{name: getattr(self, name) for name in GraphedSettings._fields})

    @property
    def _clip_settings(self) -> ClipSettings:
        return ClipSettings(**{name: getattr(self, name) for name in ClipSettings._fields})

    def _loss(self, reference_kl: ReferenceKL | None, policy: Policy, minibatch: Minibatch) -> Loss:
        """Policy loss + value_coef * value loss - entropy_coef * entropy (Schulman et al. 2017, eq. 9)."""
        batch, denominator = minibatch.batch, minibatch.denominator
        new = policy.evaluate(batch)
        if new.values is None:
            raise ValueError("PPO needs a policy with a critic")
        surrogate = self._surrogate(new, minibatch)
        critic_loss = self._value_loss(new.values, minibatch)
        entropy = masked_mean(new.entropy, batch.mask, denominator=denominator)
        total = surrogate.loss + self.value_coef * critic_loss
        if self.entropy_coef:
            total = total - self.entropy_coef * entropy
        metrics = {
            "policy_loss": surrogate.loss,
            "value_loss": critic_loss,
            "entropy": entropy,
            "clip_fraction": surrogate.clip_fraction,
        }
        if minibatch.intrinsic_returns is not None:
            intrinsic_loss = _intrinsic_value_loss(new, minibatch)
            total = total + self.value_coef * intrinsic_loss
            metrics["intrinsic_value_loss"] = intrinsic_loss
        if reference_kl is not None:
            kl_loss = kl_term(new.log_probs, batch, reference_kl, denominator)
            total = total + reference_kl.coef * kl_loss
            metrics["kl_loss"] = kl_loss
        return Loss(total, surrogate.approx_kl, metrics)

    def _surrogate(self, new: Evaluation, minibatch: Minibatch) -> SurrogateLoss:
        batch, old = minibatch.batch, minibatch.old_distribution
        if old is None:
            return clipped_surrogate(
                new.log_probs,
                batch.log_probs,
                minibatch.advantages,
                batch.mask,
                clip_epsilon=self.clip_epsilon,
                clip_epsilon_high=self.clip_epsilon_high,
                dual_clip=self.dual_clip,
                denominator=minibatch.denominator,
            )
        return kl_penalized_surrogate(
            new.log_probs,
            batch.log_probs,
            minibatch.advantages,
            old.kl(new.distribution),
            batch.mask,
            kl_coef=self.kl_coef,
            denominator=minibatch.denominator,
        )

    def _value_loss(self, values: Tensor, minibatch: Minibatch) -> Tensor:
        batch, returns, denominator = minibatch.batch, minibatch.returns, minibatch.denominator
        assert returns is not None
        assert batch.values is not None
        if self.value_clip_epsilon is None:
            return value_loss(values, returns, batch.mask, denominator=denominator)
        return clipped_value(
            values,
            batch.values,
            returns,
            batch.mask,
            clip_epsilon=self.value_clip_epsilon,
            denominator=denominator,
        )


def _intrinsic_value_loss(new: Evaluation, minibatch: Minibatch) -> Tensor:
    if new.intrinsic_values is None:
        raise ValueError("intrinsic rewards need a policy with a critic of them")
    assert minibatch.intrinsic_returns is not None
    mask, denominator = minibatch.batch.mask, minibatch.denominator
    return value_loss(new.intrinsic_values, minibatch.intrinsic_returns, mask, denominator=denominator)


def kl_term(log_probs: Tensor, batch: Batch, reference_kl: ReferenceKL, denominator: Tensor | None) -> Tensor:
    """The mean KL to the reference per step, with gradient."""
    if batch.ref_log_probs is None:
        raise ValueError("a KL to the reference in the loss needs ref_log_probs in the batch")
    return reference_kl_loss(
        log_probs, batch.ref_log_probs, batch.mask, estimator=reference_kl.estimator, denominator=denominator
    )


def _old_distribution(policy: Policy, batch: Batch) -> Distribution:
    with torch.no_grad():
        distribution = policy.evaluate(batch).distribution
    if distribution is None:
        raise UserError("objective 'kl_penalty' is not for language models; use 'clip', with beta for the reference.")
    return distribution.frozen()


def _mean_kl(policy: Policy, everything: Minibatch, old: Distribution) -> float:
    """Exact mean KL(old || new) over all steps, nats, after the update."""
    with torch.no_grad():
        new = policy.evaluate(everything.batch).distribution
        assert new is not None
        return float(masked_mean(old.kl(new), everything.batch.mask))
