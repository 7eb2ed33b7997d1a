"""Any settings at all: possible ones train, and weights stay finite; all others are refused and leave nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tomli_w
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import proximo
from proximo.algorithms.rnd import IntrinsicConfig
from proximo.cli import main
from proximo.errors import UserError
from proximo.language import config_of, written_settings
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.training.align_config import check_together
from proximo.training.config import ControlConfig, settings_of, with_settings
from tests.fuzz.examples import examples, numbers, texts, values
from tests.tiny_language import save_tiny, save_tiny_scalar

SMALL: dict[str, Any] = dict(n_envs=2, rollout_length=4, total_steps=8, batch_size=4, n_epochs=1, hidden_sizes=[4])
NAMES = sorted(settings_of(ControlConfig()))
SIZES = {"n_envs", "rollout_length", "total_steps", "n_epochs", "hidden_sizes", "threads", "vectorization", "env_id"}
"""What makes a run large where a large value is possible: such values are checked, and not trained with."""


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """Work in a new folder; nothing may be left in it but what the test itself takes away."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def said_by(*words: str) -> tuple[int, str]:
    """Run a command; its exit code and what it said on standard error."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0), error.getvalue() + out.getvalue()


def assert_refused(folder: Path, *words: str) -> None:
    """The command ends with a message and code 2, and there is no file that was not there before."""
    before = sorted(folder.rglob("*"))
    code, said = said_by(*words)
    assert code == 2, said
    assert said.strip()
    assert "Traceback" not in said
    assert sorted(folder.rglob("*")) == before


def assert_weights_are_finite(run: Path) -> None:
    tensors = newest_checkpoint(RunDirectory(run).checkpoints).tensors
    for group in tensors.values():
        assert all(tensor.isfinite().all() for tensor in group.values() if tensor.is_floating_point())


# --- possible settings ------------------------------------------------------------------------------------------


def between(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False)


def none_or(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


FREE: dict[str, st.SearchStrategy[Any]] = {
    "max_episode_steps": none_or(st.integers(1, 5)),
    "on_space_violation": st.sampled_from(["raise", "warn"]),
    "vectorization": st.sampled_from(["serial", "native", "device"]),
    "action_mask": st.sampled_from(["auto", "none"]),
    "state_dependent_std": st.booleans(),
    "sde_sample_freq": st.sampled_from([-1, 1, 7]),
    "memory": st.sampled_from(["none", "gru", "lstm"]),
    "memory_size": st.integers(1, 6),
    "memory_layers": st.integers(1, 3),
    "shared_memory": st.booleans(),
    "hidden_sizes": st.lists(st.integers(1, 6), max_size=3),
    "activation": st.sampled_from(["tanh", "relu"]),
    "orthogonal_init": st.booleans(),
    "encoder": st.sampled_from(["auto", "mlp"]),
    "sign_rewards": st.booleans(),
    "log_std_init": between(-5, 2),
    "rescale_actions": st.booleans(),
    "normalize_observations": st.booleans(),
    "clip_observation": between(0.01, 100),
    "normalize_rewards": st.booleans(),
    "clip_reward": between(0.01, 100),
    "objective": st.sampled_from(["clip", "kl_penalty"]),
    "learning_rate": between(1e-6, 0.1),
    "learning_rate_schedule": st.sampled_from(["constant", "linear", "kl_adaptive"]),
    "clip_epsilon": between(0.01, 0.99),
    "clip_schedule": st.sampled_from(["constant", "linear"]),
    "clip_epsilon_high": none_or(between(0.01, 2)),
    "dual_clip": none_or(between(1.01, 10)),
    "n_epochs": st.integers(1, 3),
    "gamma": between(0, 1),
    "gae_lambda": between(0, 1),
    "value_gae_lambda": none_or(between(0, 1)),
    "normalize_advantages": st.booleans(),
    "value_coef": between(0, 2),
    "value_clip_epsilon": none_or(between(0.01, 10)),
    "entropy_coef": between(0, 0.1),
    "max_grad_norm": between(0.01, 100),
    "target_kl": none_or(between(0.0001, 1)),
    "kl_coef": between(0, 10),
    "kl_target": between(0.0001, 1),
    "update_path": st.sampled_from(["auto", "eager"]),
    "microbatch_size": none_or(st.integers(1, 9)),
    "seed": st.integers(0, 2**63 - 1),
    "checkpoint_every": none_or(st.integers(1, 40)),
    "keep_checkpoints": st.integers(1, 3),
    "keep_every": none_or(st.integers(1, 40)),
    "max_skipped_updates": st.integers(0, 3),
    "max_restarts": st.integers(1, 9),
    "step_timeout": between(1, 100),
    "stop_at_return": none_or(between(-1e4, 1e4)),
    "debug": st.booleans(),
}
ELSEWHERE = {"env_id", "env_kwargs", "n_envs", "rollout_length", "total_steps", "batch_size", "device", "threads"}
ELSEWHERE |= {"on_environment_fault", "n_workers"}  # for some vectorizations alone: tests/collect/test_restarts.py
ELSEWHERE |= {"precision", "episodic_life"}  # for pictures and games: tests/models/test_encoders.py, test_atari.py
ELSEWHERE |= {"distribution"}  # some need bounds, or do not go with the spread: tests/models/test_actions.py
ELSEWHERE |= {"algorithm"}  # has other settings: tests/training/test_family.py
ELSEWHERE |= {"sequence_length", "init_from"}  # tests/training/test_recurrent.py, test_clone.py
ELSEWHERE |= set(settings_of(IntrinsicConfig()))  # tests/training/test_exploration.py
ELSEWHERE |= {"gae_lambda_per_step", "microbatch_tokens"}  # for language models alone


@st.composite
def possible_settings(draw: st.DrawFn) -> dict[str, Any]:
    """A few of the free settings, and sizes that fit each other."""
    chosen = {name: draw(FREE[name]) for name in draw(st.sets(st.sampled_from(sorted(FREE)), max_size=len(FREE)))}
    n_envs, length, iterations = draw(st.integers(1, 3)), draw(st.integers(2, 16)), draw(st.integers(1, 2))
    steps = n_envs * length
    if chosen.get("vectorization") == "device":
        chosen.pop("memory", None)
    if chosen.get("memory", "none") == "none":
        for name in ("memory_size", "memory_layers", "shared_memory"):
            chosen.pop(name, None)
    tasks = ["CartPole-v1", "Pendulum-v1"][: 1 if chosen.get("vectorization") in ("native", "device") else 2]
    return chosen | {
        "env_id": draw(st.sampled_from(tasks)),
        "n_envs": n_envs,
        "rollout_length": length,
        "total_steps": steps * iterations + draw(st.integers(0, steps - 1)),
        "batch_size": draw(st.integers(1, steps)),
    }


def test_no_setting_is_forgotten_here():
    assert set(FREE) | ELSEWHERE == set(NAMES)


@examples(30)
@given(chosen=possible_settings())
def test_possible_settings_train_and_weights_stay_finite(chosen: dict[str, Any]):
    with empty_folder():
        run = proximo.train(chosen.pop("env_id"), run_dir="run", quiet=True, **chosen)
        steps = chosen["n_envs"] * chosen["rollout_length"]
        if chosen.get("vectorization") in ("serial", "device"):
            # native environments have steps that only reset, which do not count
            assert run.env_steps == chosen["total_steps"] // steps * steps
        assert run.env_steps > 0
        assert_weights_are_finite(run.path)


@examples(3)
@given(chosen=possible_settings())
def test_possible_settings_of_a_file_do_the_same_as_those_of_flags(chosen: dict[str, Any]):
    chosen = {name: value for name, value in chosen.items() if value is not None and value != []}
    with empty_folder(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("proximo.report.report.write_report", no_pictures)
        Path("file.toml").write_text(tomli_w.dumps(chosen))
        assert said_by("train", "--config", "file.toml", "--run-dir", "of_file", "--quiet")[0] == 0
        words = ["train", chosen.pop("env_id"), *(word for item in chosen.items() for word in as_flag(*item))]
        code, said = said_by(*words, "--run-dir", "of_flags", "--quiet")
        assert code == 0, said
        first, second = (newest_checkpoint(RunDirectory(Path(each)).checkpoints) for each in ("of_file", "of_flags"))
        assert Path("of_file/config.toml").read_bytes() == Path("of_flags/config.toml").read_bytes()
        for name, tensor in first.tensors["policy"].items():
            assert torch.equal(tensor, second.tensors["policy"][name])


def no_pictures(*arguments: Any) -> None:
    raise UserError("no pictures here")


def as_flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]


# --- any settings -----------------------------------------------------------------------------------------------


@examples(400)
@given(name=st.sampled_from(NAMES), value=values)
def test_a_value_is_refused_or_comes_back_from_a_file_as_it_is(name: str, value: Any):
    try:
        config = with_settings(ControlConfig(), {name: value}, where="test")
    except UserError as error:
        said = str(error)
        assert len(said) < 2000
        return
    if name == "env_kwargs":  # which only environments can judge
        return
    with contextlib.suppress(UnicodeEncodeError):  # device, which is tried before anything is written
        settings = {key: held for key, held in settings_of(config).items() if held is not None}
        written = tomllib.loads(tomli_w.dumps(settings).encode().decode())
        assert with_settings(ControlConfig(), written, where="test") == config


@examples(60)
@given(name=st.sampled_from(sorted(set(NAMES) - SIZES)), value=numbers | texts | values)
@example(name="gae_lambda_per_step", value=0.05)
@example(name="learning_rate", value=1e30)
@example(name="max_grad_norm", value=1e300)
@example(name="value_coef", value=1e300)
@example(name="entropy_coef", value=10**30)
@example(name="log_std_init", value=5)
@example(name="clip_reward", value=5e-324)
@example(name="clip_observation", value=1e300)
@example(name="env_kwargs", value={"sutton_barto_reward": "\ud800"})
def test_whatever_is_not_refused_trains_and_weights_stay_finite(name: str, value: Any):
    env = "CartPole-v1" if name != "log_std_init" else "Pendulum-v1"
    with empty_folder() as folder:
        try:
            run = proximo.train(env, run_dir="run", quiet=True, **(SMALL | {name: value}))
        except UserError as error:
            if "Learning broke down" not in str(error):
                assert not any(folder.iterdir())
                return
        else:
            assert run.env_steps == 8
        assert_weights_are_finite(folder / "run")


@examples(60)
@given(name=st.text(max_size=12) | texts | st.sampled_from(["environment", "gama", "run-dir", "self", "clip__epsilon"]))
def test_names_of_no_setting_are_refused(name: str):
    assume(name not in NAMES)
    with pytest.raises(UserError, match="there is no setting"):
        with_settings(ControlConfig(), {name: 1}, where="test")


class AcceptedError(Exception):
    """A command would train now."""


@contextlib.contextmanager
def nothing_is_trained() -> Iterator[None]:
    def accept(*arguments: Any, **named: Any) -> None:
        raise AcceptedError

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("proximo.api.train_with", accept)
        monkeypatch.setattr("proximo.cli_language.run_stage", accept)
        yield


FLAGS = ["--" + name.replace("_", "-") for name in NAMES if name != "env_id"]
WORDS = texts | st.sampled_from(
    ["{", "[]", "{}", '{"a": NaN}', "[" * 2000, '{"a":' * 2000, "-", "--", "=", "0x1", "1_0"]
)


@examples(30)
@given(flag=st.sampled_from([*FLAGS, "--config", "--run-dir", "--no", "-x"]), words=st.lists(WORDS, max_size=2))
@example(flag="--env-kwargs", words=["[" * 100_000])
@example(flag="--env-kwargs", words=['{"a": 1' + "0" * 5000 + "}"])
@example(flag="--gamma", words=["\ud800"])
def test_flags_with_anything_behind_them_are_taken_or_refused(flag: str, words: list[str]):
    with empty_folder() as folder, nothing_is_trained(), contextlib.suppress(AcceptedError):
        if not {"-h", "--help"} & set(words):
            assert_refused(folder, "train", "CartPole-v1", flag, *words)


def as_toml(value: Any) -> str:
    """A value in TOML, also one that TOML's writers refuse."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(held)}" for key, held in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, int):
        return hex(value) if value > 10**30 else str(value)  # tomllib reads hexadecimal numbers of any length
    return json.dumps(value) if isinstance(value, str) else repr(value)


CONTROL_FILES = [
    b"",  # no environment
    b"gamma = 0.9",
    b"\xff\xfe",
    b"\0",
    b"gamma",
    b"gamma = 0.9\ngamma = 0.9",
    b"[algorithm]\ngamma = 0.9",
    b"[gamma]\nvalue = 0.9",
    b"[[gamma]]",
    b"gamma = 1979-05-27",
    b"env_kwargs = 3",
    b"[env_kwargs]\na = 1979-05-27T07:32:00Z",
    b"[env_kwargs.a.b.c]\nd = 1",
    b"env_id = 3",
    b'env_id = ["CartPole-v1"]',
    b'env_id = ""',
    b'env_id = ":"',
    b'env_id = "a\\u0000b"',
    b"env_id = 1.5",
    b"gamma = " + b"9" * 5000,
    b"gamma = 0x" + b"f" * 5000,
    b"n_envs = 0x" + b"f" * 5000,
    b"hidden_sizes = [0x" + b"f" * 5000 + b"]",
    b"gamma = " + b"[" * 3000 + b"]" * 3000,
    b"a." * 3000 + b"b = 1",
    b'"" = 1',
    b'"\\u0000" = 1',
    b"hidden_sizes = [[64]]",
    b"hidden_sizes = [true]",
    b'hidden_sizes = ["64"]',
    b"gamma = nan",
    b"learning_rate = inf",
    b"seed = -1",
    b"total_steps = 1e400",
]


@pytest.mark.parametrize("data", CONTROL_FILES, ids=lambda data: repr(data[:24]))
def test_files_that_hold_no_settings_are_refused(data: bytes):
    head = b"" if b"env_id" in data or data in CONTROL_FILES[:2] or not data.isascii() else b'env_id = "CartPole-v1"\n'
    with empty_folder() as folder:
        Path("file.toml").write_bytes(head + data)
        assert_refused(folder, "train", "--config", "file.toml")


@examples(60)
@given(name=st.sampled_from(NAMES) | st.text(max_size=5), value=values.filter(lambda value: value is not None))
def test_files_with_any_value_are_taken_or_refused(name: str, value: Any):
    with empty_folder() as folder, nothing_is_trained(), contextlib.suppress(AcceptedError):
        line = f"{json.dumps(name)} = {as_toml(value)}\n".encode("utf-8", "surrogatepass")
        Path("file.toml").write_bytes(line)
        assert_refused(folder, "train", "CartPole-v1", "--config", "file.toml")


# --- the language stages ----------------------------------------------------------------------------------------

STAGES = ("sft", "reward", "dpo", "align")
OF_STAGE = {stage: sorted(settings_of(config_of(stage, {}, where="test"))) for stage in STAGES}
CHOICES = st.sampled_from(STAGES).flatmap(lambda stage: st.tuples(st.just(stage), st.sampled_from(OF_STAGE[stage])))


@examples(300)
@given(choice=CHOICES, value=values)
def test_a_value_of_a_language_stage_is_refused_or_comes_back_from_a_file(choice: tuple[str, str], value: Any):
    stage, name = choice
    try:
        config = config_of(stage, {name: value}, where="test")
    except UserError as error:
        said = str(error)
        assert len(said) < 2000
        return
    with contextlib.suppress(UnicodeEncodeError):
        written = tomllib.loads(tomli_w.dumps(without_none(written_settings(stage, config))).encode().decode())
        assert config_of(stage, {key: held for key, held in written.items() if key != "stage"}, where="test") == config


def without_none(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


@examples(150)
@given(
    algorithm=st.sampled_from(["ppo", "grpo", "dr_grpo", "dapo", "rloo"]) | values,
    chosen=st.dictionaries(st.sampled_from(OF_STAGE["align"]), values, max_size=3),
)
def test_settings_of_align_fit_each_other_or_are_refused(algorithm: Any, chosen: dict[str, Any]):
    with contextlib.suppress(UserError):
        check_together(config_of("align", chosen | {"algorithm": algorithm}, where="test"))


@examples(20)
@given(choice=CHOICES, words=st.lists(WORDS, max_size=2))
def test_flags_of_a_language_stage_are_taken_or_refused(choice: tuple[str, str], words: list[str]):
    stage, name = choice
    with empty_folder() as folder, nothing_is_trained(), contextlib.suppress(AcceptedError):
        if not {"-h", "--help"} & set(words):
            assert_refused(folder, stage, "--model", "m", "--" + name.replace("_", "-"), *words)


@examples(40)
@given(choice=CHOICES, value=values.filter(lambda value: value is not None))
@example(choice=("align", "algorithm"), value=["ppo"])
@example(choice=("align", "algorithm"), value={"ppo": 1})
@example(choice=("sft", "learning_rate"), value=10**400)
def test_files_of_a_language_stage_are_taken_or_refused(choice: tuple[str, str], value: Any):
    stage, name = choice
    with empty_folder() as folder, nothing_is_trained(), contextlib.suppress(AcceptedError):
        Path("file.toml").write_bytes(f"{json.dumps(name)} = {as_toml(value)}\n".encode("utf-8", "surrogatepass"))
        assert_refused(folder, stage, "--config", "file.toml")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a tiny reward model, and data for every stage."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model")
    save_tiny_scalar(folder / "scores")
    rows = [
        {"prompt": f"the {word}", "completion": "sleeps .", "chosen": "runs", "rejected": "eats ."}
        for word in WORDS_OF_DATA
    ]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


WORDS_OF_DATA = ("cat", "dog", "bird", "fish")
NEEDED = {"model": "model", "data": "data.jsonl", "prompts": "data.jsonl", "reward": "scores"}
QUICK = {"batch_size": 2, "n_iterations": 1, "prompts_per_iteration": 2, "max_new_tokens": 2, "threads": 1}
QUICK |= {"max_length": 16, "normalize_rewards_on": 0, "hold_out": 0.25}
LARGE = {"n_epochs", "n_iterations", "prompts_per_iteration", "responses_per_prompt", "threads", "normalize_rewards_on"}
LARGE |= {"max_new_tokens", "judge_parallel", "lora_rank", "batch_size"}


@examples(20)
@given(choice=CHOICES.filter(lambda choice: choice[1] not in LARGE), value=values)
@example(choice=("sft", "model"), value="~nobody/x")
@example(choice=("sft", "data"), value="a\0b")
@example(choice=("align", "reward_weights"), value=["much"])
@example(choice=("align", "reward_weights"), value=[float("nan")])
@example(choice=("align", "reward"), value="")
@example(choice=("align", "stop"), value=[""])
@example(choice=("align", "judge_rubric"), value="\0")
@example(choice=("reward", "chat_template"), value="~nobody/x")
@example(choice=("dpo", "lora_alpha"), value=1e300)
@example(choice=("align", "temperature"), value=1e-300)
@example(choice=("sft", "device"), value="meta")
def test_language_runs_end_with_finite_weights_or_begin_not_at_all(place: Path, choice: tuple[str, str], value: Any):
    stage, name = choice
    named = {each: str(place / file) for each, file in NEEDED.items() if each in OF_STAGE[stage]}
    quick = {each: held for each, held in QUICK.items() if each in OF_STAGE[stage]}
    with empty_folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = named | quick | {name: value}
        first = [
            settings.pop(each) for each in (("model", "reward", "prompts") if stage == "align" else ("model", "data"))
        ]
        try:
            run = getattr(proximo, stage)(*first, run_dir="run", quiet=True, **settings)
        except UserError as error:
            said = str(error)
            assert "broke down" in said or not any(folder.iterdir()), said
            return
        weights = safetensors.torch.load_file(run.path / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())
