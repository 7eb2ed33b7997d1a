"""What every benchmark writes beside its numbers, and where its table goes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def processor_flags() -> list[str]:
    """Those of the processor's instruction sets that matter to arithmetic."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next(line.split(":", 1)[1].split() for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return []
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
    return [flag for flag in wanted if flag in found]


def commit() -> str:
    said = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return said.stdout.strip()


def circumstances(*packages: str) -> dict:
    """Machine, versions of these packages, and commit."""
    versions = {"python": platform.python_version()}
    for package in ("proximo", "torch", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return {"commit": commit(), "machine": f"{os.cpu_count()} x {processor()}", "versions": versions}


def read_rows(results: Path, **wanted: object) -> list[dict]:
    """The lines of a file of results that have these values; none where there is no file yet."""
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return [row for row in found if all(row[name] == value for name, value in wanted.items())]


def add_row(results: Path, row: dict, *packages: str) -> None:
    """Write a result down, with machine, versions of these packages, and commit."""
    with results.open("a") as file:
        file.write(json.dumps(row | circumstances(*packages)) + "\n")


def in_words(rows: list[dict]) -> list[str]:
    """The machines, versions and commits of these results."""
    machines = sorted({row["machine"] for row in rows})
    versions = sorted({", ".join(f"{name} {number}" for name, number in row["versions"].items()) for row in rows})
    commits = sorted({row["commit"] for row in rows})
    return ["", f"Machine: {'; '.join(machines)}. Versions: {'; '.join(versions)}.", f"Commits: {', '.join(commits)}."]


def write_between(marker: str, lines: list[str], page: str = "benchmarks.md") -> None:
    """Put these lines between `<!-- marker -->` and `<!-- end of marker -->` in a page of docs."""
    path = HERE.parent / "docs" / page
    before, rest = path.read_text().split(f"<!-- {marker} -->\n")
    _, after = rest.split(f"<!-- end of {marker} -->\n")
    path.write_text(f"{before}<!-- {marker} -->\n" + "\n".join(lines) + f"\n<!-- end of {marker} -->\n{after}")
