"""Settings, batches and data files that hypothesis makes up: how many were tried, and how many broke something.

    python benchmarks/fuzz.py --examples 500     # of each property of tests/fuzz, fresh ones each time
    python benchmarks/fuzz.py --table            # only write docs/reliability.md from the results

Each line of benchmarks/results/fuzz.jsonl is one property. A property breaks on a traceback, on an exit code other than
0 and 2, on weights that are not finite, on a file that was written where a command was refused, and so on: it says what
must hold. A finding ends its property, and is printed with the example that shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from records import add_row, in_words, read_rows, write_between

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fuzz.jsonl"
KINDS = {
    "test_configs": "settings, from flags, files and Python",
    "test_batches": "batches",
    "test_data_files": "data files",
}
COUNTED = re.compile(r"(\d+) passing, (\d+) failing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=500, help="of each property")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    if not given.table:
        for file in KINDS:
            done = {row["property"] for row in read_rows(RESULTS) if row["examples"] == given.examples}
            for name in properties(file):
                if name not in done:
                    keep(file, name, given.examples)
    write_table()


def properties(file: str) -> list[str]:
    """The tests of a file that are tried on examples."""
    text = (HERE.parent / "tests" / "fuzz" / f"{file}.py").read_text()
    return re.findall(r"^@examples\(.*?^def (test_\w+)", text, flags=re.MULTILINE | re.DOTALL)


def keep(file: str, name: str, count: int) -> None:
    """Try one property in a process of its own, and write down what came of it."""
    words = [sys.executable, "-m", "pytest", "-q", "--hypothesis-show-statistics", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*words, f"tests/fuzz/{file}.py::{name}"],
        cwd=HERE.parent,
        env=os.environ | {"PROXIMO_FUZZ_EXAMPLES": str(count)},
        capture_output=True,
        text=True,
        check=False,
    )
    counts = [tuple(map(int, found)) for found in COUNTED.findall(ran.stdout)]
    row = {
        "file": file,
        "property": name,
        "examples": count,
        "held": sum(passing for passing, _ in counts),
        "broken": sum(failing for _, failing in counts) or int(ran.returncode != 0),
    }
    if row["broken"]:
        print(ran.stdout, file=sys.stderr)
    add_row(RESULTS, row, "hypothesis", "numpy", "transformers", "datasets")
    print(json.dumps(row), flush=True)


def write_table() -> None:
    found = read_rows(RESULTS)
    lines = ["| what | properties | examples tried | broke one |", "|---|---|---|---|"]
    for file, what in KINDS.items():
        own = [row for row in found if row["file"] == file]
        held, broken = sum(row["held"] for row in own), sum(row["broken"] for row in own)
        lines.append(f"| {what} | {len({row['property'] for row in own})} | {held + broken:,} | **{broken}** |")
    write_between("fuzz", lines + (in_words(found) if found else []), "reliability.md")


if __name__ == "__main__":
    main()
