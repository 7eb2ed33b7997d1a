"""`PolicyGraph`: the same as the policy, over named tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.models.control import ActorCritic, NetworkConfig
from proximo.models.graph import PolicyGraph
from proximo.models.packing import PackedObservations


def graph_of(seen: spaces.Space, **settings) -> PolicyGraph:
    policy = ActorCritic(seen, spaces.Discrete(2), NetworkConfig(**settings), torch.Generator().manual_seed(0))
    return PolicyGraph(policy.eval().requires_grad_(False)).eval()


def test_numbers_are_laid_out_as_rows_are():
    """Choices as ones, keys sorted: the features of the graph are those of the packed row, to the last bit."""
    source = spaces.Dict(
        {
            "b": spaces.MultiDiscrete([[2, 3]], start=[[1, -1]]),
            "a": spaces.Tuple([spaces.Discrete(3, start=4), spaces.Box(-9, 9, (2,), np.int16)]),
            "c": spaces.MultiBinary(2),
        }
    )
    seen = PackedObservations(source)
    graph = graph_of(seen)
    given = {
        "observation_a_0": np.array([6]),
        "observation_a_1": np.array([[-7, 3]], np.int16),
        "observation_b": np.array([[[2, -1]]]),
        "observation_c": np.array([[0, 1]], np.int8),
    }
    images, numbers, mask = graph._taken_apart({name: torch.from_numpy(array) for name, array in given.items()})
    assert (images, mask) == (None, None)
    assert numbers is not None
    assert numbers.tolist() == [[0, 0, 1, -7, 3, 0, 1, 1, 0, 0, 0, 1]]
    observation = {"a": (6, given["observation_a_1"][0]), "b": given["observation_b"][0], "c": np.array([0, 1])}
    np.testing.assert_array_equal(numbers[0], seen.pack(observation))
    assert graph.columns == {
        "observation_a_0": slice(0, 3),
        "observation_a_1": slice(3, 5),
        "observation_b": slice(5, 10),
        "observation_c": slice(10, 12),
    }


def test_images_and_masks_are_no_numbers():
    source = spaces.Dict({"x": spaces.Box(-1, 1, (2,)), "eye": spaces.Box(0, 255, (36, 36, 3), np.uint8)})
    graph = graph_of(PackedObservations(source, [2]), normalize_observations=True)
    assert graph.columns == {"observation_x": slice(0, 2)}
    assert [port.name for port in graph.inputs] == ["observation_eye", "observation_x", "action_mask"]
    assert [port.role for port in graph.inputs] == ["observation", "observation", "action_mask"]


@pytest.mark.parametrize("keys", [("a b", "a_b", "a-b"), ("ä", "ö", "x")])
def test_names_are_plain_and_each_ones_own(keys: tuple[str, ...]):
    source = spaces.Dict({key: spaces.Discrete(2) for key in keys})
    graph = graph_of(PackedObservations(source))
    names = [port.name for port in graph.inputs]
    assert len(set(names)) == 3
    assert all(name.isidentifier() and name.isascii() for name in names)
    assert [port.path for port in graph.inputs] == [(key,) for key in sorted(keys)]
