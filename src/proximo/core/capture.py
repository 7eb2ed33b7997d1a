"""A step of tensor operations that is launched whole: a CUDA graph where there is a CUDA device, itself elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

WARM_UPS = 3
"""Times that a step is run before it is captured: libraries set themselves up at their first calls."""


def captured(
    step: Callable[[], None], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> Callable[[], None]:
    """Return what does the work of `step()` at every call: a replayed CUDA graph, or `step` where there is no CUDA.

    `step` must read and write tensors that stay where they are, start no transfer to the host, and draw its
    randomness from `generators` alone. On a CUDA device it is run `WARM_UPS` times first, so the caller keeps
    what it changes, the state of the generators too, and puts that back in place afterwards.

    Raises:
        RuntimeError: from torch, if something in `step` cannot be captured.
    """
    if device.type != "cuda":
        return step
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=stream):  # the stream that libraries have been set up on
            step()
    return graph.replay
