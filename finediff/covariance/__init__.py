"""Covariance: how much of a spectrum is noise, its cleaning, its estimation from windows and from scenarios.

    marchenko_pastur   what noise alone does to a spectrum; where a factor is believed
    matrix             correlation and scales
    spectrum           nonlinear shrinkage of eigenvalues: the formulas, safe for every n
    clean              (covariance, n_samples) -> covariance: clip, rie, quadratic_inverse_shrinkage
    factors            factor_analytic: common factors and independent residuals
    blocks             block_correlation: groups of assets that are alike
    estimators         the same with fit(X).covariance_
    rows               constant-correlation shrinkage, Student t: they need the rows
    volatility         today's: exponential weights, GARCH, the one that all assets share
    ensemble           WindowEnsembleCovariance: several windows at once
    scenario           ScenarioCovariance: a generator's covariance

Which one? `WindowEnsembleCovariance` for rows in order of time, `quadratic_inverse_shrinkage` or `clip` for rows
that are not; scikit-learn's LedoitWolf, OAS and GraphicalLasso have the same fit and serve as they are.
Units: covariances are in (return per period)^2, eigenvalues are those of the correlation matrix.
"""

from finediff.covariance.blocks import block_correlation
from finediff.covariance.clean import (
    analytical_shrinkage,
    clip,
    matched_diagonal_shrinkage,
    n_factors,
    quadratic_inverse_shrinkage,
    rie,
)
from finediff.covariance.ensemble import WindowEnsembleCovariance
from finediff.covariance.estimators import (
    AnalyticalShrinkage,
    BlockCovariance,
    ClippedCovariance,
    FactorAnalyticCovariance,
    QuadraticInverseShrinkage,
    RotationallyInvariantCovariance,
)
from finediff.covariance.factors import factor_analytic
from finediff.covariance.marchenko_pastur import (
    MarchenkoPastur,
    fitted_edge,
    marchenko_pastur,
    noise_edge,
    tracy_widom_cdf,
    tracy_widom_quantile,
)
from finediff.covariance.matrix import correlation_from_covariance, rescale
from finediff.covariance.rows import ConstantCorrelationShrinkage, StudentTCovariance
from finediff.covariance.scenario import ScenarioCovariance, streaming_moments

__all__ = [
    "AnalyticalShrinkage",
    "BlockCovariance",
    "ClippedCovariance",
    "ConstantCorrelationShrinkage",
    "FactorAnalyticCovariance",
    "MarchenkoPastur",
    "QuadraticInverseShrinkage",
    "RotationallyInvariantCovariance",
    "ScenarioCovariance",
    "StudentTCovariance",
    "WindowEnsembleCovariance",
    "analytical_shrinkage",
    "block_correlation",
    "clip",
    "correlation_from_covariance",
    "factor_analytic",
    "fitted_edge",
    "marchenko_pastur",
    "matched_diagonal_shrinkage",
    "n_factors",
    "noise_edge",
    "quadratic_inverse_shrinkage",
    "rescale",
    "rie",
    "streaming_moments",
    "tracy_widom_cdf",
    "tracy_widom_quantile",
]
