"""Risk: losses, drawdowns and their sampling error, of rows at hand (measures) or of a stream (streaming).

Losses are positive numbers. Returns are simple, per period; only `annual_volatility` and `sharpe_ratio` are
annualised.
"""

from finediff.risk.measures import (
    annual_volatility,
    drawdown,
    expected_shortfall,
    expected_shortfall_standard_error,
    sharpe_ratio,
    tail_risk_table,
    turnover,
    var,
    var_standard_error,
)
from finediff.risk.streaming import StreamingTails

__all__ = [
    "StreamingTails",
    "annual_volatility",
    "drawdown",
    "expected_shortfall",
    "expected_shortfall_standard_error",
    "sharpe_ratio",
    "tail_risk_table",
    "turnover",
    "var",
    "var_standard_error",
]
