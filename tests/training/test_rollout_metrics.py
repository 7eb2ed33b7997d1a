"""What a rollout says of the task before anything is learned from it."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from proximo.algorithms.update import estimated
from proximo.collect.rollout import Episodes
from proximo.core.batch import Batch
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.training.rollout_metrics import rollout_metrics

SPACE = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
SEEN = [[[1.0, -2000.0, 0.0], [-4.0, 5.0, 0.0]], [[2.0, 100.0, 0.0], [3.0, 7.0, 0.0]]]


def policy_of(space=SPACE, **settings):
    return ActorCritic(space, gym.spaces.Discrete(2), NetworkConfig(**settings))


def batch_of(observations=SEEN, rewards=((1.0, -3.0), (0.5, 2.0)), mask=((True, True), (True, True))):
    observations, rewards, mask = torch.tensor(observations), torch.tensor(rewards), torch.tensor(mask)
    nothing = torch.zeros_like(rewards)
    never = torch.zeros_like(mask)
    return Batch(
        observations=observations,
        actions=torch.zeros(mask.shape, dtype=torch.int64),
        mask=mask,
        rewards=rewards,
        log_probs=nothing,
        values=nothing,
        next_values=nothing,
        terminated=never,
        done=never,
    )


def measured(batch=None, episodes=(), n_terminated=0, space=SPACE, **settings):
    policy = policy_of(space, **settings)
    ended = Episodes(list(episodes), [5] * len(episodes), n_terminated)
    return rollout_metrics(policy.config, policy, batch or batch_of(), ended)


def test_sizes_by_hand():
    assert measured() == {"reward_largest": 3.0, "observation_largest": 2000.0, "observation_smallest": 4.0}


def test_steps_that_are_no_experience_do_not_count():
    found = measured(batch_of(mask=((False, True), (True, True)), rewards=((1e9, -3.0), (0.5, 2.0))))
    assert found == {"reward_largest": 3.0, "observation_largest": 100.0, "observation_smallest": 4.0}


def test_numbers_that_are_always_0_or_rounding_are_not_the_smallest():
    tiny = [[[1.0, 1e-9, 0.0], [0.5, 1e-10, 0.0]]]
    found = measured(batch_of(tiny, rewards=((0.0, 0.0),), mask=((True, True),)))
    assert (found["observation_largest"], found["observation_smallest"]) == (1.0, 1.0)
    nothing = measured(batch_of([[[0.0] * 3] * 2], rewards=((0.0, 0.0),), mask=((True, True),)))
    assert (nothing["observation_largest"], nothing["observation_smallest"]) == (0.0, 0.0)


def test_how_episodes_end_is_told_where_some_did():
    assert measured(episodes=(1.0, 2.0, 3.0, 4.0), n_terminated=1)["terminated_share"] == 0.25
    assert "terminated_share" not in measured()


def test_what_a_normalizer_takes_care_of_is_not_measured():
    assert measured(normalize_observations=True) == {"reward_largest": 3.0}
    assert "reward_largest" not in measured(normalize_rewards=True)
    assert "reward_largest" not in measured(sign_rewards=True)


def test_images_have_no_numbers():
    space = gym.spaces.Box(0, 255, (4, 36, 36), np.uint8)
    seen = np.full((1, 2, 4, 36, 36), 200, np.uint8).tolist()
    batch = batch_of(rewards=((0.0, 1.0),), mask=((True, True),), observations=SEEN[:1])
    images = Batch(**{**vars(batch), "observations": torch.tensor(seen, dtype=torch.uint8)})
    assert measured(images, space=space, encoder="nature_cnn") == {"reward_largest": 1.0}


@pytest.mark.parametrize("masked", [False, True])
def test_the_spread_of_advantages_is_that_before_they_are_normalized(masked):
    batch = batch_of(rewards=((1.0, 5.0), (3.0, 100.0)), mask=((True, True), (True, not masked)))
    # With gamma 0 the advantage of a step is its reward, since every value is 0.
    _, quality = estimated(policy_of(), batch, gamma=0.0, gae_lambda=0.95)
    expected = np.std([1.0, 5.0, 3.0] if masked else [1.0, 5.0, 3.0, 100.0])
    assert quality["advantage_std"] == pytest.approx(expected, rel=1e-6)
