"""Reports of runs whose files hold what no run of ours writes, and a live page that is asked for too much."""

import json
import os
import socket
import threading

import pytest

from proximo.report.dashboard import MOST_CONNECTIONS, Dashboard
from proximo.report.folder import is_report
from proximo.report.report import write_report
from proximo.runs.directory import RunDirectory
from tests.report.samples import make_run, rows
from tests.test_cli import said_by


def rewritten(run, change):
    """Change the last row as it stands in the file."""
    lines = run.metrics_path.read_text().splitlines()
    lines[-1] = change(lines[-1])
    run.metrics_path.write_text("\n".join(lines) + "\n")
    return run


@pytest.mark.parametrize("name", ["return_mean", "env_steps", "n_episodes", "seconds", "approx_kl", "iteration"])
@pytest.mark.parametrize("value", ["1" + 400 * "0", "1e400", '"x"', "[1]", "{}", "null"])
def test_a_number_that_is_none_is_taken_for_unknown(tmp_path, name, value):
    def change(line):
        return json.dumps(json.loads(line) | {name: "HERE"}).replace('"HERE"', value)

    report = write_report([rewritten(make_run(tmp_path / "run", rows(40)), change)], with_pictures=False)
    assert "40 iterations" in report.text
    assert report.page.stat().st_size > 10_000


def test_settings_that_are_no_numbers_are_taken_for_unknown(tmp_path):
    run = make_run(tmp_path / "run", rows(20))
    for value in ("nan", "inf", "[1]"):
        text = run.config_path.read_text()
        for name in ("seed", "total_steps"):
            lines = [f"{name} = {value}" if line.startswith(f"{name} =") else line for line in text.splitlines()]
            run.config_path.write_text("\n".join(lines) + "\n")
            assert write_report([run], with_pictures=False).page.exists()


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
def test_a_folder_whose_name_is_no_text_is_reported_with_pictures(tmp_path):
    run = make_run(tmp_path / "run", rows(20))
    odd = tmp_path / os.fsdecode(b"x\xff")
    run.path.rename(odd)
    assert write_report([RunDirectory(odd)]).pictures


def test_comparing_all_of_a_folder_twice_leaves_the_first_report_out(tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        make_run(tmp_path / "runs" / name, rows(20))
    monkeypatch.chdir(tmp_path)
    assert said_by(capsys, "report", "runs/a", "runs/b")[0] == 0
    named = sorted(map(str, (tmp_path / "runs").iterdir()))
    assert [is_report(path) for path in sorted((tmp_path / "runs").iterdir())] == [False, False, True]
    code, _, error = said_by(capsys, "report", *named)
    assert (code, "left out, since they are reports" in error) == (0, True)
    code, _, error = said_by(capsys, "report", named[-1])
    assert (code, "is not a run" in error) == (2, True)


class TestLivePage:
    @pytest.fixture
    def server(self, tmp_path):
        server = Dashboard(make_run(tmp_path / "run", rows(20)), None, 0)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()
        server.server_close()

    def said(self, server, request):
        with socket.create_connection(server.server_address, timeout=20) as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    @pytest.mark.parametrize(
        ("request_line", "status"),
        [
            (b"GET http://[bad/ HTTP/1.0", b"400"),
            (b"POST / HTTP/1.0", b"501"),
            (b"HEAD / HTTP/1.0", b"501"),
        ],
    )
    def test_what_it_does_not_do_is_refused_in_plain_words(self, server, request_line, status):
        answer = self.said(server, request_line + b"\r\nHost: localhost\r\n\r\n")
        assert answer.split(b" ", 2)[1] == status
        assert b"text/plain" in answer
        assert b"nosniff" in answer
        assert b"<html" not in answer.lower()

    def test_connections_beyond_the_most_are_closed_and_room_is_made_again(self, server):
        held = [socket.create_connection(server.server_address, timeout=20) for _ in range(MOST_CONNECTIONS)]
        with socket.create_connection(server.server_address, timeout=20) as one_more:
            assert one_more.recv(10) == b""
        for connection in held:
            connection.close()
        for _ in range(200):
            try:
                answer = self.said(server, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
            except ConnectionError:
                answer = b""
            if answer:
                break
            threading.Event().wait(0.05)
        assert b" 200 " in answer[:20]
