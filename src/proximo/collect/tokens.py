"""Prompts and completions in tokens, and rows of tokens in tensors.

A text prompt and its completion are encoded apart and joined: the tokens of a completion follow the prompt's own,
as they do when a model writes them. Completions end with the EOS token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from proximo.errors import UserError

Prompt = str | list[dict[str, str]]
"""Text, or chat messages with role and content."""


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt: text without an EOS that the tokenizer would add; messages by the template.

    Raises:
        UserError: if there are no tokens in it, or messages meet a tokenizer without a (fitting) chat template.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt).input_ids)
        plain = tokenizer(prompt, add_special_tokens=False).input_ids
        if not plain:
            raise UserError("the prompt has no tokens")
        adds_eos = ids[-1] == tokenizer.eos_token_id and plain[-1] != tokenizer.eos_token_id
        return ids[:-1] if adds_eos else ids
    return _encode(tokenizer, _templated(tokenizer, prompt, continues=True))


def encode_completion(tokenizer: Any, prompt: Prompt, completion: str | list[dict[str, str]]) -> list[int]:
    """Return the token ids that follow `encode_prompt`'s, with EOS at the end.

    A text after a text stands as it is, so where a tokenizer keeps spaces it brings its own. A text after messages
    is what the assistant says.

    Raises:
        UserError: if messages follow a text, if there is no EOS, or if the template changes what it made of the prompt.
    """
    eos = eos_of(tokenizer)
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise UserError("the prompt is a text and its completion a list of messages; both must be of one kind")
        ids = list(tokenizer(completion, add_special_tokens=False).input_ids)
    else:
        said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        ids = _said_after(tokenizer, prompt, said)
        if eos in ids:  # templates may put a line break after it, where generating has stopped already
            last = len(ids) - ids[::-1].index(eos)
            ids = ids if tokenizer.decode(ids[last:]).strip() else ids[:last]
    return ids if ids and ids[-1] == eos else [*ids, eos]


def _said_after(tokenizer: Any, prompt: list[dict[str, str]], said: list[dict[str, str]]) -> list[int]:
    before = _templated(tokenizer, prompt, continues=True)
    whole = _templated(tokenizer, prompt + said, continues=False)
    if not whole.startswith(before):
        raise UserError(
            "the chat template writes the prompt otherwise once an answer follows (a template that drops earlier "
            "thoughts, or adds to the answer, does so), so that the tokens of the answer cannot be told from it. Use "
            "text prompts, or name a template that only ever adds at the end with chat_template"
        )
    prefix, ids = _encode(tokenizer, before), _encode(tokenizer, whole)
    if ids[: len(prefix)] == prefix:
        return ids[len(prefix) :]
    return _encode(tokenizer, whole[len(before) :])  # a token reaches over the seam, which generating never does


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of what a template wrote, which has its special tokens already."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _templated(tokenizer: Any, messages: list[dict[str, str]], *, continues: bool) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "the prompt is a list of messages, but the tokenizer has no chat template to write them with. Name a file "
            "with one (chat_template, a file in Jinja; it is saved with the result), use an instruct model's "
            "tokenizer, or use text prompts"
        )

    def rendered(messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=continues)

    try:
        text = rendered(messages)
        last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last is None or messages[last]["content"].strip() in text:
            return text
        other = {"role": "user", "content": messages[last]["content"] + " Hello"}
        said = rendered([*messages[:last], other, *messages[last + 1 :]]) != text  # in other letters, or not at all
    except Exception as error:  # the template may be anyone's, and raises what it likes
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template refuses the messages (by {roles}): {error}") from error
    if not said:
        raise UserError(
            "the chat template leaves out what the user says. Name a file with a template that writes "
            "message['content'] (chat_template), or use text prompts"
        )
    return text


def eos_of(tokenizer: Any) -> int:
    """The token that ends a completion.

    Raises:
        UserError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token to end a completion with; set tokenizer.eos_token and save it")
    return int(tokenizer.eos_token_id)


# --- tensors ----------------------------------------------------------------------------------------------------


def left_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Put rows of token ids into one tensor, padded on the left; return it and its attention (bool), both `[B, L]`."""
    longest = max(map(len, rows), default=0)
    tokens = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], dtype=torch.long)
    places = torch.arange(longest).unsqueeze(0)
    return tokens, places >= torch.tensor([[longest - len(row)] for row in rows])


def right_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Put rows of token ids into one tensor, padded on the right; return it and its attention (bool), both `[B, L]`."""
    longest = max(map(len, rows), default=0)
    tokens = torch.tensor([list(row) + [pad] * (longest - len(row)) for row in rows], dtype=torch.long)
    return tokens, torch.arange(longest).unsqueeze(0) < torch.tensor([[len(row)] for row in rows])


def pieces_within(lengths: Sequence[int], budget: int | None) -> list[list[int]]:
    """Group rows, longest first, so that rows times the longest of them is within `budget` (one row at least)."""
    pieces: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if not pieces or len(pieces[-1]) >= room:
            pieces.append([])
            room = len(lengths) if budget is None else max(1, budget // max(lengths[number], 1))
        pieces[-1].append(number)
    return pieces
