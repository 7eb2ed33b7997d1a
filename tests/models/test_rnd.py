"""The networks of random network distillation: what is new errs, what was seen does not, over spaces of all kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.rnd import distill
from proximo.models.control import NetworkConfig
from proximo.models.packing import PackedObservations
from proximo.models.rnd import RandomNetworks

IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
MIXED = spaces.Dict({"camera": IMAGE, "room": spaces.Discrete(3), "speed": spaces.Box(-1, 1, (2,))})


def networks_for(space: spaces.Box, seed: int = 0, width: int = 32) -> RandomNetworks:
    return RandomNetworks(space, NetworkConfig(), width, torch.Generator().manual_seed(seed))


def learn(networks: RandomNetworks, observations: torch.Tensor, n_epochs: int) -> None:
    optimizer = FlatAdam(networks.predictor, learning_rate=1e-3)
    settings = dict(n_epochs=n_epochs, batch_size=64, share=1.0, max_grad_norm=1.0)
    distill(networks.error, optimizer, observations, generator=torch.Generator().manual_seed(0), **settings)


@pytest.mark.parametrize("seed", range(4))
def test_what_was_seen_is_no_longer_new_and_what_was_not_is(seed: int):
    """One-hot observations, as of places in a grid; some of them never seen."""
    networks = networks_for(spaces.Box(0, 1, (20,)), seed)
    seen, unseen = torch.eye(20)[:15].repeat(20, 1), torch.eye(20)[15:]
    networks.update_observation_moments(seen)
    before = networks.novelty(seen).mean()
    learn(networks, seen, 60)
    after = networks.novelty(seen).mean()
    assert after < 0.05 * before
    assert networks.novelty(unseen).min() > 5 * after


def test_only_the_predictor_learns():
    networks = networks_for(spaces.Box(-1, 1, (3,)))
    before = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
    learn(networks, torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), 2)
    changed = {name.split(".")[0] for name, tensor in networks.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {"predictor"}


def test_observations_are_normalized_by_what_was_seen_and_clipped_at_five():
    networks = networks_for(spaces.Box(-np.inf, np.inf, (2,)))
    networks.update_observation_moments(torch.tensor([[0.0, 10.0], [2.0, 10.0]]))  # means 1, 10; deviations 1, 0
    numbers, images = networks._normalized(torch.tensor([[3.0, 10.0], [100.0, 9.0]]))
    torch.testing.assert_close(numbers, torch.tensor([[2.0, 0.0], [5.0, -5.0]]))
    assert images == []


def test_rewards_are_in_standard_deviations_of_their_returns():
    networks = networks_for(spaces.Box(-1, 1, (2,)))
    networks.update_return_moments(torch.tensor([1.0, 5.0], dtype=torch.float64))
    assert networks.reward_scale == pytest.approx(2.0)


@pytest.mark.parametrize(
    "space",
    [
        IMAGE,
        PackedObservations(MIXED),
        PackedObservations(MIXED, [4]),
        PackedObservations(spaces.MultiDiscrete([3, 4])),
    ],
    ids=["image", "mixed", "masked", "choices"],
)
def test_every_kind_of_observation_can_be_new(space: spaces.Box):
    networks = networks_for(space)
    source = space.source if isinstance(space, PackedObservations) else space
    source.seed(1)
    mask = np.ones(4) if isinstance(space, PackedObservations) and space.options else None
    drawn = [source.sample() for _ in range(64)]
    rows = [space.pack(each, mask) if isinstance(space, PackedObservations) else each for each in drawn]
    seen = torch.from_numpy(np.array(rows))
    networks.update_observation_moments(seen)
    before = networks.novelty(seen).mean()
    learn(networks, seen, 10)
    assert networks.novelty(seen).mean() < 0.7 * before


def test_the_action_mask_is_nothing_to_be_curious_about():
    space = PackedObservations(spaces.MultiDiscrete([3, 4]), [4])
    networks = networks_for(space)
    one = torch.from_numpy(np.stack([space.pack([1, 2], mask) for mask in ([1, 0, 0, 1], [0, 1, 1, 1])]))
    assert not one[0].equal(one[1])
    first, second = networks.novelty(one)
    assert first == second
