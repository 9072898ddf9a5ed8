"""Generators as other people's parts: scikit-learn's own checks, skfolio's priors, clones, frozen fits, workers."""

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from finediff.generators import (
    BootstrapGenerator,
    DDPMGenerator,
    FlowMatchingGenerator,
    GaussianGenerator,
    StudentTGenerator,
)

SMALL = {"steps": 3, "width": 8, "depth": 1, "device": "cpu"}


@pytest.mark.filterwarnings("ignore::finediff.panel.PanelWarning")
@parametrize_with_checks(
    [
        DDPMGenerator(**SMALL),
        FlowMatchingGenerator(**SMALL),
        GaussianGenerator(),
        StudentTGenerator(),
        BootstrapGenerator(),
        BootstrapGenerator(method="stationary"),
    ]
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)
