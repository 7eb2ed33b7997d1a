"""A language model small enough to learn within seconds, made from nothing: what the language examples begin with.

    python examples/tiny_model.py models/tiny

Put any other model in its place: a folder that `save_pretrained` wrote, or a hub id.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

ANIMALS = ["cat", "dog", "owl", "fox", "hen", "cow", "pig", "bee", "ant", "bat"]
THINGS = ["cup", "hat", "key", "box", "bed", "car", "pen", "map", "bag", "jar"]
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "i", "see", "the", "a", "and", ".", "?", *ANIMALS, *THINGS]


def save_tiny_model(folder: Path, *, seed: int = 0, width: int = 32) -> Path:
    """Write a model with random weights and its tokenizer, a token for each word, into a folder; return the folder."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **special)
    shape = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write one JSON object per line, which is what all language stages read; return the path."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


if __name__ == "__main__":
    print(save_tiny_model(Path(sys.argv[1])))
