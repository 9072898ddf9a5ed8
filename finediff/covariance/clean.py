"""Cleaning: (covariance, n_samples) -> covariance with less of the noise of n rows in it.

    clip    C = U diag(lambda) U',  lambda_i <= edge  ->  their mean
    shrink  C = U diag(lambda) U',  lambda -> delta of `finediff.covariance.spectrum`

Each is done on the correlation, gets its unit diagonal back, and Sigma = D^1/2 C D^1/2 with D the diagonal of the
input: rescaling an asset rescales its row and column, and nothing else. A DataFrame stays one.

What the estimators call below is not checked, and takes stacks (..., d, d).
"""

import numpy as np

from finediff.covariance.marchenko_pastur import fitted_edge, noise_edge, row_count
from finediff.covariance.matrix import (
    checked,
    correlation_of,
    framed,
    outer,
    rescale,
    semidefinite,
    standardised,
    unit_diagonal,
)
from finediff.covariance.spectrum import analytical, quadratic_inverse, rotationally_invariant, shrink


def _edge(eigenvalues, n_samples, edge, level):
    if edge == "fitted":
        return fitted_edge(eigenvalues, n_samples, level=level)[0]
    return noise_edge(eigenvalues.shape[-1], n_samples, edge=edge, level=level)


def clip(covariance, n_samples, *, edge="tracy-widom", level=0.01):
    """Replace the noise eigenvalues of the correlation matrix by their mean.

    Parameters
    ----------
    covariance : (d, d) array or DataFrame
        In any units; n < d, n = d and singular matrices are fine (zero eigenvalues join the noise).
    n_samples : int
        Rows of the panel behind the covariance, n >= 3.
    edge : {"tracy-widom", "bulk", "fitted"}
        See `noise_edge`. "fitted" lowers the Tracy-Widom edge to the noise variance that the bulk of this
        spectrum shows (`fitted_edge`): factors take their share of the variance, and weak ones are kept.
    level : float
        See `noise_edge`.

    Returns
    -------
    (d, d) array or DataFrame
        Same variances as the input. Eigenvalues of the correlation at or below the edge are equal before the
        unit diagonal is restored; those above are untouched.

    Raises
    ------
    ValueError
        If the input is not a finite, symmetric, positive semi-definite matrix with positive variances, or
        n_samples is not an integer >= 3.

    References
    ----------
    Laloux, Cizeau, Bouchaud, Potters (1999, 2000). The noise variance stays at 1 by default: the mean of the
    eigenvalues that remain would lower the edge again and again and let noise through.
    """
    correlation, sd, names = correlation_of(covariance)
    return rescale(framed(clipped_correlation(correlation, n_samples, edge, level), names), sd)


def n_factors(covariance, n_samples, *, edge="tracy-widom", level=0.01):
    """Number of correlation eigenvalues above the noise edge.

    Parameters
    ----------
    covariance : (d, d) array or DataFrame
        In any units.
    n_samples : int
        Rows of the panel behind the covariance, n >= 3.
    edge : {"tracy-widom", "bulk", "fitted"}
        As in `clip`.
    level : float
        As in `clip`.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        As `clip`.
    """
    correlation, _, _ = correlation_of(covariance)
    eigenvalues = semidefinite(np.linalg.eigvalsh(correlation))
    return int((eigenvalues > _edge(eigenvalues, n_samples, edge, level)).sum())


def clipped_correlation(correlation, n_samples, edge="tracy-widom", level=0.01):
    """Correlations (..., d, d) whose noise eigenvalues are their mean."""
    eigenvalues, vectors = np.linalg.eigh(correlation)
    eigenvalues = semidefinite(eigenvalues)
    if edge == "fitted":
        flat = eigenvalues.reshape(-1, eigenvalues.shape[-1])
        above = np.array([_edge(one, n_samples, edge, level) for one in flat])
        above = above.reshape(*eigenvalues.shape[:-1], 1)
    else:
        above = _edge(eigenvalues, n_samples, edge, level)
    noise = eigenvalues <= above
    mean = (eigenvalues * noise).sum(axis=-1, keepdims=True) / np.maximum(
        noise.sum(axis=-1, keepdims=True), 1
    )
    return unit_diagonal(_recomposed(vectors, np.where(noise, mean, eigenvalues)))


def shrunk_correlation(correlation, n_samples, formula=quadratic_inverse):
    """Correlations (..., d, d) with shrunk eigenvalues and their unit diagonal back."""
    return unit_diagonal(_shrunk(correlation, n_samples, formula))


def shrunk_covariance(covariance, n_samples, formula=quadratic_inverse, standardise=True):
    """Covariances (..., d, d) with shrunk eigenvalues: of the correlation if ``standardise``, or their own."""
    if standardise:
        correlation, sd = standardised(covariance)
        return shrunk_correlation(correlation, n_samples, formula) * outer(sd)
    matrix = _shrunk(covariance, n_samples, formula)
    return (matrix + matrix.swapaxes(-1, -2)) / 2


def _shrunk(matrix, n_samples, formula):
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return _recomposed(vectors, shrink(formula, semidefinite(eigenvalues), n_samples - 1))


def _recomposed(vectors, eigenvalues):
    return (vectors * eigenvalues[..., None, :]) @ vectors.swapaxes(-1, -2)


def _nonlinear(covariance, n_samples, formula, standardise):
    matrix, names = checked(covariance)
    return framed(shrunk_covariance(matrix, row_count(n_samples), formula, standardise), names)


def quadratic_inverse_shrinkage(covariance, n_samples, *, standardise=True):
    """Quadratic-inverse shrinkage of the eigenvalues.

    Parameters
    ----------
    covariance : (d, d) array or DataFrame
        Of n rows, divided by n - 1, in any units.
    n_samples : int
        Rows of the panel behind the covariance, n >= 3, counted before its mean was removed (one more for rows
        that were never centred).
    standardise : bool
        True shrinks the correlation and keeps the variances: better wherever volatilities differ. False is the
        published estimator, rotation-equivariant, which keeps the total variance only.

    Returns
    -------
    (d, d) array or DataFrame
        Positive definite for every n, singular input included, where no asset is a copy of another.

    Raises
    ------
    ValueError
        As `clip`.

    Notes
    -----
    The published formula divides by eigenvalues that reach zero as n approaches d: its minimum-variance
    portfolio then realises several times the attainable variance. For 0.8 < d/(n - 1) < 1.25 the formula is
    therefore applied to random subsets of 0.8 min(d, n - 1) rows and the variances of the eigenvectors of the
    input are averaged; the subsets are drawn from the covariance alone (rows are not needed, Gaussian ones are
    supposed), with a fixed seed.

    References
    ----------
    Ledoit, Wolf (2022), Quadratic shrinkage for large covariance matrices, Bernoulli 28(3).
    """
    return _nonlinear(covariance, n_samples, quadratic_inverse, standardise)


def analytical_shrinkage(covariance, n_samples, *, standardise=True):
    """Analytical nonlinear shrinkage of the eigenvalues, by a kernel estimate of their density.

    Parameters
    ----------
    covariance : (d, d) array or DataFrame
        Of n rows, divided by n - 1, in any units.
    n_samples : int
        Rows of the panel behind the covariance, n >= 3.
    standardise : bool
        As in `quadratic_inverse_shrinkage`.

    Returns
    -------
    (d, d) array or DataFrame

    Raises
    ------
    ValueError
        As `clip`.

    References
    ----------
    Ledoit, Wolf (2020), Analytical nonlinear shrinkage of large-dimensional covariance matrices, Annals of
    Statistics 48(5). The trace is kept, and n near d is treated as in `quadratic_inverse_shrinkage`.
    """
    return _nonlinear(covariance, n_samples, analytical, standardise)


def rie(covariance, n_samples, *, standardise=True):
    """Rotationally invariant estimator, with the inverse-Wishart correction of small eigenvalues.

    Parameters
    ----------
    covariance : (d, d) array or DataFrame
        Of n rows, divided by n - 1, in any units.
    n_samples : int
        Rows of the panel behind the covariance, n >= 3.
    standardise : bool
        As in `quadratic_inverse_shrinkage`.

    Returns
    -------
    (d, d) array or DataFrame

    Raises
    ------
    ValueError
        As `clip`.

    References
    ----------
    Bun, Bouchaud, Potters (2016), Cleaning correlation matrices, Risk; (2017), Cleaning large correlation
    matrices: tools from random matrix theory, Physics Reports 666, section 8.1. For n <= d, which they leave
    out, the null space follows Ledoit and Wolf; the trace is kept, and n near d is treated as in
    `quadratic_inverse_shrinkage`.
    """
    return _nonlinear(covariance, n_samples, rotationally_invariant, standardise)


def matched_diagonal_shrinkage(covariance, estimate, *, match="condition"):
    """S + s^2 diag(S), brought back to the variances of S, at the intensity of another estimate.

    A generator whose rows carry added noise, or whose training stopped early, shrinks correlations exactly like
    this. What an estimate achieves beyond this comparator is its own.

    Parameters
    ----------
    covariance : (d, d) array or DataFrame
        S, of the sample.
    estimate : (d, d) array or DataFrame
        To be matched; only its correlation is read.
    match : {"condition", "correlation"}
        What "the same intensity" means. "condition": the same condition number of the correlation matrix, which
        bounds how far minimum-variance weights lever up and is what a cleaned spectrum changes most.
        "correlation": the same mean squared correlation, the mass off the diagonal; estimators that keep the
        first factor and clean the rest barely move it, so that it asks for less shrinkage.

    Returns
    -------
    covariance : (d, d) array or DataFrame
        (1 - a) S + a diag(S) = (S + s^2 diag(S))/(1 + s^2), s^2 = a/(1 - a).
    intensity : float
        a in [0, 1]; 0 if the estimate is no more shrunk than S.

    Raises
    ------
    ValueError
        If a matrix is no covariance, sizes or names differ, or match is unknown.
    """
    correlation, sd, names = correlation_of(covariance)
    other, _, other_names = correlation_of(estimate)
    alike = names is None or other_names is None or names.equals(other_names)
    if other.shape != correlation.shape or not alike:
        raise ValueError(
            f"expected an estimate for the assets of the covariance {correlation.shape}, got {other.shape} or other "
            "names: the two are compared entry by entry; reindex it."
        )
    if match == "condition":
        low, high = semidefinite(np.linalg.eigvalsh(correlation))[[0, -1]]
        bottom, top = semidefinite(np.linalg.eigvalsh(other))[[0, -1]]
        # (1 - a) lambda + a has the condition number top/bottom: linear in a.
        excess = high * bottom - low * top
        a = excess / (excess + top - bottom) if excess > 0 else 0.0
    elif match == "correlation":
        off = ~np.eye(sd.size, dtype=bool)
        mass, other_mass = (correlation[off] ** 2).sum(), (other[off] ** 2).sum()
        a = 1 - np.sqrt(other_mass / mass) if other_mass < mass else 0.0
    else:
        raise ValueError(f"expected match 'condition' or 'correlation', got {match!r}.")
    blend = (1 - a) * correlation
    np.fill_diagonal(blend, 1.0)
    return rescale(framed(blend, names), sd), float(a)
