"""Spaces as plain JSON values, so that a saved policy knows its spaces without making its environment."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from proximo.errors import UserError


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """Describe a Box or Discrete space in JSON-able values; infinities are words."""
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.Box):
        return {
            "kind": "Box",
            "shape": list(space.shape),
            "dtype": str(space.dtype),
            "low": _bound_to_json(space.low),
            "high": _bound_to_json(space.high),
        }
    raise UserError(f"The space {space} cannot be saved; Box and Discrete can.")


def space_from_json(value: dict[str, Any]) -> spaces.Space:
    """Rebuild a space that `space_to_json` described.

    Raises:
        UserError: if the description is not one.
    """
    try:
        if value["kind"] == "Discrete":
            return spaces.Discrete(int(value["n"]), start=int(value["start"]))
        if value["kind"] == "Box":
            shape = tuple(int(size) for size in value["shape"])
            dtype = np.dtype(value["dtype"])
            low, high = (_bound_from_json(value[key], shape, dtype) for key in ("low", "high"))
            return spaces.Box(low, high, shape, dtype.type)
    except (KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"The checkpoint describes a space that cannot be rebuilt: {value!r} ({error})") from error
    raise UserError(f"The checkpoint describes a space of unknown kind: {value!r}")


def _bound_to_json(bound: np.ndarray) -> list[float | int | str]:
    """One value where all are the same, else every one, flat; infinities as words, integers exactly."""
    flat = bound.ravel()
    if flat.size and (flat == flat[0]).all():
        flat = flat[:1]
    if flat.dtype.kind in "iub":
        return [int(x) for x in flat]
    return [float(x) if np.isfinite(x) else str(float(x)) for x in flat]


def _bound_from_json(value: list[float | int | str], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    numbers = np.array([x if isinstance(x, int) else float(x) for x in value], dtype)
    return np.full(shape, numbers[0], dtype) if numbers.size == 1 else numbers.reshape(shape)
