"""What `train` and `resume` show: the plan, the live table (plain lines where it is no terminal), the result."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from proximo.algorithms.ppo import PPO
from proximo.collect.envs import VectorEnvs
from proximo.errors import in_range, tell
from proximo.lines import fitted
from proximo.report.sparkline import sparkline
from proximo.runs.checkpoint import Checkpoint
from proximo.runs.directory import RunDirectory
from proximo.runs.manifest import differences
from proximo.training.config import ControlConfig, settings_of

PLAIN_LINE_EVERY = 5.0
"""Seconds between two lines where there is no terminal."""

SHOWN_IN_PLAN = (
    "n_envs",
    "rollout_length",
    "batch_size",
    "n_epochs",
    "learning_rate",
    "clip_epsilon",
    "gamma",
    "gae_lambda",
    "entropy_coef",
)

Show = Callable[[dict[str, Any], VectorEnvs], None]


@dataclass(frozen=True)
class Display:
    """Where progress goes: standard error, or nowhere; and a page in a browser where one is asked for."""

    console: Console
    dashboard_port: int | None = None
    """Where the page of the run is served while it goes on; 0 is any free port, None serves none."""

    @staticmethod
    def choose(*, quiet: bool, dashboard_port: int | None = None) -> Display:
        """A display on standard error; a quiet one shows nothing."""
        file = cast(TextIO, _Forgiving(sys.stderr))
        console = Console(file=file, quiet=quiet, highlight=False)
        if not console.is_terminal:
            console = Console(file=file, quiet=quiet, highlight=False, width=200)  # no path is cut in two
        return Display(console, dashboard_port)

    @property
    def is_live(self) -> bool:
        """Whether a table can be drawn over and over."""
        return self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.quiet

    def plan(self, config: ControlConfig, run: RunDirectory, spaces: str, source: str, seconds: float | None) -> None:
        """Say what will be done, with which settings and whence, how long it should take, and where it goes."""
        settings = settings_of(config)
        chosen = "  ".join(f"{name} {short(settings[name])}" for name in SHOWN_IN_PLAN if name in settings)
        schedules = [name for name in ("learning_rate_schedule", "clip_schedule") if settings.get(name) == "linear"]
        switched_on = [name for name in ("normalize_observations", "normalize_rewards") if settings[name]]
        if config.network.memory != "none":
            switched_on.append(f"memory {config.network.memory} in pieces of {config.piece_length} steps")
        switched_on += [f"exploration {settings['exploration']}"] if config.intrinsic.explores else []
        extra = "  ".join([*switched_on, *(f"{name} linear" for name in schedules)])
        algorithm = config.algorithm_name.upper()
        if isinstance(config.algorithm, PPO):
            algorithm = "PPO-Clip" if config.algorithm.objective == "clip" else "PPO-Penalty"
        expected = "unknown" if seconds is None else f"about {duration(seconds)}"
        rows = {
            "environment": f"{config.environment.env_id}   {spaces}",
            "algorithm": f"{algorithm}, {config.total_steps:,} steps, seed {config.seed}",
            "settings": source,
            "": chosen + (f"\n{extra}" if extra else ""),
            "how": _how(config),
            "expected time": expected,
            "run directory": str(run.path),
        }
        self.facts(rows)

    def resumed(
        self, run: RunDirectory, checkpoint: Checkpoint, fresh: list[int], config: ControlConfig, changed: str
    ) -> None:
        """Say where a run goes on, and how exactly; `changed` says what settings have become since."""
        for reason in checkpoint.skipped:
            tell(f"skipped a damaged checkpoint: {reason}")  # also where the display is quiet
        level = "exact: every open episode was played again and came back to the same observation"
        if config.environment.vectorization in ("native", "device"):
            level = "exact: every environment is in the state it was in"
        if fresh:
            level = (
                f"statistical: {len(fresh)} of {config.environment.n_envs} environments could not be brought back to "
                "where they were and begin fresh episodes"
            )
        elif changed:
            level = ""
        elif config.device != "cpu":
            level = "statistical: a GPU adds numbers up in no fixed order"
        level = "\n".join(filter(None, [level, changed, differences(checkpoint.versions)]))
        self.facts({"run directory": str(run.path), "goes on at": f"step {checkpoint.step:,}", "resume": level})

    @contextmanager
    def live(self, config: ControlConfig, steps_before: int = 0) -> Iterator[Show]:
        """Show each iteration's metrics as they come: a table that updates itself, or a line now and then."""
        curve: deque[float | None] = deque(maxlen=2000)
        clock = _Clock(config.total_steps, steps_before)
        told: set[str] = set()

        def note(row: dict[str, Any], envs: VectorEnvs) -> None:
            curve.append(row["return_mean"])
            clock.note(row["env_steps"])
            for warning in getattr(envs, "warnings", []):
                if warning not in told:
                    told.add(warning)
                    self.say(f"note: {warning}")

        if self.is_live:
            with Live(console=self.console, refresh_per_second=8, transient=False) as live:

                def show(row: dict[str, Any], envs: VectorEnvs) -> None:
                    note(row, envs)
                    live.update(_table(row, list(curve), config, clock, self.console.encoding))

                yield show
            return
        last = 0.0

        def show_line(row: dict[str, Any], envs: VectorEnvs) -> None:
            nonlocal last
            note(row, envs)
            ended = row["env_steps"] + config.steps_per_iteration > config.total_steps
            if ended or time.monotonic() - last >= PLAIN_LINE_EVERY or row["iteration"] == 1:
                last = time.monotonic()
                self.console.print(_line(row, config, clock), soft_wrap=True)

        yield show_line

    def result(self, facts: dict[str, str], page: Path | None, findings: list[str], next_commands: list[str]) -> None:
        """Say what came out of it, where its page is, and what may be typed next."""
        self.console.print()
        self.facts(facts)
        if page is not None:
            self.console.print(f"page        {escape(str(page))}   (open it in a browser)", soft_wrap=True)
        for finding in findings:
            self.say(finding, style="yellow" if finding.startswith("!") else "")
        if next_commands:
            self.console.print("\nNext:")
        for command in next_commands:
            self.console.print(f"  [bold]{escape(command)}[/]", soft_wrap=True)

    def say(self, text: str, style: str = "") -> None:
        """Print a text; on a terminal its lines are broken between words."""
        width = self.console.width if self.console.is_terminal else None
        self.console.print(escape(fitted(text, width)), style=style, soft_wrap=True)

    def facts(self, rows: dict[str, str]) -> None:
        """Print names with what there is to say of each."""
        if not self.console.is_terminal:
            width = max(map(len, rows), default=0)
            for name, value in rows.items():
                first, *more = value.split("\n")
                lines = [f"{name:<{width}}  {first}", *(f"{'':<{width}}  {line}" for line in more)]
                self.console.print(escape("\n".join(lines)), soft_wrap=True)
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, escape(value))
        self.console.print(table)


def dashboard_port(given: Any) -> int | None:
    """The port that the flags ask for: 0 for any, None where they ask for no dashboard.

    Raises:
        UserError: for a number that no port has.
    """
    in_range("dashboard_port", given.dashboard_port, optional=True, at_least=1, at_most=65535, whole=True, usual="8765")
    if given.dashboard_port is not None:
        return given.dashboard_port
    return 0 if given.dashboard else None


class _Forgiving:
    """Standard error that nobody may be reading any more, or that is full: the display goes quiet, no more."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> None:
        self._try(lambda stream: stream.write(text))

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        if self.stream is None:
            raise OSError("standard error is closed")
        return self.stream.fileno()

    def _try(self, act: Callable[[TextIO], object]) -> None:
        if self.stream is not None:
            try:
                act(self.stream)
            except (OSError, ValueError):  # a closed pipe, a full disk, a closed file
                self.stream = None


class _Clock:
    """Time since the beginning of this session, and what is left at its mean speed."""

    def __init__(self, total_steps: int, steps_before: int) -> None:
        self.total_steps = total_steps
        self.steps = self.steps_before = steps_before
        self.began = time.monotonic()

    def note(self, env_steps: int) -> None:
        self.steps = env_steps

    @property
    def speed(self) -> float:
        return (self.steps - self.steps_before) / max(time.monotonic() - self.began, 1e-9)

    @property
    def seconds_left(self) -> float:
        return max(self.total_steps - self.steps, 0) / max(self.speed, 1e-9)


def _how(config: ControlConfig) -> str:
    """What was chosen for speed."""
    kinds = {
        "eager": "gradients derived by torch",
        "fused": "gradients written out",
        "compiled": "machine code",
        "graphed": "a CUDA graph",
    }
    path = config.update_path
    count = min(config.threads, 2) if path == "compiled" else config.threads
    threads = f"{count} thread{'s' * (count != 1)}"
    task = config.environment
    return f"update {path} ({kinds.get(path, path)}), {threads}; {task.n_envs} environments, {task.vectorization}"


def _table(
    row: dict[str, Any], curve: list[float | None], config: ControlConfig, clock: _Clock, encoding: str
) -> Group:
    """The live table of one moment."""
    table = Table.grid(padding=(0, 3))
    for least in (0, 10, 0, 10):  # numbers that grow longer move nothing
        table.add_column(justify="left", no_wrap=True, min_width=least)
    cells = [
        ("return", short(row["return_mean"])),
        ("length", short(row["length_mean"])),
        ("episodes", f"{row['n_episodes']:,}"),
        ("entropy", short(row.get("entropy"))),
        ("approx KL", short(row.get("approx_kl"))),
        ("clip fraction", short(row.get("clip_fraction"))),
        ("explained var.", short(row.get("explained_variance"))),
        ("value loss", short(row.get("value_loss"))),
        ("learning rate", short(row["learning_rate"])),
        ("steps/s", f"{clock.speed:,.0f}"),
        ("time left", duration(clock.seconds_left)),
        ("iteration", f"{row['iteration']:,}"),
    ]
    for index in range(0, len(cells), 2):
        (name, value), (name2, value2) = cells[index : index + 2]
        table.add_row(f"[cyan]{name}[/]", f"[bold]{value}[/]", f"[cyan]{name2}[/]", f"[bold]{value2}[/]")
    progress = Table.grid(padding=(0, 1))
    progress.add_row(
        ProgressBar(total=config.total_steps, completed=row["env_steps"], width=40),
        f"{row['env_steps']:,} / {config.total_steps:,} steps",
    )
    return Group(Text("return " + sparkline(curve, 48, encoding), style="green"), table, progress)


def _line(row: dict[str, Any], config: ControlConfig, clock: _Clock) -> str:
    return (
        f"{row['env_steps']:>9,}/{config.total_steps:,} steps  return {short(row['return_mean'])}  "
        f"length {short(row['length_mean'])}  entropy {short(row.get('entropy'))}  KL {short(row.get('approx_kl'))}  "
        f"clip {short(row.get('clip_fraction'))}  explained {short(row.get('explained_variance'))}  "
        f"{clock.speed:,.0f} steps/s  {duration(clock.seconds_left)} left"
    )


def short(value: Any) -> str:
    """A number in few characters; - for none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return str(value)


def duration(seconds: float) -> str:
    """Seconds in words."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
