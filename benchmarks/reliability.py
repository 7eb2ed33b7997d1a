"""What happens to runs and checkpoints that something goes wrong with.

    python benchmarks/reliability.py kills         # runs that are killed anywhere, and resumed
    python benchmarks/reliability.py corruption    # checkpoints whose files are cut short or have a bit changed
    python benchmarks/reliability.py table         # only write docs/reliability.md from the results

Each kill, and each kind of damage to each file, is a line of benchmarks/results/reliability.jsonl, with the machine,
versions and commit; what is there is not done again. Required: after every kill a run ends with the tensors and the
metrics of the undisturbed run, bit for bit; all damage is found, with the name of the file, and `proximo resume` falls
back to the checkpoint before.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from records import add_row, in_words, read_rows, write_between

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from proximo.errors import UserError  # noqa: E402
from proximo.runs import names  # noqa: E402
from proximo.runs.checkpoint import load_checkpoint  # noqa: E402
from tests import kills  # noqa: E402
from tests.kills import Point, Story, Task  # noqa: E402

RESULTS = HERE / "results" / "reliability.jsonl"
N_FLIPS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["kills", "corruption", "table"])
    command = parser.parse_args().command
    with tempfile.TemporaryDirectory() as folder:
        if command == "kills":
            kill_runs(Path(folder))
        elif command == "corruption":
            corrupt_checkpoints(Path(folder))
    write_tables()


def rows(test: str) -> list[dict]:
    return read_rows(RESULTS, test=test)


def keep(row: dict) -> None:
    add_row(RESULTS, row, "transformers", "numpy", "gymnasium", "safetensors")


# --- kills ----------------------------------------------------------------------------------------------------------


def kill_runs(folder: Path) -> None:
    """In an order by chance, so that whatever is done when it is stopped is spread over everything."""
    done = {(row["task"], row["kind"], tuple(row["points"])) for row in rows("kills")}
    todo: list[tuple[Task, str, list[Point]]] = []
    undisturbed: dict[str, Story] = {}
    for task in (kills.CONTROL | kills.language_tasks(folder / "language")).values():
        whole = undisturbed[task.name] = kills.tell(task, folder / task.name)
        assert not whole.failure, whole.failure
        todo += [(task, kind, points) for kind, points in wanted(task, whole)]
    todo = [one for one in todo if (one[0].name, one[1], tuple(map(str, one[2]))) not in done]
    random.Random(0).shuffle(todo)
    print(f"{len(todo)} runs to kill", flush=True)
    for task, kind, points in todo:
        kill(task, kind, points, undisturbed[task.name], folder / "killed")


def kill(task: Task, kind: str, points: list[Point], undisturbed: Story, folder: Path) -> None:
    began = time.perf_counter()
    story = kills.tell(task, folder, points, typed=kind == "typed")
    differs = kills.differing(undisturbed.end, story.end)
    row = {"test": "kills", "task": task.name, "kind": kind, "points": [str(point) for point in points]}
    row |= {"died": story.died, "resumed_from": story.resumed_from, "differs": differs, "failure": story.failure}
    row["survived"] = not story.failure and set(differs) <= {"books"}
    row["seconds"] = round(time.perf_counter() - began, 1)
    keep(row)
    print(f"{task.name}: {story.died} -> {story.resumed_from} {differs} {story.failure} {row['seconds']} s", flush=True)
    shutil.rmtree(folder)


def wanted(task: Task, undisturbed: Story) -> Iterator[tuple[str, list[Point]]]:
    """The kill points of a task: operations on the disk, moments of work, moments by the clock, several in a row."""
    operations, counts, draw = undisturbed.operations, undisturbed.counts, random.Random(task.name)
    control = task.function == "train"
    for number in _disk_points(task, operations):
        yield "disk", [Point("disk", number)]
    for kind in ("step", "token", "minibatch"):
        for _ in range(min(5 if control else 2, counts.get(kind, 0))):
            yield kind, [Point(kind, draw.randint(1, counts[kind]))]
    for _ in range(4 if control else 2):
        yield "seconds", [Point("seconds", round(draw.uniform(0.1, 1.5) * (1 if control else 5), 2))]
    for _ in range(2 if control else 1):
        rest = len(operations) // 2
        later = [Point("disk", draw.randint(1, rest)), Point("minibatch", draw.randint(1, 3))]
        yield "several", [Point("disk", draw.randint(rest // 2, rest)), *later]
    yield "typed", [Point("disk", draw.randint(len(operations) // 2, len(operations)))]


def _disk_points(task: Task, operations: list[str]) -> list[int]:
    """Every operation of one save, and of what comes before the first one, for one task; a sample for the others."""
    saves = [number for number, said in enumerate(operations, start=1) if said == "mkdir run/checkpoints/.tmp"]
    first_saved, whole = operations.index("write half of run/metrics.jsonl") + 1, len(operations)
    if task.name == "Pendulum-v1, serial":
        chosen = [
            *range(1, 10),
            *range(10, first_saved, 9),
            *range(first_saved, saves[2] + 1),
            *range(saves[2], whole, 8),
        ]
    elif task.name == "CartPole-v1, serial":
        chosen = [3, 8, *range(first_saved, whole + 1, 4)]
    elif task.name.endswith("workers"):
        chosen = [5, *range(first_saved, whole + 1, 15)]
    else:
        chosen = [4, *range(saves[1], whole + 1, 9 if task.name == "align, ppo" else 18), whole - 5]
    return sorted({number for number in chosen if number <= whole})


# --- corruption -----------------------------------------------------------------------------------------------------


def corrupt_checkpoints(folder: Path) -> None:
    language = kills.language_tasks(folder / "language")
    for task, point in (
        (kills.CONTROL["Pendulum-v1, serial"], Point("minibatch", 13)),
        (language["align, grpo with lora"], Point("minibatch", 12)),
    ):
        kept = Task(task.name, task.function, task.arguments, {**task.settings, "keep_checkpoints": 2})
        undisturbed = kills.tell(kept, folder / "undisturbed")
        run = folder / "killed" / "run"
        (folder / "killed").mkdir()
        kills.live((kept.function, kept.arguments, {**kept.settings, "run_dir": str(run)}), point, folder / "killed")
        newest, *older = names.all_in(run / "checkpoints")
        assert older, "there is nothing to fall back to"
        for path in sorted((run / "checkpoints" / newest).iterdir()):
            damage(task, path)
            fall_back(task, path, undisturbed, folder)
        shutil.rmtree(folder / "undisturbed")
        shutil.rmtree(folder / "killed")


def damaged(data: bytes, name: str) -> dict[str, list[bytes]]:
    """Contents that are wrong, by kind."""
    draw = random.Random(f"{name} {len(data)}")
    flipped = []
    for _ in range(N_FLIPS):
        other = bytearray(data)
        other[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        flipped.append(bytes(other))
    header = 8 + int.from_bytes(data[:8], "little") if name.endswith(".safetensors") else len(data) // 3
    lengths = {
        0,
        1,
        8,
        header - 1,
        header,
        header + 1,
        len(data) // 2,
        len(data) - 1,
        *draw.sample(range(len(data)), 20),
    }
    cut = [data[:length] for length in sorted(lengths) if length < len(data)]
    return {
        "bit changed": flipped,
        "cut short": cut,
        "longer": [data + b"\0", data + b"\n", data * 2],
        "zeros": [bytes(len(data))],
    }


def damage(task: Task, path: Path) -> None:
    """Every kind of damage to one file of a checkpoint: is it found, and is the file named?"""
    done = {(row["task"], row["file"], row["damage"]) for row in rows("corruption")}
    data = path.read_bytes()
    for kind, contents in damaged(data, path.name).items():
        if (task.name, path.name, kind) in done:
            continue
        found = named = 0
        for content in contents:
            path.write_bytes(content)
            try:
                load_checkpoint(path.parent)
            except UserError as error:
                found += 1
                named += path.name in str(error)
        path.write_bytes(data)
        row = {"test": "corruption", "task": task.name, "file": path.name, "bytes": len(data), "damage": kind}
        keep(row | {"tried": len(contents), "found": found, "named": named})
        print(f"{task.name} {path.name} {kind}: {found} of {len(contents)} found, {named} named", flush=True)
    load_checkpoint(path.parent)


def fall_back(task: Task, path: Path, undisturbed: Story, folder: Path) -> None:
    """Resume a run whose newest checkpoint is damaged: from the one before, saying so, to the same end."""
    done = {(row["task"], row["file"], row["damage"]) for row in rows("fallback")}
    data = path.read_bytes()
    for kind in ("bit changed", "cut short"):
        if (task.name, path.name, kind) in done:
            continue
        path.write_bytes(damaged(data, path.name)[kind][-1])
        copy = folder / "copy"
        shutil.copytree(path.parents[2], copy / "run")
        path.write_bytes(data)
        code = kills.live(("resume", str(copy / "run")), None, copy)
        said = (copy / "said").read_text()
        differs = kills.differing(undisturbed.end, kills.end_of(copy / "run")) if code == 0 else ["not resumed"]
        row = {"test": "fallback", "task": task.name, "file": path.name, "damage": kind, "differs": differs}
        keep(row | {"survived": set(differs) <= {"books"}, "said_so": path.name in said and "skipped" in said})
        print(f"{task.name} {path.name} {kind}: resumed, {differs}, {said.strip()[:200]}", flush=True)
        shutil.rmtree(copy)


# --- tables ---------------------------------------------------------------------------------------------------------


def write_tables() -> None:
    write_between("kills", _kill_lines(), page="reliability.md")
    write_between("corruption", _corruption_lines(), page="reliability.md")


def _kill_lines() -> list[str]:
    found = rows("kills")
    lines = [
        "| task | on disk operations | at steps, tokens, minibatches | by the clock | several in a row | kills | "
        "ended bit for bit the same |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["task"] for row in found):
        own = [row for row in found if row["task"] == name]
        columns = [
            sum(row["kind"] in kinds for row in own)
            for kinds in (("disk", "typed"), ("step", "token", "minibatch"), ("seconds",), ("several",))
        ]
        killed = sum(len(row["died"]) for row in own)
        counts = " | ".join(map(str, columns))
        lines.append(f"| {name} | {counts} | {killed} | **{sum(row['survived'] for row in own)} of {len(own)}** |")
    again = sum("nothing: began again" in row["resumed_from"] for row in found)
    books = sum(row["differs"] == ["books"] for row in found)
    lines += ["", f"{again} of them were killed before the first checkpoint and began again as the message says. "]
    lines[-1] += f"In {books} the books differed: which checkpoints are kept, and which one `latest` or `best` names."
    return lines + (in_words(found) if found else [])


def _corruption_lines() -> list[str]:
    found, resumed = rows("corruption"), rows("fallback")
    kinds = ("bit changed", "cut short", "longer", "zeros")
    lines = [f"| checkpoint | file | {' | '.join(kinds)} | file named |", "|---|---|---|---|---|---|---|"]
    for task, name, size in dict.fromkeys((row["task"], row["file"], row["bytes"]) for row in found):
        own = [row for row in found if (row["task"], row["file"]) == (task, name)]
        by_kind = {row["damage"]: f"{row['found']} of {row['tried']}" for row in own}
        named = f"{sum(row['named'] for row in own)} of {sum(row['tried'] for row in own)}"
        cells = [task, f"{name} ({size:,} bytes)", *(by_kind.get(kind, "") for kind in kinds), named]
        lines.append(f"| {' | '.join(cells)} |")
    survived, said = (sum(row[name] for row in resumed) for name in ("survived", "said_so"))
    lines += ["", f"Resumed with the newest checkpoint damaged: {len(resumed)} runs, {survived} fell back to the one "]
    lines[-1] += f"before and ended bit for bit as the undisturbed one, {said} said so."
    return lines + (in_words(found) if found else [])


if __name__ == "__main__":
    main()
