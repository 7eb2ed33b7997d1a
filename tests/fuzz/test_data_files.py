"""Files of data as bad as they come: each is read as it is meant, or refused with its name and its line."""

from __future__ import annotations

import gzip
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proximo.collect.data import read_examples, read_preferences, read_prompts
from proximo.collect.tokens import encode_completion, encode_prompt
from proximo.errors import UserError
from tests.fuzz.examples import examples, values
from tests.tiny_language import WORDS, tiny_tokenizer

PLAIN, CHAT = tiny_tokenizer(), tiny_tokenizer(chat=True)
READERS: dict[str, Callable[..., list[Any]]] = {
    "prompts": read_prompts,
    "examples": read_examples,
    "preferences": read_preferences,
}
EVERY = pytest.mark.parametrize("reader", READERS)
GOOD = {"prompt": "the cat", "completion": "sleeps .", "chosen": "runs", "rejected": "eats ."}
GOOD_LINE = json.dumps(GOOD).encode()


def read(reader: str, path: Path, tokenizer: Any = PLAIN, **limits: Any) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return READERS[reader](path, tokenizer, **({"max_tokens": None, "over_long": "error"} | limits))


def refusal(reader: str, path: Path, tokenizer: Any = PLAIN) -> str:
    with pytest.raises(UserError) as caught:
        read(reader, path, tokenizer)
    return str(caught.value)


def written(folder: Path, data: bytes, name: str = "data.jsonl") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


# --- anything ---------------------------------------------------------------------------------------------------

messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", ""]), "content": st.text(max_size=4)}
    )
    | values,
    max_size=3,
)
cells = values | messages | st.sampled_from(["the cat", " ", "\u2028", "<eos>", "\ufeff", "a\u0000b"])
columns = st.sampled_from(["prompt", "completion", "text", "messages", "chosen", "rejected", "margin", "more"])
rows = st.dictionaries(columns | st.text(max_size=2), cells, max_size=5) | st.builds(
    lambda row: GOOD | row, st.dictionaries(columns, cells, max_size=1)
)


def as_json(value: Any) -> bytes:
    """JSON as other programs write it: also what is none."""
    try:
        return json.dumps(value).encode()
    except ValueError:  # an integer of too many digits for Python
        return b'{"prompt": ' + b"9" * 5000 + b"}"


lines = (
    rows.map(as_json)
    | values.map(as_json)
    | st.sampled_from([GOOD_LINE, b"", b" ", b"\r", b"\xef\xbb\xbf", b"\xff", b'{"prompt": "\xed\xa0\x80"}', b"\0"])
    | st.binary(max_size=8)
)


@examples(300)
@given(
    file=st.lists(lines, max_size=4),
    end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    mark=st.sampled_from([b"", b"", b"\xef\xbb\xbf"]),
    cut=st.none() | st.integers(0, 60),
    reader=st.sampled_from(sorted(READERS)),
    chats=st.booleans(),
)
def test_anything_is_read_or_refused_with_its_name(file, end, mark, cut, reader, chats):
    data = mark + end.join(file)
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), data if cut is None else data[:cut])
        try:
            found = read(reader, path, CHAT if chats else PLAIN)
        except UserError as error:
            said = str(error)
            assert said.startswith(str(path))
            assert len(said) < 2000
            number = re.match(r", line (\d+)", said.removeprefix(str(path)))
            assert number is None or 1 <= int(number[1]) <= data.count(b"\n") + 1
        else:
            assert 1 <= len(found) <= data.count(b"\n") + 1


@examples(150)
@given(
    texts=st.lists(st.tuples(*[st.sampled_from(WORDS)] * 3), min_size=1, max_size=4),
    end=st.sampled_from([b"\n", b"\r\n", b" \n", b"\n\n\n"]),
    mark=st.booleans(),
    ascii_only=st.booleans(),
    extra=st.dictionaries(
        st.text(max_size=3).filter(lambda name: name not in ("text", "messages")), values, max_size=2
    ),
)
def test_what_is_sound_is_read_as_it_is_meant(texts, end, mark, ascii_only, extra):
    if b"\\ud" in as_json(extra).lower() or b"NaN" in as_json(extra) or b"Infinity" in as_json(extra):
        extra = {}
    written_rows = [extra | {"prompt": f"{a} é😀 {b}", "completion": f"{c} ."} for a, b, c in texts]
    between = b"\n" if end == b"\n\n\n" else end  # blank lines are allowed at the end of the file alone
    data = between.join(json.dumps(row, ensure_ascii=ascii_only).encode() for row in written_rows) + end
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), b"\xef\xbb\xbf" * mark + data)
        found = read("examples", path)
        prompts = read("prompts", path)
    for row, example, prompt in zip(written_rows, found, prompts, strict=True):
        ids = encode_prompt(PLAIN, row["prompt"])
        assert example.token_ids == ids + encode_completion(PLAIN, row["prompt"], row["completion"])
        assert (prompt.prompt, prompt.token_ids) == (row["prompt"], ids)
        assert prompt.columns == {name: value for name, value in row.items() if name != "prompt"}


# --- by hand ----------------------------------------------------------------------------------------------------

BAD_LINES = {
    "cut in the middle of a character": '{"prompt": "é"}'.encode()[:13],
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "Latin-1": b'{"prompt": "\xe9"}',
    "a surrogate as bytes": b'{"prompt": "\xed\xa0\x80"}',
    "half a surrogate pair": GOOD_LINE[:-1] + b', "more": "\\ud83d"}',
    "half a pair in a name": GOOD_LINE[:-1] + b', "\\uD83D": 1}',
    "half a pair deep inside": GOOD_LINE[:-1] + b', "more": [[{"a": ["\\udfff"]}]]}',
    "NaN": GOOD_LINE[:-1] + b', "more": NaN}',
    "a number of thousands of digits": GOOD_LINE[:-1] + b', "more": ' + b"9" * 5000 + b"}",
    "brackets without end": b"[" * 100_000,
    "objects without end": b'{"a":' * 100_000,
    "two objects": GOOD_LINE + GOOD_LINE,
    "a comment": b"// rows follow",
    "single quotes": b"{'prompt': 'the cat'}",
    "a comma at the end": GOOD_LINE[:-1] + b",}",
    "an array": b"[" + GOOD_LINE + b"]",
    "text": b'"prompt"',
    "null": b"null",
    "NUL": b"\0\0\0\0",
    "a line break in text": b'{"prompt": "the\tcat"}',
    "gzip": gzip.compress(GOOD_LINE),
    "an ELF header": b"\x7fELF\x02\x01\x01",
    "all columns null": json.dumps(dict.fromkeys(GOOD)).encode(),
    "all columns lists": json.dumps({name: [[["the"]]] for name in GOOD}).encode(),
    "all columns numbers": json.dumps(dict.fromkeys(GOOD, 10**400)).encode(),
    "all columns empty": json.dumps(dict.fromkeys(GOOD, "")).encode(),
    "all columns objects": json.dumps({name: {"role": "user", "content": "the"} for name in GOOD}).encode(),
    "no columns": b"{}",
    "the last of two keys counts": GOOD_LINE[:-1] + b', "prompt": null}',
    "deep within the limit": GOOD_LINE[:-1] + b', "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    "deep within the limit, and half a pair": GOOD_LINE[:-1]
    + b', "m": '
    + b"[" * 900
    + b'"\\ud800"'
    + b"]" * 900
    + b"}",
}


@EVERY
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_among_good_ones_is_named(reader: str, name: str, tmp_path: Path):
    path = written(tmp_path, b"\n".join([GOOD_LINE, GOOD_LINE, BAD_LINES[name], GOOD_LINE]))
    said = refusal(reader, path)
    assert said.startswith(f"{path}, line 3")
    assert len(said) < 2000


@EVERY
def test_a_blank_line_among_others_is_named_and_one_at_the_end_is_none(reader: str, tmp_path: Path):
    for blank in (b"", b"  \t", b"\r"):
        path = written(tmp_path, b"\n".join([GOOD_LINE, blank, GOOD_LINE]))
        assert refusal(reader, path).startswith(f"{path}, line 2 is no JSON: the line is empty")
        path = written(tmp_path, b"\n".join([GOOD_LINE, GOOD_LINE, blank, blank, b""]))
        assert len(read(reader, path)) == 2


@EVERY
@pytest.mark.parametrize("data", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_a_file_of_nothing_is_empty(reader: str, data: bytes, tmp_path: Path):
    path = written(tmp_path, data)
    assert refusal(reader, path).startswith(f"{path} is empty")


def test_a_line_of_ten_megabytes_is_a_line(tmp_path: Path):
    long = json.dumps(GOOD | {"more": "x" * 10_000_000, "prompt": "the cat " * 1000}).encode()
    path = written(tmp_path, GOOD_LINE + b"\n" + long)
    assert [len(row.token_ids) for row in read("prompts", path)] == [2, 2000]
    for bad in (long[:-1], b'"' + b"x" * 10_000_000 + b'"', b'{"prompt": ["' + b"x" * 10_000_000 + b'"]}'):
        said = refusal("prompts", written(tmp_path, GOOD_LINE + b"\n" + bad))
        assert said.startswith(f"{path}, line 2")
        assert len(said) < 2000


def parquet(folder: Path, table: Any, name: str = "data.parquet") -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, folder / name)
    return folder / name


@EVERY
def test_a_parquet_file_is_whole_or_refused(reader: str, tmp_path: Path):
    import pyarrow

    path = parquet(tmp_path, pyarrow.Table.from_pylist([GOOD] * 3))
    assert len(read(reader, path)) == 3
    data = path.read_bytes()
    for damaged in (
        b"",
        b"PAR1",
        data[:4],
        data[4:],
        data[:-1],
        data[: len(data) // 2],
        data[:-8] + b"\xff" * 8,
        b"x" * 99,
    ):
        path.write_bytes(damaged)
        assert str(path) in refusal(reader, path)


@EVERY
def test_what_parquet_holds_and_texts_do_not_is_refused(reader: str, tmp_path: Path):
    import pyarrow

    def column(of: Any) -> Any:
        return pyarrow.table(dict.fromkeys(GOOD, of))

    tables = {
        "dates": column(pyarrow.array([2**62], pyarrow.timestamp("us"))),
        "bytes": column(pyarrow.array([b"\xff"])),
        "no UTF-8": column(pyarrow.array([b"\xff"]).view(pyarrow.string())),
        "twice": pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"]),
        "nulls": column(pyarrow.nulls(2)),
        "nothing": column(pyarrow.array([], pyarrow.string())),
        "numbers": column(pyarrow.array([1.5])),
        "objects": column(pyarrow.array([{"role": "user", "content": "a"}])),
    }
    for name, table in tables.items():
        path = parquet(tmp_path, table, f"{name}.parquet")
        assert str(path) in refusal(reader, path)


@EVERY
@pytest.mark.parametrize(
    "name",
    ["a\0b.jsonl", "\ud800.jsonl", "x" * 5000 + ".jsonl", "data.jsonl/inner.jsonl", "", ".", "/", "data.jsonl.gz"],
)
def test_names_of_no_file_are_refused(reader: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, GOOD_LINE)
    written(tmp_path, gzip.compress(GOOD_LINE), "data.jsonl.gz")
    assert refusal(reader, Path(name))


@EVERY
def test_folders_of_anything_are_refused(reader: str, tmp_path: Path):
    for name in ("data.jsonl", "data.parquet", "saved"):
        folder = tmp_path / name
        folder.mkdir()
        assert str(folder) in refusal(reader, folder)
        for file in ("dataset_info.json", "state.json", "data-00000-of-00001.arrow", "dataset_dict.json"):
            (folder / file).write_bytes(b"[]" if file.endswith("json") else b"\xff\0")
            assert str(folder) in refusal(reader, folder)
