"""Settings of other libraries as ours: entries worked out by hand, and files that are not what they should be."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from proximo.converting.convert import Converted, convert
from proximo.converting.reading import expression
from proximo.errors import UserError
from proximo.language import config_of
from proximo.training.config import ControlConfig, settings_of, with_settings
from tests.commands import said_by

ZOO = """\
atari:
  env_wrapper:
    - stable_baselines3.common.atari_wrappers.AtariWrapper
  frame_stack: 4
  policy: 'CnnPolicy'
  n_envs: 8
  n_steps: 128
  n_epochs: 4
  batch_size: 256
  n_timesteps: !!float 1e7
  learning_rate: lin_2.5e-4
  clip_range: lin_0.1
  ent_coef: 0.01

CartPole-v1:
  n_envs: 8
  n_timesteps: !!float 1e5
  policy: 'MlpPolicy'
  n_steps: 32
  batch_size: 256
  gae_lambda: 0.8
  gamma: 0.98
  n_epochs: 20
  ent_coef: 0.0
  learning_rate: lin_0.001
  clip_range: lin_0.2

HalfCheetah-v3:
  normalize: true
  n_timesteps: 1e6
  policy: 'MlpPolicy'
  batch_size: 64
  n_steps: 512
  gamma: 0.98
  learning_rate: 2.0633e-05
  ent_coef: 0.000401762
  clip_range: 0.1
  n_epochs: 20
  gae_lambda: 0.92
  max_grad_norm: 0.8
  vf_coef: 0.58096
  policy_kwargs: "dict(
                    log_std_init=-2,
                    ortho_init=False,
                    activation_fn=nn.ReLU,
                    net_arch=[dict(pi=[256, 256], vf=[256, 256])]
                  )"

Ant-v4: &shared
  normalize: true
  n_timesteps: !!float 1e6
  policy: 'MlpPolicy'

Swimmer-v4:
  <<: *shared
  gamma: 0.9999

CarRacing-v3:
  env_wrapper:
    - rl_zoo3.wrappers.FrameSkip:
        skip: 2
  frame_stack: 2
  normalize: "{'norm_obs': False, 'norm_reward': True}"
  n_envs: 8
  n_timesteps: !!float 4e6
  policy: 'CnnPolicy'
  batch_size: 128
  n_steps: 512
  learning_rate: lin_1e-4
  use_sde: True
  sde_sample_freq: 4
  policy_kwargs: "dict(activation_fn=nn.GELU, net_arch=dict(pi=[256], vf=[128]))"

MountainCarContinuous-v0:
  n_envs: 1
  n_timesteps: !!float 20000
  n_steps: 8
  batch_size: 256
"""

CARTPOLE = dict(
    env_id="CartPole-v1",
    total_steps=100_000,
    n_envs=8,
    rollout_length=32,
    batch_size=256,
    n_epochs=20,
    learning_rate=0.001,
    learning_rate_schedule="linear",
    clip_epsilon=0.2,
    clip_schedule="linear",
    gamma=0.98,
    gae_lambda=0.8,
    entropy_coef=0.0,
    value_coef=0.5,
    max_grad_norm=0.5,
    normalize_advantages=True,
    value_clip_epsilon="none",
    normalize_observations=False,
    normalize_rewards=False,
    hidden_sizes=[64, 64],
    activation="tanh",
    orthogonal_init=True,
    log_std_init=0.0,
    rescale_actions=False,
    distribution="gaussian",
)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    (tmp_path / "ppo.yml").write_text(ZOO)
    return tmp_path / "ppo.yml"


def write(path: Path, values: object) -> Path:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def round_trip(found: Converted) -> dict[str, object]:
    """The printed file, taken by the command's own reader: what has become of every setting."""
    settings = tomllib.loads(found.toml)
    assert settings == found.settings
    if found.command == "train":
        return settings_of(with_settings(ControlConfig(), settings, where="test"))
    return settings_of(config_of("align", settings, where="test"))


class TestZoo:
    def test_cartpole_has_every_setting_by_hand(self, zoo):
        found = convert(zoo, "CartPole-v1")
        assert (found.command, found.kind, found.unknown) == ("train", "sb3", [])
        assert found.settings == CARTPOLE
        assert "SB3's default" in found.because["value_coef"]
        assert "gamma" not in found.because

    def test_halfcheetah_takes_networks_and_normalizers(self, zoo):
        found = convert(zoo, "HalfCheetah-v5")
        ours = round_trip(found)
        wanted = dict(
            env_id="HalfCheetah-v5",
            total_steps=1_000_000,
            n_envs=1,
            rollout_length=512,
            batch_size=64,
            n_epochs=20,
            learning_rate=2.0633e-05,
            learning_rate_schedule="constant",
            clip_epsilon=0.1,
            gamma=0.98,
            gae_lambda=0.92,
            entropy_coef=0.000401762,
            value_coef=0.58096,
            max_grad_norm=0.8,
            hidden_sizes=[256, 256],
            activation="relu",
            orthogonal_init=False,
            log_std_init=-2.0,
            normalize_observations=True,
            normalize_rewards=True,
            rescale_actions=False,
        )
        assert {name: ours[name] for name in wanted} == wanted
        assert any("no entry HalfCheetah-v5" in remark and "HalfCheetah-v3" in remark for remark in found.remarks)

    @pytest.mark.parametrize("env", ["ALE/Pong-v5", "PongNoFrameskip-v4"])
    def test_a_game_takes_the_atari_entry(self, zoo, env):
        ours = round_trip(convert(zoo, env))
        wanted = dict(env_id="ALE/Pong-v5", vectorization="native", episodic_life=True, sign_rewards=True)
        wanted |= dict(total_steps=10_000_000, clip_epsilon=0.1, clip_schedule="linear", learning_rate=2.5e-4)
        assert {name: ours[name] for name in wanted} == wanted

    def test_a_merge_of_another_entry(self, zoo):
        ours = convert(zoo, "Swimmer-v4").settings
        assert (ours["gamma"], ours["normalize_rewards"], ours["rollout_length"]) == (0.9999, True, 2048)
        assert ours["env_id"] == "Swimmer-v5"

    def test_what_has_no_counterpart_is_told(self, zoo):
        found = convert(zoo, "CarRacing-v3")
        said = " ".join(found.remarks)
        for word in ("FrameSkip", "frame_stack 2", "GELU", "[128] for the critic"):
            assert word in said
        ours = found.settings
        assert (ours["normalize_observations"], ours["normalize_rewards"]) == (False, True)
        assert (ours["distribution"], ours["sde_sample_freq"], ours["hidden_sizes"]) == ("gsde", 4, [256])

    def test_a_minibatch_larger_than_a_rollout_becomes_the_rollout(self, zoo):
        found = convert(zoo, "MountainCarContinuous-v0")
        assert found.settings["batch_size"] == 8
        assert "256" in found.because["batch_size"]
        round_trip(found)

    def test_recurrent_ppo_by_the_name_of_the_file(self, tmp_path):
        entry = {"normalize": True, "n_envs": 16, "n_timesteps": 5e6, "policy": "MlpLstmPolicy", "n_steps": 512}
        entry |= {"batch_size": 64, "policy_kwargs": "dict(enable_critic_lstm=False, lstm_hidden_size=128)"}
        found = convert(write(tmp_path / "ppo_lstm.yml", {"BipedalWalkerHardcore-v3": entry}))
        assert found.kind == "sb3-recurrent"
        ours = round_trip(found)
        wanted = dict(memory="lstm", memory_size=128, memory_layers=1, shared_memory=False, total_steps=5_000_000)
        assert {name: ours[name] for name in wanted} == wanted
        assert any("enable_critic_lstm" in remark for remark in found.remarks)

    def test_recurrent_ppo_of_a_game_keeps_its_lives(self, tmp_path):
        wrapper = {"stable_baselines3.common.atari_wrappers.AtariWrapper": {"terminal_on_life_loss": False}}
        entry = {"policy": "CnnLstmPolicy", "env_wrapper": [wrapper], "frame_stack": 4, "n_envs": 8, "n_timesteps": 1e7}
        ours = round_trip(convert(write(tmp_path / "ppo_lstm.yml", {"atari": entry}), "ALE/Pong-v5"))
        assert (ours["episodic_life"], ours["sign_rewards"], ours["memory"]) == (False, True, "lstm")

    def test_recurrent_ppo_has_other_defaults(self, tmp_path):
        entry = {"policy": "MlpLstmPolicy", "n_timesteps": 1e5}
        ours = convert(write(tmp_path / "a.json", entry), "CartPole-v1").settings
        assert (ours["rollout_length"], ours["batch_size"], ours["memory_size"]) == (128, 128, 256)

    def test_unknown_names_are_told_and_not_dropped(self, tmp_path):
        found = convert(write(tmp_path / "a.json", {"n_steps": 64, "n_stepps": 128, "ent_coef": 0.1}), "CartPole-v1")
        assert found.unknown == ["n_stepps"]
        assert "NOT KNOWN, and left out: n_stepps" in found.toml

    def test_keyword_arguments_of_sb3(self, tmp_path):
        kwargs = {"policy": "MlpPolicy", "learning_rate": "3e-4", "clip_range_vf": 0.2, "target_kl": 0.03, "verbose": 1}
        found = convert(write(tmp_path / "a.json", kwargs | {"env": "Pendulum-v1", "seed": 3}))
        ours = round_trip(found)
        wanted = dict(learning_rate=3e-4, value_clip_epsilon=0.2, target_kl=0.03, seed=3, env_id="Pendulum-v1")
        assert {name: ours[name] for name in wanted} == wanted
        assert found.idle == ["verbose"]
        assert any("worse of both" in remark for remark in found.remarks)


class TestOptimizerOfSB3:
    def remarks(self, tmp_path: Path, **theirs: object) -> str:
        return " ".join(convert(write(tmp_path / "a.json", {"n_steps": 64} | theirs), "CartPole-v1").remarks)

    def test_is_the_same_by_default(self, tmp_path):
        said = self.remarks(tmp_path)
        assert "The same in both: Adam with epsilon 1e-5, advantages normalized per minibatch" in said

    def test_has_another_epsilon_with_arguments(self, tmp_path):
        said = self.remarks(tmp_path, policy_kwargs="dict(optimizer_kwargs=dict(weight_decay=0.01))")
        assert "theirs has eps 1e-08, betas [0.9, 0.999], weight_decay 0.01" in said
        assert "The same in both: advantages" in said

    def test_of_another_class_is_not_the_same(self, tmp_path):
        said = self.remarks(tmp_path, policy_kwargs="dict(optimizer_class=RMSpropTFLike)", normalize_advantage=False)
        assert "RMSpropTFLike" in said
        assert "The same in both: a value loss" in said


class TestCleanRL:
    def test_minibatches_and_halves_of_losses(self, tmp_path):
        theirs = {"exp_name": "ppo", "env_id": "CartPole-v1", "num_envs": 4, "num_steps": 128, "num_minibatches": 4}
        theirs |= {"update_epochs": 4, "clip_coef": 0.2, "clip_vloss": True, "vf_coef": 0.5, "target_kl": 0.03}
        ours = round_trip(convert(write(tmp_path / "args.json", theirs)))
        wanted = dict(n_envs=4, rollout_length=128, batch_size=128, n_epochs=4, value_coef=0.25, value_clip_epsilon=0.2)
        wanted |= dict(target_kl=0.02, learning_rate=2.5e-4, learning_rate_schedule="linear", entropy_coef=0.01)
        assert {name: pytest.approx(ours[name]) if name == "target_kl" else ours[name] for name in wanted} == wanted

    def test_the_continuous_script_has_its_own_defaults_and_wrappers(self, tmp_path):
        theirs = {"exp_name": "ppo_continuous_action", "env_id": "HalfCheetah-v4", "num_minibatches": 32}
        ours = convert(write(tmp_path / "args.yaml", theirs)).settings
        assert (ours["env_id"], ours["rollout_length"], ours["batch_size"]) == ("HalfCheetah-v5", 2048, 64)
        assert (ours["entropy_coef"], ours["normalize_observations"], ours["normalize_rewards"]) == (0.0, True, True)

    @pytest.mark.parametrize(
        ("theirs", "kind", "steps", "told"),
        [
            ({"env_id": "Pendulum-v1", "exp_name": "mine"}, "auto", 2048, "Pendulum-v1 has continuous actions"),
            ({"env_id": "CartPole-v1"}, "auto", 128, "CartPole-v1 has no continuous actions"),
            ({"env_id": "Not-There-v0"}, "cleanrl-continuous", 2048, ""),
            ({"env_id": "Not-There-v0"}, "cleanrl", 128, "--kind cleanrl is given"),
        ],
    )
    def test_without_its_name_the_script_is_told_by_the_actions(self, theirs, kind, steps, told, tmp_path):
        found = convert(write(tmp_path / "a.json", theirs | {"num_envs": 2, "clip_coef": 0.2}), kind=kind)
        assert found.settings["rollout_length"] == steps
        assert told in " ".join(found.remarks)
        script = "ppo.py" if steps == 128 else "ppo_continuous_action.py"
        assert found.because["rollout_length"] == f"{script}'s default"
        assert not {"n_envs", "clip_epsilon"} & set(found.because)

    @pytest.mark.parametrize("env", ["Not-There-v0", "os:Not-There-v0"])
    def test_where_nothing_tells_the_kind_is_asked_for(self, env, tmp_path):
        with pytest.raises(UserError, match="--kind cleanrl-continuous"):
            convert(write(tmp_path / "a.json", {"env_id": env, "num_envs": 2}))

    def test_games_have_their_own_defaults(self, tmp_path):
        found = convert(
            write(tmp_path / "a.json", {"env_id": "BreakoutNoFrameskip-v4", "num_steps": 128, "norm_adv": 1})
        )
        ours = found.settings
        assert (ours["n_envs"], ours["clip_epsilon"], ours["sign_rewards"]) == (8, 0.1, True)


class TestTRL:
    def test_ppo(self, tmp_path):
        theirs = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "num_mini_batches": 2}
        theirs |= {"total_episodes": 10_000, "kl_coef": 0.03, "vf_coef": 0.1, "response_length": 32, "lam": 0.9}
        theirs |= {"sft_model_path": "sft", "reward_model_path": "rm", "missing_eos_penalty": 1.0, "output_dir": "x"}
        found = convert(write(tmp_path / "ppo.json", theirs))
        assert (found.command, found.kind, found.unknown) == ("align", "trl-ppo", [])
        ours = round_trip(found)
        wanted = dict(prompts_per_iteration=64, batch_size=64, n_iterations=157, beta=0.03, value_coef=0.05)
        wanted |= dict(max_new_tokens=32, gae_lambda=0.9, model="sft", missing_eos_penalty=1.0, normalize_rewards_on=0)
        wanted |= dict(n_epochs=4, learning_rate=3e-6, temperature=0.7, value_clip_epsilon=0.2, seed=42)
        assert {name: ours[name] for name in wanted} == wanted
        assert found.settings["reward"] == ["rm"]
        assert found.idle == ["output_dir"]
        assert any("minibatch is 32" in remark and "64 responses to a step" in remark for remark in found.remarks)

    @pytest.mark.parametrize(
        ("each", "steps", "minibatches", "per_step"),
        # micro-batches of min(each, minibatch), and a step of the optimizer after `steps` of them
        [(16, 4, 2, 64), (16, 4, 1, 64), (16, 4, 8, 32), (16, 1, 2, 8), (4, 2, 1, 8)],
    )
    def test_ppo_steps_after_its_micro_batches(self, each, steps, minibatches, per_step, tmp_path):
        theirs = {"per_device_train_batch_size": each, "gradient_accumulation_steps": steps, "cliprange": 0.2}
        found = convert(write(tmp_path / "ppo.json", theirs | {"num_mini_batches": minibatches, "max_grad_norm": 0.7}))
        assert found.settings["batch_size"] == per_step
        assert (found.settings["max_grad_norm"], found.unknown) == (0.7, [])
        is_told = any("across minibatches" in remark for remark in found.remarks)
        assert is_told == (per_step != each * steps // minibatches)

    def test_grpo(self, tmp_path):
        theirs = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
        theirs |= {"steps_per_generation": 8, "max_steps": 100, "num_iterations": 2, "beta": 0.04, "epsilon_high": 0.28}
        theirs |= {"loss_type": "dr_grpo", "scale_rewards": False, "mask_truncated_completions": True, "delta": 4.0}
        ours = round_trip(convert(write(tmp_path / "grpo.json", theirs)))
        # 64 responses a generation, 4 to a prompt; 32 to a step, so 2 steps an epoch and 4 a generation
        wanted = dict(prompts_per_iteration=16, responses_per_prompt=4, batch_size=32, n_epochs=2, n_iterations=25)
        wanted |= dict(beta=0.04, kl_in="loss_k3", clip_epsilon=0.2, clip_epsilon_high=0.28, dual_clip=4.0)
        wanted |= dict(weighing="longest", baseline="group_mean", truncation="mask", learning_rate=1e-6)
        assert {name: ours[name] for name in wanted} == wanted

    def test_losses_that_are_not_here_are_told(self, tmp_path):
        theirs = {"num_generations": 8, "loss_type": "cispo", "importance_sampling_level": "sequence", "top_k": 50}
        said = " ".join(convert(write(tmp_path / "grpo.json", theirs)).remarks)
        for word in ("cispo is not here", "GSPO", "top_k = 50"):
            assert word in said

    def test_groups_that_do_not_fit_are_refused(self, tmp_path):
        with pytest.raises(UserError, match="10 responses, which num_generations 4 does not divide"):
            convert(write(tmp_path / "a.json", {"num_generations": 4, "per_device_train_batch_size": 10}))


def test_openrlhf(tmp_path):
    theirs = {"--advantage-estimator": "gae", "rollout_batch_size": 128, "n_samples_per_prompt": 2, "max_samples": 1280}
    theirs |= {"train_batch_size": 64, "init_kl_coef": 0.02, "kl_target": 6, "eps_clip": 0.2, "pretrain": "sft"}
    theirs |= {"reward_pretrain": "rm", "prompt_data": "p.jsonl", "actor_learning_rate": 5e-7, "vllm_num_engines": 2}
    found = convert(write(tmp_path / "flags.json", theirs))
    ours = round_trip(found)
    wanted = dict(prompts_per_iteration=128, responses_per_prompt=2, batch_size=64, n_iterations=10, beta=0.02)
    wanted |= dict(beta_control="adaptive", beta_target=6.0, learning_rate=5e-7, gae_lambda=1.0, prompts="p.jsonl")
    assert {name: ours[name] for name in wanted} == wanted
    assert (found.unknown, found.idle) == ([], ["vllm_num_engines"])


def test_openrlhf_with_dotted_names_is_the_same(tmp_path):
    flat = {"advantage_estimator": "gae", "pretrain": "sft", "init_kl_coef": 0.02, "actor_learning_rate": 5e-7}
    flat |= {"rollout_batch_size": 64, "train_batch_size": 32, "lr_scheduler": "constant", "generate_max_len": 200}
    flat |= {"normalize_reward": True, "lora_rank": 8, "kl_estimator": "k3", "use_kl_loss": True, "async_train": True}
    flat |= {"prompt_max_len": 100, "vllm_num_engines": 2, "reward_num_nodes": 1, "l2": 0.1}
    dotted = {"--algo.advantage.estimator": "gae", "--actor.model_name_or_path": "sft", "--algo.kl.init_coef": 0.02}
    dotted |= {"--actor.adam.lr": 5e-7, "--rollout.batch_size": 64, "--train.batch_size": 32}
    dotted |= {"--actor.lr_scheduler": "constant", "--rollout.max_new_tokens": 200, "--reward.normalize_enable": True}
    dotted |= {"--ds.lora.rank": 8, "--algo.kl.estimator": "k3", "--algo.kl.use_loss": True, "prompt_max_len": 100}
    dotted |= {"--train.async_enable": True, "--vllm.num_engines": 2, "--reward.num_nodes": 1}
    dotted |= {"--actor.adam.weight_decay": 0.1, "--actor.not_there_yet": 1}
    before = convert(write(tmp_path / "flat.json", flat))
    after = convert(write(tmp_path / "dotted.json", dotted))
    assert (after.kind, after.settings, after.remarks) == ("openrlhf", before.settings, before.remarks)
    assert (after.idle, after.unknown) == (before.idle, ["actor.not_there_yet"])
    ours = round_trip(after)
    wanted = dict(sharing="lora", lora_rank=8, lora_alpha=16.0, normalize_rewards_on=256, learning_rate=5e-7)
    wanted |= dict(kl_in="loss_k3", max_new_tokens=200, learning_rate_schedule="constant")
    assert {name: ours[name] for name in wanted} == wanted


def test_openrlhf_bounds_prompt_and_response_together_from_0_10_2(tmp_path):
    found = convert(write(tmp_path / "a.json", {"--algo.kl.init_coef": 0.02, "--data.max_len": 4096}))
    assert not {"max_new_tokens", "max_prompt_tokens"} & set(found.settings)
    assert any("max_len 4096" in remark and "set max_new_tokens" in remark for remark in found.remarks)


@pytest.mark.parametrize("given", [{}, {"lr_scheduler": "cosine"}])
def test_openrlhf_tells_of_its_schedule(given, tmp_path):
    found = convert(write(tmp_path / "a.json", {"init_kl_coef": 0.02} | given))
    said = [remark for remark in found.remarks if remark.startswith("lr_scheduler")]
    assert len(said) == 1
    assert ("default" in said[0]) == (not given)
    assert found.settings["learning_rate_schedule"] == "linear"


@pytest.mark.parametrize(("most", "iterations"), [(None, None), (1e8, None), (10_240, 20)])
def test_openrlhf_max_samples_is_a_cap(most, iterations, tmp_path):
    theirs = {"init_kl_coef": 0.02, "rollout_batch_size": 1024, "num_episodes": 2, "max_samples": most}
    found = convert(write(tmp_path / "a.json", theirs))
    assert found.settings.get("n_iterations") == iterations
    assert any("only a cap" in remark for remark in found.remarks) == (iterations is not None)


def test_openrlhf_adapters(tmp_path):
    theirs = {"init_kl_coef": 0.02, "lora_rank": 4, "lora_alpha": 64, "lora_dropout": 0.1}
    found = convert(write(tmp_path / "a.json", theirs))
    ours = round_trip(found)
    assert (ours["sharing"], ours["lora_rank"], ours["lora_alpha"]) == ("lora", 4, 64.0)
    assert any(remark.startswith("lora_dropout = 0.1") for remark in found.remarks)


@pytest.mark.parametrize(("given", "ours"), [("false", 0), ("true", 256), (False, 0)])
def test_openrlhf_normalize_reward_may_be_text(given, ours, tmp_path):
    theirs = {"init_kl_coef": 0.02, "normalize_reward": given, "reward_pretrain": "a, b"}
    found = convert(write(tmp_path / "a.json", theirs))
    assert (found.settings["normalize_rewards_on"], found.settings["reward"]) == (ours, ["a", "b"])


LEARNING = {
    "openrlhf": {"lora_rank": 8, "async_train": True, "apply_chat_template": True, "input_key": "question"}
    | {"load_in_4bit": True, "agent_func_path": "a.py", "enable_ema": True, "enable_vllm_is_correction": True},
    "trl-ppo": {"optim": "adafactor", "adam_beta2": 0.95, "lr_scheduler_kwargs": {"x": 1}, "load_in_4bit": True}
    | {"lora_dropout": 0.1, "use_peft": True, "dtype": "bfloat16"},
}
LEARNING["trl-grpo"] = LEARNING["trl-ppo"] | {"chat_template_kwargs": {"x": 1}}
LEARNING["trl-grpo"] |= {"multi_objective_aggregation": "normalize_then_sum"}


@pytest.mark.parametrize("kind", LEARNING)
def test_what_changes_learning_is_told_and_never_idle(kind, tmp_path):
    found = convert(write(tmp_path / "a.json", LEARNING[kind]), kind=kind)
    assert (found.idle, found.unknown) == ([], [])
    said = " ".join(found.remarks)
    assert all(name in said or name in found.settings or name == "use_peft" for name in LEARNING[kind])


@pytest.mark.parametrize("has_adapters", [False, True])
def test_trl_reads_lora_only_with_use_peft(has_adapters, tmp_path):
    theirs = {"num_generations": 4, "lora_r": 8, "lora_dropout": 0.1} | ({"use_peft": True} if has_adapters else {})
    found = convert(write(tmp_path / "a.json", theirs))
    assert found.settings.get("lora_rank") == (8 if has_adapters else None)
    assert any("without use_peft" in remark for remark in found.remarks) != has_adapters
    assert (found.idle, found.unknown) == ([], [])


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("openrlhf", {"policy_loss_type": "ppo", "reward_clip_range": "-10 10", "target_modules": "all-linear"}),
        ("trl-ppo", {"optim": "adamw_torch_fused", "adam_beta2": "0.999", "use_peft": True, "lora_dropout": 0.05}),
    ],
)
def test_defaults_of_theirs_are_not_told(kind, theirs, tmp_path):
    found = convert(write(tmp_path / "a.json", theirs), kind=kind)
    assert not [remark for remark in found.remarks for name in theirs if remark.startswith(name)]
    assert (found.idle, found.unknown) == ([], [])


class TestExpressions:
    def test_are_read(self):
        said = "dict(a=-2, b=[1, (2, 3)], c=nn.ReLU, d={'x': None}, e=dict(f=True))"
        wanted = {"a": -2, "b": [1, [2, 3]], "c": "nn.ReLU", "d": {"x": None}, "e": {"f": True}}
        assert expression("policy_kwargs", said) == wanted

    @pytest.mark.parametrize(
        "said",
        [
            "dict(a=__import__('os').system('touch HERE'))",
            "dict(a=open('HERE', 'w'))",
            "[x for x in ().__class__.__bases__]",
            "dict(**{'a': 1})",
            "{**{}}",
            "lambda: 1",
            "dict(a=(1).bit_length())",
            "f'{1}'",
            "dict(a=9**9**9)",
            "dict(a=",
            "(" * 5000,
            "5",
        ],
    )
    def test_that_are_more_than_values_are_refused_and_not_run(self, said, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match="policy_kwargs is"):
            expression("policy_kwargs", said)
        assert list(tmp_path.iterdir()) == []


LAUGHS = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("a.yml", "a: [1, 2", "no YAML"),
            ("a.yml", "!!python/object/apply:os.system ['touch HERE']", "no YAML of plain values"),
            ("a.yml", "x: !!python/name:os.system\n", "no YAML of plain values"),
            ("a.yml", "just a sentence", "not settings by their names"),
            ("a.yml", "", "is empty"),
            ("a.yml", "- 1\n- 2\n", "not settings by their names"),
            ("a.yml", LAUGHS, "more than 50,000 values"),
            ("a.yml", MERGES, "more than 50,000 values"),
            ("a.yml", "a: &a [*a]\n", "more than 50,000 values"),
            ("a.yml", "[" * 20_000, "nested too deeply"),
            ("a.yml", "a: 2026-13-45\n", "cannot be read"),
            ("a.yml", "x" * 2_000_001, "larger than 2,000,000 bytes"),
            ("a.json", "{", "no JSON"),
            ("a.json", '{"a":' * 20_000, "nested too deeply"),
            ("a.json", '{"nothing": 1, "known": 2}', "does not show whose settings"),
            ("dqn.yml", "CartPole-v1: {n_timesteps: 5e4, policy: MlpPolicy}", "RL Zoo's file of DQN"),
            ("a.yml", "CartPole-v1: {n_timesteps: 5e4, buffer_size: 100}", "off-policy"),
            ("a.yml", "CartPole-v1: {n_steps: 5, use_rms_prop: true}", "settings of A2C"),
            ("a.yml", "{algo: sac, n_steps: 5}", "is for sac"),
            ("a.yml", "CartPole-v1: {n_steps: many}", "n_steps is 'many'; it must be a number"),
            ("a.yml", "CartPole-v1: {n_steps: .inf}", "n_steps is inf; it must be a number"),
            ("a.yml", "CartPole-v1: {n_steps: 2.5}", "it must be a whole number"),
            ("a.yml", "CartPole-v1: {n_steps: 64, gamma: 1.5}", "gamma is 1.5"),
            ("a.yml", "CartPole-v1: {n_steps: 64, policy_kwargs: 'dict(a=exit())'}", "Nothing of it was run"),
            ("a.yml", "CartPole-v1: {n_steps: 64, normalize: 'exit()'}", "Nothing of it was run"),
            ("a.yml", "CartPole-v1: {n_steps: 1}\nPong: {n_steps: 2}\n", "Say which: --env CartPole-v1"),
        ],
    )
    def test_get_one_message_and_code_2(self, name, text, said, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / name, text)
        code, out, error = said_by(capsys, "convert", name)
        assert (code, out) == (2, "")
        assert said in error
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("name", ["a.json", "a.yml"])
    @pytest.mark.parametrize(("levels", "is_refused"), [(19, False), (300, True)])
    def test_levels_within_each_other(self, name, levels, is_refused, tmp_path, capsys):
        nested = "[" * (levels - 1) + "]" * (levels - 1)  # the table itself is the first level
        text = f'{{"n_steps": 64, "env_kwargs": {{"x": {nested[1:-1]}}}}}'
        code, _, error = said_by(capsys, "convert", str(write(tmp_path / name, text)), "--env", "CartPole-v1")
        assert (code, "nested too deeply" in error) == ((2, True) if is_refused else (0, False))

    def test_levels_of_an_expression(self):
        with pytest.raises(UserError, match="more than 20 levels"):
            expression("policy_kwargs", f"dict(a={'[' * 50}{']' * 50})")

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"\x1b[2J-v1": {"n_steps": 1}, "b\x9b": {"n_steps": 1}}, ()),
            ({"\x1b[2J-v1": {"n_steps": 1}, "b\x9b": {"n_steps": 1}}, ("--env", "Z")),
            ({"CartPole-\x1b[2J": {"n_steps": 1}, "b": {"n_steps": 1}}, ("--env", "CartPole-v1")),
            ({"\x1b[2J-v1": {"n_steps": "many"}}, ()),
            ({"\x1b[2J-v1": {"n_steps": 64, "gamma": 7}}, ()),
            ({"\x1b[2J": 1, "\x9b2J": 2}, ()),
            ({"algo": "\x1b[2J"}, ()),
            ({"\x1b[2J": {"num_generations": 4}}, ()),
            ({"\x1b[2J": {"num_generations": 4}}, ("--env", "\x1b[2J")),
            ({"n_steps": "\x1b[2J"}, ()),
            ({"n_steps": 64, "policy_kwargs": "dict(\x1b[2J)"}, ()),
            ({"init_kl_coef": 1, "advantage_estimator": "\x1b[2J"}, ()),
            ({"n_steps": 64, "x\x1b[2J": 1, "env_kwargs": {"\x1b\x9b": "\x1b\x9b"}, "env": "\x1b[2J\x9b"}, ()),
            ("!%1b%5b2J x", ()),
            ('{"a": "\\e[2J", "a": !x%1b 3}', ()),
        ],
    )
    def test_no_name_or_value_moves_the_cursor(self, values, words, tmp_path, capsys):
        for name in ("a.yml", "a\x1b[2J.json"):
            _, out, error = said_by(capsys, "convert", str(write(tmp_path / name, values)), *words)
            assert out + error
            assert not [each for each in (out + error).replace("\n", "") if not each.isprintable()]

    def test_an_entry_that_there_is_not_names_the_nearest(self, zoo, capsys):
        code, _, error = said_by(capsys, "convert", str(zoo), "--env", "CartPol-v1")
        assert code == 2
        assert "Did you mean CartPole-v1" in error

    def test_names_with_newlines_stay_in_their_comment(self, tmp_path):
        theirs = {"n_steps": 64, 'x\nn_envs = 99\n"""': 1, "activation_fn": "y\r\nseed = 7"}
        theirs["policy_kwargs"] = {"z\nseed = 8": 1}
        found = convert(write(tmp_path / "a.json", theirs), "CartPole-v1")
        settings = tomllib.loads(found.toml)
        assert (settings["n_envs"], "seed" in settings) == (1, False)

    def test_arguments_of_the_environment_come_last_as_a_table(self, tmp_path):
        kwargs = {"hardcore": True, "name": "a\nb"}
        found = convert(write(tmp_path / "a.json", {"n_steps": 64, "env_kwargs": kwargs}), "BipedalWalker-v3")
        assert tomllib.loads(found.toml)["env_kwargs"] == kwargs

    def test_yaml_without_pyyaml_names_the_extra(self, zoo, monkeypatch, capsys):
        monkeypatch.setitem(__import__("sys").modules, "yaml", None)
        code, _, error = said_by(capsys, "convert", str(zoo), "--env", "CartPole-v1")
        assert code == 2
        assert "[convert]" in error


def test_a_run_with_the_printed_file_has_its_settings(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = said_by(capsys, "convert", str(zoo), "--env", "CartPole-v1")
    assert code == 0
    Path("cartpole.toml").write_text(out)
    words = ("--config", "cartpole.toml", "--total-steps", "512", "--run-dir", "run", "--quiet")
    code, _, error = said_by(capsys, "train", *words)
    assert code == 0, error
    ran = tomllib.loads(Path("run/config.toml").read_text())
    wanted = CARTPOLE | {"total_steps": 512}
    assert {name: ran[name] for name in wanted if name in ran} == {name: wanted[name] for name in wanted if name in ran}
    assert "value_clip_epsilon" not in ran or ran["value_clip_epsilon"] == "none"


def test_json_has_it_all(zoo, capsys):
    code, out, _ = said_by(capsys, "convert", str(zoo), "--env", "CartPole-v1", "--json")
    told = json.loads(out)
    assert (code, told["settings"], told["command"]) == (0, CARTPOLE, "train")
    assert tomllib.loads(told["toml"]) == CARTPOLE


# --- what a file may not hold -------------------------------------------------------------------------------------


ENTRY = "CartPole-v1:\n  n_envs: 8\n  n_timesteps: !!float 1e5\n  policy: MlpPolicy\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty. It must hold settings by their names"),
        ("# nothing\n", "is empty"),
        (ENTRY + "  env_kwargs: {x: !!binary AAAA}\n", "of type bytes, for which settings have no word"),
        (ENTRY + "  env_kwargs: {x: !!set {a: null}}\n", "of type set, for which settings have no word"),
        (ENTRY + "  n_envs: 9\n", "has n_envs twice in one table"),
        (ENTRY + "Foo-v1: 5\n", "the entry Foo-v1 is 5, not a table of settings"),
    ],
)
def test_what_settings_cannot_be_is_named(tmp_path, text, said):
    path = tmp_path / "ppo.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        convert(path)


def test_a_name_that_stands_twice_in_json_is_named(tmp_path):
    path = tmp_path / "ppo.json"
    path.write_text('{"n_steps": 128, "gamma": 0.9, "gamma": 0.99}')
    with pytest.raises(UserError, match="gamma stands in it twice"):
        convert(path)


def test_dates_are_text_and_other_letters_are_escaped(tmp_path):
    path = tmp_path / "ppo.yml"
    path.write_text(ENTRY + "  env_kwargs: {day: 2020-01-02, name: Ω-é-😀}\n", encoding="utf-8")
    toml = convert(path).toml
    assert toml.isascii()
    assert tomllib.loads(toml)["env_kwargs"] == {"day": "2020-01-02", "name": "Ω-é-😀"}
