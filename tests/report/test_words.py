import math

import pytest

from proximo.report.words import duration, number, percent, plural


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (500.0, "500"), (-181.438, "-181.4"), (12345.6, "12,346"), (1_000_000, "1,000,000"), (2.5, "2.5"),
        (0.000955, "0.000955"), (1e-6, "1e-06"), (-0.0112, "-0.0112"), (1e20, "1e+20"), (None, "-"), (math.nan, "-"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 seconds"), (35.2, "35 seconds"), (125, "2 min 5 s"), (12_000, "3 h 20 min"), (None, "-")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_share_that_is_not_quite_all_or_nothing_says_so():
    assert [percent(share) for share in (0.0, 0.001, 0.256, 0.999, 1.0)] == [
        "0 %", "less than 1 %", "26 %", "more than 99 %", "100 %",
    ]  # fmt: skip


def test_plurals():
    assert plural(1, "episode") == "1 episode"
    assert plural(2000, "episode") == "2,000 episodes"
