"""Actor-critics over Gymnasium spaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from proximo.core.batch import Batch
from proximo.core.distributions import Distribution
from proximo.core.normalize import RunningMoments
from proximo.core.policy import Evaluation, PlainActorCritic
from proximo.errors import UserError, in_range, one_of, shown
from proximo.models.actions import CONTINUOUS, ActionHead, Continuous, Seen, distribution_name
from proximo.models.encoders import Encoder
from proximo.models.memory import Memory
from proximo.models.networks import image_encoder_of, perceptron
from proximo.models.packing import PackedActions, PackedObservations


@dataclass(frozen=True)
class NetworkConfig:
    """The networks, and the normalization that belongs to them."""

    encoder: Encoder = "auto"
    """`mlp`: actor and critic are perceptrons of their own; `nature_cnn`: they share the convolutions and 512 features
    of the Nature DQN; `impala`: the residual blocks and 256 features of IMPALA; `auto`: `nature_cnn` for uint8 images
    of at least 36x36. On images alone actor and critic are linear on the features; with numbers beside them they have
    hidden layers."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What images are worked through in; bfloat16 pays on CPUs with AMX or AVX512-BF16, and on GPUs."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers; actor and critic are separate networks of this shape."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Nonlinearity between the layers."""
    orthogonal_init: bool = True
    """Orthogonal weights with gain sqrt(2), 0.01 for the actor's last layer and 1 for the critic's."""
    memory: Literal["none", "lstm", "gru"] = "none"
    """Recurrent layers between what is seen and the hidden layers, for tasks whose observations do not tell all."""
    memory_size: int = 64
    """Width of the recurrent layers."""
    memory_layers: int = 1
    """How many recurrent layers on top of each other."""
    shared_memory: bool = False
    """Actor and critic stand on the same recurrent layers, which takes about half the time."""
    distribution: Continuous = "gaussian"
    """Of continuous actions: `gaussian`, clipped to the bounds; `squashed_gaussian`, its tanh; `beta`, between them;
    `gsde`, a Gaussian whose noise is a function of the state that is kept for some steps. In Python its class of
    proximo.core.distributions will do."""
    sde_sample_freq: int = -1
    """gsde: steps after which each environment has another function; -1: with each rollout."""
    state_dependent_std: bool = False
    """The standard deviation is an output of the actor, too, instead of one weight for all states."""
    log_std_init: float = 0.0
    """Logarithm of the standard deviation of continuous actions to begin with (gsde: at features of mean square 1)."""
    rescale_actions: bool = True
    """Continuous actions: -1 and 1 of the policy are the lowest and highest action of a bounded space."""
    normalize_observations: bool = False
    """Shift and scale observations by the running mean and variance of everything seen."""
    clip_observation: float = 10.0
    """Normalized observations are clipped to plus or minus this."""
    normalize_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    clip_reward: float = 10.0
    """Scaled rewards are clipped to plus or minus this."""
    sign_rewards: bool = False
    """Learn from -1, 0 or 1 for each reward; returns are told, and episodes evaluated, in the rewards themselves."""

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            UserError: naming the setting, its value and what is possible.
        """
        if not all(type(size) is int and 1 <= size <= 10**9 for size in self.hidden_sizes):
            said = shown(self.hidden_sizes)
            raise UserError(f"hidden_sizes is {said}; each must be an integer >= 1 and <= 1e9, such as 64 64.")
        one_of("activation", self.activation, ("tanh", "relu"))
        one_of("memory", self.memory, ("none", "lstm", "gru"))
        in_range("memory_size", self.memory_size, at_least=1, at_most=10**5, whole=True, usual="64")
        in_range("memory_layers", self.memory_layers, at_least=1, at_most=100, whole=True, usual="1")
        unused = {"memory_size": (self.memory_size, 64), "memory_layers": (self.memory_layers, 1)}
        unused |= {"shared_memory": (self.shared_memory, False)}
        for name, (value, default) in unused.items():
            if self.memory == "none" and value != default:
                raise UserError(f"{name} is {value}, but memory is 'none'. Set memory to gru or lstm, or leave it out.")
        one_of("encoder", self.encoder, ("auto", "mlp", "nature_cnn", "impala"))
        object.__setattr__(self, "distribution", distribution_name(self.distribution))
        one_of("distribution", self.distribution, CONTINUOUS)
        if self.state_dependent_std and self.distribution in ("beta", "gsde"):
            raise UserError(
                f"state_dependent_std is on and distribution is {self.distribution!r}, whose spread hangs on the state "
                "as it is. Leave one of them out."
            )
        in_range("sde_sample_freq", self.sde_sample_freq, at_least=-1, whole=True, usual="4, or -1: once per rollout")
        if self.sde_sample_freq == 0:
            raise UserError("sde_sample_freq is 0; it must be -1 (once per rollout) or a whole number of steps >= 1.")
        one_of("precision", self.precision, ("float32", "bfloat16"))
        if self.sign_rewards and self.normalize_rewards:
            raise UserError(
                "sign_rewards and normalize_rewards are both on; a sign has no scale. Turn one of them off."
            )
        in_range("log_std_init", self.log_std_init, at_least=-20.0, at_most=5.0, usual="0.0")
        in_range("clip_observation", self.clip_observation, above=0.0, usual="10")
        in_range("clip_reward", self.clip_reward, above=0.0, usual="10")


_AT_ONCE = 1024
"""Observations that the critic of the intrinsic reward sees at a time."""


class Acted(NamedTuple):
    """What the policy did at N observations: actions `[N, *A]` as sampled, log-probs and values `[N]`."""

    actions: Tensor
    log_probs: Tensor
    values: Tensor


class ActorCritic(nn.Module):
    """A policy and a value function, with the normalizers that belong to them.

    Learning works in the policy's own units: actions as sampled (before rescaling and clipping to the
    space), rewards as scaled. `__call__`, `value` and `log_prob` work in the environment's units.
    """

    can_be_captured = True
    """A CUDA graph may hold its evaluation: it reads no value on the host."""

    observation_mean: Tensor
    observation_variance: Tensor
    observation_count: Tensor
    return_mean: Tensor
    return_variance: Tensor
    return_count: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        config: NetworkConfig,
        generator: torch.Generator | None = None,
        *,
        has_intrinsic_critic: bool = False,
    ) -> None:
        """Build the networks; `generator` draws the initial weights.

        `has_intrinsic_critic`: a second critic, for the value of an intrinsic reward (algorithms/rnd.py).

        Raises:
            UserError: if a space is of a kind that is not supported.
        """
        super().__init__()
        self.observation_space = _supported_observations(observation_space)
        self.action_space = _supported_actions(action_space)
        self.config = config
        self.head = ActionHead(
            self.action_space,
            kind=config.distribution,
            has_own_std=config.state_dependent_std,
            log_std_init=config.log_std_init,
            rescale=config.rescale_actions,
        )
        packed = self.observation_space if isinstance(self.observation_space, PackedObservations) else None
        n_inputs = int(np.prod(self.observation_space.shape)) if packed is None else packed.n_numbers
        self.encoder = image_encoder_of(self.observation_space, config, generator)
        seen, hidden = n_inputs, config.hidden_sizes
        if self.encoder is not None:
            n_inputs = 0 if packed is None else n_inputs
            seen, hidden = self.encoder.n_features + n_inputs, hidden if n_inputs else ()
        self.memory = None
        if config.memory != "none":
            self.memory = Memory(seen, config, generator)
            seen = config.memory_size
        self.actor = perceptron(seen, hidden, config, self.head.n_outputs, head_gain=0.01, generator=generator)
        self.critic = perceptron(seen, hidden, config, 1, head_gain=1.0, generator=generator)
        self.intrinsic_critic = None
        if has_intrinsic_critic:
            self.intrinsic_critic = perceptron(seen, hidden, config, 1, head_gain=1.0, generator=generator)
        self.log_std = None
        if sum(self.head.log_stds):
            self.log_std = nn.Parameter(self._first_log_std())
        for name, moments in (
            ("observation", RunningMoments.empty((n_inputs,))),
            ("return", RunningMoments.empty()),
        ):
            self.register_buffer(f"{name}_mean", moments.mean)
            self.register_buffer(f"{name}_variance", moments.variance)
            self.register_buffer(f"{name}_count", moments.count)

    # --- for learning -------------------------------------------------------------------------------------

    @property
    def has_memory(self) -> bool:
        """Whether what it does depends on what it saw before."""
        return self.memory is not None

    def blank_memory(self, n: int) -> Tensor:
        """What `n` episodes begin with `[n, S]`: zeros; S is 0 without memory."""
        size = 0 if self.memory is None else self.memory.state_size
        return torch.zeros(n, size, device=next(self.parameters()).device)

    def act(
        self,
        observations: Tensor,
        generator: torch.Generator,
        memory: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Acted:
        """Sample actions at raw `observations` `[N, *O]`, gsde with the matrices `noise` `[N, *noise_shape]`.

        No gradient. `memory` `[N, S]` goes on in place.
        """
        with torch.no_grad():
            for_actor, for_critic = self._seen(observations, memory)
            distribution = self._distribution(for_actor, self._mask(observations), noise)
            actions = distribution.sample(generator)
            return Acted(actions, distribution.log_prob(actions), self.critic(for_critic).squeeze(-1))

    def choose(
        self,
        observations: Tensor,
        *,
        deterministic: bool,
        generator: torch.Generator | None = None,
        memory: Tensor | None = None,
    ) -> np.ndarray:
        """Actions for the environments at raw `observations` `[N, *O]`: the most likely ones, or sampled.

        `memory` `[N, S]` goes on in place; without it, these are the first observations of their episodes. gsde draws
        one matrix, for all of them.
        """
        noise = None
        if self.noise_shape is not None and not deterministic:
            noise = torch.empty(1, *self.noise_shape, device=observations.device).normal_(generator=generator)
            noise = noise.expand(len(observations), -1, -1)
        with torch.no_grad():
            distribution = self._distribution(self._seen(observations, memory)[0], self._mask(observations), noise)
            return self.to_environment(distribution.mode() if deterministic else distribution.sample(generator))

    def evaluate(self, batch: Batch) -> Evaluation:
        """Score `batch.actions` under the present weights, with gradient; with memory, along whole rows."""
        assert isinstance(batch.observations, Tensor)
        for_actor = for_critic = self._features(batch.observations, batch.mask.shape)
        if self.memory is not None:
            assert batch.hidden is not None
            for_actor, for_critic = self.memory.run(for_actor, batch.hidden[:, 0], batch.continues)
        distribution = self._distribution(for_actor, self._mask(batch.observations))
        values = self.critic(for_critic).squeeze(-1)
        intrinsic = None if self.intrinsic_critic is None else self.intrinsic_critic(for_critic).squeeze(-1)
        log_probs, entropy = distribution.log_prob(batch.actions), distribution.entropy()
        return Evaluation(log_probs, entropy, values, distribution, intrinsic)

    def row_lengths(self, batch: Batch) -> list[int]:
        """Every step costs the same."""
        return [batch.mask.shape[1]] * len(batch.mask)

    def plain(self, batch: Batch) -> PlainActorCritic | None:
        """Lay open the networks for the steps of a batch `[M, 1]`, as the fused update wants them; or None."""
        if not self.is_plain:
            return None
        assert isinstance(batch.observations, Tensor)
        with torch.no_grad():
            inputs = self._normalized(batch.observations.reshape(batch.mask.numel(), -1)).contiguous()
        actor, critic = self.layers(self.actor), self.layers(self.critic)
        return PlainActorCritic(inputs, actor, critic, self.log_std, self.config.activation)

    @property
    def is_plain(self) -> bool:
        """Whether actor and critic are perceptrons apart, for one choice or one Gaussian, without masks or memory."""
        return self.encoder is None and self.memory is None and self.head.is_plain and not self.has_masks

    @property
    def noise_shape(self) -> tuple[int, int] | None:
        """`[F, columns]` of gsde's matrix; None for every other distribution."""
        if not self.head.has_noise:
            return None
        assert self.log_std is not None
        n_features, n_columns = self.log_std.shape
        return n_features, n_columns

    @property
    def has_masks(self) -> bool:
        """Whether observations come with what is possible."""
        return isinstance(self.observation_space, PackedObservations) and bool(self.observation_space.options)

    def blank(self, n: int) -> np.ndarray:
        """`n` raw observations of nothing `[n, *O]`, as they come from an environment, with every action possible."""
        space = self.observation_space
        return space.blank(n) if isinstance(space, PackedObservations) else np.zeros((n, *space.shape), space.dtype)

    def policy_weights(self) -> list[Tensor]:
        """Weights that change what is done, those of a shared encoder among them."""
        critic = {id(weight) for weight in self.critic_weights()}
        return [weight for weight in self.parameters() if id(weight) not in critic]

    def critic_weights(self) -> list[Tensor]:
        """Weights that change the values and nothing else."""
        own = [self.critic, self.intrinsic_critic, None if self.memory is None else self.memory.critic]
        return [weight for network in own if network is not None for weight in network.parameters()]

    def layers(self, network: nn.Sequential) -> list[tuple[Tensor, Tensor]]:
        """Weight `[out, in]` and bias `[out]` of each layer of the actor or the critic."""
        return [(layer.weight, layer.bias) for layer in network if isinstance(layer, nn.Linear)]

    def normalization(self) -> tuple[Tensor, Tensor]:
        """What to subtract from flat observations and to multiply them by, `[F]` each, in single precision."""
        scale = (self.observation_variance + 1e-8).rsqrt()
        return self.observation_mean.to(torch.float32), scale.to(torch.float32)

    @property
    def action_map(self) -> tuple[np.ndarray, np.ndarray]:
        """Offset and scale, shaped as a Box of actions, from the policy's units to the environment's."""
        return self.head.action_map

    def scaled_values(self, observations: Tensor, memory: Tensor | None = None) -> Tensor:
        """The critic at raw `observations` `[N, *O]`, in scaled reward units; no gradient.

        `memory` `[N, S]` is what was remembered before; it stays as it is.
        """
        with torch.no_grad():
            before = None if memory is None else memory.clone()
            return self.critic(self._seen(observations, before)[1]).squeeze(-1)

    def intrinsic_values(self, observations: Tensor) -> Tensor:
        """The critic of the intrinsic reward at raw `observations` `[N, *O]`, in its scaled units; no gradient."""
        assert self.intrinsic_critic is not None
        with torch.no_grad():
            some = [self.intrinsic_critic(self._features(piece)) for piece in observations.split(_AT_ONCE)]
            return torch.cat(some).squeeze(-1)

    def to_environment(self, actions: Tensor) -> np.ndarray:
        """Turn sampled actions `[N, *A]` into a fresh array of actions that the environment accepts."""
        return self.head.to_environment(actions)

    def environment_actions(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return `to_environment` as a function of tensors on `device`, from which nothing goes to the host."""
        return self.head.on_device(device)

    def update_observation_moments(self, observations: Tensor) -> None:
        """Merge raw observations `[N, *O]` into the normalizer. Only ever between two rollouts."""
        moments = RunningMoments(self.observation_mean, self.observation_variance, self.observation_count)
        moments = moments.updated(self._numbers(observations, (len(observations),)))
        # In place: a captured CUDA graph reads them where they are.
        self.observation_mean.copy_(moments.mean)
        self.observation_variance.copy_(moments.variance)
        self.observation_count.copy_(moments.count)

    def observation_extent(self, observations: Tensor) -> Tensor | None:
        """The largest size of each number of raw observations `[N, *O]`, `[F]`; None where they are images alone."""
        space = self.observation_space
        if self.encoder is not None and not (isinstance(space, PackedObservations) and space.n_numbers):
            return None
        lowest, highest = self._numbers(observations, (len(observations),)).aminmax(dim=0)
        return torch.maximum(lowest.to(torch.float32).abs(), highest.to(torch.float32).abs())

    def update_return_moments(self, discounted_returns: Tensor) -> None:
        """Merge running discounted returns `[N]` into the reward scale. Only ever between two rollouts."""
        moments = RunningMoments(self.return_mean, self.return_variance, self.return_count)
        moments = moments.updated(discounted_returns)
        self.return_mean.copy_(moments.mean)
        self.return_variance.copy_(moments.variance)
        self.return_count.copy_(moments.count)

    @property
    def reward_scale(self) -> float:
        """Environment reward units per scaled unit; 1 where rewards are not normalized."""
        if not self.config.normalize_rewards or float(self.return_count) == 0:
            return 1.0
        return math.sqrt(float(self.return_variance) + 1e-8)

    # --- for people ---------------------------------------------------------------------------------------

    def __call__(
        self,
        observation: Any,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        action_mask: Any = None,
        memory: Any = None,
    ) -> Any:
        """Choose an action for one observation or a batch of them.

        Args:
            observation: of the observation space, or a batch: each array in it with one leading dimension.
            deterministic: take the most likely action; False samples.
            seed: makes a sampled action repeatable; with gsde, the same one throughout an episode makes the noise one
                function of the state.
            action_mask: where the environment tells in its `info` what is possible: that, for each observation.
            memory: of a policy that remembers: what it remembers of the episode so far, for each observation;
                `fresh_memory` at its start.

        Returns:
            Actions of the environment's own kind, inside its action space, NumPy for NumPy and torch for torch. With
            `memory`: the actions, and what to hand over at the next observation.

        Raises:
            ValueError: if it is no array of finite numbers, its shape does not fit the observation space, no action
                is possible, or `memory` does not fit the policy.
        """
        rows, single = self._rows(observation, action_mask)
        before = self._memory(memory, len(rows), single=single)
        generator = None if seed is None else torch.Generator(rows.device).manual_seed(seed)
        result = self.choose(rows, deterministic=deterministic, generator=generator, memory=before)
        result = result[0] if single else result
        if isinstance(self.action_space, PackedActions):
            result = self.action_space.unpack(result)
        action = _as_given(observation, result)
        return action if before is None else (action, _like(observation, before[0] if single else before))

    def fresh_memory(self, n: int | None = None) -> np.ndarray:
        """What a policy that remembers has at the start of an episode, `[S]`; `[n, S]` for `n` episodes.

        Raises:
            ValueError: if `n` is no whole number >= 0.
        """
        if n is not None and not (isinstance(n, (int, np.integer)) and n >= 0):
            raise ValueError(f"n is {n!r}; it must be a whole number of episodes, or None for one without a leading 1")
        fresh = self.blank_memory(1 if n is None else int(n)).cpu().numpy()
        return fresh[0] if n is None else fresh

    def value(self, observation: Any, *, memory: Any = None) -> Any:
        """Expected discounted return from one observation or a batch, in the environment's own reward units.

        `memory` is that of `__call__`, before the observation.

        Raises:
            ValueError: if one is no array of finite numbers, or does not fit in shape.
        """
        rows, single = self._rows(observation, None, needs_mask=False)
        values = self.scaled_values(rows, self._memory(memory, len(rows), single=single)) * self.reward_scale
        return _like(observation, values[0] if single else values)

    def log_prob(self, observation: Any, action: Any, *, action_mask: Any = None, memory: Any = None) -> Any:
        """Log-probability of `action` (as the environment takes it) at one observation or a batch.

        Continuous actions: the log-density in the environment's action units, at `action`; one that was clipped to the
        space is scored where it stands. `memory` is that of `__call__`, before the observation.

        Raises:
            ValueError: if one is no array of finite numbers, does not fit its space in shape, or is a discrete
                action that there is not.
        """
        rows, single = self._rows(observation, action_mask)
        taken = self._actions(action, len(rows), single=single)
        sampled = torch.from_numpy(self.head.from_environment(taken)).to(rows.device)
        with torch.no_grad():
            for_actor, _ = self._seen(rows, self._memory(memory, len(rows), single=single))
            distribution = self._distribution(for_actor, self._mask(rows))
            log_probs = distribution.log_prob(sampled) - self.head.log_scale
        return _like(observation, log_probs[0] if single else log_probs)

    # --- inside -------------------------------------------------------------------------------------------

    def _features(self, observations: Tensor, leading: tuple[int, ...] | None = None) -> Tensor:
        """What actor and critic see at raw observations `[*leading, *O]`: `[*leading, features]`; `[N, *O]` by default.

        The normalized observation itself, or what the encoder makes of it.
        """
        leading = (len(observations),) if leading is None else leading
        space = self.observation_space
        if self.encoder is None:
            return self.features(None, self._numbers(observations, leading), leading)
        rows: Any = observations.reshape(-1, *space.shape)
        if not isinstance(space, PackedObservations):
            return self.features(rows, None, leading)
        numbers = self._numbers(observations, leading) if space.n_numbers else None
        return self.features(space.pixels(rows), numbers, leading)

    def features(self, images: Any, numbers: Tensor | None, leading: tuple[int, ...]) -> Tensor:
        """What actor and critic see, `[*leading, features]`: of raw `numbers` `[*leading, F]` and images.

        Args:
            images: as the encoder takes them, `[prod(leading), *O]`, a list of them where there are several kinds;
                None where there is no encoder.
            numbers: None where there are images alone.
            leading: the leading dimensions.
        """
        if images is None:
            assert numbers is not None
            return self._normalized(numbers)
        assert self.encoder is not None
        device = self.observation_mean.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            features = self.encoder(images)
        features = features.to(torch.float32).reshape(*leading, -1)
        return features if numbers is None else torch.cat([features, self._normalized(numbers)], -1)

    def _seen(self, observations: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """What actor and critic stand on at raw observations `[N, *O]`; `memory` `[N, S]` goes on in place."""
        features = self._features(observations)
        if self.memory is None:
            return features, features
        return self.memory.step(features, self.blank_memory(len(features)) if memory is None else memory)

    def _numbers(self, observations: Tensor, leading: tuple[int, ...]) -> Tensor:
        """Observations `[*leading, F]` as a vector, without images and masks."""
        flat = observations.reshape(*leading, math.prod(self.observation_space.shape))
        return self.observation_space.numbers(flat) if isinstance(self.observation_space, PackedObservations) else flat

    def _mask(self, observations: Tensor) -> Tensor | None:
        """What is possible at raw observations `[..., *O]`: `[..., options]`; None where everything is."""
        space = self.observation_space
        return space.mask(observations) if isinstance(space, PackedObservations) else None

    def _normalized(self, flat: Tensor) -> Tensor:
        flat = flat.to(torch.float32)
        if not self.config.normalize_observations:
            return flat
        mean, scale = self.normalization()
        limit = self.config.clip_observation
        return ((flat - mean) * scale).clamp(-limit, limit)

    def _distribution(self, inputs: Tensor, mask: Tensor | None = None, noise: Tensor | None = None) -> Distribution:
        if not self.head.has_noise:
            return self.head.distribution(self.actor(inputs), self.log_std, mask)
        features = self.actor[:-1](inputs)
        seen = Seen(features.detach(), noise)
        return self.head.distribution(self.actor[-1](features), self.log_std, mask, seen)

    def _first_log_std(self) -> Tensor:
        """`[n]`; for gsde `[F, n]`, lower by log(F) / 2, so that F features of size 1 make log_std_init of them."""
        n = sum(self.head.log_stds)
        if not self.head.has_noise:
            return torch.full((n,), self.config.log_std_init)
        n_features = self.layers(self.actor)[-1][0].shape[1]
        return torch.full((n_features, n), self.config.log_std_init - 0.5 * math.log(n_features))

    def _rows(self, observation: Any, action_mask: Any, *, needs_mask: bool = True) -> tuple[Tensor, bool]:
        """Raw observations `[N, *O]` of what a person has given, one or many; True if it was one."""
        device, space = next(self.parameters()).device, self.observation_space
        if isinstance(space, PackedObservations):
            leading = space.leading_of(observation)
            rows = space.pack_many(observation, action_mask, leading, ignores_mask=not needs_mask)
            numbers = space.numbers(rows)
            if not np.isfinite(numbers).all():
                place = int(np.argwhere(~np.isfinite(numbers))[0][-1])
                value = numbers[~np.isfinite(numbers)][0]
                raise ValueError(f"{space.element(place)} is {value}; every number must be finite")
            return torch.from_numpy(rows.reshape(-1, *space.shape)).to(device), not leading
        if action_mask is not None:
            raise ValueError("action_mask is given to a policy that was trained without masks")
        tensor, shape = _numbers("observation", observation, device), space.shape
        single = tuple(tensor.shape) == shape
        if not single and (tensor.ndim == 0 or tuple(tensor.shape[1:]) != shape):
            many = f"(N{''.join(f', {size}' for size in shape)}{'' if shape else ','})"
            raise ValueError(f"observation has shape {tuple(tensor.shape)}; expected {shape} or {many}")
        return tensor.reshape(1 if single else len(tensor), *shape), single

    def _memory(self, memory: Any, n: int, *, single: bool) -> Tensor | None:
        """A copy `[n, S]` of what a person has given; None for a policy without memory."""
        blank = self.blank_memory(n)
        if self.memory is None:
            if memory is not None:
                raise ValueError("memory is given to a policy that has none")
            return None
        if memory is None:
            raise ValueError(
                "this policy remembers, and needs what it remembered: at the start of an episode memory = "
                "policy.fresh_memory(), then action, memory = policy(observation, memory=memory)"
            )
        tensor = _numbers("memory", memory, blank.device).to(blank.dtype)
        if tuple(tensor.shape) != tuple(blank.shape[1:] if single else blank.shape):
            wanted = tuple(blank.shape[1:] if single else blank.shape)
            raise ValueError(f"memory has shape {tuple(tensor.shape)}; expected {wanted}")
        return blank.copy_(tensor.reshape(blank.shape))

    def _actions(self, action: Any, n: int, *, single: bool) -> np.ndarray:
        """`n` actions of the environment's kind as rows `[n, *A]`."""
        space = self.action_space
        if isinstance(space, PackedActions):
            return space.pack_many(action, () if single else (n,)).reshape(n, -1)
        tensor = _numbers("action", action, torch.device("cpu"))
        shape = (n, *(space.shape or ()))
        if tensor.numel() != math.prod(shape):
            raise ValueError(f"action has shape {tuple(tensor.shape)}; {n} observations need {shape}")
        return tensor.reshape(shape).numpy()


class RowActor:
    """A policy in one environment that hands over raw rows `[*O]`; remembers what there is to remember."""

    def __init__(self, policy: ActorCritic) -> None:
        """Before the first episode."""
        self._policy = policy
        self._memory = policy.blank_memory(1)

    def __call__(self, observation: np.ndarray, *, deterministic: bool, seed: int | None, is_first: bool) -> np.ndarray:
        """Choose for the next observation of an episode, or the first one of the next."""
        if is_first:
            self._memory.zero_()
        policy, device = self._policy, self._memory.device
        dtype = np.float32 if policy.observation_space.dtype == np.float64 else policy.observation_space.dtype
        rows = torch.from_numpy(np.array(observation, dtype)[None]).to(device)
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        return policy.choose(rows, deterministic=deterministic, generator=generator, memory=self._memory)[0]


def _numbers(name: str, value: object, device: torch.device) -> Tensor:
    """What a person has given, as a tensor of finite numbers.

    Raises:
        ValueError: if it is none.
    """
    try:
        tensor = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is a {type(value).__name__}, not an array of numbers: {error}") from error
    finite = tensor.isfinite()
    if not finite.all():
        place = (~finite).nonzero()[0].tolist()
        where = f"{name}[{', '.join(map(str, place))}]" if place else name
        raise ValueError(f"{where} is {tensor[tuple(place)].item()}; every number must be finite")
    return tensor


def _supported_observations(space: spaces.Space) -> spaces.Box:
    if isinstance(space, spaces.Box):
        return space if isinstance(space, PackedObservations) else _not_empty("observation", space)
    raise UserError(
        f"The observation space is {space}, which this kind of vector environment hands over as it is; it can be "
        "learned from with --vectorization serial or workers."
    )


def _not_empty(word: str, space: spaces.Box) -> spaces.Box:
    if math.prod(space.shape) > 0:
        return space
    raise UserError(
        f"The {word} space is {space} of shape {space.shape}: it holds no numbers. Let {word}_space have at least "
        "one, as in gymnasium.spaces.Box(-1, 1, (1,))."
    )


def _supported_actions(space: spaces.Space) -> spaces.Space:
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        raise UserError(
            f"The action space is {space}, which this kind of vector environment takes as it is; it can be learned "
            "with --vectorization serial or workers."
        )
    if isinstance(space, spaces.Box) and not isinstance(space, PackedActions):
        return _not_empty("action", space)
    return space


def _as_given(example: Any, result: Any) -> Any:
    """Actions, part by part as torch where the observation is."""
    if not _is_torch(example):
        return result
    if isinstance(result, dict):
        return {key: _as_given(example, part) for key, part in result.items()}
    if isinstance(result, tuple):
        return tuple(_as_given(example, part) for part in result)
    return torch.as_tensor(result)


def _is_torch(example: Any) -> bool:
    """Whether an observation is torch's, or the first array within it."""
    while isinstance(example, (dict, tuple)):
        example = next(iter(example.values() if isinstance(example, dict) else example))
    return isinstance(example, Tensor)


def _like(example: Any, result: Tensor) -> Any:
    """NumPy where `example` is NumPy, torch where it is torch."""
    return result if _is_torch(example) else result.cpu().numpy()
