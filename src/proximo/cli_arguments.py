"""What the commands of the command line take: the docstring under a field is its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from proximo.errors import UserError
from proximo.loggers.following import Loggers, ResumeLoggers


@dataclass(frozen=True)
class ResumeArguments:
    """Go on exactly where a run stopped."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    env: str | None = None
    """The environment, where the run's own name for it is not a registered Gymnasium id."""
    allow_import: bool = False
    """Import the files or modules that the run names (environment, reward), and use its judge; only for runs of your
    own."""
    total_steps: int | None = None
    """Train up to this many steps instead of the number the run was begun with."""
    quiet: bool = False
    """Show no progress."""
    dashboard: bool = False
    """Show the run in a browser while it goes on: a page on this machine, at an address that is printed."""
    dashboard_port: int | None = None
    """The port of that page; by default any free one."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""
    tensorboard: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write event files for TensorBoard, into the folder tensorboard/ of the run; one that has some goes on anyway."""
    no_tensorboard: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write no event files any more."""
    wandb: bool = False
    """Send the metrics to Weights & Biases (extra: wandb); without this, they are not, whatever the run did before."""
    trackio: bool = False
    """Give the metrics to Trackio (extra: trackio); without this, they are not, whatever the run did before."""

    def loggers(self) -> Loggers:
        """Where the metrics go.

        Raises:
            UserError: if there is no such run, a package is missing, or both flags for TensorBoard are given.
        """
        from proximo.runs.directory import open_run

        if self.tensorboard and self.no_tensorboard:
            raise UserError("--tensorboard and --no-tensorboard say the opposite of each other. Leave one out.")
        board = None if self.tensorboard == self.no_tensorboard else self.tensorboard
        return ResumeLoggers(board, self.wandb, self.trackio).of(open_run(self.run))


@dataclass(frozen=True)
class EvaluateArguments:
    """Play episodes with frozen weights and normalizer; scores are in the environment's own rewards."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    episodes: int = 100
    """How many episodes."""
    seed: int = 0
    """Fixes the episodes; training never sees the same ones."""
    stochastic: bool = False
    """Sample actions instead of taking the most likely one."""
    checkpoint: str = "latest"
    """latest, best, or the step of one."""
    env: str | None = None
    """The environment, where the run's own name for it is not a registered Gymnasium id."""
    allow_import: bool = False
    """Import the file or module that the run names as its environment; only for runs of your own."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


@dataclass(frozen=True)
class WatchArguments:
    """Write a video of the policy: an mp4, or a GIF where there is no encoder."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    episodes: int = 1
    """How many episodes, one after the other."""
    seed: int = 0
    """Fixes the episodes."""
    stochastic: bool = False
    """Sample actions instead of taking the most likely one."""
    checkpoint: str = "latest"
    """latest, best, or the step of one."""
    env: str | None = None
    """The environment, where the run's own name for it is not a registered Gymnasium id."""
    allow_import: bool = False
    """Import the file or module that the run names as its environment; only for runs of your own."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


@dataclass(frozen=True)
class ReportArguments:
    """Write a page about one or several runs, draw their curves, and say in words what they show."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path | None = None
    """Folder to write to; by default report/ in the run, or a new folder beside several runs."""
    tensorboard: Path | None = None
    """Also write the metrics into this folder as event files for TensorBoard."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


@dataclass(frozen=True)
class CheckEnvArguments:
    """Tell what is wrong with an environment before training on it."""

    env: tyro.conf.Positional[str]
    """Gymnasium id, my_file.py:MyEnv, or package.module:MyEnv."""
    steps: int = 2000
    """Random steps to play."""
    seed: int = 0
    """Seeds the environment and the random actions."""
    env_kwargs: str = "{}"
    """Arguments for making the environment, as a JSON object."""
    max_episode_steps: int | None = None
    """Truncate episodes after this many steps, as training with this setting would."""
    replay: Path | None = None
    """Play a replay file again, which a stopped run has left."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


@dataclass(frozen=True)
class DoctorArguments:
    """Tell what this machine has, what is missing, and how to mend it; exits with 2 where something is broken."""

    speed: bool = False
    """Measure the speed of a small matrix product and of CartPole too, in a few seconds."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


@dataclass(frozen=True)
class PresetsArguments:
    """List the environments with tuned settings, their sources and measured scores."""


def parse(kind: Any, words: list[str], command: str) -> Any:
    """The words after a command as its arguments."""
    return tyro.cli(kind, args=words, prog=f"proximo {command}")
