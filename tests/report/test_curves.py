import numpy as np
import pytest

from proximo.report.curves import lonely, readable_limits, thinned, trend


def test_thinning_keeps_every_spike_and_the_order():
    x = np.arange(100_000.0)
    y = np.zeros(100_000)
    y[12_345], y[67_890] = 5.0, -7.0
    thin = thinned(x, y, 1000)
    assert len(thin.x) <= 1000
    assert thin.y.max() == 5.0
    assert thin.y.min() == -7.0
    assert thin.x[thin.y.argmax()] == 12_345
    assert (np.diff(thin.x) > 0).all()


def test_thinning_keeps_gaps():
    y = np.ones(10_000)
    y[4000:6000] = np.nan
    thin = thinned(np.arange(10_000.0), y, 100)
    gap = np.isnan(thin.y)
    assert gap.any()
    assert thin.x[gap].min() >= 4000
    assert thin.x[gap].max() < 6000


def test_a_short_curve_is_left_as_it_is():
    x, y = np.arange(10.0), np.arange(10.0)
    assert thinned(x, y).y is y
    assert trend(x, y) is None


def test_the_trend_ignores_a_spike_and_keeps_gaps():
    rng = np.random.default_rng(0)
    y = rng.normal(1.0, 0.1, 400)
    y[100] = 1e6
    y[200:250] = np.nan
    found = trend(np.arange(400.0), y)
    assert found is not None
    assert np.isnan(found.y[200:250]).all()
    assert np.nanmax(found.y) < 1.2


def test_a_smooth_curve_needs_no_trend():
    x = np.arange(400.0)
    assert trend(x, np.sin(x / 60)) is None


def test_limits_leave_a_wild_value_outside_and_say_so():
    values = np.append(np.linspace(0.0, 1.0, 100), 500.0)
    limits = readable_limits(values)
    assert limits.high < 5
    assert (limits.n_outside, limits.furthest) == (1, 500.0)


def test_limits_hold_everything_where_nothing_is_wild():
    limits = readable_limits(np.array([-3.0, 0.0, 1.0, 2.0, np.nan]))
    assert limits.low < -3.0
    assert limits.high > 2.0
    assert limits.n_outside == 0
    assert limits.furthest is None


def test_a_floor_and_a_ceiling_decide_alone():
    limits = readable_limits(np.array([-700.0, -0.01, 0.95, 0.95, 0.96]), floor=-1.0, ceiling=1.0)
    assert -1.2 < limits.low < -1.0
    assert limits.furthest == -700.0
    # All values beyond the floor: still an axis, not an empty one.
    below = readable_limits(np.array([-5.0, -4.0]), floor=-1.0, ceiling=1.0)
    assert below.low < below.high


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-300])
def test_one_value_has_limits_around_it(value):
    limits = readable_limits(np.array([value]))
    assert limits.low < value < limits.high


def test_limits_of_nothing_are_an_error():
    with pytest.raises(ValueError, match="finite"):
        readable_limits(np.array([np.nan]))


def test_lonely_points_have_gaps_on_both_sides():
    y = np.array([1.0, np.nan, 2.0, 3.0, np.nan, 4.0])
    assert lonely(y).tolist() == [True, False, False, False, False, True]
    assert lonely(np.array([1.0])).tolist() == [True]
    assert lonely(np.array([])).tolist() == []


def test_a_noisy_curve_over_many_powers_of_ten_gets_its_trend():
    rng = np.random.default_rng(0)
    y = 10.0 ** np.linspace(2, -6, 400) * rng.lognormal(0.0, 1.0, 400)
    assert trend(np.arange(400.0), y) is not None
