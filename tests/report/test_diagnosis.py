import warnings

import numpy as np
import pytest

from proximo.report.diagnosis import RULES, diagnose
from tests.report.samples import SETTINGS, rows


def names(metrics, **settings):
    return [finding.name for finding in diagnose(metrics, SETTINGS | settings)]


def only(name, metrics, **settings):
    """The finding of that name, which must be there once."""
    found = [finding for finding in diagnose(metrics, SETTINGS | settings) if finding.name == name]
    assert len(found) == 1, f"{name} is not among {names(metrics, **settings)}"
    return found[0]


SHARE = np.linspace(0, 1, 100)


# --- healthy runs ---------------------------------------------------------------------------------------------


def test_a_run_that_learns_is_healthy_and_nothing_else():
    (finding,) = diagnose(rows(), SETTINGS)
    assert (finding.name, finding.severity) == ("healthy", "good")
    assert "499.9" in finding.seen
    assert "iteration 100" in finding.seen


def test_a_solved_task_with_equal_returns_may_have_any_explained_variance():
    solved = np.minimum(20 + 960 * SHARE, 500)
    assert names(
        rows(
            return_mean=solved,
            length_mean=solved,
            explained_variance=np.where(SHARE < 0.5, 0.9, -300.0),
            value_loss=np.where(SHARE < 0.5, 30.0, 1e-6),
        )
    ) == ["healthy"]


def test_equal_returns_whose_mean_still_rises_leave_the_critic_alone():
    # The mean of the last 100 episodes goes on rising long after every new episode scores 500.
    assert names(
        rows(
            return_mean=20 + 480 * SHARE,
            explained_variance=np.where(SHARE < 0.4, 0.9, -5.0),
            value_loss=np.where(SHARE < 0.4, 30.0, 1e-3),
        )
    ) == ["healthy"]


def test_a_learning_rate_that_decays_to_zero_may_stop_all_movement():
    assert names(
        rows(learning_rate=3e-4 * (1 - SHARE), approx_kl=1e-2 * (1 - SHARE) ** 6, clip_fraction=0.1 * (1 - SHARE) ** 4)
    ) == ["healthy"]


def test_a_deterministic_policy_at_the_end_is_no_collapse():
    assert names(rows(entropy=0.69 * (1 - SHARE) ** 3)) == ["healthy"]


def test_a_policy_that_is_certain_early_because_it_has_solved_the_task_is_healthy():
    solved = np.minimum(20 + 480 * SHARE / 0.25, 500)
    assert names(rows(return_mean=solved, entropy=np.maximum(0.69 - 0.69 * SHARE / 0.2, 0.001))) == ["healthy"]


def test_continuous_actions_may_have_negative_entropy():
    assert names(rows(entropy=1.4 - 4 * SHARE)) == ["healthy"]


def test_episodes_that_always_run_to_the_time_limit_are_healthy_where_returns_rise():
    assert names(rows(return_mean=-1200 + 1000 * SHARE, length_mean=200.0)) == ["healthy"]


def test_a_small_dip_after_the_best_is_no_collapse():
    dip = np.where(SHARE < 0.8, 20 + 480 * SHARE / 0.8, 430.0)
    assert names(rows(return_mean=dip)) == ["healthy"]


def test_value_losses_that_grow_with_the_returns_do_not_explode():
    returns = 10 + 5000 * SHARE
    assert names(rows(return_mean=returns, value_loss=0.01 * returns**2, explained_variance=0.3)) == ["healthy"]


def test_an_occasional_kl_stop_is_healthy():
    assert names(rows(kl_stopped=(np.arange(100) % 4 == 0) * 1.0), target_kl=0.02) == ["healthy"]


def test_returns_that_waver_around_zero_are_no_collapse():
    rng = np.random.default_rng(3)
    episodes = rng.normal(0.0, 1.0, 1300)
    means = np.array([episodes[max(0, n - 100) : n].mean() for n in range(12, 1212, 12)])
    assert "return_collapsed" not in names(rows(return_mean=means))
    assert "healthy" not in names(rows(return_mean=means))


# --- faults ---------------------------------------------------------------------------------------------------


def test_entropy_that_collapses_before_anything_is_learned():
    finding = only(
        "entropy_collapsed", rows(entropy=np.where(SHARE < 0.1, 0.69, 0.005), return_mean=20.0, length_mean=20.0)
    )
    assert finding.severity == "problem"
    assert "iteration 11" in finding.seen
    assert "entropy_coef (now 0; 0.01 is usual)" in finding.advice


def test_entropy_that_collapses_far_below_what_comes_later():
    late = np.where(SHARE < 0.7, 60.0, 60 + 1400 * (SHARE - 0.7))
    assert only("entropy_collapsed", rows(entropy=np.where(SHARE < 0.1, 0.69, 0.005), return_mean=late))


def test_updates_that_go_too_far():
    finding = only("updates_too_large", rows(approx_kl=0.12))
    assert finding.severity == "warning"
    assert "0.12" in finding.seen
    assert "target_kl" in finding.advice
    assert "healthy" not in names(rows(approx_kl=0.12))
    assert only("updates_too_large", rows(clip_fraction=0.6, return_mean=20.0))


def test_one_update_that_leaves_nothing_of_the_policy():
    stuck = dict(return_mean=9.0 + 0.1 * np.sin(np.arange(100)), approx_kl=np.where(np.arange(100) == 2, 3.4, 0.0))
    finding = only("updates_too_large", rows(**stuck, clip_fraction=0.0))
    assert "The update of iteration 3 moved the policy by a KL of 3.4" in finding.seen
    assert "updates_too_small" not in names(rows(**stuck, clip_fraction=0.0))
    assert names(rows(approx_kl=np.where(np.arange(100) == 50, 0.6, 0.01))) == ["healthy"]


def test_updates_that_do_nothing_while_returns_waver_by_luck():
    falling = dict(approx_kl=1e-11, clip_fraction=0.0, return_mean=26 - 5 * SHARE, explained_variance=0.5)
    assert only("updates_too_small", rows(**falling)).severity == "warning"


def test_updates_that_do_nothing():
    finding = only(
        "updates_too_small", rows(approx_kl=1e-9, clip_fraction=0.0, return_mean=22.0, explained_variance=0.5)
    )
    assert finding.severity == "problem"
    assert "learning_rate (now 0.0003" in finding.advice


def test_a_critic_that_explains_nothing():
    finding = only(
        "critic_explains_nothing", rows(explained_variance=0.01, return_mean=-1200 + 100 * np.sin(SHARE * 20))
    )
    assert "0.01" in finding.seen
    assert "iteration 51" in finding.seen
    assert "set normalize_rewards to true" in finding.advice.lower()
    assert only("critic_explains_nothing", rows(explained_variance=-0.2)).severity == "warning"


def test_advice_does_not_ask_for_what_is_set():
    finding = only("critic_explains_nothing", rows(explained_variance=0.01), normalize_rewards=True)
    assert "normalize_rewards" not in finding.advice
    assert "lower target_kl (now 0.5)" in only("updates_too_large", rows(approx_kl=0.12), target_kl=0.5).advice


def test_tiny_rollouts_say_nothing_of_the_critic():
    assert "critic_explains_nothing" not in names(rows(explained_variance=-3.0), n_envs=1, rollout_length=8)


def test_a_value_loss_that_explodes():
    finding = only("value_loss_exploded", rows(value_loss=10.0 ** (6 * SHARE), explained_variance=0.0))
    assert finding.severity == "problem"
    assert "times as much" in finding.seen


def test_returns_that_stay_flat():
    rng = np.random.default_rng(0)
    finding = only("returns_flat", rows(return_mean=22 + 0.5 * rng.normal(size=100)))
    assert finding.severity == "problem"


def test_flat_returns_are_no_fault_before_a_quarter_of_the_budget():
    assert "returns_flat" not in names(rows(return_mean=22.0), total_steps=10_000_000)


@pytest.mark.parametrize("ends", [0.0, None])  # None: a run from before it was counted how episodes end
def test_episodes_that_are_all_cut_off(ends):
    cut = rows(return_mean=-200.0, length_mean=200.0, terminated_share=ends)
    assert "200 steps" in only("episodes_all_cut_off", cut).seen
    assert "returns_flat" not in names(cut)


def test_what_began_with_a_policy_that_had_learned_may_be_solved():
    solved = rows(return_mean=500.0, length_mean=500.0, terminated_share=0.0)
    finding = only("episodes_all_cut_off", solved, init_from="runs/before")
    assert (finding.severity, "solved the task already" in finding.meaning) == ("note", True)
    assert only("episodes_all_cut_off", solved).severity == "problem"


def test_a_return_that_collapses_after_its_peak():
    fall = np.where(SHARE < 0.6, 20 + 480 * SHARE / 0.6, 40.0)
    finding = only("return_collapsed", rows(return_mean=fall))
    assert finding.severity == "problem"
    assert "iteration 60" in finding.seen
    assert "checkpoints/best" in finding.advice


def test_a_return_that_only_falls():
    assert only("return_collapsed", rows(return_mean=-100 - 900 * SHARE))


def test_no_finished_episode_is_a_note_first_and_a_problem_later():
    nothing = {"n_episodes": 0, "return_mean": None, "length_mean": None}
    assert only("no_episode_finished", rows(4, **nothing)).severity == "note"
    finding = only("no_episode_finished", rows(100, **nothing))
    assert finding.severity == "problem"
    assert "max_episode_steps" in finding.advice


def test_a_kl_stop_that_ends_most_updates():
    finding = only("kl_stop_dominates", rows(kl_stopped=1.0, n_updates=30), target_kl=0.001)
    assert finding.severity == "warning"
    assert "30 of 320" in finding.seen
    assert only("kl_stop_dominates", rows(kl_stopped=1.0, n_updates=250), target_kl=0.001).severity == "note"


def test_where_the_time_goes_is_worth_a_note_only():
    slow = rows(seconds_collecting=9.0, seconds_updating=0.1)
    finding = only("environment_dominates", slow)
    assert finding.severity == "note"
    assert "workers" in finding.advice
    assert "workers" not in only("environment_dominates", slow, vectorization="workers").advice
    assert "batch_size" in only("updates_dominate", rows(seconds_collecting=0.01)).advice
    assert "healthy" in names(slow)


def test_losses_that_are_no_numbers():
    losses = np.where(SHARE > 0.9, np.nan, 0.01)
    finding = only("not_finite", rows(policy_loss=losses))
    assert "iteration 91" in finding.seen


# --- form -----------------------------------------------------------------------------------------------------


def test_the_worst_comes_first_and_every_finding_is_complete():
    found = diagnose(rows(approx_kl=1e-9, clip_fraction=0.0, return_mean=22.0, seconds_collecting=9.0), SETTINGS)
    order = ["problem", "warning", "good", "note"]
    assert [order.index(f.severity) for f in found] == sorted(order.index(f.severity) for f in found)
    for finding in found:
        assert finding.seen.endswith(".")
        assert finding.meaning.endswith(".")
        assert finding.advice.endswith(".")
        assert "nan" not in finding.seen


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_run_that_has_just_begun_is_too_early(n):
    (finding,) = diagnose(rows(n), SETTINGS)
    assert (finding.name, finding.severity) == ("too_early", "note")


def test_no_rule_stumbles_over_missing_or_odd_values():
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            metrics = rows(int(rng.integers(1, 40)))
            gone = rng.choice(list(metrics[0]), size=8, replace=False)
            for row in metrics:
                for name in gone:
                    row[name] = [None, "text", True, 0.0, -1e150][rng.integers(5)]
            for row in metrics:
                row.pop(str(gone[0]))
            settings = {name: SETTINGS[name] for name in rng.choice(list(SETTINGS), size=4)}
            for rule in RULES:
                assert rule.__doc__
            diagnose(metrics, settings)
