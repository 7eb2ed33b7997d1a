"""docs/explore/clip.html: its numbers are those of `core.losses`, and it can be moved by mouse, touch and keyboard."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proximo.core.distributions import Categorical
from proximo.core.losses import clipped_surrogate, clipped_value
from proximo.core.masked import whiten
from tests.browser import opened

PAGE = Path(__file__).parents[2] / "docs" / "explore" / "clip.html"
ALL = torch.ones(1, 1, dtype=torch.bool)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened() as found:
        yield found


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """The page from disk at the size of a laptop; nothing may be said on the console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(PAGE.as_uri())
    yield page
    assert said == []
    context.close()


def told(page: Any, where: str, words: str) -> str:
    """What stands there once it has these words in it: it is said when the hand rests."""
    page.locator(where, has_text=words).wait_for()
    return page.inner_text(where)


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def expected(ratio: float, advantage: float, epsilon: float, kind: str) -> list[float]:
    """Objective, and its gradient in log pi, by the function that trains and autograd."""
    log_prob = row(ratio).log().requires_grad_()
    band: dict[str, Any] = {"clip_epsilon": epsilon}
    if kind == "plain":
        band = {"clip_epsilon": 0.999999, "clip_epsilon_high": 1e9}
    loss = clipped_surrogate(log_prob, row(0.0), row(advantage), ALL, **band).loss
    (gradient,) = torch.autograd.grad(loss, log_prob)
    return [-float(loss.detach()), -float(gradient)]


@pytest.mark.parametrize("kind", ["min", "plain"])
def test_objective_and_gradient_are_those_of_the_loss(page: Any, kind: str) -> None:
    epsilons, advantages = (0.02, 0.1, 0.2, 0.3, 0.6), (-2.0, -0.35, 0.0, 0.5, 1.0, 2.0)
    just_by = [1 + sign * epsilon + step for epsilon in (0.2, 0.6) for sign in (-1, 1) for step in (-1e-6, 1e-6)]
    ratios = (0.02, 0.5, 0.79, 0.97, 1.0, 1.13, 1.35, 1.9, 2.2, *just_by)
    grid = [[*at, kind] for at in itertools.product(ratios, advantages, epsilons)]
    found = page.evaluate("grid => grid.map(at => [objectiveOf(...at), slopeOf(...at) * at[0]])", grid)
    wanted = [expected(*at) for at in grid]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-6, atol=1e-9)


def test_the_clip_alone_is_flat_on_both_sides(page: Any) -> None:
    """What the page shows of it: without the min, a mistake is not taken back."""
    grid = [[0.6, 1, 0.2, "clip"], [1.1, 1, 0.2, "clip"], [1.4, 1, 0.2, "clip"], [1.4, -1, 0.2, "clip"]]
    found = page.evaluate("grid => grid.map(at => [objectiveOf(...at), slopeOf(...at)])", grid)
    torch.testing.assert_close(torch.tensor(found), torch.tensor([[0.8, 0.0], [1.1, 1.0], [1.2, 0.0], [-1.2, 0.0]]))


def test_the_critic_s_loss_and_gradient_are_those_of_value_clipping(page: Any) -> None:
    grid = [
        list(at) for at in itertools.product((-1.0, 0.2, 0.7, 1.0, 1.5, 2.9), (1.0,), (-0.5, 1.1, 2.2), (0.05, 0.4))
    ]
    found = page.evaluate("grid => grid.map(at => { const c = criticLossOf(...at); return [c.loss, c.slope]; })", grid)
    wanted = []
    for value, old_value, target, epsilon in grid:
        new = row(value).requires_grad_()
        loss = clipped_value(new, row(old_value), row(target), ALL, clip_epsilon=epsilon)
        (gradient,) = torch.autograd.grad(loss, new)
        wanted.append([float(loss.detach()), float(gradient)])
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted))


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.6])
def test_the_policy_of_three_actions_goes_where_autograd_goes(page: Any, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(int(100 * epsilon))
    old, logits = torch.randn(2, 1, 3, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    actions = torch.randint(3, (1, 16), generator=generator)
    mask = torch.ones_like(actions, dtype=torch.bool)
    rewards = torch.randn(1, 16, dtype=torch.float64, generator=generator)
    advantages = whiten(rewards, mask)
    now = Categorical(logits.expand(16, 3).unsqueeze(0))
    before = Categorical(old.expand(16, 3).unsqueeze(0))
    loss = clipped_surrogate(
        now.log_prob(actions), before.log_prob(actions), advantages, mask, clip_epsilon=epsilon
    ).loss
    (gradient,) = torch.autograd.grad(-loss, logits)

    told = {"logits": logits[0].tolist(), "old": old[0].softmax(-1).tolist(), "actions": actions[0].tolist()}
    told |= {"rewards": rewards[0].tolist(), "epsilon": epsilon}
    found = page.evaluate(
        """({ logits, old, actions, rewards, epsilon }) => ({
            gradient: batchGradient(logits, old, actions, whiten(rewards), epsilon, "min"),
            kl: divergence(old, softmax(logits)), advantages: whiten(rewards) })""",
        told,
    )
    torch.testing.assert_close(row(*found["advantages"]), advantages)
    torch.testing.assert_close(row(*found["gradient"]), gradient)
    torch.testing.assert_close(row(found["kl"])[0], Categorical(old).kl(Categorical(logits)).detach())


def test_a_batch_of_equal_rewards_teaches_nothing(page: Any) -> None:
    assert page.evaluate("whiten([0.7, 0.7, 0.7, 0.7])") == [0, 0, 0, 0]


def test_with_one_epoch_the_clip_changes_nothing(page: Any) -> None:
    both = page.evaluate(
        """() => { const w = startWorld(5); takeUpdates(w, { rate: 1, epochs: 1, epsilon: 0.05, noise: 1 }, 10);
            return Object.values(w.sides).map(side => side.logits); }"""
    )
    assert both[0] == both[1]
    assert both[0] != [0, 0, 0]


def test_many_epochs_without_the_clip_settle_on_a_wrong_action_in_some_runs_and_with_it_in_none(page: Any) -> None:
    """What the page says of its own defaults, in the very runs that it shows."""
    found = page.evaluate("manyRuns({ rate: 1, epochs: 20, epsilon: 0.2, noise: 1 }, 200)")
    assert found["min"]["right"] == 200
    assert 100 < found["plain"]["right"] < 160
    assert found["plain"]["kl"] > 10 * found["min"]["kl"]


def test_words_say_what_the_gradient_does(page: Any) -> None:
    def words(*at: Any) -> str:
        return page.evaluate("at => stepInWords(...at)", list(at))

    assert words(1.35, 1, 0.2, "min") == (
        "The ratio 1.35 lies above 1 + epsilon = 1.2 and the advantage is positive: the gradient is zero, the step has "
        "moved far enough."
    )
    for ratio, advantage, kind in itertools.product(
        (0.5, 0.95, 1.05, 1.7), (-1, -0.1, 0.1, 1), ("min", "clip", "plain")
    ):
        said = words(ratio, advantage, 0.2, kind)
        slope = page.evaluate("at => slopeOf(...at)", [ratio, advantage, 0.2, kind])
        assert ("gradient is zero" in said) == (slope == 0), said
    assert "nothing is learned" in words(1.0, 0, 0.2, "min")


def test_sliders_obey_the_keyboard_and_the_words_follow(page: Any) -> None:
    page.focus("#ratio")
    for _ in range(60):
        page.keyboard.press("ArrowLeft")
    assert page.inner_text("#ratio-out") == "0.75"
    words = "The ratio 0.75 lies below 1 \N{MINUS SIGN} epsilon = 0.8 but the advantage is positive"
    assert words in told(page, "#one-says", "0.75")
    assert page.inner_text("#read-slope") == "1"
    page.check("input[name=kind][value=clip]", force=True)
    assert page.inner_text("#read-slope") == "0"
    page.focus("#advantage")
    page.keyboard.press("Home")
    assert page.inner_text("#advantage-out") == "\N{MINUS SIGN}1.5"


def test_the_point_the_band_and_the_advantage_are_dragged(page: Any) -> None:
    where = """() => { const box = document.getElementById("objective").getBoundingClientRect(), f = oneFrame;
        const at = (x, y) => [box.left + f.toX(x), box.top + f.toY(y)];
        return { point: at(1.35, 1.2), farther: at(0.5, -1), edge: at(1.2, -1), wider: at(1.45, -1),
                 diamond: at(1, 1), lower: at(1, -1.5) }; }"""
    places = page.evaluate(where)
    for begin, end in (("point", "farther"), ("edge", "wider"), ("diamond", "lower")):
        page.mouse.move(*places[begin])
        page.mouse.down()
        page.mouse.move(*places[end], steps=4)
        page.mouse.up()
    assert [page.inner_text(f"#{name}-out") for name in ("ratio", "epsilon", "advantage")] == [
        "0.5",
        "0.45",
        "\N{MINUS SIGN}1.5",
    ]
    page.mouse.move(*places["wider"])  # the button is up: nothing moves any more
    assert page.inner_text("#ratio-out") == "0.5"


def drag_by_touch(page: Any, begin: tuple[float, float], end: tuple[float, float]) -> list[float]:
    """Drag from one place of the plot (ratio, objective) to another; return the state, and if the page scrolled."""
    page.evaluate("document.getElementById('objective').scrollIntoView({ block: 'center' })")
    x0, y0, x1, y1 = page.evaluate(
        """([a, b, c, d]) => { const box = byId("objective").getBoundingClientRect(), f = oneFrame;
            return [box.left + f.toX(a), box.top + f.toY(b), box.left + f.toX(c), box.top + f.toY(d)]; }""",
        [*begin, *end],
    )
    before = page.evaluate("scrollY")
    touch = page.context.new_cdp_session(page)
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x0, "y": y0}]})
    for part in range(1, 9):
        point = {"x": x0 + (x1 - x0) * part / 8, "y": y0 + (y1 - y0) * part / 8}
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_timeout(100)
    return page.evaluate("before => [one.ratio, one.epsilon, one.advantage, scrollY !== before]", before)


def test_a_finger_moves_the_handles_and_else_scrolls_the_page(browser: Any) -> None:
    context = browser.new_context(viewport={"width": 375, "height": 700}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(PAGE.as_uri())
    assert drag_by_touch(page, (1.35, 1.2), (0.4, 1.2)) == [0.4, 0.2, 1, False]
    assert drag_by_touch(page, (1.2, -2.0), (1.5, -2.0)) == [0.4, 0.5, 1, False]
    assert drag_by_touch(page, (1.0, 1.0), (1.0, -1.2)) == [0.4, 0.5, -1.2, False]
    assert drag_by_touch(page, (2.0, -1.0), (2.0, 2.8)) == [0.4, 0.5, -1.2, True]
    context.close()


def test_on_a_phone_it_fits_and_is_tapped(browser: Any) -> None:
    context = browser.new_context(viewport={"width": 375, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(PAGE.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.tap("#objective", position={"x": 60, "y": 60})
    assert float(page.inner_text("#ratio-out")) < 0.5
    page.tap("#forty")
    page.tap("#many")
    assert "100%" in page.inner_text("#many-result")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    context.close()


def test_cases_and_suggestions_lead_where_they_say(page: Any) -> None:
    for button in page.query_selector_all("[data-one]"):
        button.click()
        ratio, epsilon, advantage, kind = button.get_attribute("data-one").split()
        assert page.evaluate("[one.ratio, one.epsilon, one.advantage, one.kind]") == [
            float(ratio),
            float(epsilon),
            float(advantage),
            kind,
        ]
    page.check("input[name=kind][value=min]", force=True)
    for place in range(6):
        button = page.query_selector_all("#cases button")[place]
        says_zero = "gradient 0" in button.inner_text()
        button.click()
        pressed = page.evaluate("[...document.querySelectorAll('#cases button')].map(b => b.ariaPressed === 'true')")
        assert pressed == [i == place for i in range(6)]
        assert (page.inner_text("#read-slope") == "0") == says_zero


def test_updates_are_taken_and_told(page: Any) -> None:
    page.click("#step")
    assert told(page, "#two-says", "In update 1").startswith(
        "In update 1, after 1 step: with the clip, the best action"
    )
    page.click("#update")
    assert page.evaluate("[world.updates, world.epoch]") == [1, 0]
    page.click("#forty")
    assert page.evaluate("world.updates") == 41
    page.click("#luck")
    assert page.evaluate("[world.updates, world.seed]") == [0, 3]
    for button in page.query_selector_all("[data-two]"):
        button.click()
        assert page.evaluate("world.updates") == 40
        assert "of 200 runs" in page.inner_text("#many-result")


@pytest.mark.parametrize(
    ("address", "state"),
    [
        ("#ratio=0.6&epsilon=0.3&advantage=-1&objective=clip", [0.6, 0.3, -1, "clip"]),
        ("#ratio=1e999&epsilon=<img src=x>&advantage=&objective=toString", [1.35, 0.2, 1, "min"]),
        ("#ratio=-7&epsilon=99&advantage=NaN", [0.02, 0.6, 1, "min"]),
        ("#%%%&&&=", [1.35, 0.2, 1, "min"]),
    ],
)
def test_the_address_keeps_what_was_found_and_is_not_trusted(browser: Any, address: str, state: list) -> None:
    page = browser.new_page()
    failed: list[str] = []
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(PAGE.as_uri() + address)
    assert page.evaluate("[one.ratio, one.epsilon, one.advantage, one.kind]") == state
    assert failed == []
    page.close()


def test_colours_follow_the_system_and_the_button(browser: Any) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(PAGE.as_uri())
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("#theme")
    assert page.evaluate(background) != dark
    page.click("#theme")
    assert page.evaluate(background) == dark
    page.close()


def test_everything_that_is_moved_has_a_name_for_those_who_do_not_see_it(page: Any) -> None:
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input[type=range]')].filter(i => !i.labels.length || !i.labels[0].textContent)"
        ".length"
    )
    assert unnamed == 0
    pictures = page.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].map(s => [s.getAttribute('aria-labelledby'), "
        "s.getAttribute('aria-label'), s.getAttribute('aria-describedby')])"
    )
    assert len(pictures) == 5
    assert all((labelled or label) and described for labelled, label, described in pictures)


def test_the_file_is_small_and_asks_nobody_for_anything() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.encode()) < 100_000
    assert re.search(r"(src|href)\s*=|https?://|@import|url\((?!#)", text) is None
    assert "default-src 'none'" in text
