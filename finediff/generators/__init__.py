"""Scenario generators: scikit-learn estimators with ``fit(X)`` and ``sample(n_samples)``."""

from finediff.generators.base import ScenarioGenerator
from finediff.generators.classical import BootstrapGenerator, GaussianGenerator, StudentTGenerator
from finediff.generators.diffusion import DDPMGenerator, FlowMatchingGenerator

__all__ = [
    "BootstrapGenerator",
    "DDPMGenerator",
    "FlowMatchingGenerator",
    "GaussianGenerator",
    "ScenarioGenerator",
    "StudentTGenerator",
]
