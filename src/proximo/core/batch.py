"""`Batch`: what collecting hands to learning. Every tensor is `[B, T, ...]`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Experience of B environments (or B responses) over T steps.

    A field is here only if an algorithm's `update` reads it. Steps where `mask` is False are not
    experience (a reset row of a vector environment, padding): whatever stands there counts for nothing.

    | field          | shape      | symbol        | role                                                       |
    |----------------|------------|---------------|------------------------------------------------------------|
    | observations   | [B, T, *O] | s_t           | what the policy saw, before its own normalization; several  |
    |                |            |               | tensors by their names where it saw several things          |
    | actions        | [B, T, *A] | a_t           | what the policy sampled, before any clipping to the space   |
    | mask           | [B, T]     |               | True where the step is experience                          |
    | rewards        | [B, T]     | r_t           | reward of the step, as scaled for learning                  |
    | log_probs      | [B, T]     | log pi_old    | log-probability of `actions` when they were sampled         |
    | values         | [B, T]     | V_old(s_t)    | the critic at collection time; None without a critic        |
    | next_values    | [B, T]     | V_old(s_t+1)  | the critic at the true next observation, the final one      |
    |                |            |               | where an episode ended; zeroed in GAE only by `terminated`  |
    | terminated     | [B, T]     |               | the environment's own end: nothing comes after              |
    | done           | [B, T]     |               | terminated or truncated: the next step is another episode   |
    | ref_log_probs  | [B, T]     | log pi_ref    | log-probability under the reference; None without one       |
    | group          | [B]        |               | rows with one number are answers to one prompt; None: none  |
    | hidden         | [B, K, S]  |               | what a recurrent policy remembered before the first step of |
    |                |            |               | each of the K equal pieces of a row; None without memory    |
    | forgets        | [B, T]     |               | True where that was emptied after the step; None: after     |
    |                |            |               | every `done` and every step that is no experience           |
    | intrinsic_     | [B, T]     |               | a second reward with its own critic (algorithms/rnd.py):    |
    | rewards, values, next_values |             | as above, scaled; None without one                          |
    """

    observations: Shaped[Tensor, "B T *O"] | dict[str, Tensor]
    actions: Shaped[Tensor, "B T *A"]
    mask: Bool[Tensor, "B T"]
    rewards: Float[Tensor, "B T"]
    log_probs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None
    next_values: Float[Tensor, "B T"] | None
    terminated: Bool[Tensor, "B T"]
    done: Bool[Tensor, "B T"]
    ref_log_probs: Float[Tensor, "B T"] | None = None
    group: Int[Tensor, " B"] | None = None
    hidden: Float[Tensor, "B K S"] | None = None
    forgets: Bool[Tensor, "B T"] | None = None
    intrinsic_rewards: Float[Tensor, "B T"] | None = None
    intrinsic_values: Float[Tensor, "B T"] | None = None
    intrinsic_next_values: Float[Tensor, "B T"] | None = None

    @property
    def n_valid(self) -> int:
        """Number of steps that are experience."""
        return int(self.mask.sum())

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        """Select rows (along B) of every field."""
        if isinstance(rows, slice) or rows.dtype == torch.bool:
            return self._mapped(lambda tensor: tensor[rows])
        return self._mapped(lambda tensor: tensor.index_select(0, rows))  # whole rows: ten times faster for images

    def as_steps(self) -> Batch:
        """Every valid step as a row of its own: `[n_valid, 1, ...]`, in order of B, then T.

        For policies without memory the order of steps carries nothing, so minibatches may be cut anywhere.
        Groups and what is remembered are about whole rows and fall away.
        """
        rows = replace(self, group=None, hidden=None, forgets=None)
        if self.mask.all():
            return rows._mapped(lambda tensor: tensor.flatten(0, 1).unsqueeze(1))
        keep = self.mask.flatten().nonzero().squeeze(1)
        return rows._mapped(lambda tensor: tensor.flatten(0, 1).index_select(0, keep).unsqueeze(1))

    @property
    def n_pieces(self) -> int:
        """Pieces of a row that a state is known at the start of; 1 without memory."""
        return 1 if self.hidden is None else self.hidden.shape[1]

    def as_pieces(self) -> Batch:
        """Every piece that a state is known at the start of as a row of its own: `[B * K, T / K, ...]`."""
        assert self.hidden is not None
        assert self.group is None
        cut = replace(self, hidden=None)._mapped(lambda tensor: pieces(tensor, self.n_pieces))
        return replace(cut, hidden=self.hidden.flatten(0, 1).unsqueeze(1))

    @property
    def continues(self) -> Bool[Tensor, "B T"]:
        """Whether what is remembered goes on from the step before; True for the first, whose state is known.

        After an end, and after a step that is no experience (a reset), another episode begins; a life that was lost
        is an end for learning, and the game goes on.
        """
        before = self.mask & ~self.done if self.forgets is None else ~self.forgets
        return torch.cat([torch.ones_like(before[:, :1]), before[:, :-1]], 1)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        fields = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                fields[field.name] = {name: change(tensor) for name, tensor in value.items()}
            else:
                fields[field.name] = None if value is None else change(value)
        return Batch(**fields)


def pieces(tensor: Shaped[Tensor, "B T *S"], n: int) -> Tensor:
    """Cut rows into `n` equal pieces, each a row of its own: `[B * n, T / n, ...]`."""
    return tensor.reshape(len(tensor) * n, -1, *tensor.shape[2:])


def minibatch_indices(n_rows: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Cut a fresh random order of `n_rows` rows into minibatches of about `batch_size`.

    Every row is in exactly one minibatch. Sizes differ by at most one, so there is no small remainder whose
    advantages would be normalized over a handful of steps (or over one, which has no spread at all).

    Raises:
        ValueError: if `n_rows` or `batch_size` is below 1.
    """
    if n_rows < 1 or batch_size < 1:
        raise ValueError(f"n_rows and batch_size must be at least 1, got {n_rows} and {batch_size}")
    n_minibatches = max(1, round(n_rows / batch_size))
    order = torch.randperm(n_rows, generator=generator, device=generator.device)
    if n_minibatches == 1:
        return (order,)
    return torch.tensor_split(order, n_minibatches)
