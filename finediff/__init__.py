"""finediff: market scenarios from diffusion and flow models, up to a risk report.

The shop window: names are imported from their rooms on first use, so that ``import finediff`` is quick.

>>> import finediff
>>> finediff.GaussianGenerator
<class 'finediff.generators.classical.GaussianGenerator'>
"""

from importlib import import_module
from importlib.metadata import version

_ROOMS = {
    "finediff.panel": (
        "load_prices",
        "to_returns",
        "check_panel",
        "split",
        "random_split",
        "Standardizer",
        "PanelWarning",
    ),
    "finediff.generators": (
        "ScenarioGenerator",
        "RidgeScoreGenerator",
        "FactorDiffusionGenerator",
        "DDPMGenerator",
        "FlowMatchingGenerator",
        "QuadratureScoreGenerator",
        "GaussianGenerator",
        "StudentTGenerator",
        "BootstrapGenerator",
        "SmoothedBootstrapGenerator",
        "CopulaGenerator",
    ),
    "finediff.covariance": (
        "marchenko_pastur",
        "clip",
        "rie",
        "quadratic_inverse_shrinkage",
        "WindowEnsembleCovariance",
        "ScenarioCovariance",
    ),
    "finediff.portfolio": (
        "MinimumVariance",
        "MaximumSharpe",
        "MeanVariance",
        "MinimumCVaR",
        "RiskParity",
        "MinimumTrackingError",
        "LongOnly",
        "MaximumWeight",
        "GrossExposure",
        "GroupLimits",
        "Turnover",
        "TransactionCost",
    ),
    "finediff.backtest": ("walk_forward", "Strategy"),
    "finediff.validation": ("validate", "compare", "ValidationReport"),
    "finediff.risk": ("var", "expected_shortfall"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)
__version__ = version("finediff")


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'finediff' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
