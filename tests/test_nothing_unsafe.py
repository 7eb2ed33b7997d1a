"""The source holds no call that would let a stranger's file run code: what is allowed stands here, with its reason."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "proximo"

PICKLERS = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle", "yaml")
"""Modules of which no function at all may be called."""

BANNED = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "breakpoint",
    "importlib.import_module",
    "importlib.__import__",
    "importlib.util.spec_from_file_location",
    "runpy.run_path",
    "runpy.run_module",
    "code.interact",
    "os.system",
    "os.popen",
    "os.startfile",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "pty.spawn",
    "shutil.unpack_archive",
    "zipfile.ZipFile",
    "tarfile.open",
    "tarfile.TarFile",
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "numpy.memmap",
    "numpy.fromfile",
    "pandas.read_pickle",
    "socket.socket",
    "socket.create_server",
    "http.server.HTTPServer",
    "http.server.ThreadingHTTPServer",
    "socketserver.TCPServer",
    "multiprocessing.Manager",
    "multiprocessing.connection.Listener",
}
BANNED_METHODS = {"exec_module", "load_module", "extract", "extractall", "allow_pickle", "read_pickle", "import_module"}
"""Of whatever object: these names are not used for anything else here."""

PROCESSES = {
    "subprocess.Popen",
    "subprocess.run",
    "subprocess.call",
    "subprocess.check_call",
    "subprocess.check_output",
}

BANNED_ARGUMENTS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "use_safetensors": False}

OPEN_TO_ALL = {"0.0.0.0", "::", "INADDR_ANY"}  # noqa: S104  # what is looked for


class Use(NamedTuple):
    """A call that needs a reason."""

    file: str
    function: str
    call: str


MODULE, FILE = "importlib.import_module", "importlib.util.spec_from_file_location"
NAMED = "the module or file that the user's own command line names"
OWN_WORKERS = "pipes between our own processes; never to or from a file"

ALLOWED: dict[Use, str] = {
    Use("__init__.py", "__getattr__", MODULE): "a module of ours, by a table in the same file",
    Use("language.py", "stage_module", MODULE): "proximo.training.STAGE, of four stages",
    Use(
        "report/dashboard.py", "<module>", "http.server.ThreadingHTTPServer"
    ): "the live page: this machine alone, GET alone, four names, other Host headers refused",
    Use("report/video.py", "_mp4_encoder", MODULE): "imageio and imageio_ffmpeg, by their names",
    Use("collect/make.py", "_import_module", MODULE): NAMED,
    Use("collect/make.py", "_import_file", FILE): NAMED,
    Use("collect/make.py", "_import_file", "exec_module"): NAMED,
    Use("collect/reward_process.py", "_import_module", MODULE): NAMED,
    Use("collect/reward_process.py", "_import_file", FILE): NAMED,
    Use("collect/reward_process.py", "_import_file", "exec_module"): NAMED,
    Use(
        "converting/reading.py", "_yaml", "yaml.SafeLoader"
    ): "plain values alone, their number bounded before any is made",
    Use("converting/reading.py", "_yaml", "yaml.YAMLError"): "an exception, which is caught",
    Use("collect/worker_process.py", "find_spec", FILE): "the file that the parent process has imported already",
    Use("collect/worker_process.py", "make", "cloudpickle.dumps"): OWN_WORKERS,
    Use("collect/worker_process.py", "pack", "cloudpickle.dumps"): OWN_WORKERS,
    Use("collect/worker_process.py", "unpack", "cloudpickle.loads"): OWN_WORKERS,
    Use("collect/workers.py", "_start", "cloudpickle.loads"): OWN_WORKERS,
    Use("collect/rewards.py", "__init__", "subprocess.Popen"): "Python with a module of ours, as a list of words",
    Use("loggers/following.py", "__init__", "subprocess.Popen"): "Python with a module of ours, as a list of words",
    Use("doctor.py", "_tried", "subprocess.run"): "Python with a program of ours, as a list of words",
    Use(
        "collect/code_reward.py", "_own_folder", "subprocess.run"
    ): "rm of our own temporary folder, as a list of words",
    Use("collect/code_reward.py", "_run_command", "subprocess.Popen"): "the sandbox that the user names",
}


class Uses(ast.NodeVisitor):
    """Finds the calls of one module, by the names that its imports give."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.functions = ["<module>"]
        self.names: dict[str, str] = {}
        self.found: list[Use] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            first = alias.name.partition(".")[0]
            self.names[alias.asname or first] = alias.name if alias.asname else first

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.functions.append(node.name)
        self.generic_visit(node)
        self.functions.pop()

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_arg(self, node: ast.arg) -> None:
        """Annotations call nothing."""

    def visit_Constant(self, node: ast.Constant) -> None:
        if node.value in OPEN_TO_ALL:
            self._add(str(node.value))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._look_at(self._full_name(node))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._look_at(self._full_name(node))

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg in BANNED_ARGUMENTS and not self._is_safe(node.arg, node.value):
            self._add(f"{node.arg}={ast.unparse(node.value)}")
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            name = key.value if isinstance(key, ast.Constant) else None
            if name in BANNED_ARGUMENTS and not self._is_safe(str(name), value):
                self._add(f"{name}={ast.unparse(value)}")
        self.generic_visit(node)

    @staticmethod
    def _is_safe(name: str, value: ast.expr) -> bool:
        """Only a constant can be seen to be safe: a variable may hold anything."""
        return isinstance(value, ast.Constant) and value.value is (not BANNED_ARGUMENTS[name])

    def _full_name(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        return f"{self._full_name(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"

    def _look_at(self, name: str) -> None:
        """Any mention counts, not only a call: a function may be passed on and called elsewhere."""
        first, _, last = name.partition(".")[0], "", name.rpartition(".")[2]
        if name in BANNED | PROCESSES or (first in PICKLERS and "." in name):
            self._add(name)
        elif last in BANNED_METHODS and "." in name:
            self._add(last)

    def _add(self, call: str) -> None:
        self.found.append(Use(self.file, self.functions[-1], call))


def uses_in(text: str, file: str = "some.py") -> list[Use]:
    visitor = Uses(file)
    visitor.visit(ast.parse(text))
    return visitor.found


def all_uses() -> Iterator[Use]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield from uses_in(path.read_text(), path.relative_to(SOURCE).as_posix())


def test_every_such_call_is_allowed_by_name():
    assert sorted(set(all_uses()) - set(ALLOWED)) == []


def test_nothing_is_allowed_that_is_not_there():
    assert sorted(set(ALLOWED) - set(all_uses())) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import loads\nloads(b)",
        "from pickle import loads as read\nread(b)",
        "def f():\n    import cloudpickle\n    cloudpickle.loads(b)",
        "import dill\ndill.load(f)",
        "import joblib\njoblib.load(f)",
        "import shelve\nshelve.open(f)",
        "import marshal\nmarshal.loads(b)",
        "import yaml\nyaml.load(f)",
        "import torch\ntorch.load(f)",
        "from torch import load\nload(f)",
        "import torch\nread = torch.load",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, allow_pickle=wanted)",
        "eval(text)",
        "list(map(eval, texts))",
        "exec(text)",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module as bring\nbring(name)",
        "spec.loader.exec_module(module)",
        "import os\nos.system(text)",
        "from os import system\nsystem(text)",
        "import os\nos.popen(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import subprocess\nsubprocess.run(text, **{'shell': True})",
        "import zipfile\nzipfile.ZipFile(f).extractall()",
        "archive.extractall(folder)",
        "archive.extract(name)",
        "import tarfile\ntarfile.open(f)",
        "import shutil\nshutil.unpack_archive(f)",
        "load(f, trust_remote_code=True)",
        "load(f, trust_remote_code=wanted)",
        "load(f, **{'trust_remote_code': True})",
        "server.bind(('0.0.0.0', 80))",
        "import socket\nsocket.socket()",
        "from http.server import HTTPServer\nHTTPServer(('127.0.0.1', 0), Handler)",
    ],
)
def test_each_way_to_run_a_strangers_code_is_seen(text: str):
    assert uses_in(text)


@pytest.mark.parametrize(
    "text",
    [
        "import re\nre.compile(text)",
        "model.eval()",
        "import torch\ntorch.compile",
        "import safetensors.torch\nsafetensors.torch.load(data)",
        "load(f, trust_remote_code=False)",
        "import json\njson.loads(text)",
        "policy.evaluate(batch)",
    ],
)
def test_what_is_safe_is_left_alone(text: str):
    assert not uses_in(text)


def test_ruff_refuses_the_same_at_the_desk():
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    rules = {"S102", "S104", "S202", "S301", "S302", "S307", "S506", "S602", "S604", "S605", "TID251"}
    assert rules <= set(lint["select"])
    assert not rules & set(lint["ignore"])
    banned = set(lint["flake8-tidy-imports"]["banned-api"])
    wanted = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml", "zipfile", "tarfile", "runpy"}
    wanted |= {"torch.load", "torch.save", "torch.jit", "torch.hub", "torch.package", "shutil.unpack_archive"}
    assert wanted | {"importlib.__import__", "os.system", "os.popen"} <= banned
