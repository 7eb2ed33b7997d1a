"""Data files into tokens: what comes out by hand, and every way that a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from proximo.collect.data import Example, Pair, read_examples, read_preferences, read_prompts, read_rows
from proximo.collect.tokens import encode_completion, encode_prompt, left_padded, pieces_within, right_padded
from proximo.errors import UserError
from tests.tiny_language import CHAT_TEMPLATE, tiny_tokenizer

PLAIN = tiny_tokenizer()
CHAT = tiny_tokenizer(chat=True)
EOS, USER, ASSISTANT = 2, 4, 5
THE, CAT, DOG, RUNS, STOP = (PLAIN.get_vocab()[word] for word in ("the", "cat", "dog", "runs", "."))


def written(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    """A file with these rows; text and bytes stand as they are."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return folder / name


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def adding_eos() -> Any:
    """A tokenizer that ends every text with EOS, as some do, and begins it with BOS."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return tokenizer


# --- tokens -----------------------------------------------------------------------------------------------------


def test_text_is_encoded_apart_and_joined():
    assert encode_prompt(PLAIN, "the cat") == [THE, CAT]
    assert encode_completion(PLAIN, "the cat", "runs .") == [RUNS, STOP, EOS]
    assert encode_completion(PLAIN, "the cat", "runs . <eos>") == [RUNS, STOP, EOS]


def test_a_prompt_has_no_eos_of_the_tokenizer_and_a_completion_no_bos():
    tokenizer = adding_eos()
    assert tokenizer("the cat").input_ids == [1, THE, CAT, EOS]
    assert encode_prompt(tokenizer, "the cat") == [1, THE, CAT]
    assert encode_completion(tokenizer, "the cat", "runs") == [RUNS, EOS]


def test_messages_go_through_the_template():
    prompt = [user("the cat")]
    assert encode_prompt(CHAT, prompt) == [USER, THE, CAT, ASSISTANT]
    assert encode_completion(CHAT, prompt, [assistant("runs .")]) == [RUNS, STOP, EOS]
    assert encode_completion(CHAT, prompt, "runs .") == [RUNS, STOP, EOS]


def test_what_a_template_puts_after_eos_is_left_out_and_a_missing_eos_is_added():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ eos_token + ' ' }}", "")
    assert encode_completion(tokenizer, [user("the")], "cat") == [CAT, EOS]
    byte_level = _byte_level()
    byte_level.chat_template = "{% for m in messages %}{{ m['content'] + eos_token + '\n' }}{% endfor %}"
    assert encode_completion(byte_level, [user("ab")], "cd") == [*byte_level("cd").input_ids, byte_level.eos_token_id]


def test_a_token_over_the_seam_does_not_join_prompt_and_answer():
    tokenizer = tiny_tokenizer()  # words are split at spaces: without one, "hello" and "dog" would be a single token
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    assert encode_completion(tokenizer, [user("the cat")], "dog") == [DOG, EOS]


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    with pytest.raises(UserError, match="writes the prompt otherwise"):
        encode_completion(tokenizer, [user("the")], "cat")


def test_template_and_kind_errors():
    with pytest.raises(UserError, match=r"no chat template.*chat_template, a file in Jinja"):
        encode_prompt(PLAIN, [user("the")])
    with pytest.raises(UserError, match="must be of one kind"):
        encode_completion(CHAT, "the", [assistant("cat")])
    refusing = tiny_tokenizer()
    refusing.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        encode_prompt(refusing, [user("the")])
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        encode_completion(endless, "the", "cat")


def test_padding():
    tokens, attention = left_padded([[1, 2, 3], [4]], pad=9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert attention.tolist() == [[True, True, True], [False, False, True]]
    tokens, attention = right_padded([[1, 2, 3], [4]], pad=9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert attention.tolist() == [[True, True, True], [True, False, False]]
    assert attention.dtype == torch.bool


def test_pieces_are_within_the_budget_with_padding_counted():
    assert pieces_within([5, 3, 2, 4, 1], 8) == [[0], [3, 1], [2, 4]]
    assert pieces_within([5, 3], None) == [[0, 1]]
    assert pieces_within([50, 3], 8) == [[0], [1]]


# --- readers ----------------------------------------------------------------------------------------------------


def test_prompts_pass_other_columns_through(tmp_path: Path):
    path = written(tmp_path, {"prompt": "the cat", "answer": 3}, {"prompt": [user("dog")], "answer": None})
    rows = read_prompts(path, CHAT, max_tokens=None, over_long="error")
    assert [tuple(row) for row in rows] == [
        ("the cat", [THE, CAT], {"answer": 3}),
        ([user("dog")], [USER, DOG, ASSISTANT], {"answer": None}),
    ]


def test_examples_in_three_forms(tmp_path: Path):
    def read(*rows: Any) -> list[Example]:
        return read_examples(written(tmp_path, *rows), CHAT, max_tokens=None, over_long="error")

    assert read({"prompt": "the", "completion": "cat runs"}) == [Example([THE, CAT, RUNS, EOS], 1)]
    assert read({"text": "the cat"}) == [Example([THE, CAT, EOS], 0)]
    talk = [user("the"), assistant("cat"), user("dog"), assistant("runs")]
    whole = [USER, THE, ASSISTANT, CAT, EOS, USER, DOG, ASSISTANT, RUNS, EOS]
    assert read({"messages": talk}) == [Example(whole, 8)]


def test_preferences(tmp_path: Path):
    path = written(
        tmp_path,
        {"prompt": "the", "chosen": "cat", "rejected": "dog runs", "margin": 2},
        {"prompt": [user("the")], "chosen": [assistant("dog")], "rejected": [assistant("cat")], "margin": None},
    )
    assert read_preferences(path, CHAT, max_tokens=None, over_long="error") == [
        Pair([THE, CAT, EOS], [THE, DOG, RUNS, EOS], 1, 2.0),
        Pair([USER, THE, ASSISTANT, DOG, EOS], [USER, THE, ASSISTANT, CAT, EOS], 3, 0.0),
    ]


def test_parquet_and_saved_folders_read_as_jsonl_does(tmp_path: Path):
    import datasets

    rows = [{"prompt": [user("the")], "number": 1}, {"prompt": [user("cat")], "number": 2}]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "data.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "several")
    assert read_rows(tmp_path / "data.parquet") == read_rows(tmp_path / "saved") == rows
    with pytest.raises(UserError, match="several sets: test"):
        read_rows(tmp_path / "several")
    with pytest.raises(UserError, match="save_to_disk"):
        read_rows(tmp_path)
    with pytest.raises(UserError, match="Parquet"):
        read_rows(written(tmp_path, "junk", name="junk.parquet"))
    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": " "}]).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"bad\.parquet, row 2, column 'prompt' is empty"):
        read_prompts(tmp_path / "bad.parquet", PLAIN, max_tokens=None, over_long="error")


# --- too long ---------------------------------------------------------------------------------------------------


def test_over_long_rows_are_an_error_by_default_and_counted(tmp_path: Path):
    path = written(tmp_path, {"prompt": "the cat runs"}, {"prompt": "the"}, {"prompt": "the cat runs ."})
    with pytest.raises(UserError, match=r"2 of 3 rows have more than max_prompt_tokens = 2 .*longest has 4.*Raise"):
        read_prompts(path, PLAIN, max_tokens=2, over_long="error")
    with pytest.warns(UserWarning, match="0 were truncated and 2 dropped"):
        assert [row.token_ids for row in read_prompts(path, PLAIN, max_tokens=2, over_long="drop")] == [[THE]]
    with pytest.warns(UserWarning, match="2 were truncated and 0 dropped"):
        rows = read_prompts(path, PLAIN, max_tokens=2, over_long="truncate")
    assert [row.token_ids for row in rows] == [[CAT, RUNS], [THE], [RUNS, STOP]]
    with pytest.raises(UserError, match="over_long is 'cut'"):
        read_prompts(path, PLAIN, max_tokens=2, over_long="cut")


def test_truncating_examples_keeps_the_beginning_and_drops_what_is_prompt_alone(tmp_path: Path):
    path = written(
        tmp_path, {"prompt": "the", "completion": "cat runs ."}, {"prompt": "the cat runs", "completion": "."}
    )
    with pytest.warns(UserWarning, match="1 were truncated and 1 dropped"):
        examples = read_examples(path, PLAIN, max_tokens=3, over_long="truncate")
    assert examples == [Example([THE, CAT, RUNS], 1)]
    with pytest.raises(UserError, match="no row is left"):
        read_examples(path, PLAIN, max_tokens=1, over_long="truncate")


def test_truncating_preferences_drops_pairs_that_become_alike(tmp_path: Path):
    path = written(
        tmp_path,
        {"prompt": "the", "chosen": "cat runs", "rejected": "cat ."},
        {"prompt": "the", "chosen": "cat", "rejected": "dog"},
    )
    with pytest.warns(UserWarning, match="2 were truncated"), pytest.warns(UserWarning, match="alike"):
        pairs = read_preferences(path, PLAIN, max_tokens=2, over_long="truncate")
    assert pairs == [Pair([THE, CAT], [THE, DOG], 1, 0.0)]


# --- bad files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"data\.jsonl is empty"),
        ([b"  "], r"data\.jsonl is empty"),
        (['{"prompt": "a"}', '{"prompt": '], r"data\.jsonl, line 2 is no JSON"),
        (['{"prompt": "a"}', "", '{"prompt": "a"}'], r"line 2 is no JSON: the line is empty"),
        ([b'{"prompt": "\xff"}'], r"line 1 is not UTF-8 \(byte 13"),
        (['["prompt"]'], r"line 1 is a list; it must be a JSON object"),
        ([{"promt": "a", "n": 1}], r"no column 'prompt'; it has 'promt', 'n'. Did you mean 'promt'"),
        ([{"prompt": "a"}, {"n": 1}], r"line 2 has nothing in column 'prompt'"),
        ([{"prompt": None}], r"line 1 has nothing in column 'prompt'"),
        ([{"prompt": " "}], r"line 1, column 'prompt' is empty"),
        ([{"prompt": 3}], r"line 1, column 'prompt' is a int; it must be text or a list of messages"),
        ([{"prompt": []}], r"line 1, column 'prompt' is an empty list"),
        ([{"prompt": [{"role": "user"}]}], r"line 1, column 'prompt': message 1 is .*role and content"),
        ([{"prompt": [user("the")]}], r"line 1: .*no chat template"),
    ],
)
def test_bad_prompts(tmp_path: Path, lines: list[Any], message: str):
    with pytest.raises(UserError, match=message):
        read_prompts(written(tmp_path, *lines), PLAIN, max_tokens=None, over_long="error")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": "a", "prompt": "a"}, r"no column 'completion'.*'messages' and 'text'.*mean 'completions'"),
        ({"prompt": "a", "completion": ""}, r"line 1, column 'completion' is empty"),
        ({"prompt": "", "completion": "a"}, r"line 1, column 'prompt' is empty"),
        ({"text": " "}, r"line 1, column 'text' is empty"),
        ({"text": 1}, r"column 'text' is a int"),
        ({"messages": "a"}, r"column 'messages' is a str"),
        ({"messages": [user("a")]}, r"the last message is by 'user'"),
        ({"messages": [assistant("a")]}, r"has one message"),
        ({"messages": [user("a"), assistant(" ")]}, r"the last message is empty"),
    ],
)
def test_bad_examples(tmp_path: Path, row: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        read_examples(written(tmp_path, row), CHAT, max_tokens=None, over_long="error")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "a"}, r"no column 'rejected'"),
        ({"rejected": "", "chosen": "a"}, r"line 1, column 'rejected' is empty"),
        ({"rejected": 1.5, "chosen": "a"}, r"column 'rejected' is a float"),
        ({"rejected": "the", "chosen": "the"}, r"in all 1 rows chosen and rejected are the same"),
        ({"rejected": "the", "chosen": "a", "margin": "big"}, r"line 1, column 'margin' is 'big'"),
        ({"rejected": "the", "chosen": "a", "margin": True}, r"column 'margin' is True"),
        ({"rejected": [assistant("the")], "chosen": [assistant("a")]}, r"line 1: .*one kind"),
        ({"rejected": [user("cat"), assistant("the")], "chosen": "a"}, r"begins with a message by 'user'"),
    ],
)
def test_bad_preferences(tmp_path: Path, row: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        read_preferences(written(tmp_path, {"prompt": "cat"} | row), CHAT, max_tokens=None, over_long="error")


def test_missing_files(tmp_path: Path):
    written(tmp_path, {"prompt": "a"})
    with pytest.raises(UserError, match=r"no data file .*dat\.jsonl.* Did you mean .*data\.jsonl"):
        read_rows(tmp_path / "dat.jsonl")
    with pytest.raises(UserError, match=r"ends in '\.csv'"):
        read_rows(written(tmp_path, "a,b", name="data.csv"))


def _byte_level() -> Any:
    """A tokenizer of bytes, which keeps line breaks."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({each: i for i, each in enumerate(["<eos>", *alphabet])}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
