"""What stands in, on the CPU, for a CUDA device that captures: it allows nothing that would wait for the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from proximo.core.capture import WARM_UPS

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "_unique2", "repeat_interleave")
"""Operations whose result, or its shape, goes to the host, and `torch.tensor`, which comes from there."""


class NothingWaits(TorchDispatchMode):
    """Raises for an operation that cannot be part of a CUDA graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.__name__.split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        if name in _WAITING or by_mask:
            raise AssertionError(f"{func} waits for the host")
        return func(*args, **(kwargs or {}))


def stand_in(
    step: Callable[[], None], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> Callable[[], None]:
    """`capture.captured` as on CUDA: run some times first, and watched at every call."""

    def watched() -> None:
        with NothingWaits():
            step()

    for _ in range(WARM_UPS):
        watched()
    return watched
