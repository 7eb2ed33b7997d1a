"""The page as a person meets it, in headless Chromium: opened from the disk, looked at, dragged, read, typed into."""

import json
import re

import pytest

from proximo.report.report import write_report
from tests.browser import opened
from tests.report.language_samples import align_rows, make_language_run
from tests.report.samples import make_run, rows

HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"

SUM_OF_INK = """canvas => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let i = 0; i < pixels.length; i += 4) {
    if (pixels[i + 3] > 200) colours.add((pixels[i] << 16) | (pixels[i + 1] << 8) | pixels[i + 2]);
  }
  return colours.size;
}"""
"""How many colours there are on a canvas: of an empty one none, of one with axes alone a handful."""


@pytest.fixture(scope="module")
def browser():
    with opened() as found:
        yield found


class Seen:
    """A page in a tab, with what its console said."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.tab = self.context.new_page()
        self.complaints = []
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.goto(path if str(path).startswith("http") else path.as_uri())

    def panel(self, metric):
        return self.tab.locator(f'.panel[data-metric="{metric}"]')

    def legend(self, metric):
        return [re.sub(r"\s+", " ", text) for text in self.panel(metric).locator(".legend li").all_inner_texts()]

    def picture(self, metric):
        return self.panel(metric).locator("canvas").evaluate("canvas => canvas.toDataURL()")

    def hover(self, metric, share):
        """Move the mouse over a chart; return the words under it."""
        over = self.panel(metric).locator(".u-over")
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        self.tab.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        return self.legend(metric)

    def drag(self, metric, first, last):
        over = self.panel(metric).locator(".u-over")
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        self.tab.mouse.move(box["x"] + first * box["width"], box["y"] + 50)
        self.tab.mouse.down()
        self.tab.mouse.move(box["x"] + last * box["width"], box["y"] + 50, steps=4)
        self.tab.mouse.up()

    def choose(self, words):
        self.tab.locator("#controls .segments label", has_text=words).click()


@pytest.fixture
def see(browser, tmp_path):
    """Open the page of some runs."""
    seen = []

    def look(*runs, **options):
        report = write_report(list(runs), tmp_path / f"page{len(seen)}", with_pictures=False)
        seen.append(Seen(browser, report.page, **options))
        return seen[-1]

    yield look
    for each in seen:
        each.context.close()


def number_in(words):
    """The value in a line of a legend, a mean beside it left out."""
    return float(re.sub(r" mean.*", "", words).split()[-1].replace(",", ""))


def test_every_chart_is_drawn_and_nothing_is_complained_of(see, tmp_path):
    page = see(make_run(tmp_path / "run", rows()))
    assert page.complaints == []
    titles = page.tab.locator(".panel h3").all_inner_texts()
    assert {"Episode return", "Policy loss", "Value loss", "Clip fraction", "Learning rate", "Speed"} <= set(titles)
    assert {"Where the time goes", "Kl stopped"} & set(titles) == {"Where the time goes"}  # constant: nothing to see
    canvases = page.tab.locator(".panel canvas")
    assert canvases.count() == len(titles)
    for place in range(canvases.count()):
        assert canvases.nth(place).evaluate(SUM_OF_INK) > 8, titles[place]


def test_hovering_shows_the_numbers_of_the_metrics_file(see, tmp_path):
    run = make_run(tmp_path / "run", rows())
    metrics = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    page = see(run)
    for share in (0.1, 0.5, 0.93):
        where, value = page.hover("value_loss", share)
        step = number_in(where)
        row = min(metrics, key=lambda each: abs(each["env_steps"] - step))
        assert row["env_steps"] == step
        assert number_in(value) == pytest.approx(row["value_loss"], rel=1e-4)
        # The cursor is that of all charts.
        assert number_in(page.legend("entropy")[1]) == pytest.approx(row["entropy"], rel=1e-4)
    page.tab.mouse.move(1, 1)
    assert number_in(page.legend("value_loss")[1]) == pytest.approx(metrics[-1]["value_loss"], rel=1e-4)


def test_stacked_phases_are_told_one_by_one(see, tmp_path):
    metrics = rows(40, seconds_collecting=0.5, seconds_acting=0.1, seconds_environment=0.15)
    page = see(make_run(tmp_path / "run", metrics))
    told = dict(line.rsplit(" ", 1) for line in page.hover("seconds_acting", 0.5)[1:])
    assert told == {"acting": "0.1", "environments": "0.15", "the rest of collecting": "0.25", "updating": "0.3"}


def test_smoothing_redraws_and_says_the_mean(see, tmp_path):
    page = see(make_run(tmp_path / "run", rows()))
    slider = page.tab.locator("#smoothing")
    slider.fill("0")
    raw = page.picture("policy_loss")
    assert "mean" not in page.hover("policy_loss", 0.5)[1]
    slider.fill("6")
    assert page.tab.locator("#smoothing-said").inner_text() == "mean over 12 %"
    assert page.picture("policy_loss") != raw
    assert "mean" in page.hover("policy_loss", 0.5)[1]


def test_a_logarithmic_axis_and_another_x_axis(see, tmp_path):
    page = see(make_run(tmp_path / "run", rows()))
    linear = page.picture("value_loss")
    page.tab.locator("#log").check()
    logarithmic = page.picture("value_loss")
    assert logarithmic != linear
    assert "environment steps" in page.hover("value_loss", 0.5)[0]
    page.choose("seconds")
    where, value = page.hover("value_loss", 0.998)
    assert where == "seconds 50"
    assert number_in(value) == pytest.approx(rows()[-1]["value_loss"], rel=1e-4)
    page.choose("iterations")
    assert page.hover("value_loss", 0.998)[0] == "iterations 100"
    assert page.complaints == []


def test_dragging_zooms_all_charts_and_a_double_click_shows_all_again(see, tmp_path):
    page = see(make_run(tmp_path / "run", rows()))
    page.choose("iterations")
    page.drag("entropy", 0.5, 0.75)
    assert page.tab.locator("#reset").is_enabled()
    first, last = (number_in(page.hover("value_loss", share)[0]) for share in (0.002, 0.998))
    assert 49 <= first <= 53
    assert 73 <= last <= 77
    page.panel("value_loss").locator(".u-over").dblclick()
    assert page.tab.locator("#reset").is_disabled()
    assert number_in(page.hover("entropy", 0.998)[0]) == 100


def test_the_keyboard_moves_along_a_chart_and_zooms(see, tmp_path):
    page = see(make_run(tmp_path / "run", rows()))
    page.choose("iterations")
    plot = page.panel("entropy").locator(".plot")
    plot.focus()
    page.tab.keyboard.press("Home")
    page.tab.keyboard.press("ArrowRight")
    page.tab.keyboard.press("ArrowRight")
    assert page.legend("entropy")[0] == "iterations 3"
    assert "iterations 3" in page.tab.locator("#announce").text_content()
    page.tab.keyboard.press("+")
    assert page.tab.locator("#reset").is_enabled()
    page.tab.keyboard.press("Escape")
    assert page.tab.locator("#reset").is_disabled()


def test_what_is_read_aloud_says_what_is_drawn(see, tmp_path):
    page = see(make_run(tmp_path / "run", rows(return_mean=[float(k) for k in range(100)])))
    label = page.panel("return_mean").locator(".plot").get_attribute("aria-label")
    assert label.startswith("Chart of episode return over environment steps. ")
    assert "from 0 to 99, lowest 0, highest 99" in label
    unnamed = page.tab.locator("button, input, select").evaluate_all(
        "all => all.filter(e => !(e.innerText || e.getAttribute('aria-label') || (e.labels && e.labels.length))).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light_follow_the_system_until_one_is_chosen(see, tmp_path, scheme):
    page = see(make_run(tmp_path / "run", rows(20)), color_scheme=scheme)
    ground = "() => getComputedStyle(document.body).backgroundColor"
    shown = page.tab.evaluate(ground)
    assert (sum(map(int, re.findall(r"\d+", shown)[:3])) > 380) == (scheme == "light")
    drawn = page.picture("entropy")
    page.tab.locator("#theme").click()
    assert page.tab.evaluate(ground) != shown
    assert page.picture("entropy") != drawn
    page.tab.reload()
    assert page.tab.evaluate(ground) != shown


def test_on_a_phone_nothing_sticks_out(see, tmp_path):
    samples = [
        {"iteration": k, "prompt": "p" * 300, "response": "r" * 300, "score": 1.0, "kl": 1.0} for k in range(1, 9)
    ]
    run = make_language_run(tmp_path / "run", align_rows(), samples, chat_template="x" * 400)
    page = see(run, viewport={"width": 375, "height": 800}, device_scale_factor=2)
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.complaints == []


def test_without_a_script_the_words_are_there(see, tmp_path):
    page = see(make_run(tmp_path / "run", rows(approx_kl=0.2)), java_script_enabled=False)
    said = page.tab.locator("body").inner_text()
    assert "updates too large" in said
    assert "learning_rate" in said
    assert "drawn by a script" in said


def test_what_strangers_write_is_shown_and_not_run(see, tmp_path):
    samples = [
        {"iteration": k, "prompt": HOSTILE, "response": HOSTILE, "score": 1.0, "kl": 1.0, **colours}
        for k, colours in ((1, {}), (2, {"tokens": [HOSTILE], "log_ratios": [-1.0]}))
    ]
    metrics = [row | {HOSTILE: float(row["iteration"])} for row in align_rows(20)]
    page = see(make_language_run(tmp_path / "run", metrics, samples, model=HOSTILE))
    assert page.tab.title() != "broken"
    assert page.complaints == []
    assert page.tab.locator(".asked").inner_text() == HOSTILE
    assert page.tab.locator(".look p").all_inner_texts() == [HOSTILE, HOSTILE]
    assert HOSTILE in page.tab.locator(".panel .name").all_inner_texts()


def test_rows_with_holes_and_a_single_row_are_drawn(see, tmp_path):
    holes = rows(60, explained_variance=[None if k % 2 else 0.5 for k in range(60)], entropy=None)
    page = see(make_run(tmp_path / "holes", holes))
    assert page.panel("entropy").count() == 0
    assert page.panel("explained_variance").locator("canvas").evaluate(SUM_OF_INK) > 8
    one = see(make_run(tmp_path / "one", rows(1)))
    assert number_in(one.legend("return_mean")[1]) == pytest.approx(rows(1)[0]["return_mean"], rel=1e-4)
    assert one.panel("return_mean").locator("canvas").evaluate(SUM_OF_INK) > 3
    assert page.complaints == one.complaints == []


def test_several_seeds_are_summed_up_and_can_be_seen_one_by_one(see, tmp_path):
    runs = [make_run(tmp_path / str(k), rows(return_mean=10.0 * k), seed=k) for k in (1, 2, 3)]
    page = see(*runs)
    assert number_in(page.legend("return_mean")[1]) == 20
    hint = page.panel("return_mean").locator(".hint")
    assert "mean of the seeds, shaded from the lowest to the highest" in hint.inner_text()
    page.choose("each run")
    told = page.hover("return_mean", 0.5)
    assert [line.split()[0] for line in told[1:]] == ["1", "2", "3"]
    assert [number_in(line) for line in told[1:]] == [10, 20, 30]
    page.tab.locator("#entities button").nth(1).click()
    assert [number_in(line) for line in page.legend("return_mean")[1:]] == [10, 30]
    assert page.complaints == []


def test_a_single_run_beside_groups_is_drawn_and_said_by_its_group(see, tmp_path):
    runs = [make_run(tmp_path / str(k), rows(return_mean=10.0 * k), seed=k) for k in (1, 2, 3, 4, 5)]
    page = see(*runs, make_run(tmp_path / "other", rows(return_mean=70.0), gamma=0.5))
    told = page.legend("return_mean")[1:]
    assert [number_in(line) for line in told] == [30, 70]
    assert "1 seed" in told[1]
    assert "interquartile mean, shaded: its 95 % interval" in page.panel("return_mean").locator(".hint").inner_text()
    assert page.complaints == []


def test_metrics_may_have_any_name(see, tmp_path):
    names = ("constructor", "toString", "__proto__", "hasOwnProperty")
    strange = [row | {name: float(row["iteration"]) for name in names} for row in rows(30)]
    page = see(make_run(tmp_path / "a", strange), make_run(tmp_path / "b", rows(30), gamma=0.5))
    for name in names:
        assert number_in(page.legend(name)[1]) == 30
    assert page.complaints == []


def test_an_answer_that_was_cut_ends_with_a_mark(see, tmp_path):
    answers = ({"tokens": ["a"] * 700, "log_ratios": [0.5] * 700}, {"tokens": ["a"], "log_ratios": [0.5]})
    samples = [
        {"iteration": k, "prompt": "why", "response": "a", "score": 1.0} | told for k, told in enumerate(answers)
    ]
    page = see(make_language_run(tmp_path / "run", align_rows(12), samples))
    assert page.tab.locator(".look p").all_inner_texts() == ["a" * 600 + "...", "a"]


def test_language_runs_have_their_frontier_and_their_samples_side_by_side(see, tmp_path):
    samples = [
        {
            "iteration": k,
            "prompt": "why",
            "response": f"answer {k}",
            "score": 0.1 * k,
            "kl": 1.0,
            "tokens": ["answer", f" {k}"],
            "log_ratios": [3.0, -0.5],
        }
        for k in (10, 20, 30, 40, 50)
    ]
    page = see(make_language_run(tmp_path / "run", align_rows(gold_mean=0.5), samples))
    frontiers = page.tab.locator("#frontier canvas")
    assert frontiers.count() == 2
    assert frontiers.first.evaluate(SUM_OF_INK) > 8
    looks = page.tab.locator(".look p")
    assert looks.all_inner_texts() == ["answer 10", "answer 30", "answer 50"]
    page.tab.locator("#look-0").fill("3")
    assert looks.all_inner_texts() == ["answer 10", "answer 40", "answer 50"]
    colours = (
        page.tab.locator(".look")
        .first.locator(".token")
        .evaluate_all("all => all.map(one => [one.style.backgroundColor, one.title])")
    )
    assert colours == [["rgba(213, 94, 0, 0.6)", "+3 nats"], ["rgba(0, 114, 178, 0.15)", "-0.5 nats"]]
    assert page.complaints == []


def test_ratings_of_past_selves_are_drawn(see, tmp_path):
    run = make_run(tmp_path / "run", rows(20))
    names = ("step", "rating", "standard_error")
    players = [dict(zip(names, values, strict=True)) for values in ((None, 0, 0), (4000, 310.4, 20), (2000, 120, 15))]
    (run.path / "ratings.json").write_text(json.dumps({"players": [*players, "x", {"step": "y"}]}))
    page = see(run)
    assert page.tab.locator("#ratings canvas").evaluate(SUM_OF_INK) > 8
    assert page.tab.locator("#ratings .legend").inner_text() == "step 4,000: 310 ± 20"
    label = page.tab.locator("#ratings .plot").get_attribute("aria-label")
    assert label == "Ratings of run: 120 at step 2,000, 310 at step 4,000."
    assert page.complaints == []


def test_a_film_is_played_from_the_page_itself(see, tmp_path):
    run = make_run(tmp_path / "run", rows(20))
    run.videos.mkdir()
    gif = b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff!\xf9\x04\x01\x00\x00\x00\x00,"
    (run.videos / "step_1.gif").write_bytes(gif + b"\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;")
    page = see(run)
    assert page.tab.locator(".film img").evaluate("image => image.naturalWidth") == 1
    assert page.complaints == []
