"""Will it fit? The weights that a language run needs, against the memory there is, before any of them are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from proximo.errors import UserError
from proximo.models.folders import refuse_kernels, transformers_module

OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "size calculation overflowed",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""How torch says that memory ran out."""


def check_fits(stage: str, config: Any) -> None:
    """Refuse a model whose weights, gradients and moments alone are more than the memory that is free.

    Raises:
        UserError: with the numbers, and the settings that need less.
    """
    size = n_parameters(config.model)
    free = free_memory(config.device)
    if size is None or free is None:
        return
    needed = bytes_each(stage, config) * size
    if needed > free:
        raise UserError(
            f"{config.model} has {size / 1e9:.2f} billion parameters: this {stage} run needs {_gib(needed)} for its "
            f"weights, gradients and Adam's moments alone, and {_gib(free)} are free on {config.device}. "
            + advice(stage, config)
        )


def n_parameters(place: str) -> int | None:
    """Parameters of a causal model, from its config alone; None where that cannot be told."""
    transformers = transformers_module()
    with suppress(Exception):  # whatever is wrong with it, loading will say
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
        refuse_kernels(config, place)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return sum(parameter.numel() for parameter in model.parameters())
    return None


def bytes_each(stage: str, config: Any) -> int:
    """Bytes kept per parameter of the model; what learns has a gradient and two moments beside it, in float32."""
    learns, frozen = 16, 4
    if stage != "align":  # the reference of dpo is asked once, before
        return frozen if config.lora else learns
    frozen = 2 if config.frozen_precision == "bfloat16" else 4
    if config.sharing == "lora":
        return frozen
    reference = frozen if config.beta > 0 else 0
    critic = learns if config.sharing == "separate" and hasattr(config.algorithm, "value_coef") else 0
    return learns + reference + critic


def free_memory(device: str) -> int | None:
    """Free bytes on a device: of the machine or of the container around this process; None if unknown."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    free = [int(found[1]) * 1024] if found else []
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        free.append(int(limit) - int(used))
    return min(free) if free else None


@contextmanager
def enough_memory(stage: str, config: Any) -> Iterator[None]:
    """Say which settings to lower where memory runs out after all.

    Raises:
        UserError: in place of the error of the library that noticed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        said = str(error).splitlines()[0] if str(error) else "it ran out"
        raise UserError(f"There is not enough memory ({said}). {advice(stage, config)}") from error


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or any(mark in str(error) for mark in OUT_OF_MEMORY)


def advice(stage: str, config: Any) -> str:
    """The settings that need less memory, in words."""
    has_lora = config.sharing == "lora" if stage == "align" else config.lora
    ways = [] if has_lora else ["sharing lora (or trunk)" if stage == "align" else "lora"]
    if stage == "align":
        ways += ["beta 0 (no reference)"] if config.beta > 0 and not has_lora else []
        ways.append(f"generation_batch_size (now {config.generation.generation_batch_size or 'all'})")
    halves = stage == "align" and config.autocast and config.frozen_precision == "float32"
    if halves and (config.beta > 0 or has_lora):
        ways.append("frozen_precision bfloat16")
    tokens = config.algorithm.microbatch_tokens if stage == "align" else config.microbatch_tokens
    ways += [f"a smaller microbatch_tokens (now {tokens or 'all'})"]
    ways += [] if config.gradient_checkpointing else ["gradient_checkpointing"]
    return f"What needs less: {', '.join(ways)}, or a smaller model."


def _gib(number: float) -> str:
    return f"{number / 2**30:,.1f} GiB"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
