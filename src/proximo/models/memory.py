"""What a policy remembers: recurrent layers between what it sees and its actor and critic."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from proximo.models.recurrence import gru, lstm, plain_gru, plain_lstm

if TYPE_CHECKING:
    from proximo.models.control import NetworkConfig


class Memory(nn.Module):
    """Recurrent layers for the actor and for the critic, or one stack for both.

    A state is one vector per environment: for each stack and each of its layers h, and for an LSTM c. Zeros are the
    state at the start of an episode. Where `compiled` is True the loops over time are in machine code.
    """

    def __init__(self, n_inputs: int, config: NetworkConfig, generator: torch.Generator | None) -> None:
        """Draw the weights."""
        super().__init__()
        self.compiled = False
        kind, size, layers = config.memory, config.memory_size, config.memory_layers
        assert kind != "none"
        self.actor = _Stack(n_inputs, kind, size, layers, config.orthogonal_init, generator)
        self.critic = None
        if not config.shared_memory:
            self.critic = _Stack(n_inputs, kind, size, layers, config.orthogonal_init, generator)

    @property
    def state_size(self) -> int:
        """Numbers of a state."""
        return sum(stack.state_size for stack in self._stacks)

    def step(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What actor and critic stand on after seeing `inputs` `[N, F]`; `state` `[N, S]` goes on in place."""
        outputs = []
        for stack, own in zip(self._stacks, self._parts(state), strict=True):
            outputs.append(stack.step(inputs, own, compiled=self.compiled))
        return outputs[0], outputs[-1]

    def run(self, inputs: Tensor, state: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """The same along rows `[B, T, F]` from `state` `[B, S]`, with gradient; `keep` `[B, T]` is 0 at starts."""
        rows, kept = inputs.transpose(0, 1), keep.T.to(inputs.dtype)
        outputs = [
            stack.run(rows, own, kept, compiled=self.compiled).transpose(0, 1)
            for stack, own in zip(self._stacks, self._parts(state), strict=True)
        ]
        return outputs[0], outputs[-1]

    @property
    def _stacks(self) -> list[_Stack]:
        return [self.actor] if self.critic is None else [self.actor, self.critic]

    def _parts(self, state: Tensor) -> list[Tensor]:
        return list(state.split([stack.state_size for stack in self._stacks], -1))


class _Stack(nn.Module):
    """Layers on top of each other, with weights as torch's LSTM and GRU have them."""

    def __init__(
        self, n_inputs: int, kind: str, size: int, n_layers: int, orthogonal: bool, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self._is_lstm, self._size = kind == "lstm", size
        self.n_layers = n_layers
        n_gates = 4 if self._is_lstm else 3
        for layer in range(n_layers):
            n_before = size if layer else n_inputs
            for name, shape in (("inputs", (n_gates * size, n_before)), ("hidden", (n_gates * size, size))):
                weight = torch.empty(shape)
                for gate in weight.chunk(n_gates):
                    if orthogonal:
                        nn.init.orthogonal_(gate, generator=generator)
                    else:
                        nn.init.uniform_(gate, -1 / math.sqrt(size), 1 / math.sqrt(size), generator=generator)
                self.register_parameter(f"{name}_{layer}", nn.Parameter(weight))
                self.register_parameter(f"{name}_bias_{layer}", nn.Parameter(torch.zeros(n_gates * size)))

    @property
    def state_size(self) -> int:
        return self.n_layers * self._size * (2 if self._is_lstm else 1)

    def step(self, inputs: Tensor, state: Tensor, *, compiled: bool = False) -> Tensor:
        """One step; the state goes on in place."""
        keep = inputs.new_ones(1, inputs.shape[0])  # `len` would fix the size of a batch in an exported graph
        return self._through(inputs.unsqueeze(0), state, keep, overwrite=True, compiled=compiled).squeeze(0)

    def run(self, rows: Tensor, state: Tensor, keep: Tensor, *, compiled: bool) -> Tensor:
        """Along `[T, B, F]`."""
        return self._through(rows, state, keep, overwrite=False, compiled=compiled)

    def _through(self, rows: Tensor, state: Tensor, keep: Tensor, *, overwrite: bool, compiled: bool) -> Tensor:
        run_lstm, run_gru = partial(lstm, compiled=compiled), partial(gru, compiled=compiled)
        if overwrite and not compiled:
            run_lstm, run_gru = plain_lstm, plain_gru  # such as can be exported
        parts = state.split(self._size, -1)
        for layer in range(self.n_layers):
            inputs, hidden, bias, own = (
                self.get_parameter(f"{name}_{layer}") for name in ("inputs", "hidden", "inputs_bias", "hidden_bias")
            )
            if self._is_lstm:
                h, c = parts[2 * layer : 2 * layer + 2]
                rows, cells = run_lstm(nn.functional.linear(rows, inputs, bias + own), hidden, h, c, keep)
                if overwrite:
                    c.copy_(cells[-1])
            else:
                h = parts[layer]
                rows = run_gru(nn.functional.linear(rows, inputs, bias), hidden, own, h, keep)
            if overwrite:
                h.copy_(rows[-1])
        return rows
