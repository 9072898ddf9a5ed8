"""Panels of prices and returns: loading, checking, splitting and scaling them.

Letters of this folder: n dates, d assets, P_t the prices at date t, one row per date.

    x_t = P_t / P_{t-1} - 1                     simple return of one period      (to_returns)
    z   = ((x - mean) / sd) W                   affine, exactly invertible       (Standardizer)

Here W = I, or W = C^{-1/2}, the symmetric inverse square root of the Ledoit-Wolf correlation C of the
standardised returns. Returns are fractions (0.01 is one per cent) per period; nothing is annualised.

A gap in the data is never filled with zero, carried forward or cut away without being asked for.
"""

from finediff.panel.check import Finding, check_panel, heuristic_warnings
from finediff.panel.frame import PanelWarning
from finediff.panel.load import load_prices
from finediff.panel.returns import random_split, split, to_returns
from finediff.panel.scale import AssetScaler, RobustStandardizer, Standardizer

__all__ = [
    "AssetScaler",
    "Finding",
    "PanelWarning",
    "RobustStandardizer",
    "Standardizer",
    "check_panel",
    "heuristic_warnings",
    "load_prices",
    "random_split",
    "split",
    "to_returns",
]
