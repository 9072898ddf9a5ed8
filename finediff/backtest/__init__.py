"""Back-tests: what strategies would have earned, each decision from the rows before it alone.

    windows        when decisions are made, and from which rows
    strategies     how an estimator and a portfolio become weights
    holding        what weights earn until the next decision: drift, delistings, costs
    inputs         what a back-test is given, checked
    walk           walk_forward: all of it, fanned out over windows and strategies
    fan            the fan: batches, processes or Ray
    store          finished windows on disk, and what job they belong to
    result         daily returns, weights, turnover; summary() and compare()
    significance   heteroscedasticity- and autocorrelation-consistent tests by influence functions

Returns are simple, per period; what is annualised says so in its name.
"""

from finediff.backtest.holding import hold
from finediff.backtest.result import WalkForward
from finediff.backtest.significance import compare, influence, long_run_covariance, sharpe_interval
from finediff.backtest.strategies import Strategy
from finediff.backtest.walk import walk_forward
from finediff.backtest.windows import Window, schedule

__all__ = [
    "Strategy",
    "WalkForward",
    "Window",
    "compare",
    "hold",
    "influence",
    "long_run_covariance",
    "schedule",
    "sharpe_interval",
    "walk_forward",
]
