"""Nonlinear shrinkage: each eigenvalue of a covariance replaced by what its eigenvector's variance really is.

    S = U diag(lambda) U'  ->  U diag(delta) U',   delta_i estimates u_i' Sigma u_i;   c = d/N, N = n - 1

    QIS         delta_i^-1 = (1 - c)^2 mu_i + 2c(1 - c) mu_i theta_i + c^2 mu_i A_i,   mu = 1/lambda
                theta_i = mean_j mu_j (mu_j - mu_i)/D_ij,   eta_i = mean_j h mu_j^2/D_ij,   A = theta^2 + eta^2
                D_ij = (mu_j - mu_i)^2 + h^2 mu_j^2,   h = min(c^2, c^-2)^0.35 d^-0.35
    analytical  delta_i = lambda_i/[(pi c lambda_i f)^2 + (1 - c - pi c lambda_i H)^2],   f, H at lambda_i: an
                Epanechnikov kernel density with bandwidth N^(-1/3) lambda_j, and its Hilbert transform
    RIE         delta_i = lambda_i max(1, Gamma_i)/|1 - c + c z s(z)|^2,   z = lambda_i - i/sqrt d,
                s(z) = mean_{j != i} 1/(z - lambda_j), Gamma: what this does to an inverse-Wishart spectrum
    null space  N < d: those d - N eigenvalues become 1/((c - 1) mean mu)
    thinned     c near 1: delta_i = mean over random sets of m < N rows of u_i' (their shrunk covariance) u_i

All keep the trace. Eigenvalues are the last axis: those of many matrices are done in one go. Units: those of the eigenvalues, (return per period)^2 or none for a correlation.
"""

import numpy as np

_NEAR = 0.8  # thin for 0.8 < d/N < 1.25
_FLOOR = 1e-12  # of the largest eigenvalue: a collinear asset has zero, and 1/0 is no number


def _inverse(eigenvalues, n):
    """1/lambda of the min(d, N) largest."""
    top = eigenvalues[..., max(0, eigenvalues.shape[-1] - n) :]
    return 1 / np.maximum(top, _FLOOR * top[..., -1:])


def _with_null_space(delta, inverse, d, n):
    """Put the common value of the null space before delta (..., N)."""
    null = 1 / ((d / n - 1) * inverse.mean(axis=-1, keepdims=True))
    return np.concatenate([np.repeat(null, d - n, axis=-1), delta], axis=-1)


def quadratic_inverse(eigenvalues, n, least_bandwidth=0.0):
    """Ledoit and Wolf (2022): (..., d) ascending eigenvalues and N effective rows -> (..., d), before the trace.

    Its bandwidth, relative to an eigenvalue, may be bounded from below.
    """
    d = eigenvalues.shape[-1]
    c = d / n
    h = max(min(c**2, c**-2) ** 0.35 / d**0.35, least_bandwidth)
    mu = _inverse(eigenvalues, n)
    column = mu[..., :, None]
    gap = column - mu[..., None, :]
    D = gap**2 + (h * column) ** 2
    theta = (column * gap / D).mean(axis=-2)
    A = theta**2 + (h * column**2 / D).mean(axis=-2) ** 2
    if d <= n:
        return 1 / (mu * ((1 - c) ** 2 + 2 * c * (1 - c) * theta + c**2 * A))
    return _with_null_space(1 / (mu * A), mu, d, n)


def analytical(eigenvalues, n):
    """Ledoit and Wolf (2020), the same arguments; its kernel has a support of sqrt 5 bandwidths."""
    d = eigenvalues.shape[-1]
    c, h = d / n, n ** (-1 / 3)
    value = 1 / _inverse(eigenvalues, n)
    width = h * value[..., None, :]
    x = (value[..., :, None] - value[..., None, :]) / width
    f = (3 / (4 * np.sqrt(5)) * np.maximum(1 - x**2 / 5, 0) / width).mean(axis=-1)
    H = _epanechnikov_hilbert(x)
    H = (H / width).mean(axis=-1)
    if d <= n:
        return value / ((np.pi * c * value * f) ** 2 + (1 - c - np.pi * c * value * H) ** 2)
    reach = np.sqrt(5) * h
    tail = np.log(np.abs((1 + reach) / (1 - reach)))
    H0 = (
        (3 / (10 * h**2) + 3 / (4 * np.sqrt(5) * h) * (1 - 1 / (5 * h**2)) * tail)
        * (1 / value).mean(axis=-1, keepdims=True)
        / np.pi
    )
    null = np.repeat(1 / (np.pi * (c - 1) * H0), d - n, axis=-1)
    return np.concatenate([null, 1 / (np.pi**2 * value * (f**2 + H**2))], axis=-1)


def _epanechnikov_hilbert(x):
    """Hilbert transform of 3/(4 sqrt 5) max(0, 1 - x^2/5): its moments far out, where the closed form cancels."""
    far = np.abs(x) > 100
    y = np.where(far, x, 100.0) ** -2
    series = -(1 + y + 15 / 7 * y**2) / (np.pi * np.where(far, x, 100.0))
    near = np.where(far, 0.0, x)
    ends = np.abs(near) == np.sqrt(5)
    inside = np.where(ends, 0.0, near)
    log = np.log(np.abs((np.sqrt(5) - inside) / (np.sqrt(5) + inside)))
    closed = -3 / (10 * np.pi) * near + 3 / (4 * np.sqrt(5) * np.pi) * (1 - inside**2 / 5) * log
    return np.where(far, series, closed)


def rotationally_invariant(eigenvalues, n):
    """Bun, Bouchaud and Potters (2016, 2017), the same arguments; Gamma where N > d."""
    d = eigenvalues.shape[-1]
    c, mean = d / n, eigenvalues.mean(axis=-1, keepdims=True)
    value = np.maximum(eigenvalues, _FLOOR * eigenvalues[..., -1:]) / mean
    null = max(0, d - n)
    top = value[..., null:]
    z = top - 1j / np.sqrt(d)
    apart = z[..., :, None] - value[..., None, :]
    itself = np.arange(d - null)
    apart[..., itself, null + itself] = np.inf
    s = (1 / apart).mean(axis=-1)
    delta = top / np.abs(1 - c + c * z * s) ** 2
    if d > n:
        return mean * _with_null_space(delta, 1 / top, d, n)
    return mean * delta * np.maximum(1, _inverse_wishart_bias(top, z, c))


def _inverse_wishart_bias(value, z, c):
    """Gamma (..., d): the true shrinkage of an inverse-Wishart spectrum with this smallest eigenvalue, over RIE's."""
    least = value[..., :1]
    room = (1 - c - least) ** 2 - 4 * c * least
    # From the Marchenko-Pastur edge upwards the spectrum is narrower than noise: the identity, kappa = inf.
    wider = (room > 0) & (least < 1 - c)
    kappa = np.minimum(np.where(wider, 2 * least / np.where(wider, room, 1.0), np.inf), 1e8)
    half = np.sqrt((2 * kappa + 1) * (2 * c * kappa + 1)) / kappa
    lower, upper = 1 + c + 1 / kappa - half, 1 + c + 1 / kappa + half
    g = z * (1 + 1 / kappa) - (1 - c) - np.sqrt(z - lower) * np.sqrt(z - upper)
    g = g / (z * (z / kappa + 2 * c))
    truth = 1 + (value - 1) / (1 + 2 * c * kappa)
    return np.abs(1 - c + c * z * g) ** 2 / (value / truth)


def _thinned(formula, eigenvalues, n, rounds=8):
    """Mean over random subsets of the rows, which the eigenvalues suffice to draw.

    Gaussian rows with the covariance S are sqrt(N) Q diag(lambda)^1/2 U' with Q (N, min(N, d)) uniform among
    orthonormal columns, whatever Sigma is. At N = d the density of the eigenvalues diverges at zero and every
    formula above divides by it; m rows with d/m = 1.25 or more are far from there.
    """
    d = eigenvalues.shape[-1]
    rank, m = min(n, d), max(1, int(_NEAR * min(n, d)))
    root = np.sqrt(n * eigenvalues[..., None, d - rank :])
    rng = np.random.default_rng(0)  # fixed: the same covariance in, the same out
    delta = np.zeros(eigenvalues.shape)
    for _ in range(rounds):
        Q = np.linalg.qr(rng.standard_normal((n, rank)))[0]
        rows = np.zeros((*eigenvalues.shape[:-1], m, d))
        rows[..., d - rank :] = Q[:m] * root
        thin, U = np.linalg.eigh(rows.swapaxes(-1, -2) @ rows / m)
        delta += (U**2 @ formula(np.maximum(thin, 0.0), m)[..., None])[..., 0]
    return delta / rounds


def shrink(formula, eigenvalues, n):
    """Shrunk eigenvalues (..., d) with the trace of the given ones, safe for every N >= 1.

    Parameters
    ----------
    formula : callable (eigenvalues, N) -> (..., d)
        One of `quadratic_inverse`, `analytical`, `rotationally_invariant`.
    eigenvalues : (..., d) array
        Ascending, not negative, not all zero.
    n : int
        N, the rows less one for the mean.
    """
    d = eigenvalues.shape[-1]
    if d == 1:
        return eigenvalues
    near = _NEAR < d / n < 1 / _NEAR
    delta = _thinned(formula, eigenvalues, n) if near else formula(eigenvalues, n)
    return delta * (eigenvalues.sum(axis=-1, keepdims=True) / delta.sum(axis=-1, keepdims=True))
