"""The process that hands a run's metrics to W&B or Trackio: `python -m proximo.loggers.service NAME RUN`.

It reads metrics.jsonl until its standard input ends, which it does when the run is over, however that came. What it
writes on standard output is for the run's terminal, a line each; what the libraries print goes nowhere. The number of
the last row that was sent is noted before the row goes out, so that a resumed run never sends one twice.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from proximo.errors import in_words
from proximo.loggers.following import LOOK_EVERY, SERVICES, MetricsReader, step_of
from proximo.runs import files
from proximo.runs.directory import RunDirectory, read_config

MEND = {
    "wandb": "Log in with `wandb login`, or set WANDB_MODE=offline and send it later with `wandb sync`.",
    "trackio": "",
}


class Connection(NamedTuple):
    """How a service is spoken to."""

    send: Callable[[dict[str, Any]], object]
    finish: Callable[[], object]
    where: str


def main() -> None:
    """Follow one run to its end."""
    name, folder = sys.argv[1:]
    words = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        follow(name, RunDirectory(Path(folder)), words.write)
    except BaseException as error:
        said = " ".join(in_words(error).split())
        words.write(f"note: {SERVICES[name]} gets nothing: {said[:300].rstrip('.')}. The run goes on. {MEND[name]}\n")
    words.flush()
    os._exit(0)  # whatever the libraries would still wait for


def follow(name: str, run: RunDirectory, write: Callable[[str], object]) -> None:
    """Send each row once, until the run is over."""
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), over.set()), daemon=True).start()
    path = run.loggers / f"{name}.json"
    memory = json.loads(path.read_bytes())
    connect = {"wandb": _wandb, "trackio": _trackio}[name]
    connection = connect(run, str(memory["id"]), read_config(run))
    write(f"{SERVICES[name]}: {connection.where}\n")
    reader, is_over = MetricsReader(run.metrics_path), False
    while not is_over:
        is_over = over.wait(LOOK_EVERY)
        rows = [row for row in reader.new_rows() if row.get("iteration", 0) > memory["sent"]]
        if rows:
            memory["sent"] = rows[-1]["iteration"]
            files.replace_file(path, json.dumps(memory).encode())
        for row in rows:
            connection.send({key: value for key, value in row.items() if value is not None})
    connection.finish()


def _wandb(run: RunDirectory, identity: str, settings: dict[str, Any]) -> Connection:
    import wandb  # pyright: ignore[reportMissingImports]

    session: Any = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "proximo"),
        id=identity,
        name=run.path.name,
        group=_task(settings),
        config=settings,
        dir=str(run.loggers),
        resume="allow",
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )
    if "env_id" in settings:
        session.define_metric("*", step_metric="env_steps")
    where = session.url or f"offline; wandb sync {run.loggers / 'wandb'}/offline-run-*"
    return Connection(lambda row: session.log(row, step=row["iteration"]), session.finish, where)


def _trackio(run: RunDirectory, identity: str, settings: dict[str, Any]) -> Connection:
    import trackio  # pyright: ignore[reportMissingImports]

    project = "proximo"
    trackio.init(
        project=project,
        name=f"{run.path.name}-{identity[:4]}",
        group=_task(settings),
        config=settings,
        resume="allow",
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    return Connection(
        lambda row: trackio.log(row, step=step_of(row)), trackio.finish, f"trackio show --project {project}"
    )


def _task(settings: dict[str, Any]) -> str:
    return str(settings.get("env_id", settings.get("stage", "")))


if __name__ == "__main__":
    main()
