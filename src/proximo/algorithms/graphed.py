"""PPO-Clip's epochs without a word to the host: one minibatch is a CUDA graph that is replayed for all of them.

Every decision of `update.run_epochs` (the KL stop, the refusal of what is not finite) is taken on the device, by flags
that turn the steps after it into steps of nothing; metrics are read once, at the end. On the CPU the same functions
run one by one: that is how they are held against `run_epochs` (tests/algorithms/test_graphed.py).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.algorithms.update import Minibatch
from proximo.core.batch import Batch, minibatch_indices
from proximo.core.capture import captured
from proximo.core.losses import clipped_surrogate, clipped_value, value_loss
from proximo.core.masked import masked_mean, whiten
from proximo.core.policy import Evaluation


class GraphedSettings(NamedTuple):
    """The settings of `ppo.PPO` of the same names."""

    n_epochs: int
    batch_size: int
    clip_epsilon: float
    clip_epsilon_high: float | None
    dual_clip: float | None
    normalize_advantages: bool
    value_coef: float
    value_clip_epsilon: float | None
    entropy_coef: float
    max_grad_norm: float
    target_kl: float | None

    @property
    def fixed(self) -> tuple[object, ...]:
        """What is part of a captured graph: all but what a schedule changes, or what only counts."""
        changing = ("n_epochs", "batch_size", "clip_epsilon", "clip_epsilon_high")
        values = tuple(value for name, value in self._asdict().items() if name not in changing)
        return (*values, self.clip_epsilon_high is None)


class Scored(Protocol):
    """A memoryless policy whose weights are an `nn.Module`'s."""

    def evaluate(self, batch: Batch) -> Evaluation:
        """Score the actions of a batch `[n, 1]`, with gradient."""
        ...


METRICS = ("approx_kl", "policy_loss", "value_loss", "entropy", "clip_fraction")
_TABLE = (*METRICS, "grad_norm", "loss", "seen", "taken")
"""What a minibatch leaves: metrics, and whether it was looked at and whether its step was taken (1 or 0)."""


def run_graphed_epochs(
    policy: Scored,
    optimizer: FlatAdam,
    everything: Minibatch,
    settings: GraphedSettings,
    generator: torch.Generator,
) -> dict[str, float]:
    """Do what `update.run_epochs` does with the loss of PPO-Clip; see there for metrics, KL stop and errors.

    `everything` has steps as rows, `[M, 1]`, all of them valid. The orders of all epochs are drawn beforehand, also
    of those that a KL stop leaves out. The graph is kept in `optimizer.graphed` for the next iteration: the
    policy's weights and normalizers must stay where they are.
    """
    parts = [
        part
        for _ in range(settings.n_epochs)
        for part in minibatch_indices(len(everything.advantages), settings.batch_size, generator)
    ]
    order = pad_sequence(list(parts), batch_first=True, padding_value=-1).to(everything.advantages.device)
    graphed = optimizer.graphed
    if not (isinstance(graphed, GraphedUpdate) and graphed.fits(policy, everything, order, settings)):
        graphed = optimizer.graphed = None  # its memory is given back first
        graphed = optimizer.graphed = GraphedUpdate(policy, optimizer, everything, order, settings)
    table = graphed.run(everything, order, settings)
    return _summary(table, len(parts) // settings.n_epochs)


class GraphedUpdate:
    """One minibatch's step over memory that stays where it is, captured at its first use."""

    def __init__(
        self, policy: Scored, optimizer: FlatAdam, everything: Minibatch, order: Tensor, settings: GraphedSettings
    ) -> None:
        """Set memory aside for as many steps and minibatches as these."""
        assert isinstance(policy, nn.Module)
        self._policy, self._optimizer, self._settings = policy, optimizer, settings
        self._parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        dtype, device = optimizer.weights.dtype, optimizer.weights.device
        self._columns = {name: column.clone() for name, column in _columns(everything).items()}
        self._order = order.clone()
        self._number = torch.zeros(1, dtype=torch.int64, device=device)  # which minibatch is next
        self._table = torch.zeros(len(order), len(_TABLE), dtype=dtype, device=device)
        self._stopped = torch.zeros((), dtype=torch.bool, device=device)
        self._failed = torch.zeros_like(self._stopped)
        self._n_steps, self._learning_rate = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        self._clip_low, self._clip_high = (torch.zeros((), dtype=dtype, device=device) for _ in range(2))
        self._replay = None

    def fits(self, policy: Scored, everything: Minibatch, order: Tensor, settings: GraphedSettings) -> bool:
        """Whether its memory holds this much, of this kind, and its graph is of these settings."""
        own = {name: (column.shape[1:], column.dtype) for name, column in self._columns.items()}
        theirs = {name: (column.shape[1:], column.dtype) for name, column in _columns(everything).items()}
        big_enough = len(everything.advantages) <= len(self._columns["advantages"])
        big_enough = big_enough and all(a <= b for a, b in zip(order.shape, self._order.shape, strict=True))
        return policy is self._policy and own == theirs and big_enough and settings.fixed == self._settings.fixed

    def run(self, everything: Minibatch, order: Tensor, settings: GraphedSettings) -> Tensor:
        """Go through all minibatches; return the table of what they left, on the host.

        Raises:
            NonFiniteUpdateError: after the last step before a NaN or infinity would have reached the weights.
        """
        self._load(everything, order, settings)
        if self._replay is None:
            self._stopped.fill_(True)  # so that capturing it takes no step
            self._replay = captured(self._step, self._table.device)
            self._load(everything, order, settings)
        for _ in range(len(order)):
            self._replay()
        failed = self._failed.to(self._table.dtype).expand(1, len(_TABLE))
        table = torch.cat([failed, self._table[: len(order)]]).cpu()  # here, and nowhere else, the host waits
        self._optimizer.n_steps += int(table[1:, _TABLE.index("taken")].sum())
        if table[0, 0]:
            bad = table[1:][table[1:, _TABLE.index("seen")] == 1]  # the last of them is the one that was refused
            loss, norm = (float(bad[-1, _TABLE.index(name)]) for name in ("loss", "grad_norm"))
            is_loss = not torch.isfinite(bad[-1, _TABLE.index("loss")])
            raise NonFiniteUpdateError(f"the loss is {loss}" if is_loss else f"the gradient's norm is {norm}")
        return table[1:]

    def _load(self, everything: Minibatch, order: Tensor, settings: GraphedSettings) -> None:
        for name, column in _columns(everything).items():
            self._columns[name][: len(column)].copy_(column)
        self._order[: order.shape[0], : order.shape[1]].copy_(order)
        self._order[: order.shape[0], order.shape[1] :].fill_(-1)
        self._table.zero_()
        self._number.zero_()
        self._stopped.fill_(False)
        self._failed.fill_(False)
        self._n_steps.fill_(self._optimizer.n_steps)
        self._learning_rate.fill_(self._optimizer.learning_rate)
        self._clip_low.fill_(settings.clip_epsilon)
        high = settings.clip_epsilon if settings.clip_epsilon_high is None else settings.clip_epsilon_high
        self._clip_high.fill_(high)

    def _step(self) -> None:
        """Minibatch `_number`: gather, loss, gradient, clip, Adam, and a row of the table. Tensors alone."""
        settings, table = self._settings, self._table
        total, metrics = self._loss(self._minibatch())
        gradients = torch.autograd.grad(total, self._parameters, materialize_grads=True)
        gradient, total = torch.cat([part.flatten() for part in gradients]), total.detach()
        norm = torch.linalg.vector_norm(gradient)
        active = ~(self._stopped | self._failed)
        seen = active & total.isfinite()
        stops = torch.zeros_like(active) if settings.target_kl is None else metrics[0] > 1.5 * settings.target_kl
        taken = seen & ~stops & norm.isfinite()
        self._stopped |= seen & stops
        self._failed |= active & ~taken & ~(seen & stops)
        self._adam(gradient, norm, taken)
        flags = torch.stack([active, taken]).to(table.dtype)
        table.index_copy_(0, self._number, torch.cat([metrics, torch.stack([norm, total]), flags]).unsqueeze(0))
        self._number.add_(1).remainder_(len(table))  # warming up must not leave the table

    def _minibatch(self) -> Minibatch:
        """The rows of minibatch `_number`; what fills the last place of a smaller one is masked."""
        rows = self._order.index_select(0, self._number).squeeze(0)
        mask = (rows >= 0).unsqueeze(1)
        rows = rows.clamp(min=0)
        own = {name: column.index_select(0, rows) for name, column in self._columns.items()}
        advantages, returns = own.pop("advantages"), own.pop("returns")
        if self._settings.normalize_advantages:
            advantages = whiten(advantages, mask)
        nothing = torch.zeros_like(mask)
        batch = Batch(mask=mask, rewards=returns, next_values=None, terminated=nothing, done=nothing, **own)
        return Minibatch(batch, advantages, returns, denominator=mask.sum().clamp(min=1))

    def _loss(self, minibatch: Minibatch) -> tuple[Tensor, Tensor]:
        """The loss of `ppo.PPO` (Schulman et al. 2017, eq. 9) and `METRICS`, with clip_epsilon as a tensor."""
        settings, batch, denominator = self._settings, minibatch.batch, minibatch.denominator
        new = self._policy.evaluate(batch)
        returns, limit = minibatch.returns, settings.value_clip_epsilon
        assert new.values is not None
        assert batch.values is not None
        assert returns is not None
        surrogate = clipped_surrogate(
            new.log_probs,
            batch.log_probs,
            minibatch.advantages,
            batch.mask,
            clip_epsilon=self._clip_low,
            clip_epsilon_high=self._clip_high,
            dual_clip=settings.dual_clip,
            denominator=denominator,
        )
        if limit is None:
            critic = value_loss(new.values, returns, batch.mask, denominator=denominator)
        else:
            critic = clipped_value(
                new.values, batch.values, returns, batch.mask, clip_epsilon=limit, denominator=denominator
            )
        entropy = masked_mean(new.entropy, batch.mask, denominator=denominator)
        total = surrogate.loss + settings.value_coef * critic
        if settings.entropy_coef:
            total = total - settings.entropy_coef * entropy
        metrics = (surrogate.approx_kl, surrogate.loss, critic, entropy, surrogate.clip_fraction)
        return total, torch.stack([metric.detach() for metric in metrics])

    def _adam(self, gradient: Tensor, norm: Tensor, taken: Tensor) -> None:
        """`FlatAdam.clipped_step`, where `taken`; elsewhere every number stays as it is, bit for bit."""
        optimizer = self._optimizer
        beta1, beta2 = optimizer.betas
        gradient = gradient * (self._settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self._n_steps.add_(taken)
        size = (self._learning_rate / (1.0 - beta1**self._n_steps)).to(gradient.dtype)
        correction = (1.0 - beta2**self._n_steps).sqrt().to(gradient.dtype)
        first = optimizer.first_moment.lerp(gradient, 1.0 - beta1)
        second = (optimizer.second_moment * beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        weights = optimizer.weights - size * (first / (second.sqrt().div_(correction).add_(optimizer.eps)))
        for own, new in (
            (optimizer.weights, weights),
            (optimizer.first_moment, first),
            (optimizer.second_moment, second),
        ):
            own.copy_(torch.where(taken, new, own))


def _columns(everything: Minibatch) -> dict[str, Tensor]:
    """What a loss reads of each step, `[M, 1, ...]`."""
    batch = everything.batch
    assert isinstance(batch.observations, Tensor)
    assert batch.values is not None
    assert everything.returns is not None
    own = {name: getattr(batch, name) for name in ("observations", "actions", "log_probs", "values")}
    return own | {"advantages": everything.advantages, "returns": everything.returns}


def _summary(table: Tensor, minibatches_per_epoch: int) -> dict[str, float]:
    """Metrics as `update.run_epochs` has them."""
    column = {name: table[:, index] for index, name in enumerate(_TABLE)}
    n_seen, taken = int(column["seen"].sum()), column["taken"] == 1
    last_epoch = slice((n_seen - 1) // minibatches_per_epoch * minibatches_per_epoch, n_seen)
    norms = column["grad_norm"][taken].tolist()
    return {name: float(column[name][last_epoch].mean()) for name in METRICS} | {
        "approx_kl_max": float(column["approx_kl"][:n_seen].max()),
        "grad_norm": sum(norms) / max(len(norms), 1),
        "n_updates": len(norms),
        "kl_stopped": float(n_seen > len(norms)),
    }
