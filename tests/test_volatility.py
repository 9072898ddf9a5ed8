"""Today's volatility: definitions by loops, parameters that made the data found again, arch as a second opinion."""

import numpy as np
import pytest
from arch import arch_model
from scipy.stats import t as student

from finediff.covariance.volatility import common_variance, ewma_variance, garch_variance

DOF = 6.0


def garch_rows(n, d, a, b, seed, burn=500):
    """Independent GARCH(1,1) of Student shocks, variances 1e-4 times 1 ... d."""
    rng = np.random.default_rng(seed)
    shocks = rng.standard_t(DOF, (n + burn, d)) * np.sqrt((DOF - 2) / DOF)
    h, out = np.ones(d), []
    for e in shocks:
        z = np.sqrt(h) * e
        out.append(z)
        h = 1 - a - b + a * z**2 + b * h
    return np.array(out[burn:]) * np.sqrt(1e-4 * np.arange(1, d + 1)), h


def test_weights_fall_by_the_decay():
    rows = np.random.default_rng(0).standard_normal((50, 3))
    value, weight = np.zeros(3), 0.0
    for x in rows:
        value, weight = 0.9 * value + x**2, 0.9 * weight + 1
    np.testing.assert_allclose(ewma_variance(rows, 0.9), value / weight, rtol=1e-12)


def test_the_common_variance_is_its_recursion():
    rows = np.random.default_rng(1).standard_normal((50, 3)) * [1, 2, 5]
    variance, h, found = (rows**2).mean(axis=0), 1.0, []
    for x in rows:
        h = 0.9 * h + 0.1 * np.mean(x**2 / variance)
        found.append(h)
    np.testing.assert_allclose(common_variance(rows, 0.9), found, rtol=1e-12)
    np.testing.assert_allclose(common_variance(rows * [7, 0.1, 3], 0.9), found, rtol=1e-12)
    np.testing.assert_array_equal(common_variance(np.stack([rows, rows]), 0.9)[1], common_variance(rows, 0.9))


@pytest.mark.parametrize(("a", "b"), [(0.05, 0.93), (0.12, 0.8)])
def test_the_parameters_that_made_the_rows_are_found(a, b):
    found = np.array([garch_variance(garch_rows(1000, 20, a, b, seed)[0])[1] for seed in range(6)])
    error = found.std(axis=0, ddof=1) / np.sqrt(6)
    # Targeting the variance at that of the sample costs a bias that is an error of one sample, hence its scale.
    np.testing.assert_allclose(found.mean(axis=0), [a, b], atol=4 * error.max() + 0.005)


def test_the_forecast_is_the_mean_of_the_paths_to_come():
    a, b = 0.1, 0.85
    rows, _ = garch_rows(2000, 4, a, b, 3)
    variance, (a, b) = garch_variance(rows, horizon=10)
    h = np.ones(4)
    for x in rows:
        h = 1 - a - b + a * x**2 / (rows**2).mean(axis=0) + b * h
    rng, m = np.random.default_rng(0), 200_000
    paths, total = np.broadcast_to(h, (m, 4)), 0.0
    for _ in range(10):
        total = total + paths.mean(axis=0) / 10
        shock = rng.standard_normal((m, 4))
        paths = 1 - a - b + (a * shock**2 + b) * paths
    np.testing.assert_allclose(variance / (rows**2).mean(axis=0), total, rtol=4 * 0.3 / np.sqrt(m) + 1e-3)


def test_on_one_asset_arch_agrees():
    """The same likelihood but for the targeted variance and the degrees of freedom, which arch fits."""
    rows, _ = garch_rows(4000, 1, 0.08, 0.9, 11)
    model = arch_model(100 * rows[:, 0], mean="Zero", vol="GARCH", dist="t", rescale=False)
    other = model.fit(disp="off")
    ours, (a, b) = garch_variance(rows)
    theirs = other.forecast(horizon=21).variance.to_numpy()[-1].mean() / 1e4
    assert a == pytest.approx(other.params["alpha[1]"], abs=2 * other.std_err["alpha[1]"])
    assert b == pytest.approx(other.params["beta[1]"], abs=2 * other.std_err["beta[1]"])
    assert ours[0] == pytest.approx(theirs, rel=0.1)


def test_rows_without_memory_keep_their_variance():
    rows = 0.01 * student.rvs(DOF, size=(1000, 30), random_state=5) * np.geomspace(1, 4, 30)
    ours, (a, _) = garch_variance(rows)
    assert a < 0.02
    np.testing.assert_allclose(ours / (rows**2).mean(axis=0), 1, atol=0.1)


def test_units_and_order_follow():
    rows, _ = garch_rows(400, 5, 0.1, 0.85, 7)
    ours, parameters = garch_variance(rows)
    other, same = garch_variance(100 * rows[:, ::-1])
    np.testing.assert_allclose(other[::-1], 1e4 * ours, rtol=1e-6)
    np.testing.assert_allclose(same, parameters, rtol=1e-6)


def test_a_stale_price_does_not_set_the_parameters():
    rows, _ = garch_rows(500, 20, 0.05, 0.93, 2)
    live = garch_variance(rows[:, 1:])
    stale = rows.copy()
    stale[60:460, 0] = 0.0
    for given in (stale, stale - 1e-4):
        variance, parameters = garch_variance(given)
        np.testing.assert_allclose(parameters, live[1], atol=0.01)
        np.testing.assert_allclose(variance[1:], live[0], rtol=0.03)
    assert np.isfinite(garch_variance(stale[:, :1])[0]).all()
