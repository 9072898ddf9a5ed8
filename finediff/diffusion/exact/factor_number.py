"""How many factors: by the BIC of the whole model, or by the spectrum alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finediff.diffusion.exact.factor_fit import FactorFit, Rows, fit_factors, unit_rows

_BIC_PATIENCE = 2


def choose_factors(X: Tensor, *, most: int | None = None, heavy_tails: bool = True) -> FactorFit:
    """The number of factors with the lowest BIC (Schwarz 1978, Annals of Statistics 6), counting up from none.

    It stops where two numbers in a row did not improve it, or at ``most`` (a fifth of the rows or half of the
    assets, at most 40, by default).
    """
    n, d = X.shape
    most = min(40, n // 5, d // 2) if most is None else most
    best = fit = None
    for k in range(most + 1):
        fit = fit_factors(X, k, heavy_tails=heavy_tails, iterations=40, tolerance=3e-5, start=fit)
        if best is None or fit.bic < best.bic:
            best = fit
        elif k >= best.loadings.shape[1] + _BIC_PATIENCE:
            break
    return fit_factors(X, best.loadings.shape[1], heavy_tails=heavy_tails, start=best)


def eigenvalue_ratio(X: Tensor, *, most: int | None = None) -> int:
    """Number of factors by the largest ratio of neighbouring eigenvalues (Ahn & Horenstein 2013, Econometrica 81).

    Of the correlation of the rows at unit length, missing entries 0; lambda_0 = sum lambda/log min(n, d), so that
    none can be the answer. With weak factors it finds too few.
    """
    data = Rows(X.double())
    Z = unit_rows(data.deviations(data.X.sum(0) / data.count))
    n, d = Z.shape
    most = min(40, n // 5, d // 2) if most is None else most
    values = torch.linalg.eigvalsh(Z @ Z.T if n < d else Z.T @ Z).flip(0).clamp(min=0)
    values = torch.cat([values.sum()[None] / math.log(min(n, d)), values])
    return int((values[: most + 1] / values[1 : most + 2]).argmax())
