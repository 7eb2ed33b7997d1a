"""Data for language models: rows from files, checked whole, and turned into tokens (`tokens.py` says how)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from proximo.collect.tokens import Prompt, encode_completion, encode_prompt, eos_of
from proximo.errors import UserError, nearest, one_of
from proximo.models.folders import INSTALL_LANGUAGE
from proximo.runs import files

OVER_LONG = ("error", "drop", "truncate")
"""What can be done with rows that have too many tokens."""


class DataNote(UserWarning):
    """Something about the data that does not stop anything, and that people should know."""


class PromptRow(NamedTuple):
    """A prompt to be answered."""

    prompt: Prompt
    token_ids: list[int]
    columns: dict[str, Any]
    """The other columns of its row."""


class Example(NamedTuple):
    """A text to be learned: a prompt and its completion."""

    token_ids: list[int]
    n_prompt: int
    """How many of the tokens are the prompt's."""


class Pair(NamedTuple):
    """Two answers to one prompt, each with the prompt before it."""

    chosen: list[int]
    rejected: list[int]
    n_prompt: int
    """How many tokens of each are the prompt's."""
    margin: float
    """By how much the chosen one is better, where the data says so; else 0."""


HIGHEST_MARGIN = 1e6
"""Scores stand around 0 with a spread of about 1: a margin above this is a mistake in the data."""

Row = TypeVar("Row")

# --- files ------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read every row of a `.jsonl` file, a `.parquet` file, or a folder that `datasets.save_to_disk` wrote.

    Raises:
        UserError: naming the file and, where there is one, the line that is broken.
    """
    try:
        is_there, is_folder = path.exists(), path.is_dir()
    except OSError as error:  # a name that is too long, or a folder that may not be looked into
        raise UserError(f"{path} cannot be read: {files.reason(error)}.") from error
    if is_folder:
        rows = _rows_of_folder(path)
    elif not is_there:
        alike = nearest(path.name, [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else [])
        hint = f" Did you mean {' or '.join(str(path.parent / name) for name in alike)}?" if alike else ""
        raise UserError(f"There is no data file {path}.{hint}")
    elif path.suffix.lower() == ".parquet":
        rows = _rows_of_parquet(path)
    elif path.suffix.lower() == ".jsonl":
        rows = _rows_of_jsonl(path)
    else:
        raise UserError(
            f"{path} ends in {path.suffix or 'nothing'!r}; data is read from .jsonl (a JSON object per line), "
            ".parquet, or a folder written by datasets.save_to_disk. Convert it, or rename it if it is one of these."
        )
    if not rows:
        raise UserError(f"{path} is empty: there is not one row to learn from.")
    return rows


def _rows_of_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        # Some editors put a mark in front, which is no part of the JSON.
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {files.reason(error)}.") from error
    rows = []
    for number, line in enumerate(lines if lines != [b""] else [], start=1):
        where = f"{path}, line {number}"
        try:
            row = files.parse_json(line)
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 (byte {error.start + 1} of the line). Save it as UTF-8.") from error
        except ValueError as error:
            said = "the line is empty" if not line.strip() else str(error)
            raise UserError(f"{where} is no JSON: {said}. Each line must hold one JSON object.") from error
        if not isinstance(row, dict):
            raise UserError(f'{where} is a {type(row).__name__}; it must be a JSON object, such as {{"prompt": ...}}.')
        if b"\\ud" in line.lower():
            _check_characters(where, row)
        rows.append(row)
    return rows


def _check_characters(where: str, row: dict[str, Any]) -> None:
    """Refuse halves of surrogate pairs, which JSON can write, and which are no text."""
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise UserError(
                f"{where}, column {name!r} holds {half}, half of a surrogate pair, which is no character. Take it out; "
                "a text that was cut in the middle of an emoji often ends so."
            ) from error


def _rows_of_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Parquet files need the extra 'language' ({error}). {INSTALL_LANGUAGE}") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:  # of many kinds, for a file that may hold anything: dates beyond the year 9999, say
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def _rows_of_folder(path: Path) -> list[dict[str, Any]]:
    if (path / "dataset_dict.json").exists():
        splits = sorted(each.name for each in path.iterdir() if each.is_dir())
        raise UserError(
            f"{path} holds several sets: {', '.join(splits)}. Name one of them, such as {path / splits[0]}."
            if splits
            else f"{path} is empty: it holds no set at all."
        )
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"Folders of data need the extra 'language' ({error}). {INSTALL_LANGUAGE}") from error
    try:
        return datasets.Dataset.load_from_disk(str(path)).to_list()
    except Exception as error:  # of many kinds, for a folder that may hold anything
        raise UserError(
            f"The folder {path} cannot be read as one that datasets.save_to_disk wrote "
            f"({type(error).__name__}: {error}). Name a .jsonl or .parquet file inside it, if there is one."
        ) from error


# --- readers ----------------------------------------------------------------------------------------------------


def read_prompts(
    path: Path, tokenizer: Any, *, max_tokens: int | None, over_long: str, setting: str = "max_prompt_tokens"
) -> list[PromptRow]:
    """Read the column `prompt`: text, or chat messages; all other columns are passed through.

    Args:
        path: as for `read_rows`.
        tokenizer: of the model that will answer.
        max_tokens: the most tokens that a prompt may have; None for any number.
        over_long: what to do with longer ones: "error", "drop", or "truncate" (their ends are kept).
        setting: how the person calls `max_tokens`, for messages.

    Raises:
        UserError: for anything that is wrong with any row.
    """
    rows = read_rows(path)
    _check_columns(path, rows, ("prompt",))

    def read(place: str, row: dict[str, Any]) -> PromptRow:
        prompt = _prompt_of(place, row)
        columns = {name: value for name, value in row.items() if name != "prompt"}
        return PromptRow(prompt, encode_prompt(tokenizer, prompt), columns)

    def cut(row: PromptRow, most: int) -> PromptRow:
        return row._replace(token_ids=row.token_ids[-most:])

    found = _each(path, rows, read)
    return _fitting(path, found, _Limit(max_tokens, over_long, setting), lambda row: len(row.token_ids), cut)


def read_examples(
    path: Path, tokenizer: Any, *, max_tokens: int | None, over_long: str, setting: str = "max_length"
) -> list[Example]:
    """Read texts to learn: the column `messages`, or `prompt` and `completion`, or `text`; the first that is there.

    The last of `messages` is the completion of those before it and must be by the assistant; `text` is all
    completion. Truncating keeps the beginning, without EOS; a row whose prompt alone is too long is dropped then.

    Args:
        path: as for `read_rows`.
        tokenizer: of the model that will learn.
        max_tokens: the most tokens that prompt and completion may have together; None for any number.
        over_long: what to do with longer ones: "error", "drop", "truncate".
        setting: how the person calls `max_tokens`, for messages.

    Raises:
        UserError: for anything that is wrong with any row.
    """
    rows = read_rows(path)
    present = set().union(*rows)
    if "messages" in present:
        _check_columns(path, rows, ("messages",))
        read = _example_of_messages
    elif "text" in present and not {"prompt", "completion"} <= present:
        _check_columns(path, rows, ("text",))
        read = _example_of_text
    else:
        _check_columns(path, rows, ("prompt", "completion"), others="; or one of the columns 'messages' and 'text'")
        read = _example_of_completion

    def cut(example: Example, most: int) -> Example | None:
        return example._replace(token_ids=example.token_ids[:most]) if example.n_prompt < most else None

    found = _each(path, rows, lambda place, row: read(tokenizer, place, row))
    return _fitting(path, found, _Limit(max_tokens, over_long, setting), lambda row: len(row.token_ids), cut)


def read_preferences(
    path: Path, tokenizer: Any, *, max_tokens: int | None, over_long: str, setting: str = "max_length"
) -> list[Pair]:
    """Read preferences: the columns `prompt`, `chosen` and `rejected`, text or messages, and `margin` if there is one.

    Pairs of equal answers say nothing: they are dropped, with a warning.

    Args:
        path: as for `read_rows`.
        tokenizer: of the model that will learn.
        max_tokens: the most tokens that a prompt and an answer may have together; None for any number.
        over_long: what to do with longer ones: "error", "drop", "truncate" (their beginnings are kept).
        setting: how the person calls `max_tokens`, for messages.

    Raises:
        UserError: for anything that is wrong with any row.
    """
    rows = read_rows(path)
    _check_columns(path, rows, ("prompt", "chosen", "rejected"))

    def read(place: str, row: dict[str, Any]) -> Pair:
        prompt = _prompt_of(place, row)
        ids = encode_prompt(tokenizer, prompt)
        chosen, rejected = (
            ids + encode_completion(tokenizer, prompt, _completion_of(place, row, name))
            for name in ("chosen", "rejected")
        )
        return Pair(chosen, rejected, len(ids), _margin_of(place, row))

    def cut(pair: Pair, most: int) -> Pair | None:
        if pair.n_prompt >= most:
            return None
        return pair._replace(chosen=pair.chosen[:most], rejected=pair.rejected[:most])

    def longest(pair: Pair) -> int:
        return max(len(pair.chosen), len(pair.rejected))

    pairs = _fitting(path, _each(path, rows, read), _Limit(max_tokens, over_long, setting), longest, cut)
    different = [pair for pair in pairs if pair.chosen != pair.rejected]
    if not different:
        raise UserError(f"{path}: in all {len(pairs)} rows chosen and rejected are the same. Is a column doubled?")
    if len(different) < len(pairs):
        _note(f"{path}: {len(pairs) - len(different)} of {len(pairs)} rows have chosen and rejected alike; dropped.")
    return different


def _each(path: Path, rows: list[dict[str, Any]], read: Callable[[str, dict[str, Any]], Row]) -> list[Row]:
    """Read every row; errors that do not know their place get it."""
    found = []
    for number, row in enumerate(rows, start=1):
        place = f"{path}, {'line' if path.suffix.lower() == '.jsonl' else 'row'} {number}"
        try:
            found.append(read(place, row))
        except UserError as error:
            if str(error).startswith(place):
                raise
            raise UserError(f"{place}: {error}") from error
    return found


class _Limit(NamedTuple):
    """How long rows may be, what happens to longer ones, and what the person calls the limit."""

    max_tokens: int | None
    over_long: str
    setting: str


def _fitting(
    path: Path,
    rows: list[Row],
    limit: _Limit,
    length: Callable[[Row], int],
    cut: Callable[[Row, int], Row | None],
) -> list[Row]:
    """Return the rows within the limit, and the others as `over_long` says; `cut` gives None where nothing is left."""
    one_of("over_long", limit.over_long, OVER_LONG)
    most = limit.max_tokens
    lengths = [length(row) for row in rows]
    n_over = sum(most is not None and each > most for each in lengths)
    if most is None or not n_over:
        return rows
    what = f"{path}: {n_over} of {len(rows)} rows have more than {limit.setting} = {most} tokens; the longest has"
    if limit.over_long == "error":
        raise UserError(
            f"{what} {max(lengths)}. Raise {limit.setting}, as far as the model's context goes, or set over_long to "
            "drop or truncate."
        )
    fit: list[Row] = []
    for row, each in zip(rows, lengths, strict=True):
        shorter = row if each <= most else (cut(row, most) if limit.over_long == "truncate" else None)
        if shorter is not None:
            fit.append(shorter)
    if not fit:
        raise UserError(
            f"{what} {max(lengths)}, and no row is left. Shorten the texts, or raise {limit.setting}, as far as the "
            "model's context goes."
        )
    n_dropped = len(rows) - len(fit)
    _note(f"{what} {max(lengths)}. {n_over - n_dropped} were truncated and {n_dropped} dropped.")
    return fit


def _note(message: str) -> None:
    warnings.warn(message, DataNote, stacklevel=4)


# --- rows -------------------------------------------------------------------------------------------------------


def _check_columns(path: Path, rows: list[dict[str, Any]], wanted: Iterable[str], others: str = "") -> None:
    present = list(dict.fromkeys(name for row in rows for name in row))
    for name in wanted:
        if name not in present:
            alike = nearest(name, present, count=1)
            hint = f" Did you mean {alike[0]!r}? Rename that column." if alike else " Rename the one that it should be."
            listed = ", ".join(map(repr, present)) or "none at all"
            raise UserError(f"{path} has no column {name!r}{others}; it has {listed}.{hint}")


def _value(place: str, row: dict[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise UserError(f"{place} has nothing in column {column!r}. Fill it in, or delete the row.")
    return row[column]


def _messages(place: str, column: str, value: Any) -> list[dict[str, str]]:
    """Check chat messages; only their role and content are kept."""
    if not isinstance(value, list) or not value:
        said = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise UserError(f"{place}, column {column!r} is {said}; it must be a list of messages.")
    for index, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(
                f"{place}, column {column!r}: message {index} is {str(message)[:80]}; a message is an object with the "
                'texts role and content, such as {"role": "user", "content": "hello"}.'
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _prompt_of(place: str, row: dict[str, Any]) -> Prompt:
    value = _value(place, row, "prompt")
    if not isinstance(value, str):
        if not isinstance(value, list):
            kind = type(value).__name__
            raise UserError(f"{place}, column 'prompt' is a {kind}; it must be text or a list of messages.")
        return _messages(place, "prompt", value)
    if not value.strip():
        raise UserError(f"{place}, column 'prompt' is empty. Fill it in, or delete the row.")
    return value


def _completion_of(place: str, row: dict[str, Any], column: str) -> str | list[dict[str, str]]:
    value = _value(place, row, column)
    if isinstance(value, str):
        content = value
    elif isinstance(value, list):
        value = _messages(place, column, value)
        if value[0]["role"] != "assistant":
            raise UserError(
                f"{place}, column {column!r} begins with a message by {value[0]['role']!r}. Leave out the prompt: only "
                "what the assistant says after it belongs here."
            )
        content = value[-1]["content"]
    else:
        kind = type(value).__name__
        raise UserError(f"{place}, column {column!r} is a {kind}; it must be text or a list of messages.")
    if not content.strip():
        raise UserError(f"{place}, column {column!r} is empty. Fill it in, or delete the row.")
    return value


def _margin_of(place: str, row: dict[str, Any]) -> float:
    value = row.get("margin")
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= HIGHEST_MARGIN:
        raise UserError(
            f"{place}, column 'margin' is {value!r}; it must be a finite number, from {-HIGHEST_MARGIN:g} to "
            f"{HIGHEST_MARGIN:g}. Margins are in the units of scores, of which the spread is about 1."
        )
    return float(value)


def _example(tokenizer: Any, prompt: Prompt, completion: str | list[dict[str, str]]) -> Example:
    ids = encode_prompt(tokenizer, prompt)
    return Example(ids + encode_completion(tokenizer, prompt, completion), len(ids))


def _example_of_messages(tokenizer: Any, place: str, row: dict[str, Any]) -> Example:
    messages = _messages(place, "messages", _value(place, row, "messages"))
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{place}, column 'messages': the last message is by {messages[-1]['role']!r}; it must be by 'assistant', "
            "since it is what is learned."
        )
    if len(messages) < 2:
        raise UserError(f"{place}, column 'messages' has one message; there must be one before the assistant's.")
    if not messages[-1]["content"].strip():
        raise UserError(f"{place}, column 'messages': the last message is empty. Fill it in, or delete the row.")
    return _example(tokenizer, messages[:-1], messages[-1:])


def _example_of_completion(tokenizer: Any, place: str, row: dict[str, Any]) -> Example:
    return _example(tokenizer, _prompt_of(place, row), _completion_of(place, row, "completion"))


def _example_of_text(tokenizer: Any, place: str, row: dict[str, Any]) -> Example:
    text = _value(place, row, "text")
    if not isinstance(text, str):
        raise UserError(f"{place}, column 'text' is a {type(text).__name__}; it must be text.")
    if not text.strip():
        raise UserError(f"{place}, column 'text' is empty. Fill it in, or delete the row.")
    return Example([*encode_prompt(tokenizer, text), eos_of(tokenizer)], 0)
