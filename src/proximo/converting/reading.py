"""Files of settings from strangers, read so that nothing in them is run or can fill the memory."""

from __future__ import annotations

import ast
import datetime
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from proximo.errors import UserError, shown

MOST_BYTES = 2_000_000
MOST_VALUES = 50_000
"""Values in a file, those that its aliases repeat counted each time."""
MOST_LEVELS = 20
"""Tables and lists within each other; settings are a few levels deep."""

YAML_EXTRA = "convert"


def read_mapping(path: Path) -> dict[str, Any]:
    """The settings in a YAML or JSON file; keys become text.

    Raises:
        UserError: where the file cannot be read, is neither, or holds something else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{visible(path)} cannot be read: {error.strerror}.") from error
    if len(data) > MOST_BYTES:
        raise UserError(
            f"{visible(path)} is larger than {MOST_BYTES:,} bytes, which no file of settings is. Give that one."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{visible(path)} is no text in UTF-8 ({error.reason}). It must be YAML or JSON.") from error
    found = _json(path, text) if path.suffix.lower() == ".json" or text.lstrip()[:1] == "{" else _yaml(path, text)
    if _is_too_deep(found):
        raise _too_deep(path)
    if found is None or found == {}:
        raise UserError(f"{visible(path)} is empty. It must hold settings by their names, such as `gamma: 0.99`.")
    if not isinstance(found, dict):
        raise UserError(f"{visible(path)} holds {shown(found)}, not settings by their names, such as `gamma: 0.99`.")
    return {str(name): _plain(path, value) for name, value in found.items()}


def _plain(path: Path, value: Any) -> Any:
    """A value as JSON has them; a date becomes text."""
    if isinstance(value, dict):
        return {name: _plain(path, each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(path, each) for each in value]
    if isinstance(value, datetime.date):  # a datetime is one
        return value.isoformat()
    if isinstance(value, (bytes, set)):
        raise UserError(
            f"{visible(path)} holds {visible(shown(value))}, of type {type(value).__name__}, for which settings have "
            "no word. Write it as a number, a text or a list."
        )
    return value


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:
        if path.suffix.lower() != ".json":  # a flow mapping of YAML also begins with a brace
            return _yaml(path, text)
        raise UserError(f"{visible(path)} is no JSON: {error}.") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of JSON; raises ValueError where a name stands in it twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"{visible(Counter(name for name, _ in pairs).most_common(1)[0][0])} stands in it twice")
    return table


def _yaml(path: Path, text: str) -> Any:
    """What a YAML file holds: plain values alone, which aliases do not multiply beyond measure."""
    try:
        import yaml  # noqa: TID251  # other libraries keep settings in it; the safe loader makes plain values alone
    except ImportError as error:
        from proximo.doctor import install_command

        raise UserError(f"{visible(path)} is YAML, which needs PyYAML: {install_command(YAML_EXTRA)}") from error
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_VALUES:
            raise UserError(
                f"{visible(path)} comes to more than {MOST_VALUES:,} values, which no file of settings does."
            )
        if (repeated := _repeated(node, set())) is not None:
            raise UserError(f"{visible(path)} has {visible(repeated)} twice in one table. Take out the wrong one.")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise UserError(f"{visible(path)} is no YAML of plain values: {visible(said)}.") from error
    except RecursionError as error:
        raise _too_deep(path) from error
    except (ValueError, OverflowError, TypeError) as error:  # a date that there is not, a key that is a list
        raise UserError(f"{visible(path)} holds a value that cannot be read: {visible(str(error))}.") from error
    finally:
        loader.dispose()


def _size(node: Any, known: dict[int, int]) -> int:
    """Values under a node of YAML with all its aliases written out; one that holds itself goes on for ever."""
    if id(node) not in known:
        inside = node.value if isinstance(node.value, list) else []
        parts = [part for each in inside for part in (each if isinstance(each, tuple) else (each,))]
        known[id(node)] = MOST_VALUES  # what holds itself finds this
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _repeated(node: Any, seen: set[int]) -> str | None:
    """A name that stands in a table twice; None if there is none."""
    if id(node) in seen or not isinstance(node.value, list):
        return None
    seen.add(id(node))
    is_table = any(isinstance(each, tuple) for each in node.value)
    names = Counter(key.value for key, _ in node.value if isinstance(key.value, str)) if is_table else Counter()
    twice = next((name for name, count in names.most_common(1) if count > 1), None)
    parts = [part for _, part in node.value] if is_table else node.value
    return twice or next((found for part in parts if (found := _repeated(part, seen)) is not None), None)


def _is_too_deep(value: Any) -> bool:
    """Whether there are more than `MOST_LEVELS` tables and lists within each other."""
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        level = [part for each in level for part in _parts(each)]
        if not level:
            return False
    return True


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, (list, tuple, set)) else []


def _too_deep(path: Path) -> UserError:
    return UserError(
        f"{visible(path)} is nested too deeply, or holds itself: there may be {MOST_LEVELS} levels, and "
        "settings have a few."
    )


def visible(text: object) -> str:
    """A name or text from a stranger's file as it may stand in a message: nothing that moves a terminal's cursor."""
    said = str(text)
    said = said if len(said) <= _LONGEST_NAME else f"{said[:_LONGEST_NAME]}..."
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in said)


_LONGEST_NAME = 400


# --- values ---------------------------------------------------------------------------------------------------


def number(name: str, value: Any) -> float:
    """A number, also one that is written as text: YAML takes `3e-4` for a word.

    Raises:
        UserError: with the name and the value.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{name} is {shown(value)}; it must be a number.")
    return found


def whole(name: str, value: Any) -> int:
    """A whole number, also one that is written `1e6`."""
    found = number(name, value)
    if not found.is_integer():
        raise UserError(f"{name} is {shown(value)}; it must be a whole number.")
    return int(found)


def count(name: str, value: Any) -> int:
    """A whole number from 1 on."""
    found = whole(name, value)
    if found < 1:
        raise UserError(f"{name} is {found}; it must be at least 1.")
    return found


def without_none(value: Any) -> Any:
    """A table without the names that have no value, for which TOML has no word."""
    if isinstance(value, dict):
        return {str(name): without_none(each) for name, each in value.items() if each is not None}
    return [without_none(each) for each in value if each is not None] if isinstance(value, list) else value


def truth(name: str, value: Any) -> bool:
    """Yes or no."""
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise UserError(f"{name} is {shown(value)}; it must be true or false.")


class Word(str):
    """A name in an expression, such as `nn.ReLU`: nothing is looked up."""


def expression(name: str, value: Any) -> dict[str, Any]:
    """What RL Zoo's text such as "dict(log_std_init=-2, activation_fn=nn.ReLU)" says; no code in it is run.

    Raises:
        UserError: where there is more in it than names, numbers, texts, lists and dicts.
    """
    if isinstance(value, dict):
        return {str(key): each for key, each in value.items()}
    if not isinstance(value, str):
        raise UserError(f'{name} is {shown(value)}; it must be a table, or a text such as "dict(ortho_init=False)".')
    try:
        found = _value(ast.parse(" ".join(value.split()), mode="eval").body)
        if _is_too_deep(found):
            raise ValueError(f"it has more than {MOST_LEVELS} levels")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{name} is {shown(value)}, which is more than names and plain values ({error}). Nothing of it was run. "
            'It looks like "dict(net_arch=[64, 64], activation_fn=nn.ReLU)".'
        ) from error
    if not isinstance(found, dict):
        raise UserError(f'{name} is {shown(value)}; it must say names and values, such as "dict(ortho_init=False)".')
    return found


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool, type(None))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        inner = _value(node.operand)
        if isinstance(inner, (int, float)):
            return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_value(key) for key in node.keys if key is not None]
        return dict(zip(map(str, keys), map(_value, node.values), strict=True))
    if isinstance(node, (ast.Name, ast.Attribute)):
        return Word(ast.unparse(node))
    is_dict = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict"
    if isinstance(node, ast.Call) and is_dict and not node.args and all(word.arg for word in node.keywords):
        return {str(word.arg): _value(word.value) for word in node.keywords}
    raise ValueError(f"{ast.unparse(node)[:80]!r} is none")
