"""The doctor always gets to the end, and tells how to mend what it finds."""

from __future__ import annotations

import json
import sys
import tomllib
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from proximo import doctor
from proximo.doctor import Entry, diagnose_machine, install_command, main_text

ROOT = Path(__file__).parents[1]


def probe_that_says(said: Any = "fine", error: str = "") -> Any:
    return lambda program, seconds=None: doctor._Tried(said, error)


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    return diagnose_machine(speed=True)


def by_name(found: list[Entry]) -> dict[str, Entry]:
    return {entry.name: entry for entry in found}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but what `pip install proximo` brings; trials succeed without being run."""
    extras = {module for extra in doctor.EXTRAS.values() for module in extra.modules}
    monkeypatch.setattr(doctor, "_has_module", lambda name: name not in extras)
    monkeypatch.setattr(doctor, "_tried", probe_that_says({"gpus": [], "built_for": None}))


# --- on this very machine ---


def test_everything_is_looked_at(entries: list[Entry]) -> None:
    names = {"python", "proximo", "torch", "numpy", "gymnasium", "environment", "cores", "memory", "gpu", "disk"}
    names |= {"box2d", "mujoco", "video", "language", "dev", "terminal"}
    assert names <= {entry.name for entry in entries}
    assert all(entry.status in ("ok", "missing", "problem") and entry.detail for entry in entries)
    assert by_name(entries)["environment"].status == "ok"


def test_what_is_wrong_has_a_way_to_mend_it(entries: list[Entry]) -> None:
    assert all(entry.mend for entry in entries if entry.status == "problem")


def test_entries_are_json(entries: list[Entry]) -> None:
    dicts = [asdict(entry) for entry in entries]
    assert json.loads(json.dumps(dicts)) == dicts


def test_a_failing_trial_says_its_last_line() -> None:
    assert doctor._tried("raise RuntimeError('no such device')").error == "RuntimeError: no such device"


def test_a_trial_that_hangs_is_cut() -> None:
    assert "not done after 0.5 s" in doctor._tried("import time; time.sleep(60)", 0.5).error


def test_a_trial_that_dies_is_told() -> None:
    assert "ended with signal 9" in doctor._tried("import os; os.kill(os.getpid(), 9)").error
    assert "ended with code 0" in doctor._tried("pass").error


def test_the_speed_is_measured_on_demand(entries: list[Entry], bare: None) -> None:
    assert "CartPole-v1 steps/s" in by_name(entries)["speed"].detail
    assert "speed" not in by_name(diagnose_machine())


# --- on machines that are not like this one ---


@pytest.mark.usefixtures("bare")
def test_missing_extras_come_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = {entry.name: entry for entry in diagnose_machine() if entry.status == "missing"}
    games, others = {"atari", "box2d", "mujoco", "video"}, {"language", "export", "tune", "convert", "minari", "dev"}
    assert games | others | {"wandb", "trackio"} == set(found) - {"gpu"}
    if sys.version_info < (3, 14):
        assert found["box2d"].mend == 'pip install -c constraints.txt -e ".[box2d]"'


@pytest.mark.usefixtures("bare")
def test_the_text_names_what_is_missing_and_that_it_may_be() -> None:
    text, fine = main_text()
    assert 'constraints.txt -e ".[mujoco]"' in text
    assert "Missing, and not needed for everything" in text
    assert fine == ("problem  " not in text)


def test_a_broken_extra_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_has_module", lambda name: True)
    monkeypatch.setattr(doctor, "_tried", probe_that_says(error="ImportError: libGL.so.1"))
    found = by_name(diagnose_machine())
    assert found["mujoco"].status == "problem"
    assert "libGL.so.1" in found["video"].detail
    assert found["environment"].status == found["gpu"].status == "problem"
    assert not main_text()[1]


@pytest.mark.parametrize(
    ("version", "status", "says"),
    [
        ("2.9.1+cu126", "problem", "must be at least 2.10"),
        ("2.10.0", "ok", "2.10.0"),
        ("2.13.0+cpu", "ok", "2.13.0+cpu"),
        (None, "problem", "not installed"),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str | None, status: str, says: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    entry = doctor._package("torch", doctor.NEEDED["torch"])
    assert entry.status == status
    assert says in entry.detail
    assert bool(entry.mend) == (status != "ok")


def test_the_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {f"{name}>={at_least}" if at_least else name for name, at_least in doctor.NEEDED.items()}
    assert asked == set(project["dependencies"])
    assert set(doctor.EXTRAS) <= set(project["optional-dependencies"])


def test_the_command_leads_to_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert install_command("video") == f'cd "{ROOT}" && pip install -c constraints.txt -e ".[video]"'
    monkeypatch.chdir(ROOT)
    assert install_command() == "pip install -c constraints.txt -e ."
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "a" / "b" / "proximo" / "doctor.py"))
    assert install_command("video") == 'pip install "proximo[video]"'


@pytest.mark.parametrize(
    ("said", "status", "says"),
    [
        ({"gpus": [["H200", 150e9, ""]], "built_for": "12.6"}, "ok", "H200, 150.0 GB"),
        ({"gpus": [["K80", 12e9, "no kernel image"]], "built_for": "12.6"}, "problem", "no kernel"),
        ({"gpus": [], "built_for": None}, "missing", "built for the CPU alone"),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, said: Any, status: str, says: str) -> None:
    monkeypatch.setattr(doctor, "_tried", probe_that_says(said))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (entry,) = doctor._gpu()
    assert entry.status == status
    assert says in entry.detail
    assert bool(entry.mend) == (status != "ok")


def test_a_full_disk_and_a_folder_that_is_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctor._disk()[0].status == "ok"
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert "cannot be written to" in doctor._disk()[0].detail
    (tmp_path / "runs").unlink()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage(10**12, 10**12, 10**6))
    assert doctor._disk()[0].status == "problem"


def test_a_deleted_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "has been deleted" in doctor._disk()[0].detail
    assert install_command().startswith(("cd", "pip"))


def test_the_limits_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n",
        "/sys/fs/cgroup/memory.max": "2000000000",
        "/sys/fs/cgroup/memory.current": "1500000000",
        "/sys/fs/cgroup/cpu.max": "150000 100000",
    }
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(path, ""))
    assert doctor._memory()[0].status == "problem"
    assert "the time of 1.5 by the container" in doctor._cores()[0].detail
    files |= {"/sys/fs/cgroup/memory.max": "max", "/sys/fs/cgroup/cpu.max": "max 100000"}
    assert doctor._memory() == [Entry("memory", "ok", "8.2 GB free")]
    assert "container" not in doctor._cores()[0].detail
    files.clear()
    assert doctor._memory()[0].detail == "unknown on this system"


def test_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no live table" in doctor._terminal()[0].detail
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    assert "the live table needs 80" in doctor._terminal()[0].detail
