"""Any space as one array: where everything lies, what is refused, and the way back."""

from __future__ import annotations

import copy
from typing import Any

import cloudpickle  # noqa: TID251  # spaces are sent to worker processes
import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.errors import UserError
from proximo.models.packing import (
    PackedActions,
    PackedObservations,
    PackingError,
    checked_mask,
    leaves,
    options_of,
)
from proximo.models.spaces import space_from_json, space_to_json

NESTED = spaces.Dict(
    {
        "speed": spaces.Box(-1.0, 1.0, (2,), np.float32),
        "arm": spaces.Tuple([spaces.Discrete(3, start=5), spaces.MultiBinary(2)]),
        "gear": spaces.MultiDiscrete([2, 3]),
    }
)
ONE = {
    "speed": np.array([0.25, -0.5], np.float32),
    "arm": (6, np.array([1, 0], np.int8)),
    "gear": np.array([1, 2]),
}
PIXELS = spaces.Box(0, 255, (36, 40, 3), np.uint8)
SEEN = spaces.Dict({"camera": PIXELS, "speed": spaces.Box(-np.inf, np.inf, (2,), np.float64)})


class TestNumbers:
    def test_by_hand(self):
        """Keys in sorted order: arm, gear, speed; choices one number per option."""
        packed = PackedObservations(NESTED)
        assert packed.pack(ONE).tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0.25, -0.5]
        assert (packed.shape, packed.dtype) == ((12,), np.float32)
        names = [packed.element(place) for place in (0, 2, 4, 6, 11)]
        assert names == [
            "observation['arm'][0]",
            "observation['arm'][0]",
            "observation['arm'][1][1]",
            "observation['gear']",
            "observation['speed'][1]",
        ]

    def test_the_order_of_keys_makes_no_difference(self):
        turned = spaces.Dict([(key, NESTED[key]) for key in reversed(list(NESTED.spaces))])
        one = {key: ONE[key] for key in reversed(ONE)}
        assert PackedObservations(turned).pack(one).tolist() == PackedObservations(NESTED).pack(ONE).tolist()
        assert PackedObservations(turned) == PackedObservations(NESTED)

    def test_many_are_one_by_one(self):
        packed = PackedObservations(NESTED)
        NESTED.seed(0)
        some = [NESTED.sample() for _ in range(4)]
        batch = {
            "speed": np.stack([one["speed"] for one in some]),
            "arm": tuple(np.stack([np.asarray(one["arm"][k]) for one in some]) for k in (0, 1)),
            "gear": np.stack([one["gear"] for one in some]),
        }
        assert packed.leading_of(batch) == (4,)
        assert packed.leading_of(some[0]) == ()
        assert np.array_equal(packed.pack_many(batch, None, (4,)), np.stack([packed.pack(one) for one in some]))

    @pytest.mark.parametrize(
        ("space", "value", "row"),
        [
            (spaces.Discrete(3), 2, [0, 0, 1]),
            (spaces.Discrete(3, start=-1), np.int64(-1), [1, 0, 0]),
            (spaces.MultiBinary([2, 2]), np.array([[1, 0], [0, 1]]), [1, 0, 0, 1]),
            (spaces.MultiDiscrete([[2, 2]], start=[[1, 0]]), np.array([[2, 0]]), [0, 1, 1, 0]),
            (spaces.Dict({"x": spaces.Box(0, 9, (), np.int64)}), {"x": 7}, [7]),
            (spaces.Dict({"x": spaces.Box(0, 1, (2, 2), bool)}), {"x": np.eye(2, dtype=bool)}, [1, 0, 0, 1]),
            (spaces.Tuple([spaces.Box(0, 255, (4, 4, 3), np.uint8)]), (np.full((4, 4, 3), 7),), [7] * 48),
        ],
    )
    def test_every_kind(self, space: spaces.Space, value: Any, row: list[float]):
        packed = PackedObservations(space)
        assert packed.pack(value).tolist() == row
        assert packed.contains(packed.pack(value))

    @pytest.mark.parametrize(
        ("observation", "said"),
        [
            ({"speed": ONE["speed"], "arm": ONE["arm"]}, "observation is a dict without 'gear'"),
            (ONE | {"arm": (6,)}, r"observation\['arm'\] is a tuple without 1"),
            (ONE | {"arm": (8, ONE["arm"][1])}, r"observation\['arm'\]\[0\] is 8, which is not in its space Discrete"),
            (ONE | {"gear": np.array([0, 3])}, r"observation\['gear'\] is 3, which is not in its space"),
            (ONE | {"gear": np.array([0.5, 1])}, r"observation\['gear'\] is 0.5, which is not"),
            (ONE | {"speed": np.zeros(3)}, r"observation\['speed'\] has shape \(3,\), not \(2,\)"),
            (ONE | {"speed": ["a", "b"]}, r"observation\['speed'\] is a list, not an array of numbers"),
            (3.0, "observation is a float without 'arm'"),
        ],
    )
    def test_what_does_not_fit_is_told_by_its_place(self, observation: Any, said: str):
        with pytest.raises(PackingError, match=said):
            PackedObservations(NESTED).pack(observation)


class TestImages:
    def test_rows_are_bytes_from_which_everything_comes_back(self):
        packed = PackedObservations(SEEN)
        camera = np.random.default_rng(0).integers(0, 256, (36, 40, 3), np.uint8)
        row = packed.pack({"camera": camera, "speed": np.array([1.5, -2.5])})
        assert (row.dtype, row.shape) == (np.uint8, (8 + 36 * 40 * 3,))
        for rows in (row[None], torch.from_numpy(row[None].copy())):
            assert packed.numbers(rows).tolist() == [[1.5, -2.5]]
            (pixels,) = packed.pixels(rows)
            assert np.array_equal(np.asarray(pixels[0]), camera)
            assert packed.mask(rows) is None

    @pytest.mark.parametrize("n_options", [1, 2, 3, 4])
    @pytest.mark.parametrize("n", [1, 2])
    def test_rows_of_any_number_of_bytes(self, n_options: int, n: int):
        packed = PackedObservations(SEEN, (n_options,))
        one = {"camera": np.zeros((36, 40, 3), np.uint8), "speed": np.array([3.0, 4.0])}
        rows = torch.from_numpy(np.stack([packed.pack(one, np.ones(n_options))] * n))
        assert packed.numbers(rows).tolist() == [[3.0, 4.0]] * n
        assert packed.numbers(rows[:1, None]).tolist() == [[[3.0, 4.0]]]

    def test_with_leading_dimensions_and_masks(self):
        packed = PackedObservations(SEEN, (2, 3))
        row = packed.pack({"camera": np.zeros((36, 40, 3), np.uint8), "speed": np.array([3.0, 4.0])}, [0, 1, 1, 0, 1])
        rows = torch.from_numpy(np.stack([row] * 6)).view(2, 3, -1)
        assert packed.numbers(rows)[1, 2].tolist() == [3.0, 4.0]
        assert packed.mask(rows)[1, 2].tolist() == [False, True, True, False, True]
        assert packed.pixels(rows)[0].shape == (2, 3, 36, 40, 3)

    def test_pixels_must_be_bytes(self):
        packed = PackedObservations(SEEN)
        speed = np.zeros(2)
        whole = packed.pack({"camera": np.full((36, 40, 3), 7.0), "speed": speed})
        assert packed.pixels(whole[None])[0].max() == 7
        with pytest.raises(PackingError, match="pixels that are no whole numbers from 0 to 255"):
            packed.pack({"camera": np.full((36, 40, 3), 256), "speed": speed})


class TestMasks:
    def test_by_hand(self):
        packed = PackedObservations(spaces.Box(-1, 1, (2,)), (2, 3))
        row = packed.pack(np.array([0.5, -0.5]), np.array([1, 0, 0, 1, 1]))
        assert row.tolist() == [0.5, -0.5, 1, 0, 0, 1, 1]
        assert packed.mask(row).tolist() == [True, False, False, True, True]
        assert packed.numbers(row).tolist() == [0.5, -0.5]

    def test_a_mask_in_the_observation_is_nothing_to_learn_from(self):
        space = spaces.Dict({"action_mask": spaces.MultiBinary(2), "x": spaces.Box(0, 1, (1,))})
        packed = PackedObservations(space, (2,), mask_is_observed=True)
        row = packed.pack({"action_mask": np.array([0, 1], np.int8), "x": np.array([0.5])})
        assert row.tolist() == [0.5, 0, 1]
        assert packed.n_numbers == 1

    def test_parts_may_be_given_one_by_one(self):
        assert checked_mask((np.array([1, 0]), [True, True, False]), (2, 3)).tolist() == [
            True,
            False,
            True,
            True,
            False,
        ]

    @pytest.mark.parametrize(
        ("mask", "said"),
        [
            (None, "there is no action_mask"),
            ([1, 1, 1], r"the action_mask has shape \(3,\), not one number for each of 5 options"),
            (([1, 1], [1, 1]), "the action_mask has shape"),
            ([0, 0, 1, 1, 1], "forbids every action of choice 0"),
            ([1, 1, 0, 0, 0], "forbids every action of choice 1"),
            ([1, 1, 2, 1, 1], "must hold True and False, or 1 and 0"),
            ([1, 1, float("nan"), 1, 1], "must hold True and False, or 1 and 0"),
            (["a"] * 5, "must hold True and False, or 1 and 0"),
        ],
    )
    def test_what_is_no_mask(self, mask: Any, said: str):
        with pytest.raises(PackingError, match=said):
            checked_mask(mask, (2, 3))

    def test_one_row_of_many_without_a_possible_action(self):
        with pytest.raises(PackingError, match="forbids every action"):
            checked_mask(np.array([[1, 0], [0, 0]]), (2,), (2,))

    def test_a_list_of_masks_is_one_for_each_observation(self):
        masks = [[1, 1, 1, 0], [0, 1, 1, 1]]
        for given in (masks, [np.array(mask) for mask in masks], np.array(masks)):
            assert checked_mask(given, (2, 2), (2,)).astype(int).tolist() == masks
        by_choice = (np.array([[1, 1], [0, 1]]), np.array([[1, 0], [1, 1]]))
        assert checked_mask(by_choice, (2, 2), (2,)).astype(int).tolist() == masks
        for wrong in (np.ones((4, 2)), np.ones((1, 4)), [[1, 1, 1, 1]]):
            with pytest.raises(PackingError):
                checked_mask(wrong, (2, 2), (2,))

    def test_a_mask_of_another_length_is_refused_beforehand(self):
        space = spaces.Dict({"action_mask": spaces.MultiBinary(3), "x": spaces.Box(0, 1, (1,))})
        with pytest.raises(UserError, match=r"one number for each of the 2 options .* MultiBinary\(2\)"):
            PackedObservations(space, (2,), mask_is_observed=True)

    def test_where_an_episode_is_over_no_mask_is_needed(self):
        packed = PackedObservations(spaces.Box(-1, 1, (1,)), (2,))
        assert packed.pack(np.zeros(1), None, ignores_mask=True).tolist() == [0, 1, 1]


class TestActions:
    SPACE = spaces.Dict(
        {
            "aim": spaces.Box(-2.0, 2.0, (2,), np.float32),
            "button": spaces.Discrete(3, start=1),
            "keys": spaces.Tuple([spaces.MultiBinary(2), spaces.MultiDiscrete([2, 4])]),
        }
    )

    def test_rows_come_back_as_what_the_space_holds(self):
        packed = PackedActions(self.SPACE)
        self.SPACE.seed(3)
        for _ in range(20):
            action = self.SPACE.sample()
            again = packed.unpack(packed.pack_many(action))
            assert self.SPACE.contains(again)
            assert again["button"] == action["button"]
            assert again["aim"].tolist() == action["aim"].tolist()
            assert [part.tolist() for part in again["keys"]] == [part.tolist() for part in action["keys"]]

    def test_many_at_once(self):
        packed = PackedActions(self.SPACE)
        rows = np.stack([packed.sample() for _ in range(5)])
        many = packed.unpack(rows)
        assert many["aim"].shape == (5, 2)
        assert many["button"].shape == (5,)
        assert np.array_equal(packed.pack_many(many, (5,)), rows)

    def test_options_are_counted_in_the_order_of_the_row(self):
        assert options_of(self.SPACE) == (3, 2, 2, 2, 4)
        assert PackedActions(self.SPACE).widths == (2, 1, 2, 2)

    def test_the_same_seed_gives_the_same_sample(self):
        one, other = PackedActions(copy.deepcopy(self.SPACE)), PackedActions(copy.deepcopy(self.SPACE))
        one.seed(5)
        other.seed(5)
        assert one.sample().tolist() == other.sample().tolist()


@pytest.mark.parametrize(
    "space", [spaces.Text(5), spaces.Graph(spaces.Discrete(2), None), spaces.Sequence(spaces.Discrete(2))]
)
def test_what_cannot_be_learned_from_is_named_by_its_place(space: spaces.Space):
    with pytest.raises(UserError, match=r"observation_space\['mission'\] is .*can be learned from"):
        PackedObservations(spaces.Dict({"mission": space, "x": spaces.Discrete(2)}))


def test_choices_among_too_many_are_refused():
    with pytest.raises(UserError, match=r"observation_space\['id'\] is .*there may be 1,000,000 at most"):
        PackedObservations(spaces.Dict({"id": spaces.Discrete(2**40)}))


def test_keys_that_no_checkpoint_can_hold_are_refused():
    with pytest.raises(UserError, match="The key 1 of observation_space is no string"):
        PackedObservations(spaces.Dict({1: spaces.Discrete(2)}))


def test_spaces_without_numbers_are_refused():
    with pytest.raises(UserError, match=r"observation_space\['x'\] is .*holds no numbers"):
        list(leaves(spaces.Dict({"x": spaces.Box(0, 1, (0,))}), "observation"))


@pytest.mark.parametrize(
    "space",
    [
        NESTED,
        SEEN,
        spaces.MultiDiscrete([[2, 3]], start=[[1, 0]]),
        spaces.MultiBinary([2, 3]),
        spaces.Discrete(3, start=1, dtype=np.int32),
        PackedObservations(NESTED),
        PackedObservations(SEEN, (2, 3)),
        PackedActions(TestActions.SPACE),
    ],
)
def test_spaces_survive_json_and_the_way_to_a_worker(space: spaces.Space):
    assert space_from_json(space_to_json(space)) == space
    assert cloudpickle.loads(cloudpickle.dumps(space)) == space
    assert copy.deepcopy(space) == space


def test_another_mask_is_another_space():
    plain = PackedObservations(NESTED)
    assert plain != PackedObservations(NESTED, (2,))
    assert plain != NESTED
    assert PackedObservations(NESTED, (3,)) != PackedObservations(NESTED, (2,))


@pytest.mark.parametrize("space", [spaces.Dict({}), spaces.Tuple([])])
def test_actions_of_nothing_are_refused(space):
    with pytest.raises(UserError, match=r"action_space is .*holds no numbers"):
        PackedActions(space)
