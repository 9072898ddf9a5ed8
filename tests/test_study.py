"""The main job end to end, on a market whose law is known."""

import numpy as np
import pandas as pd
import pytest

from finediff.covariance import correlation_from_covariance
from finediff.generators import BootstrapGenerator, DDPMGenerator, GaussianGenerator, StudentTGenerator
from finediff.panel import Finding
from finediff.report.study import study
from finediff.validation import FLOOR_ROW, tail_test


def market(n: int, dof: float, seed: int) -> pd.DataFrame:
    """Multivariate t of five assets: one market factor, volatilities from .5 to 2 %."""
    rng = np.random.default_rng(seed)
    z = 0.6 * rng.standard_normal((n, 1)) + 0.8 * rng.standard_normal((n, 5))
    stretch = np.sqrt((dof - 2) / rng.chisquare(dof, (n, 1)))
    index = pd.bdate_range("2000-01-03", periods=n, name="Date")
    return pd.DataFrame(z * stretch * np.linspace(0.005, 0.02, 5), columns=list("ABCDE"), index=index)


@pytest.fixture(scope="module")
def result():
    generators = {
        "student-t": StudentTGenerator(random_state=0),
        "gaussian": GaussianGenerator(random_state=0),
        "bootstrap": BootstrapGenerator(random_state=0),
        "ddpm": DDPMGenerator(steps=30, width=16, random_state=0),
    }
    return study(market(3000, 4.5, 0), generators, title="A known market", n_jobs=1, say=lambda line: None)


def test_the_true_family_passes_and_the_wrong_one_does_not(result):
    table = result.splits["random"].table
    assert table.loc["student-t", "verdict"] == "within floor"
    assert table.loc["gaussian", "verdict"] == "beyond floor"
    assert table.loc["gaussian", "kurtosis_ratio"] < table.loc["student-t", "kurtosis_ratio"]
    assert table.loc["bootstrap", "memorised_fraction"] == 1
    assert table.loc[["student-t", "gaussian"], "memorised_fraction"].max() < 0.02
    assert table.index[-1] == FLOOR_ROW


def test_both_splits_hold_out_rows_that_nobody_saw(result):
    assert set(result.splits) == {"random", "chronological"}
    assert not set(result.train.index) & set(result.held_out.index)
    assert len(result.train) + len(result.held_out) == len(result.returns)
    assert len(result.held_out) == pytest.approx(0.3 * 3000, abs=1)
    assert "judged on" in result.splits["chronological"].description


def test_results_are_about_the_chosen_generator(result):
    assert result.generator_name == "student-t"
    assert result.scenarios.shape == (10_000, 5)
    assert list(result.scenarios.columns) == list("ABCDE")
    assert set(result.histories) == {"ddpm"}
    # Scales from the training rows; correlations near the true .36, to three standard errors of heavy-tailed rows.
    covariance = result.covariances["scenarios"]
    np.testing.assert_allclose(np.diag(covariance), result.train.var(), rtol=1e-9)
    scale = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(scale, scale)
    assert np.abs(correlation.to_numpy()[np.triu_indices(5, 1)] - 0.36).max() < 0.09
    for allocation in result.allocations.values():
        assert allocation.weights.sum() == pytest.approx(1)
        assert allocation.weights.min() >= -1e-9


def test_the_true_covariance_would_have_the_least_held_out_volatility(result):
    column = result.covariance_table["held-out volatility of its minimum-variance portfolio (%)"]
    assert (
        column.idxmin() == "held-out rows"
    )  # a portfolio fitted to the rows it is judged on cannot be beaten


def test_scenarios_are_set_beside_shrinkage_of_equal_strength(result):
    matched, ours = result.covariances["sample + matched diagonal"], result.covariances["scenarios"]
    assert np.diag(matched) == pytest.approx(np.diag(result.covariances["sample"]))
    condition = [np.linalg.cond(correlation_from_covariance(c)) for c in (matched, ours)]
    assert condition[0] == pytest.approx(condition[1], rel=1e-6) or matched.equals(
        result.covariances["sample"]
    )
    text = result.verdicts["covariance"].text
    assert "sample + matched diagonal" in text
    assert "Marchenko" not in text or "lowest, Marchenko" in text


def test_the_generator_is_walked_forward_where_it_is_quick(result):
    assert result.walks.quarterly.strategies[0] == "student-t"
    assert len(result.walks.quarterly.windows) == 40
    assert result.walks.quarterly.returns.index[-1] == result.returns.index[-1]
    assert "student-t's covariance had" in result.verdicts["walk-forward"].text


def test_tail_risk_of_the_true_family_is_within_its_error(result):
    gap = (result.tail["VaR scenarios"] - result.tail["VaR real"]).abs() / result.tail["VaR real s.e."]
    assert gap.max() < 4
    assert result.tail_test.p_value > 0.01
    assert 0.02 < result.crash_error < 1
    seed = int(np.random.SeedSequence(0).generate_state(3)[2])
    portfolios = {name: allocation.weights for name, allocation in result.allocations.items()}
    counted = tail_test(result.held_out, result.scenarios, portfolios, train=result.train, random_state=seed)
    pd.testing.assert_frame_equal(counted.together, result.tail_test.together)


def test_every_section_has_its_sentence(result):
    sections = {
        "panel",
        "training",
        "fit",
        "dependence",
        "covariance",
        "portfolio",
        "walk-forward",
        "tail risk",
        "generators",
    }
    assert set(result.verdicts) == sections
    for verdict in result.verdicts.values():
        assert verdict.status in {"good", "note", "poor"}
        assert verdict.text.endswith(".")
        assert "nan" not in verdict.text


def test_too_few_rows_are_refused_before_the_work():
    with pytest.raises(
        ValueError, match="expected at least 20 rows for training and for judging, got 15 of 50"
    ):
        study(market(50, 5.0, 0), {"gaussian": GaussianGenerator()}, title="Short")


def test_findings_of_the_panel_as_it_came_are_kept():
    finding = Finding("late_listing", "warning", "E", None, "Column E begins late.", "Mind it.")
    made = study(
        market(300, 5.0, 0),
        {"gaussian": GaussianGenerator(random_state=0)},
        title="Late",
        n_jobs=1,
        findings=[finding],
        caveats=["Survivors only."],
        say=lambda line: None,
    )
    assert made.verdicts["panel"].status == "note"
    assert "Column E begins late." in made.verdicts["panel"].text
    assert made.caveats == ("Survivors only.",)
    assert "walk-forward" not in made.verdicts
    assert "needs 1,000" in made.walks.absent
    assert "90 held-out rows show large differences only" in made.verdicts["fit"].text


def test_same_seed_same_study(result):
    generators = {"student-t": StudentTGenerator(random_state=0)}
    again = study(market(3000, 4.5, 0), generators, title="Again", n_jobs=2, say=lambda line: None)
    pd.testing.assert_frame_equal(again.scenarios, result.scenarios)
    pd.testing.assert_frame_equal(again.tail, result.tail)
    pd.testing.assert_frame_equal(again.walks.quarterly.returns, result.walks.quarterly.returns)
