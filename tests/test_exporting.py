"""Files that `proximo export` writes: run without Proximo, they do what the policy does, or there is no file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import proximo
from proximo import exporting
from proximo.errors import UserError
from proximo.models.control import ActorCritic
from proximo.models.graph import PolicyGraph
from tests.commands import said_by

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: the extra export")
pytest.importorskip("onnxscript", reason="ONNX Script is not installed: the extra export")

ONE_ITERATION: dict[str, Any] = dict(
    n_envs=2, rollout_length=16, batch_size=16, n_epochs=1, total_steps=32, orthogonal_init=False, quiet=True
)
"""Weights that are not orthogonal: the first actions of those would all be nearly the same."""


class Anything(gym.Env):
    """Samples of its spaces, and a reward of some size; where there is a mask, three quarters are possible."""

    observation_space: spaces.Space
    action_space: spaces.Space
    mask_size = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.seen(), self.info()

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return (
            self.seen(),
            30.0 * float(self.np_random.random()),
            False,
            bool(self.np_random.random() < 0.1),
            self.info(),
        )

    def seen(self) -> Any:
        return self.observation_space.sample()

    def mask(self) -> np.ndarray:
        mask = (self.np_random.random(self.mask_size) < 0.75).astype(np.int8)
        mask[0] = 1
        return mask

    def info(self) -> dict[str, Any]:
        return {"action_mask": self.mask()} if self.mask_size else {}


class Arm(Anything):
    """Numbers of very different sizes, as robots have; actions of very different ranges."""

    observation_space = spaces.Box(np.array([-1, 900, -1e5]), np.array([1, 1000, 1e5]), dtype=np.float64)
    action_space = spaces.Box(np.array([-0.01, 10, -500]), np.array([0.01, 30, 500]), dtype=np.float32)


class Unbounded(Anything):
    observation_space = spaces.Box(-np.inf, np.inf, (2, 2), np.float32)
    action_space = spaces.Box(-np.inf, np.inf, (2, 1), np.float64)


class Starting(Anything):
    observation_space = spaces.Box(-1.0, 1.0, (4,))
    action_space = spaces.Discrete(5, start=-2)


class Several(Anything):
    observation_space = spaces.MultiDiscrete([3, 4], start=[1, 0])
    action_space = spaces.MultiDiscrete([[3, 4], [2, 5]], dtype=np.int32)


class Bits(Anything):
    observation_space = spaces.Discrete(6, start=-2)
    action_space = spaces.MultiBinary([2, 3])


class Nested(Anything):
    """Every kind of part, and keys that are no names elsewhere."""

    observation_space = spaces.Dict(
        {
            "arm pos": spaces.Tuple([spaces.Box(-500.0, 500.0, (2,), np.float64), spaces.Discrete(4, start=2)]),
            "arm_pos_0": spaces.MultiBinary([2, 2]),
            "camera": spaces.Box(0, 255, (36, 40, 3), np.uint8),
        }
    )
    action_space = spaces.Dict(
        {"aim": spaces.Box(-4.0, 8.0, (2,)), "keys": spaces.Tuple([spaces.Discrete(3, start=1)])}
    )


class Told(Anything):
    observation_space = spaces.Box(-1.0, 1.0, (4,))
    action_space = spaces.Discrete(12)
    mask_size = 12


class Seen(Anything):
    """The mask is in the observation, which has a part of its name besides."""

    mask_size = 7
    observation_space = spaces.Dict({"action_mask": spaces.MultiBinary(7), "x": spaces.Box(-1.0, 1.0, (2,))})
    action_space = spaces.Dict({"mask": spaces.Discrete(3), "other": spaces.MultiBinary(2)})

    def seen(self) -> Any:
        mask = self.mask()
        mask[[3, 5]] = 1
        return {"action_mask": mask, "x": self.observation_space["x"].sample()}

    def info(self) -> dict[str, Any]:
        return {}


class Screen(Anything):
    observation_space = spaces.Box(0, 255, (4, 40, 36), np.uint8)
    action_space = spaces.Discrete(6)


class Picture(Anything):
    observation_space = spaces.Box(0, 255, (36, 40, 3), np.uint8)
    action_space = spaces.Box(-2.0, 2.0, (2,))


CASES: list[tuple[type[Anything], dict[str, Any], list[str], list[str]]] = [
    (Arm, {"normalize_observations": True, "normalize_rewards": True}, ["observation"], ["action", "value"]),
    (Arm, {"normalize_observations": True, "distribution": "beta"}, ["observation"], ["action", "value"]),
    (Arm, {"normalize_observations": True, "rescale_actions": False}, ["observation"], ["action", "value"]),
    (
        Arm,
        {"normalize_observations": True, "distribution": "squashed_gaussian", "state_dependent_std": True},
        ["observation"],
        ["action", "value"],
    ),
    (Unbounded, {"activation": "relu"}, ["observation"], ["action", "value"]),
    (Starting, {}, ["observation"], ["action", "value"]),
    (Several, {}, ["observation"], ["action", "value"]),
    (Bits, {}, ["observation"], ["action", "value"]),
    (
        Nested,
        {"normalize_observations": True},
        ["observation_arm_pos_0", "observation_arm_pos_1", "observation_arm_pos_0_2", "observation_camera"],
        ["action_aim", "action_keys_0", "value"],
    ),
    (Told, {}, ["observation", "action_mask"], ["action", "value"]),
    (Seen, {}, ["action_mask", "observation_x"], ["action_mask_2", "action_other", "value"]),
    (Screen, {}, ["observation"], ["action", "value"]),
    (Picture, {"encoder": "impala"}, ["observation"], ["action", "value"]),
]


@pytest.mark.parametrize(("env", "settings", "inputs", "outputs"), CASES)
def test_files_of_both_formats_do_what_the_policy_does(
    tmp_path: Path, env: type[Anything], settings: dict[str, Any], inputs: list[str], outputs: list[str]
):
    """On observations that the command has not seen, one at a time, by the names and kinds that it tells."""
    run = proximo.train(env, run_dir=tmp_path / "run", **(ONE_ITERATION | settings))
    policy = proximo.load(run)
    for kind, open_file in (("onnx", _open_onnx), ("torch", _open_torch)):
        told = proximo.export(run, format=kind, env=env)
        assert (told.from_episodes, told.notes) == (256, ())
        assert [port["name"] for port in told.inputs] == inputs
        assert [port["name"] for port in told.outputs] == outputs
        call, names = open_file(told.path)
        assert names == (inputs, outputs)
        one = env()
        observation, info = one.reset(seed=77)
        for _ in range(20):
            mask = info.get("action_mask")
            given = {port["name"]: _part(observation, port, mask)[None] for port in told.inputs}
            found = call(given)
            action, value = policy(observation, action_mask=mask), policy.value(observation)
            for port in told.outputs[:-1]:
                wanted, got = _at(action, port["path"]), found[port["name"]][0]
                assert (got.dtype, got.shape) == (np.dtype(port["dtype"]), np.shape(wanted))
                np.testing.assert_allclose(got, wanted, rtol=3e-6, atol=1e-6 * _size(one.action_space, port))
            assert found["value"][0] == pytest.approx(value, rel=2e-5, abs=2e-5 * policy.reward_scale)
            observation, *_, info = one.step(action)


def _part(observation: Any, port: dict[str, Any], mask: Any) -> np.ndarray:
    value = mask if port["role"] == "action_mask" and not port["path"] else _at(observation, port["path"])
    return np.asarray(value, port["dtype"])


def _at(value: Any, path: list[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def _size(space: spaces.Space, port: dict[str, Any]) -> float:
    part = _at(space, port["path"])
    return float(np.max(part.high - part.low)) / 2 if isinstance(part, spaces.Box) and part.is_bounded() else 1.0


def _open_onnx(path: Path) -> Any:
    session = onnxruntime.InferenceSession(path)
    inputs, outputs = ([port.name for port in ports] for ports in (session.get_inputs(), session.get_outputs()))
    assert {port.shape[0] for port in (*session.get_inputs(), *session.get_outputs())} == {"batch"}
    return lambda given: dict(zip(outputs, session.run(outputs, given), strict=True)), (inputs, outputs)


def _open_torch(path: Path) -> Any:
    extra = {"proximo.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    described = json.loads(extra["proximo.json"])
    names = tuple([port["name"] for port in described[kind]] for kind in ("inputs", "outputs"))

    def call(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = program({name: torch.from_numpy(array) for name, array in given.items()})
        return {name: tensor.detach().numpy() for name, tensor in found.items()}

    return call, names


@pytest.mark.parametrize(
    ("env", "settings"), [(Arm, {"memory": "lstm", "memory_layers": 2}), (Told, {"memory": "gru"})]
)
def test_files_of_policies_that_remember_go_on_from_what_they_gave(
    tmp_path: Path, env: type[Anything], settings: dict[str, Any]
):
    """Through an episode, each by what it remembered itself."""
    run = proximo.train(env, run_dir=tmp_path / "run", **(ONE_ITERATION | settings))
    policy = proximo.load(run)
    for kind, open_file in (("onnx", _open_onnx), ("torch", _open_torch)):
        told = proximo.export(run, format=kind, env=env)
        assert told.inputs[-1]["name"] == "memory"
        assert [port["name"] for port in told.outputs] == ["action", "value", "next_memory"]
        call, _ = open_file(told.path)
        one = env()
        observation, info = one.reset(seed=77)
        memory, own = policy.fresh_memory(), policy.fresh_memory()
        for _ in range(10):
            given = {"observation": np.asarray(observation)[None], "memory": own[None]}
            if "action_mask" in info:
                given["action_mask"] = np.asarray(info["action_mask"], np.int8)[None]
            found = call(given)
            action, memory = policy(observation, action_mask=info.get("action_mask"), memory=memory)
            own = found["next_memory"][0]
            np.testing.assert_allclose(own, memory, atol=1e-5)
            np.testing.assert_allclose(found["action"][0], action, atol=1e-4)
            observation, *_, info = one.step(action)
        assert np.abs(memory).max() > 0


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> proximo.Run:
    folder = tmp_path_factory.mktemp("arm")
    settings = ONE_ITERATION | {"normalize_observations": True, "normalize_rewards": True}
    return proximo.train(Arm, run_dir=folder / "run", **settings)


def test_the_file_is_the_formula(arm: proximo.Run, tmp_path: Path):
    """Normalize, clip, two layers of tanh, the action's range; and the critic in rewards: by hand, in float64."""
    told = proximo.export(arm, env=Arm, output=tmp_path / "policy.onnx")
    x = np.stack([Arm.observation_space.sample() for _ in range(64)])
    x[0] = [1e3, 0, 1e9]  # far from everything seen: clipped
    session = onnxruntime.InferenceSession(told.path)
    action, value = session.run(["action", "value"], {"observation": x})
    w = {name: tensor.double().numpy() for name, tensor in proximo.load(arm).state_dict().items()}
    normal = np.clip((x - w["observation_mean"]) / np.sqrt(w["observation_variance"] + 1e-8), -10, 10)
    assert np.abs(normal[0]).max() == 10

    def network(name: str) -> np.ndarray:
        hidden = np.tanh(normal @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"])
        hidden = np.tanh(hidden @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"])
        return hidden @ w[f"{name}.4.weight"].T + w[f"{name}.4.bias"]

    centre, half = np.array([0, 20, 0]), np.array([0.01, 10, 500])
    wanted = np.clip(centre + half * network("actor"), centre - half, centre + half)
    np.testing.assert_array_less(np.abs(action - wanted) / half, 1e-5)
    scale = np.sqrt(w["return_variance"] + 1e-8)
    assert scale > 5
    np.testing.assert_array_less(np.abs(value - scale * network("critic")[:, 0]) / scale, 1e-5)


# --- traps ----------------------------------------------------------------------------------------------------------


class WithoutNormalizer(PolicyGraph):
    def forward(self, given):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ActorCritic, "_normalized", lambda self, flat: flat.to(torch.float32))
            return super().forward(given)


class WithoutClip(PolicyGraph):
    """The normalizer without its limit."""

    def forward(self, given):
        def unclipped(policy: ActorCritic, flat: torch.Tensor) -> torch.Tensor:
            mean, scale = policy.normalization()
            return (flat.to(torch.float32) - mean) * scale

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ActorCritic, "_normalized", unclipped)
            return super().forward(given)


class InPolicyUnits(PolicyGraph):
    def __init__(self, policy):
        super().__init__(policy)
        self._ways = [lambda action: action.to(torch.float32)]


class InScaledRewards(PolicyGraph):
    def __init__(self, policy):
        super().__init__(policy)
        self.scale = 1.0


class WithoutStart(PolicyGraph):
    def __init__(self, policy):
        super().__init__(policy)
        self._ways = [lambda action: action]


class WithoutMask(PolicyGraph):
    def forward(self, given):
        return super().forward(given | {"action_mask": torch.ones_like(given["action_mask"])})


class OtherKind(PolicyGraph):
    def forward(self, given):
        return {name: tensor.to(torch.float64) for name, tensor in super().forward(given).items()}


@pytest.mark.parametrize(
    ("env", "trap", "format", "said"),
    [
        (Arm, WithoutNormalizer, "onnx", "its action differs"),
        (Arm, WithoutNormalizer, "torch", "its action differs"),
        (Arm, InPolicyUnits, "onnx", "its action differs"),
        (Arm, InScaledRewards, "onnx", "its value differs"),
        (Arm, OtherKind, "torch", "'action' is float64"),
        (Starting, WithoutStart, "torch", "its action differs"),
        (Told, WithoutMask, "onnx", "its action differs"),
    ],
)
def test_a_file_that_does_something_else_is_not_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    env: type[Anything],
    trap: type[PolicyGraph],
    format: str,
    said: str,
):
    settings = {"normalize_observations": True, "normalize_rewards": True}
    run = proximo.train(env, run_dir=tmp_path / "run", **(ONE_ITERATION | settings))
    before = sorted(run.path.rglob("*"))
    monkeypatch.setattr(exporting, "PolicyGraph", trap)
    code, out, error = said_by(capsys, "export", str(run.path), "--format", format)
    assert (code, out) == (2, "")
    assert "was not written" in error
    assert said in error
    assert sorted(run.path.rglob("*")) == before


def test_the_clip_of_the_normalizer_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It does nothing to what episodes bring; the draws from the space go beyond."""
    settings = {"normalize_observations": True, "clip_observation": 1.5}
    run = proximo.train(Arm, run_dir=tmp_path / "run", **(ONE_ITERATION | settings))
    monkeypatch.setattr(exporting, "PolicyGraph", WithoutClip)
    with pytest.raises(UserError, match="differs"):
        proximo.export(run, env=Arm)


def test_a_file_that_was_there_stays_until_the_new_one_is_sound(arm: proximo.Run, tmp_path: Path):
    path = tmp_path / "policy.onnx"
    path.write_bytes(b"the old one")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(exporting, "PolicyGraph", WithoutNormalizer)
        with pytest.raises(UserError, match="differs"):
            proximo.export(arm, env=Arm, output=path)
    assert path.read_bytes() == b"the old one"
    proximo.export(arm, env=Arm, output=path)
    assert len(path.read_bytes()) > 10_000
    assert list(tmp_path.iterdir()) == [path]


# --- without Proximo ------------------------------------------------------------------------------------------------

ALONE = """
import sys
for name in {blocked}:
    sys.modules[name] = None
try:
    import proximo
except ImportError:
    pass
else:
    raise SystemExit("proximo could be imported")
import numpy as np
data = np.load("data.npz")
{code}
np.savez("found.npz", action=action, value=value)
assert not any(name.startswith("proximo.") for name in sys.modules)
"""

IN_TORCH = """
import torch
policy = torch.export.load("policy.pt2").module()
found = policy({"observation": torch.from_numpy(data["x"])})
action, value = (found[name].detach().numpy() for name in ("action", "value"))
"""

IN_ONNX_RUNTIME = """
import onnxruntime
session = onnxruntime.InferenceSession("policy.onnx")
action, value = session.run(["action", "value"], {"observation": data["x"]})
"""


@pytest.mark.parametrize(
    ("format", "blocked", "code"),
    [("torch", ["proximo", "gymnasium"], IN_TORCH), ("onnx", ["proximo", "torch", "onnx"], IN_ONNX_RUNTIME)],
)
def test_files_run_where_proximo_is_not(arm: proximo.Run, tmp_path: Path, format: Any, blocked: list[str], code: str):
    proximo.export(arm, format=format, env=Arm, output=tmp_path / f"policy{exporting.SUFFIXES[format]}")
    x = np.stack([Arm.observation_space.sample() for _ in range(7)])
    np.savez(tmp_path / "data.npz", x=x)
    program = ALONE.format(blocked=blocked, code=code)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, policy = np.load(tmp_path / "found.npz"), proximo.load(arm)
    np.testing.assert_allclose(found["action"], policy(x), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(found["value"], policy.value(x), rtol=1e-5, atol=1e-5)


# --- what files and command say -------------------------------------------------------------------------------------


def test_the_file_says_what_it_is(arm: proximo.Run, tmp_path: Path):
    told = proximo.export(arm, env=Arm, output=tmp_path / "policy.onnx")
    said = json.loads(onnxruntime.InferenceSession(told.path).get_modelmeta().custom_metadata_map["proximo"])
    assert (said["env_id"], said["env_steps"]) == (arm.config.environment.env_id, 32)
    assert (said["algorithm"], said["deterministic"], said["normalize_observations"]) == ("PPO", True, True)
    assert said["observation_space"]["low"] == [-1.0, 900.0, -100000.0]
    seen = {"name": "observation", "role": "observation", "path": [], "shape": ["batch", 3], "dtype": "float64"}
    assert said["inputs"] == [seen | {"units": "raw, as the environment gives it"}]
    assert [port["dtype"] for port in said["outputs"]] == ["float32", "float32"]
    assert "own rewards, discounted by 0.99" in said["outputs"][1]["units"]


def test_the_file_names_no_place_of_this_machine(arm: proximo.Run, tmp_path: Path):
    for format in ("onnx", "torch"):
        told = proximo.export(arm, format=format, env=Arm, output=tmp_path / f"policy{exporting.SUFFIXES[format]}")
        data = told.path.read_bytes()
        assert not any(
            str(place).encode() in data for place in (tmp_path, Path.home(), Path(exporting.__file__).parent)
        )


def test_the_command_says_what_it_wrote(arm: proximo.Run, capsys: pytest.CaptureFixture[str]):
    code, out, error = said_by(capsys, "export", str(arm.path))
    assert (code, error) == (0, "")
    assert f"{arm.path / 'policy.onnx'}, policy of step 32" in out
    assert "float64 [batch, 3]" in out
    assert re.search(r"action +\d\S* \(at most 1e-06\)", out)
    # The class of a test is no name for an environment: nothing of the run's is made.
    assert "256 observations; largest" in out
    assert "drawn from the space alone" in out
    code, out, _ = said_by(capsys, "export", str(arm.path), "--format", "torch", "--checkpoint", "32", "--json")
    told = json.loads(out)
    assert (code, told["path"], told["step"]) == (0, str(arm.path / "policy.pt2"), 32)
    assert max(told["differences"].values()) <= 2e-6


def test_episodes_of_the_runs_own_environment(tmp_path: Path):
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", **ONE_ITERATION)
    told = proximo.export(run, format="torch")
    assert (told.observations, told.from_episodes, told.notes) == (512, 256, ())


def test_bfloat16_is_exported_as_float32(tmp_path: Path):
    run = proximo.train(Screen, run_dir=tmp_path / "run", precision="bfloat16", **ONE_ITERATION)
    assert "bfloat16" in proximo.export(run, env=Screen).notes[0]


@pytest.mark.parametrize("algorithm", ["a2c", "trpo"])
def test_relatives_are_exported_alike(tmp_path: Path, algorithm: str):
    few = dict(n_envs=2, rollout_length=32, total_steps=64, orthogonal_init=False, quiet=True)
    run = proximo.train("Pendulum-v1", run_dir=tmp_path / "run", algorithm=algorithm, **few)
    assert proximo.export(run, format="torch").differences["action"] <= 1e-6


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_message(arm: proximo.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = str(arm.path)
    for words, said in (
        ((str(tmp_path / "nothing"),), "nothing"),
        ((run, "--checkpoint", "7"), "7"),
        ((run, "--format", "torch", "--output", str(tmp_path / "a.onnx")), "say --format onnx"),
        ((run, "--output", str(tmp_path / "a")), "name it a.onnx"),
        ((run, "--output", str(tmp_path / "no" / "a.onnx")), "There is no folder"),
        ((run, "--output", str(tmp_path / "folder.onnx")), "which is a folder"),
        ((run, "--env", "CartPole-v1"), "another environment"),
        ((run, "--env", "CartPool-v1"), "CartPole-v1"),
    ):
        (tmp_path / "folder.onnx").mkdir(exist_ok=True)
        code, out, error = said_by(capsys, "export", *words)
        assert (code, out) == (2, "")
        assert said in error
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]
    code, _, error = said_by(capsys, "export", run, "--format", "tflite")
    assert (code, "onnx" in error) == (2, True)
    with pytest.raises(UserError, match="format is 'tflite'; it must be one of 'onnx', 'torch'"):
        proximo.export(arm, format="tflite")  # pyright: ignore[reportArgumentType]


def test_what_is_not_installed_is_named(
    arm: proximo.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = exporting.importlib.util.find_spec
    monkeypatch.setattr(
        exporting.importlib.util, "find_spec", lambda name, *more: None if name == "onnxruntime" else real(name, *more)
    )
    code, _, error = said_by(capsys, "export", str(arm.path))
    assert code == 2
    assert "needs onnxruntime, which is not installed" in error
    assert '-e ".[export]"' in error
    assert said_by(capsys, "export", str(arm.path), "--format", "torch")[0] == 0


def test_language_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.toml").write_text('stage = "sft"\n')
    code, _, error = said_by(capsys, "export", str(tmp_path))
    assert code == 2
    assert "is a language run (sft)" in error
    assert "from_pretrained" in error


def test_an_environment_that_breaks_is_named_or_noted(arm: proximo.Run):
    class Broken(Arm):
        def step(self, action):
            raise RuntimeError("the motor is off")

    with pytest.raises(UserError, match="the motor is off"):
        proximo.export(arm, format="torch", env=Broken)
