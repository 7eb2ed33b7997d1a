"""The keys and values of the tokens read so far, in memory that is set aside once for a whole response."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def new_cache(model: Any, capacity: int) -> Any:
    """A cache of keys and values with room for `capacity` tokens, set aside once.

    Models with other layers than full attention (sliding windows, state spaces) get the one that transformers
    makes for them.
    """
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

    class _Layer(DynamicLayer):
        """Writes into memory set aside for the whole response; hands out the part that is filled."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            n_new = key_states.shape[-2]
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.length = 0
                self.all_keys, self.all_values = (
                    states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
                    for states in (key_states, value_states)
                )
            self.all_keys[..., self.length : self.length + n_new, :] = key_states
            self.all_values[..., self.length : self.length + n_new, :] = value_states
            self.length += n_new
            self._show()
            return self.keys, self.values  # type: ignore[return-value]

        def _show(self) -> None:
            self.keys = self.all_keys[..., : self.length, :]
            self.values = self.all_values[..., : self.length, :]

        def batch_repeat_interleave(self, repeats: int) -> None:
            self.all_keys = self.all_keys.repeat_interleave(repeats, 0)
            self.all_values = self.all_values.repeat_interleave(repeats, 0)
            self._show()

        def batch_select_indices(self, indices: Tensor) -> None:
            self.all_keys, self.all_values = self.all_keys[indices], self.all_values[indices]
            self._show()

    config = model.config.get_text_config()
    if not has_full_attention(model):
        return DynamicCache(config=config)
    return Cache(layers=[_Layer() for _ in range(config.num_hidden_layers)])


def has_full_attention(model: Any) -> bool:
    """Whether every layer looks at all tokens before."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    return all(kind == "full_attention" for kind in kinds) and not getattr(config, "sliding_window", None)
