"""The report's figures: each function returns one SVG as text, ready to stand inside an HTML page."""

from finediff.report.figures.law import (
    asset_order,
    correlation_maps,
    loss_curves,
    qq_assets,
    qq_portfolio,
    tail_survival,
)
from finediff.report.figures.risk import (
    condition_numbers,
    eigenvalue_spectrum,
    generator_comparison,
    portfolio_weights,
    tail_risk,
)
from finediff.report.figures.walk import walk_volatility

__all__ = [
    "asset_order",
    "condition_numbers",
    "correlation_maps",
    "eigenvalue_spectrum",
    "generator_comparison",
    "loss_curves",
    "portfolio_weights",
    "qq_assets",
    "qq_portfolio",
    "tail_risk",
    "tail_survival",
    "walk_volatility",
]
