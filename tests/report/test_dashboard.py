"""The live page: what is served and to whom, that it follows the run, and that the run does not mind it."""

import http.client
import json
import socket
import threading

import pytest

from proximo.errors import UserError
from proximo.report import dashboard
from proximo.report.dashboard import Dashboard, new_lines, serving
from proximo.runs.metrics import append_metrics
from tests.browser import opened
from tests.report.language_samples import align_rows, make_language_run
from tests.report.samples import make_run, rows
from tests.report.test_page_in_browser import Seen, number_in
from tests.test_cli import said_by


@pytest.fixture
def served():
    """Serve a run; return what to ask with."""
    servers = []

    def start(run):
        server = Dashboard(run, None, 0)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(server, path, method="GET", **headers):
    """The status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


# --- lines ------------------------------------------------------------------------------------------------------------


def test_new_lines_are_whole_and_begin_where_they_are_asked_for(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert new_lines(path, 0) == (0, b"", 0)
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": ')
    assert new_lines(path, 0) == (0, b'{"a": 1}\n{"a": 2}\n', 18)
    assert new_lines(path, 9) == (9, b'{"a": 2}\n', 18)
    assert new_lines(path, 18) == (18, b"", 18)
    assert new_lines(path, 1000) == (0, b'{"a": 1}\n{"a": 2}\n', 18)  # it was longer once
    assert new_lines(path, -5)[0] == 0


def read_in_parts(path):
    found, offset = b"", 0
    while (part := new_lines(path, offset))[2] > offset:
        assert len(part[1]) <= dashboard.MOST_BYTES
        found, offset = found + part[1], part[2]
    return found


def test_long_files_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(dashboard, "MOST_BYTES", 20)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(b'{"a": %d}\n' % k for k in range(10, 20)))
    assert read_in_parts(path) == path.read_bytes()


@pytest.mark.parametrize("length", [20, 21, 39, 40, 41, 500])
def test_a_line_longer_than_an_answer_is_passed_over(tmp_path, monkeypatch, length):
    monkeypatch.setattr(dashboard, "MOST_BYTES", 20)
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * length + b'\n{"a": 2}\n')
    assert read_in_parts(path) == b'{"a": 1}\n{"a": 2}\n'
    path.write_bytes(b"x" * length)  # not yet whole: its end is waited for
    assert new_lines(path, 0) == (0, b"", 0)


# --- answers ----------------------------------------------------------------------------------------------------------


class TestServer:
    def test_gives_the_page_its_summary_and_its_lines(self, tmp_path, served):
        run = make_run(tmp_path / "run", rows(20))
        server = served(run)
        status, headers, page = ask(server, "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert b"connect-src &#39;self&#39;" in page
        assert b'"live":true' in page
        assert b"final return" in ask(server, "/summary")[2]
        _, headers, lines = ask(server, "/metrics?from=0")
        assert lines == run.metrics_path.read_bytes()
        assert (headers["X-From"], headers["X-Next"]) == ("0", str(len(lines)))
        append_metrics(run.metrics_path, {"iteration": 21})
        assert ask(server, f"/metrics?from={headers['X-Next']}")[2] == b'{"iteration": 21}\n'
        assert ask(server, "/samples")[2] == b""

    @pytest.mark.parametrize(
        "path", ["/config.toml", "/../config.toml", "/metrics.jsonl", "//etc/passwd", "/%2e%2e/x", "/checkpoints/", "*"]
    )
    def test_gives_nothing_else(self, tmp_path, served, path):
        status, _, body = ask(served(make_run(tmp_path / "run", rows(3))), path)
        assert status in (400, 404)
        assert b"env_id" not in body

    @pytest.mark.parametrize(
        "query", ["from=x", "from=-1", "from=9999999999999999999999", "from=", "from=%00", "x" * 3000]
    )
    def test_takes_what_is_no_offset_for_the_beginning(self, tmp_path, served, query):
        run = make_run(tmp_path / "run", rows(3))
        status, _, lines = ask(served(run), f"/metrics?{query}")
        assert (status, lines) == (200, run.metrics_path.read_bytes())

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil.example:1", "localhost:1:2", ""],
    )
    def test_refuses_other_names_of_itself(self, tmp_path, served, host):
        status, _, body = ask(served(make_run(tmp_path / "run", rows(3))), "/metrics", Host=host)
        assert status == 403
        assert b"iteration" not in body

    @pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:9000", "[::1]:9000", "LocalHost:80"])
    def test_answers_to_a_port_that_is_forwarded(self, tmp_path, served, host):
        server = served(make_run(tmp_path / "run", rows(3)))
        assert ask(server, "/metrics", Host=host)[0] == 200

    def test_listens_to_this_machine_alone(self, tmp_path, served):
        server = served(make_run(tmp_path / "run", rows(3)))
        assert server.server_address[0] == "127.0.0.1"

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
    def test_answers_get_alone(self, tmp_path, served, method):
        assert ask(served(make_run(tmp_path / "run", rows(3))), "/", method)[0] == 501

    def test_says_nothing_on_standard_error(self, tmp_path, served, capfd):
        server = served(make_run(tmp_path / "run", rows(3)))
        ask(server, "/")
        with socket.create_connection(("127.0.0.1", server.server_address[1])) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n")  # and gone
        assert ask(server, "/nothing")[0] == 404
        assert capfd.readouterr().err == ""

    def test_a_damaged_file_is_told_and_not_the_end(self, tmp_path, served):
        run = make_run(tmp_path / "run", rows(3))
        server = served(run)
        run.metrics_path.write_text("x\n")
        assert ask(server, "/summary")[0] == 500
        run.metrics_path.write_text("")
        assert ask(server, "/summary")[0] == 200

    def test_summaries_cost_a_small_share_of_the_time(self, tmp_path, served, monkeypatch):
        server = served(make_run(tmp_path / "run", rows(3)))
        first = ask(server, "/summary")[2]
        monkeypatch.setattr(Dashboard, "record", lambda self: pytest.fail("read too soon"))
        assert ask(server, "/summary")[2] == first


class TestServing:
    def test_ends_with_the_block(self, tmp_path, capsys):
        with serving(make_run(tmp_path / "run", rows(3)), 0, None):
            address = capsys.readouterr().err.split()[1]
            port = int(address.rstrip("/").rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)):
                pass
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port))

    def test_takes_another_port_where_one_is_taken(self, tmp_path, capsys):
        run = make_run(tmp_path / "run", rows(3))
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with serving(run, port, None):
                said = capsys.readouterr().err
        assert f"port {port} cannot be used" in said
        assert "dashboard   http://127.0.0.1:" in said

    def test_goes_on_without_where_there_is_none(self, tmp_path, capsys, monkeypatch):
        def refuse(*_):
            raise OSError(1, "not today")

        monkeypatch.setattr(dashboard, "Dashboard", refuse)
        with serving(make_run(tmp_path / "run", rows(3)), 0, None):
            pass
        assert "there is no dashboard, for no port can be used (not today)" in capsys.readouterr().err


# --- commands ---------------------------------------------------------------------------------------------------------

TRAIN = ("train", "CartPole-v1", "--total-steps", "512", "--vectorization", "serial", "--quiet", "--json")


def test_training_says_where_the_dashboard_is_and_ends(tmp_path, capsys):
    code, out, error = said_by(capsys, *TRAIN, "--run-dir", str(tmp_path / "run"), "--dashboard")
    assert (code, json.loads(out)["env_steps"]) == (0, 512)
    assert "dashboard   http://127.0.0.1:" in error
    assert not [thread for thread in threading.enumerate() if thread.name == "dashboard"]
    code, _, error = said_by(capsys, "resume", str(tmp_path / "run"), "--total-steps", "1024", "--quiet", "--dashboard")
    assert code == 0
    assert "dashboard   http://127.0.0.1:" in error


def test_without_being_asked_for_nothing_is_served(tmp_path, capsys):
    code, _, error = said_by(capsys, *TRAIN, "--run-dir", str(tmp_path / "run"))
    assert code == 0
    assert "dashboard" not in error


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_that_is_none_is_refused_before_anything_is_written(tmp_path, capsys, port):
    code, _, error = said_by(capsys, *TRAIN, "--run-dir", str(tmp_path / "run"), "--dashboard-port", port)
    assert code == 2
    assert "dashboard_port" in error
    assert not (tmp_path / "run").exists()


# --- in a browser -----------------------------------------------------------------------------------------------------


def test_the_page_follows_the_run(tmp_path, served):
    metrics = rows(60)
    run = make_run(tmp_path / "run", metrics[:30])
    with opened() as browser:
        server = served(run)
        page = Seen(browser, server.address)
        page.tab.wait_for_selector("html[data-rows='30']")
        assert number_in(page.legend("return_mean")[1]) == pytest.approx(metrics[29]["return_mean"], rel=1e-4)
        for row in metrics[30:]:
            append_metrics(run.metrics_path, row)
        page.tab.wait_for_selector("html[data-rows='60']")
        assert number_in(page.legend("return_mean")[1]) == pytest.approx(metrics[59]["return_mean"], rel=1e-4)
        assert "final return" in page.tab.locator("#summary").inner_text()
        assert page.tab.locator("#live-state").inner_text() == "live"
        assert page.complaints == []
        page.context.close()


def test_samples_arrive_on_the_page_as_well(tmp_path, served):
    run = make_language_run(tmp_path / "run", align_rows(12))
    with opened() as browser:
        page = Seen(browser, served(run).address)
        page.tab.wait_for_selector("html[data-rows='12']")
        assert not page.tab.locator("#samples-section").is_visible()
        sample = {
            "iteration": 12,
            "prompt": [{"role": "user", "content": "why"}],
            "response": "<b>so</b>",
            "score": 1.0,
        }
        (run.path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
        page.tab.wait_for_selector(".look p")
        assert page.tab.locator(".look p").inner_text() == "<b>so</b>"
        assert page.tab.locator(".asked").inner_text() == "user: why"
        assert page.complaints == []
        page.context.close()


@pytest.fixture
def watch(served):
    """Open the live page of a run."""
    with opened() as browser:
        yield lambda run: Seen(browser, served(run).address)


def test_new_rows_are_drawn_into_the_charts_that_are_seen(tmp_path, watch):
    metrics = rows(60)
    run = make_run(tmp_path / "run", metrics[:30])
    page = watch(run)
    page.tab.wait_for_selector("html[data-rows='30']")
    last = page.tab.locator(".panel").last.get_attribute("data-metric")
    page.panel(last).scroll_into_view_if_needed()
    page.panel(last).locator("canvas").wait_for()
    page.tab.evaluate("scrollTo(0, 0)")
    for metric in ("return_mean", last):
        page.panel(metric).locator("canvas").evaluate("canvas => { canvas.dataset.first = 'yes'; }")
    seen, unseen = page.picture("return_mean"), page.picture(last)
    for row in metrics[30:]:
        append_metrics(run.metrics_path, row)
    page.tab.wait_for_selector("html[data-rows='60']")
    assert page.picture("return_mean") != seen
    assert page.picture(last) == unseen
    page.panel(last).scroll_into_view_if_needed()
    page.panel(last).locator(".plot[data-points='60']").wait_for()
    assert page.picture(last) != unseen
    for metric in ("return_mean", last):
        assert page.panel(metric).locator("canvas").get_attribute("data-first") == "yes"
        assert number_in(page.legend(metric)[1]) == pytest.approx(metrics[59][metric], rel=1e-4)
    assert page.complaints == []


def test_long_runs_are_thinned_on_the_live_page_as_on_others(tmp_path, watch):
    loss = [1.0] * 6000
    loss[2345] = 77.0
    page = watch(make_run(tmp_path / "run", rows(6000, value_loss=loss)))
    page.tab.wait_for_selector("html[data-rows='6000']")
    page.panel("value_loss").scroll_into_view_if_needed()
    page.panel("value_loss").locator("canvas").wait_for()
    plot = page.panel("value_loss").locator(".plot")
    assert 1000 < int(plot.get_attribute("data-points")) <= 4000
    assert "from 1 to 1, lowest 1, highest 77" in plot.get_attribute("aria-label")
    assert page.complaints == []


def test_a_summary_that_fails_is_told_as_text(tmp_path, watch, monkeypatch):
    def refuse(self):
        raise UserError("<b>x</b> cannot be read")

    monkeypatch.setattr(Dashboard, "summary", refuse)
    page = watch(make_run(tmp_path / "run", rows(5)))
    page.tab.wait_for_selector("#live-state.over")
    assert page.tab.locator("#live-state").text_content().strip() == "<b>x</b> cannot be read"
    assert "final return" in page.tab.locator("#summary").inner_text()
    assert page.tab.locator("html[data-rows='5']").count() == 1


def test_metrics_of_any_name_are_followed(tmp_path, watch):
    names = ("constructor", "toString", "__proto__")
    page = watch(make_run(tmp_path / "run", [row | dict.fromkeys(names, row["iteration"]) for row in rows(12)]))
    page.tab.wait_for_selector("html[data-rows='12']")
    for name in names:
        page.panel(name).scroll_into_view_if_needed()
        page.panel(name).locator("canvas").wait_for()
        assert number_in(page.legend(name)[1]) == 12
    assert page.complaints == []


def look(iteration, **more):
    return (
        json.dumps({"iteration": iteration, "prompt": "why", "response": f"so {iteration}", "score": 1.0} | more) + "\n"
    )


def test_a_sample_that_arrives_leaves_the_slider_to_the_reader(tmp_path, watch):
    run = make_language_run(tmp_path / "run", align_rows(12))
    samples = run.path / "samples.jsonl"
    samples.write_text("".join(look(k) for k in range(1, 7)))
    page = watch(run)
    slider = page.tab.locator("#look-0")
    slider.focus()
    page.tab.keyboard.press("Home")  # the second look
    answers = page.tab.locator(".look p")
    assert answers.all_inner_texts() == ["so 1", "so 2", "so 6"]
    slider.evaluate("slider => { slider.dataset.first = 'yes'; }")
    with samples.open("a") as file:
        file.write(look(7) + look(7, prompt="how", tokens=["a"] * 700, log_ratios=[0.5] * 700))
    page.tab.locator(".asked", has_text="how").wait_for()
    assert answers.all_inner_texts() == ["so 1", "so 2", "so 7", "a" * 600 + "..."]
    assert slider.get_attribute("data-first") == "yes"
    assert slider.get_attribute("max") == "5"
    assert page.tab.evaluate("document.activeElement.id") == "look-0"
    assert page.complaints == []


def test_nothing_changes_under_a_pressed_button(tmp_path, watch):
    metrics = align_rows(24)
    run = make_language_run(tmp_path / "run", metrics[:12])
    samples = run.path / "samples.jsonl"
    samples.write_text(look(1))
    page = watch(run)
    page.tab.locator(".look p").wait_for()
    page.tab.mouse.move(5, 300)
    page.tab.mouse.down()
    for row in metrics[12:]:
        append_metrics(run.metrics_path, row)
    with samples.open("a") as file:
        file.write(look(2))
    page.tab.wait_for_selector("html[data-rows='24']")
    assert page.tab.locator(".look p").all_inner_texts() == ["so 1"]
    page.tab.mouse.up()
    page.tab.locator(".look p", has_text="so 2").wait_for()
    assert page.complaints == []


def test_a_summary_waits_while_its_words_are_selected(tmp_path, watch, monkeypatch):
    metrics = rows(9)
    run = make_run(tmp_path / "run", metrics[:3])
    monkeypatch.setattr(
        Dashboard, "summary", lambda self: f"<p>{len(self.record().rows)} rows</p><p>and more</p>".encode()
    )
    page = watch(run)
    page.tab.locator("#summary", has_text="3 rows").wait_for()
    page.tab.evaluate("getSelection().selectAllChildren(document.querySelector('#summary p'))")
    for end in (6, 9):  # what is asked after the second was shown before it
        for row in metrics[end - 3 : end]:
            append_metrics(run.metrics_path, row)
        page.tab.wait_for_selector(f"html[data-rows='{end}']")
    assert page.tab.evaluate("getSelection().toString()") == "3 rows"
    page.tab.evaluate("getSelection().removeAllRanges()")
    page.tab.locator("#summary", has_text="9 rows").wait_for()
