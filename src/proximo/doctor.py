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
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from proximo.lines import page_width


@dataclass(frozen=True)
class Entry:
    """One thing that was looked at. `missing` is what one can do without; `problem` is not."""

    name: str
    status: Literal["ok", "missing", "problem"]
    detail: str
    mend: str = ""
    """The command, or what to change; empty if there is nothing to do."""


NEEDED = {
    "torch": "2.10",  # older ones may run code from a file that is loaded (CVE-2026-24747)
    "numpy": "2",
    "gymnasium": "1.1",
    "tyro": "1.0",
    "rich": "14",
    "safetensors": "0.5",
    "jaxtyping": "0.3",
    "matplotlib": "3.10",
    "tomli-w": "1.1",
    "cloudpickle": "",
    "threadpoolctl": "3.5",
    "jinja2": "3.1",
}
"""The packages that Proximo needs, and from which version on; `pyproject.toml` says the same."""

_STEP = """
import gymnasium, json
env = gymnasium.make({env_id!r}, disable_env_checker=True)
env.reset(seed=0)
env.step(env.action_space.sample())
print(json.dumps("{env_id} was made and stepped"))
"""

_VIDEO = """
import gymnasium, imageio_ffmpeg, json, pathlib
env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
env.reset(seed=0)
frame = env.render()
height, width, _ = frame.shape
writer = imageio_ffmpeg.write_frames("trial.mp4", (width, height), ffmpeg_log_level="error")
writer.send(None)
for _ in range(4):
    writer.send(frame.tobytes())
writer.close()
assert pathlib.Path("trial.mp4").stat().st_size > 0, "ffmpeg wrote nothing"
print(json.dumps(f"CartPole-v1 was drawn ({width} x {height}) and written as an mp4"))
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
print(json.dumps({"gpus": gpus, "built_for": torch.version.cuda or torch.version.hip}))
"""

_SPEED = """
import gymnasium, json, timeit, torch
torch.set_num_threads(1)
one = torch.rand(512, 512)
product = min(timeit.repeat(lambda: one @ one, number=10, repeat=10)) / 10
env = gymnasium.make("CartPole-v1", disable_env_checker=True)
def play():
    env.reset(seed=0)
    for _ in range(8):
        env.step(0)
steps = 8 * 1000 / min(timeit.repeat(play, number=1000, repeat=3))
print(json.dumps(f"{2 * 512**3 / product / 1e9:.0f} GFLOP/s in products of matrices (1 thread), "
                 f"{steps:,.0f} CartPole-v1 steps/s"))
"""

_LANGUAGE = """
import json, torch, transformers
config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                  num_attention_heads=1, num_key_value_heads=1, pad_token_id=None,
                                  bos_token_id=None, eos_token_id=None)
transformers.LlamaForCausalLM(config)(input_ids=torch.arange(4)[None])
print(json.dumps(f"transformers {transformers.__version__}, a tiny model was made and run"))
"""


_EXPORT = """
import json, logging, onnxruntime, torch
logging.getLogger("torch.onnx").setLevel(logging.ERROR)
model = torch.onnx.export(torch.nn.Linear(2, 1), (torch.ones(3, 2),), dynamo=True, verbose=False)
model.save("trial.onnx")
session = onnxruntime.InferenceSession("trial.onnx")
session.run(None, {session.get_inputs()[0].name: torch.ones(3, 2).numpy()})
print(json.dumps(f"a tiny network was exported and run by ONNX Runtime {onnxruntime.__version__}"))
"""


class Extra(NamedTuple):
    """An extra of Proximo: its modules, what it is for, and a program that tries it."""

    modules: tuple[str, ...]
    purpose: str
    trial: str = ""


EXTRAS = {
    "atari": Extra(("ale_py",), "Atari games: ALE/Pong-v5, ...", "import ale_py" + _STEP.format(env_id="ALE/Pong-v5")),
    "box2d": Extra(("Box2D", "pygame"), "LunarLander, BipedalWalker", _STEP.format(env_id="LunarLander-v3")),
    "mujoco": Extra(("mujoco", "imageio"), "HalfCheetah, Hopper, Ant, ...", _STEP.format(env_id="HalfCheetah-v5")),
    "video": Extra(("pygame", "imageio", "imageio_ffmpeg"), "proximo watch as an mp4", _VIDEO),
    "language": Extra(
        ("transformers", "tokenizers", "peft", "datasets"),
        "proximo sft, reward, align, dpo, demo align, ...",
        _LANGUAGE,
    ),
    "export": Extra(("onnx", "onnxscript", "onnxruntime"), "proximo export", _EXPORT),
    "tune": Extra(("optuna",), "proximo tune"),
    "convert": Extra(("yaml",), "proximo convert, of files that are YAML"),
    "wandb": Extra(("wandb",), "--wandb: metrics for Weights & Biases"),
    "trackio": Extra(("trackio",), "--trackio: metrics for Trackio"),
    "minari": Extra(("minari", "h5py", "pyarrow"), "proximo clone from Minari datasets", ""),
    "dev": Extra(
        ("pytest", "pytest_timeout", "hypothesis", "beartype", "ruff", "pyright", "importlinter", "pre_commit"),
        "working on Proximo itself",
    ),
}


def diagnose_machine(*, speed: bool = False) -> list[Entry]:
    """Look at everything that Proximo needs or can use; takes a few seconds, and 3 more with `speed`."""
    looks: list[Callable[[], list[Entry]]] = [_packages, _environment, _cores, _memory, _gpu, _disk, _terminal]
    looks += [partial(_extra, name) for name in EXTRAS]
    with ThreadPoolExecutor(2) as pool:  # the trials wait for their processes
        entries = [entry for found in pool.map(lambda look: look(), looks) for entry in found]
    return entries + (_speed() if speed else [])  # alone, or it would measure the others


def main_text(*, speed: bool = False) -> tuple[str, bool]:
    """What `proximo doctor` prints, and whether there is no problem (extras may be missing)."""
    entries = diagnose_machine(speed=speed)
    width = max(len(entry.name) for entry in entries)
    indent = " " * (9 + width + 2)
    lines = []
    for entry in entries:
        text = textwrap.wrap(entry.detail, page_width() - len(indent), break_long_words=False, break_on_hyphens=False)
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


def _packages() -> list[Entry]:
    python = f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.machine()}"
    proximo = f"{_version('proximo') or 'not installed, but used'} from {Path(__file__).parent}"
    needed = [_package(name, at_least) for name, at_least in NEEDED.items()]
    return [Entry("python", "ok", python), Entry("proximo", "ok", proximo), *needed]


def _package(name: str, at_least: str) -> Entry:
    """Whether a package is there in a version that Proximo works with."""
    version = _version(name)
    if version is None:
        return Entry(name, "problem", "not installed", install_command())
    if _numbers(version) < _numbers(at_least):
        return Entry(name, "problem", f"{version}; it must be at least {at_least}", install_command())
    return Entry(name, "ok", version)


def _environment() -> list[Entry]:
    tried = _tried(_STEP.format(env_id="CartPole-v1"))
    if tried.error:
        detail = f"CartPole-v1 could not be made and stepped: {tried.error}"
        return [Entry("environment", "problem", detail, install_command())]
    return [Entry("environment", "ok", str(tried.said))]


def _extra(name: str) -> list[Entry]:
    """Whether an extra is installed, and works."""
    modules, purpose, trial = EXTRAS[name]
    lacking = [module for module in modules if not _has_module(module)]
    mend = install_command(name)
    if name == "box2d" and sys.version_info >= (3, 14):
        mend = "Box2D is not built for Python 3.14 and newer: use Python 3.11 to 3.13."
    if lacking:
        return [Entry(name, "missing", f"for {purpose}: not installed ({', '.join(lacking)})", mend)]
    tried = _tried(trial) if trial else _Tried("installed")
    if tried.error:
        return [Entry(name, "problem", f"for {purpose}: installed, but a trial failed: {tried.error}", mend)]
    return [Entry(name, "ok", f"for {purpose}: {tried.said}")]


def install_command(extra: str | None = None) -> str:
    """The command that installs Proximo, or one of its extras, as this copy of it was installed."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "constraints.txt").is_file():
        return f'pip install "proximo[{extra}]"' if extra else "pip install --upgrade proximo"
    place = f'".[{extra}]"' if extra else "."
    command = f"pip install -c constraints.txt -e {place}"
    return command if _current_folder() == checkout else f'cd "{checkout}" && {command}'


def _current_folder() -> Path | None:
    """The current folder; None if it has been deleted."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13, 0); a release candidate counts as its release."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _cores() -> list[Entry]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = f"{usable} usable of {os.cpu_count()}"
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")  # of a container; "max" is none
    if quota.isdecimal():
        detail += f", held to the time of {int(quota) / int(period):g} by the container"
    return [Entry("cores", "ok", detail)]


def _memory() -> list[Entry]:
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")  # of a container
    free = 1024 * int(found.group(1)) if found else 10**18
    free = min(free, int(limit) - int(used)) if limit.isdecimal() else free
    if free < 1e9:
        return [Entry("memory", "problem", _gigabytes(free), "Training needs about 1 GB: close other programs.")]
    return [Entry("memory", "ok", f"{_gigabytes(free)} free" if free < 10**18 else "unknown on this system")]


def _gpu() -> list[Entry]:
    tried = _tried(_TORCH)
    if tried.error:
        return [Entry("gpu", "problem", f"torch could not be asked: {tried.error}", install_command())]
    here = "https://pytorch.org/get-started/locally"
    entries = []
    for name, memory, broken in tried.said["gpus"]:
        if broken:
            mend = f"Install a torch for this GPU and driver: {here}"
            entries.append(Entry("gpu", "problem", f"{name}; it cannot compute: {broken}", mend))
        else:
            entries.append(Entry("gpu", "ok", f"{name}, {_gigabytes(memory)}"))
    built_for = tried.said["built_for"] or "the CPU alone"
    none = f"none that torch (built for {built_for}) can use; small networks need none"
    mend = f"nvidia-smi is here, so there may be one; a torch for it: {here}" if shutil.which("nvidia-smi") else ""
    return entries or [Entry("gpu", "missing", none, mend)]


def _disk() -> list[Entry]:
    """Runs are written to ./runs, which is made at the first run."""
    here = _current_folder()
    if here is None:
        return [Entry("disk", "problem", "the current folder has been deleted", "Go to another one (cd).")]
    place = here / "runs" if Path("runs").exists() else here
    mend = "Choose another place with --run-dir, or "
    try:
        free = shutil.disk_usage(place).free
        with tempfile.TemporaryFile(dir=place):
            detail = f"{_gigabytes(free)} free in {place}"
    except OSError as error:
        return [Entry("disk", "problem", f"{place} cannot be written to: {error}", f"{mend}let this user write there.")]
    if free < 1e9:
        return [Entry("disk", "problem", detail, f"{mend}free some space.")]
    return [Entry("disk", "ok", detail)]


def _terminal() -> list[Entry]:
    """What makes the live table plain lines, or garbles it."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.encoding.lower().startswith("utf"):
        mend = "For the finer one: PYTHONUTF8=1 (export PYTHONUTF8=1), or a UTF-8 locale."
        return [Entry("terminal", "ok", f"its encoding is {console.encoding}: the curve is drawn in ASCII", mend)]
    if not console.is_terminal or console.is_dumb_terminal:
        return [Entry("terminal", "ok", "standard error is no terminal, or a dumb one: plain lines, no live table")]
    narrow = "" if console.width >= 80 else "; the live table needs 80"
    return [Entry("terminal", "ok", f"{console.width} columns{narrow}")]


def _speed() -> list[Entry]:
    tried = _tried(_SPEED)
    return [Entry("speed", "problem" if tried.error else "ok", tried.error or str(tried.said))]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


class _Tried(NamedTuple):
    """What a trial said, or how it failed."""

    said: Any = None
    error: str = ""


def _tried(program: str, seconds: float = 120.0) -> _Tried:
    """Run a small program, which prints one JSON value last, in a folder that is thrown away.

    The first import of torch from a slow disk takes a good part of the time that it gets.
    """
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
            return _Tried(error=f"it was not done after {seconds:g} s")
    output, messages = (text.decode(errors="replace").strip().splitlines() for text in (done.stdout, done.stderr))
    if done.returncode or not output:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        return _Tried(error=messages[-1] if messages else f"its process ended with {how}")
    return _Tried(said=json.loads(output[-1]))
