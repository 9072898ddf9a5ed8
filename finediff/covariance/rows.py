"""Estimators that need the rows themselves, not only their covariance.

    constant correlation   Sigma = (1 - a) S + a D^1/2 [(1 - r) I + r 11'] D^1/2,   r the mean correlation of S,
                           a = max(0, min(1, (pi - rho)/(n gamma))): the least expected squared error
    Student t              w_t = (nu + d)/(nu + (x_t - m)' V^-1 (x_t - m)),   m = sum w x/sum w,
                           V = shrink(sum w (x - m)(x - m)'/n),   nu by maximum likelihood

Rows are simple returns per period (n, d); covariances are per period.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import gammaln

from finediff.covariance.clean import shrunk_correlation
from finediff.covariance.estimators import CovarianceEstimator, live_variances, sample_covariance
from finediff.covariance.matrix import diagonal, outer, rescale, with_diagonal


class ConstantCorrelationShrinkage(CovarianceEstimator):
    """Linear shrinkage towards one correlation for all pairs.

    Parameters
    ----------
    assume_centered : bool
        True takes the mean for zero.

    Attributes
    ----------
    shrinkage_ : float
        a in [0, 1].
    correlation_ : float
        The one correlation.

    References
    ----------
    Ledoit, Wolf (2004), Honey, I shrunk the sample covariance matrix, Journal of Portfolio Management 30(4),
    appendix B. The published formula divides S by n; the a found so is applied to S divided by n - 1.
    """

    _closed_form = True

    def _estimate(self, rows, n_samples):
        n, d = rows.shape[-2:]
        S = rows.swapaxes(-1, -2) @ rows / n
        variance = live_variances(S)
        sd = np.sqrt(variance)
        a, r = np.zeros(rows.shape[:-2]), np.zeros(rows.shape[:-2])
        if d > 1:
            r = ((S / outer(sd)).sum(axis=(-2, -1)) - d) / (d * (d - 1))
            target = with_diagonal(r[..., None, None] * outer(sd), variance)
            squares = rows**2
            pi = squares.swapaxes(-1, -2) @ squares / n - S**2
            # theta_ij: asymptotic covariance of s_ii with s_ij.
            theta = (squares * rows).swapaxes(-1, -2) @ rows / n - variance[..., :, None] * S
            theta = with_diagonal(theta, 0.0) * (sd[..., None, :] / sd[..., :, None])
            rho = diagonal(pi).sum(axis=-1) + r * theta.sum(axis=(-2, -1))
            gamma = ((target - S) ** 2).sum(axis=(-2, -1))
            wanted = (pi.sum(axis=(-2, -1)) - rho) / (n * np.where(gamma > 0, gamma, 1.0))
            a = np.where(gamma > 0, np.clip(wanted, 0.0, 1.0), 1.0)
            S = (1 - a[..., None, None]) * S + a[..., None, None] * target
        if rows.ndim == 2:
            self.shrinkage_, self.correlation_ = float(a), float(r)
        return S * (n / (n_samples - 1))


class StudentTCovariance(CovarianceEstimator):
    """Dependence of a multivariate Student t with nonlinear shrinkage, the sample's own volatilities.

    Days on which everything moves count less, so that a crash does not decide the correlations. The scale of the t
    is not used: it makes crash-prone assets look safe.

    Parameters
    ----------
    dof : float, optional
        nu > 0; by maximum likelihood in [2.1, 100] by default.
    max_iter : int
        Steps of the expectation-conditional-maximisation.
    tol : float
        Largest change of a correlation at which they end.
    assume_centered : bool
        True takes the mean for zero.

    Attributes
    ----------
    dof_ : float
    n_iter_ : int

    References
    ----------
    Liu, Rubin (1995), ML estimation of the t distribution using EM and its extensions, Statistica Sinica 5; the
    shrinkage inside is Ledoit and Wolf (2022).
    """

    def __init__(self, *, dof=None, max_iter=50, tol=1e-4, assume_centered=False):
        self.dof = dof
        self.max_iter = max_iter
        self.tol = tol
        self.assume_centered = assume_centered

    def _estimate(self, rows, n_samples):
        if self.dof is not None and not 0 < self.dof < np.inf:
            raise ValueError(
                f"expected a finite dof above 0, got {self.dof}: infinitely many are Gaussian rows, for which "
                "QuadraticInverseShrinkage is meant."
            )
        n, d = rows.shape
        sd = np.sqrt(live_variances(sample_covariance(rows, n_samples)))
        Z = rows / sd
        mean, nu = np.zeros(d), 8.0 if self.dof is None else float(self.dof)
        V = shrunk_correlation(np.clip(Z.T @ Z / (n_samples - 1), -1, 1), n_samples)
        for step in range(self.max_iter):
            self.n_iter_ = step + 1
            root = np.linalg.cholesky(V + 1e-10 * np.eye(d))
            q = (np.linalg.solve(root, (Z - mean).T) ** 2).sum(axis=0)
            if self.dof is None:
                nu = _likeliest_dof(q, d)
            w = (nu + d) / (nu + q)
            if not self.assume_centered:
                mean = w @ Z / w.sum()
            scatter = ((Z - mean) * w[:, None]).T @ (Z - mean) / n
            scale = np.sqrt(np.diag(scatter))
            last = V
            V = rescale(shrunk_correlation(scatter / np.outer(scale, scale), n_samples), scale)
            if np.abs(V - last).max() < self.tol:
                break
        self.dof_ = float(nu)
        scale = np.sqrt(np.diag(V))
        return rescale(V / np.outer(scale, scale), sd)


def _likeliest_dof(q, d):
    """nu in [2.1, 100] that maximises the t likelihood, given squared Mahalanobis distances q (n,)."""

    def loss(log_nu):
        nu = np.exp(log_nu)
        constant = gammaln((nu + d) / 2) - gammaln(nu / 2) - d / 2 * np.log(nu)
        return (nu + d) / 2 * np.log1p(q / nu).mean() - constant

    best = minimize_scalar(loss, bounds=(np.log(2.1), np.log(100)), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(best.x))
