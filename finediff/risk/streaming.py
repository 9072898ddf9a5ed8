"""Tail risk of more rows than can be kept: counts on a fixed grid, the same for every asset and every stream.

    bins        +-[2^e (1 + j/128), 2^e (1 + (j+1)/128)),   e = -20..3, j = 0..127:  the first 7 bits of the digits,
                so that a return x > 0 lies in bin floor(128 x / 2^e), read off its representation
    between     -2^-20 and 2^-20 one bin each side of zero; beyond +-16 one bin up to the extreme seen
    x_(k)       of a bin [a, b) holding ranks r+1..r+c:   a + (b - a)(k - r - 1/2)/c,   its ends cut to the extremes

The k-th smallest row lies in the bin that is read, hence, for returns below 1,600 per cent a period,

    |VaR - exact| <= 2^-7 |exact| + 2^-20        |ES - exact| <= 2^-7 (mean of |x| in the tail) + 2^-20

whatever the law and the number of rows; where rows are many the error is that of a straight line over one bin,
some 10^-4. Counts add up: merging in any order, or other chunks, gives the same bits. (Relative bins: Masson, Rim,
Lee 2019.)
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from finediff.risk.measures import rank

__all__ = ["StreamingTails"]

_BITS = 7
_LOW, _HIGH = -20, 4  # powers of two: a ten-thousandth of a per cent, and 1,600 per cent
_SIDE = (_HIGH - _LOW) << _BITS  # bins of one sign
_FIRST = (1023 + _LOW) << _BITS
_MOST = np.iinfo(np.uint32).max
_PIECE = 16  # assets binned at once: their rows and counts stay in the processor's cache

_up = ((np.arange(_SIDE + 1) + _FIRST) << (52 - _BITS)).view(np.float64)
_up[0], _up[-1] = 0.0, np.inf
_EDGES = np.concatenate([-_up[:0:-1], _up])  # (2 _SIDE + 1,)


class StreamingTails:
    """Value at risk, expected shortfall and extremes of rows that arrive in chunks, without keeping them.

    Memory is 24 kB an asset, however many rows arrive; the levels need not be known before.

    Parameters
    ----------
    portfolios : DataFrame or array (d, p), or mapping name -> (d,) weights, optional
        Follow these portfolios, one a column, instead of the single assets; held constant. The assets of a
        DataFrame or of Series are matched by name to rows that have names.

    Attributes
    ----------
    count : int
        Rows seen.
    minimum, maximum : Series or array
        Of each asset or portfolio, exact.

    Examples
    --------
    >>> tails = StreamingTails()
    >>> for chunk in np.random.default_rng(0).standard_normal((4, 5000, 2)) / 100:
    ...     tails.update(chunk)
    >>> tails.var(0.05).round(4)
    array([0.0164, 0.0163])
    """

    def __init__(self, portfolios=None):
        if isinstance(portfolios, dict):
            portfolios = pd.DataFrame(portfolios)
        self._weights = portfolios
        self._assets = self._names = None
        self.count = 0

    def update(self, rows) -> None:
        """Take in a chunk of simple returns (k, d), array or DataFrame, any k.

        Raises
        ------
        ValueError
            NaN or infinite entries, or other assets than before; nothing of the chunk is then counted.
        """
        assets = list(rows.columns) if isinstance(rows, pd.DataFrame) else None
        x = np.asarray(rows)
        if x.ndim != 2 or not x.shape[1] or x.dtype.kind not in "fiu":
            raise ValueError(
                f"expected rows of numbers (k, d), one column an asset, got {x.dtype} of shape {x.shape}."
            )
        before = (x.shape[1], assets) if self._assets is None else self._assets
        if before != (x.shape[1], assets):
            raise ValueError(
                f"expected the {before[0]} assets of the chunks before, in their order, got {x.shape[1]} "
                "or other names: one accumulator follows one panel."
            )
        if not len(x):
            return
        if self._weights is not None:
            x = x @ self._matched_weights(assets, x.shape[1])
        lowest, highest = x.min(axis=0).astype(float), x.max(axis=0).astype(float)
        if not (np.isfinite(lowest) & np.isfinite(highest)).all():
            raise ValueError("expected finite returns, got NaN or infinity; drop or repair those rows first.")
        if self.count + len(x) > _MOST:
            raise ValueError(f"expected at most {_MOST} rows, got more: begin another accumulator.")
        if not self.count:
            self._assets, width = before, x.shape[1]
            self._names = self._labels(assets)
            self._counts = np.zeros((width, 2 * _SIDE), np.uint32)
            self._lowest, self._highest = lowest, highest
        for start in range(0, x.shape[1], _PIECE):
            part = slice(start, start + _PIECE)
            self._counts[part] += _binned(x[:, part])
        np.minimum(self._lowest, lowest, out=self._lowest)
        np.maximum(self._highest, highest, out=self._highest)
        self.count += len(x)

    def merge(self, other: StreamingTails) -> None:
        """Add what another accumulator has seen, of the same assets or portfolios, as if its rows had come here.

        Raises
        ------
        ValueError
            If it followed other assets or other portfolios, or the rows are more than 2^32 - 1 together.
        """
        if not _equal(self._weights, other._weights):
            raise ValueError("expected an accumulator of the same portfolios, got one of others.")
        if not other.count:
            return
        if self.count and self._assets != other._assets:
            raise ValueError(
                "expected an accumulator of the same assets in the same order, got one of others."
            )
        if self.count + other.count > _MOST:
            raise ValueError(f"expected at most {_MOST} rows, got more: keep two accumulators.")
        if not self.count:
            self._assets, self._names = other._assets, other._names
            self._counts = np.zeros_like(other._counts)
            self._lowest, self._highest = other._lowest.copy(), other._highest.copy()
        self._counts += other._counts
        np.minimum(self._lowest, other._lowest, out=self._lowest)
        np.maximum(self._highest, other._highest, out=self._highest)
        self.count += other.count

    def var(self, level=0.05):
        """Value at risk as `finediff.risk.var` defines it, to the bound at the top of this module.

        Parameters
        ----------
        level : float
            Probability of the lower tail, in (0, 1).

        Returns
        -------
        Series or array (d,)
            A loss per period, positive; of each asset or portfolio.

        Raises
        ------
        ValueError
            Fewer than 1/level rows so far.
        """
        return self._wrap(-self._read(level)[0])

    def expected_shortfall(self, level=0.05):
        """Expected shortfall as `finediff.risk.expected_shortfall`; all else as in `var`."""
        return self._wrap(-self._read(level)[1])

    @property
    def minimum(self):
        return self._wrap(self._seen()._lowest.copy())

    @property
    def maximum(self):
        return self._wrap(self._seen()._highest.copy())

    def table(self, levels=(0.01, 0.05)) -> pd.DataFrame:
        """(d, 2 levels + 2) losses per period: "VaR 1 %", "ES 1 %", ... and "minimum", "maximum", which are returns."""
        found = {}
        for level in levels:
            quantile, mean = self._read(level)
            found |= {f"VaR {100 * level:g} %": -quantile, f"ES {100 * level:g} %": -mean}
        found |= {"minimum": self._seen()._lowest, "maximum": self._highest}
        return pd.DataFrame(found, index=self._names)

    def _seen(self):
        if not self.count:
            raise ValueError("expected rows before their statistics, got none so far: update(rows) first.")
        return self

    def _read(self, level):
        """x_(k) and the mean of the tail below it, each (d,)."""
        na, k = rank(self._seen().count, level)
        quantile, mean = np.empty_like(self._lowest), np.empty_like(self._lowest)
        for start in range(0, len(quantile), 256):
            part = slice(start, start + 256)
            counts = self._counts[part].astype(np.int64)
            low, high = self._lowest[part, None], self._highest[part, None]
            a, b = np.clip(_EDGES[:-1], low, high), np.clip(_EDGES[1:], low, high)
            upto = counts.cumsum(axis=1)
            here = (upto >= k).argmax(axis=1)
            at = np.arange(len(here)), here
            left, width, held = a[at], (b - a)[at], counts[at]
            rest = k - 1 - (upto[at] - held)  # rows of this bin before the k-th
            quantile[part] = left + width * (rest + 0.5) / held
            weight = counts * (np.arange(2 * _SIDE) < here[:, None])
            below = np.einsum("ij,ij->i", weight, (a + b) / 2) + rest * left + width * rest**2 / (2 * held)
            mean[part] = (below + (na - k + 1) * quantile[part]) / na
        return quantile, mean

    def _labels(self, assets):
        if self._weights is None:
            return assets
        return list(self._weights.columns) if isinstance(self._weights, pd.DataFrame) else None

    def _matched_weights(self, assets, d):
        weights = self._weights
        if isinstance(weights, pd.DataFrame) and assets is not None:
            odd = weights.index.symmetric_difference(assets)
            if len(odd):
                raise ValueError(
                    f"expected portfolios and rows on the same assets, got a mismatch: {list(odd)[:5]}."
                )
            weights = weights.loc[assets]
        weights = np.asarray(weights, float)
        if weights.ndim != 2 or len(weights) != d or not np.isfinite(weights).all():
            raise ValueError(
                f"expected finite portfolio weights of shape ({d}, p), one column a portfolio, got {weights.shape}."
            )
        return weights

    def _wrap(self, values):
        return values if self._names is None else pd.Series(values, index=self._names)


def _equal(one, other) -> bool:
    if one is None or other is None:
        return one is other
    if isinstance(one, pd.DataFrame) or isinstance(other, pd.DataFrame):
        return isinstance(one, pd.DataFrame) and one.equals(other)
    return np.array_equal(one, other)


def _binned(x):
    """Counts (d, bins) of rows x (k, d)."""
    bits = np.ascontiguousarray(x.T, dtype=np.float64).view(np.int64)
    key = bits & np.iinfo(np.int64).max
    key >>= 52 - _BITS
    key -= _FIRST
    np.clip(key, 0, _SIDE - 1, out=key)
    key ^= bits >> 63  # -1 - key for the negative
    key += _SIDE + 2 * _SIDE * np.arange(len(key))[:, None]
    return np.bincount(key.ravel(), minlength=2 * _SIDE * len(key)).reshape(len(key), -1).astype(np.uint32)
