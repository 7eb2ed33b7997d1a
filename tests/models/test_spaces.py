"""Spaces through JSON and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gymnasium import spaces

from proximo.errors import UserError
from proximo.models.spaces import space_from_json, space_to_json

SPACES = [
    spaces.Discrete(5),
    spaces.Discrete(5, start=-3),
    spaces.Box(-1.0, 1.0, (3,), np.float32),
    spaces.Box(-np.inf, np.inf, (2, 3), np.float32),
    spaces.Box(np.array([-np.inf, -1.5, 0.1]), np.array([0.3, np.inf, 1 / 3]), dtype=np.float64),
    spaces.Box(np.float32(0.1), np.float32(0.7), (2,), np.float32),
    spaces.Box(0, 255, (4, 4, 3), np.uint8),
    spaces.Box(np.array([-7, 0]), np.array([0, 2**40]), dtype=np.int64),
    spaces.Box(-1e300, 1e-300, (1,), np.float64),
    spaces.Box(np.array([[0, 1], [2, 3]], np.float32), np.array([[4, 5], [6, 7]], np.float32)),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_space_comes_back_as_it_was(space):
    text = json.dumps(space_to_json(space), allow_nan=False)
    again = space_from_json(json.loads(text))
    assert again == space
    assert again.dtype == space.dtype
    if isinstance(space, spaces.Box):
        assert isinstance(again, spaces.Box)
        assert again.low.tobytes() == space.low.tobytes()
        assert again.high.tobytes() == space.high.tobytes()
        assert np.array_equal(again.bounded_below, space.bounded_below)
        assert np.array_equal(again.bounded_above, space.bounded_above)


def test_a_space_of_one_number_without_a_dimension_comes_back():
    space = spaces.Box(-1.0, 1.0, (), np.float32)
    assert space_from_json(json.loads(json.dumps(space_to_json(space)))) == space


def test_the_largest_integers_come_back():
    limits = np.iinfo(np.int64)
    space = spaces.Box(limits.min, limits.max, (2,), np.int64)
    assert space_from_json(json.loads(json.dumps(space_to_json(space)))) == space


def test_equal_bounds_are_written_once():
    assert space_to_json(spaces.Box(0, 255, (84, 84, 3), np.uint8))["high"] == [255.0]


@pytest.mark.parametrize("space", [spaces.Text(3), spaces.Dict({1: spaces.Discrete(2)})], ids=str)
def test_other_spaces_are_refused(space):
    with pytest.raises(UserError, match="cannot be saved"):
        space_to_json(space)


BOX = space_to_json(spaces.Box(-1.0, 1.0, (3,), np.float32))


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"kind": "Tuple"},
        {"kind": "Discrete"},
        {"kind": "Discrete", "n": 0, "start": 0},
        {"kind": "Discrete", "n": "many", "start": 0},
        {**BOX, "dtype": "float33"},
        {**BOX, "low": [1, 2]},
        {**BOX, "low": None},
        {**BOX, "shape": [-3]},
        {**BOX, "low": ["nan"]},
    ],
    ids=str,
)
def test_what_describes_no_space_is_refused(described):
    with pytest.raises(UserError, match="describes a space"):
        space_from_json(described)


def test_what_describes_an_impossible_space_is_refused():
    with pytest.raises(UserError, match="describes a space"):
        space_from_json({**BOX, "shape": [10**9, 10**9]})
