"""Runs and models from strangers: nothing of theirs is executed, and whatever is wrong with them is said in words."""

from __future__ import annotations

import contextlib
import json
import os
import pickle  # noqa: TID251  # to write what must never be read
import shutil
import socket
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tomli_w
import torch

import proximo
from proximo import cli
from proximo.errors import UserError
from proximo.models.folders import load_causal_lm, load_scalar_model, load_tokenizer
from proximo.training.memory import n_parameters
from tests.chat_endpoint import KEY, Endpoint
from tests.commands import said_by
from tests.runs.test_checkpoint import Bomb, plant, safetensors_file
from tests.tiny_language import save_tiny, save_tiny_scalar

CONTROL_PARTS = [
    *(f"checkpoints/step_000000000008/{name}.safetensors" for name in ("policy", "training")),
    *(f"checkpoints/step_000000000008/{name}.json" for name in ("state", "manifest")),
    *("checkpoints/latest", "checkpoints/best", "config.toml", "metrics.jsonl", ".lock", "report.json"),
]
BESIDE = ["pytorch_model.bin", "policy.pt", "policy.pkl", "optimizer.bin", "model.joblib", "data.npy", "rng_state.pth"]
LANGUAGE_PARTS = [
    *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "config.toml", "metrics.jsonl", "samples.jsonl", ".lock", "checkpoints/latest"),
    *(f"checkpoints/step_000000000001/{name}.safetensors" for name in ("policy", "optimizer", "generators")),
    *(f"checkpoints/step_000000000001/{name}.json" for name in ("state", "manifest")),
]
BESIDE_A_MODEL = [
    *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "consolidated.00.pth"),
    *("adapter_model.bin", "adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "spiece.model"),
    *("preprocessor_config.json", "tf_model.h5", "flax_model.msgpack", "checkpoints/step_000000000001/policy.pt"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control run and a language run, each of one iteration, and the models of the latter."""
    folder = tmp_path_factory.mktemp("place")
    sizes: dict[str, Any] = dict(n_envs=2, rollout_length=4, total_steps=8, batch_size=4, n_epochs=1, hidden_sizes=[4])
    proximo.train("CartPole-v1", run_dir=folder / "control", quiet=True, **sizes)
    save_tiny(folder / "model", chat=True)
    save_tiny_scalar(folder / "scores")
    (folder / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "the dog"}\n')
    small: dict[str, Any] = dict(
        n_iterations=1, prompts_per_iteration=2, batch_size=2, max_new_tokens=3, threads=1, n_epochs=1
    )
    proximo.align(
        folder / "model",
        folder / "scores",
        folder / "prompts.jsonl",
        run_dir=folder / "language",
        normalize_rewards_on=0,
        quiet=True,
        **small,
    )
    return folder


@pytest.fixture
def control(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "control", tmp_path / "control"))


@pytest.fixture
def language(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "language", tmp_path / "language"))


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What the bombs make; it must never be there."""
    path = tmp_path / "it ran"
    yield path
    assert not path.exists()


class Saved:
    """What torch.save writes, with a bomb inside."""

    def __init__(self, marker: Path) -> None:
        self.bomb = Bomb(marker)


def bombs(marker: Path) -> list[bytes]:
    """A pickle, and the same in the layout of torch's files; each is shown to be real."""
    file = marker.with_name("saved")
    torch.save({"state_dict": {"w": torch.zeros(1)}, "x": Bomb(marker)}, file)  # noqa: TID251  # never to be loaded
    torch.load(file, weights_only=False)  # noqa: TID251  # the bomb is real
    marker.unlink()
    data = pickle.dumps(Bomb(marker))
    pickle.loads(data)  # noqa: S301  # so is this one
    marker.unlink()
    return [data, file.read_bytes()]


def tried(use: Callable[[], Any]) -> str:
    """Use something; what the UserError said, or nothing where there was none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            use()
        except UserError as error:
            return str(error)
    return ""


def uses_of_control(run: Path) -> list[Callable[[], Any]]:
    return [
        lambda: proximo.load(run),
        lambda: proximo.load(run, checkpoint="best"),
        lambda: proximo.evaluate(run, episodes=1),
        lambda: proximo.resume(run, total_steps=16, quiet=True),
    ]


def uses_of_language(run: Path) -> list[Callable[[], Any]]:
    return [
        lambda: load_tokenizer(run),
        lambda: n_parameters(str(run)),
        lambda: load_causal_lm(run),
        lambda: load_scalar_model(run, fresh_head=True),
        lambda: proximo.resume(run, reward=None, quiet=True),
    ]


def put(path: Path, data: bytes) -> None:
    """Put a file where another one is, or none; a manifest beside it vouches for it."""
    if path.parent.name.startswith("step_") and path.name != "manifest.json" and path.exists():
        plant(path.parent, path.name, data)
    else:
        path.write_bytes(data)


# --- pickles ----------------------------------------------------------------------------------------------------


def met_by(uses: Callable[[Path], list[Callable[[], Any]]], run: Path, part: str, marker: Path) -> None:
    """Use a run with a bomb in the place of a part, with each of them."""
    for number, bomb in enumerate(bombs(marker)):  # each in a copy: resuming takes damaged checkpoints away
        copy = Path(shutil.copytree(run, run.with_name(f"copy{number}")))
        put(copy / part, bomb)
        for use in uses(copy):
            tried(use)
    assert not marker.exists()


@pytest.mark.parametrize("part", [*CONTROL_PARTS, *BESIDE, *(f"checkpoints/step_000000000008/{n}" for n in BESIDE)])
def test_a_pickle_in_a_control_run_never_runs(control: Path, marker: Path, part: str):
    met_by(uses_of_control, control, part, marker)


@pytest.mark.parametrize("part", [*LANGUAGE_PARTS, *BESIDE_A_MODEL])
def test_a_pickle_in_a_language_run_never_runs(language: Path, marker: Path, part: str):
    met_by(uses_of_language, language, part, marker)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "consolidated.00.pth", "model.pt"])
def test_nor_does_one_in_place_of_the_weights(language: Path, marker: Path, name: str):
    (language / "model.safetensors").unlink()
    if name == "adapter_model.bin":
        adapter = {"peft_type": "LORA", "base_model_name_or_path": str(language), "r": 1, "target_modules": ["q_proj"]}
        (language / "adapter_config.json").write_text(json.dumps(adapter))
    for bomb in bombs(marker):
        (language / name).write_bytes(bomb)
        for load in (load_causal_lm, load_scalar_model):
            assert tried(lambda load=load: load(language))
    assert not marker.exists()


@pytest.mark.parametrize("part", ["model.safetensors", "tokenizer.json", "config.json", "config.toml", "metrics.jsonl"])
def test_the_commands_for_people_end_in_words(
    place: Path, language: Path, marker: Path, part: str, capsys, monkeypatch: pytest.MonkeyPatch
):
    prompts = str(place / "prompts.jsonl")
    compared = ["--reward", str(place / "scores"), "--max-new-tokens", "2", "--best-of", "1"]
    put(language / part, bombs(marker)[1])
    for words in (
        ["sample", str(language), "--prompts", prompts, "--max-new-tokens", "2"],
        ["chat", str(language), "--max-new-tokens", "2"],
        ["evaluate", str(language), "--against", str(place / "model"), *compared, "--prompts", prompts],
        ["report", str(language)],
        ["resume", str(language), "--quiet"],
    ):
        monkeypatch.setattr("proximo.cli_models._asked", iter(["the cat", ""]).__next__)
        assert said_by(capsys, *words)[0] in (0, 2)


@pytest.mark.parametrize("part", ["metrics.jsonl", "config.toml", "checkpoints/latest"])
def test_the_report_of_a_control_run_ends_in_words(control: Path, marker: Path, part: str, capsys):
    put(control / part, bombs(marker)[0])
    assert said_by(capsys, "report", str(control))[0] in (0, 2)


# --- names of code ----------------------------------------------------------------------------------------------


def edit_config(run: Path, *lines: str) -> None:
    """Put other settings in place of those of the same names."""
    names = [line.split(" = ")[0] for line in lines]
    kept = (run / "config.toml").read_text().split("[env_kwargs]")[0].splitlines()
    kept = [line for line in kept if line.split(" = ")[0] not in names]
    table = [] if "env_kwargs" in names or "stage" in (run / "config.toml").read_text() else ["[env_kwargs]"]
    (run / "config.toml").write_text("\n".join([*kept, *lines, *table]) + "\n")


@pytest.mark.parametrize(
    "lines",
    [
        ['env_id = "os:system"'],
        ['env_id = "subprocess:Popen"', 'env_kwargs = {args = ["touch", "MARKER"]}'],
        ['env_id = "os:system"', "env_kwargs = {command = \"touch 'MARKER'\"}"],
        ['env_id = "builtins:exec"', "env_kwargs = {source = \"open('MARKER', 'w')\"}"],
        ['env_id = "evil.py:Env"'],
        ['env_id = "evil:CartPole-v1"'],
        ['env_id = "GymV21Environment-v0"', 'env_kwargs = {env_id = "evil:Env"}'],
        ['env_kwargs = {xml_file = "/etc/passwd"}'],
        ['vectorization = "native"', 'env_id = "evil:CartPole-v1"'],
        ['vectorization = "workers"', 'env_id = "evil.py:Env"'],
    ],
)
def test_an_environment_that_is_code_needs_the_users_word(
    control: Path, marker: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(control.parent)
    for folder in (control, control.parent):
        (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit_config(control, *(line.replace("MARKER", str(marker)) for line in lines))
    assert "allow_import" in tried(lambda: proximo.resume(control, total_steps=16, quiet=True))
    assert "allow_import" in tried(lambda: proximo.evaluate(control, episodes=1))
    for words in (["resume"], ["evaluate", "--episodes", "1"], ["watch"]):
        code, out, error = said_by(capsys, words[0], str(control), *words[1:])
        assert code == 2
        assert "--allow-import" in out + error
    proximo.load(control)  # the policy is no code
    assert not marker.exists()


@pytest.mark.parametrize("reward", ["os:system", "subprocess:getoutput", "evil.py:score", "evil:score"])
def test_a_reward_that_is_code_needs_the_users_word(language: Path, marker: Path, reward: str, monkeypatch):
    monkeypatch.chdir(language)
    (language / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit_config(language, f'stage = "align"\nreward = ["{reward}"]')
    text = (language / "config.toml").read_text()
    (language / "config.toml").write_text(text.replace('reward = [\n    "', 'unused = [\n    "'))
    said = tried(lambda: proximo.resume(language, reward=None, quiet=True))
    assert "allow" in said or "unused" in said
    assert not marker.exists()


@pytest.mark.parametrize("name", ["reward", "gold"])
def test_a_judge_is_sent_no_key_and_no_file_without_the_users_word(language: Path, name: str, monkeypatch, capsys):
    secret = language / "secret.txt"
    secret.write_text("what nobody else should read")
    monkeypatch.setenv("MY_SECRET", "abc")
    with contextlib.closing(Endpoint()) as endpoint:
        settings = tomllib.loads((language / "config.toml").read_text())
        settings |= {
            "reward": ["evil.py:score"],
            name: ["judge"],
            "judge_url": endpoint.url,
            "judge_rubric": str(secret),
        }
        settings |= {"judge_api_key_variable": "MY_SECRET"}
        (language / "config.toml").write_text(tomli_w.dumps(settings))
        code, _, error = said_by(capsys, "resume", str(language), "--quiet")
        assert code == 2
        assert name == "reward" or "'evil.py:score': resuming it runs that code" in error  # each is named
        for part in (endpoint.url, "$MY_SECRET", str(secret), "--allow-import"):
            assert part in error
        assert not endpoint.requests


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


OWN_CODE: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}),
    ("config.json", {"auto_map": {"AutoModelForCausalLM": "someone/else--evil.Model"}, "model_type": "evil"}),
    ("config.json", {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil", "trust_remote_code": True}),
    ("config.json", {"attn_implementation": "someone/kernel"}),
    ("config.json", {"_attn_implementation": "someone/kernel@main:function"}),
    ("config.json", {"attn_implementation": "kernels-community/flash-attn2"}),
    ("config.json", {"use_kernels": True, "kernel_config": {"kernel_mapping": {"RMSNorm": "someone/kernel:Norm"}}}),
    ("config.json", {"quantization_config": {"quant_method": "evil", "modules": "os:system"}}),
    ("config.json", {"transformers_weights": "../../evil.bin"}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Evil"}),
    ("generation_config.json", {"custom_generate": "someone/else", "trust_remote_code": True}),
]


@pytest.mark.parametrize(("file", "changes"), OWN_CODE)
def test_code_of_a_models_own_never_runs(
    language: Path, marker: Path, file: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    kernels = fetched_kernels(monkeypatch)
    edit_json(language / file, **changes)
    (language / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py"):
        (language / name).write_text(f"open({str(marker)!r}, 'w')\n")
    for use in uses_of_language(language):
        tried(use)
    assert kernels == []
    assert not marker.exists()


def fetched_kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be fetched from the hub and run if the package `kernels` were installed."""
    from transformers.integrations import hub_kernels

    fetched: list[Any] = []
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *arguments: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *arguments, **named: fetched.append(arguments))
    return fetched


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch \"MARKER\"') }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('touch \"MARKER\"') }}",
    ],
)
def test_a_chat_template_reaches_nothing_but_the_messages(place: Path, language: Path, marker: Path, template, capsys):
    (language / "chat_template.jinja").write_text(template.replace("MARKER", str(marker)))
    prompts = marker.with_name("chats.jsonl")
    prompts.write_text(json.dumps({"prompt": [{"role": "user", "content": "the cat"}]}))
    code, out, error = said_by(capsys, "sample", str(language), "--prompts", str(prompts), "--max-new-tokens", "2")
    assert code == 2, out + error
    assert not marker.exists()


# --- what is no file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["metrics.jsonl", ".lock", "checkpoints/latest", "checkpoints/best"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_nobody_waits_for_a_pipe_and_a_folder_is_no_file(control: Path, part: str, make: Callable[..., None], capsys):
    path = control / part
    path.unlink(missing_ok=True)
    make(path)
    code, _, error = said_by(capsys, "resume", str(control), "--total-steps", "16", "--quiet")
    assert (code, str(path) in error) == (2, True), error
    said_by(capsys, "evaluate", str(control), "--episodes", "1")


# --- tensors that do not fit --------------------------------------------------------------------------------------


def changed(tensors: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor], part: str = "") -> bytes:
    """The tensors, those of one part changed: the names of a part begin alike."""
    return safetensors.torch.save(
        {name: change(tensor).contiguous() if name.startswith(part) else tensor for name, tensor in tensors.items()}
    )


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a number more": lambda tensor: torch.cat([tensor.flatten(), tensor.new_zeros(1)]),
    "a dimension more": lambda tensor: tensor.unsqueeze(0).repeat(2, *[1] * tensor.ndim),
    "one number alone": lambda tensor: tensor.flatten()[:1],
    "no numbers": lambda tensor: tensor.flatten()[:0],
    "numbers of another kind": lambda tensor: tensor.to(torch.int16 if tensor.is_floating_point() else torch.float16),
    "complex numbers": lambda tensor: tensor.to(torch.complex64),
    "huge numbers": lambda tensor: torch.full_like(tensor, 2**62) if tensor.dtype == torch.int64 else tensor * 100,
    "negative numbers": lambda tensor: torch.full_like(tensor, -1) if tensor.dtype == torch.int64 else -tensor,
    "yes or no": lambda tensor: tensor != 0,
}
SEEN_AT_ONCE = ("a number more", "a dimension more", "one number alone", "no numbers")


PARTS = ("policy", "training/optimizer", "training/generators", "training/carry", "training/environments")
PAIRS = [(part, change) for part in PARTS for change in CHANGES]


@pytest.mark.parametrize(("part", "change"), PAIRS)
def test_tensors_that_do_not_fit_a_control_run_are_refused(control: Path, part: str, change: str):
    name, _, inner = part.partition("/")
    file = control / f"checkpoints/step_000000000008/{name}.safetensors"
    tensors = safetensors.torch.load_file(file)
    assert any(key.startswith(inner) for key in tensors)
    plant(file.parent, file.name, changed(tensors, CHANGES[change], inner))
    said = [tried(use) for use in uses_of_control(control)]
    assert said[-1] or change not in SEEN_AT_ONCE
    assert said[0] or (part, change not in SEEN_AT_ONCE) != ("policy", False)


@pytest.mark.parametrize("name", ["policy", "optimizer", "generators"])
@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit_a_language_run_are_refused(language: Path, name: str, change: str):
    file = language / f"checkpoints/step_000000000001/{name}.safetensors"
    plant(file.parent, file.name, changed(safetensors.torch.load_file(file), CHANGES[change]))
    said = tried(lambda: proximo.resume(language, reward=None, quiet=True))
    assert said or change not in SEEN_AT_ONCE


@pytest.mark.parametrize("change", SEEN_AT_ONCE)
def test_weights_that_do_not_fit_a_model_are_refused(language: Path, change: str):
    file = language / "model.safetensors"
    file.write_bytes(changed(safetensors.torch.load_file(file), CHANGES[change]))
    assert tried(lambda: load_causal_lm(language))


HEADERS = {
    "a header of 8 EiB": safetensors_file({}, length=2**63),
    "a header longer than the file": safetensors_file({}, length=10**8),
    "a tensor of 2^62 numbers": safetensors_file({"w": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 0]}}),
    "a million names": safetensors_file(
        {str(n): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(10**5)}
    ),
    "no tensor": safetensors_file({}),
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_without_end_are_refused(control: Path, language: Path, header: str):
    for file in control.glob("checkpoints/step_*8/policy.safetensors"):
        plant(file.parent, file.name, HEADERS[header])
    assert tried(lambda: proximo.load(control, checkpoint="8"))
    assert tried(lambda: proximo.resume(control, total_steps=16, quiet=True)) or header != "no tensor"
    (language / "model.safetensors").write_bytes(HEADERS[header])
    assert tried(lambda: load_causal_lm(language))


ODD = [None, -1, 10**400, "text", [], {"a": None}]


def odd_states(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The state with an odd value in each place, one at a time, at the first two depths."""
    for name, value in state.items():
        for odd in ODD:
            yield f"{name} = {str(odd)[:9]}", state | {name: odd}
        yield f"no {name}", {key: held for key, held in state.items() if key != name}
        if isinstance(value, dict):
            for inner in value:
                for odd in ODD[::3]:
                    yield f"{name}.{inner} = {str(odd)[:9]}", state | {name: value | {inner: odd}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["control", "language"])
def test_states_of_the_wrong_kind_end_in_words(kind: str, request: pytest.FixtureRequest):
    run: Path = request.getfixturevalue(kind)
    state_file = max(run.glob("checkpoints/step_*")) / "state.json"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    raised = []
    states = list(odd_states(json.loads(state_file.read_text())))
    for what, state in states if kind == "control" else states[::2]:  # a language run takes ten times as long to load
        plant(state_file.parent, "state.json", json.dumps(state).encode())
        for use in uses_of_control(run)[::3] if kind == "control" else uses_of_language(run)[-1:]:
            try:
                tried(use)
            except Exception as error:
                raised.append(f"{what}: {type(error).__name__}: {error}")
        shutil.rmtree(run)
        for path, data in before.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    assert raised == []


# --- secrets and sockets ------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("PROXIMO_TEST_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Endpoint()
    yield found
    found.close()


def test_the_key_of_a_judge_is_written_nowhere(place: Path, tmp_path: Path, endpoint: Endpoint, capfd):
    (tmp_path / "rubric.txt").write_text("Length counts.")
    words = ["align", "--model", str(place / "model"), "--reward", "judge", "--prompts", str(place / "prompts.jsonl")]
    words += ["--judge-url", endpoint.url, "--judge-model", "j", "--judge-rubric", str(tmp_path / "rubric.txt")]
    words += ["--judge-api-key-variable", "PROXIMO_TEST_KEY", "--n-iterations", "1", "--prompts-per-iteration", "2"]
    words += ["--batch-size", "2", "--max-new-tokens", "3", "--threads", "1", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    out, error = capfd.readouterr()
    assert ended.value.code == 0, error
    assert endpoint.keys[0] == f"Bearer {KEY}"
    assert KEY not in out + error
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []


LISTENING = """
import os, time
def score(prompts, responses):
    open({file!r}, "w").write(str(os.getpid()))
    time.sleep({seconds})
    return [0.0] * len(responses)
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_a_run_with_a_reward_function_listens_nowhere_and_names_no_secret(
    place: Path, tmp_path: Path, endpoint: Endpoint
):
    (tmp_path / "rewards.py").write_text(LISTENING.format(file=str(tmp_path / "pid"), seconds=1.5))
    words = [sys.executable, "-m", "proximo.cli", "align", "--model", str(place / "model"), "--threads", "1"]
    words += ["--reward", f"{tmp_path}/rewards.py:score", "judge", "--prompts", str(place / "prompts.jsonl")]
    words += ["--judge-url", endpoint.url, "--judge-model", "j", "--judge-rubric", str(tmp_path / "rewards.py")]
    words += ["--judge-api-key-variable", "PROXIMO_TEST_KEY", "--n-iterations", "1", "--prompts-per-iteration", "2"]
    words += ["--batch-size", "2", "--max-new-tokens", "3", "--run-dir", str(tmp_path / "run"), "--quiet"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        seen = watched(process, tmp_path / "pid")
        error = process.communicate()[1].decode()
    assert process.returncode == 0, error
    assert seen["processes"] >= 2  # the run and its reward
    assert seen["listening"] == []
    assert not any(KEY in line for line in seen["lines"])


def watched(process: subprocess.Popen[bytes], file: Path) -> dict[str, Any]:
    """While the reward is being computed: the sockets that the run listens on, and its command lines."""
    while process.poll() is None and not file.exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    family = [process.pid, *children(process.pid)]
    own = {str(link.readlink()) for pid in family for link in links(pid)}
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in family]
    return {"processes": len(family), "listening": [s for s in listening() if f"socket:[{s}]" in own], "lines": lines}


def children(pid: int) -> list[int]:
    found = [int(each) for task in Path(f"/proc/{pid}/task").glob("*/children") for each in task.read_text().split()]
    return found + [inner for each in found for inner in children(each)]


def links(pid: int) -> list[Path]:
    return [link for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]


def listening() -> list[str]:
    """The inodes of all TCP sockets that listen."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[9] for row in rows if row[3] == "0A"]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_a_socket_that_listens_would_be_seen():
    with socket.create_server(("127.0.0.1", 0)):
        own = {str(link.readlink()) for link in links(os.getpid())}
        assert any(f"socket:[{inode}]" in own for inode in listening())
