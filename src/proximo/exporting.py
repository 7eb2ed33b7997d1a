"""Export: a policy as one file that runs without Proximo (`proximo export`, `proximo.export`).

The file takes raw observations and gives actions and values in the environment's own units: normalizer, networks,
action masks and the way to the action space are inside. ONNX files run in ONNX Runtime and whatever else reads ONNX,
`.pt2` files with torch alone. Every file is tried before it gets its name (`export_check.py`).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

import proximo
from proximo.collect.envs import close_quietly
from proximo.collect.make import Env
from proximo.collect.packed_env import PackedEnv
from proximo.errors import UserError, one_of
from proximo.export_check import (
    ROUNDINGS,
    TOLERANCE,
    Arrays,
    Given,
    answers,
    differences,
    how_many,
    joined,
    observations_drawn,
    observations_played,
    rounding,
)
from proximo.models.control import ActorCritic
from proximo.models.graph import PolicyGraph, Port
from proximo.models.packing import PackedActions, PackedObservations
from proximo.models.spaces import space_to_json
from proximo.runs import files
from proximo.runs.checkpoint import Checkpoint
from proximo.runs.directory import RunDirectory, open_run, read_config
from proximo.saved_run import make_for, open_policy, run_environment, skipped_in_words
from proximo.training.agents_config import AgentsConfig
from proximo.training.config import ControlConfig
from proximo.training.evaluate import check_same_spaces

Format = Literal["onnx", "torch"]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch": ".pt2"}
METADATA_KEY = "proximo"
"""Of ONNX's metadata_props; in a .pt2 it is the extra file `proximo.json`."""
EXTRA_FILE = "proximo.json"
LARGEST_ONNX = 2**31 - 2**20
"""Bytes of weights: an ONNX file is one protobuf message, and those end at 2 GiB."""


@dataclass(frozen=True)
class Export:
    """A file that was written, and how it was checked."""

    path: Path
    format: Format
    step: int
    """Environment steps of the checkpoint."""
    inputs: tuple[dict[str, Any], ...]
    """Name, shape and dtype of each, and what it is."""
    outputs: tuple[dict[str, Any], ...]
    differences: dict[str, float]
    """The largest difference from the policy, by output; what of is told in `export_check.py`."""
    allowed: dict[str, float]
    """What each might be: 1e-6, or more where float32 itself is less exact than that."""
    observations: int
    """How many it was checked on,"""
    from_episodes: int
    """and how many of these came from episodes."""
    notes: tuple[str, ...] = ()
    """What should be known of the file."""


def export(
    run: Any,
    *,
    format: Format = "onnx",
    output: str | Path | None = None,
    checkpoint: str = "latest",
    env: Env | None = None,
    allow_import: bool = False,
) -> Export:
    """Write the deterministic policy of a run to a file that needs no Proximo, and check the file.

    Args:
        run: the run, or its directory.
        format: `onnx`, or `torch` for a program of `torch.export` (.pt2).
        output: the file; by default `policy.onnx` or `policy.pt2` in the run.
        checkpoint: `latest`, `best`, or the step of one.
        env: the environment to check it in, where the run's own name for it is not a registered Gymnasium id.
        allow_import: import the file or module that the run names as its environment; only for runs of your own.

    Raises:
        UserError: if there is no such run, checkpoint or format, something is not installed, the file cannot be
            written, or it does not do what the policy does; then there is no new file.
    """
    directory = open_run(getattr(run, "path", run))
    check_wanted(directory, format)
    config, policy, found = open_policy(directory, checkpoint)
    if found.skipped:
        warnings.warn(skipped_in_words(found), stacklevel=2)
    return export_opened(
        directory, config, policy, found, format=format, output=output, env=env, allow_import=allow_import
    )


def check_wanted(directory: RunDirectory, format: str) -> None:
    """Refuse what need not be begun.

    Raises:
        UserError: for an unknown format, a language run, or packages that are not installed.
    """
    one_of("format", format, get_args(Format))
    stage = read_config(directory).get("stage")
    if stage is not None:
        raise UserError(
            f"{directory.path} is a language run ({stage}): its result is already a folder that transformers loads by "
            "from_pretrained, and that other programs convert. There is nothing to export."
        )
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.\n"
            'Install it with: pip install -c constraints.txt -e ".[export]", or use --format torch, which needs '
            "nothing more."
        )


def export_opened(
    directory: RunDirectory,
    config: ControlConfig,
    policy: ActorCritic,
    found: Checkpoint,
    *,
    format: Format,
    output: str | Path | None,
    env: Env | None,
    allow_import: bool,
) -> Export:
    """`export` with what `open_policy` returned."""
    if isinstance(config, AgentsConfig):
        raise UserError(
            f"{directory.path} is a run of several agents, whose policies are not exported yet. Load them in Python: "
            f"proximo.load({str(directory.path)!r})."
        )
    path = _target(directory, format, output)
    notes = []
    if policy.config.precision != "float32":
        policy.config = replace(policy.config, precision="float32")
        notes.append("The run worked images through in bfloat16; the file computes in float32, and was compared so.")
    graph = PolicyGraph(policy).eval()
    given, n_played, said = _tried_on(graph, config, env, allow_import=allow_import)
    notes += said
    described = _described(graph, config, found)
    temporary = files.temporary_beside(path).with_suffix(SUFFIXES[format])
    try:
        try:
            with _quiet():
                write = _write_onnx if format == "onnx" else _write_torch
                write(graph, temporary, json.dumps(described))
                run_file = _opened_onnx(temporary) if format == "onnx" else _opened_torch(temporary)
            files.sync_file(temporary)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {files.reason(error)}. Choose another --output.") from error
        apart, allowed = compared(graph, given, run_file, path)
        temporary.replace(path)
        files.sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    n = len(next(iter(given.inputs.values())))
    ports = (tuple(described["inputs"]), tuple(described["outputs"]))
    return Export(path, format, found.step, *ports, apart, allowed, n, n_played, tuple(notes))


def compared(
    graph: PolicyGraph, given: Given, run_file: Callable[[Arrays], Arrays], path: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """The largest difference between file and policy by output, and what it might be.

    The first observation goes alone, the others together: a file must take batches of any size.

    Raises:
        UserError: if a difference is larger than that.
    """
    wanted = answers(graph, graph.policy, given)
    one, rest = (
        run_file({name: array[rows] for name, array in given.inputs.items()}) for rows in (slice(1), slice(1, None))
    )
    try:
        found = {name: np.concatenate([one[name], rest[name]]) for name in one}
        apart = differences(graph, given, wanted, found)
    except (UserError, KeyError, ValueError) as error:
        raise UserError(f"{path} was not written: the exported file is not like the policy: {error}.") from error
    own = rounding(graph, given, wanted)
    allowed = {name: max(TOLERANCE, ROUNDINGS * own[name]) for name in apart}
    for name, far in apart.items():
        worst = int(far.argmax())
        if not far[worst] <= allowed[name]:
            raise UserError(
                f"{path} was not written: its {name} differs from the policy's by {far[worst]:.3g} (of the action's "
                f"range, the value, or nats), and may by {allowed[name]:.3g}. The worst of {len(far)} observations is "
                f"number {worst}: {_short(wanted[name][worst])} became {_short(found[name][worst])}. This is a fault "
                "of the export, not of your run; please report it, with the output of proximo doctor."
            )
    return {name: float(far.max()) for name, far in apart.items()}, allowed


def _short(value: np.ndarray) -> str:
    return np.array2string(value, precision=4, threshold=8).replace("\n", "")


def _target(directory: RunDirectory, format: Format, output: str | Path | None) -> Path:
    """Where the file goes.

    Raises:
        UserError: if that is no place for a file of this format.
    """
    suffix = SUFFIXES[format]
    path = directory.path / f"policy{suffix}" if output is None else files.expanded(output)
    if path.suffix != suffix:
        other = next((name for name, its in SUFFIXES.items() if its == path.suffix), None)
        mend = f"say --format {other}" if other else f"name it {path.name or 'policy'}{suffix}"
        raise UserError(f"--output is {path}; a file of --format {format} ends in {suffix}: {mend}.")
    try:
        if path.is_dir():
            raise UserError(f"--output is {path}, which is a folder. Name a file in it: {path / f'policy{suffix}'}")
        if not path.parent.is_dir():
            raise UserError(f"There is no folder {path.parent} to write {path.name} to. Make it, or choose another.")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise UserError(f"{path.parent} cannot be written to by this user. Choose another --output.")
    except OSError as error:
        raise UserError(f"--output is {path}, which cannot be written: {files.reason(error)}.") from error
    return path


def _tried_on(
    graph: PolicyGraph, config: ControlConfig, env: Env | None, *, allow_import: bool
) -> tuple[Given, int, list[str]]:
    """Observations to check the file on, how many are from episodes, and why if none is.

    Raises:
        UserError: if the environment was named by the caller, and cannot be played in.
    """
    n = how_many(graph)
    drawn = observations_drawn(graph, n, seed=0)
    try:
        played = _played(graph, config, env, n, allow_import=allow_import)
    except UserError as error:
        if env is not None:
            raise
        return joined(graph, drawn), 0, [f"Checked on observations drawn from the space alone: {error}"]
    return joined(graph, drawn, played), n, []


def _played(graph: PolicyGraph, config: ControlConfig, env: Env | None, n: int, *, allow_import: bool) -> Arrays:
    env_id, factory = run_environment(config, env, allow_import=allow_import)
    made = make_for(config, factory)
    try:
        check_same_spaces(env_id, made, graph.policy)
        return observations_played(graph, made.env if isinstance(made, PackedEnv) else made, n, seed=0)
    finally:
        close_quietly(env_id, [made])


# --- what the file says of itself -----------------------------------------------------------------------------------


def _described(graph: PolicyGraph, config: ControlConfig, found: Checkpoint) -> dict[str, Any]:
    """What stands in the file beside the graph, as JSON-able values."""
    policy = graph.policy
    seen, acts = policy.observation_space, policy.action_space
    return {
        "proximo": proximo.__version__,
        "env_id": config.environment.env_id,
        "env_steps": found.step,
        "algorithm": type(config.algorithm).__name__,
        "deterministic": True,
        "observation_space": space_to_json(seen.source if isinstance(seen, PackedObservations) else seen),
        "action_space": space_to_json(acts.source if isinstance(acts, PackedActions) else acts),
        "normalize_observations": policy.config.normalize_observations,
        "inputs": [_port_described(port, config) for port in graph.inputs],
        "outputs": [_port_described(port, config) for port in graph.outputs],
    }


def _port_described(port: Port, config: ControlConfig) -> dict[str, Any]:
    rewards = "the signs of rewards" if config.network.sign_rewards else "the environment's own rewards"
    units = {
        "observation": "raw, as the environment gives it",
        "action_mask": "0: impossible, else possible; one number per option of the action",
        "action": "the environment's own, as its step takes it",
        "value": f"{rewards}, discounted by {config.algorithm.gamma:g}",
        "memory": "zeros at the start of an episode, then next_memory of the step before",
    }
    told = {"name": port.name, "shape": ["batch", *port.shape], "dtype": str(port.dtype), "units": units[port.role]}
    return told | ({} if port.role in ("value", "memory") else {"role": port.role, "path": list(port.path)})


# --- the two formats ------------------------------------------------------------------------------------------------


def _example(graph: PolicyGraph) -> dict[str, torch.Tensor]:
    """Two observations of ones, to trace with; a dimension of one would be taken for fixed."""
    return {port.name: torch.from_numpy(np.ones((2, *port.shape), port.dtype)) for port in graph.inputs}


def _write_onnx(graph: PolicyGraph, path: Path, described: str) -> None:
    n_bytes = sum(weight.numel() * weight.element_size() for weight in graph.policy.parameters())
    if n_bytes > LARGEST_ONNX:
        raise UserError(
            f"The weights are {n_bytes / 1e9:.1f} GB, and an ONNX file holds 2 GB at most. Use --format torch."
        )
    example = _example(graph)
    program = torch.onnx.export(
        graph,
        (example, {}),  # a dict that came last would be taken for keywords
        input_names=[port.name for port in graph.inputs],
        output_names=[port.name for port in graph.outputs],
        dynamic_shapes={"given": {name: {0: "batch"} for name in example}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # where each line of the program was, by the paths of this machine
    program.model.metadata_props[METADATA_KEY] = described
    program.model.producer_name, program.model.producer_version = "proximo", proximo.__version__
    program.save(path, external_data=False)


def _opened_onnx(path: Path) -> Callable[[Arrays], Arrays]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run_file(inputs: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, inputs), strict=True))

    return run_file


def _write_torch(graph: PolicyGraph, path: Path, described: str) -> None:
    example = _example(graph)
    batch = torch.export.Dim("batch", min=1)
    shapes = {"given": {name: {0: batch} for name in example}}
    program = torch.export.export(graph, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # as above
    file = BytesIO()  # saved to a path, the folders in the archive would have the name of the temporary file
    torch.export.save(program, file, extra_files={EXTRA_FILE: described})
    path.write_bytes(file.getvalue())


def _opened_torch(path: Path) -> Callable[[Arrays], Arrays]:
    loaded: Any = torch.export.load(path).module()  # it unpickles; this is the file that was written just now

    def run_file(inputs: Arrays) -> Arrays:
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.no_grad():
            return {name: tensor.numpy() for name, tensor in loaded(given).items()}

    return run_file


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say to their developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def told(result: Export) -> dict[str, Any]:
    """An export as JSON-able values."""
    return asdict(result) | {"path": str(result.path)}
