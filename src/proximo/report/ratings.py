"""The picture of a rating curve: how strong past selves of a policy are, against each other and a random player."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proximo.report.folder import png_bytes, prepare_folder, write_ours


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
