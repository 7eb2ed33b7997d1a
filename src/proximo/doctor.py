"""What this machine has, what is missing, and how to mend it (`proximo doctor`).

Whatever could crash or hang (importing torch, a graphics driver, an environment) is tried in a process of its
own with a time limit, so that the doctor always gets to the end.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "missing", "problem"]

PROBE_SECONDS = 60.0
"""So long may one trial take; the first import of torch from a slow disk takes a good part of it."""


@dataclass(frozen=True)
class Entry:
    """One thing that was looked at. `missing` is what one can do without; `problem` is not."""

    name: str
    status: Status
    detail: str
    mend: str = ""
    """The command, or what to change; empty if there is nothing to do."""


class Range(NamedTuple):
    """Versions of a package that Proximo works with; `pyproject.toml` says the same."""

    at_least: str
    below: str | None = None
    why: str = ""


NEEDED = {
    "torch": Range("2.10", why="older ones may run code from a file that is loaded (CVE-2026-24747)"),
    "numpy": Range("2"),
    "gymnasium": Range("1.1"),
    "tyro": Range("1.0"),
    "rich": Range("14"),
    "safetensors": Range("0.5"),
    "jaxtyping": Range("0.3"),
    "matplotlib": Range("3.10"),
    "tomli-w": Range("1.1"),
}
OF_EXTRAS = {
    "mujoco": Range("3.2", "3.16", why="later ones warn at every start and leave a MUJOCO_LOG.TXT where you are"),
}


class Extra(NamedTuple):
    """An extra of Proximo: its modules, what it is for, and a program that tries it."""

    modules: tuple[str, ...]
    purpose: str
    trial: str = ""


_STEP = """
import gymnasium, json
env = gymnasium.make({env_id!r}, disable_env_checker=True)
env.reset(seed=0)
env.step(env.action_space.sample())
print(json.dumps("{env_id} was made and stepped"))
"""

_RENDER = """
import gymnasium, json
env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
env.reset(seed=0)
height, width, _ = env.render().shape
print(json.dumps(f"one frame of CartPole-v1 was drawn ({width} x {height})"))
"""

_MP4 = """
import imageio_ffmpeg, json, pathlib
writer = imageio_ffmpeg.write_frames("trial.mp4", (64, 64), ffmpeg_log_level="error")
writer.send(None)
for shade in range(4):
    writer.send(bytes([60 * shade]) * (64 * 64 * 3))
writer.close()
assert pathlib.Path("trial.mp4").stat().st_size > 0, "ffmpeg wrote nothing"
print(json.dumps(f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()} wrote an mp4"))
"""

_TORCH = """
import json, torch
gpus = []
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    about = torch.cuda.get_device_properties(i)
    try:
        torch.ones(8, device=f"cuda:{i}").sum().item()
        broken = ""
    except Exception as error:
        broken = str(error).splitlines()[0]
    gpus.append([about.name, about.total_memory, broken])
apple = bool(getattr(torch.backends, "mps", None) and torch.backends.mps.is_available())
print(json.dumps({"gpus": gpus, "apple": apple, "built_for": torch.version.cuda or torch.version.hip}))
"""

_SPEED = """
import json, time
import gymnasium, torch
torch.set_num_threads(1)
one = torch.rand(512, 512)
one @ one
began, n_products = time.perf_counter(), 0
while time.perf_counter() - began < 0.7:
    one @ one
    n_products += 1
products = n_products * 2 * 512**3 / (time.perf_counter() - began)
env = gymnasium.make("CartPole-v1", disable_env_checker=True)
env.reset(seed=0)
began, n_steps = time.perf_counter(), 0
while time.perf_counter() - began < 1.0:
    _, _, terminated, truncated, _ = env.step(n_steps % 2)
    n_steps += 1
    if terminated or truncated:
        env.reset()
steps = n_steps / (time.perf_counter() - began)
print(json.dumps(f"{products / 1e9:.0f} GFLOP/s in products of matrices (1 thread), {steps:,.0f} CartPole-v1 steps/s"))
"""

EXTRAS = {
    "box2d": Extra(("Box2D", "pygame"), "LunarLander, BipedalWalker", _STEP.format(env_id="LunarLander-v3")),
    "mujoco": Extra(("mujoco", "imageio"), "HalfCheetah, Hopper, Ant, ...", _STEP.format(env_id="HalfCheetah-v5")),
    "video": Extra(("pygame", "imageio", "imageio_ffmpeg"), "proximo watch", _RENDER),
    "dev": Extra(
        ("pytest", "pytest_timeout", "hypothesis", "beartype", "ruff", "pyright", "importlinter", "pre_commit"),
        "working on Proximo itself",
    ),
}


def diagnose_machine(*, speed: bool = False) -> list[Entry]:
    """Look at everything that Proximo needs or can use; takes a few seconds, and 3 more with `speed`."""
    looks: list[tuple[str, Callable[[], list[Entry]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("training", _training),
        ("cores", _cores),
        ("memory", _memory),
        ("gpu", _gpu),
        ("disk", _disk),
        ("runs folder", _runs_folder),
        *((name, partial(_extra, name)) for name in EXTRAS),
        ("mp4", _mp4),
        ("terminal", _terminal),
    ]
    with ThreadPoolExecutor(2) as pool:  # the trials wait for their processes
        entries = [entry for found in pool.map(lambda look: _guarded(*look), looks) for entry in found]
    return entries + (_guarded("speed", _speed) if speed else [])  # alone, or it would measure the others


def main_text(*, speed: bool = False) -> tuple[str, bool]:
    """What `proximo doctor` prints, and whether there is no problem (extras may be missing)."""
    entries = diagnose_machine(speed=speed)
    width = max(len(entry.name) for entry in entries)
    indent = " " * (9 + width + 2)
    lines = []
    for entry in entries:
        text = textwrap.wrap(entry.detail, 100 - len(indent), break_long_words=False, break_on_hyphens=False) or [""]
        lines.append(f"{entry.status:<9}{entry.name:<{width}}  {text[0]}")
        lines += [indent + line for line in text[1:]]
        if entry.mend:
            lines.append(f"{indent}-> {entry.mend}")  # in one line: it is to be copied
    problems = sum(entry.status == "problem" for entry in entries)
    missing = [entry.name for entry in entries if entry.status == "missing"]
    verdict = f"{problems} problem{'s' * (problems != 1)}: see the arrows." if problems else "Ready to train."
    if missing:
        verdict += f" Missing, and not needed for everything: {', '.join(missing)}."
    return "\n".join([*lines, "", verdict]), problems == 0


def _guarded(name: str, look: Callable[[], list[Entry]]) -> list[Entry]:
    try:
        return look()
    except Exception as error:
        detail = f"could not be looked at: {type(error).__name__}: {error}"
        return [Entry(name, "problem", detail, "This is a mistake in proximo doctor itself; please report it.")]


# --- software -------------------------------------------------------------------------------------------------


def _python() -> list[Entry]:
    detail = f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.machine()}"
    if _numbers(platform.python_version()) < (3, 11):
        return [Entry("python", "problem", detail, "Proximo needs Python 3.11 or newer: make an environment with one.")]
    return [Entry("python", "ok", detail)]


def _packages() -> list[Entry]:
    version = _version("proximo")
    where = Path(__file__).parent
    entries = [Entry("proximo", "ok", f"{version} in {where}" if version else f"from {where}, which is not installed")]
    entries += [_package(name, wanted, install_command()) for name, wanted in NEEDED.items()]
    installed = {name: wanted for name, wanted in OF_EXTRAS.items() if _version(name)}
    return entries + [_package(name, wanted, install_command(name)) for name, wanted in installed.items()]


def _package(name: str, wanted: Range, mend: str) -> Entry:
    """Whether a package is there in a version that Proximo works with."""
    version = _version(name)
    if version is None:
        return Entry(name, "problem", "not installed", mend)
    why = f": {wanted.why}" if wanted.why else ""
    if _numbers(version) < _numbers(wanted.at_least):
        return Entry(name, "problem", f"{version}; it must be at least {wanted.at_least}{why}", mend)
    if wanted.below is not None and _numbers(version) >= _numbers(wanted.below):
        return Entry(name, "problem", f"{version}; it must be older than {wanted.below}{why}", mend)
    return Entry(name, "ok", version)


def _training() -> list[Entry]:
    probe = _tried(_STEP.format(env_id="CartPole-v1"))
    if probe.error:
        detail = f"CartPole-v1 could not be made and stepped: {probe.error}"
        return [Entry("environment", "problem", detail, install_command())]
    return [Entry("environment", "ok", str(probe.said))]


def _extra(name: str) -> list[Entry]:
    """Whether an extra is installed, and works."""
    extra = EXTRAS[name]
    lacking = [module for module in extra.modules if not _has_module(module)]
    mend = install_command(name)
    if name == "box2d" and sys.version_info >= (3, 14):
        mend = "Box2D is not built for Python 3.14 and newer: use Python 3.11 to 3.13."
    if lacking:
        return [Entry(name, "missing", f"for {extra.purpose}: not installed ({', '.join(lacking)})", mend)]
    if not extra.trial:
        return [Entry(name, "ok", f"for {extra.purpose}: installed")]
    probe = _tried(extra.trial)
    if probe.error:
        return [Entry(name, "problem", f"for {extra.purpose}: installed, but a trial failed: {probe.error}", mend)]
    return [Entry(name, "ok", f"for {extra.purpose}: {probe.said}")]


def _mp4() -> list[Entry]:
    mend = install_command("video")
    if not _has_module("imageio_ffmpeg"):
        return [Entry("mp4", "missing", "no encoder (imageio-ffmpeg): proximo watch writes a GIF instead", mend)]
    probe = _tried(_MP4)
    if probe.error:
        return [Entry("mp4", "missing", f"ffmpeg does not work, a GIF is written instead: {probe.error}", mend)]
    return [Entry("mp4", "ok", str(probe.said))]


def install_command(extra: str | None = None) -> str:
    """The command that installs Proximo, or one of its extras, as this copy of it was installed."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "constraints.txt").is_file():
        return f'pip install "proximo[{extra}]"' if extra else "pip install --upgrade proximo"
    place = f'".[{extra}]"' if extra else "."
    command = f"pip install -c constraints.txt -e {place}"
    return command if Path.cwd() == checkout else f'cd "{checkout}" && {command}'


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13, 0); a release candidate counts as its release."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


# --- the machine ----------------------------------------------------------------------------------------------


def _cores() -> list[Entry]:
    in_all = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else in_all
    detail = f"{usable} usable" if usable == in_all else f"{usable} usable of {in_all}"
    quota = cpu_quota()
    if quota is not None and quota < usable:
        detail += f", held to the time of {quota:g} by the container"
    mend = "Every step will be slow; give the container at least one core." if quota is not None and quota < 1 else ""
    return [Entry("cores", "problem" if mend else "ok", detail, mend)]


def _memory() -> list[Entry]:
    total, available = _memory_of_machine()
    limit = memory_limit()
    if total is None:
        return [Entry("memory", "ok", "unknown on this system")]
    detail = f"{_gigabytes(total)} in all"
    detail += f", {_gigabytes(available)} free" if available is not None else ""
    if limit is not None and limit < total:
        detail += f"; this process may use {_gigabytes(limit)}"
    room = min(value for value in (total, available, limit) if value is not None)
    if room < 1e9:
        return [Entry("memory", "problem", detail, "Training needs about 1 GB: close other programs.")]
    return [Entry("memory", "ok", detail)]


def _memory_of_machine() -> tuple[int | None, int | None]:
    """Bytes in all and bytes free, None where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        total = None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    return total, int(found.group(1)) * 1024 if found else None


def _gpu() -> list[Entry]:
    if not _has_module("torch"):
        return [Entry("gpu", "missing", "torch is not installed", install_command())]
    probe = _tried(_TORCH)
    if probe.error:
        return [Entry("gpu", "problem", f"torch could not be asked: {probe.error}", install_command())]
    said: dict[str, Any] = probe.said
    entries = []
    for name, memory, broken in said["gpus"]:
        mend = "Install a torch for this GPU and driver: https://pytorch.org/get-started/locally" if broken else ""
        detail = f"{name}, {_gigabytes(memory)}" + (f"; it cannot compute: {broken}" if broken else "")
        entries.append(Entry("gpu", "problem" if broken else "ok", detail, mend))
    if entries:
        return entries
    if said["apple"]:
        return [Entry("gpu", "ok", "Apple GPU (mps)")]
    has_card = shutil.which("nvidia-smi") is not None
    if not said["built_for"]:
        reason = "none: this torch is built for the CPU alone"
        mend = "There may be an NVIDIA GPU: https://pytorch.org/get-started/locally has a torch for it."
    else:
        reason = f"none: torch (built for {said['built_for']}) finds no GPU"
        mend = "Look at what nvidia-smi says: the driver may be too old, or the container started without the GPU."
    detail = f"{reason}. Small networks are fastest on the CPU anyway"
    return [Entry("gpu", "missing", detail, mend if has_card else "")]


def _disk() -> list[Entry]:
    free = shutil.disk_usage(Path.cwd()).free
    if free < 1e9:
        mend = "Free some space, or choose another place with --run-dir."
        return [Entry("disk", "problem", f"{_gigabytes(free)} free in {Path.cwd()}", mend)]
    return [Entry("disk", "ok", f"{_gigabytes(free)} free in {Path.cwd()}")]


def _runs_folder() -> list[Entry]:
    """Runs are written to ./runs, which is made at the first run."""
    folder = Path.cwd() / "runs"
    place = folder if folder.exists() else folder.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        mend = "Let this user write there, go to another folder, or choose another place with --run-dir."
        return [Entry("runs folder", "problem", f"{place} cannot be written to: {error.strerror or error}", mend)]
    return [Entry("runs folder", "ok", f"{folder} can be {'written to' if place == folder else 'made'}")]


def _terminal() -> list[Entry]:
    """What makes the live table plain lines, or garbles it."""
    from rich.console import Console

    console = Console(stderr=True)
    encoding = console.encoding.lower()
    if not encoding.startswith("utf"):
        mend = "Set PYTHONUTF8=1 (export PYTHONUTF8=1), or a UTF-8 locale."
        return [Entry("terminal", "problem", f"its encoding is {encoding}: the curve cannot be drawn", mend)]
    if not console.is_terminal:
        return [Entry("terminal", "ok", "standard error is no terminal: progress is plain lines, no live table")]
    notes = [f"{console.width} columns"]
    if console.width < 80:
        notes.append("the live table needs 80")
    if console.is_dumb_terminal:
        notes.append(f"TERM is {os.environ.get('TERM', 'not set')}: no live table")
    if console.color_system is None or console.no_color:
        notes.append("no colours")
    return [Entry("terminal", "ok", ", ".join(notes))]


def _speed() -> list[Entry]:
    probe = _tried(_SPEED)
    if probe.error:
        return [Entry("speed", "problem", f"could not be measured: {probe.error}")]
    return [Entry("speed", "ok", str(probe.said))]


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The share of CPU time that a container grants, in cores; None if it does not hold this process back."""
    quotas = []
    for folder in _control_groups("cpu", root, membership):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")  # version 2
        if not quota:
            quota, period = (_read(folder / f"cpu.cfs_{word}_us").strip() for word in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):  # "max" and -1 are none
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The bytes that a container grants; None if it sets no limit."""
    limits = []
    for folder in _control_groups("memory", root, membership):
        limit = _read(folder / "memory.max").strip() or _read(folder / "memory.limit_in_bytes").strip()
        if limit.isdecimal() and int(limit) < 2**60:  # version 1 says "none" by a huge number
            limits.append(int(limit))
    return min(limits, default=None)


def _control_groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """The folders of the control groups that this process is in, from the innermost to the root."""
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tops = [root / controllers, root / controller] if controllers else [root]
        for top in dict.fromkeys(tops):
            folder = top / path.strip("/")
            yield from (place for place in (folder, *folder.parents) if place.is_relative_to(top))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


# --- trials in a process of their own -------------------------------------------------------------------------


class _Probe(NamedTuple):
    """What a trial said, or how it failed."""

    said: Any = None
    error: str = ""


def _tried(program: str, seconds: float | None = None) -> _Probe:
    """Run a small program, which prints one JSON value last, in a folder that is thrown away."""
    seconds = PROBE_SECONDS if seconds is None else seconds
    quiet = {"PYGAME_HIDE_SUPPORT_PROMPT": "1", "SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
    with tempfile.TemporaryDirectory(prefix="proximo-doctor-", ignore_cleanup_errors=True) as folder:
        try:
            # -P: what lies in that folder, or beside a script, is not imported.
            done = subprocess.run(
                [sys.executable, "-P", "-W", "ignore", "-c", program],
                cwd=folder,
                env={**os.environ, **quiet},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _Probe(error=f"it was not done after {seconds:g} s")
        except OSError as error:
            return _Probe(error=f"no process could be started: {error}")
    output = done.stdout.decode(errors="replace").strip().splitlines()
    messages = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode < 0:
        names = {int(number): number.name for number in signal.Signals}
        return _Probe(error=f"its process ended with signal {names.get(-done.returncode, -done.returncode)}")
    if done.returncode:
        return _Probe(error=messages[-1] if messages else f"its process ended with code {done.returncode}")
    try:
        return _Probe(said=json.loads(output[-1]))
    except (IndexError, ValueError):
        return _Probe(error="it said nothing")
