"""Common factors and independent residuals, from a covariance.

C = L L' + diag(psi),   L (d, k),   maximum likelihood for Gaussian rows
step    psi^-1/2 C psi^-1/2 = U diag(lambda) U',   L = psi^1/2 U_k (lambda_k - 1)^1/2,   psi = 1 - diag(L L')
"""

import numpy as np

from finediff.covariance.clean import n_factors
from finediff.covariance.marchenko_pastur import row_count
from finediff.covariance.matrix import correlation_of, framed, rescale, semidefinite, unit_diagonal


def factor_analytic(covariance, n_samples, *, k=None, max_iter=500, tol=1e-8):
    """Covariance of k common factors and independent residuals, fitted by maximum likelihood.

    Parameters
    ----------
    covariance : (d, d) array or DataFrame
        In any units.
    n_samples : int
        Rows of the panel behind the covariance, n >= 3.
    k : int, optional
        Factors, 0 <= k < d; by default those above the Tracy-Widom edge, at most d - 1.
    max_iter : int
        Fixed-point steps on the residual variances.
    tol : float
        Largest change of a residual variance, as a share of the asset's, at which they end.

    Returns
    -------
    (d, d) array or DataFrame
        Same variances as the input; residual shares stay above 0.5 %, so that it is positive definite.

    Raises
    ------
    ValueError
        As `clip`, and for k out of range.

    References
    ----------
    Joreskog (1967), Psychometrika 32(4); the step is that of Barber (2012), Bayesian Reasoning and Machine
    Learning, 21.2.1.
    """
    correlation, sd, names = correlation_of(covariance)
    d, n_samples = sd.size, row_count(n_samples)
    semidefinite(np.linalg.eigvalsh(correlation))
    if k is None:
        k = min(n_factors(correlation, n_samples), d - 1)
    if k != int(k) or not 0 <= k < d:
        raise ValueError(
            f"expected a number of factors k from 0 to d - 1 = {d - 1}, got {k}: with d factors nothing is cleaned; "
            "leave k out to count those above the noise."
        )
    k, psi, loadings = int(k), np.ones(d), np.zeros((d, 0))
    if k:
        psi = np.maximum(1 / np.diag(np.linalg.pinv(correlation)), 0.1)
        for _ in range(max_iter):
            root = np.sqrt(psi)
            eigenvalues, vectors = np.linalg.eigh(correlation / np.outer(root, root))
            scale = np.sqrt(np.maximum(eigenvalues[-k:] - 1, 0))
            loadings = root[:, None] * vectors[:, -k:] * scale
            last, psi = psi, np.maximum(1 - (loadings**2).sum(axis=1), 0.005)
            if np.abs(psi - last).max() < tol:
                break
    correlation = unit_diagonal(loadings @ loadings.T + np.diag(psi))
    return rescale(framed(correlation, names), sd)
