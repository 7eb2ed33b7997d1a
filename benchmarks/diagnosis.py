"""How often the diagnosis is right: runs that are really made, with a fault or without one.

    python benchmarks/diagnosis.py run --kept FOLDER      train what is missing (about 30 minutes of one core)
    python benchmarks/diagnosis.py judge --kept FOLDER    diagnose every run in FOLDER anew, and write the table
    python benchmarks/diagnosis.py fixture --kept FOLDER  keep some of the runs, trimmed, for the tests

`run` may be interrupted and goes on where it was. The metrics of each run are kept in FOLDER, so that a rule that was
changed is judged in seconds; what it said goes to results/diagnosis.jsonl. Thresholds are chosen by looking at the
runs that are not held out; the table has those that are: other tasks, and seed 2 of all.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from records import HERE, add_row, circumstances, in_words, read_rows, write_between

import proximo
from proximo.errors import UserError
from proximo.report.diagnosis import diagnose
from proximo.report.language_diagnosis import diagnose_align
from proximo.runs.directory import RunDirectory, read_config
from proximo.runs.metrics import read_metrics

sys.path[:0] = [str(HERE.parent), str(HERE)]

from diagnosis_cases import (  # noqa: E402
    FACTS,
    HELD_OUT_REWARDS,
    HELD_OUT_SEED,
    REWARDS,
    TASKS,
    TAUGHT,
    Case,
    control_cases,
    language_cases,
    sentence,
)

RESULTS = HERE / "results" / "diagnosis.jsonl"
FIXTURE = HERE.parent / "tests" / "report" / "measured_runs.json"
N_SENTENCES, N_PROMPTS = 600, 200
MOST_ROWS = 60
LOOKED_AT = (
    "iteration", "env_steps", "n_episodes", "return_mean", "length_mean", "approx_kl", "approx_kl_max",
    "policy_loss", "value_loss", "entropy", "clip_fraction", "grad_norm", "n_updates", "kl_stopped",
    "explained_variance", "learning_rate", "advantage_std", "terminated_share", "reward_largest",
    "observation_largest", "observation_smallest", "seconds_collecting", "seconds_updating", "seconds_environment",
    "update_skipped", "n_iterations", "n_responses", "reward_mean", "reward_std", "rewards_missing",
    "kl_to_reference", "beta", "gold_mean", "response_length_mean", "eos_fraction", "advantage_rows", "repetition",
    "groups_alike",
)  # fmt: skip
SETTINGS = (
    "total_steps", "n_envs", "rollout_length", "batch_size", "n_epochs", "learning_rate", "entropy_coef", "target_kl",
    "max_grad_norm", "value_coef", "gamma", "normalize_observations", "normalize_rewards", "vectorization", "beta",
    "beta_control", "beta_target", "max_new_tokens", "sharing", "truncation", "algorithm",
)  # fmt: skip
ORDER = {0: 0, HELD_OUT_SEED: 0.5}


def main() -> None:
    """Run or judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "judge", "fixture"))
    parser.add_argument("--kept", type=Path, required=True, help="where the metrics of the runs are kept")
    parser.add_argument("--only", default="", help="cases with this in their name")
    arguments = parser.parse_args()
    arguments.kept.mkdir(parents=True, exist_ok=True)
    if arguments.what == "run":
        run_all(arguments.kept, arguments.only)
    elif arguments.what == "judge":
        judge_all(arguments.kept)
    else:
        keep_for_tests(arguments.kept)


# --- the runs -----------------------------------------------------------------------------------------------------


def every_run() -> Iterator[tuple[Case, int, bool]]:
    """Cases with each of their seeds, and whether they are of the language kind."""
    for is_language, cases in ((False, control_cases()), (True, language_cases())):
        for case in cases:
            for seed in case.seeds:
                yield case, seed, is_language


def kept_file(folder: Path, case: Case, seed: int, *, is_language: bool) -> Path:
    words = f"{'align' if is_language else 'train'} {case.key} {seed}"
    return folder / ("".join(letter if letter.isalnum() else "-" for letter in words) + ".json")


def run_all(folder: Path, only: str) -> None:
    runs = sorted(every_run(), key=_order)
    for case, seed, is_language in runs:
        path = kept_file(folder, case, seed, is_language=is_language)
        if only not in case.key or path.exists():
            continue
        with tempfile.TemporaryDirectory() as name:
            place = Path(name) / "run"
            ended = ""
            try:
                (aligned if is_language else trained)(case, seed, place, folder)
            except UserError as error:
                ended = str(error).splitlines()[0]
            run = RunDirectory(place)
            if not run.config_path.exists():
                raise SystemExit(f"{case.key}, seed {seed} did not begin: {ended}")
            rows: list[dict[str, Any]] = read_metrics(run.metrics_path)
            kept = {"settings": plain(read_config(run)), "rows": rows, "ended": ended} | circumstances("gymnasium")
        path.write_text(json.dumps(kept))
        seconds = sum(float(row["seconds_collecting"]) + float(row["seconds_updating"]) for row in rows)
        found = ", ".join(one.name for one in findings_of(kept, is_language=is_language))
        print(f"{case.key}, seed {seed}: {seconds:.1f} s, {len(rows)} iterations: {found} {ended}", flush=True)


def _order(run: tuple[Case, int, bool]) -> tuple[float, bool]:
    """Something of every case early: one seed, then the one that is held out, then the tasks that are, then others."""
    case, seed, is_language = run
    is_other_task = is_held_out(case, -1, is_language=is_language)
    is_long = "preset" in case.name or "Pendulum-v1" in case.task
    return ORDER.get(seed, seed) + 0.75 * is_other_task + 0.2 * is_long, not is_language


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the places of this machine."""
    return {name: value for name, value in settings.items() if name not in ("model", "prompts", "env_id", "gold")}


def trained(case: Case, seed: int, place: Path, _: Path) -> None:
    task = TASKS[case.task]
    settings = {name: value for name, value in (task.settings | case.settings).items() if value is not None}
    proximo.train(task.make, run_dir=place, seed=seed, quiet=True, **settings)


def aligned(case: Case, seed: int, place: Path, folder: Path) -> None:
    settings: dict[str, Any] = TAUGHT | case.settings
    if "algorithm" in case.settings:  # one without a critic
        settings = TAUGHT | dict(responses_per_prompt=4, prompts_per_iteration=16) | case.settings
        settings.pop("sharing")
    model, prompts = taught(folder / f"taught-{seed}", seed)
    proximo.align(model, REWARDS[case.task], prompts, run_dir=place, seed=seed, quiet=True, **settings)


def taught(folder: Path, seed: int) -> tuple[Path, Path]:
    """A tiny model that was taught the small language, and prompts in it."""
    from tests.tiny_language import save_tiny

    model, data, prompts = folder / "sft", folder / "sentences.jsonl", folder / "prompts.jsonl"
    if not (model / "config.json").exists():
        rng = random.Random(seed)

        def cut() -> dict[str, str]:
            words, n = sentence(rng).split(), rng.randint(1, 3)
            return {"prompt": " ".join(words[:n]), "completion": " ".join(words[n:])}

        folder.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps(cut()) + "\n" for _ in range(N_SENTENCES)))
        prompts.write_text("".join(json.dumps({"prompt": cut()["prompt"]}) + "\n" for _ in range(N_PROMPTS)))
        save_tiny(folder / "untaught", seed=seed, width=32)
        proximo.sft(
            folder / "untaught", data, run_dir=model, batch_size=32, learning_rate=1e-2, n_epochs=3, threads=1,
            seed=seed, quiet=True,
        )  # fmt: skip
    return model, prompts


# --- the judgement ------------------------------------------------------------------------------------------------


def findings_of(kept: dict[str, Any], *, is_language: bool) -> list[Any]:
    return (diagnose_align if is_language else diagnose)(kept["rows"], kept["settings"])


def judge_all(folder: Path) -> None:
    """Write what the diagnosis says of every run into the results, and the table into the docs."""
    RESULTS.unlink(missing_ok=True)
    for case, seed, is_language in every_run():
        path = kept_file(folder, case, seed, is_language=is_language)
        if not path.exists():
            continue
        kept = json.loads(path.read_text())
        first, best, final = returns_of(kept["rows"], is_language=is_language)
        row = {
            "case": case.name,
            "task": case.task,
            "seed": seed,
            "kind": "align" if is_language else "train",
            "is_held_out": is_held_out(case, seed, is_language=is_language),
            "must": list(case.must),
            "may": list(case.may),
            "counting": counting(case, kept, is_language=is_language),
            "is_healthy": is_healthy(case, kept, is_language=is_language),
            "first": first,
            "best": best,
            "final": final,
            "found": {one.name: one.severity for one in findings_of(kept, is_language=is_language)},
            "changed": plain(case.settings),
            "trained_at": kept["commit"],
        }
        add_row(RESULTS, row, "gymnasium", "transformers")
    write_between("diagnosis", table(), "diagnosis.md")


def keep_for_tests(folder: Path) -> None:
    """One run with each finding and some healthy ones, none of them held out, with the columns that rules look at."""
    wanted = {name for case, _, _ in every_run() for name in case.must}
    left = dict.fromkeys(wanted, 1) | {"healthy": 5}
    kept_runs = []
    for case, seed, is_language in every_run():
        path = kept_file(folder, case, seed, is_language=is_language)
        if not path.exists() or is_held_out(case, seed, is_language=is_language):
            continue
        kept = json.loads(path.read_text())
        healthy = is_healthy(case, kept, is_language=is_language)
        must = ["healthy"] if healthy else counting(case, kept, is_language=is_language)
        kept["rows"] = [
            {name: rounded(value) for name, value in row.items() if name in LOOKED_AT} for row in kept["rows"]
        ]
        found = {one.name for one in findings_of(kept, is_language=is_language)}
        new = [name for name in must if name in found and left[name] > 0]
        if len(kept["rows"]) > MOST_ROWS or not new:
            continue
        for name in new:
            left[name] -= 1
        columns = {name: [row.get(name) for row in kept["rows"]] for name in LOOKED_AT}
        kept_runs.append(
            {
                "run": f"{case.key}, seed {seed}",
                "kind": "align" if is_language else "train",
                "must": [name for name in must if name in found],
                "settings": {name: kept["settings"][name] for name in SETTINGS if name in kept["settings"]},
                "columns": {name: values for name, values in columns.items() if set(values) != {None}},
            }
        )
    FIXTURE.write_text("[\n" + ",\n".join(json.dumps(run) for run in kept_runs) + "\n]\n")
    print(f"{len(kept_runs)} runs, {FIXTURE.stat().st_size:,} bytes; without a run: {[n for n in left if left[n] > 0]}")


def rounded(value: Any) -> Any:
    """Three digits are enough for every rule."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def is_held_out(case: Case, seed: int, *, is_language: bool) -> bool:
    if is_language:
        return seed == HELD_OUT_SEED or case.task in HELD_OUT_REWARDS
    return seed == HELD_OUT_SEED or TASKS[case.task].is_held_out


def returns_of(rows: Sequence[dict[str, Any]], *, is_language: bool) -> tuple[float | None, float | None, float | None]:
    """First, best and last mean return, or reward."""
    name = "reward_mean" if is_language else "return_mean"
    known = [float(row[name]) for row in rows if row.get(name) is not None]
    return (known[0], max(known), known[-1]) if known else (None, None, None)


def counting(case: Case, kept: dict[str, Any], *, is_language: bool) -> list[str]:
    """The findings that must be there, by other means than the diagnosis has."""
    first, best, final = returns_of(kept["rows"], is_language=is_language)
    if not kept["rows"]:
        return []  # it was refused at once, with a message that says why
    if is_language or not case.when:
        return list(case.must)
    if first is None or best is None or final is None:
        return [name for name in case.must if name not in case.when]
    good = TASKS[case.task].good
    entropy = [float(row["entropy"]) for row in kept["rows"] if row.get("entropy") is not None]
    third = entropy[: len(entropy) // 3]
    happened = {
        "failed": final < good,
        "never reached": best <= min(first, good),
        "collapsed": best - first >= 0.3 * max(abs(first), abs(best)) and final - first < 0.5 * (best - first),
        "certain": bool(third) and min(third) < 0.05 * max(entropy[0], 0.0) and final < good,
    }
    return [name for name in case.must if name not in case.when or happened[case.when[name]]]


def is_healthy(case: Case, kept: dict[str, Any], *, is_language: bool) -> bool:
    """Whether a run without a fault has learned: a language model is near its reference, and ends what it says."""
    rows = kept["rows"]
    _, _, final = returns_of(rows, is_language=is_language)
    if case.must or final is None:
        return False
    if not is_language:
        return final >= TASKS[case.task].good
    early, late = (sum(row["reward_mean"] for row in some) for some in (rows[:5], rows[-5:]))
    return late > early and rows[-1]["kl_to_reference"] < 15 and rows[-1]["eos_fraction"] > 0.9


def table() -> list[str]:
    rows = read_rows(RESULTS)
    planned, held_out = sum(1 for _ in every_run()), sum(row["is_held_out"] for row in rows)
    lines = [
        f"{len(rows)} runs of {planned} that the benchmark has, {held_out} of them held out, seeds "
        f"{', '.join(str(seed) for seed in sorted({row['seed'] for row in rows}))}. The others are still to be made: "
        "seeds 0 and 2 came first."
        if len(rows) < planned
        else f"{len(rows)} runs, {held_out} of them held out."
    ]
    for kind, title in (("train", "Control"), ("align", "Language models")):
        of_kind = [row for row in rows if row["kind"] == kind]
        lines += ["", f"### {title}", "", *_table_of(of_kind)]
    return [*lines, *in_words(rows)]


def _table_of(rows: list[dict[str, Any]]) -> list[str]:
    names = sorted({name for row in rows for name in row["must"]})
    lines = [
        "| finding | found | false alarms | precision | recall | found, all runs | false alarms, all runs |",
        "|---|---|---|---|---|---|---|",
    ]
    held_out = [row for row in rows if row["is_held_out"]]
    for name in names:
        hit, asked, false, said = _tally(held_out, name)
        hit_all, asked_all, false_all, _ = _tally(rows, name)
        is_fact = name in FACTS
        precision = f"{hit / (hit + false):.2f}" if hit + false and not is_fact else "-"
        recall = f"{hit / asked:.2f}" if asked else "-"
        others = sum(1 for _ in held_out) - asked - said
        alarms = "measured, not concluded" if is_fact else f"{false} of {false + others}"
        lines.append(
            f"| `{name}` | {hit} of {asked} | {alarms} | {precision} | {recall} | {hit_all} of {asked_all} "
            f"| {'-' if is_fact else false_all} |"
        )
    healthy = [row for row in held_out if row["is_healthy"]]
    blamed = [row for row in healthy if _complaints(row)]
    left_out = sum(not row["must"] and not row["is_healthy"] for row in held_out)
    faults = [row for row in held_out if row["counting"]]
    seen = sum(bool(_complaints(row)) for row in faults)
    named = [f"{r['case']}, {r['task']}, seed {r['seed']} ({', '.join(_complaints(r))})" for r in blamed]
    lines += [
        "",
        f"Of {len(healthy)} held-out healthy runs, {len(blamed)} got a problem or a warning"
        + (f": {'; '.join(named)}" if named else "")
        + f". {left_out} more runs with sane settings did not learn enough to be called healthy and are left out. Of "
        f"{len(faults)} held-out runs with a fault, {seen} got one.",
    ]  # fmt: skip
    return lines


def _complaints(row: dict[str, Any]) -> list[str]:
    return [name for name, severity in row["found"].items() if severity in ("problem", "warning")]


def _tally(rows: list[dict[str, Any]], name: str) -> tuple[int, int, int, int]:
    """Found where it must be; runs where it must be; found where it must not be; runs where it may be."""
    asked = [row for row in rows if name in row["counting"]]
    neutral = [row for row in rows if (name in row["may"] or name in row["must"]) and row not in asked]
    neutral += [row for row in rows if not row["must"] and not row["is_healthy"]]
    others = [row for row in rows if row not in asked and row not in neutral]
    hit = sum(name in row["found"] for row in asked)
    false = 0 if name in FACTS else sum(name in row["found"] for row in others)
    return hit, len(asked), false, len(neutral)


if __name__ == "__main__":
    main()
