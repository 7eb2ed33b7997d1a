"""What the page of a run costs, and the pictures of it in docs/report.md.

    python benchmarks/report_page.py                    # both, in about five minutes
    python benchmarks/report_page.py --only pictures    # needs a Chromium, as the tests of the page do
    python benchmarks/report_page.py --only cost        # needs it too

Cost: what writing the page takes, what an answer of the live page's server does, and what a browser does that shows the
live page of a run that goes on, for a run of CartPole and for one with many times its iterations. Results are lines of
benchmarks/results/report_page.jsonl.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from records import add_row, in_words, read_rows, write_between

from proximo.baselines import baselines_of
from proximo.report.dashboard import SUMMARY_SHARE, Dashboard
from proximo.report.report import write_report
from proximo.runs.directory import open_run
from proximo.runs.metrics import read_metrics

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "report_page.jsonl"
PICTURES = HERE.parent / "docs" / "pictures"
SEEDS = (1, 2, 3)
STEPS = 100_000
LONGER = 20
ASKED = 300
WATCHED = 60
"""Seconds that a browser is watched for."""
ROW_EVERY = 2
"""Seconds between two rows of a run that is watched."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("pictures", "cost", "table"))
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as scratch:
        if only in (None, "pictures"):
            draw(Path(scratch))
        if only in (None, "cost"):
            measure(Path(scratch))
    if only != "pictures":
        write_table()


# --- cost -------------------------------------------------------------------------------------------------------------


def measure(scratch: Path) -> None:
    """Processor time, which other programs hardly change; that of the client that asks is counted with the answers."""
    short = scratch / "short"
    train(short, seed=1)
    long = scratch / "long"
    shutil.copytree(short, long)
    rows = (short / "metrics.jsonl").read_bytes()
    (long / "metrics.jsonl").write_bytes(rows * LONGER)
    for folder in (short, long):
        run = open_run(folder)
        n_rows = len(read_metrics(run.metrics_path))
        write_report([run], scratch / "warm", with_pictures=False)
        began = time.process_time()
        report = write_report([run], scratch / "page", with_pictures=False, baselines=baselines_of([run]))
        page = time.process_time() - began
        server = Dashboard(run, None, 0)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.25}, daemon=True).start()
        began = time.process_time()
        server.summary()
        summary = time.process_time() - began
        end = run.metrics_path.stat().st_size - 4000  # a few rows are new each time
        began = time.process_time()
        for _ in range(ASKED):
            urllib.request.urlopen(f"{server.address}metrics?from={end}", timeout=20).read()
            urllib.request.urlopen(f"{server.address}samples?from=0", timeout=20).read()
            urllib.request.urlopen(f"{server.address}summary", timeout=20).read()
        asking = (time.process_time() - began) / ASKED
        browser = watch(server, n_rows, rows[rows[:-1].rindex(b"\n") + 1 :])
        server.shutdown()
        server.server_close()
        size = report.page.stat().st_size
        row = {"rows": n_rows, "page": page, "bytes": size, "asking": asking, "summary": summary, "browser": browser}
        add_row(RESULTS, row, "jinja2", "numpy", "playwright")


def watch(server: Dashboard, n_rows: int, line: bytes) -> float:
    """The share of a core that all processes of a browser take which shows the live page while rows are added."""
    from playwright.sync_api import sync_playwright

    sys.path.insert(0, str(HERE.parent))
    from tests.browser import FLAGS, chromium

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(server.address)
        tab.wait_for_selector(f"html[data-rows='{n_rows}']", timeout=120_000)
        tab.wait_for_timeout(5000)
        session = browser.new_browser_cdp_session()

        def processor_seconds() -> float:
            return sum(each["cpuTime"] for each in session.send("SystemInfo.getProcessInfo")["processInfo"])

        before, began = processor_seconds(), time.monotonic()
        for _ in range(WATCHED // ROW_EVERY):
            with server.run.metrics_path.open("ab") as file:
                file.write(line)
            tab.wait_for_timeout(1000 * ROW_EVERY)
        share = (processor_seconds() - before) / (time.monotonic() - began)
        drawn = int(tab.evaluate("document.documentElement.dataset.rows"))
        assert n_rows < drawn <= n_rows + WATCHED // ROW_EVERY, drawn
        browser.close()
    return share


def train(folder: Path, *, seed: int) -> None:
    words = ["--total-steps", str(STEPS), "--seed", str(seed), "--run-dir", str(folder), "--quiet"]
    subprocess.run([sys.executable, "-m", "proximo.cli", "train", "CartPole-v1", *words], check=True)


def write_table() -> None:
    found = read_rows(RESULTS)[-2:]
    lines = [
        "| iterations of the run | size of the page | writing it | one asking | one summary | browser that shows it |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['rows']:,} | {row['bytes'] / 1e3:,.0f} kB | {row['page']:.2f} s | {1e3 * row['asking']:.1f} ms | "
            f"{1e3 * row['summary']:.0f} ms | {100 * row['browser']:.1f} % of a core |"
        )
    lines += [
        "",
        "Seconds are processor time. An asking is three requests with their answers, made by a Python program, whose",
        "side is counted in. Summaries are made anew so seldom that they take",
        f"{100 * SUMMARY_SHARE:g} % of the time at most. The browser is a headless Chromium without a graphics card,",
        f"1280 x 900: processor time of all its processes in {WATCHED} seconds, in which the run gets a row every",
        f"{ROW_EVERY} seconds. CartPole-v1, {STEPS:,} steps, seed 1; the longer run has",
        f"{LONGER} times its metrics.",
    ]
    write_between("cost of the page", lines + in_words(found), "report.md")


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw(scratch: Path) -> None:
    from PIL import Image
    from playwright.sync_api import sync_playwright

    sys.path.insert(0, str(HERE.parent))
    from tests.browser import FLAGS, chromium

    runs = []
    for seed in SEEDS:
        folder = scratch / "CartPole-v1" / f"seed{seed}"
        train(folder, seed=seed)
        runs.append(open_run(folder))
    one = write_report(runs[:1], scratch / "one", with_pictures=False, baselines=baselines_of(runs[:1])).page
    three = write_report(runs, scratch / "three", with_pictures=False, baselines=baselines_of(runs)).page
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        for name, page, height in (("report", one, 1240), ("report_seeds", three, 1020)):
            scheme = "light" if page is one else "dark"
            tab = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme=scheme)
            tab.goto(page.as_uri())
            over = tab.locator('.panel[data-metric="return_mean"] .u-over').bounding_box()
            assert over is not None
            tab.mouse.move(over["x"] + 0.6 * over["width"], over["y"] + 0.5 * over["height"])
            raw = scratch / f"{name}.png"
            tab.screenshot(path=raw)
            with Image.open(raw) as image:  # 128 colours are enough for text and lines, and a quarter of the size
                small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
                small.save(PICTURES / f"{name}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
