"""Spaces as plain JSON values, so that a saved policy knows its spaces without making its environment."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from proximo.errors import UserError
from proximo.models.packing import PackedActions, PackedObservations


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """Describe a space in JSON-able values; infinities are words.

    Raises:
        UserError: if it is of a kind that no policy has.
    """
    if isinstance(space, PackedObservations):
        described = space_to_json(space.source)
        masks = {"options": list(space.options), "mask_is_observed": space.mask_is_observed}
        return {"kind": "PackedObservations", "source": described, **masks}
    if isinstance(space, PackedActions):
        return {"kind": "PackedActions", "source": space_to_json(space.source)}
    if isinstance(space, spaces.Dict):
        if wrong := [key for key in space.spaces if not isinstance(key, str)]:
            raise UserError(f"The key {wrong[0]!r} of {space} is no string, and so cannot be saved. Use strings.")
        return {"kind": "Dict", "spaces": {key: space_to_json(inner) for key, inner in space.spaces.items()}}
    if isinstance(space, spaces.Tuple):
        return {"kind": "Tuple", "spaces": [space_to_json(inner) for inner in space.spaces]}
    if isinstance(space, spaces.MultiDiscrete):
        numbers = {"nvec": space.nvec.tolist(), "start": np.asarray(space.start).tolist()}
        return {"kind": "MultiDiscrete", **numbers, "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "n": list(space.shape) if isinstance(space.n, tuple) else int(space.n)}
    if isinstance(space, spaces.Discrete):
        # Nothing is said of the usual dtype, as in checkpoints of before.
        dtype = {} if space.dtype == np.int64 else {"dtype": str(space.dtype)}
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start), **dtype}
    if isinstance(space, spaces.Box):
        return {
            "kind": "Box",
            "shape": list(space.shape),
            "dtype": str(space.dtype),
            "low": _bound_to_json(space.low),
            "high": _bound_to_json(space.high),
        }
    raise UserError(f"The space {space} is of a kind that cannot be saved.")


def space_from_json(value: dict[str, Any]) -> spaces.Space:
    """Rebuild a space that `space_to_json` described.

    Raises:
        UserError: if the description is not one.
    """
    try:
        if value["kind"] == "Discrete":
            dtype = np.dtype(value.get("dtype", "int64")).type
            return spaces.Discrete(int(value["n"]), start=int(value["start"]), dtype=dtype)
        if value["kind"] == "Box":
            shape = tuple(int(size) for size in value["shape"])
            dtype = np.dtype(value["dtype"])
            low, high = (_bound_from_json(value[key], shape, dtype) for key in ("low", "high"))
            return spaces.Box(low, high, shape, dtype.type)
        if value["kind"] == "MultiDiscrete":
            nvec, start = (np.array(value[key], np.int64) for key in ("nvec", "start"))
            return spaces.MultiDiscrete(nvec, np.dtype(value["dtype"]).type, start=start)
        if value["kind"] == "MultiBinary":
            n = value["n"]
            return spaces.MultiBinary([int(size) for size in n] if isinstance(n, list) else int(n))
        if value["kind"] == "Dict":
            return spaces.Dict({str(key): space_from_json(inner) for key, inner in value["spaces"].items()})
        if value["kind"] == "Tuple":
            return spaces.Tuple([space_from_json(inner) for inner in value["spaces"]])
        if value["kind"] == "PackedObservations":
            options, observed = tuple(int(size) for size in value["options"]), value["mask_is_observed"] is True
            return PackedObservations(space_from_json(value["source"]), options, mask_is_observed=observed)
        if value["kind"] == "PackedActions":
            return PackedActions(space_from_json(value["source"]))
    except (KeyError, TypeError, ValueError, OverflowError, MemoryError, AssertionError, AttributeError) as error:
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
