"""What real rows do against real rows: the bounds that scenarios are judged by.

b_k: distance of metric k from its ideal (root of a rate, logit of a p-value), over random splits of real rows

    z_k      = (b_k - median b_k)/(95 % quantile of b_k - median b_k)
    c        = 95 % quantile of max_k z_k over the same splits
    bound_k  = median b_k + c (95 % quantile of b_k - median b_k),      excess_k = z_k/c

All metrics of real rows stay within their bounds in 95 % of splits, so one metric beyond its bound is a test of
size 5 % (single-step max-T: Westfall & Young 1993). excess_k is 0 for a typical split and 1 at the bound.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.special import ndtri

from finediff.memorisation import copied, median_ratio, two_nearest
from finediff.validation.cvm import CvMResult, cvm_null, cvm_result, portfolio_weights, random_masks
from finediff.validation.inputs import MIN_ROWS, subset
from finediff.validation.metrics import (
    AUC_INFLATION,
    CLASSIFIER_ROWS,
    LEVELS,
    auc,
    energy_distance,
    energy_null,
    panel_errors,
    summary,
)

_TAIL_ROWS = 20  # real rows beyond a quantile before its error is judged
_ENERGY_ROWS = 1500
_SUBSETS = 8

# How far a metric is from ideal: an error is its own badness, a ratio is ideal at 1, a p-value when large.
_KIND = pd.Series(
    {
        "cvm_mean_p": "p",
        "cvm_rejection_rate": "error",
        "mean_error_se": "error",
        **dict.fromkeys(("sd_ratio", "sd_ratio_min", "sd_ratio_max"), "ratio"),
        "skewness_error": "error",
        **dict.fromkeys(("kurtosis_ratio", "kurtosis_ratio_portfolio"), "ratio"),
        **dict.fromkeys([f"q{100 * level:g}_error" for level in LEVELS], "error"),
        "q1_error_portfolio": "error",
        "tail_dependence_ratio": "ratio",
        **dict.fromkeys(("correlation_error", "correlation_max_error", "correlation_frobenius"), "error"),
        **dict.fromkeys(("energy_distance", "c2st_auc"), "error"),
        "nn_ratio": "ratio",
        "memorised_fraction": "error",
    }
)
SIZE = 0.05  # of the joint test

# Tails of index near 4 leave the third and fourth moments without a sampling law that splits could show:
# under one law they pass a 95 % bound in 10-23 % of cases. Quantiles and dependence judge the tails.
_SHOWN_ONLY = ["skewness_error", "kurtosis_ratio", "kurtosis_ratio_portfolio"]


def badness(values):
    """Distance from ideal, for a Series of metrics or a DataFrame of them; NaN counts as infinite."""
    out = values.copy()
    ratio, p = _KIND.index[_KIND == "ratio"], _KIND.index[_KIND == "p"]
    safe = values[ratio].clip(lower=np.finfo(float).tiny)
    out[ratio] = np.abs(np.log(safe)).where(values[ratio] > 0, np.inf)
    out[p] = 1.0 - values[p]
    return out.fillna(np.inf)


def from_badness(bad: pd.Series) -> pd.Series:
    """The metric at a distance from its ideal (a ratio above 1); NaN where there is no bound."""
    out = bad.copy()
    out[_KIND == "ratio"] = np.exp(bad[_KIND == "ratio"])
    out[_KIND == "p"] = np.maximum(1.0 - bad[_KIND == "p"], 0.0)
    return out.where(np.isfinite(bad))


def _scaled(bad):
    """Badness on scales where all metrics have like tails: the root of the rejection rate, the logit of 1 - p."""
    out = bad.copy()
    # Portfolios share the market: between like rows their rejection rate is 2 % in the median, 50 % once in 200.
    out["cvm_rejection_rate"] = np.sqrt(bad["cvm_rejection_rate"])
    p = np.clip(bad["cvm_mean_p"], 1e-12, 1 - 1e-12)
    out["cvm_mean_p"] = np.log(p / (1 - p))
    return out


def _unscaled(scaled: pd.Series) -> pd.Series:
    out = scaled.copy()
    out["cvm_rejection_rate"] = min(scaled["cvm_rejection_rate"] ** 2, 1.0)
    out["cvm_mean_p"] = 1 / (1 + np.exp(-scaled["cvm_mean_p"]))
    return out


class Floor:
    """Real rows against real rows: drawn once, shared by every generator that is judged by it.

    x (n, d): rows that no generator saw; train (t, d) or None: rows that stand in the place of scenarios
    (without them x is halved); m: scenarios that will be judged.

    n, m : rows on either side of every comparison.
    values, high : Series; metrics of real rows, and the bounds of badness that they keep together.
    furthest, threshold : largest z of every split (n_null,), and c: of n_null + 1 draws of one law one in twenty
        lies above it.
    own_excess, own_p : of the training rows in the place of scenarios, before the bounds are moved; None and NaN
        without them.
    train_differs : do they lie beyond the bounds?
    """

    def __init__(self, x, train, m: int, n_portfolios: int, n_null: int, rng: np.random.Generator):
        seeds = rng.integers(2**63, size=3)
        if train is None:
            self.n, self.m = len(x) // 2, min(m, len(x) - len(x) // 2)
            pool = x[rng.permutation(len(x))[: self.n + self.m]]
        else:
            self.n, self.m = len(x), min(m, len(x), len(train))
            pool = np.vstack([x, subset(train, self.m, rng)])
        if min(self.n, self.m) < MIN_ROWS:
            raise ValueError(
                f"expected at least {MIN_ROWS} rows on either side of a comparison, got {self.n} real and "
                f"{self.m} others, because smaller samples tell nothing (without train the real rows are "
                "halved): pass more rows"
            )
        self._x, self._train, self._seed = x, train, int(seeds[0])
        d = x.shape[1]
        self._weights = portfolio_weights(d, n_portfolios if d > 1 else 1, np.random.default_rng(seeds[1]))
        self._energy_rows = min(self.n, _ENERGY_ROWS), min(self.m, _ENERGY_ROWS)
        self._classifier_rows = min(self.n, CLASSIFIER_ROWS), min(self.m, CLASSIFIER_ROWS)
        self._nearest = None if train is None else two_nearest(x, train)
        masks = random_masks(self.n, self.m, n_null, np.random.default_rng(seeds[2]))
        bad = badness(self._draw(pool, masks, rng))
        self._bound(bad)
        self.shift, self.own_excess, self.own_p, self.train_differs = 0.0, None, float("nan"), False
        if train is not None:
            self.values, _ = self.measure(pool[self.n :], own=True)
            self.own_excess = self.excess(self.values)
            self.own_p = self.p_value(self.own_excess)
            self.train_differs = bool((self.own_excess > 1).any())
            if self.train_differs:
                # Training rows differ from these by more than chance: no generator can undo that. Only then are
                # the bounds moved, since the gap of two like sets would widen them by nothing but noise.
                gap = _scaled(badness(self.values)) - _scaled(bad).mean()
                self.shift = gap.clip(lower=0.0).where(np.isfinite(gap), 0.0)
        self.high = _unscaled(self._middle + self.threshold * self._spread + self.shift)

    def _draw(self, pool: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
        """Metrics (n_null, K) between random splits of real rows; their mean is the floor's first answer."""
        n_null = len(masks)
        self._cvm_null = cvm_null(pool, self._weights, masks)
        columns = np.ascontiguousarray(pool.T)
        null = pd.DataFrame([panel_errors(summary(columns[:, k]), summary(columns[:, ~k])) for k in masks])
        null["cvm_rejection_rate"], null["cvm_mean_p"], _ = self._cvm_null
        part = pool[rng.permutation(len(pool))[: sum(self._energy_rows)]]
        null["energy_distance"] = energy_null(part, random_masks(*self._energy_rows, n_null, rng))
        a, b = self._classifier_rows
        deviation = AUC_INFLATION * np.sqrt((a + b + 1) / (12 * a * b))
        # Normal scores in random order: the law without the noise of n_null draws.
        scores = ndtri((np.arange(n_null) + 0.5) / n_null)
        null["c2st_auc"] = 0.5 + deviation * rng.permutation(scores)
        if self._nearest is not None:
            first = self._nearest[:, 0]
            null["nn_ratio"] = [
                median_ratio(rng.choice(first, self.m), rng.choice(first, self.n)) for _ in range(n_null)
            ]
            k = int(copied(self._nearest).sum())
            # The floor's own fraction is an estimate from n rows: its Beta posterior, then m scenarios.
            chance = rng.beta(k + 0.5, self.n - k + 0.5, size=n_null)
            null["memorised_fraction"] = rng.binomial(self.m, chance) / self.m
        null = null.reindex(columns=_KIND.index)
        self.values = null.mean()
        return null

    def _bound(self, bad: pd.DataFrame) -> None:
        """Units of z, and the law of the furthest metric, from the badness (n_null, K) of the splits."""
        scaled = _scaled(bad)
        self._middle = scaled.quantile(0.5, interpolation="higher")
        high = scaled.quantile(0.95, interpolation="higher")
        spread = (high - self._middle).where(np.isfinite(high) & (high > self._middle))
        few = [f"q{100 * p:g}_error" for p in LEVELS if min(self.n, self.m) * min(p, 1 - p) < _TAIL_ROWS]
        # The bounds learn the tail's law from these very rows: from few beyond the quantile they learn it wrong.
        spread[[*_SHOWN_ONLY, *few, *(["q1_error_portfolio"] if "q1_error" in few else [])]] = np.nan
        self._spread, self.judged = spread, spread.notna()
        self.furthest = ((scaled - self._middle) / spread).max(axis=1).to_numpy()
        beyond = int(SIZE * (len(bad) + 1))
        self.threshold = float(np.sort(self.furthest)[-beyond])

    def excess(self, values: pd.Series) -> pd.Series:
        """Distance of every judged metric in units of its bound, shift deducted; NaN for the others."""
        z = (_scaled(badness(values)) - self.shift - self._middle) / self._spread
        return (z / self.threshold).where(self.judged & values.notna())

    def p_value(self, excess: pd.Series) -> float:
        """(1 + splits whose furthest metric lies as far out) / (1 + splits): at most 5 % where one exceeds 1."""
        reached = self.furthest / self.threshold >= excess.max() - 1e-12
        return float((1 + reached.sum()) / (1 + len(self.furthest)))

    def measure(self, y: np.ndarray, own: bool = False) -> tuple[pd.Series, CvMResult]:
        """All metrics of y. `own`: y are training rows, each of which is its own nearest training row."""
        rng = np.random.default_rng(self._seed)
        whole = self.n == len(self._x)
        real = summary(self._x.T)
        draws = []
        for _ in range(1 if whole and len(y) == self.m else _SUBSETS):
            part = real if whole else summary(subset(self._x, self.n, rng).T)
            draws.append(panel_errors(part, summary(subset(y, self.m, rng).T)))
        out = pd.DataFrame(draws).mean().to_dict()
        result = cvm_result(self._x, y, self._weights, self._cvm_null)
        out["cvm_mean_p"], out["cvm_rejection_rate"] = result.mean_p, result.rejection_rate
        out["energy_distance"] = energy_distance(
            *(subset(a, k, rng) for a, k in zip((self._x, y), self._energy_rows))
        )
        out["c2st_auc"] = auc(*(subset(a, k, rng) for a, k in zip((self._x, y), self._classifier_rows)), rng)
        if self._nearest is not None:
            near = self._nearest if own else two_nearest(subset(y, self.m, rng), self._train)
            out["nn_ratio"] = median_ratio(near[:, 0], self._nearest[:, 0])
            out["memorised_fraction"] = float(copied(near).mean())
        return pd.Series(out, dtype=float).reindex(_KIND.index), result
