"""What a walk-forward leaves: daily returns, weights, turnover; its summary and comparisons."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from finediff.backtest.significance import compare, default_lags, sharpe_interval
from finediff.risk import annual_volatility, drawdown, expected_shortfall, var


@dataclass(frozen=True, eq=False)
class WalkForward:
    """Out-of-sample results, one column a strategy.

    Attributes
    ----------
    returns : DataFrame (n, k)
        Realised simple returns per period, net of costs, by date.
    weights : DataFrame (k * w, d)
        At each decision, by (strategy, date); 0 for assets that were not eligible.
    turnover : DataFrame (w, k)
        sum |change of weights| at each decision, purchases plus sales; the first from what was held before.
    costs : DataFrame (w, k)
        Share of the wealth paid at each decision.
    windows : DataFrame (w, 5)
        By date of decision: first and last date held, days held, rows of history, eligible assets.
    seconds : Series (k,)
        CPU time of fits and solves.
    """

    returns: pd.DataFrame
    weights: pd.DataFrame
    turnover: pd.DataFrame
    costs: pd.DataFrame
    windows: pd.DataFrame
    seconds: pd.Series

    @property
    def strategies(self):
        """Their names."""
        return list(self.returns.columns)

    @property
    def holding(self):
        """Days of the longest period between two decisions."""
        return int(self.windows["days held"].max())

    def summary(self, periods=252, level=0.05, confidence=0.95, lags=None):
        """Measures of every strategy.

        Parameters
        ----------
        periods : int
            A year.
        level : float
            Of the tail, in (0, 1).
        confidence : float
            Of the interval of the Sharpe ratio, for each strategy alone; robust to autocorrelation up to ``lags``.
        lags : int, optional
            By default `significance.default_lags` of the days and the longest holding period.

        Returns
        -------
        DataFrame (k, 13)
            "annual volatility"; "annual return", the mean times ``periods``; "Sharpe", "Sharpe low", "Sharpe high";
            "turnover", the mean after the first decision; "annual costs"; "gross exposure", mean sum |w|; "VaR" and
            "ES" of a period, losses positive; "max drawdown"; "windows"; "seconds".
        """
        x = self.returns
        lags = default_lags(len(x), self.holding) if lags is None else lags
        table = pd.DataFrame(index=pd.Index(self.strategies, name="strategy"))
        table["annual volatility"] = annual_volatility(x, periods)
        table["annual return"] = periods * x.mean()
        varies = x.columns[np.ptp(x.to_numpy(), axis=0) > 0]
        interval = sharpe_interval(x[varies], confidence, periods, lags).reindex(x.columns)
        table[["Sharpe", "Sharpe low", "Sharpe high"]] = interval.to_numpy()
        # The first purchase is the same for all that start in cash; a single window has no other.
        later = self.turnover.iloc[1:] if len(self.turnover) > 1 else self.turnover
        table["turnover"] = later.mean()
        table["annual costs"] = self.costs.sum() * periods / len(x)
        table["gross exposure"] = self.weights.abs().sum(axis=1).groupby(level=0).mean()
        table["VaR"] = var(x, level)
        table["ES"] = expected_shortfall(x, level)
        table["max drawdown"] = drawdown(x)
        table["windows"] = len(self.windows)
        table["seconds"] = self.seconds
        return table

    def compare(self, reference, level=0.05, lags=None, periods=252):
        """Every strategy against ``reference``, paired by day: see `finediff.backtest.compare`.

        Parameters
        ----------
        reference : str
            Name of a strategy.
        level : float
            Of the tail of CVaR.
        lags : int, optional
            Of the Newey-West variance; by default the larger of 4 (n/100)^(2/9) and twice the longest holding period.
        periods : int
            A year.

        Returns
        -------
        DataFrame (k - 1, 12)
            For "return", "volatility", "Sharpe", "CVaR": "difference", "t", "p".
        """
        return compare(self.returns, reference, level, lags, self.holding, periods)
