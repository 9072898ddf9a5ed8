"""Are the tails of portfolios, and crashes that assets share, those of rows the generator never saw?

With VaR and ES at level a of portfolio p, on n real rows and m scenarios,

    D_k = scenarios' loss - real loss, k = (measure, portfolio, level);   D_measure = sum of its D_k
    z_k = (D_k - median D_k)/(95 % quantile - median) above the median, /(median - 5 % quantile) below

over shuffles of the rows between the two panels: exact under one law, however heavy its tails and however much
the portfolios share. c is the 95 % quantile of max_k |z_k|: in 95 % of shuffles all figures and both sums are
within median -+ c (distance to the quantile). The sums see what is systematic and small in each figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from finediff.risk.measures import rank
from finediff.validation.inputs import generator, panels
from finediff.validation.metrics import tail_dependence

_SIZE = 0.05
MEASURES = ("VaR", "ES")


@dataclass(frozen=True, eq=False)
class TailTest:
    """Gaps of tail figures beside what chance gives.

    Attributes
    ----------
    figures : DataFrame
        Index (portfolio, level); columns "VaR gap", "VaR low", "VaR high", "ES gap", "ES low", "ES high": the
        scenarios' loss less the real one, and its joint bounds, as fractions of the real loss. Negative: the
        scenarios understate the loss.
    together : DataFrame
        Index "VaR", "ES"; columns "gap", "low", "high": of the sum over all figures, as fractions of the sum of
        the real losses; "understated": how many figures have a negative gap.
    p_value : float
        (1 + shuffles whose furthest number lies as far out) / (1 + shuffles): at most 5 % where, and only where,
        a number lies outside its bounds.
    """

    figures: pd.DataFrame
    together: pd.DataFrame
    p_value: float

    @property
    def outside(self) -> int:
        """How many figures and sums lie outside their bounds."""
        parts = [
            self.together,
            *(self.figures[[f"{m} {k}" for k in ("gap", "low", "high")]] for m in MEASURES),
        ]
        return int(sum(((p.iloc[:, 0] < p.iloc[:, 1]) | (p.iloc[:, 0] > p.iloc[:, 2])).sum() for p in parts))


def tail_test(
    real,
    scenarios,
    portfolios: Mapping[str, Sequence[float]],
    levels: Sequence[float] = (0.01, 0.05),
    *,
    n_null: int = 1000,
    random_state=0,
) -> TailTest:
    """Value at risk and expected shortfall of portfolios: scenarios against real rows, all figures jointly.

    Parameters
    ----------
    real, scenarios : array or DataFrame (n, d), (m, d)
        Simple returns that the generator never saw, and scenarios.
    portfolios : mapping of name to weights (d,)
        A Series is matched to the columns of a DataFrame by name.
    levels : sequence of float
        Probabilities of the lower tail; at least one row of either panel beyond each.
    n_null : int
        Shuffles, at least 20.
    random_state : None, int, RandomState or Generator
        Seed of the shuffles.

    Raises
    ------
    ValueError
        On non-finite values, columns that disagree, no portfolio or level, a level beyond the worst row,
        n_null < 20.

    Notes
    -----
    Shuffling takes rows as exchangeable, which those of a random split are; losses that cluster make later
    rows differ by more than that.
    """
    x, y, _ = panels(real, scenarios)
    if not portfolios or not len(levels) or n_null < 20:
        raise ValueError(
            f"expected portfolios, levels and n_null >= 20, got {len(portfolios)}, {len(levels)} and {n_null}, because "
            "a joint bound needs figures and one shuffle in twenty beyond it: give more"
        )
    names = getattr(real, "columns", None)
    rng = generator(random_state)
    n, total = len(x), len(x) + len(y)
    first = np.arange(total) < n
    masks = np.vstack([first, rng.permuted(np.tile(first, (n_null, 1)), axis=1)])
    index = pd.MultiIndex.from_product([list(portfolios), list(levels)], names=["portfolio", "level"])
    losses = np.empty((2, 2, n_null + 1, len(index)))  # side, measure, shuffle, figure
    for p, weights in enumerate(portfolios.values()):
        w = weights[names] if isinstance(weights, pd.Series) and names is not None else weights
        w = np.asarray(w, dtype=float)
        pooled = np.concatenate([x @ w, y @ w])
        order = np.argsort(pooled, kind="stable")
        at = slice(p * len(levels), (p + 1) * len(levels))
        for s, mask in enumerate(masks):
            real_first = mask[order]
            for side, chosen in enumerate((real_first, ~real_first)):
                losses[side, :, s, at] = _losses(pooled[order[chosen]], levels)
    gaps = losses[1] - losses[0]
    numbers = np.concatenate([gaps[0], gaps[1], gaps.sum(axis=2).T], axis=1)  # (n_null + 1, 2 figures + 2)
    null = numbers[1:]
    middle, low, high = (np.quantile(null, q, axis=0) for q in (0.5, 0.05, 0.95))
    tiny = np.finfo(float).tiny
    below, above = np.maximum(middle - low, tiny), np.maximum(high - middle, tiny)
    furthest = np.maximum((numbers - middle) / above, (middle - numbers) / below).max(axis=1)
    c = np.sort(furthest[1:])[-int(_SIZE * (n_null + 1))]
    bounds = np.stack([numbers[0], middle - c * below, middle + c * above])
    observed = losses[0, :, 0]
    k = len(index)
    scaled = {}
    for i, measure in enumerate(MEASURES):
        part = bounds[:, i * k : (i + 1) * k] / np.abs(observed[i])
        scaled |= {f"{measure} {name}": row for name, row in zip(("gap", "low", "high"), part)}
    together = pd.DataFrame(
        (bounds[:, 2 * k :] / np.abs(observed.sum(axis=1))).T,
        index=list(MEASURES),
        columns=["gap", "low", "high"],
    )
    together["understated"] = (gaps[:, 0] < 0).sum(axis=1)
    p_value = float((1 + (furthest[1:] >= furthest[0]).sum()) / (1 + n_null))
    return TailTest(pd.DataFrame(scaled, index=index), together, p_value)


def _losses(ordered: np.ndarray, levels) -> np.ndarray:
    """VaR and ES (2, levels) of returns sorted upwards, as `finediff.risk` has them."""
    out = np.empty((2, len(levels)))
    for j, level in enumerate(levels):
        na, k = rank(len(ordered), level)
        out[:, j] = -ordered[k - 1], -(ordered[: k - 1].sum() + (na - k + 1) * ordered[k - 1]) / na
    return out


def joint_crashes(real, scenarios, *, n_boot: int = 200, random_state=0) -> float:
    """Standard error of log(tail dependence of the scenarios / tail dependence of the real rows).

    Real rows are drawn again in circular blocks of n^(1/3) neighbours, so that crashes in a row count as one
    event; scenarios are independent and drawn one by one.

    Parameters
    ----------
    real, scenarios : array or DataFrame (n, d), (m, d)
        As for `finediff.validation.lower_tail_dependence`.
    n_boot : int
        Bootstrap samples, at least 20.
    random_state : None, int, RandomState or Generator
        Seed.

    Returns
    -------
    float
        NaN for fewer than 50 rows or 2 assets, or where no two assets ever crash together.

    References
    ----------
    H. R. Kuensch, "The jackknife and the bootstrap for general stationary observations" (1989).
    """
    x, y, _ = panels(real, scenarios)
    if n_boot < 20:
        raise ValueError(f"expected n_boot >= 20, got {n_boot}, because fewer give no error: pass 200")
    if x.shape[1] < 2 or min(len(x), len(y)) < 50:
        return float("nan")
    rng = generator(random_state)
    error = 0.0
    for rows, length in ((x, int(np.ceil(len(x) ** (1 / 3)))), (y, 1)):
        n = len(rows)
        starts = rng.integers(n, size=(n_boot, -(-n // length), 1))
        drawn = ((starts + np.arange(length)) % n).reshape(n_boot, -1)[:, :n]
        with np.errstate(divide="ignore"):
            logs = np.log([tail_dependence(rows[index].T) for index in drawn])
        if not np.isfinite(logs).all():
            return float("nan")
        error += logs.var(ddof=1)
    return float(np.sqrt(error))
