"""Files of data as they come from other programs: marks, capitals, halves of characters, numbers out of this world."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.collect.data import read_preferences, read_prompts, read_rows
from proximo.collect.tokens import encode_prompt
from proximo.errors import UserError
from proximo.training.supervised import SupervisedConfig, take_step
from tests.tiny_language import CHAT_TEMPLATE, tiny_tokenizer


def read(path: Path, tokenizer: Any = None) -> Any:
    return read_prompts(path, tokenizer or tiny_tokenizer(), max_tokens=None, over_long="error")


def test_a_mark_in_front_and_an_ending_in_capitals_are_no_fault(tmp_path):
    path = tmp_path / "DATA.JSONL"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "the cat"}\n')
    assert read_rows(path) == [{"prompt": "the cat"}]
    path.write_text('{"prompt": "the cat"}\n{"prompt": ""}\n')
    with pytest.raises(UserError, match=r"DATA\.JSONL, line 2, column 'prompt' is empty"):
        read(path)
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match=r"ends in 'nothing'; data is read from \.jsonl .*\.parquet, or a folder"):
        read_rows(tmp_path / "data")


@pytest.mark.parametrize("value", ['"the \\ud800 cat"', '[{"role": "user", "content": "the \\uDC00"}]'])
def test_half_a_surrogate_pair_is_refused_with_its_row(tmp_path, value):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "the \\ud83d\\ude00 \\\\ud800 cat"}\n' + f'{{"prompt": {value}}}\n')
    with pytest.raises(UserError, match=r"line 2, column 'prompt' holds \\u(d800|dc00), half of a surrogate pair"):
        read(path)
    path.write_text(path.read_text().splitlines()[0])
    assert len(read(path)) == 1


@pytest.mark.parametrize("margin", ["1e308", "-1e7", "1" + "0" * 400])
def test_a_margin_out_of_this_world_is_refused_with_its_row(tmp_path, margin):
    path = tmp_path / "data.jsonl"
    row = '{"prompt": "the cat", "chosen": "runs", "rejected": "eats", "margin": %s}\n'
    path.write_text(row % "1e6" + row % margin)
    with pytest.raises(UserError, match=r"line 2, column 'margin' is .*; it must be a finite number, from -1e\+06 to"):
        read_preferences(path, tiny_tokenizer(), max_tokens=None, over_long="error")


def test_a_template_that_leaves_out_the_user_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "the cat"}]}))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message['content']", "message['text'] | default('')")
    with pytest.raises(UserError, match="line 1: the chat template leaves out what the user says"):
        read(path, tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper")
    assert encode_prompt(tokenizer, [{"role": "user", "content": "the cat"}])  # in other letters, but there


def test_a_loss_that_is_not_finite_stops_learning_though_its_gradient_is():
    weights = nn.Linear(1, 1)
    before = weights.weight.detach().clone()
    optimizer = FlatAdam(weights, learning_rate=0.1, eps=1e-8)

    def shares_of(piece: int) -> dict[str, torch.Tensor]:
        return {"loss": weights.weight.sum() + math.inf}

    with pytest.raises(NonFiniteUpdateError, match="the loss is inf"):
        take_step(SupervisedConfig(), optimizer, [0], shares_of, 0, 4)
    assert torch.equal(weights.weight, before)
