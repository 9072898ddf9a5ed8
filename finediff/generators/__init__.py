"""Scenario generators: scikit-learn estimators with ``fit(X)`` and ``sample(n_samples)``."""

from finediff.generators.base import ScenarioGenerator
from finediff.generators.classical import (
    BootstrapGenerator,
    GaussianGenerator,
    SmoothedBootstrapGenerator,
    StudentTGenerator,
)
from finediff.generators.copula import CopulaGenerator
from finediff.generators.diffusion import DDPMGenerator, FlowMatchingGenerator
from finediff.generators.factor import FactorDiffusionGenerator
from finediff.generators.quadrature_score import QuadratureScoreGenerator
from finediff.generators.ridge_score import RidgeScoreGenerator

__all__ = [
    "BootstrapGenerator",
    "CopulaGenerator",
    "DDPMGenerator",
    "FactorDiffusionGenerator",
    "FlowMatchingGenerator",
    "GaussianGenerator",
    "QuadratureScoreGenerator",
    "RidgeScoreGenerator",
    "ScenarioGenerator",
    "SmoothedBootstrapGenerator",
    "StudentTGenerator",
]
