import math

import pytest

from proximo.report.sparkline import sparkline


def test_lowest_and_highest_values_are_the_lowest_and_highest_blocks():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7.0, 0.0], 8) == "█▁"


def test_more_values_than_characters_are_averaged():
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert len(sparkline(list(range(1000)), 12)) == 12


def test_unknown_values_are_spaces_or_passed_over():
    assert sparkline([0, None, 7], 3) == "▁ █"
    assert sparkline([0, math.nan, 7, math.inf], 2) == "▁█"
    assert sparkline([None, None], 5) == "  "


def test_equal_values_are_a_line_at_half_height():
    assert sparkline([500.0] * 4, 10) == "▄▄▄▄"


def test_nothing_and_no_room_are_no_text():
    assert sparkline([], 10) == ""
    assert sparkline([1.0, 2.0], 0) == ""
    with pytest.raises(ValueError, match="width"):
        sparkline([1.0], -1)


def test_the_largest_floats_do_not_overflow():
    assert sparkline([-1.7e308, 1.7e308], 2) == "▁█"
    assert sparkline([1.7e308] * 4, 2) == "▄▄"


def test_code_pages_without_blocks_get_ascii() -> None:
    assert sparkline([0.0, 1.0, None, 7.0], 4, "cp437") == ".: @"
    assert sparkline([0.0, 1.0, None, 7.0], 4, "cp1252") == ".: @"
    assert sparkline([0.0, 1.0, None, 7.0], 4, "no-such-encoding") == ".: @"
    assert sparkline([0.0, 1.0, None, 7.0], 4, "utf-8") == "▁▂ █"
