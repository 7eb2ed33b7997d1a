"""What `speed.py` has measured: in a plain table, on docs/performance.md, and in a picture."""

from __future__ import annotations

import math
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records import in_words as circumstances_in_words
from records import read_rows, write_between

if TYPE_CHECKING:
    from speed import Task

PEERS = {"sb3": "SB3", "sbx": "SBX", "none": "-"}
COLOURS = {"limit": "#C9C9C9", "ours": "#0072B2", "sb3": "#D55E00", "sbx": "#009E73"}


@dataclass(frozen=True)
class Summary:
    """A task and a peer, over the pairs of the newest series; rates in steps/s as (median, least, most)."""

    name: str
    task: Task
    peer: str
    ours: tuple[float, float, float]
    theirs: tuple[float, float, float] | None
    ratio: tuple[float, float, float] | None
    limit: float | None
    n_pairs: int
    pairs: list[dict[str, Any]]

    @property
    def required(self) -> float | None:
        return self.task.required.get(self.peer)

    @property
    def fraction(self) -> float | None:
        """Of the limit, reached by ours."""
        return self.ours[0] / self.limit if self.limit else None

    @property
    def peer_fraction(self) -> float | None:
        return self.theirs[0] / self.limit if self.limit and self.theirs else None

    @property
    def phases(self) -> dict[str, float]:
        """Where our time goes after the first iterations: the median share of each phase."""
        found = [pair["ours"]["phases"] for pair in self.pairs]
        return {phase: statistics.median(one.get(phase, 0.0) for one in found) for phase in found[-1]}


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least and most."""
    return statistics.median(values), min(values), max(values)


def rates(task: Task, pairs: list[dict[str, Any]], side: str) -> list[float]:
    kind = "whole_steps_per_second" if task.is_whole else "steady_steps_per_second"
    return [pair[side][kind] for pair in pairs]


def best_limit(limits: list[dict[str, Any]]) -> dict[str, Any]:
    """Of measurements of one limit, the least of each part and the highest of each rate."""
    parts = {
        precision: {part: min(limit["parts"][precision][part] for limit in limits) for part in first}
        for precision, first in limits[0]["parts"].items()
    }
    rates = {
        precision: {
            threads: max(limit["flops_per_second"][precision][threads] for limit in limits) for threads in first
        }
        for precision, first in limits[0]["flops_per_second"].items()
    }
    per_second = {precision: 1 / sum(part.values()) for precision, part in parts.items()}
    return limits[0] | {"parts": parts, "flops_per_second": rates, "steps_per_second": per_second}


def limit_of(rows: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> float | None:
    """The limit in the precision that ours ran in."""
    limits = [row["limit"] for row in rows if row["kind"] == "limit"]
    if not limits:
        return None
    found, precision = best_limit(limits)["steps_per_second"], pairs[-1]["ours"]["chosen"].get("precision", "float32")
    return found.get(precision, found["float32"])


def summary(name: str, task: Task, peer: str, rows: list[dict[str, Any]]) -> Summary:
    """Of the rows of one series of one task."""
    pairs = [row for row in rows if row["kind"] == "pair" and row["peer"] == peer]
    has_peer = peer != "none"
    return Summary(
        name=name,
        task=task,
        peer=peer,
        ours=spread(rates(task, pairs, "ours")),
        theirs=spread(rates(task, pairs, "theirs")) if has_peer else None,
        ratio=spread([pair["ratio"] for pair in pairs]) if has_peer else None,
        limit=limit_of(rows, pairs),
        n_pairs=len(pairs),
        pairs=pairs,
    )


def newest_rows(results: Path, name: str, peer: str) -> list[dict[str, Any]]:
    """The rows of the newest series in which a task met this peer."""
    rows = read_rows(results, task=name)
    with_peer = [row["series"] for row in rows if row["kind"] == "pair" and row["peer"] == peer]
    return [row for row in rows if row["series"] == max(with_peer, default=0)]


def summaries(results: Path, tasks: dict[str, Task]) -> list[Summary]:
    found = []
    for name, task in tasks.items():
        met = [peer for peer in ("sb3", "sbx") if newest_rows(results, name, peer)]
        alone = ["none"] if newest_rows(results, name, "none") and not met else []
        found += [summary(name, task, peer, newest_rows(results, name, peer)) for peer in [*met, *alone]]
    return found


def newest_in_words(results: Path, name: str, peer: str, tasks: dict[str, Task]) -> str:
    """The newest pair of a task and a peer."""
    pair = read_rows(results, task=name, kind="pair", peer=peer)[-1]
    (ours,) = rates(tasks[name], [pair], "ours")
    if peer == "none":
        return f"{ours:,.0f} steps/s"
    (theirs,) = rates(tasks[name], [pair], "theirs")
    return f"{ours:,.0f} steps/s against {theirs:,.0f}: {pair['ratio']:.2f} times"


# --- tables -----------------------------------------------------------------------------------------------------------

_HEAD = (
    "task",
    "peer",
    "ours, steps/s",
    "peer, steps/s",
    "ratio",
    "at least",
    "limit",
    "ours of it",
    "peer of it",
    "pairs",
    "commit",
)


def cells(one: Summary) -> list[str]:
    def with_range(values: tuple[float, float, float] | None, digits: int = 0) -> str:
        if values is None:
            return "-"
        median, least, most = (f"{value:,.{digits}f}" for value in values)
        return median if least == most else f"{median} ({least} to {most})"

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    return [
        one.task.about,
        PEERS[one.peer],
        with_range(one.ours),
        with_range(one.theirs),
        with_range(one.ratio, 2),
        "-" if one.required is None else f"{one.required:g}",
        "-" if one.limit is None else f"{one.limit:,.0f}",
        share(one.fraction),
        share(one.peer_fraction),
        str(one.n_pairs),
        ", ".join(sorted({pair["commit"] for pair in one.pairs})),
    ]


def phase_names(found: list[Summary]) -> list[str]:
    names = [name for one in found for name in one.phases]
    return list(dict.fromkeys(names))


def phase_cells(one: Summary, names: list[str]) -> list[str]:
    shares = [f"{100 * one.phases[name]:.0f} %" if name in one.phases else "-" for name in names]
    chosen = ", ".join(f"{name} {value}" for name, value in one.pairs[-1]["ours"]["chosen"].items())
    return [one.task.about, *shares, chosen]


def aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def one_per_task(found: list[Summary]) -> list[Summary]:
    return list({one.name: one for one in reversed(found)}.values())[::-1]


def plain_table(found: list[Summary]) -> list[str]:
    """For a terminal."""
    if not found:
        return ["Nothing has been measured yet."]
    alone, names = one_per_task(found), phase_names(found)
    return [
        *aligned([list(_HEAD), *map(cells, found)]),
        "",
        *aligned([["where our time goes", *names, "chosen"], *(phase_cells(one, names) for one in alone)]),
    ]


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]


def limit_cells(one: Summary, limit: dict[str, Any]) -> list[str]:
    precision = one.pairs[-1]["ours"]["chosen"].get("precision", "float32")
    precision = precision if precision in limit["parts"] else "float32"
    parts = limit["parts"][precision]
    rate = limit["flops_per_second"][precision]
    return [
        one.task.about,
        *(f"{1e6 * parts[part]:.2f}" for part in ("environment", "products", "tanh", "adam")),
        f"{1e6 * sum(parts.values()):.2f}",
        ", ".join(f"{value / 1e9:.0f} ({threads})" for threads, value in rate.items()),
        f"{limit['flops'] / 1e3:,.0f}",
    ]


def write_page(results: Path, found: list[Summary]) -> None:
    """The marked regions of docs/performance.md."""
    page, names = "performance.md", phase_names(found)
    rows = [row for one in found for row in newest_rows(results, one.name, one.peer)]
    lines = markdown(list(_HEAD), [cells(one) for one in found])
    threads = sorted({f"{row['task']} {row['threads']}" for row in rows if row["kind"] == "threads"})
    versions = [row["theirs"]["versions"] for row in rows if "theirs" in row]
    stated = sorted({", ".join(f"{name} {number}" for name, number in one.items()) for one in versions})
    flags = sorted({" ".join(row["flags"]) for row in rows})
    lines += ["", f"SB3's better number of threads: {', '.join(threads) or 'not tried'}. Instruction sets: {flags[0]}."]
    lines += [f"The peers' environments: {'; '.join(stated)}."] if stated else []
    lines += ["", "![steps per second of each task: limit, Proximo, peers](pictures/speed.png)"]
    write_between("speed", lines + circumstances_in_words(rows), page)

    alone = one_per_task(found)
    shares = markdown(["task", *names, "chosen"], [phase_cells(one, names) for one in alone])
    write_between("where our time goes", shares, page)
    limits = [
        (one, [row["limit"] for row in newest_rows(results, one.name, one.peer) if row["kind"] == "limit"])
        for one in alone
    ]
    head = [
        "task",
        "environment, us",
        "products, us",
        "tanh, us",
        "Adam, us",
        "sum, us",
        "GFLOP/s (threads)",
        "kFLOP/step",
    ]
    write_between(
        "limits", markdown(head, [limit_cells(one, best_limit(limit)) for one, limit in limits if limit]), page
    )


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(found: list[Summary], path: Path) -> None:
    """A group of bars per task: the limit, ours, and the peers, in steps per second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    groups = [(one, bars_of(one, found)) for one in one_per_task(found)]
    n_bars = sum(len(bars) for _, bars in groups)
    figure = Figure(figsize=(9, 0.8 + 0.27 * n_bars + 0.3 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes, y, ticks = figure.subplots(), 0.0, []
    shown = [value for _, bars in groups for value in bars.values()]
    for one, bars in groups:
        first, rest = one.task.about.split(", ", 1)
        ticks.append((y + (len(bars) - 1) / 2, "\n".join([first, *textwrap.wrap(rest, 30)])))
        for who, value in bars.items():
            axes.barh(y, value, height=0.86, color=COLOURS[who])
            axes.text(value * 1.04, y, f"{value:,.0f}", va="center", fontsize=8, color="#222222")
            y += 1
        y += 0.9
    axes.set_xscale("log")
    axes.set_xlim(10 ** math.floor(math.log10(min(shown))), max(shown) * 2.2)
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks], fontsize=9)
    axes.set_ylim(y - 1.1, -0.8)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("environment steps per second (logarithmic)")
    named = {"limit": "limit of this machine", "ours": "Proximo", "sb3": "Stable-Baselines3", "sbx": "SBX (JAX)"}
    handles = [Patch(color=COLOURS[who], label=named[who]) for who in named if any(who in bars for _, bars in groups)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def bars_of(one: Summary, found: list[Summary]) -> dict[str, float]:
    """The medians that belong to a task; ours from the pairs with the first of its peers."""
    bars = ({"limit": one.limit} if one.limit else {}) | {"ours": one.ours[0]}
    return bars | {other.peer: other.theirs[0] for other in found if other.name == one.name and other.theirs}
