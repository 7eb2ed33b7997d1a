"""Acting in machine code, for runs whose update is: what NumPy dispatches in a dozen operations is one call.

It lives here because collecting knows nothing of the algorithms, whose kernels these are.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from proximo.collect.acting import MakeNetwork
from proximo.models.control import ActorCritic
from proximo.training.config import ControlConfig


def network_for(config: ControlConfig) -> MakeNetwork | None:
    """What acts in a rollout: machine code where the update is, else what fits the policy."""
    return CompiledNetwork if config.update_path == "compiled" else None


class CompiledNetwork:
    """What `collect.acting.NumpyNetwork` is, on a copy of the weights: make a new one after they have changed."""

    def __init__(self, policy: ActorCritic, network: nn.Sequential) -> None:
        """Copy the weights one after the other."""
        layers = [(weight.detach().numpy(), bias.detach().numpy()) for weight, bias in policy.layers(network)]
        pieces = [array.ravel() for layer in layers for array in layer]
        ends = np.cumsum([piece.size for piece in pieces])
        self._weights = np.concatenate(pieces)
        self._places = np.concatenate(([0], ends[:-1])).reshape(-1, 2)
        self._widths = np.array([layers[0][0].shape[1], *(len(bias) for _, bias in layers)])
        self._is_tanh = policy.config.activation == "tanh"
        n_inputs = int(self._widths[0])
        self._shift, self._scale = np.zeros(n_inputs, np.float32), np.ones(n_inputs, np.float32)
        self._limit = np.float32(np.inf)
        if policy.config.normalize_observations:
            self._shift, self._scale = (
                np.ascontiguousarray(tensor.numpy().ravel(), np.float32) for tensor in policy.normalization()
            )
            self._limit = np.float32(policy.config.clip_observation)

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Logits, means or values `[N, K]` at raw `observations` `[N, *O]`."""
        from proximo.algorithms.kernels import outputs_of

        flat = observations.reshape(len(observations), -1)
        if flat.dtype != np.float32:
            flat = flat.astype(np.float32)
        return outputs_of(
            self._weights, self._places, self._widths, flat, self._shift, self._scale, self._limit, self._is_tanh
        )
