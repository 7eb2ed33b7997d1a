"""A checkpoint comes back bit for bit, or not at all; and a hostile one does nothing but raise."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle  # noqa: TID251  # to write what must never be read
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proximo.errors import UserError
from proximo.runs import manifest
from proximo.runs.checkpoint import (
    Checkpoint,
    finish_save,
    load_checkpoint,
    mark_best,
    named_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]
STATE = {"env_steps": 128, "kl_coef": 0.1}


def some_tensors(seed: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "policy": {"weight": torch.full((2, 3), seed), "bias": torch.tensor(seed)},
        "collector": {"rng": torch.arange(16, dtype=torch.uint8)},
    }


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, step, some_tensors(float(step)), {**STATE, "env_steps": step})


def assert_is(checkpoint: Checkpoint, step: int) -> None:
    assert checkpoint.step == step
    assert checkpoint.state == {**STATE, "env_steps": step}
    assert_same_tensors(checkpoint.tensors, some_tensors(float(step)))


def assert_same_tensors(got: dict[str, dict[str, torch.Tensor]], wanted: dict[str, dict[str, torch.Tensor]]) -> None:
    assert {stem: set(group) for stem, group in got.items()} == {stem: set(group) for stem, group in wanted.items()}
    for stem, group in wanted.items():
        for key, tensor in group.items():
            other = got[stem][key]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert bits(other) == bits(tensor)


def bits(tensor: torch.Tensor) -> list[int]:
    """The bytes themselves: NaNs with their payload, zeros with their sign."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).tolist() if plain.numel() else []


def reseal(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit a manifest as an attacker would, who knows how to make its hash right again."""
    fields = json.loads((path / "manifest.json").read_text())
    del fields["sha256"]
    edit(fields)
    (path / "manifest.json").write_bytes(manifest._rendered(fields))


def plant(path: Path, name: str, data: bytes) -> None:
    """Put other content into a file, with a manifest that vouches for it."""
    (path / name).write_bytes(data)
    promise = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(path, lambda fields: fields["files"].update({name: promise}))


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------- what comes back


@st.composite
def tensors_of_any_kind(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    raw = draw(st.binary(min_size=count, max_size=count))
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return (flat % 2 == 1 if dtype == torch.bool else flat.view(dtype)).reshape(shape)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda key: key != "__metadata__")
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text(st.characters()),  # lone surrogates too: a path may have them
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tensors=st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True).filter(lambda stem: stem[0] != "-"),
        st.dictionaries(names, tensors_of_any_kind(), max_size=3),
        max_size=3,
    ),
    state=st.dictionaries(st.text(), json_values, max_size=4),
    step=st.integers(0, 10**15),
)
def test_whatever_is_saved_comes_back_bit_for_bit(tensors, state, step):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(save_checkpoint(Path(folder), step, tensors, state))
    assert checkpoint.step == step
    assert repr(checkpoint.state) == repr(state)  # repr tells 1 from True and 0.0 from -0.0, and knows NaN
    assert_same_tensors(checkpoint.tensors, tensors)


def test_views_and_tensors_that_share_memory_are_saved_each_for_itself(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    shared = torch.zeros(2, dtype=torch.float64).share_memory_()
    group = {
        "whole": base,
        "transposed": base.T,
        "row": base[1],
        "strided": base[:, ::2],
        "expanded": torch.tensor(3.0).expand(4),
        "parameter": torch.nn.Parameter(base),
        "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "shared": shared,
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {"policy": group}, {})).tensors["policy"]
    assert_same_tensors({"policy": loaded}, {"policy": group})
    loaded["whole"].zero_()
    assert loaded["row"].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("tensors", "state"),
    [
        ({}, {"shape": (1, 2)}),
        ({}, {"by_env": {0: "a"}}),
        ({}, {"inner": [{"value": torch.zeros(1)}]}),
        ({}, {"seen": {1, 2}}),
        ({"../policy": {}}, {}),
        ({"a/b": {}}, {}),
        ({"": {}}, {}),
        ({"policy": {"weight": torch.zeros(2).to_sparse()}}, {}),
        ({"policy": {"weight": torch.zeros(2, device="meta")}}, {}),
        ({"policy": {"weight": torch.zeros(2, dtype=torch.complex128)}}, {}),
        ({"policy": {"__metadata__": torch.zeros(2)}}, {}),
        ({"policy": {"weight": [1.0]}}, {}),
    ],
)
def test_what_would_come_back_changed_is_refused_before_anything_is_written(tmp_path, tensors, state):
    with pytest.raises((TypeError, ValueError)):
        save_checkpoint(tmp_path / "checkpoints", 1, tensors, state)
    assert not (tmp_path / "checkpoints").exists()


def test_a_step_saved_again_gets_a_new_name_that_sorts_last(tmp_path):
    first = save(tmp_path, 102400)
    before = contents_of(first)
    again = [save_checkpoint(tmp_path, 102400, {}, {"time": time}) for time in range(2, 13)]
    assert first.name == "step_000000102400"
    assert again[0].name == "step_000000102400-2"
    assert contents_of(first) == before
    assert newest_checkpoint(tmp_path).state == {"time": 12}  # -12 comes after -2
    shutil.rmtree(again[0])
    assert save(tmp_path, 102400).name == "step_000000102400-13"  # the gap is not filled
    assert newest_checkpoint(tmp_path).path == save(tmp_path, 102401).with_name("step_000000102400-13")


# ------------------------------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("pristine"), 128)


@pytest.fixture
def victim(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


FILES = ["policy.safetensors", "collector.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_bit_anywhere_is_found(victim, name):
    data = (victim / name).read_bytes()
    for offset in (*range(0, len(data), 3), len(data) - 1):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << (offset % 8)
        (victim / name).write_bytes(damaged)
        with pytest.raises(UserError):
            load_checkpoint(victim)
    (victim / name).write_bytes(data)
    assert_is(load_checkpoint(victim), 128)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_other_length_is_found(victim, name):
    data = (victim / name).read_bytes()
    for other in (
        *(data[:length] for length in (*range(0, len(data), 3), len(data) - 1)),
        data + b"\0",
        data + b"\n",
        data * 2,
    ):
        (victim / name).write_bytes(other)
        with pytest.raises(UserError, match=name):
            load_checkpoint(victim)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(victim, name):
    (victim / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_checkpoint(victim)


def test_what_a_file_manager_leaves_is_passed_over(victim):
    (victim / ".DS_Store").write_bytes(b"x")
    assert load_checkpoint(victim).step == 128
    assert newest_checkpoint(victim.parent).skipped == ()
    (victim / ".link").symlink_to(victim / "state.json")
    with pytest.raises(UserError, match=r"\.link' is a link"):
        load_checkpoint(victim)


def test_a_run_without_a_checkpoint_says_how_to_begin_again(tmp_path):
    with pytest.raises(UserError, match=r"Begin a new run.*proximo train --config '.*my run/config\.toml'"):
        newest_checkpoint(tmp_path / "my run" / "checkpoints")


def test_a_run_of_a_language_stage_is_begun_again_as_one(tmp_path):
    (tmp_path / "config.toml").write_text('stage = "align"\n')
    with pytest.raises(UserError, match=r"Begin a new run.*proximo align --config .*config\.toml$"):
        newest_checkpoint(tmp_path / "checkpoints")


@pytest.mark.parametrize("name", ["policy.pkl", "other.safetensors", "state.json.bak"])
def test_a_file_that_does_not_belong_is_named(victim, name):
    (victim / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name}' does not belong"):
        load_checkpoint(victim)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
@pytest.mark.parametrize("name", ["extra", "policy.safetensors"])
def test_nothing_but_plain_files_is_touched(victim, make, name):
    (victim / name).unlink(missing_ok=True)
    make(victim / name)  # opening the pipe would wait for a writer for ever
    with pytest.raises(UserError, match=name):
        load_checkpoint(victim)


@pytest.mark.parametrize("name", FILES)
def test_a_link_is_refused_even_if_its_content_is_right(victim, tmp_path, name):
    (victim / name).rename(tmp_path / "elsewhere")
    (victim / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name}' is a link"):
        load_checkpoint(victim)


def test_the_message_says_what_where_and_how_to_mend(victim):
    (victim / "policy.safetensors").write_bytes(b"\0" * 10)
    with pytest.raises(UserError) as caught:
        load_checkpoint(victim)
    assert str(caught.value).startswith(f"The checkpoint {victim} was not loaded: policy.safetensors is damaged")
    assert "10 bytes" in str(caught.value)
    assert str(caught.value).endswith("use another checkpoint.")


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            load_checkpoint(path)


# ------------------------------------------------------------------------------------------ malice


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "{outside}/evil.safetensors",
        "sub/evil.safetensors",
        "sub\\evil.safetensors",
        "..",
        "",
        ".safetensors",
        "policy.safetensors\n",
        "policy.safetensors\0",
        "evil.pkl",
        "evil.json",
        "manifest.json",
        "-rf.safetensors",
        "x" * 300 + ".safetensors",
    ],
)
def test_a_manifest_cannot_name_anything_outside_its_folder(victim, tmp_path, name):
    evil = manifest.record(b"evil")
    (tmp_path / "evil.safetensors").write_bytes(b"evil")
    name = name.format(outside=tmp_path)
    reseal(victim, lambda fields: fields["files"].update({name: {"size": evil.size, "sha256": evil.sha256}}))
    with pytest.raises(UserError, match=r"manifest\.json lists"):
        load_checkpoint(victim)


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("name", ["policy.safetensors", "collector.safetensors", "state.json"])
def test_a_planted_pickle_never_runs(victim, tmp_path, name):
    marker = tmp_path / "it ran"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb)  # noqa: S301  # the bomb is real
    marker.unlink()

    plant(victim, name, bomb)
    with pytest.raises(UserError, match=name):
        load_checkpoint(victim)
    (victim / "manifest.json").write_bytes(bomb)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        load_checkpoint(victim)
    assert not marker.exists()


def safetensors_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        safetensors_file({}, length=2**63),
        safetensors_file({}, length=10**8 + 1),
        safetensors_file(b"[" * 100_000),
        safetensors_file({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, b"\0" * 8),
        safetensors_file({"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
        safetensors_file({"w": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}),
        safetensors_file({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors_file({"w": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8),
        safetensors_file({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"\0"),
        safetensors_file({"w": {"dtype": "U8", "shape": [1], "data_offsets": [8, 9]}}, b"\0" * 9),
        safetensors_file({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0\0"),
    ],
)
def test_a_hostile_tensor_file_is_a_readable_error(victim, data):
    plant(victim, "policy.safetensors", data)
    with pytest.raises(UserError, match=r"policy\.safetensors is no readable"):
        load_checkpoint(victim)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": 1' + b"0" * 9999 + b"}",
        b'{"\xff": 1}',
    ],
)
def test_a_hostile_state_is_a_readable_error(victim, data):
    plant(victim, "state.json", data)
    with pytest.raises(UserError, match=r"state\.json"):
        load_checkpoint(victim)


@pytest.mark.parametrize(
    "edit",
    [
        lambda fields: fields.update(schema=2),
        lambda fields: fields.update(schema=True),
        lambda fields: fields.update(schema="1"),
        lambda fields: fields.pop("schema"),
        lambda fields: fields.update(step=-1),
        lambda fields: fields.update(step=129),  # another step than the folder's name
        lambda fields: fields.update(step="128"),
        lambda fields: fields.update(versions=["1"]),
        lambda fields: fields.update(versions={"torch": 2}),
        lambda fields: fields.update(files=[]),
        lambda fields: fields["files"].update({"state.json": None}),
        lambda fields: fields["files"]["state.json"].update(size=True),
        lambda fields: fields["files"]["state.json"].update(size=-1),
        lambda fields: fields["files"]["state.json"].update(sha256="0" * 63),
        lambda fields: fields["files"].pop("state.json"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(victim, edit):
    reseal(victim, edit)
    with pytest.raises(UserError, match=r"manifest\.json"):
        load_checkpoint(victim)


def test_an_unknown_schema_says_which_is_known(victim):
    reseal(victim, lambda fields: fields.update(schema=7))
    with pytest.raises(UserError, match=r"schema version 7, and this Proximo reads 1"):
        load_checkpoint(victim)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b"{" + b" " * (1 << 20) + b"}"])
def test_a_manifest_that_is_none_is_refused(victim, data):
    (victim / "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match=r"manifest\.json"):
        load_checkpoint(victim)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_random_bytes_never_get_further_than_a_readable_error(victim, data):
    for name in ("policy.safetensors", "state.json"):
        plant(victim, name, data)
        with contextlib.suppress(UserError):
            load_checkpoint(victim)


# -------------------------------------------------------------------------- which one, and pruning


def damage(path: Path, name: str = "policy.safetensors") -> None:
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)


def test_the_newest_that_verifies_is_loaded_and_the_reasons_are_told(tmp_path):
    for step in (100, 200, 300, 400):
        save(tmp_path, step)
    damage(tmp_path / "step_000000000400")
    (tmp_path / "step_000000000300" / "manifest.json").unlink()
    checkpoint = newest_checkpoint(tmp_path)
    assert_is(checkpoint, 200)
    assert [reason.split(":")[0] for reason in checkpoint.skipped] == [
        "step_000000000400",
        "step_000000000300",
    ]
    assert "policy.safetensors is damaged" in checkpoint.skipped[0]
    assert "manifest.json is missing" in checkpoint.skipped[1]


def test_latest_need_not_be_right(tmp_path):
    save(tmp_path, 100)
    save(tmp_path, 200)
    assert (tmp_path / "latest").read_text() == "step_000000000200\n"
    (tmp_path / "latest").write_text("step_000000000100\n")  # killed before it was moved
    assert_is(newest_checkpoint(tmp_path), 200)
    assert newest_checkpoint(tmp_path).skipped == ()
    (tmp_path / "latest").unlink()
    assert newest_checkpoint(tmp_path).skipped == ()

    (tmp_path / "latest").write_text("step_000000000300\n")  # somebody deleted the newest
    checkpoint = newest_checkpoint(tmp_path)
    assert_is(checkpoint, 200)
    assert checkpoint.skipped == ("step_000000000300: latest names it, and it is not there",)
    (tmp_path / "latest").write_text("../../etc")
    assert "'../../etc'" in newest_checkpoint(tmp_path).skipped[0]


def test_unfinished_folders_are_never_candidates(tmp_path):
    whole = save(tmp_path, 100)
    shutil.copytree(whole, tmp_path / ".tmp-0123456789abcdef")
    shutil.copytree(whole, tmp_path / "step_000000000900.tmp")
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint.path == whole
    assert checkpoint.skipped == ()


def test_no_checkpoint_and_no_sound_checkpoint_are_told_apart(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="There is no checkpoint in"):
            newest_checkpoint(folder)
    damage(save(tmp_path, 100))
    damage(save(tmp_path, 200), "state.json")
    with pytest.raises(UserError, match=r"(?s)step_000000000200: state\.json.*step_000000000100: policy"):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_is_found_by_every_name_it_has(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step)
    again = save(tmp_path, 200)
    mark_best(tmp_path, tmp_path / "step_000000000100")
    assert_is(named_checkpoint(tmp_path, "best"), 100)
    assert named_checkpoint(tmp_path, "latest").path == again
    assert_is(named_checkpoint(tmp_path, "300"), 300)
    assert named_checkpoint(tmp_path, 200).path == again
    assert named_checkpoint(tmp_path, "step_000000000200").path == tmp_path / "step_000000000200"
    for name in ("400", "step_000000000400", "..", "../checkpoints", ".tmp-1", "newest"):
        with pytest.raises(UserError, match=r"step_000000000300, step_000000000200-2"):
            named_checkpoint(tmp_path, name)


def test_a_name_that_points_at_a_damaged_checkpoint_does_not_fall_back(tmp_path):
    save(tmp_path, 100)
    damage(save(tmp_path, 200))
    with pytest.raises(UserError, match="step_000000000200 was not loaded"):
        named_checkpoint(tmp_path, "latest")
    with pytest.raises(UserError, match="no checkpoint 'best'"):
        named_checkpoint(tmp_path, "best")


def test_only_a_checkpoint_of_the_folder_can_be_best(tmp_path):
    mine, other = save(tmp_path / "a", 100), save(tmp_path / "b", 100)
    for path in (other, mine / "manifest.json", mine.with_name("step_000000000999")):
        with pytest.raises(ValueError, match="no checkpoint of"):
            mark_best(tmp_path / "a", path)
    assert not (tmp_path / "a" / "best").exists()


def test_pruning_keeps_the_last_and_the_best_and_sweeps_leftovers(tmp_path):
    paths = [save(tmp_path, step) for step in (100, 200, 300, 400, 500)]
    mark_best(tmp_path, paths[1])
    (tmp_path / ".tmp-abc").mkdir()
    (tmp_path / ".tmp-abc" / "policy.safetensors").touch()
    (tmp_path / ".tmp-def").touch()
    assert prune_checkpoints(tmp_path, keep_last=2) == (paths[2], paths[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        "latest",
        "step_000000000200",
        "step_000000000400",
        "step_000000000500",
    ]
    assert_is(named_checkpoint(tmp_path, "best"), 200)
    assert prune_checkpoints(tmp_path, keep_last=2) == ()


def test_pruning_counts_on_sound_checkpoints_only(tmp_path):
    paths = [save(tmp_path, step) for step in (100, 200, 300, 400, 500)]
    damage(paths[4])
    (paths[2] / "state.json").unlink()
    assert prune_checkpoints(tmp_path, keep_last=2) == (paths[2], paths[0])
    assert_is(newest_checkpoint(tmp_path), 400)
    assert_is(load_checkpoint(paths[1]), 200)
    assert paths[4].exists()


@pytest.mark.parametrize("best", [True, False])
def test_what_a_killed_save_has_left_undone_is_done(tmp_path, best):
    paths = [save(tmp_path, step) for step in (100, 200, 300)]
    mark_best(tmp_path, paths[0])
    (tmp_path / "latest").write_text("step_000000000200\n")
    (tmp_path / ".tmp-abc").mkdir()
    finish_save(tmp_path, newest_checkpoint(tmp_path), keep_last=1, best=best)
    left = contents_of(tmp_path)
    kept = {"latest", "best", paths[2].name, *([] if best else [paths[0].name])}
    assert {name.split("/")[0] for name in left} == kept
    assert (left["latest"], left["best"]) == (b"step_000000000300\n", f"{paths[2 if best else 0].name}\n".encode())
    finish_save(tmp_path, newest_checkpoint(tmp_path), keep_last=1, best=best)
    assert contents_of(tmp_path) == left


def test_nothing_is_moved_or_deleted_where_a_newer_checkpoint_is_damaged(tmp_path):
    damage([save(tmp_path, step) for step in (100, 200, 300)][2])
    before = contents_of(tmp_path)
    finish_save(tmp_path, newest_checkpoint(tmp_path), keep_last=1, best=True)
    assert contents_of(tmp_path) == before


@pytest.mark.parametrize("broken", ["every checkpoint", "best"])
def test_pruning_deletes_nothing_if_it_cannot_know_what_to_keep(tmp_path, broken):
    paths = [save(tmp_path, step) for step in (100, 200, 300)]
    if broken == "best":
        (tmp_path / "best").write_text("step_")
    else:
        for path in paths:
            damage(path)
    with pytest.raises(UserError):
        prune_checkpoints(tmp_path, keep_last=1)
    assert all(path.exists() for path in paths)


# --------------------------------------------------------------------------- disks that fail, kills

EFFECTS = ("mkdir", "fsync", "rename", "replace")


def before_effect(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[str]:
    """Call `act(number)` before each effect on the disk; return the growing list of their names."""
    seen: list[str] = []

    def wrap(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            act(len(seen))
            return original(*arguments, **options)

        return wrapped

    for name in EFFECTS:
        monkeypatch.setattr(os, name, wrap(name))
    return seen


def count_of_effects(tmp_path: Path) -> int:
    """The number of effects of saving into a folder that has a checkpoint, which is also made here."""
    save(tmp_path, 100)
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = before_effect(monkeypatch, lambda number: None)
        save_checkpoint(tmp_path, 50, some_tensors(), {})
    assert {"mkdir", "fsync", "rename", "replace"} == set(seen)
    shutil.rmtree(tmp_path / "step_000000000050")
    (tmp_path / "latest").write_text("step_000000000100\n")
    return len(seen)


def test_nothing_gets_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """What a power cut would take: an fsync that is missing shows in no other test."""
    flushed: set[int] = set()
    checked: list[str] = []
    originals = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(descriptor: int) -> None:
        originals["fsync"](descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def naming(name: str) -> Callable[[Any, Any], None]:
        def named(source: Any, target: Any) -> None:
            parts = [Path(source), *Path(source).rglob("*")]
            assert {part.stat().st_ino for part in parts} <= flushed
            # An earlier rename in this folder must be on the disk before `latest` relies on it.
            assert not checked or tmp_path.stat().st_ino in flushed
            originals[name](source, target)
            flushed.discard(tmp_path.stat().st_ino)
            checked.append(Path(target).name)

        return named

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, naming(name))
    save(tmp_path, 100)
    assert checked == ["step_000000000100", "latest"]
    assert tmp_path.stat().st_ino in flushed


def test_a_disk_that_fails_at_any_point_leaves_what_was_there(tmp_path):
    effects = count_of_effects(tmp_path)
    before = contents_of(tmp_path / "step_000000000100")

    for failing in range(1, effects + 1):

        def fail(number: int, failing: int = failing) -> None:
            if number == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.MonkeyPatch.context() as monkeypatch:
            before_effect(monkeypatch, fail)
            with pytest.raises(UserError, match="No space left on device"):
                save(tmp_path, 200)
        assert not list(tmp_path.glob(".tmp-*"))
        assert contents_of(tmp_path / "step_000000000100") == before
        newest = newest_checkpoint(tmp_path)
        assert newest.skipped == ()
        assert_is(newest, newest.step)
        shutil.rmtree(tmp_path / "step_000000000200", ignore_errors=True)
        (tmp_path / "latest").write_text("step_000000000100\n")
    assert_is(load_checkpoint(save(tmp_path, 200)), 200)  # tried again later, it succeeds


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_point_leaves_the_old_checkpoint_or_the_new(tmp_path):
    effects = count_of_effects(tmp_path)
    seen: set[int] = set()
    for fatal in range(1, effects + 2):
        process = os.fork()
        if process == 0:  # dies as by SIGKILL: no handler, no finally, no flush

            def die(number: int, fatal: int = fatal) -> None:
                if number == fatal:
                    os._exit(9)

            try:
                before_effect(pytest.MonkeyPatch(), die)
                save(tmp_path, 200)
                os._exit(0)
            finally:
                os._exit(1)  # an error must not go on as a second pytest
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status == (9 if fatal <= effects else 0)
        newest = newest_checkpoint(tmp_path)
        assert newest.skipped == ()
        assert_is(newest, newest.step)
        seen.add(newest.step)
        prune_checkpoints(tmp_path, keep_last=9)
        assert not list(tmp_path.glob(".tmp-*"))
        shutil.rmtree(tmp_path / "step_000000000200", ignore_errors=True)
        (tmp_path / "latest").write_text("step_000000000100\n")
    assert seen == {100, 200}


def test_a_disk_that_is_too_full_is_refused_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 100)
    before = contents_of(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=30_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 41\.\d MB .* and 30\.0 MB are free"):
        save_checkpoint(tmp_path, 200, {"policy": {"weight": torch.zeros(10_000_000)}}, {})
    assert contents_of(tmp_path) == before


def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    before_effect(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 100)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_readable_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=str(tmp_path / "file" / "checkpoints")):
        save(tmp_path / "file" / "checkpoints", 1)


def test_a_disk_that_refuses_to_say_what_latest_is_ends_no_run(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {}, {})
    real = Path.stat

    def stat(path: Path, **named: Any) -> os.stat_result:
        if path.name == "latest":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, **named)

    monkeypatch.setattr(Path, "stat", stat)
    path = save_checkpoint(tmp_path, 2, {}, {})
    finish_save(tmp_path, newest_checkpoint(tmp_path), keep_last=1)
    assert path.exists()
