"""A causal language model as a policy: its four roles, and how they share weights.

    policy      samples and learns
    reference   where the policy began; frozen
    critic      one value per token; learns (absent for algorithms without one)
    reward      one score per response; frozen (absent where a function scores)

Sharing is `separate` (a model each), `trunk` (a value head on the policy's own hidden states) or `lora` (one
frozen base; the policy, the critic and the reward are adapters on it, and the reference is the base alone).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from proximo.core.batch import Batch
from proximo.core.policy import Evaluation
from proximo.models.adapters import adapted_layers, in_use
from proximo.models.folders import context_length
from proximo.models.rows import rows_of
from proximo.models.vocabulary import token_scores

Sharing = Literal["separate", "trunk", "lora"]


class Scored(NamedTuple):
    """What scoring finds for rows of tokens `[B, L]`; place t is about the token at t, given those before it."""

    log_probs: Tensor | None
    """[B, L]: log-probability of each token of a response under the policy; 0 elsewhere."""
    ref_log_probs: Tensor | None
    """[B, L]: the same under the reference."""
    values: Tensor | None
    """[B, L]: the critic's value of the text up to and with the token at t."""


class LanguagePolicy(nn.Module):
    """A language model that acts token by token, with what learning needs beside it.

    Rows are whole texts: a left-padded prompt and a response. In a batch, step t has the tokens up to t as
    its observation and the token at t + 1 as its action.
    """

    has_memory = True

    def __init__(
        self,
        actor: Any,
        *,
        sharing: Sharing,
        critic: nn.Module | None = None,
        value_head: nn.Linear | None = None,
        reference: nn.Module | None = None,
        temperature: float = 1.0,
        autocast: bool = False,
    ) -> None:
        """Put the roles together; see `build_policy` for making them from folders.

        Args:
            actor: a causal language model of transformers; with LoRA layers in place for sharing `lora`.
            sharing: how the roles share weights.
            critic: a scalar model of its own (sharing `separate`).
            value_head: from hidden states to a value (sharing `trunk` and `lora`).
            reference: a frozen model of its own (sharing `separate` and `trunk`); None for none, or for `lora`.
            temperature: of sampling, in every log-probability.
            autocast: compute in bfloat16, whatever the weights are held in.
        """
        super().__init__()
        self.actor = actor
        self.critic = critic
        self.value_head = value_head
        self.sharing = sharing
        self.temperature = temperature
        self.autocast = autocast
        self._reference = (reference,)  # in a tuple: it is no part of what learns or is saved
        self._adapted: list[Any] = adapted_layers(actor) if sharing == "lora" else []
        self._plain_head = _head_is_plain(actor)
        self._checkpointed: tuple[nn.Module, ...] = ()  # in a tuple: they are known as actor and critic already

    # --- what learning asks for ----------------------------------------------------------------------------

    @property
    def has_critic(self) -> bool:
        """Whether there is a value network."""
        return self.critic is not None or self.value_head is not None

    @property
    def reference(self) -> nn.Module | None:
        """The frozen model that the policy is held near; the base itself for adapters."""
        return self.actor if self.sharing == "lora" else self._reference[0]

    def evaluate(self, batch: Batch) -> Evaluation:
        """Score `batch.actions` under the present weights, with gradient."""
        assert isinstance(batch.observations, dict)
        self._let_checkpoint(True)
        tokens, attention = batch.observations["tokens"], batch.observations["attention"]
        columns = _used_columns(attention)
        mask = batch.mask[:, columns]
        tokens, attention = tokens[:, columns], attention[:, columns]
        hidden, scorable = self._hidden(self.actor, tokens, attention, "policy")
        scores, entropies = self._token_scores(scorable[mask], batch.actions[:, columns][mask])
        assert entropies is not None
        values = self._values(tokens, attention, hidden)
        whole = batch.mask

        def spread(found: Tensor) -> Tensor:
            return torch.zeros(whole.shape, device=found.device).masked_scatter(whole, found.float())

        return Evaluation(spread(scores), spread(entropies), None if values is None else spread(values[mask]), None)

    def row_lengths(self, batch: Batch) -> list[int]:
        """Tokens per row, from the first of the prompt to the last of the response."""
        assert isinstance(batch.observations, dict)
        return batch.observations["attention"].sum(1).tolist()

    def plain(self, batch: Batch) -> None:
        """A transformer is no plain perceptron."""
        del batch

    # --- what collecting asks for --------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self,
        tokens: Tensor,
        attention: Tensor,
        response: Tensor,
        *,
        with_reference: bool,
        with_policy: bool = True,
    ) -> Scored:
        """Score the responses in rows of tokens `[B, L]`: policy, reference and critic.

        Args:
            tokens: token ids.
            attention: True at real tokens.
            response: True at the tokens of responses.
            with_reference: False leaves the reference out.
            with_policy: False leaves the policy's own log-probabilities out.
        """
        self._let_checkpoint(False)
        targets = tokens[response]
        before = response[:, 1:]

        def log_probs_of(model: Any, role: str | None) -> tuple[Tensor, Tensor]:
            hidden, scorable = self._hidden(model, tokens, attention, role)
            scores, _ = self._token_scores(scorable[:, :-1][before], targets, model=model, with_entropy=False)
            return torch.zeros(tokens.shape, device=tokens.device).masked_scatter(response, scores), hidden

        own = hidden = ref = None
        if with_policy or self.sharing == "trunk":  # whose value head reads the policy's states
            own, hidden = log_probs_of(self.actor, "policy")
        if with_reference:
            if self.reference is None:
                raise ValueError("there is no reference in memory")
            ref, _ = log_probs_of(self.reference, None)
        return Scored(own, ref, self._values(tokens, attention, hidden))

    def next_logits(self, tokens: Tensor, attention: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        """Logits `[B, V]` of the token after `tokens` `[B, n]`, at the sampling temperature; extends `cache`."""
        self._let_checkpoint(False)
        with in_use(self._adapted, "policy"), self.precision():
            output = self.actor(
                input_ids=tokens,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits = output.logits[:, -1].float()
        return logits if self.temperature == 1.0 else logits / self.temperature

    # --- inside --------------------------------------------------------------------------------------------

    def _hidden(self, model: Any, tokens: Tensor, attention: Tensor, role: str | None) -> tuple[Tensor, Tensor]:
        """Last hidden states `[B, L, H]`, and what scores are made of: the same, or, if the head is more, logits."""
        rows = rows_of(tokens, attention)
        with in_use(self._adapted, role), self.precision():
            if self._plain_head:
                trunk = model.base_model
                output = trunk(
                    input_ids=rows.tokens, attention_mask=rows.mask, position_ids=rows.positions, use_cache=False
                )
                hidden = rows.back(output.last_hidden_state)
                return hidden, hidden
            output = model(
                input_ids=rows.tokens,
                attention_mask=rows.mask,
                position_ids=rows.positions,
                use_cache=False,
                output_hidden_states=True,
            )
            return rows.back(output.hidden_states[-1]), rows.back(output.logits)

    def _token_scores(
        self, hidden: Tensor, targets: Tensor, model: Any = None, *, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        head: Callable[[Tensor], Tensor] = (model or self.actor).get_output_embeddings()
        if not self._plain_head:
            head = nn.Identity()
        with self.precision():
            return token_scores(hidden, head, targets, self.temperature, self._vocabulary, with_entropy=with_entropy)

    @property
    def _vocabulary(self) -> int:
        return int(self.actor.config.get_text_config().vocab_size)

    def _values(self, tokens: Tensor, attention: Tensor, hidden: Tensor | None) -> Tensor | None:
        """Values `[B, L]`, float32."""
        if self.critic is not None:
            with self.precision():
                return scalar_values(self.critic, tokens, attention)
        if self.value_head is None:
            return None
        if self.sharing == "lora":
            hidden, _ = self._hidden(self.actor, tokens, attention, "value")
        assert hidden is not None
        return self.value_head(hidden.float()).squeeze(-1)

    def _let_checkpoint(self, wanted: bool) -> None:
        """Checkpoint activations or not: transformers does in training mode, and has no cache to sample with there."""
        for model in self._checkpointed:
            if model.training != wanted:
                model.train(wanted)

    def precision(self) -> Any:
        """A context that computes as this policy does; as long as it is open, weights that learn are cast once."""
        if not self.autocast:
            return nullcontext()
        return torch.autocast(next(self.actor.parameters()).device.type, torch.bfloat16)


def scalar_values(model: Any, tokens: Tensor, attention: Tensor) -> Tensor:
    """The number that a scalar model gives at every position `[B, L]`, float32: the head never computes in less."""
    rows = rows_of(tokens, attention)
    output = model.base_model(
        input_ids=rows.tokens, attention_mask=rows.mask, position_ids=rows.positions, use_cache=False
    )
    head = model.score
    bias = None if head.bias is None else head.bias.float()
    with torch.autocast(tokens.device.type, enabled=False):
        values = nn.functional.linear(output.last_hidden_state.float(), head.weight.float(), bias)
    return rows.back(values).squeeze(-1)


def _used_columns(attention: Tensor) -> slice:
    """From the first column that holds a real token to the last: the padding of other rows costs nothing here."""
    used = attention.any(0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, attention.shape[1])


@torch.no_grad()
def _head_is_plain(model: Any) -> bool:
    """Whether logits are the output embedding of the last hidden state and nothing more (no soft cap, no scale)."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    few = min(4, context_length(model) or 4, model.config.get_text_config().vocab_size)
    ids = torch.arange(few, device=next(model.parameters()).device).unsqueeze(0)
    hook = head.register_forward_pre_hook(lambda _, inputs: (100.0 * inputs[0],))  # so that a soft cap would show
    try:
        whole = model(input_ids=ids, use_cache=False).logits
        ours = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    finally:
        hook.remove()
    return whole.shape == ours.shape and bool(torch.allclose(whole, ours, rtol=1e-4, atol=1e-5))


def enable_gradient_checkpointing(policy: LanguagePolicy) -> None:
    """Recompute activations in the backward pass instead of holding them, with the adapter they were made with."""

    def recomputed(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        layers = policy._adapted
        role = layers[0]._active_adapter[0] if layers and not layers[0]._disable_adapters else None

        def again(*inner: Any) -> Any:
            with in_use(layers, role):
                return function(*inner, **named)

        return checkpoint(again, *arguments, use_reentrant=False)

    policy._checkpointed = tuple(model for model in (policy.actor, policy.critic) if model is not None)
    for model in policy._checkpointed:
        checkpoint_activations(model, recomputed)


def _recomputed(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False, **named)


def checkpoint_activations(model: Any, recomputed: Callable[..., Any] = _recomputed) -> None:
    """Let one model recompute the activations of its layers; `recomputed` calls a layer so that they are."""
    # Of two names for the same, the second is on its way out where transformers has the first.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()  # transformers checkpoints in training mode alone; there is no dropout left to switch on
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = recomputed
