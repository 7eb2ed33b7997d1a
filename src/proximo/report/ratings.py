"""A rating curve: how strong past selves of a policy are, against each other and a random player."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from proximo.errors import tell
from proximo.report.folder import png_bytes, prepare_folder, write_ours
from proximo.runs import files
from proximo.runs.directory import RunDirectory

KEPT_NAME = "ratings.json"
MOST_KEPT_BYTES = 1_000_000


def keep_ratings(rated: dict[str, Any], run: RunDirectory) -> None:
    """Write what `training.selfplay.rate` found into the run, where its page finds it; a disk that refuses is told."""
    try:
        files.replace_file(run.path / KEPT_NAME, json.dumps(rated).encode())
    except OSError as error:
        tell(f"proximo: the ratings could not be kept for the page of the run: {files.reason(error)}")


def read_ratings(run: RunDirectory) -> list[dict[str, float]]:
    """Steps, ratings and standard errors of past selves in the order of their steps; empty where none are kept."""
    path = run.path / KEPT_NAME
    try:
        if path.is_symlink() or path.stat().st_size > MOST_KEPT_BYTES:
            return []
        rated = files.parse_json(path.read_bytes())
    except (OSError, ValueError):
        return []
    players = rated.get("players") if isinstance(rated, dict) else None
    names = ("step", "rating", "standard_error")
    found = [
        {name: float(player[name]) for name in names}
        for player in (players if isinstance(players, list) else [])
        if isinstance(player, dict) and all(_is_number(player.get(name)) for name in names)
    ]
    return sorted(found, key=lambda player: player["step"])


def _is_number(value: object) -> bool:
    return (
        isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )


def draw_ratings(rated: dict[str, Any], task: str, folder: Path) -> Path:
    """Draw the ratings that `training.selfplay.rate` found, with two standard errors up and down.

    Raises:
        UserError: if the picture cannot be written.
    """
    from matplotlib.figure import Figure

    path = folder / "ratings.png"
    prepare_folder(folder, [path])
    players = [player for player in rated["players"] if player["step"] is not None]
    figure = Figure(figsize=(8.0, 4.5), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        [player["step"] for player in players],
        [player["rating"] for player in players],
        yerr=[2.0 * player["standard_error"] for player in players],
        marker="o",
        capsize=3,
    )
    axes.axhline(0.0, color="gray", linewidth=1.0, linestyle="--")
    axes.annotate("a player that moves at random", (0.0, 0.0), xytext=(4, 4), textcoords="offset points", color="gray")
    axes.set_title(f"{task}: ratings of the policy's past selves")
    axes.set_xlabel("environment steps")
    axes.set_ylabel("rating (Elo, ± 2 standard errors)")
    axes.grid(visible=True, alpha=0.3)
    write_ours(path, png_bytes(figure))
    return path
