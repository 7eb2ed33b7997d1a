"""What a run asks of the process that it is in: signals noted, threads for torch, memory, and a device."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from threadpoolctl import threadpool_limits

from proximo.errors import UserError, tell
from proximo.training.config import ControlConfig

_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "size calculation overflowed")
"""What torch's RuntimeErrors say where memory ran out."""


@contextmanager
def noted_signals(said: str = "finishing this iteration, then saving") -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 instead of dying; a second SIGINT interrupts at once.

    `said` is what the first SIGINT is answered with.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: object) -> None:
        del frame
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)
        if number == signal.SIGINT:
            with suppress(OSError):  # not print: the loop may be in the middle of one
                os.write(2, f"\nproximo: {said}; Ctrl-C again stops at once\n".encode())

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def training_device(config: ControlConfig) -> Iterator[None]:
    """One thread for torch while networks are made; then what it had before.

    Raises:
        UserError: if there is no such device.
    """
    check_device(config.device)
    if config.network.precision == "bfloat16" and not _computes_bfloat16(config.device):
        tell(
            f"proximo: precision is 'bfloat16', for which {config.device} has no instructions here (on a CPU: AMX or "
            "AVX512-BF16): it will be slower than float32, and no better."
        )
    with _torch_threads(1):
        yield


@contextmanager
def training_threads(config: ControlConfig) -> Iterator[None]:
    """Give torch and the BLAS of NumPy and SciPy the run's number of threads, then back what they had.

    What is small for them gets one, since waking a second thread takes longer than it: torch where the update is
    written out, the BLAS where it only acts. The compiled update has threads of its own.
    """
    path, threads = config.update_path, max(1, config.threads)
    with _limits.held(blas=threads if path == "fused" else 1, of_torch=1 if path in ("fused", "compiled") else threads):
        yield


class _Limits:
    """Numbers of threads are the process's: of runs side by side the first one sets them, the last one undoes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_runs = 0
        self._undo = ExitStack()

    @contextmanager
    def held(self, *, blas: int, of_torch: int) -> Iterator[None]:
        with self._lock:
            if self._n_runs == 0:
                self._undo.enter_context(threadpool_limits(blas, user_api="blas"))
                self._undo.enter_context(_torch_threads(of_torch))
            self._n_runs += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_runs -= 1
                if self._n_runs == 0:
                    self._undo.close()


_limits = _Limits()


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def enough_memory(config: ControlConfig) -> Iterator[None]:
    """Say which settings to lower where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(mark in str(error) for mark in _OUT_OF_MEMORY):
            raise
        network = config.network
        remembers = f"memory_size (now {network.memory_size}), " if network.memory != "none" else ""
        raise UserError(
            f"There is not enough memory ({str(error).splitlines()[0] if str(error) else 'it ran out'}). Lower one of "
            f"hidden_sizes (now {' '.join(map(str, config.network.hidden_sizes))}), {remembers}n_envs (now "
            f"{config.environment.n_envs}), rollout_length (now {config.rollout_length}), batch_size (now "
            f"{config.batch_size})."
        ) from error


def _computes_bfloat16(device: str) -> bool:
    """Whether a matrix product in bfloat16 is faster there than one in float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_device(name: str) -> None:
    """Refuse a device that torch cannot use.

    Raises:
        UserError: with the reason.
    """
    try:
        torch.zeros(1, dtype=torch.float64, device=name).item()
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device is {name!r}, which cannot be used here: {reason.rstrip('.')}. Use cpu.") from error
