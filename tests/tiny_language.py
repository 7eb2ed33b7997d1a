"""Tiny language models and a tokenizer, made on the spot: nothing is downloaded, everything takes milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["llama", "gpt2"]

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>")
_TEXT = (
    "a the cat dog bird fish tree house sun moon red blue green big small old new runs sleeps eats sees likes and "
    "or not is was here there now then one two three four five good bad yes no hello why because . ? !"
)
WORDS = tuple(_TEXT.split())

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
"""Every message after its role; answers end with EOS."""


def tiny_tokenizer(*, chat: bool = False) -> Any:
    """A word is a token, words are split at spaces; pad, BOS, EOS and UNK are tokens of their own (ids 0 to 3).

    `chat` gives it a chat template with roles as special tokens.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
        padding_side="left",
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(kind: Kind = "llama", *, seed: int = 0, width: int = 16, n_layers: int = 2, context: int = 64) -> Any:
    """A causal language model over the tiny tokenizer's vocabulary, with random weights, without dropout, float32."""
    import transformers

    pad, bos, eos = 0, 1, 2
    shared = dict(vocab_size=len(SPECIAL + WORDS), pad_token_id=pad, bos_token_id=bos, eos_token_id=eos)
    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=n_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=context,
            initializer_range=0.2,
            **shared,
        )
        make: Any = transformers.LlamaForCausalLM
    else:
        config = transformers.GPT2Config(
            n_embd=width,
            n_layer=n_layers,
            n_head=2,
            n_positions=context,
            initializer_range=0.2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **shared,
        )
        make = transformers.GPT2LMHeadModel
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(config).eval()


def save_tiny(
    folder: Path, kind: Kind = "llama", *, seed: int = 0, chat: bool = False, width: int = 16, context: int = 64
) -> Path:
    """Write a tiny model and its tokenizer into a folder, as `save_pretrained` does; return the folder."""
    tiny_model(kind, seed=seed, width=width, context=context).save_pretrained(folder)
    tiny_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def tiny_scalar_model(kind: Kind = "llama", *, seed: int = 0, width: int = 16, context: int = 64) -> Any:
    """A model with one number per position (a reward model, or a critic), with random weights, float32."""
    import transformers

    trunk = tiny_model(kind, seed=seed, width=width, context=context)
    trunk.config.num_labels = 1
    make: Any = (
        transformers.LlamaForSequenceClassification if kind == "llama" else transformers.GPT2ForSequenceClassification
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        return make(trunk.config).eval()


def save_tiny_scalar(folder: Path, kind: Kind = "llama", *, seed: int = 0, chat: bool = False) -> Path:
    """Write a tiny scalar model and its tokenizer into a folder; return the folder."""
    tiny_scalar_model(kind, seed=seed).save_pretrained(folder)
    tiny_tokenizer(chat=chat).save_pretrained(folder)
    return folder
