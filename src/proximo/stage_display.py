"""What the language stages show: the plan, a live table, samples to read, the result."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from proximo.collect.data import DataNote
from proximo.report.sparkline import sparkline
from proximo.terminal import PLAIN_LINE_EVERY, Display, duration, short

CURVE = {"sft": "loss", "reward": "accuracy", "align": "reward_mean", "dpo": "accuracy"}
"""The metric that is drawn while a stage goes on."""

SHOWN = {
    "sft": ("loss", "held_out_loss", "learning_rate", "grad_norm", "tokens_per_second"),
    "reward": ("loss", "accuracy", "held_out_accuracy", "margin_mean", "learning_rate", "grad_norm"),
    "dpo": ("loss", "accuracy", "margin_mean", "chosen_log_ratio", "rejected_log_ratio", "learning_rate"),
    "align": (
        "reward_mean",
        "kl_to_reference",
        "response_length_mean",
        "eos_fraction",
        "entropy",
        "approx_kl",
        "clip_fraction",
        "explained_variance",
        "beta",
        "rewards_missing",
        "tokens_per_second",
    ),
}
"""The metrics in the live table, in order; those that a run does not have are left out."""

Show = Callable[[dict[str, Any], list[dict[str, Any]]], None]


@dataclass(frozen=True)
class StageDisplay:
    """Where progress goes: standard error, or nowhere; and a page in a browser where one is asked for."""

    console: Console
    dashboard_port: int | None = None
    """As in `terminal.Display`."""

    @staticmethod
    def choose(*, quiet: bool, dashboard_port: int | None = None) -> StageDisplay:
        """A display on standard error; a quiet one shows nothing."""
        return StageDisplay(Display.choose(quiet=quiet).console, dashboard_port)

    def facts(self, rows: dict[str, str]) -> None:
        """Show names with their values, one per line."""
        Display(self.console).facts(rows)

    def say(self, text: str, style: str = "") -> None:
        """Print a text; on a terminal its lines are broken between words."""
        Display(self.console).say(text, style)

    @contextmanager
    def notes(self) -> Iterator[None]:
        """Show what the readers of data warn of as one line each, in place of Python's two with a line of code."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", DataNote)
            shown_otherwise = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *more: Any, **named: Any) -> None:
                if issubclass(category, DataNote):
                    self.say(f"note: {message}")
                else:
                    shown_otherwise(message, category, *more, **named)

            warnings.showwarning = show
            yield

    @contextmanager
    def live(self, stage: str, done: int) -> Iterator[Show]:
        """A table that is updated with each iteration on a terminal, plain lines elsewhere; samples as they come."""
        curve: deque[float | None] = deque(maxlen=2000)
        began, last, shown = time.monotonic(), 0.0, 0

        def left(row: dict[str, Any]) -> str:
            steps = row["iteration"] - done
            return duration((row["n_iterations"] - row["iteration"]) * (time.monotonic() - began) / max(steps, 1))

        def new_samples(samples: list[dict[str, Any]]) -> None:
            nonlocal shown
            if samples and samples[0]["iteration"] != shown:
                shown = samples[0]["iteration"]
                self.console.print(f"samples at iteration {shown}")
                self.console.print(samples_table(samples))

        if Display(self.console).is_live:
            with Live(console=self.console, refresh_per_second=8, transient=False) as live:

                def show(row: dict[str, Any], samples: list[dict[str, Any]]) -> None:
                    curve.append(row.get(CURVE[stage]))
                    new_samples(samples)
                    live.update(_live_table(stage, row, list(curve), left(row), self.console.encoding))

                yield show
            return

        def show_line(row: dict[str, Any], samples: list[dict[str, Any]]) -> None:
            nonlocal last
            new_samples(samples)
            is_edge = row["iteration"] in (done + 1, row["n_iterations"])
            if is_edge or time.monotonic() - last >= PLAIN_LINE_EVERY:
                last = time.monotonic()
                values = "  ".join(f"{words(name)} {short(row[name])}" for name in _present(stage, row))
                self.console.print(
                    f"{row['iteration']:>5}/{row['n_iterations']}  {values}  {left(row)} left", soft_wrap=True
                )

        yield show_line

    def result(
        self, facts: dict[str, str], next_commands: list[str], findings: Sequence[str] = (), page: Path | None = None
    ) -> None:
        """Say what came out of it, where its page is, what the curves show, and what may be typed next."""
        self.console.print()
        self.facts(facts)
        if page is not None:  # not among the facts: on a terminal those are folded, and paths are to be copied
            label = f"{'page':<{max(map(len, facts), default=4)}}"
            self.console.print(f"[bold cyan]{label}[/]  {escape(str(page))}   (open it in a browser)", soft_wrap=True)
        for finding in findings:
            self.say(f"  {finding}", style="yellow" if finding.startswith("!") else "")
        if next_commands:
            self.console.print("\nNext:")
        for command in next_commands:
            self.console.print(f"  [bold]{escape(command)}[/]", soft_wrap=True)


def words(name: str) -> str:
    """A metric's name as people say it."""
    return name.replace("_mean", "").replace("_", " ").replace("kl", "KL")


def samples_table(samples: list[dict[str, Any]]) -> Table:
    """Prompts with their responses, scores and distances to the reference."""
    table = Table(expand=False)
    table.add_column("prompt", overflow="fold", max_width=40)
    table.add_column("response", overflow="fold", max_width=70)
    table.add_column("score", justify="right")
    table.add_column("KL", justify="right")
    for sample in samples:
        prompt = sample["prompt"] if isinstance(sample["prompt"], str) else sample["prompt"][-1]["content"]
        cells = [_cut(prompt, 200), _cut(sample["response"], 400)]
        table.add_row(*map(escape, cells), short(sample["score"]), short(sample["kl"]))
    return table


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _present(stage: str, row: dict[str, Any]) -> list[str]:
    there = [name for name in SHOWN[stage] if row.get(name) is not None]
    return [name for name in there if name != "rewards_missing" or row[name]]


def _live_table(stage: str, row: dict[str, Any], curve: list[float | None], left: str, encoding: str) -> Group:
    table = Table.grid(padding=(0, 3))
    for least in (0, 10, 0, 10):
        table.add_column(justify="left", no_wrap=True, min_width=least)
    cells = [(words(name), short(row[name])) for name in _present(stage, row)] + [("time left", left)]
    cells += [("", "")] * (len(cells) % 2)
    for index in range(0, len(cells), 2):
        (name, value), (name2, value2) = cells[index : index + 2]
        table.add_row(f"[cyan]{name}[/]", f"[bold]{value}[/]", f"[cyan]{name2}[/]", f"[bold]{value2}[/]")
    progress = Table.grid(padding=(0, 1))
    progress.add_row(
        ProgressBar(total=row["n_iterations"], completed=row["iteration"], width=40),
        f"{row['iteration']:,} / {row['n_iterations']:,} iterations",
    )
    return Group(Text(f"{words(CURVE[stage])} " + sparkline(curve, 48, encoding), style="green"), table, progress)
