"""Actor-critics over Gymnasium spaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from proximo.core.batch import Batch
from proximo.core.distributions import Categorical, DiagonalGaussian
from proximo.core.normalize import RunningMoments
from proximo.core.policy import Evaluation, PlainActorCritic
from proximo.errors import UserError, in_range, one_of, shown
from proximo.models.encoders import Encoder, NatureCNN, chosen_encoder

Array = TypeVar("Array", np.ndarray, Tensor)


@dataclass(frozen=True)
class NetworkConfig:
    """The networks, and the normalization that belongs to them."""

    encoder: Encoder = "auto"
    """`mlp`: actor and critic are perceptrons of their own; `nature_cnn`: they share the convolutions and 512 features
    of the Nature DQN, and are linear on them; `auto`: the latter for uint8 images of at least 36x36."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the Nature CNN computes in; bfloat16 pays on CPUs with AMX or AVX512-BF16, and on GPUs."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers; actor and critic are separate networks of this shape."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Nonlinearity between the layers."""
    orthogonal_init: bool = True
    """Orthogonal weights with gain sqrt(2), 0.01 for the actor's last layer and 1 for the critic's."""
    log_std_init: float = 0.0
    """Logarithm of the standard deviation of continuous actions to begin with."""
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
        one_of("encoder", self.encoder, ("auto", "mlp", "nature_cnn"))
        one_of("precision", self.precision, ("float32", "bfloat16"))
        if self.sign_rewards and self.normalize_rewards:
            raise UserError(
                "sign_rewards and normalize_rewards are both on; a sign has no scale. Turn one of them off."
            )
        in_range("log_std_init", self.log_std_init, at_least=-20.0, at_most=5.0, usual="0.0")
        in_range("clip_observation", self.clip_observation, above=0.0, usual="10")
        in_range("clip_reward", self.clip_reward, above=0.0, usual="10")


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

    has_memory = False
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
    ) -> None:
        """Build the networks; `generator` draws the initial weights.

        Raises:
            UserError: if a space is of a kind that is not supported.
        """
        super().__init__()
        self.observation_space = _supported_observations(observation_space)
        self.action_space = _supported_actions(action_space)
        self.config = config
        n_inputs = int(np.prod(self.observation_space.shape))
        self.encoder = None
        if chosen_encoder(config.encoder, self.observation_space) == "nature_cnn":
            self.encoder = _nature_cnn(self.observation_space, config, generator)
        elif config.precision != "float32":
            raise UserError(
                f"precision is {config.precision!r}, which is for the Nature CNN alone; the perceptrons for "
                f"{self.observation_space} compute in float32. Leave it out."
            )
        if isinstance(self.action_space, spaces.Discrete):
            n_outputs = Categorical.parameter_size(int(self.action_space.n))
            self.log_std = None
        else:
            n_outputs = DiagonalGaussian.parameter_size(int(np.prod(self.action_space.shape)))
            self.log_std = nn.Parameter(torch.full((n_outputs,), config.log_std_init))
        seen = n_inputs if self.encoder is None else self.encoder.n_features
        hidden = config.hidden_sizes if self.encoder is None else ()
        self.actor = _mlp(seen, hidden, config, n_outputs, head_gain=0.01, generator=generator)
        self.critic = _mlp(seen, hidden, config, 1, head_gain=1.0, generator=generator)
        for name, moments in (
            ("observation", RunningMoments.empty((n_inputs if self.encoder is None else 0,))),
            ("return", RunningMoments.empty()),
        ):
            self.register_buffer(f"{name}_mean", moments.mean)
            self.register_buffer(f"{name}_variance", moments.variance)
            self.register_buffer(f"{name}_count", moments.count)
        self._action_offset, self._action_scale = _action_map(self.action_space, rescale=config.rescale_actions)

    # --- for learning -------------------------------------------------------------------------------------

    def act(self, observations: Tensor, generator: torch.Generator) -> Acted:
        """Sample actions at raw `observations` `[N, *O]`; no gradient."""
        with torch.no_grad():
            inputs = self._features(observations)
            distribution = self._distribution(inputs)
            actions = distribution.sample(generator)
            return Acted(actions, distribution.log_prob(actions), self.critic(inputs).squeeze(-1))

    def evaluate(self, batch: Batch) -> Evaluation:
        """Score `batch.actions` under the present weights, with gradient."""
        assert isinstance(batch.observations, Tensor)
        inputs = self._features(batch.observations, batch.mask.shape)
        distribution = self._distribution(inputs)
        values = self.critic(inputs).squeeze(-1)
        return Evaluation(distribution.log_prob(batch.actions), distribution.entropy(), values, distribution)

    def row_lengths(self, batch: Batch) -> list[int]:
        """Every step costs the same."""
        return [batch.mask.shape[1]] * len(batch.mask)

    def plain(self, batch: Batch) -> PlainActorCritic | None:
        """Lay open the networks for the steps of a batch `[M, 1]`, as the fused update wants them; None with a CNN."""
        if self.encoder is not None:
            return None
        assert isinstance(batch.observations, Tensor)
        with torch.no_grad():
            inputs = self._normalized(batch.observations.reshape(batch.mask.numel(), -1)).contiguous()
        actor, critic = self.layers(self.actor), self.layers(self.critic)
        return PlainActorCritic(inputs, actor, critic, self.log_std, self.config.activation)

    @property
    def is_plain(self) -> bool:
        """Whether actor and critic are perceptrons that share nothing."""
        return self.encoder is None

    def layers(self, network: nn.Sequential) -> list[tuple[Tensor, Tensor]]:
        """Weight `[out, in]` and bias `[out]` of each layer of the actor or the critic."""
        return [(layer.weight, layer.bias) for layer in network if isinstance(layer, nn.Linear)]

    def normalization(self) -> tuple[Tensor, Tensor]:
        """What to subtract from flat observations and to multiply them by, `[F]` each, in single precision."""
        scale = (self.observation_variance + 1e-8).rsqrt()
        return self.observation_mean.to(torch.float32), scale.to(torch.float32)

    @property
    def action_map(self) -> tuple[np.ndarray, np.ndarray]:
        """Offset and scale, shaped as the action space, from the policy's units to the environment's."""
        return self._action_offset, self._action_scale

    def scaled_values(self, observations: Tensor) -> Tensor:
        """The critic at raw `observations` `[N, *O]`, in scaled reward units; no gradient."""
        with torch.no_grad():
            return self.critic(self._features(observations)).squeeze(-1)

    def to_environment(self, actions: Tensor) -> np.ndarray:
        """Turn sampled actions `[N, *A]` into a fresh array of actions that the environment accepts."""
        array = actions.detach().cpu().numpy()
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            return array + int(space.start)
        scaled = array.reshape(-1, *space.shape) * self._action_scale + self._action_offset
        return scaled.clip(space.low, space.high).astype(space.dtype)

    def environment_actions(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return `to_environment` as a function of tensors on `device`, from which nothing goes to the host."""
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            start = int(space.start)
            return lambda actions: actions + start if start else actions
        offset, scale, low, high = (
            torch.as_tensor(array, dtype=torch.float64, device=device)
            for array in (self._action_offset, self._action_scale, space.low, space.high)
        )
        dtype = torch.from_numpy(np.empty(0, space.dtype)).dtype
        return lambda actions: (actions.detach().reshape(-1, *space.shape) * scale + offset).clamp(low, high).to(dtype)

    def update_observation_moments(self, observations: Tensor) -> None:
        """Merge raw observations `[N, *O]` into the normalizer. Only ever between two rollouts."""
        moments = RunningMoments(self.observation_mean, self.observation_variance, self.observation_count)
        moments = moments.updated(observations.reshape(len(observations), -1))
        # In place: a captured CUDA graph reads them where they are.
        self.observation_mean.copy_(moments.mean)
        self.observation_variance.copy_(moments.variance)
        self.observation_count.copy_(moments.count)

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

    def __call__(self, observation: Array, *, deterministic: bool = True, seed: int | None = None) -> Array:
        """Choose an action for one observation or a batch of them.

        Args:
            observation: shaped as the observation space, or with one leading dimension; NumPy or torch.
            deterministic: take the most likely action; False samples.
            seed: makes a sampled action repeatable.

        Returns:
            Actions of the environment's own kind, inside its action space, NumPy for NumPy and torch for torch.

        Raises:
            ValueError: if it is no array of finite numbers, or its shape does not fit the observation space.
        """
        inputs, single = self._inputs(observation)
        generator = None if seed is None else torch.Generator(inputs.device).manual_seed(seed)
        with torch.no_grad():
            distribution = self._distribution(inputs)
            actions = distribution.mode() if deterministic else distribution.sample(generator)
        result = self.to_environment(actions)
        result = result[0] if single else result
        return torch.as_tensor(result) if isinstance(observation, Tensor) else result  # type: ignore[return-value]

    def value(self, observation: Array) -> Array:
        """Expected discounted return from one observation or a batch, in the environment's own reward units.

        Raises:
            ValueError: if it is no array of finite numbers, or its shape does not fit the observation space.
        """
        inputs, single = self._inputs(observation)
        with torch.no_grad():
            values = self.critic(inputs).squeeze(-1) * self.reward_scale
        return _like(observation, values[0] if single else values)

    def log_prob(self, observation: Array, action: Array) -> Array:
        """Log-probability of `action` (as the environment takes it) at one observation or a batch.

        Continuous actions: the log-density of the policy's Gaussian, in the environment's action units, at
        `action`; an action that was clipped to the space is scored where it stands.

        Raises:
            ValueError: if one is no array of finite numbers, does not fit its space in shape, or is a discrete
                action that there is not.
        """
        inputs, single = self._inputs(observation)
        actions = self._actions(action, len(inputs))
        with torch.no_grad():
            if isinstance(self.action_space, spaces.Discrete):
                log_probs = self._distribution(inputs).log_prob(actions - int(self.action_space.start))
            else:
                scale, offset = (
                    torch.as_tensor(array, dtype=torch.float32, device=inputs.device).flatten()
                    for array in (self._action_scale, self._action_offset)
                )
                own_units = (actions.reshape(len(actions), scale.numel()).to(torch.float32) - offset) / scale
                log_probs = self._distribution(inputs).log_prob(own_units) - scale.log().sum()
        return _like(observation, log_probs[0] if single else log_probs)

    # --- inside -------------------------------------------------------------------------------------------

    def _features(self, observations: Tensor, leading: tuple[int, ...] | None = None) -> Tensor:
        """What actor and critic see at raw observations `[*leading, *O]`: `[*leading, features]`; `[N, *O]` by default.

        The normalized observation itself, or what the encoder makes of it.
        """
        leading = (len(observations),) if leading is None else leading
        if self.encoder is None:
            return self._normalized(observations.reshape(*leading, math.prod(self.observation_space.shape)))
        device = observations.device.type
        images = observations.reshape(-1, *self.observation_space.shape)
        with torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            features = self.encoder(images)
        return features.to(torch.float32).reshape(*leading, -1)

    def _normalized(self, flat: Tensor) -> Tensor:
        flat = flat.to(torch.float32)
        if not self.config.normalize_observations:
            return flat
        mean, scale = self.normalization()
        limit = self.config.clip_observation
        return ((flat - mean) * scale).clamp(-limit, limit)

    def _distribution(self, inputs: Tensor) -> Categorical | DiagonalGaussian:
        parameters = self.actor(inputs)
        return Categorical(parameters) if self.log_std is None else DiagonalGaussian(parameters, self.log_std)

    def _inputs(self, observation: np.ndarray | Tensor) -> tuple[Tensor, bool]:
        """What actor and critic see at one observation or a batch, `[N, features]`; True if it was one."""
        tensor = _numbers("observation", observation, next(self.parameters()).device)
        shape = self.observation_space.shape
        single = tuple(tensor.shape) == shape
        if not single and (tensor.ndim == 0 or tuple(tensor.shape[1:]) != shape):
            many = f"(N{''.join(f', {size}' for size in shape)}{'' if shape else ','})"
            raise ValueError(f"observation has shape {tuple(tensor.shape)}; expected {shape} or {many}")
        with torch.no_grad():
            return self._features(tensor.reshape(1 if single else len(tensor), *shape)), single

    def _actions(self, action: np.ndarray | Tensor, n: int) -> Tensor:
        """`n` actions of the environment's kind, `[n, *A]`."""
        tensor, space = _numbers("action", action, next(self.parameters()).device), self.action_space
        shape = (n, *(space.shape or ()))
        if tensor.numel() != math.prod(shape):
            raise ValueError(f"action has shape {tuple(tensor.shape)}; {n} observations need {shape}")
        if isinstance(space, spaces.Discrete):
            first, last = int(space.start), int(space.start + space.n) - 1
            impossible = tensor[(tensor < first) | (tensor > last) | (tensor != tensor.to(torch.int64))]
            if len(impossible.flatten()):
                value = impossible.flatten()[0].item()
                raise ValueError(f"action is {value}; it must be a whole number from {first} to {last}")
            tensor = tensor.to(torch.int64)
        return tensor.reshape(shape)


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


def _nature_cnn(space: spaces.Box, config: NetworkConfig, generator: torch.Generator | None) -> NatureCNN:
    """The encoder of images, which has no use for a normalizer.

    Raises:
        UserError: if the images are not such as it can see, or their normalization was asked for.
    """
    if config.normalize_observations:
        raise UserError(
            f"normalize_observations is on, but the observations {space} are images, which the Nature CNN scales from "
            "0..255 to 0..1 by itself. Set normalize_observations to false."
        )
    return NatureCNN(space, orthogonal=config.orthogonal_init, generator=generator)


def _mlp(
    n_inputs: int,
    hidden_sizes: tuple[int, ...],
    config: NetworkConfig,
    n_outputs: int,
    *,
    head_gain: float,
    generator: torch.Generator | None,
) -> nn.Sequential:
    """Linear layers with the activation between them, initialized as the config says."""
    sizes = [n_inputs, *hidden_sizes, n_outputs]
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(sizes)):
        with torch.random.fork_rng(devices=[]):  # the weights are drawn below, from the run's own generator
            linear = nn.Linear(before, after)
        is_head = index == len(sizes) - 2
        if config.orthogonal_init:
            nn.init.orthogonal_(linear.weight, head_gain if is_head else math.sqrt(2), generator=generator)
            nn.init.zeros_(linear.bias)
        else:
            bound = 1.0 / math.sqrt(before)
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
        layers.append(linear)
        if not is_head:
            layers.append(nn.Tanh() if config.activation == "tanh" else nn.ReLU())
    return nn.Sequential(*layers)


def _action_map(space: spaces.Discrete | spaces.Box, *, rescale: bool) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale, each shaped as the space, from the policy's units to the environment's."""
    if isinstance(space, spaces.Discrete):
        return np.zeros(()), np.ones(())
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    bounded = (np.abs(low) < 1e8) & (np.abs(high) < 1e8) & rescale  # some write the largest float for infinity
    low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
    return (high + low) / 2.0, np.maximum((high - low) / 2.0, 1e-8)


def _supported_observations(space: spaces.Space) -> spaces.Box:
    if isinstance(space, spaces.Box):
        return _not_empty("observation", space)
    raise UserError(
        f"The observation space is {space}; Proximo learns from Box observations. "
        "Wrap the environment in gymnasium.wrappers.FlattenObservation, which turns it into a Box."
    )


def _not_empty(word: str, space: spaces.Box) -> spaces.Box:
    if math.prod(space.shape) > 0:
        return space
    raise UserError(
        f"The {word} space is {space} of shape {space.shape}: it holds no numbers. Let {word}_space have at least "
        "one, as in gymnasium.spaces.Box(-1, 1, (1,))."
    )


def _supported_actions(space: spaces.Space) -> spaces.Discrete | spaces.Box:
    if isinstance(space, spaces.Discrete):
        return space
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return _not_empty("action", space)
    raise UserError(
        f"The action space is {space}; Proximo acts in Discrete spaces and in Box spaces of floats. "
        "Wrap the environment in gymnasium.wrappers.TransformAction to offer one of these."
    )


def _like(example: Array, result: Tensor) -> Array:
    """NumPy where `example` is NumPy, torch where it is torch."""
    return result if isinstance(example, Tensor) else result.cpu().numpy()  # type: ignore[return-value]
