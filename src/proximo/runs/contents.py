"""What a checkpoint can hold, into bytes and back: tensors as safetensors, everything else as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import safetensors.torch
import torch

from proximo.errors import UserError
from proximo.runs import files
from proximo.runs.manifest import STATE_NAME, is_stem

Tensors = dict[str, dict[str, torch.Tensor]]
"""The name of each tensor file, without its suffix, to the tensors in it."""

_DTYPES = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
    }
)


def check_tensors(tensors: Tensors) -> None:
    """Raise TypeError or ValueError for names and tensors that safetensors cannot hold."""
    for stem, group in tensors.items():
        if not is_stem(stem):
            raise ValueError(f"{stem!r} cannot name a file of a checkpoint: use letters, digits, _ and -")
        for key, tensor in group.items():
            where = f"tensor {key!r} of {stem!r}"
            if not isinstance(key, str) or key == "__metadata__":
                raise ValueError(f"{where}: the name must be a string, and not __metadata__")
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{where} is a {type(tensor).__name__}, not a tensor")
            if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
                raise TypeError(
                    f"{where} ({tensor.dtype}, {tensor.layout}, {tensor.device}) has no form in safetensors"
                )


def check_state(value: object, where: str = "state") -> None:
    """Raise TypeError for what JSON would change on its way: tuples, keys that are not strings, objects."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: JSON would make it a string; use strings")
            check_state(item, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_state(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(
            f"{where} is a {type(value).__name__}: a checkpoint's state holds numbers, strings, lists, "
            "dicts, booleans and None. Convert it, or save it as a tensor"
        )


def take_counters(state: object, described: dict[str, Any], names: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Give a state's counters the values that a checkpoint has for them; the `optional` ones may be None.

    Raises KeyError or ValueError for what is not there, and what is no number of the kind that the state has.
    """
    for name in names:
        value = described[name]
        kind = int if isinstance(getattr(state, name), int) else int | float
        is_one = isinstance(value, kind) and not isinstance(value, bool)
        is_one = is_one and (0 <= value < 2**63 if kind is int else abs(value) <= sys.float_info.max)
        if not (is_one or (value is None and name in optional)):
            raise ValueError(f"its {name} is {value!r}")
        setattr(state, name, value)


def tensors_bytes(group: dict[str, torch.Tensor]) -> bytes:
    """Return the content of one safetensors file."""
    return safetensors.torch.save({key: _owned(tensor) for key, tensor in group.items()})


def state_bytes(state: dict[str, Any]) -> bytes:
    """Return the content of `state.json`; NaN and infinity get the names that Python's JSON reader knows."""
    return (json.dumps(state) + "\n").encode()


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous CPU copy: safetensors refuses views and tensors that share memory."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format)


def parse_state(data: bytes) -> dict[str, Any]:
    """Read the content of `state.json`; raise UserError if it is not an object of JSON."""
    try:
        state = files.parse_json(data, allow_nan=True)
    except ValueError as error:
        raise UserError(f"{STATE_NAME} is no JSON: {error}") from None
    if not isinstance(state, dict):
        raise UserError(f"{STATE_NAME} holds a {type(state).__name__} where an object belongs")
    return state


def parse_tensors(name: str, data: bytes) -> dict[str, torch.Tensor]:
    """Read the content of one safetensors file; raise UserError if it is none."""
    try:
        loaded = safetensors.torch.load(data)
        # Out of the reader's buffer, into memory that torch allocated and aligned as in the first run.
        return {key: tensor.clone() for key, tensor in loaded.items()}
    except Exception as error:
        # The file may be a stranger's: the reader raises errors of many kinds, and none is our mistake.
        raise UserError(f"{name} is no readable safetensors file ({type(error).__name__}: {error})") from error
