"""Reports on language runs: what is found, what is drawn, what was answered."""

import json

import numpy as np
import pytest
from PIL import Image

from proximo.errors import UserError
from proximo.report import folder, report
from proximo.report.language_diagnosis import RULES, diagnose_align
from proximo.report.language_pictures import (
    draw_language_records,
    language_charts,
    language_figure,
    language_overview,
    samples_text,
)
from proximo.report.records import read_records
from proximo.report.report import report_json, write_language_report, write_report
from tests.report.language_samples import ALIGN, align_rows, learning_rows, make_language_run
from tests.report.samples import make_run, rows
from tests.test_cli import said_by

SHARE = np.arange(1, 101) / 100
PEAKED = 0.9 * np.sin(np.pi * np.minimum(SHARE / 0.4, 1) / 2) - np.maximum(SHARE - 0.4, 0)


def noisy(values, size=0.03, seed=7):
    return values + np.random.default_rng(seed).normal(0, size, len(values))


def names(metrics, **settings):
    return [finding.name for finding in diagnose_align(metrics, ALIGN | settings)]


def only(name, metrics, **settings):
    """The finding of that name, which must be there once."""
    found = [finding for finding in diagnose_align(metrics, ALIGN | settings) if finding.name == name]
    assert len(found) == 1, f"{name} is not among {names(metrics, **settings)}"
    return found[0]


class TestHealthyRuns:
    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("n", [30, 100, 300])
    def test_have_no_finding(self, n, seed):
        gold = noisy(0.9 * (1 - np.exp(-5 * np.arange(1, n + 1) / n)), 0.06, seed)
        (finding,) = diagnose_align(align_rows(n, seed, gold_mean=gold), ALIGN | {"n_iterations": n})
        assert (finding.name, finding.severity) == ("healthy", "good")
        assert f"iteration {n}" in finding.seen

    def test_may_have_no_reference_and_no_critic(self):
        without = [
            {name: value for name, value in row.items() if name not in ("explained_variance", "value_loss")}
            for row in align_rows(kl_to_reference=None, beta=0.0)
        ]
        assert names(without, algorithm="grpo", beta=0.0) == ["healthy"]

    def test_may_be_certain_where_they_are_right(self):
        right = noisy(0.98 - 0.6 * np.exp(-8 * SHARE), 0.01)
        assert names(align_rows(reward_mean=right, entropy=0.7 * np.exp(-4 * SHARE))) == ["healthy"]

    def test_may_go_far_where_a_gold_score_goes_along(self):
        kl = 40 * SHARE
        assert names(align_rows(kl_to_reference=kl, gold_mean=noisy(SHARE))) == ["healthy"]
        assert names(align_rows(kl_to_reference=kl, gold_mean=noisy(0 * SHARE))) == ["over_optimization_likely"]

    def test_may_waver_at_their_best_gold_score(self):
        gold = noisy(0.9 * (1 - np.exp(-5 * SHARE)) - 0.03 * np.maximum(SHARE - 0.7, 0), 0.05)
        assert names(align_rows(gold_mean=gold)) == ["healthy"]

    def test_move_nothing_where_the_learning_rate_has_decayed_or_there_is_one_step(self):
        still = dict(approx_kl=0.0, clip_fraction=0.0, reward_mean=noisy(0 * SHARE))
        assert "updates_too_small" in names(align_rows(**still))
        assert "updates_too_small" not in names(align_rows(**still, n_updates=1))

    def test_pass_over_what_the_critic_learned_alone(self):
        reward = noisy(np.concatenate([np.zeros(40), 2 * SHARE[:60]]))
        unmoved = np.concatenate([np.full(40, -2.0), np.full(60, 0.5)])
        metrics = align_rows(reward_mean=reward, explained_variance=unmoved)
        assert names(metrics, value_pretraining_iterations=40) == ["healthy"]
        assert names(metrics[:40], value_pretraining_iterations=40) == ["too_early"]

    def test_rise_where_thirds_differ_though_the_ends_are_a_few_iterations_only(self):
        seen = "65 102 100 106 152 127 152 88 139 131 148 180 129 158 158 107 158 152 165 167 170 151 134 104 167"
        reward = np.array([int(word) for word in seen.split()]) / 1000  # of a run that was really made
        found = names(align_rows(25, reward_mean=reward), n_iterations=25)
        assert "reward_flat" not in found
        assert "healthy" in found

    @pytest.mark.parametrize("seed", range(5))
    def test_do_not_rise_by_luck(self, seed):
        assert "reward_flat" in names(align_rows(30, reward_mean=noisy(np.zeros(30), 1.0, seed)), n_iterations=30)

    def test_that_are_short_are_too_early_to_judge(self):
        assert names(align_rows(5)) == ["too_early"]
        assert names([]) == ["too_early"]


class TestOverOptimization:
    def test_is_where_gold_turns_down_and_the_reward_goes_up(self):
        finding = only("over_optimization", align_rows(gold_mean=noisy(PEAKED), reward_mean=noisy(2 * SHARE)))
        assert finding.severity == "problem"
        peak = int(finding.seen.split("around iteration ")[1].split(",")[0])
        assert 33 <= peak <= 48
        assert "0.8" in finding.seen.split("is ")[0]
        assert "at iteration 100" in finding.seen
        assert f"about iteration {peak}" in finding.advice
        assert "raise beta (now 0.05" in finding.advice

    def test_is_not_where_the_reward_falls_with_gold(self):
        assert "over_optimization" not in names(align_rows(gold_mean=noisy(PEAKED), reward_mean=noisy(PEAKED)))

    def test_is_found_from_the_rows_that_have_a_gold_score(self):
        sparse = np.where(np.arange(100) % 4 == 0, noisy(PEAKED), np.nan)
        assert "over_optimization" in names(align_rows(gold_mean=sparse))

    def test_is_likely_where_kl_runs_away_with_the_reward(self):
        finding = only("over_optimization_likely", align_rows(kl_to_reference=30 * SHARE, beta=0.001), beta=0.001)
        assert finding.severity == "warning"
        assert "28.65 nats per response at iteration 100" in finding.seen
        assert "Raise beta (now 0.001" in finding.advice
        assert names(align_rows(kl_to_reference=noisy(25 + 0 * SHARE))) == ["over_optimization_likely"]

    def test_is_told_from_a_steep_rise_before_the_kl_is_large(self):
        assert "goes on rising" in only("over_optimization_likely", align_rows(kl_to_reference=14 * SHARE)).seen
        assert names(align_rows(kl_to_reference=14 * SHARE**0.5)) == ["healthy"]
        assert names(align_rows(kl_to_reference=8 * SHARE)) == ["healthy"]

    def test_adaptive_beta_is_held_against_its_target(self):
        steered = dict(beta_control="adaptive", beta_target=30.0)
        assert names(align_rows(kl_to_reference=30 * SHARE), **steered) == ["healthy"]
        finding = only("over_optimization_likely", align_rows(kl_to_reference=70 * SHARE), **steered)
        assert "Lower beta_target (now 30" in finding.advice

    def test_kl_without_reward_is_a_drift(self):
        still = noisy(0 * SHARE)
        assert "kl_ran_away" in names(align_rows(kl_to_reference=30 * SHARE, reward_mean=still))


FAULTS = {
    "responses_do_not_end": dict(eos_fraction=1 - 0.5 * SHARE),
    "text_repeats": dict(repetition=0.02 + 0.5 * SHARE),
    "not_finite": dict(policy_loss=np.where(SHARE > 0.9, np.nan, 0.01)),
    "entropy_collapsed": dict(entropy=np.exp(-40 * SHARE), reward_mean=noisy(0 * SHARE)),
    "reward_flat": dict(reward_mean=noisy(0.4 + 0 * SHARE)),
    "reward_constant": dict(reward_mean=noisy(0.4 + 0 * SHARE, 1e-5), reward_std=1e-5),
    "rewards_missing": dict(rewards_missing=np.where(np.arange(100) == 60, 20, 6)),
    "responses_left_out": dict(advantage_rows=0.5),
    "groups_all_alike": dict(groups_alike=0.9, reward_mean=noisy(0 * SHARE)),
    "updates_too_large": dict(approx_kl=0.2),
    "updates_too_small": dict(approx_kl=1e-8, clip_fraction=0.0, reward_mean=noisy(0 * SHARE)),
    "critic_explains_nothing": dict(explained_variance=-0.4, reward_mean=noisy(0 * SHARE)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_what_to_do(name):
    finding = only(name, align_rows(**FAULTS[name]))
    assert finding.severity in ("problem", "warning")
    assert any(digit in finding.seen for digit in "0123456789")
    assert finding.meaning.endswith(".")
    assert finding.advice.endswith(".")
    assert all(part.isascii() for part in (finding.seen, finding.meaning, finding.advice))


def test_every_rule_is_seen_at_work():
    said = {"over_optimization", "kl_ran_away", "responses_grow", *FAULTS} - {"reward_constant"} | {
        "reward_tells_nothing_apart"
    }
    assert {rule.__name__ for rule in RULES} == said


def test_the_numbers_of_findings():
    missing = only("rewards_missing", align_rows(**FAULTS["rewards_missing"]))
    assert "10 % of all responses got no score; most in iteration 61, 20." in missing.seen
    grown = only("responses_do_not_end", align_rows(response_length_mean=25 + 33 * SHARE, eos_fraction=0.9))
    assert "from 26.81 to 56.52 tokens" in grown.seen  # 25 + 33 * (mean of 0.01 to 0.1, of 0.91 to 1)
    assert "max_new_tokens (now 64)" in grown.advice
    assert names(align_rows(response_length_mean=25 + 33 * SHARE), max_new_tokens=200) == ["healthy", "responses_grow"]
    assert names(align_rows(response_length_mean=25 + 11 * SHARE), max_new_tokens=200) == ["healthy"]
    assert names(align_rows(eos_fraction=0.0), stop_at_eos=False) == ["healthy"]


def test_responses_that_grow_and_end_are_a_note_with_both_lengths():
    finding = only("responses_grow", align_rows(response_length_mean=20 + 30 * SHARE), max_new_tokens=200)
    assert finding.severity == "note"
    assert "48.65 tokens at iteration 100; at first they had 20.3" in finding.seen


def test_repeated_text_is_held_against_what_the_model_did_at_first():
    finding = only("text_repeats", align_rows(repetition=0.02 + 0.5 * SHARE))
    assert "50 % of all pieces of three tokens" in finding.seen  # 0.02 + 0.5 * (mean of 0.91 to 1)
    assert "at first 5 %" in finding.seen
    assert "the reward pays for it" in finding.meaning
    assert names(align_rows(repetition=0.4)) == ["healthy"]  # poems repeat as well
    assert names(align_rows(repetition=0.02 + 0.1 * SHARE)) == ["healthy"]


def test_no_rule_stumbles_over_missing_or_odd_values():
    rng = np.random.default_rng(0)
    for _ in range(30):
        metrics = align_rows(int(rng.integers(1, 40)))
        gone = rng.choice(list(metrics[0]), size=8, replace=False)
        for row in metrics:
            for name in gone:
                row[name] = [None, "text", True, 0.0, -1e150][rng.integers(5)]
            row.pop(str(gone[0]))
        settings = {name: ALIGN[name] for name in rng.choice(list(ALIGN), size=5)}
        for finding in diagnose_align(metrics, settings):
            assert "nan" not in finding.seen


def test_a_policy_that_has_not_moved_has_not_learned_though_the_reward_rose_by_luck():
    still = dict(approx_kl=1e-12, clip_fraction=0.0, kl_to_reference=1e-9)
    assert only("updates_too_small", align_rows(**still)).severity == "problem"
    assert "updates_too_small" not in names(align_rows(approx_kl=1e-6, clip_fraction=0.0))


def test_one_update_that_leaves_nothing_of_the_policy():
    finding = only("updates_too_large", align_rows(approx_kl=np.where(SHARE == 0.03, 5.8, 0.001)))
    assert "The update of iteration 3 moved the policy by an approx_kl of 5.8" in finding.seen


def test_what_a_run_that_learned_need_not_mend_is_a_note():
    for metrics, name in (
        (dict(explained_variance=-0.4), "critic_explains_nothing"),
        (dict(reward_std=np.exp(-6 * SHARE)), "reward_saturated"),
        (dict(groups_alike=SHARE), "groups_all_alike"),
    ):
        assert names(align_rows(**metrics)) == ["healthy", name]
    assert "value_pretraining" in only("critic_explains_nothing", align_rows(explained_variance=-0.4)).advice
    trunk = only("critic_explains_nothing", align_rows(explained_variance=-0.4), sharing="trunk")
    assert "value_pretraining" not in trunk.advice


# --- pictures ---------------------------------------------------------------------------------------------------


def charts(*runs):
    return {chart.name: chart for chart in language_charts(read_records(list(runs)))}


def axes_of(name, *runs):
    return language_figure(charts(*runs)[name], read_records(list(runs))).axes


def longest_line(axis):
    return max(axis.lines, key=lambda line: len(line.get_xdata()))


def test_every_picture_is_drawn_and_known_for_our_own(tmp_path):
    run = make_language_run(tmp_path / "run", align_rows(30))
    paths = draw_language_records(read_records([run]), tmp_path / "out")
    assert [path.stem for path in paths] == ["overview", *charts(run)]
    folder.prepare_folder(tmp_path / "out", paths)
    for path in paths:
        with Image.open(path) as image:
            assert image.width >= 900
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20  # more than an empty page


def test_the_reward_of_one_run_has_a_band_and_gold_beside_it(tmp_path):
    metrics = align_rows(30, gold_mean=0.25)
    run = make_language_run(tmp_path / "a", metrics)
    reward, gold = axes_of("reward", run)
    assert longest_line(reward).get_ydata().tolist() == [row["reward_mean"] for row in metrics]
    (band,) = reward.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].max() == max(row["reward_mean"] + row["reward_std"] for row in metrics)
    assert reward.get_ylim()[0] < corners[:, 1].min()
    assert set(longest_line(gold).get_ydata()) == {0.25}
    several = axes_of("reward", run, make_language_run(tmp_path / "b", align_rows(30)))
    assert not several[0].collections
    assert "shaded" not in " ".join(text.get_text() for text in several[0].texts)


def test_the_frontier_has_the_distance_on_its_axis_and_every_run(tmp_path):
    far = make_language_run(tmp_path / "far", align_rows(kl_to_reference=40 * SHARE, reward_mean=2 * SHARE))
    near = make_language_run(tmp_path / "near", align_rows(50))
    unknown = make_language_run(tmp_path / "unknown", align_rows(50, kl_to_reference=None))
    (axis,) = axes_of("frontier", far, near, unknown)
    assert axis.get_xlabel().startswith("KL to the reference")
    clouds = [np.asarray(cloud.get_offsets()) for cloud in axis.collections]
    assert [len(cloud) for cloud in clouds] == [100, 50]
    np.testing.assert_allclose(clouds[0], np.stack([40 * SHARE, 2 * SHARE], 1))
    path = longest_line(axis)
    np.testing.assert_allclose(path.get_ydata(), np.asarray(path.get_xdata()) / 20)  # means keep a straight line
    assert axis.get_xlim()[1] > 40
    assert "frontier" not in charts(unknown)


def test_beta_and_its_target_are_drawn_where_it_is_adaptive(tmp_path):
    fixed = make_language_run(tmp_path / "fixed", align_rows(30))
    moving = make_language_run(tmp_path / "moving", align_rows(30, beta=SHARE[:30]), beta_control="adaptive")
    (panel,) = charts(fixed)["kl_to_reference"].panels
    assert panel.reference is None
    kl, beta = charts(moving)["kl_to_reference"].panels
    assert (kl.reference, beta.lines[0].metric) == ("beta_target", "beta")


def test_a_reward_model_has_its_losses_and_its_accuracy_on_both_parts(tmp_path):
    run = make_language_run(tmp_path / "rm", learning_rows(), stage="reward")
    assert [line.metric for line in charts(run)["accuracy"].panels[0].lines] == ["accuracy", "held_out_accuracy"]
    assert "log_ratios" not in charts(run)
    held_out = [line for line in axes_of("loss", run)[0].lines if line.get_marker() == "o"]
    assert held_out[0].get_xdata().tolist() == [25, 50, 75, 100]
    nothing_held_out = make_language_run(tmp_path / "all", learning_rows(held_out_loss=None), stage="sft")
    assert len(charts(nothing_held_out)["loss"].panels[0].lines) == 1
    assert len(language_overview(read_records([run])).axes) == 6  # five panels and an empty place


# --- the report -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_language_pictures(monkeypatch):
    monkeypatch.setattr(report, "draw_language_records", lambda records, target: [])


SAMPLES = [
    {"iteration": iteration, "prompt": prompt, "response": f"answer {iteration}", "score": 0.5, "kl": kl}
    for iteration, kl in ((10, 1.5), (20, None))
    for prompt in ("one", [{"role": "user", "content": "two"}])
]


@pytest.mark.usefixtures("no_language_pictures")
class TestReport:
    def test_of_a_run_lies_in_the_run(self, tmp_path):
        run = make_language_run(tmp_path / "run", align_rows(), SAMPLES)
        assert [finding.name for finding in write_language_report(run.path)] == ["healthy"]
        text = (run.report / "report.md").read_text()
        assert "# align (ppo): run" in text
        assert "It took 100 iterations, 6,400 responses and 3 min 20 s." in text
        assert "**Good: healthy.**" in text
        assert "samples.md" in text
        told = json.loads(json.dumps(report_json(write_report([run])), allow_nan=False))
        assert told["samples"] == str(run.report / "samples.md")
        assert told["runs"][0]["final"]["reward_mean"] == pytest.approx(1.45, abs=0.05)

    def test_of_several_runs_compares_them(self, tmp_path):
        bad = align_rows(gold_mean=noisy(PEAKED), reward_mean=noisy(2 * SHARE))
        runs = [
            make_language_run(tmp_path / "good", align_rows()),
            make_language_run(tmp_path / "bad", bad, beta=0.001, algorithm="grpo"),
        ]
        text = write_report(runs, tmp_path / "out").text
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
        assert [line[-1] for line in lines if line[0] == "bad"] == ["over_optimization"]
        assert ["beta", "0.05", "0.001"] in lines
        assert text.isascii()

    def test_of_seeds_averages_them(self, tmp_path):
        runs = [make_language_run(tmp_path / f"{k}", align_rows(reward_mean=1.0 * k), seed=k) for k in (1, 2)]
        assert "Over 2 runs the final reward is 1.5 on average" in write_report(runs, tmp_path / "out").text

    def test_of_other_stages_has_no_diagnosis(self, tmp_path):
        run = make_language_run(tmp_path / "run", learning_rows(), stage="dpo")
        assert write_language_report(run.path) == ()
        assert "Diagnosis" not in (run.report / "report.md").read_text()
        assert not (run.report / "samples.md").exists()

    def test_of_runs_of_different_kinds_is_refused(self, tmp_path):
        runs = [make_run(tmp_path / "cart", rows(5)), make_language_run(tmp_path / "lm", align_rows(5))]
        with pytest.raises(UserError, match=r"cart \(control\), lm \(align\)"):
            write_report(runs, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_is_a_command(self, tmp_path, capsys):
        run = make_language_run(tmp_path / "run", align_rows(approx_kl=0.2))
        code, out, _ = said_by(capsys, "report", str(run.path), "--json")
        assert (code, json.loads(out)["runs"][0]["findings"][0]["name"]) == (0, "updates_too_large")


class TestSamples:
    def test_are_a_table_for_each_prompt(self, tmp_path):
        text = samples_text(read_records([make_language_run(tmp_path / "run", align_rows(5), SAMPLES)]))
        assert "` one `" in text
        assert "` user: two `" in text
        assert text.count("| 10 | 0.5 | 1.5 | ` answer 10 ` |") == 2
        assert text.count("| 20 | 0.5 | - | ` answer 20 ` |") == 2

    def test_of_any_content_stay_text(self, tmp_path):
        wild = "a|b `c` <img src=x>\n\x1b[2J\u202e" + "x" * 1000
        samples = [
            SAMPLES[0] | {"response": wild},
            SAMPLES[2] | {"response": " "},
            "torn {",
            "[1]",
            '{"iteration": "x"}',
        ]
        text = samples_text(read_records([make_language_run(tmp_path / "run", align_rows(5), samples)]))
        assert r"`` a\|b `c` <img src=x> ↵ �[2J�xxx" in text
        assert "(empty)" in text
        assert "x" * 700 not in text
        assert len([line for line in text.splitlines() if line.startswith("|")]) == 4

    def test_of_many_looks_are_thinned_to_both_ends(self, tmp_path):
        samples = [SAMPLES[0] | {"iteration": iteration} for iteration in range(1, 201)]
        text = samples_text(read_records([make_language_run(tmp_path / "run", align_rows(5), samples)]))
        shown = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]
        assert len(shown) == 20
        assert (shown[0], shown[-1]) == ("1", "200")
