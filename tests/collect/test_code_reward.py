"""Rewards that run programs: the score of a program, what a bad one cannot do, and sandboxes that are none.

The sandbox here is Python itself, which protects from nothing; every program is one of the tests' own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from proximo.collect import code_reward
from proximo.collect.code_reward import MOST_OUTPUT, CodeReward, program_in
from proximo.collect.data import DataNote
from proximo.collect.rewards import Scores, kind_of_reward
from proximo.errors import UserError
from tests.collect import scoring
from tests.collect.scoring import ended

NONE_AT_ALL = f"{sys.executable} {{file}}"

pytestmark = pytest.mark.filterwarnings("ignore::proximo.collect.data.DataNote")


def ask(source: CodeReward, *responses: str, tests: Any = "assert double(2) == 4") -> Scores:
    return scoring.ask(source, *responses, tests=[tests] * len(responses))


def fenced(text: str) -> str:
    return f"Here it is:\n```python\n{text}\n```\nI hope that it helps."


GOOD = "def double(x):\n    return 2 * x"


@pytest.fixture(scope="module")
def source() -> CodeReward:
    return CodeReward("code:tests", NONE_AT_ALL, timeout=20.0)


@pytest.fixture(scope="module")
def hasty() -> CodeReward:
    return CodeReward("code:tests", NONE_AT_ALL, timeout=1.0)


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("x = 1", "x = 1"),
        (fenced("x = 1\ny = 2"), "x = 1\ny = 2"),
        ("```\nfirst\n```\n```\nsecond\n```", "first"),
        ("```python\ncut off", "cut off"),
        ("1. So:\n   ```py\n   x = 1\n   ```\n", "x = 1"),
        ("````\n```\n````\n", "```"),
        ("```", ""),
        ("", ""),
    ],
)
def test_the_program_of_a_response_by_hand(response: str, program: str) -> None:
    assert program_in(response) == program


class TestScores:
    def test_of_programs_that_pass_fail_and_are_none(self, source: CodeReward) -> None:
        responses = [GOOD, fenced(GOOD), "def double(x):\n    return x", "no Python at all", "", "raise SystemExit(7)"]
        assert ask(source, *responses) == ([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [])
        assert ask(source) == ([], [])
        assert source.name == "code:tests"

    def test_an_end_before_the_tests_is_not_passed(self, source: CodeReward) -> None:
        ways = [
            "raise SystemExit(0)",
            "import os\nos._exit(0)",
            "import os\nos.close(1)\nos._exit(0)",
            "print(open(__file__).read())",
        ]
        assert ask(source, *ways).values == [0.0] * 4

    def test_tests_may_be_a_list_and_are_each_rows_own(self, source: CodeReward) -> None:
        values, _ = ask(source, GOOD, GOOD, GOOD, tests=["n = 2", "assert double(n) == 4"])
        assert values == [1.0] * 3
        each = {"tests": ["assert double(1) == 2", "assert double(1) == 3"]}
        assert source(["a", "b"], [GOOD, GOOD], each).values == [1.0, 0.0]

    def test_rows_whose_tests_cannot_be_run_have_no_score(self, source: CodeReward) -> None:
        for tests, said in ((None, "no tests"), ("", "no tests"), ([], "no tests"), ("assert (", "SyntaxError")):
            values, problems = ask(source, GOOD, GOOD, tests=tests)
            assert values == [None, None]
            assert said in problems[0]
        with pytest.raises(UserError, match=r"column 'tests'.*it has: test\).*Did you mean code:test\?"):
            source(["a"], [GOOD], {"test": ["assert True"]})

    def test_a_main_block_classes_and_odd_characters(self, source: CodeReward) -> None:
        program = (
            "from __future__ import annotations\nimport dataclasses, pickle\n@dataclasses.dataclass\nclass Pair:\n"
            "    a: int\n    b: str = '\u00fc \u2028'\nif __name__ == '__main__':\n    done = True\n"
        )
        tests = "assert pickle.loads(pickle.dumps(Pair(1))) == Pair(1)\nassert done and Pair(1).b == '\u00fc \u2028'"
        assert ask(source, program, tests=tests) == ([1.0], [])
        assert ask(source, "x = '\ud800'", "x = 1\0", tests="assert x").values == [0.0, 0.0]

    def test_the_environment_has_no_keys(self, source: CodeReward, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        tests = "import os\nassert 'PATH' in os.environ and 'secret' not in os.environ.values()"
        assert ask(source, "", tests=tests).values == [1.0]

    def test_each_has_a_folder_of_its_own_that_is_gone_afterwards(self, source: CodeReward, tmp_path: Path) -> None:
        seen = tmp_path / "seen"
        program = (
            f"import os\nopen({str(seen)!r}, 'a').write(os.getcwd() + '\\n')\nassert os.listdir() == ['program.py']\n"
            "for _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\n"
        )
        before = set(Path(tempfile.gettempdir()).glob("proximo-code-*"))
        assert ask(source, program, program, tests="pass").values == [1.0, 1.0]
        folders = seen.read_text().split()
        assert len(set(folders)) == 2
        assert set(Path(tempfile.gettempdir()).glob("proximo-code-*")) <= before


class TestMisbehaviour:
    @pytest.mark.parametrize(
        "program",
        [
            "while True: pass",
            "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
            "import os, time\nos.close(1); os.close(2)\ntime.sleep(60)",
        ],
        ids=["busy", "deaf", "silent"],
    )
    def test_a_hang_is_stopped_and_has_not_passed(self, hasty: CodeReward, program: str) -> None:
        began = time.monotonic()
        assert ask(hasty, program) == ([0.0], [])
        assert time.monotonic() - began < 8

    def test_all_that_it_has_started_is_killed(self, hasty: CodeReward, tmp_path: Path) -> None:
        pids = tmp_path / "pids"
        start = "import subprocess, time\npid = subprocess.Popen(['sleep', '60']).pid\n"
        start += f"open({str(pids)!r}, 'a').write(f'{{pid}} ')\n"
        began = time.monotonic()  # the first leaves a child behind that holds its output open
        assert ask(hasty, start, start + "time.sleep(60)", tests="pass").values == [1.0, 0.0]
        assert time.monotonic() - began < 8
        assert all(ended(int(pid)) for pid in pids.read_text().split())

    def test_gigabytes_of_output_fill_nothing(self, source: CodeReward, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[int] = []
        real = code_reward._watch

        def watching(process: Any, output: bytearray, *more: Any) -> str:
            ending = real(process, output, *more)
            sizes.append(len(output))
            return ending

        monkeypatch.setattr(code_reward, "_watch", watching)
        began = time.monotonic()
        endless = "import os\nwhile True: os.write(1, b'x' * 2**16)"
        assert ask(source, endless, endless.replace("1,", "2,"), "print('x' * 2**19)", tests="pass").values == [0, 0, 1]
        assert time.monotonic() - began < 15
        assert max(sizes) <= MOST_OUTPUT + 2**16

    def test_forks_and_crashes_end_with_the_program(self, hasty: CodeReward) -> None:
        forks = "import os, time\nfor _ in range(6): os.fork()\ntime.sleep(60)"
        assert ask(hasty, forks, "import os\nos.abort()", "(" * 5000, tests="pass").values == [0.0] * 3

    def test_as_many_run_at_a_time_as_there_are_cores(
        self, source: CodeReward, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(code_reward, "n_cores", lambda: 4)
        program = "import time\ntime.sleep(1.0)"
        began = time.monotonic()
        assert ask(source, *[program] * 4, tests="pass").values == [1.0] * 4
        assert time.monotonic() - began < 3.5

    def test_an_interrupt_does_not_wait_for_programs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = CodeReward("code:tests", NONE_AT_ALL, timeout=60.0)

        def interrupted(results: Any) -> Scores:
            time.sleep(0.5)
            raise KeyboardInterrupt

        monkeypatch.setattr(Scores, "of", staticmethod(interrupted))
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ask(source, *["import time\ntime.sleep(60)"] * 5)
        assert time.monotonic() - began < 10
        monkeypatch.undo()
        assert ask(source, GOOD).values == [1.0]


class TestSandboxes:
    def test_none_is_refused_with_an_example(self) -> None:
        for sandbox in ("", "  "):
            with pytest.raises(UserError, match="programs that the model writes") as caught:
                CodeReward("code:tests", sandbox)
            assert f'--sandbox "{code_reward.EXAMPLE}"' in str(caught.value)

    @pytest.mark.parametrize(
        ("sandbox", "said"),
        [
            ("no_such_sandbox {file}", "'no_such_sandbox', and there is no such program here"),
            ("/no/such/sandbox {file}", "there is no such program here"),
            ("python3 '{file}", "cannot be split into words"),
            ("python3", "neither {file} nor {folder}"),
            ("true {file}", "of a trial program that passes"),
            ("false {file}", "of a trial program that passes its tests, this came: exit code 1"),
            ("cat {file}", "of a trial program that passes"),
            (f"{sys.executable} -O {{file}}", "of a trial program that fails its tests"),
            ("sh -c 'echo cannot start; exit 125' {file}", r"exit code 125 (cannot start)"),
            ("{folder}", "there is no such program here"),
        ],
    )
    def test_what_is_none_is_found_before_training(self, sandbox: str, said: str) -> None:
        with pytest.raises(UserError) as caught:
            CodeReward("code:tests", sandbox.replace("{python}", sys.executable))
        assert said in str(caught.value)

    def test_one_that_hangs_is_found_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(code_reward, "START_SECONDS", 0.5)
        with pytest.raises(UserError, match=r"stopped after 0.5 s"):
            CodeReward("code:tests", "sh -c 'sleep 60' {file}", timeout=0.5)

    def test_one_that_breaks_later_gives_no_scores(self, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        sandbox = f"sh -c 'test -e {broken} && exit 126; exec {sys.executable} {{folder}}/program.py'"
        source = CodeReward("code:tests", sandbox)
        assert ask(source, GOOD, "") == ([1.0, 0.0], [])
        broken.touch()
        values, problems = ask(source, GOOD, "")
        assert values == [None, None]
        assert "did not begin the program" in problems[0]
        assert "exit code 126" in problems[0]
        broken.unlink()
        assert ask(source, "raise SystemExit(126)").values == [0.0]  # the program's own

    def test_no_room_for_another_process_gives_no_scores(
        self, source: CodeReward, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*arguments: Any, **named: Any) -> Any:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(code_reward.subprocess, "Popen", full)
        values, problems = ask(source, GOOD)
        assert values == [None]
        assert "Resource temporarily unavailable" in problems[0]

    def test_one_that_protects_no_files_is_told(self) -> None:
        with pytest.warns(DataNote, match="lets programs write files outside"):
            CodeReward("code:tests", NONE_AT_ALL)
        safe = f"{sys.executable} -c 'import sys, builtins, io; code = io.open(sys.argv[1]).read(); del io.open; "
        safe += "del builtins.open; builtins.open = lambda *a: (_ for _ in ()).throw(OSError()); exec(code)' {file}"
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataNote)
            assert ask(CodeReward("code:tests", safe), GOOD).values == [1.0]

    @pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), 1e9])
    def test_an_impossible_limit(self, timeout: float) -> None:
        with pytest.raises(UserError, match="sandbox_timeout is"):
            CodeReward("code:tests", NONE_AT_ALL, timeout=timeout)

    def test_the_example_of_the_message_works_where_it_is_installed(self) -> None:
        works = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
        if shutil.which("bwrap") is None or subprocess.run(works, capture_output=True).returncode:
            pytest.skip("needs bwrap, and leave to use it")
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataNote)
            source = CodeReward("code:tests", code_reward.EXAMPLE)
        network = "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)"
        assert ask(source, fenced(GOOD), "x = 1", "open('/etc/passwd')", network).values == [1.0, 0.0, 0.0, 0.0]


def test_the_kind_of_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kinds: list[tuple[str, str]] = [("code:tests", "code"), ("code.py:score", "function"), ("coder:score", "function")]
    assert [kind_of_reward(place) for place, _ in kinds] == [kind for _, kind in kinds]
    for place in ("code", "code:"):
        with pytest.raises(UserError, match="Name the column"):
            kind_of_reward(place)
