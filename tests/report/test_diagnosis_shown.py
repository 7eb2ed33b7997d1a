"""Where findings are shown: at the end of a run, in its report, and in JSON; one run, really made badly."""

import json

import pytest

from proximo.cli import main

BAD = "--total-steps 8192 --rollout-length 64 --n-envs 8 --learning-rate 1e-9 --learning-rate-schedule constant"


def said(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert not ended.value.code
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.usefixtures("no_pictures")
def test_a_finding_is_told_at_the_end_of_the_run_in_the_report_and_in_json(tmp_path, capsys):
    run = str(tmp_path / "run")
    _, end = said(capsys, "train", "CartPole-v1", *BAD.split(), "--run-dir", run)
    told = json.loads(said(capsys, "report", run, "--json")[0])
    (finding,) = [one for one in told["runs"][0]["findings"] if one["name"] == "updates_too_small"]
    assert set(finding) == {"name", "severity", "seen", "meaning", "advice"}
    text = (tmp_path / "run" / "report" / "report.md").read_text()
    for part in (finding["seen"], finding["meaning"], finding["advice"]):
        assert part in text
        assert part in end
    assert "updates too small" in text
    assert "learning_rate (now 1e-09; 0.0003 is usual)" in finding["advice"]
