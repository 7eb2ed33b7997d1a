"""Settings: flat names, checked types, refused impossibilities, the way through TOML and back."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from typing import Any

import numpy as np
import pytest
import tomli_w

from proximo.algorithms.ppo import PPO
from proximo.errors import UserError
from proximo.models.control import NetworkConfig
from proximo.presets import PRESETS
from proximo.runs.directory import RunDirectory, read_config, write_config
from proximo.training.config import (
    ControlConfig,
    EnvironmentConfig,
    changed_settings,
    recorded,
    settings_of,
    with_settings,
)

CHANGED: dict[str, Any] = dict(
    env_id="my_file.py:MyEnv",
    env_kwargs={"size": 3, "nested": {"a": [1, 2.5, "x"]}},
    n_envs=3,
    clip_epsilon_high=0.28,
    dual_clip=3.0,
    value_gae_lambda=1.0,
    microbatch_tokens=512,
    vectorization="workers",
    n_workers=2,
    action_mask="none",
    distribution="squashed_gaussian",
    state_dependent_std=True,
    sde_sample_freq=4,
    encoder="nature_cnn",
    precision="bfloat16",
    max_episode_steps=77,
    on_space_violation="warn",
    on_environment_fault="restart",
    max_restarts=5,
    step_timeout=2.5,
    hidden_sizes=[5, 6, 7],
    activation="relu",
    orthogonal_init=False,
    log_std_init=-0.3,
    rescale_actions=False,
    normalize_observations=True,
    clip_observation=5.5,
    normalize_rewards=True,
    clip_reward=4.5,
    intrinsic_coef=0.5,
    extrinsic_coef=3.0,
    intrinsic_gamma=0.9,
    intrinsic_episodic=True,
    rnd_width=16,
    predictor_learning_rate=2e-4,
    predictor_share=0.5,
    warmup_rollouts=6,
    objective="kl_penalty",
    learning_rate=1e-5,
    learning_rate_schedule="linear",
    clip_epsilon=0.123,
    clip_schedule="linear",
    n_epochs=3,
    batch_size=17,
    gamma=0.95,
    gae_lambda=0.9,
    normalize_advantages=False,
    value_coef=0.25,
    value_clip_epsilon=0.4,
    entropy_coef=0.01,
    max_grad_norm=1.5,
    target_kl=0.02,
    kl_coef=0.7,
    kl_target=0.03,
    microbatch_size=8,
    total_steps=12345,
    rollout_length=55,
    sequence_length=11,
    memory="gru",
    memory_size=32,
    memory_layers=2,
    shared_memory=True,
    init_from="runs/before",
    seed=99,
    checkpoint_every=1000,
    keep_checkpoints=7,
    keep_every=5000,
    max_skipped_updates=9,
    stop_at_return=123.5,
    device="cuda:1",
    threads=2,
    debug=True,
)


def change(**settings: Any) -> ControlConfig:
    return with_settings(ControlConfig(), settings, where="config.toml")


def refusal(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        change(**settings)
    return str(caught.value)


def names_in(kind: type) -> list[str]:
    names = []
    for entry in dataclasses.fields(kind):
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        names += names_in(type(default)) if dataclasses.is_dataclass(default) else [entry.name]
    return names


class TestNames:
    def test_each_is_there_only_once(self):
        names = names_in(ControlConfig)
        assert len(names) > 35
        assert len(set(names)) == len(names)
        assert not set(names) & {"environment", "network", "intrinsic", "algorithm"}

    def test_each_reaches_its_place_and_comes_back(self):
        config = change(**CHANGED)
        settings = settings_of(config)
        assert {name: settings[name] for name in CHANGED} == CHANGED
        default = settings_of(ControlConfig())
        assert all(default[name] != value for name, value in CHANGED.items())
        assert config.environment.n_envs == 3
        assert config.network.hidden_sizes == (5, 6, 7)
        assert config.algorithm.clip_epsilon == 0.123

    def test_all_of_them_are_looked_at_here(self):
        # A new setting belongs into CHANGED; some do not go with others there, and one is for language alone.
        elsewhere = {"algorithm", "update_path", "gae_lambda_per_step", "sign_rewards", "episodic_life", "exploration"}
        assert set(settings_of(ControlConfig())) - elsewhere == set(CHANGED)

    @pytest.mark.parametrize("config", [ControlConfig(), change(**CHANGED)], ids=["default", "changed"])
    def test_they_come_back_through_toml(self, config):
        plain = {name: value for name, value in settings_of(config).items() if value is not None}
        again = tomllib.loads(tomli_w.dumps(plain))
        assert with_settings(ControlConfig(), again, where="config.toml") == config

    def test_only_where_none_is_the_default_can_there_be_none(self):
        """TOML has no null: what is None must be what it would be anyway."""
        nones = {name for name, value in settings_of(ControlConfig()).items() if value is None}
        for name in set(CHANGED) - nones:
            assert f"{name} is None" in refusal(**{name: None})

    def test_parts_have_settings_too(self):
        network = with_settings(NetworkConfig(), {"hidden_sizes": [3], "activation": "relu"}, where="x")
        assert network == NetworkConfig(hidden_sizes=(3,), activation="relu")
        assert with_settings(NetworkConfig(), settings_of(network), where="x") == network

    def test_nothing_is_changed_in_place(self):
        before = settings_of(ControlConfig())
        change(**CHANGED)
        assert settings_of(ControlConfig()) == before


class TestUnknownNames:
    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("clip_eps", "clip_epsilon"),
            ("learning_rates", "learning_rate"),
            ("n_epoch", "n_epochs"),
            ("Gamma", "gamma"),
            ("hidden_size", "hidden_sizes"),
            ("total_step", "total_steps"),
            ("normalise_observations", "normalize_observations"),
        ],
    )
    def test_the_nearest_is_told(self, wrong, right):
        assert f"config.toml: there is no setting {wrong!r}. Did you mean {right!r}?" in refusal(**{wrong: 1})

    def test_the_names_of_parts_are_no_settings(self):
        assert "there is no setting 'network'" in refusal(network={"activation": "relu"})

    def test_one_like_no_other_gets_no_guess(self):
        assert "Did you mean" not in refusal(qqqqq=1)


class TestTypes:
    def test_none_is_a_word_for_files_that_have_no_none(self) -> None:
        config = with_settings(ControlConfig(), dict(target_kl=0.1), where="test")
        assert settings_of(with_settings(config, dict(target_kl="none"), where="test"))["target_kl"] is None

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (dict(n_envs="8"), "n_envs is '8'; it must be int"),
            (dict(n_envs=2.5), "n_envs is 2.5; it must be int"),
            (dict(n_envs=True), "n_envs is True; it must be int"),
            (dict(gamma="0.9"), "gamma is '0.9'; it must be float"),
            (dict(gamma=True), "gamma is True; it must be float"),
            (dict(normalize_rewards=1), "normalize_rewards is 1; it must be bool"),
            (dict(normalize_rewards="yes"), "normalize_rewards is 'yes'; it must be bool"),
            (dict(hidden_sizes=64), "hidden_sizes is 64; it must be"),
            (dict(hidden_sizes=["64"]), "hidden_sizes is ('64',)"),
            (dict(env_kwargs="size=3"), "env_kwargs is 'size=3'; it must be"),
            (dict(env_id=7), "env_id is 7; it must be str"),
            (
                dict(vectorization="seriel"),
                "vectorization is 'seriel'; it must be 'auto', 'serial', 'workers', 'native'",
            ),
            (dict(objective=["clip"]), "objective is ['clip']; it must be 'clip', 'kl_penalty'"),
        ],
    )
    def test_a_wrong_one_is_told_with_what_is_right(self, settings, words):
        assert words in refusal(**settings)

    def test_numbers_may_be_written_either_way(self):
        config = change(gamma=1, total_steps=1e6, n_envs=4.0, target_kl=1, stop_at_return=475)
        assert (config.algorithm.gamma, config.total_steps, config.environment.n_envs) == (1.0, 1_000_000, 4)
        types = [type(x) for x in (config.algorithm.gamma, config.total_steps, config.environment.n_envs)]
        assert types == [float, int, int]

    @pytest.mark.parametrize("part", [PPO, EnvironmentConfig, ControlConfig])
    def test_counts_are_whole_from_python_too(self, part):
        name = {PPO: "n_epochs", EnvironmentConfig: "n_envs", ControlConfig: "seed"}[part]
        with pytest.raises(UserError):
            part(**{name: 2.5})


class TestImpossibleValues:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (dict(clip_epsilon=-1), "clip_epsilon is -1.0; it must be a number > 0 and < 1. A usual value is 0.2"),
            (dict(clip_epsilon=float("nan")), "clip_epsilon is nan"),
            (dict(gamma=1.01), "gamma is 1.01; it must be a number >= 0 and <= 1"),
            (dict(gae_lambda=-0.1), "gae_lambda is -0.1"),
            (dict(learning_rate=0.0), "learning_rate is 0.0; it must be a number > 0"),
            (dict(learning_rate=float("inf")), "learning_rate is inf"),
            (dict(n_epochs=0), "n_epochs is 0; it must be a whole number >= 1"),
            (dict(batch_size=0), "batch_size is 0"),
            (dict(n_envs=0), "n_envs is 0"),
            (dict(n_workers=0), "n_workers is 0"),
            (dict(max_episode_steps=0), "max_episode_steps is 0"),
            (dict(total_steps=0), "total_steps is 0"),
            (dict(rollout_length=0), "rollout_length is 0"),
            (dict(seed=-1), "seed is -1"),
            (dict(seed=2**63), "seed is 9223372036854775808"),
            (dict(checkpoint_every=0), "checkpoint_every is 0"),
            (dict(keep_checkpoints=0), "keep_checkpoints is 0"),
            (dict(threads=-1), "threads is -1"),
            (dict(target_kl=0.0), "target_kl is 0.0"),
            (dict(kl_target=0.0), "kl_target is 0.0"),
            (dict(max_grad_norm=0.0), "max_grad_norm is 0.0"),
            (dict(value_clip_epsilon=-0.2), "value_clip_epsilon is -0.2"),
            (dict(microbatch_size=0), "microbatch_size is 0"),
        ],
    )
    def test_each_is_refused_with_what_is_possible(self, settings, words):
        assert words in refusal(**settings)

    def test_a_batch_larger_than_the_rollout(self):
        message = refusal(batch_size=300, n_envs=4, rollout_length=64)
        assert "batch_size is 300, but a rollout has only 256 steps (n_envs 4 x rollout_length 64)" in message
        assert "Set batch_size to at most 256, or rollout_length to at least 75" in message
        assert change(batch_size=300, n_envs=4, rollout_length=75).steps_per_iteration == 300
        assert change(batch_size=256, n_envs=4, rollout_length=64).steps_per_iteration == 256

    def test_a_rollout_longer_than_the_run(self):
        message = refusal(total_steps=1000, n_envs=4, rollout_length=256, batch_size=64)
        assert "total_steps is 1000, but one iteration alone takes 1024 steps" in message
        assert "at least 1024, or rollout_length to at most 250" in message
        change(total_steps=1000, n_envs=4, rollout_length=250, batch_size=64)

    def test_settings_are_judged_together_not_one_by_one(self):
        # Each alone would not fit the defaults.
        config = change(batch_size=4096, rollout_length=1024)
        assert config.algorithm.batch_size == 4096


class TestDerived:
    def test_a_tenth_of_the_run_lies_between_checkpoints_and_never_very_much(self):
        assert change(total_steps=100_000, n_envs=8, rollout_length=32).checkpoint_interval == 10_000
        assert change(total_steps=100_000_000, n_envs=8, rollout_length=32).checkpoint_interval == 250_000
        assert change(total_steps=10_000, n_envs=8, rollout_length=128).checkpoint_interval == 1024
        assert change(checkpoint_every=77).checkpoint_interval == 77

    @pytest.mark.parametrize("env_id", PRESETS)
    def test_every_preset_is_possible(self, env_id):
        settings = PRESETS[env_id].settings
        config = change(env_id=env_id, **settings)
        known = settings_of(config)
        assert {name: known[name] for name in settings} == {
            name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()
        }


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 1, "stop_at_return": 475},
        {"learning_rate": np.float64(0.001), "env_kwargs": {"a": {"x": 1}, "b": 2, "c": [1.5, "d"]}},
        {"hidden_sizes": (8, 8), "target_kl": None},
    ],
)
def test_settings_that_went_through_a_file_are_the_same(settings, tmp_path):
    config = with_settings(ControlConfig(), settings, where="test")
    before = json.loads(json.dumps(recorded(config)))
    run = RunDirectory(tmp_path)
    write_config(run, settings_of(config))
    again = with_settings(ControlConfig(), read_config(run), where="config.toml")
    assert changed_settings(before, again) == ""
    assert changed_settings(before, dataclasses.replace(again, checkpoint_every=7, keep_checkpoints=9)) == ""
    assert changed_settings(before, with_settings(again, {"vectorization": "workers"}, where="test")) == ""
    assert "seed was 0 and is 5" in changed_settings(before, dataclasses.replace(again, seed=5))
