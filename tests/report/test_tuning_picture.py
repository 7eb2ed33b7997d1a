"""The picture of a search: what is drawn where."""

from __future__ import annotations

import numpy as np
import pytest

from proximo.report.folder import png_bytes
from proximo.report.tuning_picture import Coordinate, Outcome, tuning_figure

COORDINATES = [Coordinate("learning_rate", [(0.0, "1e-05"), (1.0, "0.01")]), Coordinate("gamma", [(0.5, "0.99")])]
OUTCOMES = [
    Outcome(0, "finished", 10.0, (0.5, 0.5)),
    Outcome(1, "finished", 30.0, (0.7, 0.1)),
    Outcome(2, "pruned", None, (0.2, 0.9)),
    Outcome(3, "failed", None, (1.0, 0.0)),
    Outcome(4, "finished", 20.0, (0.6, 0.4)),
]


def test_lines_stand_where_the_settings_and_scores_are_and_the_best_is_in_front():
    upper, lower = tuning_figure(COORDINATES, OUTCOMES, "a title").axes
    trials = {line.get_label(): line for line in upper.lines if not line.get_label().startswith("_")}
    assert np.array_equal(trials["1"].get_ydata(), [0.7, 0.1, 1.0])  # the last axis is the score
    assert np.array_equal(trials["4"].get_ydata(), [0.6, 0.4, 0.5])
    assert np.array_equal(trials["0"].get_ydata(), [0.5, 0.5, 0.0])
    assert trials["1"].get_zorder() > trials["4"].get_zorder() > trials["0"].get_zorder()
    assert len({line.get_color() for line in trials.values()}) == 3
    pale = [tuple(line.get_ydata()) for line in upper.lines if len(line.get_xdata()) == 2]
    assert {(0.2, 0.9), (1.0, 0.0)} <= set(pale)
    words = [text.get_text() for text in upper.texts]
    assert {"learning\nrate", "gamma", "score", "1e-05", "0.99", "10", "20", "30"} <= set(words)
    (best,) = (line for line in lower.lines if line.get_label() == "best so far")
    assert list(best.get_ydata()) == [10.0, 30.0, 30.0, 30.0]
    assert [label.get_text() for label in lower.get_legend().get_texts()] == [
        "best so far",
        "score",
        "given up",
        "failed",
    ]


@pytest.mark.parametrize("outcomes", [OUTCOMES[:1], [OUTCOMES[0], Outcome(1, "finished", 10.0, (0.1, 0.2))]])
def test_one_trial_and_equal_scores_are_drawn(outcomes):
    assert png_bytes(tuning_figure(COORDINATES, outcomes, "few")).startswith(b"\x89PNG")
