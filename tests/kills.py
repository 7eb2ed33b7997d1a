"""Runs that are killed, and what is left of them: for `test_kills.py` and `benchmarks/reliability.py`.

A run lives in a process of its own, which a warm server forks: it has imported everything, has computed nothing, and
so has no threads that a fork would lose. Each life ends at its kill point, if it comes to it, by SIGKILL: no handler,
no `finally`, no flush. The kill points and what counts them are patched into that process; the product has no hook.

What a power cut would take beyond that (data that was written and not yet flushed) no kill can show; that every flush
is in its place is tested with the checkpoints.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import shlex
import signal
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from proximo.errors import UserError
from proximo.runs import names
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory, open_run
from proximo.runs.metrics import read_metrics
from proximo.training.control import CLOCK_METRICS

REFUSED = 2
"""What a life exits with if Proximo raised a UserError."""

LONGEST_LIFE = 300.0
"""Seconds after which a life that should have ended counts as hung."""

CLOCKS = CLOCK_METRICS | {"tokens_per_second"}

_CONTROL_MODULES = (
    "proximo.language",
    "proximo.training.control",
    "proximo.collect.workers",
    "gymnasium.envs.classic_control.cartpole",
    "gymnasium.envs.classic_control.pendulum",
    "torch.fx.experimental.symbolic_shapes",
    "tyro",
    "rich.live",
    "proximo.cli",
    "proximo.report.report",
    "matplotlib.backends.backend_agg",
)
_LANGUAGE_MODULES = (
    "proximo.training.align",
    "proximo.training.sft",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.generation",
    "peft",
)


# --- what is run --------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Where a life ends: after the `at`-th event of a kind (disk, step, minibatch, token), or after `at` seconds."""

    kind: str
    at: float

    def __str__(self) -> str:
        return f"{self.kind} {self.at:g}"


@dataclass(frozen=True)
class Task:
    """A small training: `proximo.<function>(*arguments, **settings)`."""

    name: str
    function: str
    arguments: tuple[str, ...]
    settings: Mapping[str, Any]


_SMALL: dict[str, Any] = dict(n_envs=2, rollout_length=16, batch_size=16, n_epochs=2, hidden_sizes=[8], total_steps=128)
_SAVING: dict[str, Any] = dict(checkpoint_every=64, keep_checkpoints=1)
_PENDULUM: dict[str, Any] = dict(normalize_observations=True, normalize_rewards=True, max_episode_steps=14)

CONTROL = {
    task.name: task
    for task in (
        Task("CartPole-v1, serial", "train", ("CartPole-v1",), _SMALL | _SAVING),
        Task("CartPole-v1, workers", "train", ("CartPole-v1",), _SMALL | _SAVING | {"vectorization": "workers"}),
        Task("Pendulum-v1, serial", "train", ("Pendulum-v1",), _SMALL | _SAVING | _PENDULUM),
        Task(
            "Pendulum-v1, workers",
            "train",
            ("Pendulum-v1",),
            _SMALL | _SAVING | _PENDULUM | {"vectorization": "workers", "n_workers": 1},
        ),
    )
}


def language_tasks(folder: Path) -> dict[str, Task]:
    """Tasks on a tiny model, which is made in `folder` with its data and its reward function."""
    from tests.tiny_language import WORDS, save_tiny

    model, prompts, texts, rewards = (folder / name for name in ("model", "prompts.jsonl", "texts.jsonl", "rewards.py"))
    if not rewards.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_tiny(model)
        asked = [" ".join(WORDS[k : k + 1 + k % 3]) for k in range(6)]
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
        learned = [{"prompt": text, "completion": "sleeps here ."} for text in asked]
        texts.write_text("".join(json.dumps(row) + "\n" for row in learned))
        rewards.write_text(
            "def score(prompts, responses):\n    return [len(text) / 10 + text.count('e') for text in responses]\n"
        )
    align = dict(n_iterations=3, prompts_per_iteration=4, batch_size=4, n_epochs=2, max_new_tokens=4, threads=1)
    align |= dict(checkpoint_every=1, keep_checkpoints=1, n_samples=1, samples_every=1, learning_rate=1e-2)
    lora = dict(algorithm="grpo", responses_per_prompt=2, sharing="lora", lora_rank=2)
    sft = dict(n_epochs=3, batch_size=2, hold_out=0.3, checkpoint_every=3, keep_checkpoints=1, threads=1)
    aligned = (str(model), f"{rewards}:score", str(prompts))
    tasks = (
        Task("align, ppo", "align", aligned, align),
        Task("align, grpo with lora", "align", aligned, align | lora),
        Task("sft", "sft", (str(model), str(texts)), sft | {"learning_rate": 1e-2}),
    )
    return {task.name: task for task in tasks}


# --- one life -----------------------------------------------------------------------------------------------------


class _Counter:
    """Counts events, and ends this process at the chosen one."""

    def __init__(self, point: Point | None, folder: Path) -> None:
        self.counts: Counter[str] = Counter()
        self.operations: list[str] = []
        self._point = point
        self._folder = f"{folder}{os.sep}"
        self._tell = (os.open, os.write)  # as they are before anything is patched

    def count(self, kind: str, what: str = "") -> None:
        """Count an event of a kind; an operation on the disk says `what` it was."""
        self.counts[kind] += 1
        if kind == "disk":
            self.operations.append(what)
        if self._point is not None and (kind, self.counts[kind]) == self._point:
            create, write = self._tell
            note = create(f"{self._folder}died", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            write(note, f"{self._point} {what}".strip().encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def inside(self, path: Any) -> str:
        """The path below the folder of this story, empty if it is not in it; names drawn at random are left out."""
        if isinstance(path, int):
            if not stat.S_ISREG(os.fstat(path).st_mode) and not stat.S_ISDIR(os.fstat(path).st_mode):
                return ""
            path = Path(f"/proc/self/fd/{path}").readlink()
        text = str(path)
        if not text.startswith(self._folder):
            return ""
        return re.sub(r"\.tmp-[0-9a-f]+", ".tmp", text.removeprefix(self._folder))


def _patch_disk(counter: _Counter) -> None:
    """Count what this process does to the disk in the folder of the story, after it was done.

    A write is done in two halves, so that a kill may fall between them. Nothing is really flushed, which a kill
    cannot tell and which would take most of the time.
    """

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def done(*arguments: Any, **options: Any) -> Any:
            held = options.get("dir_fd")
            place = arguments[0] if held is None else Path(f"/proc/self/fd/{held}").readlink() / arguments[0]
            where = counter.inside(place)
            result = None if name == "fsync" else original(*arguments, **options)
            if where:
                counter.count("disk", f"{name} {where}")
            return result

        return done

    for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "ftruncate"):
        setattr(os, name, counted(name))

    write, opened = os.write, io.open

    def write_in_halves(descriptor: int, data: Any) -> int:
        where = counter.inside(descriptor)
        if not where:
            return write(descriptor, data)
        half = write(descriptor, data[: len(data) // 2])
        counter.count("disk", f"write half of {where}")
        whole = half + write(descriptor, data[half:])
        counter.count("disk", f"write {where}")
        return whole

    def open_counted(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        result = opened(file, mode, *arguments, **options)
        where = "" if isinstance(file, int) or mode.startswith("r") else counter.inside(file)
        if not where:
            return result
        counter.count("disk", f"open {where}")
        return _Halved(result, where, counter)

    os.write = write_in_halves
    io.open = builtins.open = open_counted


class _Halved:
    """A file that is written in halves."""

    def __init__(self, file: Any, where: str, counter: _Counter) -> None:
        self._file, self._where, self._counter = file, where, counter

    def write(self, data: Any) -> int:
        for part, said in ((data[: len(data) // 2], "half of "), (data[len(data) // 2 :], "")):
            self._file.write(part)
            self._file.flush()
            self._counter.count("disk", f"write {said}{self._where}")
        return len(data)

    def __enter__(self) -> _Halved:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _patch_work(counter: _Counter) -> None:
    """Count steps of the environments, minibatches, and tokens."""
    from proximo.algorithms import fused
    from proximo.algorithms.adam import FlatAdam
    from proximo.collect.serial_envs import SerialEnvs
    from proximo.collect.workers import WorkerEnvs

    counted: list[tuple[Any, str, str]] = [
        (SerialEnvs, "step", "step"),
        (WorkerEnvs, "step", "step"),
        (FlatAdam, "clipped_step", "minibatch"),
        (fused, "_clipped_step", "minibatch"),
    ]
    if "proximo.models.language" in sys.modules:
        from proximo.models.language import LanguagePolicy

        counted.append((LanguagePolicy, "next_logits", "token"))
    for owner, method, kind in counted:
        original = getattr(owner, method)

        def done(*arguments: Any, original: Any = original, kind: str = kind, **options: Any) -> Any:
            result = original(*arguments, **options)
            counter.count(kind)
            return result

        setattr(owner, method, done)


def _live(words: tuple[Any, ...], point: Point | None, folder: Path) -> None:
    """Do something with a run, in this process; at the end of it, write down what there was to count."""
    alone = threading.active_count() == 1 and len(list(Path("/proc/self/task").iterdir())) == 1
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(folder)
    assert alone, "the process that was forked had threads, which a fork does not copy"
    os.environ |= _ONE_THREAD
    counter = _Counter(point, folder)
    _patch_work(counter)
    _patch_disk(counter)
    try:
        _do(*words)
    except UserError as error:
        print(error, flush=True)
        sys.exit(REFUSED)
    found = json.dumps({"counts": counter.counts, "operations": counter.operations})
    (folder / "counted").write_text(found)


def _do(command: str, *arguments: Any) -> None:
    import proximo
    from proximo import cli

    if command == "resume":
        proximo.resume(arguments[0], allow_import=True, quiet=True)
    elif command == "proximo":
        try:
            cli.main(list(arguments))
        except SystemExit as done:
            if done.code:
                raise
    else:
        places, settings = arguments
        getattr(proximo, command)(*places, quiet=True, **settings)


_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
_FORKS = multiprocessing.get_context("forkserver")


def warm_up() -> None:
    """Start the server that every life is forked from, if it is not running."""
    _FORKS.set_forkserver_preload([*_CONTROL_MODULES, *_LANGUAGE_MODULES])
    with mock.patch.dict(os.environ, _ONE_THREAD | {"TOKENIZERS_PARALLELISM": "false"}):
        multiprocessing.forkserver.ensure_running()


def live(words: tuple[Any, ...], point: Point | None, folder: Path) -> int:
    """Do something with a run in a fork of the warm server, up to `point`; return how the process ended."""
    warm_up()
    (folder / "died").unlink(missing_ok=True)
    (folder / "said").write_text("")
    by_clock = point is not None and point.kind == "seconds"
    process = _FORKS.Process(target=_live, args=(words, None if by_clock else point, folder))
    process.start()
    process.join(point.at if by_clock and point is not None else LONGEST_LIFE)
    if process.is_alive():
        (folder / "died").write_text(f"{point}" if by_clock else "it hung")
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


# --- a run from its beginning to its end -----------------------------------------------------------------------------


@dataclass
class Story:
    """What happened to one run."""

    died: list[str] = field(default_factory=list)
    """Where each life but the last ended."""
    resumed_from: list[str] = field(default_factory=list)
    """What each life but the first went on from."""
    end: dict[str, str] = field(default_factory=dict)
    """Digests of everything that is the same after an undisturbed run; see `end_of`."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many events of each kind the last life had."""
    operations: list[str] = field(default_factory=list)
    """The last life's operations on the disk."""
    failure: str = ""
    """Why the run could not be brought to its end; empty if it could."""


def tell(task: Task, folder: Path, points: Sequence[Point] = (), *, typed: bool = False) -> Story:
    """Train in `folder`; after each kill go on, as `proximo resume` does, until the run is at its end.

    Each of `points` ends one life. Where there is nothing to resume, the message must say how to begin again, and
    that is what is done. `typed` goes on by the command line in place of `proximo.resume`.
    """
    folder.mkdir(parents=True)
    story, left = Story(), list(points)
    run = folder / "run"
    begun: tuple[Any, ...] = (task.function, task.arguments, {**task.settings, "run_dir": str(run)})
    words = begun
    while True:
        code = live(words, left[0] if left else None, folder)
        said = (folder / "said").read_text()
        run = max((folder / "runs").glob("*/*"), default=run)  # where a typed command began again
        if code == 0:
            found = json.loads((folder / "counted").read_text())
            story.counts, story.operations, story.end = found["counts"], found["operations"], end_of(run)
            return story
        if code == REFUSED and words[0] in ("resume", "proximo") and words is not begun:
            begun = words = _begin_again(said, begun)
            if not words:
                story.failure = said
                return story
            story.resumed_from[-1] = "nothing: began again"
            continue
        if code != -signal.SIGKILL or not left:
            story.failure = f"ended with {code}: {said[-2000:]}"
            return story
        del left[0]
        story.died.append((folder / "died").read_text())
        story.resumed_from.append(_newest(run))
        words = ("proximo", "resume", str(run), "--allow-import", "--quiet") if typed else ("resume", str(run))


def _newest(run: Path) -> str:
    try:
        checkpoint = newest_checkpoint(run / "checkpoints")
    except UserError:
        return "nothing"
    return f"step {checkpoint.step}" + "".join(f"; skipped {reason}" for reason in checkpoint.skipped)


def _begin_again(said: str, begun: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a person would do who reads that there is nothing to resume; nothing if the message does not say."""
    typed = re.search(r"^.*: (proximo \w+ --config .+)$", said, re.MULTILINE)
    if typed:
        return tuple(shlex.split(typed[1]))
    is_new = re.search(r"There is no .*/run: |begin it again with the same command", said) is not None
    return begun if is_new else ()


def end_of(run: Path) -> dict[str, str]:
    """Digests of what a run has come to: tensors and counters of its last checkpoint, metrics, model, and books.

    The books are which checkpoints there are, which of them `latest` and `best` name, and what is left behind.
    """
    directory = open_run(run)
    checkpoint = newest_checkpoint(directory.checkpoints)
    end = {stem: digest(group) for stem, group in checkpoint.tensors.items()}
    end["state"] = _digest({name: value for name, value in checkpoint.state.items() if name not in CLOCKS})
    rows = read_metrics(directory.metrics_path)
    end["metrics"] = _digest([{name: value for name, value in row.items() if name not in CLOCKS} for row in rows])
    end |= _model(directory)
    listed = ", ".join(names.all_in(directory.checkpoints))
    pointers = [f"{each}: {names.pointed(directory.checkpoints, each)}" for each in (names.LATEST, names.BEST)]
    end["books"] = "; ".join([listed, *pointers, f"left behind: {len(list(directory.path.rglob('.tmp-*')))}"])
    return end


def _model(directory: RunDirectory) -> dict[str, str]:
    """The result of a language run."""
    from safetensors.torch import load_file

    end: dict[str, str] = {}
    if (directory.path / "model.safetensors").exists():
        end["model"] = digest(load_file(directory.path / "model.safetensors"))
    for name in ("samples.jsonl", "tokenizer.json", "config.json"):
        if (directory.path / name).exists():
            end[name] = _digest((directory.path / name).read_text())
    return end


def digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of tensors with their names, types and shapes, bit for bit."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return whole.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The names under which two ends are not the same."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
