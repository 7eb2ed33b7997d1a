import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proximo.errors import UserError
from proximo.report.charts import CHARTS
from proximo.report.folder import prepare_folder
from proximo.report.pictures import chart_figure, draw_pictures, overview_figure
from proximo.report.records import read_records, run_names
from proximo.runs.directory import RunDirectory
from tests.report.samples import make_run, rows

NAMES = ["overview", *(chart.name for chart in CHARTS if chart.name != "cloning")]  # of a run that stepped environments


def figure_of(name, *runs):
    (chart,) = (chart for chart in CHARTS if chart.name == name)
    return chart_figure(chart, read_records(runs))


def lines_of(axis):
    """Curves of a panel as (x, y), reference lines and legends left out."""
    curves = [line for line in axis.lines if len(line.get_xdata()) > 2]
    return [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in curves]


def texts_of(figure):
    found = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return " | ".join(artist.get_text() for artist in found)


def test_every_picture_of_a_run_is_drawn_and_known_for_our_own(tmp_path):
    run = make_run(tmp_path / "run", rows())
    paths = draw_pictures([run], tmp_path / "new" / "pictures")
    prepare_folder(tmp_path / "new" / "pictures", paths)  # they are known for our own
    assert [path.name for path in paths] == [f"{name}.png" for name in NAMES]
    for path in paths:
        with Image.open(path) as image:
            assert image.width >= 900
            assert image.height >= 450
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20  # more than an empty page
    with Image.open(paths[0]) as overview:
        assert overview.width > 1800


def test_a_picture_holds_the_data(tmp_path):
    metrics = rows(50)
    figure = figure_of("returns", make_run(tmp_path / "run", metrics))
    returns, lengths = figure.axes
    ((x, y),) = lines_of(returns)
    assert x.tolist() == [row["env_steps"] for row in metrics]
    assert y.tolist() == [row["return_mean"] for row in metrics]
    assert lines_of(lengths)[0][1].tolist() == [row["length_mean"] for row in metrics]
    assert returns.get_xlabel() == "environment steps"
    assert returns.get_title(loc="left") == "Episode return"
    assert "100,000" in [label.get_text() for label in returns.get_xticklabels()]


def test_missing_values_leave_gaps(tmp_path):
    returns = np.linspace(0, 100, 50)
    returns[:10] = np.nan
    returns[20:30] = np.nan
    figure = figure_of("returns", make_run(tmp_path / "run", rows(50, return_mean=returns)))
    ((_, y),) = lines_of(figure.axes[0])
    assert np.isnan(y).tolist() == np.isnan(returns).tolist()


def test_a_noisy_curve_has_a_trend_over_it(tmp_path):
    metrics = rows(400)
    figure = figure_of("kl", make_run(tmp_path / "run", metrics))
    raw, trend = lines_of(figure.axes[0])
    assert raw[1].tolist() == [row["approx_kl"] for row in metrics]
    assert trend[1].std() < raw[1].std() / 3
    assert "running median" in texts_of(figure)


def test_wild_values_are_counted_where_they_are_left_out(tmp_path):
    explained = np.full(50, 0.9)
    explained[:3] = [-700.0, -30.0, -1.5]
    figure = figure_of("explained_variance", make_run(tmp_path / "run", rows(50, explained_variance=explained)))
    assert "3 values outside, down to −700" in texts_of(figure)
    assert figure.axes[0].get_ylim()[0] > -1.2


def test_the_target_kl_is_drawn_where_it_is_set(tmp_path):
    with_target = make_run(tmp_path / "a", rows(), target_kl=0.015)
    assert "target_kl 0.015" in texts_of(figure_of("kl", with_target))
    assert "target_kl" not in texts_of(figure_of("kl", make_run(tmp_path / "b", rows())))


def test_several_runs_lie_over_each_other_under_their_names(tmp_path):
    runs = [make_run(tmp_path / f"seed{seed}", rows(30 + seed)) for seed in range(9)]
    figure = overview_figure(read_records(runs))
    assert len(lines_of(figure.axes[0])) == 9
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"seed{seed}" for seed in range(9)]
    styles = {(line.get_color(), str(line.get_linestyle())) for line in legend.get_lines()}
    assert len(styles) == 9  # more runs than colours, and still each its own
    assert "9 runs" in texts_of(figure)


def test_a_run_without_rows_among_others_is_left_out(tmp_path):
    begun, new = make_run(tmp_path / "begun", rows(20)), make_run(tmp_path / "new", [])
    figure = figure_of("returns", begun, new)
    assert len(lines_of(figure.axes[0])) == 1
    assert not figure.legends


def test_one_row_is_a_point_and_no_finished_episode_is_said(tmp_path):
    run = make_run(tmp_path / "run", rows(1, return_mean=None, length_mean=None))
    assert len(overview_figure(read_records([run])).axes) == 9
    assert "no episode has finished yet" in texts_of(figure_of("returns", run))
    (point,) = (line for line in figure_of("entropy", run).axes[0].lines if line.get_marker() == "o")
    assert len(point.get_xdata()) == 1


def test_nothing_to_draw_is_said(tmp_path, quick_pictures):
    run = make_run(tmp_path / "run", [])
    with pytest.raises(UserError, match=r"nothing to draw yet: .*run has not finished one iteration"):
        draw_pictures([run], tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()
    other = make_run(tmp_path / "other", [{"loss": 1.0}])
    with pytest.raises(UserError, match="none of the metrics"):
        draw_pictures([other], tmp_path / "pictures")


def test_a_very_long_run_is_thinned(tmp_path):
    figure = figure_of("returns", make_run(tmp_path / "run", rows(8000)))
    ((x, y),) = lines_of(figure.axes[0])
    assert len(x) <= 4000
    assert y.max() == pytest.approx(499.9, abs=0.1)
    assert figure.axes[0].get_xlabel() == "environment steps (millions)"


def test_charts_whose_metrics_a_run_does_not_have_are_not_drawn(tmp_path, quick_pictures):
    metrics = [{"iteration": i, "return_mean": float(i)} for i in range(1, 5)]
    run = make_run(tmp_path / "run", metrics)
    paths = draw_pictures([run], tmp_path / "pictures")
    assert [path.stem for path in paths] == ["overview", "returns"]


def test_a_run_without_a_count_of_steps_is_drawn_over_its_iterations(tmp_path):
    make_run(tmp_path / "run", [{"iteration": i, "return_mean": float(i)} for i in range(1, 5)])
    assert figure_of("returns", RunDirectory(tmp_path / "run")).axes[0].get_xlabel() == "iterations"


def test_our_pictures_are_replaced_and_nobody_elses(tmp_path, quick_pictures):
    run, folder = make_run(tmp_path / "run", rows(20)), tmp_path / "pictures"
    first = draw_pictures([run], folder)
    assert draw_pictures([run], folder) == first
    Image.new("RGB", (4, 4)).save(folder / "kl.png")
    before = (folder / "kl.png").read_bytes()
    with pytest.raises(UserError, match=r"already has kl\.png, which Proximo did not write"):
        draw_pictures([run], folder)
    assert (folder / "kl.png").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.png" for name in NAMES)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made"):
        draw_pictures([make_run(tmp_path / "run", rows(20))], tmp_path / "file" / "pictures")


def test_runs_of_the_same_name_are_told_apart():
    runs = [RunDirectory(Path(path)) for path in ("/r/CartPole/seed1", "/r/Pendulum/seed1", "/r/CartPole/seed2")]
    assert run_names(runs) == ["CartPole/seed1", "Pendulum/seed1", "seed2"]


def test_drawing_needs_no_display_and_no_global_state():
    code = (
        "import sys, proximo.report.report, proximo.report.pictures, proximo.report.video\n"
        "assert 'matplotlib' not in sys.modules, 'reporting alone may wait for matplotlib'\n"
        "from proximo.report.charts import CHARTS\n"
        "from proximo.report.pictures import chart_figure\n"
        "from proximo.report.records import RunRecord\n"
        "from proximo.runs.directory import RunDirectory\n"
        "from pathlib import Path\n"
        "record = RunRecord('a', RunDirectory(Path('a')), {}, [{'return_mean': 1.0, 'env_steps': 1}])\n"
        "chart_figure(CHARTS[0], [record])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
