"""The command `proximo export`."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from proximo.errors import tell
from proximo.exporting import Export, Format, check_wanted, export_opened, told
from proximo.runs.directory import open_run
from proximo.saved_run import open_policy, skipped_in_words


@dataclass(frozen=True)
class ExportArguments:
    """Write the policy to a file that runs without Proximo, normalizer and action units inside; check the file."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    format: Format = "onnx"
    """onnx, or torch: a program of torch.export that needs torch alone."""
    output: Path | None = None
    """The file; by default policy.onnx or policy.pt2 in the run."""
    checkpoint: str = "latest"
    """latest, best, or the step of one."""
    env: str | None = None
    """The environment to check the file in, where the run's own name for it is not a registered Gymnasium id."""
    allow_import: bool = False
    """Import the file or module that the run names as its environment; only for runs of your own."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


def export_command(words: list[str]) -> tuple[int, str]:
    """`proximo export RUN --format onnx|torch`."""
    given = tyro.cli(ExportArguments, args=words, prog="proximo export")
    directory = open_run(given.run)
    check_wanted(directory, given.format)
    config, policy, found = open_policy(directory, given.checkpoint)
    if found.skipped:
        tell(f"proximo: {skipped_in_words(found)}")
    result = export_opened(
        directory,
        config,
        policy,
        found,
        format=given.format,
        output=given.output,
        env=given.env,
        allow_import=given.allow_import,
    )
    return 0, json.dumps(told(result)) if given.json else _in_words(result)


def _in_words(result: Export) -> str:
    lines = [f"{shlex.quote(str(result.path))}, policy of step {result.step:,}"]
    width = max(len(port["name"]) for port in (*result.inputs, *result.outputs))
    for kind, ports in (("input", result.inputs), ("output", result.outputs)):
        for port in ports:
            shape = ", ".join(map(str, port["shape"]))
            lines.append(f"{kind:<6}  {port['name']:<{width}}  {port['dtype']} [{shape}]  {port['units']}")
    played = f", {result.from_episodes} of them from episodes" if result.from_episodes else ""
    lines.append(f"checked on {result.observations} observations{played}; largest difference from the policy:")
    for name, far in result.differences.items():
        lines.append(f"  {name:<{width}}  {far:.2g} (at most {result.allowed[name]:.2g})")
    return "\n".join([*lines, *result.notes])
