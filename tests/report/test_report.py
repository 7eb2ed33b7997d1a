import json
import re

import pytest

from proximo.errors import UserError
from proximo.report.records import read_records
from proximo.report.report import report_json, settings_that_differ, write_report
from tests.report.samples import make_run, rows

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_the_report_of_a_run_lies_in_the_run(tmp_path):
    run = make_run(tmp_path / "run", rows())
    report = write_report([run])
    assert report.folder == run.report
    assert report.path == run.report / "report.md"
    assert all(picture.parent == run.report and picture.is_file() for picture in report.pictures)
    (summary,) = report.runs
    assert (summary.env_steps, summary.n_episodes, summary.n_iterations) == (204_800, 1200, 100)
    assert summary.final_return == summary.best_return == pytest.approx(499.9, abs=0.1)
    assert summary.best_return_step == 204_800
    assert summary.steps_per_second == 4096
    assert summary.collecting_share == pytest.approx(0.4)
    assert [finding.name for finding in summary.findings] == ["healthy"]


def test_the_text_says_what_happened_in_words(tmp_path):
    text = write_report([make_run(tmp_path / "run", rows())]).text
    assert text.startswith("# CartPole-v1: run\n")
    for words in (
        "204,800 environment steps in 100 iterations and 50 seconds",
        "4,096 steps per second, 40 % of the time for collecting and 60 % for updating",
        "Of 1,200 episodes, the last 100 have a mean return of **499.9**",
        "its best was **499.9**, reached after 204,800 steps and 50 seconds",
        "The entropy fell",
        "**Good: healthy.**",
    ):
        assert words in text


def test_fewer_than_a_hundred_episodes_are_not_called_a_hundred(tmp_path):
    text = write_report([make_run(tmp_path / "run", rows(5))]).text
    assert "Only 60 episodes ended, with a mean return of" in text
    assert "last 100" not in text


def test_the_text_is_ascii(tmp_path):
    runs = [make_run(tmp_path / name, rows(30, return_mean=-181.4)) for name in ("a", "b")]
    text = write_report([*runs, make_run(tmp_path / "c", [])], tmp_path / "out").text
    assert "-181.4" in text
    assert text.isascii()


def test_the_file_shows_the_pictures_and_replaces_only_our_own(tmp_path):
    run = make_run(tmp_path / "run", rows(20))
    report = write_report([run])
    written = report.path.read_text()
    assert report.text in written
    assert re.findall(r"!\[.+\]\((.+)\)", written) == [picture.name for picture in report.pictures]
    assert write_report([run]).text == report.text
    report.path.write_text("my own notes")
    with pytest.raises(UserError, match=r"already has report\.md, which Proximo did not write"):
        write_report([run])
    assert report.path.read_text() == "my own notes"


def test_advice_is_in_the_text(tmp_path):
    text = write_report([make_run(tmp_path / "run", rows(approx_kl=0.2))]).text
    assert "**Warning: updates too large.**" in text
    assert "*What to do:* Lower learning_rate (now 0.0003)" in text


def test_an_unfinished_run_says_what_was_planned(tmp_path):
    text = write_report([make_run(tmp_path / "run", rows(20), total_steps=1_000_000)]).text
    assert "1,000,000 steps were planned" in text


def test_several_runs_are_compared(tmp_path):
    runs = [
        make_run(tmp_path / "CartPole-v1" / "slow", rows(return_mean=22.0), learning_rate=1e-6),
        make_run(tmp_path / "CartPole-v1" / "good", rows(), seed=2),
    ]
    report = write_report(runs)
    assert report.folder.parent == tmp_path / "CartPole-v1"
    assert report.folder.name.startswith("report-")
    assert [summary.name for summary in report.runs] == ["slow", "good"]
    assert "# CartPole-v1: 2 runs" in report.text
    table = {line.split("|")[1].strip(): line for line in report.text.splitlines() if line.startswith("|")}
    assert [cell.strip() for cell in table["good"].split("|")[2:7]] == ["2", "499.9", "499.9", "204,800", "204,800"]
    assert "rewards_constant" in table["slow"]  # 22 in every episode, however long
    assert [cell.strip() for cell in table["learning_rate"].split("|")[2:4]] == ["1e-06", "0.0003"]
    assert write_report(runs).folder != report.folder  # never over an earlier one


def test_runs_that_differ_in_their_seeds_alone_are_averaged(tmp_path):
    runs = [make_run(tmp_path / f"s{seed}", rows(return_mean=100.0 * seed), seed=seed) for seed in (1, 2, 3)]
    text = write_report(runs, tmp_path / "out").text
    assert "Over 3 runs the final return is 200 on average, between 100 and 300" in text
    assert "standard deviation of 100." in text


def test_runs_of_different_tasks_are_not_ranked(tmp_path):
    runs = [make_run(tmp_path / "a", rows(20)), make_run(tmp_path / "b", rows(20), env_id="Pendulum-v1")]
    text = write_report(runs, tmp_path / "out").text
    assert "different tasks" in text
    assert "| Pendulum-v1 |" in text


def test_the_same_run_twice_is_one_run(tmp_path):
    run = make_run(tmp_path / "run", rows(20))
    assert write_report([run, run]).folder == run.report


def test_a_run_that_has_only_begun_can_stand_beside_others(tmp_path):
    runs = [make_run(tmp_path / "a", rows(20)), make_run(tmp_path / "b", [])]
    report = write_report(runs, tmp_path / "out")
    assert "No iteration has finished yet." in report.text
    assert report.runs[1].final_return is None


def test_settings_that_are_set_in_one_run_only_differ(tmp_path):
    runs = [make_run(tmp_path / "a", rows(2), target_kl=0.02), make_run(tmp_path / "b", rows(2), seed=7)]
    assert settings_that_differ(read_records(runs)) == {"target_kl": [0.02, None]}


def test_the_json_is_json(tmp_path):
    runs = [make_run(tmp_path / "a", rows(20)), make_run(tmp_path / "b", rows(3, return_mean=None, n_episodes=0))]
    report = write_report(runs, tmp_path / "out")
    told = json.loads(json.dumps(report_json(report), allow_nan=False))
    assert told["report"] == str(tmp_path / "out" / "report.md")
    assert [run["name"] for run in told["runs"]] == ["a", "b"]
    assert told["runs"][1]["final_return"] is None
    assert set(told["runs"][0]["findings"][0]) == {"name", "severity", "seen", "meaning", "advice"}


def test_nothing_to_report_is_said(tmp_path):
    with pytest.raises(UserError, match="nothing to draw yet"):
        write_report([make_run(tmp_path / "run", [])])
    with pytest.raises(UserError, match="no run to report on"):
        write_report([])
