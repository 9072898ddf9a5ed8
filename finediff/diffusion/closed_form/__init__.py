"""Training as a linear solve: exact moments of features, one ridge per noise level, the inner weights by L-BFGS.

    min over B of E| y - B' phi(W x + b) |^2:      (G + lambda D) B = R,   G = E[phi phi'],   R = E[phi y']

With x Gaussian given the row, G and R are matrix products of Hermite coefficients (Lesniewski & Trigila 2025 compute
them by two-dimensional quadrature); given them the output layer is one solve, and its penalty is cross-validated
without noise. Files, in order: `hermite` (coefficients), `moments` (G and R), `solve` (`fold_ridge`, for features
of any kind), `model` (`RidgeScore`: features of one hidden layer, random or refined by variable projection).

Which activation: "cos" (no series, any scale) unless the network must be of a given kind; of the others the closed
ones ("smooth_relu", "probit"). Random features serve a few dimensions (some ten); beyond, hand `fold_ridge` features
that know the law's structure. The loss's exact minimiser memorises the rows: stop where held-out rows say so.
"""

from finediff.diffusion.closed_form.hermite import Activation, activate, coefficients
from finediff.diffusion.closed_form.model import RidgeHistory, RidgeScore, fit_ridge_score
from finediff.diffusion.closed_form.moments import Cross, correlations, cross, gram, moments
from finediff.diffusion.closed_form.solve import RIDGES, RidgeFit, fold_ridge

__all__ = [
    "RIDGES",
    "Activation",
    "Cross",
    "RidgeFit",
    "RidgeHistory",
    "RidgeScore",
    "activate",
    "coefficients",
    "correlations",
    "cross",
    "fit_ridge_score",
    "fold_ridge",
    "gram",
    "moments",
]
