"""The page of a run: its numbers, its words, and that nothing in a run can get out of its place."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from proximo.baselines import baseline_of
from proximo.errors import UserError
from proximo.report import intervals, page
from proximo.report.intervals import bootstrap_band, bootstrap_interval, interquartile_mean
from proximo.report.page import embedded, facts_of, page_bytes, policy_of
from proximo.report.page_data import (
    MOST_GROUP_NUMBERS,
    MOST_SAMPLE_CHARACTERS,
    curves_of,
    group_curves,
    grouped,
    groups_of,
    metrics_of,
    panels_of,
    plain,
    rising,
    samples_of,
)
from proximo.report.page_settings import Baseline, differs, setting_rows
from proximo.report.ratings import keep_ratings, read_ratings
from proximo.report.records import read_records
from proximo.report.report import report_json, write_report
from proximo.report.summary import summarize, summarize_language
from proximo.report.words import number
from proximo.runs.checkpoint import save_checkpoint
from tests.report.language_samples import align_rows, learning_rows, make_language_run
from tests.report.samples import make_run, rows

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028'\"&{{ 7*7 }}"


def written(*runs, baselines=None, folder=None):
    """The page about these runs, as text."""
    records = read_records(list(runs))
    summed = [summarize(record) if record.stage is None else summarize_language(record) for record in records]
    return page_bytes(records, summed, baselines, folder=folder).decode()


def data_of(text):
    """What the script of a page is given."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


class Tags(HTMLParser):
    """Every element with its attributes, and the text outside of scripts."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text, self.stack = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()

    def handle_data(self, data):
        if not self.stack:
            self.text.append(data)


# --- numbers --------------------------------------------------------------------------------------------------------


class TestNumbers:
    def test_groups_keep_their_extremes_in_order_and_their_means(self):
        extremes, means = grouped(np.array([1.0, 9.0, 2.0, 8.0, 3.0, np.nan, np.nan, np.nan, np.nan, 7.0]), 3)
        np.testing.assert_array_equal(extremes, [1, 9, 8, 3, np.nan, np.nan, 7, 7])
        np.testing.assert_array_equal(means, [4, 5.5, np.nan, 7])

    def test_an_axis_never_goes_back(self):
        nan = np.nan
        np.testing.assert_array_equal(rising(np.array([nan, 2, 1, nan, 5])), [nan, 2, 2, 2, 5])
        assert len(rising(np.array([]))) == 0

    def test_numbers_are_what_json_has(self):
        values = np.array([1.0, 0.1234567, np.nan, np.inf, -3e20, 123456789.0, 1e-9])
        assert plain(values) == [1, 0.123457, None, None, -3e20, 123456789, 1e-9]
        assert json.loads(json.dumps(plain(values), allow_nan=False))

    def test_short_runs_are_given_as_they_are(self, tmp_path):
        metrics = rows(30)
        (curves,) = curves_of(read_records([make_run(tmp_path / "run", metrics)]))
        assert curves["size"] == 1
        assert curves["x"]["steps"] == [row["env_steps"] for row in metrics]
        assert curves["columns"]["value_loss"] == pytest.approx([row["value_loss"] for row in metrics], rel=1e-5)
        assert "env_steps" not in curves["columns"]

    def test_long_runs_are_thinned_without_losing_a_peak(self, tmp_path):
        n = 20_000
        kl = np.full(n, 0.01)
        kl[12_345] = 0.9
        kl[777] = -0.5
        (curves,) = curves_of(read_records([make_run(tmp_path / "run", rows(n, approx_kl=kl))]))
        drawn = curves["columns"]["approx_kl"]
        assert len(drawn) == len(curves["x"]["steps"]) <= 4000
        assert (max(drawn), min(drawn)) == (0.9, -0.5)
        where = curves["x"]["steps"][drawn.index(0.9)]
        assert abs(where - 2048 * 12_346) <= 2048 * curves["size"]
        assert len(curves["means"]["approx_kl"]) == len(drawn) // 2
        assert np.mean(curves["means"]["approx_kl"]) == pytest.approx(kl.mean(), rel=1e-3)
        assert curves["last"]["approx_kl"] == 0.01
        assert curves["x"]["steps"][-1] == 2048 * n

    def test_many_runs_share_what_there_is_room_for(self, tmp_path):
        runs = [make_run(tmp_path / str(k), rows(1000), seed=k) for k in range(30)]
        text = written(*runs)
        assert len(text) < 2_000_000
        assert len(data_of(text)["runs"]) == 30

    @pytest.mark.parametrize(("n_runs", "seeds"), [(40, 2), (60, 2), (30, 5)])
    def test_many_groups_of_seeds_have_a_small_page(self, tmp_path, n_runs, seeds):
        runs = [
            make_run(
                tmp_path / str(k), rows(200, return_mean=np.arange(200) * 1.234567), seed=k, gamma=k // seeds / 100
            )
            for k in range(n_runs)
        ]
        text = written(*runs)
        data = data_of(text)
        assert len(text) < 2_000_000
        assert len(data["groups"]) == n_runs // seeds
        numbers = sum(len(end) for group in data["groups"] for pair in group["bands"].values() for end in pair)
        assert numbers <= MOST_GROUP_NUMBERS
        assert len(data["groups"][0]["columns"]["return_mean"]) >= 16

    def test_metrics_with_a_panel_of_their_own_go_first_where_all_are_too_many(self, tmp_path):
        records = read_records([make_run(tmp_path / "run", rows(5, mine=1.0))])
        kept = metrics_of(records, 12)
        assert len(kept) == 12
        assert "return_mean" in kept
        assert "mine" not in kept
        assert "mine" in metrics_of(records, 100)

    def test_the_largest_page_is_small(self, tmp_path):
        assert len(written(make_run(tmp_path / "run", rows(20_000)))) < 2_000_000


class TestGroups:
    def test_are_the_runs_that_differ_in_their_seeds_alone(self, tmp_path):
        settings = ({"seed": 1}, {"seed": 1, "gamma": 0.9}, {"seed": 2}, {"seed": 3, "gamma": 0.9})
        runs = [make_run(tmp_path / str(k), rows(5), **each) for k, each in enumerate(settings)]
        assert groups_of(read_records(runs)) == [[0, 2], [1, 3]]

    def test_have_interquartile_means_and_intervals(self, tmp_path):
        levels = [1.0, 2.0, 3.0, 4.0, 100.0]
        runs = [make_run(tmp_path / str(k), rows(8, return_mean=level), seed=k) for k, level in enumerate(levels)]
        curves = group_curves(read_records(runs))
        assert curves is not None
        assert curves["columns"]["return_mean"] == [3.0] * 8  # without 1 and 100
        low, high = bootstrap_interval(np.array(levels), n_resamples=300)
        assert curves["bands"]["return_mean"] == [pytest.approx([end] * 8, rel=1e-5) for end in (low, high)]
        assert curves["x"]["steps"] == [2048 * k for k in range(1, 9)]

    def test_of_few_seeds_have_their_mean_and_their_range(self, tmp_path):
        levels = [1.0, 2.0, 3.0, 100.0]
        runs = [make_run(tmp_path / str(k), rows(8, return_mean=level), seed=k) for k, level in enumerate(levels)]
        curves = group_curves(read_records(runs))
        assert curves is not None
        assert curves["few"]
        assert curves["columns"]["return_mean"] == [26.5] * 8
        assert curves["bands"]["return_mean"] == [[1] * 8, [100] * 8]

    def test_have_no_value_where_one_of_their_runs_has_none(self, tmp_path):
        late = [None, None, 3.0, None, 5.0, 6.0, None, None]
        level = [1.0] * 8
        runs = [make_run(tmp_path / str(k), rows(8, return_mean=m), seed=k) for k, m in enumerate((level, late))]
        many = [
            make_run(tmp_path / f"m{k}", rows(8, return_mean=m), seed=k) for k, m in enumerate([level] * 4 + [late])
        ]
        for curves, values in (
            (group_curves(read_records(runs)), [None, None, 2.0, 2.5, 3.0, 3.5, None, None]),
            (group_curves(read_records(many)), [None, None, 1, 1, 1, 1, None, None]),
        ):
            assert curves is not None
            assert curves["columns"]["return_mean"] == values
            assert [value is None for value in curves["bands"]["return_mean"][1]] == [each is None for each in values]

    def test_are_read_off_at_the_same_steps_as_far_as_the_shortest_came(self, tmp_path):
        line = np.arange(1, 11) * 2048.0
        runs = [
            make_run(tmp_path / "a", rows(10, return_mean=line)),
            make_run(tmp_path / "b", rows(4, return_mean=2 * line[:4]), seed=2),
        ]
        curves = group_curves(read_records(runs))
        assert curves is not None
        assert curves["x"]["steps"][-1] == 4 * 2048
        assert curves["columns"]["return_mean"] == pytest.approx([1.5 * x for x in curves["x"]["steps"]])

    def test_of_one_run_or_of_nothing_in_common_are_none(self, tmp_path):
        one = make_run(tmp_path / "a", rows(5))
        far = make_run(tmp_path / "b", rows(5, env_steps=np.arange(5) + 10**9), seed=2)
        assert group_curves(read_records([one])) is None
        assert group_curves(read_records([one, far])) is None

    def test_a_band_is_the_interval_at_every_point(self, monkeypatch):
        monkeypatch.setattr(intervals, "MOST_DRAWN", 500 * 6 * 3)  # three points, then one
        curves = np.random.default_rng(3).normal(size=(6, 4))
        low, high = bootstrap_band(curves, n_resamples=500, seed=5)
        for point in range(4):
            interval = bootstrap_interval(curves[:, point], n_resamples=500, seed=5)
            assert (low[point], high[point]) == pytest.approx(interval)
            assert low[point] <= interquartile_mean(curves[:, point]) <= high[point]

    def test_a_run_that_stands_alone_is_shown_beside_them(self, tmp_path):
        runs = [make_run(tmp_path / str(seed), rows(10), seed=seed) for seed in (1, 2)]
        other = make_run(tmp_path / "other", rows(10), gamma=0.5)
        data = data_of(written(*runs, other))
        assert [group["label"] for group in data["groups"]] == ["gamma none (2 seeds)", "gamma 0.5 (1 seed)"]
        assert ["bands" in group for group in data["groups"]] == [True, False]
        assert data["groups"][1]["run"] == 2  # by its number: its curves are there once
        assert "columns" not in data["groups"][1]
        assert data_of(written(runs[0], other))["groups"] == []


def test_every_panel_has_what_the_script_reads():
    for stage in (None, "align", "sft", "reward", "dpo"):
        panels = panels_of(stage)
        assert len({tuple(line["metric"] for line in panel["lines"]) for panel in panels}) == len(panels)
        json.dumps(panels, allow_nan=False)
    assert any(panel["stacked"] for panel in panels_of(None))


# --- settings -------------------------------------------------------------------------------------------------------


class TestSettings:
    BASE = Baseline("tuned", {"gamma": 0.98, "n_epochs": 20, "vectorization": "auto"}, {"gamma": 0.99, "n_epochs": 20})

    def test_that_differ_come_first_and_are_marked(self):
        found = {row.name: row for row in setting_rows({"n_epochs": 20, "gamma": 0.98, "mine": 1}, self.BASE)}
        assert list(found) == ["gamma", "n_epochs", "mine"]
        assert (found["gamma"].differs, found["gamma"].differs_from_default) == (False, True)
        assert (found["gamma"].value, found["gamma"].preset, found["gamma"].default) == ("0.98", "0.98", "0.99")
        changed = setting_rows({"n_epochs": 4, "gamma": 0.98}, self.BASE)
        assert [(row.name, row.differs) for row in changed] == [("n_epochs", True), ("gamma", False)]

    def test_without_a_preset_are_held_against_the_defaults(self):
        (row,) = setting_rows({"gamma": 0.5}, Baseline("defaults", None, {"gamma": 0.99}))
        assert (row.differs, row.preset) == (True, "")
        assert [row.differs for row in setting_rows({"gamma": 0.5}, None)] == [False]

    def test_that_a_run_says_nothing_of_do_not_differ(self):
        base = Baseline("defaults", {"memory": "none", "target_kl": None}, {"memory": "gru", "target_kl": None})
        found = {row.name: row for row in setting_rows({}, base)}
        assert [(row.differs, row.value) for row in found.values()] == [(False, "-"), (False, "none")]

    @pytest.mark.parametrize(
        ("name", "value", "other"),
        [
            ("vectorization", "native", "auto"),
            ("threads", 2, 0),
            ("target_kl", None, None),
            ("target_kl", "none", None),
            ("hidden_sizes", [64, 64], (64, 64)),
            ("learning_rate", 1, 1.0),
            ("env_id", "a", "b"),
            ("seed", 1, 0),
        ],
    )
    def test_that_were_chosen_or_are_the_same_do_not_differ(self, name, value, other):
        assert not differs(name, value, other)

    def test_of_a_tuned_task_are_those_of_its_preset(self):
        baseline = baseline_of({"env_id": "CartPole-v1", "algorithm": "ppo"})
        assert baseline is not None
        assert baseline.preset is not None
        assert (baseline.preset["gamma"], baseline.defaults["gamma"]) == (0.98, 0.99)
        other = baseline_of({"env_id": "CartPole-v1", "algorithm": "a2c"})
        assert other is not None
        assert "clip_epsilon" not in other.defaults

    @pytest.mark.parametrize("env_id", ["mine.py:Env", "../../x", 7, None])
    def test_of_any_other_task_are_the_defaults_and_nothing_is_made(self, env_id):
        baseline = baseline_of({"env_id": env_id})
        assert baseline is not None
        assert baseline.preset is None

    @pytest.mark.parametrize("settings", [{"algorithm": "x"}, {"stage": "x"}, {"stage": "align", "algorithm": []}])
    def test_that_make_no_sense_have_no_baseline(self, settings):
        assert baseline_of(settings) is None

    def test_of_language_stages(self):
        for stage in ("sft", "reward", "dpo", "align"):
            baseline = baseline_of({"stage": stage})
            assert baseline is not None
            assert "learning_rate" in baseline.defaults
        grpo = baseline_of({"stage": "align", "algorithm": "grpo"})
        assert grpo is not None
        assert "baseline" in grpo.defaults


# --- samples --------------------------------------------------------------------------------------------------------


def sample(iteration=10, **more):
    return {"iteration": iteration, "prompt": "why", "response": "so it is", "score": 0.5, "kl": 1.5} | more


class TestSamples:
    def of(self, tmp_path, *samples):
        run = make_language_run(tmp_path / "run", align_rows(5), samples)
        return samples_of(read_records([run])[0])

    def test_are_given_with_their_tokens(self, tmp_path):
        colours = {"tokens": ["so", " it", " is"], "log_ratios": [0.5, -1.25, 0.0]}
        old, new = self.of(tmp_path, sample(5), sample(10, **colours))
        assert "tokens" not in old
        assert new == sample(10, **colours)

    @pytest.mark.parametrize(
        "bad",
        [
            {"tokens": ["a"], "log_ratios": [0.1, 0.2]},
            {"tokens": [1], "log_ratios": [0.1]},
            {"tokens": ["a"], "log_ratios": [None]},
            {"tokens": ["a"], "log_ratios": [float("nan")]},
            {"tokens": "a", "log_ratios": "b"},
            {"tokens": ["a"], "log_ratios": [10**400]},
            {"tokens": ["x" * 5000], "log_ratios": [0.1]},
        ],
    )
    def test_with_tokens_that_do_not_fit_are_shown_without(self, tmp_path, bad):
        (found,) = self.of(tmp_path, sample(**bad))
        assert "tokens" not in found

    def test_without_numbers_have_none(self, tmp_path):
        (found,) = self.of(tmp_path, sample(score=float("inf"), kl="x", response=None, prompt={"a": 1}))
        assert (found["score"], found["kl"]) == (None, None)
        assert json.dumps(found, allow_nan=False)

    def test_whole_numbers_too_large_for_a_float_are_none(self, tmp_path):
        (found,) = self.of(tmp_path, sample(score=10**400, kl=-(10**400)))
        assert (found["score"], found["kl"]) == (None, None)
        run = make_language_run(tmp_path / "other", align_rows(5, reward_mean=10**400), [sample(score=10**400)])
        report = write_report([run], with_pictures=False)
        assert report.samples is not None
        assert "| 10 | - | 1.5 |" in report.samples.read_text()

    def test_long_answers_are_cut_and_say_so(self, tmp_path):
        (many,) = self.of(tmp_path, sample(tokens=["a"] * 700, log_ratios=[0.5] * 700))
        assert (len(many["tokens"]), len(many["log_ratios"]), many["cut"]) == (600, 600, True)
        (long,) = self.of(tmp_path / "long", sample(tokens=["x" * 1000] * 5, log_ratios=[0.5] * 5))
        assert (len(long["tokens"]), len(long["log_ratios"]), long["cut"]) == (2, 2, True)
        (whole,) = self.of(tmp_path / "whole", sample(tokens=["a"] * 600, log_ratios=[0.5] * 600))
        assert "cut" not in whole

    @pytest.mark.parametrize(("letter", "n_looks"), [("<", 100), ("\U0001f600", 100), ("a", 3), ("<", 1)])
    def test_however_large_find_room_on_the_page(self, tmp_path, letter, n_looks):
        told = {"response": letter * 3000, "tokens": [letter * 4] * 700, "log_ratios": [-0.123456789012345] * 700}
        samples = [sample(k, prompt=f"{p}{letter * 3000}", **told) for k in range(n_looks) for p in range(20)]
        run = make_language_run(tmp_path / "run", align_rows(5), samples)
        found = samples_of(read_records([run])[0])
        assert found
        assert len(embedded(found)) <= MOST_SAMPLE_CHARACTERS

    def test_of_one_look_too_many_to_show_are_left_out(self, tmp_path):
        assert self.of(tmp_path, *(sample(1, response="x" * 2400) for _ in range(300))) == []

    def test_of_several_runs_share_the_room(self, tmp_path):
        samples = [sample(k, prompt=str(p), response="x" * 2000) for k in range(1, 41) for p in range(10)]
        runs = [make_language_run(tmp_path / str(k), align_rows(5), samples, gamma=k) for k in range(4)]
        assert len(embedded(data_of(written(*runs))["samples"])) <= 1.01 * MOST_SAMPLE_CHARACTERS

    def test_of_many_looks_are_thinned_to_what_fits_with_both_ends(self, tmp_path):
        long = "x" * 2000
        found = self.of(tmp_path, *(sample(k, response=long, prompt=str(p)) for k in range(1, 101) for p in range(20)))
        assert len(json.dumps(found)) <= MOST_SAMPLE_CHARACTERS
        looks = sorted({each["iteration"] for each in found})
        assert (looks[0], looks[-1]) == (1, 100)


# --- words, and what strangers write --------------------------------------------------------------------------------


class TestPage:
    def test_has_the_result_the_diagnosis_and_the_settings_without_a_script(self, tmp_path):
        run = make_run(tmp_path / "run", rows(approx_kl=0.2), learning_rate=0.02)
        text = written(run, baselines={run.path: baseline_of({"env_id": "CartPole-v1"})})
        said = " ".join(" ".join(Tags(text).text).split())
        for words in (
            "CartPole-v1",
            "final return 499.9",
            "warning updates too large",
            "The KL of an update is 0.2",
            "What to do",
            "Compared with: the settings tuned for CartPole-v1",
            "learning_rate 0.02 changed 0.001 0.0003",
        ):
            assert words in said

    def test_is_one_file_that_asks_for_nothing(self, tmp_path):
        tags = Tags(written(make_run(tmp_path / "run", rows(20)))).found
        assert not [tag for tag, _ in tags if tag in ("link", "iframe", "object", "base")]
        assert not [attrs for tag, attrs in tags if tag == "script" and "src" in attrs]
        assert not [attrs for _, attrs in tags if any(name == "style" or name.startswith("on") for name in attrs)]
        (policy,) = [attrs["content"] for _, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "connect-src 'none'" in policy
        assert "unsafe" not in policy

    def test_its_policy_names_the_very_script_it_holds(self, tmp_path):
        text = written(make_run(tmp_path / "run", rows(20)))
        script = re.findall(r"<script>(.*?)</script>", text, re.S)[-1]
        style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
        assert policy_of(script, style, is_live=False).replace("'", "&#39;") in text

    def test_hostile_words_stay_words(self, tmp_path):
        settings = {"env_id": HOSTILE, "env_kwargs": {"a": HOSTILE}, "algorithm": HOSTILE, "seed": 1}
        run = make_run(tmp_path / "<b>run", [*rows(12), {HOSTILE: 1.0, "iteration": 13}], **settings)
        text = written(run, make_run(tmp_path / "other", rows(12)))
        assert "alert(1)</script>" not in text
        tags = Tags(text).found
        assert sum(tag == "script" for tag, _ in tags) == 2
        assert not [attrs for tag, attrs in tags if tag == "img" or "onerror" in attrs]
        assert any(HOSTILE in words for words in Tags(text).text)
        assert HOSTILE in data_of(text)["runs"][0]["columns"]

    def test_hostile_samples_stay_samples(self, tmp_path):
        told = sample(prompt=HOSTILE, response=HOSTILE, tokens=[HOSTILE], log_ratios=[1.0])
        text = written(make_language_run(tmp_path / "run", align_rows(12), [told]))
        assert sum(tag == "script" for tag, _ in Tags(text).found) == 2
        assert data_of(text)["samples"][0]["samples"][0]["tokens"] == [HOSTILE]

    def test_json_in_a_script_ends_no_script_and_breaks_no_line(self):
        text = embedded({"a": "</script><!-- \u2028\u2029 & é"})
        assert json.loads(text) == {"a": "</script><!-- \u2028\u2029 & é"}
        assert text.isascii()
        assert not set("<>&") & set(text)
        with pytest.raises(ValueError, match="JSON"):
            embedded([float("nan")])

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_of_hardly_any_rows(self, tmp_path, n):
        data = data_of(written(make_run(tmp_path / "run", rows(n))))
        assert len(data["runs"][0]["columns"]["return_mean"]) == n

    def test_of_nothing_known(self, tmp_path):
        metrics = [{"iteration": k, "env_steps": None, "return_mean": None, "seconds": None} for k in (1, 2)]
        data = data_of(written(make_run(tmp_path / "run", metrics), make_run(tmp_path / "empty", [])))
        assert data["runs"][0]["x"] == {"iterations": [1, 2]}
        assert data["runs"][0]["columns"] == {}
        assert data["runs"][1]["columns"] == {}

    def test_of_different_algorithms_and_tasks(self, tmp_path):
        plain_rows = [{name: row[name] for name in ("iteration", "env_steps", "return_mean")} for row in rows(12)]
        runs = [
            make_run(tmp_path / "ppo", rows(12), algorithm="ppo"),
            make_run(tmp_path / "a2c", plain_rows, algorithm="a2c", env_id="Pendulum-v1"),
        ]
        text = written(*runs)
        assert "CartPole-v1, Pendulum-v1" in text
        assert '<th scope="row"><code>algorithm</code></th><td>ppo</td><td>a2c</td>' in text

    @pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
    def test_of_other_stages(self, tmp_path, stage):
        text = written(make_language_run(tmp_path / "run", learning_rows(), stage=stage))
        assert "final return" not in text
        assert data_of(text)["axes"] == {"iterations": "iterations", "seconds": "seconds"}

    def test_of_several_runs_compares_them(self, tmp_path):
        runs = [make_run(tmp_path / str(k), rows(return_mean=100.0 * k), seed=k) for k in (1, 2, 3)]
        said = " ".join(" ".join(Tags(written(*runs)).text).split())
        assert "3 seeds 3 200 the mean - 100 300" in said
        assert "95 % interval of" not in said
        assert "Settings that differ" not in said

    def test_of_five_seeds_has_an_interval(self, tmp_path):
        runs = [make_run(tmp_path / str(k), rows(return_mean=100.0 * k), seed=k) for k in (1, 2, 3, 4, 10)]
        said = " ".join(" ".join(Tags(written(*runs)).text).split())
        low, high = map(number, bootstrap_interval(np.array([100.0, 200, 300, 400, 1000]), n_resamples=5000))
        assert f"5 seeds 5 300 the interquartile mean {low} to {high} 100 1,000" in said

    def test_of_a_surrogate_in_a_name_is_written(self, tmp_path):
        run = make_run(tmp_path / "run", rows(12))
        record = read_records([run])[0]
        summary = summarize(record)
        object.__setattr__(summary, "task", "bad \udcff name")
        assert b"bad ? name" in page_bytes([record], [summary])


class TestVideo:
    def film(self, run, name="step_1.mp4", size=1000):
        run.videos.mkdir(exist_ok=True)
        path = run.videos / name
        path.write_bytes(b"\x01" * size)
        return path

    def test_small_ones_are_in_the_page(self, tmp_path):
        run = make_run(tmp_path / "run", rows(5))
        self.film(run)
        (attrs,) = [attrs for tag, attrs in Tags(written(run)).found if tag == "video"]
        assert base64.b64decode(attrs["src"].partition("base64,")[2]) == b"\x01" * 1000
        assert "controls" in attrs

    def test_gifs_are_pictures_and_none_is_nothing(self, tmp_path):
        run = make_run(tmp_path / "run", rows(5))
        assert not [tag for tag, _ in Tags(written(run)).found if tag in ("video", "img")]
        self.film(run, "step_1.gif")
        assert [tag for tag, _ in Tags(written(run)).found if tag in ("video", "img")] == ["img"]

    def test_large_ones_are_linked_from_where_the_page_is(self, tmp_path, monkeypatch):
        monkeypatch.setattr(page, "LARGEST_VIDEO", 100)
        run = make_run(tmp_path / "run", rows(5))
        self.film(run, "step 1.mp4")
        text = written(run, folder=run.report)
        assert 'href="../videos/step%201.mp4"' in text
        assert "data:video" not in text

    def test_a_link_to_another_file_is_not_followed(self, tmp_path):
        run = make_run(tmp_path / "run", rows(5))
        secret = tmp_path / "secret"
        secret.write_bytes(b"secret")
        run.videos.mkdir()
        (run.videos / "x.mp4").symlink_to(secret)
        assert base64.b64encode(b"secret").decode() not in written(run)


@pytest.mark.parametrize("text", ["", "[]", '{"players": 1}', '{"players": [{"step": 1, "rating": null}]}', "[" * 9000])
def test_ratings_that_make_no_sense_are_none(tmp_path, text):
    run = make_run(tmp_path / "run", rows(5))
    assert read_ratings(run) == []
    (run.path / "ratings.json").write_text(text)
    assert read_ratings(run) == []


def test_ratings_are_kept_for_the_page(tmp_path):
    run = make_run(tmp_path / "run", rows(5))
    players = [
        {"step": step, "rating": step / 10, "standard_error": 5.0, "name": "x", "score": 0.5} for step in (200, 100)
    ]
    keep_ratings({"players": [{"step": None, "rating": 0.0, "standard_error": 0.0}, *players]}, run)
    assert read_ratings(run) == [
        {"step": 100.0, "rating": 10.0, "standard_error": 5.0},
        {"step": 200.0, "rating": 20.0, "standard_error": 5.0},
    ]


def test_versions_and_machine_are_those_of_the_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", rows(5))
    assert facts_of(run, {"seed": 7}) == {"seed": "7"}
    path = save_checkpoint(run.checkpoints, 10, {}, {})
    found = facts_of(run, {"seed": 7})
    assert {"seed", "python", "torch", "proximo", "cpu"} <= set(found)
    (path / "manifest.json").write_text("{")
    assert "cannot be read" in facts_of(run, {})["versions"]


@pytest.mark.usefixtures("no_pictures")
class TestReport:
    def test_writes_the_page_and_says_where(self, tmp_path):
        run = make_run(tmp_path / "run", rows())
        report = write_report([run])
        assert report.page == run.report / "index.html"
        assert report_json(report)["page"] == str(report.page)
        assert "index.html" in report.path.read_text()
        finding = report_json(report)["runs"][0]["findings"][0]
        assert all(finding[part] for part in ("name", "severity", "seen", "meaning"))

    def test_writes_it_anew_and_over_nothing_of_others(self, tmp_path):
        run = make_run(tmp_path / "run", rows())
        write_report([run])
        write_report([run])
        (run.report / "index.html").write_text("<html>my own</html>")
        with pytest.raises(UserError, match=r"index\.html, which Proximo did not write"):
            write_report([run])

    def test_without_pictures_draws_none(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise AssertionError

        monkeypatch.setattr("proximo.report.report.draw_records", refuse)
        report = write_report([make_run(tmp_path / "run", rows())], with_pictures=False)
        assert report.pictures == ()
        assert report.page.is_file()
        assert "## Pictures" not in report.path.read_text()
