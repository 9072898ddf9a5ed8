"""Portfolios: convex problems in the weights w, and the constraints that compose them.

| problem | minimises | solved by |
|---|---|---|
| `MinimumVariance` | w' Sigma w | closed form; quadratic program |
| `MeanVariance` | (gamma/2) w' Sigma w - mu'w | closed form; quadratic program |
| `MaximumSharpe` | -(mu - r_f)'w / sqrt(w' Sigma w) | closed form; quadratic program |
| `MinimumCVaR` | mean of the worst a of the losses | linear program; smoothed Newton |
| `RiskParity` | (1/2) w' Sigma w - b' log w, then 1'w = 1 | Newton; conic program |
| `MinimumTrackingError` | (w - b)' Sigma (w - b) | closed form; quadratic program |

All with 1'w = 1, all solved by the same call ``problem.solve(covariance=, mean=, scenarios=, previous=)``, all
under the same list of constraints: `LongOnly`, `MaximumWeight`, `MinimumWeight`, `GrossExposure`, `GroupLimits`,
`Turnover`, `TransactionCost`, and subclasses of `Constraint`.
"""

from finediff.portfolio.constraints import (
    Constraint,
    GrossExposure,
    GroupLimits,
    LongOnly,
    MaximumWeight,
    MinimumWeight,
)
from finediff.portfolio.cvar import MinimumCVaR
from finediff.portfolio.problem import Allocation
from finediff.portfolio.risk_parity import RiskParity, risk_contributions
from finediff.portfolio.tracking import MinimumTrackingError
from finediff.portfolio.trading import TransactionCost, Turnover
from finediff.portfolio.variance import MaximumSharpe, MeanVariance, MinimumVariance

__all__ = [
    "Allocation",
    "Constraint",
    "GrossExposure",
    "GroupLimits",
    "LongOnly",
    "MaximumSharpe",
    "MaximumWeight",
    "MeanVariance",
    "MinimumCVaR",
    "MinimumTrackingError",
    "MinimumVariance",
    "MinimumWeight",
    "RiskParity",
    "TransactionCost",
    "Turnover",
    "risk_contributions",
]
