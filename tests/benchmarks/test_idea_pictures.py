"""Lambda's bias and variance on a chain where everything is known: what theory says of both ends of it."""

from __future__ import annotations

from pathlib import Path

import idea_pictures
import known_chain as chains
import numpy as np
import pytest

CHAIN = chains.the_chain()
TRUTH = chains.true_advantages(CHAIN)
CRITICS = [idea_pictures.critic_named(CHAIN, critic) for critic in idea_pictures.CRITICS]
NAMES = ["bias_squared", "bias_squared_between_actions", "variance", "mean_squared_error"]


def errors_of(critic: np.ndarray) -> np.ndarray:
    return critic - chains.true_values(CHAIN)


def test_the_true_values_are_what_playing_for_ever_gives() -> None:
    """The oracle takes the expectation over one more step again and again, from nothing."""
    values = np.zeros(chains.N_STATES + 2)
    for _ in range(3000):
        for state in range(chains.N_STATES):
            lower = values[state - 1] if state > 0 else 0.0
            upper = chains.GAMMA * values[state + 1] if state < chains.N_STATES - 1 else 1.0
            goes_right = chains.RIGHT * chains.OBEYS + (1 - chains.RIGHT) * (1 - chains.OBEYS)
            values[state] = goes_right * upper + (1 - goes_right) * chains.GAMMA * lower
    np.testing.assert_allclose(chains.true_values(CHAIN), values, atol=1e-12)
    assert (TRUTH[:, 1] > 0).all()
    np.testing.assert_allclose(TRUTH @ chains.POLICY, 0.0, atol=1e-12)


@pytest.mark.parametrize("critic", CRITICS)
def test_lambda_0_is_wrong_by_the_critic_s_errors_and_varies_by_one_step(critic: np.ndarray) -> None:
    found = chains.exact_moments(CHAIN, critic, 0.0)
    errors = errors_of(critic)
    for state, action in ((0, 0), (3, 1), (8, 1)):
        wanted, other = (state - 1, state + 1) if action == 0 else (state + 1, state - 1)
        places = [{-1: 9, 9: 10}.get(place, place) for place in (wanted, other)]
        after = chains.OBEYS * errors[places[0]] + (1 - chains.OBEYS) * errors[places[1]]
        bias = found.mean[state, action] - TRUTH[state, action]
        assert bias == pytest.approx(chains.GAMMA * after - errors[state])
        one, two = ((place == 10) + chains.GAMMA * critic[place] for place in places)
        assert found.variance[state, action] == pytest.approx(0.8 * 0.2 * (one - two) ** 2 + chains.NOISE**2)


def test_lambda_1_is_the_return_minus_the_value() -> None:
    """Its bias is the critic's error at the first state, the same for all actions; its variance knows no critic."""
    found = [chains.exact_moments(CHAIN, critic, 1.0) for critic in CRITICS]
    for moments, critic in zip(found, CRITICS, strict=True):
        bias = moments.mean - TRUTH
        np.testing.assert_allclose(bias, -np.tile(errors_of(critic)[: chains.N_STATES, None], 2), atol=1e-12)
        np.testing.assert_allclose(chains.bias_between_actions(bias), 0.0, atol=1e-12)
        np.testing.assert_allclose(moments.variance, found[0].variance, atol=1e-12)


def test_a_critic_that_is_right_has_no_bias_and_the_least_variance_at_0() -> None:
    lambdas = np.linspace(0, 1, 11)
    found = [chains.exact_moments(CHAIN, chains.true_values(CHAIN), each) for each in lambdas]
    for moments in found:
        np.testing.assert_allclose(moments.mean, TRUTH, atol=1e-12)
    variances = [chains.mean_over_pairs(moments.variance) for moments in found]
    assert variances == sorted(variances)


def test_an_episode_by_hand() -> None:
    """Two steps from place 8: back to 7, where the episode is cut off; and over the end at once."""
    walks = chains.Walks(
        before=np.array([[8, 8], [8, 0]]),
        after=np.array([[8, 7], [10, 0]]),
        rewards=np.array([[0.5, -0.5], [2.0, 0.0]]),
        terminated=np.array([[False, False], [True, False]]),
        mask=np.array([[True, True], [True, False]]),
    )
    critic = np.zeros(11)
    critic[[7, 8]] = 10.0, 20.0
    # The first: delta_0 = 0.5 + 0.97 * 20 - 20 = -0.1, delta_1 = -0.5 + 0.97 * 10 - 20 = -10.8, and half of 0.97 of it.
    found = idea_pictures.first_advantages(walks, critic, 0.5)
    np.testing.assert_allclose(found, [-0.1 + 0.485 * -10.8, 2.0 - 20.0])


def test_sampled_episodes_and_gae_agree_with_linear_algebra() -> None:
    wanted = [("poor", gae_lambda) for gae_lambda in (0.0, 0.7, 1.0)]
    sampled = idea_pictures.sampled_estimates(CHAIN, wanted, n=4 * idea_pictures.GROUP_SIZE)
    for (_, gae_lambda), samples in sampled.items():
        exact = chains.exact_moments(CHAIN, CRITICS[-1], gae_lambda)
        error = np.sqrt(exact.variance / len(samples))
        assert (np.abs(samples.mean(0) - exact.mean) < 5 * error).all(), gae_lambda
        found = idea_pictures.summary(samples, TRUTH)
        of_variance = idea_pictures.exact_summary(exact, TRUTH)["variance"]
        assert found["variance"][0] == pytest.approx(of_variance, rel=0.1), gae_lambda


def test_the_summary_takes_the_noise_of_a_mean_out_of_the_squared_bias() -> None:
    generator = np.random.default_rng(1)
    bias = np.zeros_like(TRUTH)
    bias[:, 1] = 0.1
    samples = TRUTH + bias + 2.0 * generator.standard_normal((40 * idea_pictures.GROUP_SIZE, *TRUTH.shape))
    found = idea_pictures.summary(samples, TRUTH)
    # Right is chosen 6 times in 10: a bias of 0.1 there alone is 0.1^2 * 0.6, and 0.1^2 * 0.6 * 0.4 between actions.
    for name, wanted in (("bias_squared", 0.006), ("bias_squared_between_actions", 0.0024), ("variance", 4.0)):
        mean, error = found[name]
        assert abs(mean - wanted) < 4 * error, name
    assert found["bias_squared"][1] < 0.002


def test_what_is_written_down_was_measured_on_this_very_chain() -> None:
    rows = idea_pictures.read_rows(idea_pictures.RESULTS)
    assert len(rows) == len(idea_pictures.CRITICS) * len(idea_pictures.LAMBDAS)
    for row in rows:
        moments = chains.exact_moments(CHAIN, idea_pictures.critic_named(CHAIN, row["critic"]), row["gae_lambda"])
        exact = idea_pictures.exact_summary(moments, TRUTH)
        assert row["exact"] == pytest.approx(exact, abs=1e-12)
        for name in NAMES:
            mean, error = row[name]
            assert abs(mean - exact[name]) < 5 * error + 1e-9, (row["critic"], row["gae_lambda"], name)


def test_the_page_names_the_lambdas_that_are_best() -> None:
    """docs/how-ppo-works.md, "What lambda trades": one advantage and means of 16 and 256, of the poor critic."""
    grid = np.linspace(0, 1, 101)
    found = [idea_pictures.exact_summary(chains.exact_moments(CHAIN, CRITICS[-1], each), TRUTH) for each in grid]
    best = {
        n: grid[np.argmin([one["bias_squared_between_actions"] + one["variance"] / n for one in found])]
        for n in (1, 16, 256)
    }
    assert best == pytest.approx({1: 0.54, 16: 0.81, 256: 0.96})
    assert grid[np.argmin([one["mean_squared_error"] for one in found])] == pytest.approx(0.56)


def test_objectives_that_are_drawn_are_those_by_hand() -> None:
    ratios = np.array([0.5, 1.0, 1.35])
    np.testing.assert_allclose(idea_pictures.objective(ratios, 1.0, 0.2), [0.5, 1.0, 1.2], rtol=1e-6)
    np.testing.assert_allclose(idea_pictures.objective(ratios, -1.0, 0.2), [-0.8, -1.0, -1.35], rtol=1e-6)
    # Half of (1.2 * 1 - 0.8 * 1), with and without the band of 0.1; KL(0.5 || 0.6) is 0.0204 nats.
    assert idea_pictures.expected_objective(0.6, "clip", 0.3) == pytest.approx(0.2, abs=1e-6)
    assert idea_pictures.expected_objective(0.6, "clip", 0.1) == pytest.approx(0.1, abs=1e-6)
    assert idea_pictures.expected_objective(0.6, "penalty", 2.0) == pytest.approx(0.2 - 2 * 0.020411, abs=1e-5)


def test_every_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idea_pictures, "PICTURES", tmp_path)
    idea_pictures.draw_objective()
    idea_pictures.draw_epsilon()
    idea_pictures.draw_penalty()
    idea_pictures.draw_lambda(idea_pictures.read_rows(idea_pictures.RESULTS))
    drawn = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sorted(drawn) == ["clip_and_penalty.png", "clip_epsilon.png", "clip_objective.png", "gae_lambda.png"]
    assert min(drawn.values()) > 20_000
