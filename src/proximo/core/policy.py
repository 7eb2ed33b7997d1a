"""What the algorithms ask of a policy: one of the two hinges between the floors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from proximo.core.batch import Batch
from proximo.core.distributions import Distribution


class Evaluation(NamedTuple):
    """What `policy.evaluate(batch)` returns; every tensor `[B, T]`, `distribution` over `[B, T]`.

    `values` is None without a critic, `distribution` where it would be too large to hold (language models),
    `intrinsic_values` without a critic of intrinsic rewards.
    """

    log_probs: Tensor
    entropy: Tensor
    values: Tensor | None
    distribution: Distribution | None
    intrinsic_values: Tensor | None = None


class Policy(Protocol):
    """Anything that can score the actions of a batch."""

    @property
    def has_memory(self) -> bool:
        """Whether a step's score depends on the steps before it, so that rows of a batch must stay whole."""
        ...

    def evaluate(self, batch: Batch) -> Evaluation:
        """Score `batch.actions` under the present weights, with gradient."""
        ...

    def row_lengths(self, batch: Batch) -> list[int]:
        """How much work each row is, in steps: what a budget of memory is spent on."""
        ...

    def plain(self, batch: Batch) -> PlainActorCritic | None:
        """Lay open the networks for the steps of a batch `[M, 1]`, or None where they are not plain ones."""
        ...


@dataclass(frozen=True)
class PlainActorCritic:
    """A memoryless actor and critic that are plain multilayer perceptrons, laid open for a fused update.

    Layers are (weight `[out, in]`, bias `[out]`) in order; the last of each network is linear. `log_std` is
    None for a categorical policy over the actor's outputs.
    """

    inputs: Tensor
    """`[M, F]`: what the networks see at the M steps of a batch, normalized."""
    actor: Sequence[tuple[Tensor, Tensor]]
    critic: Sequence[tuple[Tensor, Tensor]]
    log_std: Tensor | None
    activation: Literal["tanh", "relu"]
