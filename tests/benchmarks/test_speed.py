"""`benchmarks/speed.py`: what it counts, what it goes on with, and that it runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import speed
import speed_page
from records import read_rows

BENCHMARKS = Path(speed.__file__).parent
TASK = replace(speed.TASKS["cartpole_steady"], required={"sb3": 8.0})


def run_of(rate: float, **phases: float) -> dict:
    rates = {"whole_steps_per_second": rate / 2, "steady_steps_per_second": rate}
    return rates | {"phases": phases or {"updating": 1.0}, "chosen": {}, "versions": {"torch": "2"}, "seconds": 1.0}


@pytest.fixture
def session(tmp_path: Path) -> speed.Session:
    return speed.Session(tmp_path / "speed.jsonl", sys.executable, "abc", repeats=2, quick=False, folder=tmp_path)


def test_no_phase_is_counted_twice() -> None:
    row = {"seconds": 9.0, "steps_per_second": 1.0, "seconds_collecting": 3.0, "seconds_updating": 2.0}
    assert speed.phases_of(row) == {"collecting": 3.0, "updating": 2.0}
    parts = {"seconds_acting": 1.0, "seconds_environment": 1.5, "seconds_overhead": 0.5}
    assert speed.phases_of(row | parts) == {
        "acting": 1.0,
        "environment": 1.5,
        "assembling": 0.5,
        "overhead": 0.5,
        "updating": 2.0,
    }


@pytest.mark.parametrize(("n", "left"), [(100, 90), (10, 8), (3, 1), (1, 1)])
def test_the_first_iterations_do_not_count(n: int, left: int) -> None:
    assert speed.without_warm_up(list(range(n))) == list(range(n - left, n))


def test_flags() -> None:
    task = replace(TASK, settings=dict(n_envs=8, normalize_rewards=True), only_ours=dict(update_path="compiled"))
    network = ["--hidden-sizes", "64", "64", "--activation", "tanh", "--orthogonal-init"]  # and not a preset's
    assert speed.flags_of(task) == [*network, "--n-envs", "8", "--normalize-rewards", "--update-path", "compiled"]
    switched_off = replace(TASK, settings=dict(normalize_rewards=False), only_ours={})
    assert speed.flags_of(switched_off) == [*network, "--no-normalize-rewards"]


def test_a_series_goes_on_until_something_changes(session: speed.Session) -> None:
    name = "cartpole_steady"
    assert session.series(name) == 1
    session.write(name, 1, {"kind": "pair", "peer": "none", "round": 0, "ours": run_of(1.0)})
    assert session.series(name) == 1
    assert session.series("cartpole_cold") == 1
    assert replace(session, fresh=True).series(name) == 2
    assert replace(session, source="abd").series(name) == 2
    assert replace(session, quick=True).series(name) == 2  # other steps


def test_pairs_that_are_on_disk_are_not_run_again(session: speed.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def measure_pair(session: speed.Session, name: str, peer: str, series: int, number: int) -> float:
        ran.append((name, peer, number))
        session.write(name, series, {"kind": "pair", "peer": peer, "round": number, "ours": run_of(1.0)})
        return 1.0

    monkeypatch.setattr(speed, "measure_pair", measure_pair)
    monkeypatch.setattr(speed, "measure_limit", lambda *_: None)
    speed.measure(session, ["cartpole_steady", "cartpole_64x128"], [])
    assert ran == [
        ("cartpole_steady", "none", 0),
        ("cartpole_64x128", "none", 0),
        ("cartpole_steady", "none", 1),
        ("cartpole_64x128", "none", 1),
    ]
    speed.measure(replace(session, repeats=3), ["cartpole_steady"], [])
    assert ran[4:] == [("cartpole_steady", "none", 2)]


def test_the_table_has_the_median_of_paired_ratios_and_the_newest_series(session: speed.Session) -> None:
    name = "cartpole_steady"
    for series, rates in ((1, [(999, 1)]), (2, [(80, 10), (90, 10), (100, 20)])):
        for number, (ours, theirs) in enumerate(rates):
            both = {"ours": run_of(ours), "theirs": run_of(theirs), "ratio": ours / theirs}
            session.write(name, series, {"kind": "pair", "peer": "sb3", "round": number, **both})
        for environment, products in ((1 / 720, 1 / 720), (0.5 / 720, 2 / 720)):  # one was held up here, one there
            parts = {"float32": {"environment": environment, "products": products}}
            rates = {"float32": {"1": 5e10}}
            session.write(name, series, {"kind": "limit", "limit": {"parts": parts, "flops_per_second": rates}})
    (found,) = speed_page.summaries(session.results, speed.TASKS)
    assert found.ours == (90, 80, 100)
    assert found.theirs == (10, 10, 20)
    assert found.ratio == (8.0, 5.0, 9.0)
    assert found.limit == pytest.approx(480)
    assert found.fraction == pytest.approx(90 / 480)
    assert "8.00 (5.00 to 9.00)" in "\n".join(speed_page.plain_table([found]))


def test_steps_that_only_reset_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_a_run(command: list[str], environment: dict[str, str]) -> tuple[float, dict]:
        folder = Path(command[command.index("--run-dir") + 1])
        folder.mkdir()
        seconds = dict(seconds_acting=0.5, seconds_environment=0.5, seconds_collecting=1.5, seconds_updating=0.5)
        rows = [dict(env_steps=steps, **seconds) for steps in (250, 490, 730, 960)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "config.toml").write_text('update_path = "fused"\n')
        return 10.0, {"env_steps": 960, "return_mean": 20.0}

    monkeypatch.setattr(speed, "timed_process", write_a_run)
    found = speed.run_ours(speed.TASKS["cartpole_steady"], 1024, 0, None)
    assert found["steady_steps_per_second"] == pytest.approx((960 - 490) / 4.0)
    assert found["whole_steps_per_second"] == pytest.approx(96.0)


def test_a_missing_peer_says_what_mends_it() -> None:
    said = speed.missing_peer("sb3", "/nowhere/python")
    assert "/nowhere/python" in said
    said = run("--table", "--peers", "stable-baselines")
    assert said.returncode == 2
    assert "there is no 'stable-baselines'; give sb3, sbx or none" in said.stderr


def run(*words: str) -> subprocess.CompletedProcess:
    script = [sys.executable, str(BENCHMARKS / "speed.py"), *words]
    return subprocess.run(script, capture_output=True, text=True, check=False)


def test_quick_with_a_peer_that_is_not_there_goes_on_alone(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ModuleNotFoundError: No module named stable_baselines3" >&2\nexit 1\n')
    python.chmod(0o755)
    results = BENCHMARKS / "results" / "speed.jsonl"
    before = results.read_bytes() if results.exists() else None
    ran = run("--quick", "--only", "cartpole_steady", "--peers", "sb3", "--peer-python", str(python))
    assert ran.returncode == 0, ran.stderr
    assert 'pip install -c constraints.txt -e ".[peers]"' in ran.stderr
    assert "No module named stable_baselines3" in ran.stderr
    assert "CartPole-v1, 8 x 32, steady" in ran.stdout
    assert (results.read_bytes() if results.exists() else None) == before


def test_the_picture_and_the_page_can_be_made(session: speed.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    name, pages = "cartpole_steady", {}
    both = {"ours": run_of(80, acting=0.25, updating=0.75), "theirs": run_of(10), "ratio": 8.0}
    session.write(name, 1, {"kind": "pair", "peer": "sb3", "round": 0, **both})
    parts = dict(environment=1e-3, products=1e-3, tanh=0.0, adam=0.5e-3)
    limit = {"steps_per_second": {"float32": 400.0}, "parts": {"float32": parts}, "flops": 552_000}
    limit["flops_per_second"] = {"float32": {"1": 5e10, "2": 9e10}}
    session.write(name, 1, {"kind": "limit", "limit": limit})
    found = speed_page.summaries(session.results, speed.TASKS)
    monkeypatch.setattr(speed_page, "write_between", lambda marker, lines, page: pages.update({marker: lines}))
    speed_page.write_page(session.results, found)
    speed_page.draw(found, session.folder / "speed.png")
    assert (session.folder / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert any("| 20.0 % |" in line for line in pages["speed"])
    assert any("| 25 % | 75 % |" in line for line in pages["where our time goes"])
    assert any(
        "| 1000.00 | 1000.00 | 0.00 | 500.00 | 2500.00 | 50 (1), 90 (2) | 552 |" in line for line in pages["limits"]
    )
    assert json.loads(session.results.read_text().splitlines()[0])["source"] == "abc"
    assert read_rows(session.results, kind="pair")[0]["flags"] == speed.processor_flags()
