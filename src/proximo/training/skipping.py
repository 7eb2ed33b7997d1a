"""Updates whose loss or gradient is not finite: left out and counted, with their batch kept to be looked at."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from proximo.algorithms.adam import NonFiniteUpdateError
from proximo.core.batch import Batch
from proximo.errors import UserError, tell
from proximo.runs.contents import tensors_bytes
from proximo.runs.directory import RunDirectory
from proximo.runs.files import reason, replace_file

MOST_KEPT = 20
"""Batches that are kept of one run, so that they never fill a disk."""


class Skipping(Protocol):
    """The state of a run: how many iterations it has finished, and how many updates were left out of late."""

    iteration: int
    skipped_in_a_row: int


def leave_out(
    run: RunDirectory,
    state: Skipping,
    error: NonFiniteUpdateError,
    batch: Batch | Sequence[Sequence[int]],
    *,
    most: int,
    mends: str,
) -> dict[str, Any]:
    """Count an update that is left out and say so; keep its batch: a `Batch` as safetensors, texts as JSON token ids.

    Args:
        run: where the batch goes.
        state: counts the updates that were left out in a row.
        error: what was not finite.
        batch: what the update was to learn from.
        most: how many may be left out in a row.
        mends: what usually helps, in words.

    Returns:
        The metrics that the update has in place of its own.

    Raises:
        UserError: if it was one too many.
    """
    state.skipped_in_a_row += 1
    iteration, in_a_row = state.iteration + 1, state.skipped_in_a_row
    kept = _kept(run, batch, iteration)
    if in_a_row <= most:
        tell(
            f"proximo: iteration {iteration}: {error}. That step was not taken, nor the rest of its update: {in_a_row} "
            f"left out in a row, and {most} may be. {kept}"
        )
        return {"update_skipped": True}
    times = "" if in_a_row == 1 else f", {in_a_row} times in a row"
    raise UserError(
        f"Learning broke down in iteration {iteration}{times}: {error}. No such step was taken: the weights are "
        f"finite, and the last checkpoint is from before it.\n{kept}\n{mends}"
    )


def _kept(run: RunDirectory, batch: Batch | Sequence[Sequence[int]], iteration: int) -> str:
    """Write the batch down and say where; whatever goes wrong here must not hide the reason."""
    suffix = ".safetensors" if isinstance(batch, Batch) else ".json"
    path = run.path / f"non-finite-iteration{iteration}{suffix}"
    if len(list(run.path.glob("non-finite-iteration*"))) >= MOST_KEPT and not path.exists():
        return f"Its batch was not kept: {MOST_KEPT} of this run are already."
    try:
        replace_file(path, _content(batch))
    except OSError as error:
        return f"Its batch could not be written to {path}: {reason(error)}."
    return f"Its batch is in {path}."


def _content(batch: Batch | Sequence[Sequence[int]]) -> bytes:
    if not isinstance(batch, Batch):
        return (json.dumps({"token_ids": [list(text) for text in batch]}) + "\n").encode()
    tensors: dict[str, Tensor] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, dict):
            tensors |= {f"{field.name}.{name}": tensor for name, tensor in value.items()}
        elif value is not None:
            tensors[field.name] = value
    return tensors_bytes(tensors)
