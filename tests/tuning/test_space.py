"""Limits of a search, and where a value stands between them."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from gymnasium import spaces

from proximo.errors import UserError
from proximo.models.control import ActorCritic
from proximo.presets import PRESETS
from proximo.training.config import ControlConfig, with_settings
from proximo.tuning.space import SPACE, Choice, Range, fitting, search_space, settings_value

SEEN = spaces.Box(-1.0, 1.0, (3,), np.float32)
NUMBERS, CHOICE = spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.Discrete(2)


def configured(**settings):
    return with_settings(ControlConfig(), settings, where="test")


def searched(config, actions=NUMBERS, *, fixed=(), named=None, seen=SEEN):
    return search_space(config, ActorCritic(seen, actions, config.network), fixed=fixed, named=named)


def test_positions_by_hand():
    rate = Range(1e-5, 1e-2, log=True)
    assert rate.position(1e-3) == pytest.approx(2 / 3)
    gamma = Range(1e-4, 0.1, log=True, from_one=True)  # distances from 1: 0.9999 is the top, 0.9 the bottom
    assert [gamma.position(value) for value in (0.9, 0.99, 0.999, 0.9999)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert sorted(label for _, label in gamma.ticks()) == ["0.9", "0.99", "0.999", "0.9999"]
    assert Range(0.8, 1.0).position(0.85) == pytest.approx(0.25)
    sizes = Choice((32, 64, 128))
    assert [sizes.position(option) for option in (32, 64, 128, 48)] == [0, 0.5, 1, 0.25]


def test_limits_reach_the_value_to_begin_with():
    assert Range(1e-5, 1e-2, log=True).including(0.1) == Range(1e-5, 0.1, log=True)
    assert Range(1e-4, 0.1, log=True, from_one=True).including(1.0) is None  # no logarithm of 0
    assert Choice((2, 4, 10)).including(5).options == (2, 4, 5, 10)
    assert Choice(("constant", "linear"), ordered=False).including("kl_adaptive").options[-1] == "kl_adaptive"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_where_its_search_begins(name):
    config = with_settings(ControlConfig(), {"env_id": name, **PRESETS[name].settings}, where="test")
    for setting, limits in searched(config).items():
        value = settings_value(config, setting)
        assert 0.0 <= limits.position(value) <= 1.0
        proposed = limits.suggest(optuna.trial.FixedTrial(limits.parameters(setting, value)), setting)
        assert proposed == (pytest.approx(value, rel=1e-3) if isinstance(limits, Range) else value)


def test_what_is_searched_hangs_on_the_task_and_the_algorithm():
    of_numbers, of_choices = searched(ControlConfig()), searched(ControlConfig(), CHOICE)
    assert of_numbers.keys() - of_choices.keys() == {"log_std_init"}
    assert "max_kl" not in of_numbers
    trpo = searched(configured(algorithm="trpo"))
    assert "max_kl" in trpo
    assert not trpo.keys() & {"clip_epsilon", "entropy_coef", "value_coef"}
    assert "batch_size" not in searched(configured(algorithm="a2c"))
    assert "log_std_init" not in searched(configured(distribution="beta"))
    assert "normalize_rewards" not in searched(configured(sign_rewards=True))
    images = searched(ControlConfig(), CHOICE, seen=spaces.Box(0, 255, (84, 84, 1), np.uint8))
    assert not images.keys() & {"hidden_sizes", "activation", "normalize_observations"}
    assert "gamma" not in searched(configured(gamma=1.0))


def test_fixed_settings_are_left_out_and_named_ones_alone_are_searched():
    assert "gamma" not in searched(ControlConfig(), fixed={"gamma"})
    assert list(searched(ControlConfig(), named=["gamma", "clip_schedule"])) == ["gamma", "clip_schedule"]


@pytest.mark.parametrize(
    ("settings", "named", "fixed", "said"),
    [
        ({}, ["gama"], (), "Did you mean 'gamma'"),
        ({}, ["max_kl"], (), "ppo does not have it"),
        ({}, ["gamma"], ("gamma",), "Leave one of them out"),
        ({"gamma": 1.0}, ["gamma"], (), "no logarithm"),
        ({}, [], (), "Nothing is left to search"),
        ({}, None, tuple(SPACE), "Nothing is left to search"),
    ],
)
def test_what_cannot_be_searched_is_refused(settings, named, fixed, said):
    with pytest.raises(UserError, match=said):
        searched(configured(**settings), named=named, fixed=fixed)


def test_rollouts_and_batches_fit_into_a_trial():
    config = configured(total_steps=4096, n_envs=4, rollout_length=32, batch_size=64)
    space = searched(config)
    assert space["rollout_length"].options == (16, 32, 64, 128)  # 4 x 128 is an eighth of 4,096
    assert space["batch_size"].options[-1] == 512
    proposed = fitting({"rollout_length": 16, "batch_size": 512}, config)
    assert proposed == {"rollout_length": 16, "batch_size": 64}
    assert with_settings(config, proposed, where="test").batch_size == 64


def test_rollouts_hold_whole_pieces_of_policies_with_memory():
    config = configured(total_steps=4096, n_envs=4, rollout_length=64, memory="gru", sequence_length=32)
    assert searched(config, CHOICE, named=["rollout_length"])["rollout_length"].options == (32, 64, 128)
