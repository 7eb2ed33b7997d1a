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
from proximo.doctor import Entry, cpu_quota, diagnose_machine, install_command, main_text, memory_limit

ROOT = Path(__file__).parents[1]


def probe_that_says(said: Any = "fine", error: str = "") -> Any:
    return lambda program, seconds=None: doctor._Probe(said, error)


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
    monkeypatch.setattr(doctor, "_tried", probe_that_says({"gpus": [], "apple": False, "built_for": None}))


# --- on this very machine ---


def test_everything_is_looked_at(entries: list[Entry]) -> None:
    names = {"python", "proximo", "torch", "numpy", "gymnasium", "environment", "cores", "memory", "gpu", "disk"}
    names |= {"runs folder", "box2d", "mujoco", "video", "dev", "mp4", "terminal"}
    assert names <= {entry.name for entry in entries}
    assert all(entry.status in ("ok", "missing", "problem") and entry.detail for entry in entries)
    assert by_name(entries)["environment"].status == "ok"
    assert all("mistake in proximo doctor" not in entry.mend for entry in entries)


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
    assert "SIGKILL" in doctor._tried("import os; os.kill(os.getpid(), 9)").error
    assert "said nothing" in doctor._tried("pass").error


def test_the_speed_is_measured_on_demand(entries: list[Entry], bare: None) -> None:
    assert "CartPole-v1 steps/s" in by_name(entries)["speed"].detail
    assert "speed" not in by_name(diagnose_machine())


# --- on machines that are not like this one ---


@pytest.mark.usefixtures("bare")
def test_missing_extras_come_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = {entry.name: entry for entry in diagnose_machine() if entry.status == "missing"}
    assert {"box2d", "mujoco", "video", "dev", "mp4"} <= set(found)
    if sys.version_info < (3, 14):
        assert found["box2d"].mend == 'pip install -c constraints.txt -e ".[box2d]"'
    assert "GIF" in found["mp4"].detail


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
    assert found["mp4"].status == "missing"
    assert not main_text()[1]


def test_a_mistake_of_the_doctor_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(place: Any) -> Any:
        raise PermissionError("no statvfs here")

    monkeypatch.setattr(doctor, "_tried", probe_that_says(error="x"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", broken)
    found = by_name(diagnose_machine())
    assert "no statvfs here" in found["disk"].detail
    assert found["cores"].status == "ok"


@pytest.mark.parametrize(
    ("package", "version", "status", "says"),
    [
        ("torch", "2.9.1+cu126", "problem", "CVE-2026-24747"),
        ("torch", "2.10.0", "ok", "2.10.0"),
        ("torch", "2.13.0+cpu", "ok", "2.13.0+cpu"),
        ("torch", None, "problem", "not installed"),
        ("mujoco", "3.15.0", "ok", "3.15.0"),
        ("mujoco", "4.0.0", "problem", "must be older than 3.16"),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None, status: str, says: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    entry = doctor._package(package, (doctor.NEEDED | doctor.OF_EXTRAS)[package], "pip install it")
    assert entry.status == status
    assert says in entry.detail
    assert entry.mend == ("" if status == "ok" else "pip install it")


def test_an_old_python_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.14")
    assert doctor._python()[0].status == "problem"


def test_the_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {f"{name}>={wanted.at_least}" for name, wanted in doctor.NEEDED.items()}
    assert asked == set(project["dependencies"])
    mujoco = doctor.OF_EXTRAS["mujoco"]
    assert f"mujoco>={mujoco.at_least},<{mujoco.below}" in project["optional-dependencies"]["mujoco"]
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
        ({"gpus": [["H200", 150e9, ""]], "apple": False, "built_for": "12.6"}, "ok", "H200, 150.0 GB"),
        ({"gpus": [["K80", 12e9, "no kernel image"]], "apple": False, "built_for": "12.6"}, "problem", "no kernel"),
        ({"gpus": [], "apple": True, "built_for": None}, "ok", "Apple"),
        ({"gpus": [], "apple": False, "built_for": None}, "missing", "built for the CPU alone"),
        ({"gpus": [], "apple": False, "built_for": "12.6"}, "missing", "finds no GPU"),
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
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage(10**12, 10**12, 10**6))
    assert doctor._disk()[0].status == "problem"
    assert doctor._runs_folder() == [Entry("runs folder", "ok", f"{tmp_path / 'runs'} can be made")]
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert doctor._runs_folder()[0].status == "problem"


def test_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no live table" in doctor._terminal()[0].detail
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert "TERM is dumb" in doctor._terminal()[0].detail
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    assert "the live table needs 80" in doctor._terminal()[0].detail


def written(folder: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "cgroup", folder / "self"


def test_quotas_of_control_groups_version_2(tmp_path: Path) -> None:
    """The narrowest on the way from the innermost group to the root holds."""
    files = {
        "self": "0::/outer/inner\n",
        "cgroup/outer/cpu.max": "150000 100000\n",
        "cgroup/outer/inner/cpu.max": "max 100000\n",
        "cgroup/outer/memory.max": "max\n",
        "cgroup/outer/inner/memory.max": "2000000000\n",
    }
    places = written(tmp_path, files)
    assert cpu_quota(*places) == 1.5
    assert memory_limit(*places) == 2_000_000_000


def test_quotas_of_control_groups_version_1(tmp_path: Path) -> None:
    """Within a container the named group is often not visible: its root is."""
    files = {
        "self": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
        "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
        "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    places = written(tmp_path, files)
    assert cpu_quota(*places) == 0.5
    assert memory_limit(*places) is None


def test_no_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "nothing") is None
    assert memory_limit(tmp_path, tmp_path / "nothing") is None
