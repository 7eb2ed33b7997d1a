"""Steps per second beside Stable-Baselines3 and SBX, and how far from the limit of the machine.

    pip install -c constraints.txt -e ".[peers]"
    python benchmarks/speed.py                                  # everything that is not done yet, then the page
    python benchmarks/speed.py --only cartpole_cold --peers sb3 # one task, one peer
    python benchmarks/speed.py --full                           # also HalfCheetah's whole million steps
    python benchmarks/speed.py --table                          # only the table, the page and the picture
    python benchmarks/speed.py --quick --peers none             # does it run? (seconds; writes down nothing)

Both programs of a pair run one after the other, each in a fresh process: ours first in one round, the peer in the next.
They get the same task, network, `n_envs`, `rollout_length`, `batch_size`, `n_epochs` and schedules. Each steps it in
its own way: the peers Gymnasium's environments one after the other, with their wrappers; ours what `auto` takes, which
is Gymnasium's own vector version of CartPole and ale-py's of Pong (in `cartpole_steady_serial` one by one too).
A whole run is timed from the start of its process to its end: imports, compiling, training, saving, and with us the
pictures of the report. The steady state is what is left when the first tenth of the iterations has been left out.

Each finished pair is a line of benchmarks/results/speed.jsonl. A series is what has been measured with the same
settings, machine and source of Proximo; what a series has already is not run again, and a change of any of them begins
a new one, as `--fresh` does. Do nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limit import multiplies_bfloat16
from records import add_row, circumstances, processor_flags, read_rows

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed.jsonl"
MEND = 'pip install -c constraints.txt -e ".[peers]"'
MODULES = {"sb3": "stable_baselines3", "sbx": "sbx"}
WARM_SHARE, WARM_LEAST = 0.1, 2
LEARNING = dict(entropy_coef=0.0, value_coef=0.5, max_grad_norm=0.5)
PERCEPTRONS = ["--hidden-sizes", "64", "64", "--activation", "tanh", "--orthogonal-init"]
"""What the peers have where nothing else is said; ours would take the networks of its presets."""


@dataclass(frozen=True)
class Task:
    """What is compared, with which settings."""

    env_id: str
    settings: dict[str, Any]
    steps: int
    about: str
    required: dict[str, float] = field(default_factory=dict)
    """The ratio to be reached, per peer."""
    is_whole: bool = False
    """The whole command is timed, and not the steady state."""
    cache: str = ""
    """Where compiled code is kept: `empty` at the start of each run, `kept` from run to run, or else at home."""
    peer_env_id: str = ""
    only_ours: dict[str, Any] = field(default_factory=dict)
    """Settings of ours that peers have no word for; they change no number, but for the precision."""
    cnn: bool = False
    needs_full: bool = False
    nominal_seconds: float = 60.0

    @property
    def steps_per_iteration(self) -> int:
        return self.settings["n_envs"] * self.settings["rollout_length"]


_CARTPOLE = LEARNING | dict(n_envs=8, rollout_length=32, batch_size=256, n_epochs=20, gamma=0.98, gae_lambda=0.8)
_CARTPOLE |= dict(learning_rate=1e-3, learning_rate_schedule="linear", clip_epsilon=0.2, clip_schedule="linear")
_PLAIN = dict(learning_rate=3e-4, learning_rate_schedule="constant", clip_epsilon=0.2, clip_schedule="constant")
_CHEETAH = LEARNING | _PLAIN | dict(batch_size=64, n_epochs=10, gamma=0.99, gae_lambda=0.95)
_CHEETAH |= dict(normalize_observations=True, normalize_rewards=True, log_std_init=0.0)
_PONG = LEARNING | dict(n_envs=8, rollout_length=128, batch_size=256, n_epochs=4, gamma=0.99, gae_lambda=0.95)
_PONG |= dict(learning_rate=2.5e-4, learning_rate_schedule="linear", clip_epsilon=0.1, clip_schedule="linear")
_WIDE = (
    LEARNING | _PLAIN | dict(n_envs=64, rollout_length=128, batch_size=2048, n_epochs=4, gamma=0.99, gae_lambda=0.95)
)

# What `auto` takes for long runs, whose steady state this is: the few steps that are timed would not repay it.
_AS_LONG = {"update_path": "compiled"}
_ONE, _EIGHT = dict(n_envs=1, rollout_length=2048), dict(n_envs=8, rollout_length=256)

_CARTPOLE_8X32: dict[str, Any] = dict(env_id="CartPole-v1", settings=_CARTPOLE, steps=100_000, nominal_seconds=40.0)
_CHEETAH_STEADY: dict[str, Any] = dict(env_id="HalfCheetah-v5", only_ours=_AS_LONG, nominal_seconds=50.0)
_AS_PIXELS: dict[str, Any] = dict(peer_env_id="PongNoFrameskip-v4", cnn=True, nominal_seconds=80.0)

TASKS: dict[str, Task] = {
    "cartpole_cold": Task(
        **_CARTPOLE_8X32,
        about="CartPole-v1, 8 x 32, whole command, nothing compiled before",
        required={"sb3": 4.0},
        is_whole=True,
        cache="empty",
    ),
    "cartpole_warm": Task(
        **_CARTPOLE_8X32,
        about="CartPole-v1, 8 x 32, whole command, update_path compiled by an earlier one",
        only_ours=_AS_LONG,
        is_whole=True,
        cache="kept",
    ),
    "cartpole_steady": Task(
        **_CARTPOLE_8X32,
        about="CartPole-v1, 8 x 32, steady, update_path compiled",
        required={"sb3": 8.0},
        only_ours=_AS_LONG,
    ),
    "cartpole_steady_serial": Task(
        **_CARTPOLE_8X32,
        about="CartPole-v1, 8 x 32, steady, update_path compiled, ours serial too",
        only_ours=_AS_LONG | {"vectorization": "serial"},
    ),
    "halfcheetah_1x2048": Task(
        **_CHEETAH_STEADY,
        settings=_CHEETAH | _ONE,
        steps=40_960,
        about="HalfCheetah-v5, 1 x 2048, steady",
        required={"sb3": 6.0},
    ),
    "halfcheetah_1x2048_whole": Task(
        env_id="HalfCheetah-v5",
        settings=_CHEETAH | _ONE,
        steps=1_000_000,
        about="HalfCheetah-v5, 1 x 2048, whole command of 1M steps",
        required={"sb3": 6.0},
        is_whole=True,
        cache="empty",
        needs_full=True,
        nominal_seconds=900.0,
    ),
    "halfcheetah_8x256": Task(
        **_CHEETAH_STEADY,
        settings=_CHEETAH | _EIGHT,
        steps=81_920,
        about="HalfCheetah-v5, 8 x 256, steady",
        required={"sb3": 5.0, "sbx": 3.5},
    ),
    "pong_8x128": Task(
        env_id="ALE/Pong-v5",
        settings=_PONG,
        steps=20_480,
        about="Pong, 8 x 128, Nature CNN, steady",
        required={"sb3": 5.0},
        **_AS_PIXELS,
    ),
    "pong_8x128_bfloat16": Task(
        env_id="ALE/Pong-v5",
        settings=_PONG,
        steps=20_480,
        about="Pong, 8 x 128, Nature CNN, steady, ours in bfloat16",
        required={"sb3": 5.0},
        only_ours={"precision": "bfloat16"},
        **_AS_PIXELS,
    ),
    "cartpole_64x128": Task(
        env_id="CartPole-v1",
        settings=_WIDE,
        steps=327_680,
        about="CartPole-v1, 64 x 128, native vector environment, steady",
        only_ours=_AS_LONG,
        nominal_seconds=15.0,
    ),
}


# --- one run of a program, in a process of its own --------------------------------------------------------------------


def flags_of(task: Task) -> list[str]:
    """Our command's flags for the settings of a task."""
    words = [] if task.cnn else list(PERCEPTRONS)
    for name, value in (task.settings | task.only_ours).items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def clean_environment(cache: Path | None) -> dict[str, str]:
    """This process's, with nobody's thread counts; `cache` is where compiled code is kept instead of at home."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    if cache is None:
        return kept
    return kept | {"XDG_CACHE_HOME": str(cache), "NUMBA_CACHE_DIR": str(cache / "numba")}


def timed_process(command: list[str], environment: dict[str, str]) -> tuple[float, dict[str, Any]]:
    """Seconds from the start of a process to its end, and the JSON object in the last line that it printed.

    Raises:
        RuntimeError: with the end of its standard error, if it fails.
    """
    began = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - began
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip()[-2000:] or f"exit code {ran.returncode}")
    return seconds, json.loads(ran.stdout.strip().splitlines()[-1])


def phases_of(row: dict[str, Any]) -> dict[str, float]:
    """Seconds per phase of one iteration, none counted twice: of `collecting` what its parts leave, as `assembling`."""
    phases = {name.removeprefix("seconds_"): row[name] for name in row if name.startswith("seconds_")}
    if "acting" in phases and "environment" in phases:
        phases["assembling"] = phases.pop("collecting") - phases["acting"] - phases["environment"]
    return phases


def without_warm_up(values: list[Any]) -> list[Any]:
    """Without the first tenth of the iterations, and without the first two at least."""
    return values[min(len(values) - 1, max(WARM_LEAST, int(WARM_SHARE * len(values)))) :]


def run_ours(task: Task, steps: int, seed: int, cache: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        # No checkpoint on the way: the peers write none either.
        command = [sys.executable, "-m", "proximo", "train", task.env_id, *flags_of(task), "--total-steps", str(steps)]
        command += [
            "--seed",
            str(seed),
            "--checkpoint-every",
            str(steps),
            "--run-dir",
            str(folder),
            "--quiet",
            "--json",
        ]
        seconds, told = timed_process(command, clean_environment(cache))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        config = tomllib.loads((folder / "config.toml").read_text())
    phases = [phases_of(row) for row in without_warm_up(rows)]
    totals = {phase: sum(one.get(phase, 0.0) for one in phases) for phase in phases[0]}
    chosen = ("update_path", "vectorization", "threads", "precision", "device")
    # A step that only resets is none: env_steps leaves it out.
    steady_steps = rows[-1]["env_steps"] - rows[-len(phases) - 1]["env_steps"]
    return {
        "seconds": seconds,
        "steps": told["env_steps"],
        "whole_steps_per_second": told["env_steps"] / seconds,
        "steady_steps_per_second": steady_steps / sum(totals.values()),
        "phases": {phase: total / sum(totals.values()) for phase, total in totals.items()},
        "threads": config.get("threads"),
        "chosen": {name: config[name] for name in chosen if name in config},
        "return_mean": told["return_mean"],
    }


def run_peer(task: Task, peer: str, steps: int, seed: int, python: str, threads: int | None) -> dict[str, Any]:
    wanted = {"normalize_observations": False, "normalize_rewards": False, **task.settings}
    wanted |= {"peer": peer, "env_id": task.peer_env_id or task.env_id, "cnn": task.cnn}
    wanted |= {"total_steps": steps - steps % task.steps_per_iteration, "seed": seed, "threads": threads}
    command = [python, str(HERE / "peers" / "stable_baselines.py"), json.dumps(wanted)]
    seconds, told = timed_process(command, clean_environment(None))
    iterations = without_warm_up(told["seconds_per_iteration"])
    collecting = sum(without_warm_up(told["seconds_collecting"])) / sum(iterations)
    return {
        "seconds": seconds,
        "steps": told["steps"],
        "whole_steps_per_second": told["steps"] / seconds,
        "steady_steps_per_second": len(iterations) * task.steps_per_iteration / sum(iterations),
        "phases": {"collecting": collecting, "updating": 1 - collecting},
        "threads": told["threads"],
        "versions": told["versions"],
    }


def rate_of(task: Task, run: dict[str, Any]) -> float:
    return run["whole_steps_per_second" if task.is_whole else "steady_steps_per_second"]


# --- series: what has been measured under the same circumstances ------------------------------------------------------


def source_of_proximo() -> str:
    """Which code is measured: git's name of the package's folder, and of what has been changed in it since."""
    spec = importlib.util.find_spec("proximo")
    if spec is None or spec.origin is None:
        sys.exit("proximo is not installed here. Run: pip install -c constraints.txt -e .")
    folder = Path(spec.origin).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=folder, check=False).stdout.strip()

    changes = git("diff", "HEAD", "--", ".") + git("ls-files", "--others", "--exclude-standard", ".")
    tree = git("rev-parse", "--short", "HEAD:./") or "not in git"
    return f"{tree} and changes {hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else tree


@dataclass(frozen=True)
class Session:
    """How this call of the script measures, and where it writes."""

    results: Path
    python: str
    source: str
    repeats: int
    quick: bool
    folder: Path
    fresh: bool = False

    def steps(self, task: Task) -> int:
        return 3 * task.steps_per_iteration if self.quick else task.steps

    def identity(self, name: str) -> dict[str, Any]:
        task = TASKS[name]
        return {
            "task": name,
            "settings": task.settings | task.only_ours,
            "steps": self.steps(task),
            "source": self.source,
            "machine": circumstances()["machine"],
        }

    def series(self, name: str) -> int:
        """The number of the series that this call goes on with, or begins."""
        rows = read_rows(self.results, task=name)
        last = max((row["series"] for row in rows), default=0)
        newest = next((row for row in rows if row["series"] == last), None)
        identity = self.identity(name)
        same = newest is not None and all(newest[key] == value for key, value in identity.items())
        return last if same and not self.fresh else last + 1

    def write(self, name: str, series: int, row: dict[str, Any]) -> None:
        about = self.identity(name) | {"series": series, "flags": processor_flags(), "cores": os.cpu_count()}
        add_row(self.results, about | row, "numpy", "gymnasium", "mujoco", "ale-py")


def missing_peer(peer: str, python: str) -> str:
    """Why a peer cannot be run, and what mends it; empty if it can be."""
    try:
        said = subprocess.run([python, "-c", f"import {MODULES[peer]}"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{peer} is left out: {python} cannot be run ({error}). --peer-python takes a Python interpreter."
    if not said.returncode:
        return ""
    reason = said.stderr.strip().splitlines()[-1] if said.stderr.strip() else "no reason given"
    return f"{peer} is left out: {python} cannot import it ({reason}). To mend it: {MEND}"


def shapes_of(task: Task) -> dict[str, Any]:
    """What a limit hangs on."""
    return {"env_id": task.env_id, "cnn": task.cnn} | {
        key: task.settings[key] for key in ("n_envs", "batch_size", "n_epochs")
    }


def measure_limit(session: Session, name: str, series: dict[str, int], number: int) -> None:
    """Once per round, for all tasks of these shapes: the machine is not always as fast."""
    wanted = shapes_of(TASKS[name]) | ({"seconds": 0.02, "n_steps": 500} if session.quick else {})
    _, limit = timed_process([sys.executable, str(HERE / "limit.py"), json.dumps(wanted)], clean_environment(None))
    for other in series:
        if shapes_of(TASKS[other]) == shapes_of(TASKS[name]):
            session.write(other, series[other], {"kind": "limit", "round": number, "limit": limit})


def best_threads(session: Session, name: str, peer: str, series: int) -> int | None:
    """The thread count that suits the peer better, tried once per series; None for a peer that has its own way."""
    if peer != "sb3":
        return None
    found = read_rows(session.results, task=name, series=series, kind="threads", peer=peer)
    if found:
        return found[-1]["threads"]
    task, rates = TASKS[name], {}
    steps = min(session.steps(task), max(5 * task.steps_per_iteration, 20_480))
    for threads in sorted({1, min(2, os.cpu_count() or 1)}):
        rates[threads] = run_peer(task, peer, steps, 0, session.python, threads)["steady_steps_per_second"]
    best = max(rates, key=lambda threads: rates[threads])
    session.write(name, series, {"kind": "threads", "peer": peer, "rates": rates, "threads": best})
    return best


def measure_pair(session: Session, name: str, peer: str, series: int, number: int) -> float:
    """Run ours and a peer (`none`: ours alone), write the pair down, and return the seconds it took."""
    task, began = TASKS[name], time.perf_counter()
    steps = session.steps(task)
    cache = session.folder / name / (str(number) if task.cache == "empty" else "kept") if task.cache else None
    if task.cache == "kept" and cache is not None and not cache.exists():
        run_ours(task, min(steps, 4 * task.steps_per_iteration), 0, cache)
    order = ["ours"] if peer == "none" else ["ours", "theirs"] if number % 2 == 0 else ["theirs", "ours"]
    runs: dict[str, dict[str, Any]] = {}
    for side in order:
        if side == "ours":
            runs[side] = run_ours(task, steps, number, cache)
        else:
            threads = best_threads(session, name, peer, series)
            runs[side] = run_peer(task, peer, steps, number, session.python, threads)
    row = {"kind": "pair", "peer": peer, "round": number, "seed": number, "order": order, **runs}
    if "theirs" in runs:
        row["ratio"] = rate_of(task, runs["ours"]) / rate_of(task, runs["theirs"])
    session.write(name, series, row)
    return time.perf_counter() - began


def peers_of(task: Task, peers: list[str]) -> list[str]:
    """The peers that a task is compared with; `none` for a task that ours runs alone."""
    wanted = {"sb3"} if task.is_whole else set(task.required)
    return [peer for peer in peers if peer in wanted] or ["none"]


def progress(done: int, planned: list[tuple[str, str, int]], took: dict[tuple[str, str], list[float]]) -> str:
    """How far, and how long it will still take: by the pairs of this kind so far, or by what is usual."""
    left = sum(
        statistics.mean(took.get((name, peer), [TASKS[name].nominal_seconds * (1 if peer == "none" else 1.3)]))
        for name, peer, _ in planned[done:]
    )
    return f"[{done}/{len(planned)}] about {left / 60:.0f} min left" if left >= 60 else f"[{done}/{len(planned)}]"


def measure(session: Session, names: list[str], peers: list[str]) -> None:
    """All pairs that are not on disk yet, round by round, so that a slow hour falls on everyone alike."""
    from speed_page import newest_in_words

    series = {name: session.series(name) for name in names}
    planned = [
        (name, peer, number)
        for number in range(session.repeats)
        for name in names
        for peer in peers_of(TASKS[name], peers)
        if not read_rows(session.results, task=name, series=series[name], kind="pair", peer=peer, round=number)
    ]
    took: dict[tuple[str, str], list[float]] = {}
    refused: set[tuple[str, str]] = set()
    for done, (name, peer, number) in enumerate(planned):
        if (name, peer) in refused:
            continue
        print(f"{progress(done, planned, took)}: {name}, {peer}, round {number + 1}", file=sys.stderr, flush=True)
        try:
            took.setdefault((name, peer), []).append(measure_pair(session, name, peer, series[name], number))
            if not read_rows(session.results, task=name, series=series[name], kind="limit", round=number):
                measure_limit(session, name, series, number)
        except RuntimeError as error:
            print(f"{name} with {peer} is left out: {error}", file=sys.stderr, flush=True)
            refused.add((name, peer))
        else:
            print(f"    {newest_in_words(session.results, name, peer, TASKS)}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--repeats", type=int, default=5, help="pairs per task and peer (5)")
    parser.add_argument("--peers", default="sb3,sbx", help="sb3,sbx (both by default), or none")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has the peers (this one)")
    parser.add_argument("--full", action="store_true", help="also the tasks of many minutes")
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever is there already")
    parser.add_argument("--quick", action="store_true", help="a few iterations of each, and nothing is written down")
    parser.add_argument("--table", action="store_true", help="only write the table, the page and the picture")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    peers = [] if arguments.peers == "none" else arguments.peers.split(",")
    if unknown := [peer for peer in peers if peer not in MODULES]:
        parser.error(f"--peers: there is no {unknown[0]!r}; give {', '.join(MODULES)} or none")
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = folder / "speed.jsonl" if arguments.quick else arguments.results
        if not arguments.table:
            refusals = {peer: missing_peer(peer, arguments.peer_python) for peer in peers}
            print("".join(f"{refusal}\n" for refusal in refusals.values() if refusal), end="", file=sys.stderr)
            session = Session(
                results=results,
                python=arguments.peer_python,
                source=source_of_proximo(),
                repeats=1 if arguments.quick else arguments.repeats,
                quick=arguments.quick,
                folder=folder,
                fresh=arguments.fresh,
            )
            names = arguments.only or [name for name, task in TASKS.items() if arguments.full or not task.needs_full]
            names = [name for name in names if can_run(TASKS[name])]
            warn_of_a_busy_machine()
            try:
                measure(session, names, [peer for peer in peers if not refusals[peer]])
            except KeyboardInterrupt:
                sys.exit("\nStopped. Finished pairs are kept: the same command goes on with the others.")
        tell(results, TASKS, write=results == RESULTS)


def can_run(task: Task) -> bool:
    """Whether the processor has the instructions for it; says so if not."""
    if task.only_ours.get("precision") != "bfloat16" or multiplies_bfloat16():
        return True
    print(f"{task.about}: left out, this processor has no products in bfloat16.", file=sys.stderr, flush=True)
    return False


def warn_of_a_busy_machine() -> None:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.7:
        said = f"This machine is busy (load average {load:.1f}): what is measured now is too slow, and too far apart."
        print(said, file=sys.stderr, flush=True)


def tell(results: Path, tasks: dict[str, Task], *, write: bool) -> None:
    """Print the table; write the page and the picture where the results are the project's own."""
    from speed_page import draw, plain_table, summaries, write_page

    found = summaries(results, tasks)
    print("\n".join(plain_table(found)))
    if write and found:
        draw(found, HERE.parent / "docs" / "pictures" / "speed.png")
        write_page(results, found)


if __name__ == "__main__":
    main()
