"""What the numbers of `finediff.validation` are called, and how far each is from ideal.

distance = |log value|            of a ratio, ideal at 1
         = (value - ideal)^+      of an error, a rate, an area under a curve
         = (ideal - value)^+      of a p-value, ideal at 1

Generators are ranked by their furthest measure in units of its joint bound, those that copy training rows last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finediff.validation import FLOOR_ROW

__all__ = ["COSTS", "DOTS", "JOINT", "MARGINS", "METRICS", "Metric", "copiers", "named", "ranking", "times"]

_COPIES = 0.1


@dataclass(frozen=True)
class Metric:
    """How a number of `finediff.validation` is shown.

    Attributes
    ----------
    label, meaning : str
        Its heading, and a line for readers who have never met it.
    ideal : float
        The value of perfect scenarios.
    ratio : bool
        Distances are |log value|; otherwise |value - ideal|, on the bad side only.
    digits : int
    """

    label: str
    meaning: str
    ideal: float = 0.0
    ratio: bool = False
    digits: int = 3

    def distance(self, value: float) -> float:
        """How far from the ideal, >= 0; NaN where there is no number."""
        if not math.isfinite(value):
            return math.nan
        if self.ratio:
            return abs(math.log(value)) if value > 0 else math.inf
        return max(value - self.ideal, 0.0) if self.ideal < 1 else max(self.ideal - value, 0.0)


def _ratio(label, meaning):
    return Metric(label, meaning, 1.0, True, 2)


METRICS = {
    "cvm_mean_p": Metric("Portfolios: mean p", "Mean p-value of random portfolios, scenarios against held-out "
                         "rows (Cramér–von Mises). About 0.5 if both follow one law.", 1.0, digits=2),
    "cvm_rejection_rate": Metric("Portfolios rejected", "Share of random portfolios whose returns differ at the 5 % "
                                 "level. About 0.05 if both follow one law."),
    "mean_error_se": Metric("Mean", "Error of the assets' mean returns, in standard errors.", digits=2),
    "sd_ratio": _ratio("Volatility ratio", "Volatility of the scenarios over that of the held-out rows, typical asset."),
    "sd_ratio_min": _ratio("Volatility, lowest", "The same for the asset whose volatility is most understated."),
    "sd_ratio_max": _ratio("Volatility, highest", "The same for the asset whose volatility is most overstated."),
    "skewness_error": Metric("Skewness", "Mean absolute error of the skewness. Too noisy to be judged.", digits=2),
    "kurtosis_ratio": _ratio("Kurtosis ratio", "Weight of the tails, scenarios over held-out rows. Too noisy to be judged."),
    "kurtosis_ratio_portfolio": _ratio("Kurtosis, portfolio", "The same for the equal-weighted portfolio. Not judged."),
    "q0.1_error": Metric("0.1 % quantile", "Relative error of the loss met once in 1,000 periods, mean over assets."),
    "q1_error": Metric("1 % quantile", "Relative error of the loss met once in 100 periods, mean over assets."),
    "q5_error": Metric("5 % quantile", "Relative error of the loss met once in 20 periods, mean over assets."),
    "q95_error": Metric("95 % quantile", "Relative error of the gain met once in 20 periods, mean over assets."),
    "q99_error": Metric("99 % quantile", "Relative error of the gain met once in 100 periods, mean over assets."),
    "q1_error_portfolio": Metric("1 % quantile, portfolio", "The same 1 % error for the equal-weighted portfolio."),
    "tail_dependence_ratio": _ratio("Joint losses", "How often two assets have their worst periods together, scenarios "
                                    "over held-out rows."),
    "correlation_error": Metric("Correlations", "Mean absolute error of the pairwise correlations."),
    "correlation_max_error": Metric("Correlations, worst pair", "Largest absolute error of a pairwise correlation."),
    "correlation_frobenius": Metric("Correlation matrix", "Error of the whole matrix (Frobenius norm)."),
    "energy_distance": Metric("Joint law", "Energy distance between the two clouds of rows, from 0 (the same) to 1.",
                              digits=4),
    "c2st_auc": Metric("Classifier", "How well a classifier tells scenarios from held-out rows: 0.5 is a coin, 1 is "
                       "always.", 0.5),
    "nn_ratio": _ratio("Distance to training", "Distance of scenarios to the nearest training row, over that of held-out "
                       "rows. Near 0: copies."),
    "memorised_fraction": Metric("Memorised", "Share of scenarios that lie on a training row."),
}  # fmt: skip
MARGINS = ["cvm_mean_p", "cvm_rejection_rate", "mean_error_se", "sd_ratio", "sd_ratio_min", "sd_ratio_max"]
MARGINS += ["q0.1_error", "q1_error", "q5_error", "q95_error", "q99_error", "q1_error_portfolio"]
MARGINS += ["skewness_error", "kurtosis_ratio", "kurtosis_ratio_portfolio"]
JOINT = ["correlation_error", "correlation_max_error", "correlation_frobenius", "tail_dependence_ratio"]
JOINT += ["energy_distance", "c2st_auc", "nn_ratio", "memorised_fraction"]
DOTS = ["cvm_rejection_rate", "q5_error", "correlation_error", "energy_distance", "c2st_auc"]
COSTS = {
    "fit s": ("Fit, s", 1),
    "sample s": ("Sample, s", 2),
    "network evaluations": ("Network evaluations", 0),
}


def copiers(split) -> list[str]:
    """Generators of which a tenth of the scenarios or more, and more than of real rows, lies on training rows."""
    share = split.table["memorised_fraction"].drop(FLOOR_ROW)
    bound = split.report.table.at["memorised_fraction", "floor_high"]
    return list(share.index[(share >= _COPIES) & ~(share <= bound)])


def ranking(split) -> list[str]:
    """Generators that do not copy rows, nearest first by their furthest measure; then those that do."""
    copies = copiers(split)
    order = split.table["furthest"].drop(FLOOR_ROW).sort_values(kind="stable").index
    return [name for name in order if name not in copies] + [name for name in order if name in copies]


def named(key: str) -> str:
    """A metric's label inside a sentence."""
    label = METRICS[key].label
    return label[0].lower() + label[1:]


def times(excess: float) -> str:
    """A distance in units of its bound, never rounded across it."""
    if not math.isfinite(excess):
        return "∞"
    shown = f"{excess:.2f}" if excess < 10 else f"{excess:,.0f}"
    # 1.00 would hide on which side of the bound it lies.
    return shown.replace("-", "−") if shown != "1.00" else ("> 1" if excess > 1 else "< 1")
