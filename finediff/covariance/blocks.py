"""Groups of assets that are alike: one correlation within each group, one between each pair of groups.

    C_ij  ->  mean of C over i' in the group of i, j' in the group of j, i' != j'
    code  n log det C + log(n) g(g + 1)/2 + 2 d log(g), least over the cuts of an average-linkage tree of 1 - C into g groups

The mean is that of P C P' over all permutations P within groups: it stays positive semi-definite.
"""

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from finediff.covariance.marchenko_pastur import row_count
from finediff.covariance.matrix import correlation_of, framed, rescale, semidefinite


def block_correlation(covariance, n_samples, *, blocks=None):
    """Correlations averaged over groups of assets.

    Parameters
    ----------
    covariance : (d, d) array or DataFrame
        In any units.
    n_samples : int
        Rows of the panel behind the covariance, n >= 3.
    blocks : (d,) array of labels, optional
        The group of each asset, such as its sector. By default groups are found: those of a hierarchical clustering
        by average linkage with the shortest description: the Bayesian information criterion and
        the labels, without which one group would fall apart by chance.

    Returns
    -------
    (d, d) array or DataFrame
        Same variances as the input.

    Raises
    ------
    ValueError
        As `clip`, and for labels that are not one per asset.

    Notes
    -----
    Of d(d - 1)/2 correlations g(g + 1)/2 are left. Where assets do form such groups nothing that looks at the
    spectrum alone comes near (``benchmarks/covariance.py``); where they do not, the error stays however many rows
    there are: on the bundled 20 shares minimum variance realises 15.5 % with 252 days, 15.0 % with
    `quadratic_inverse_shrinkage`.

    References
    ----------
    Elton, Gruber (1973), Estimating the dependence structure of share prices, Journal of Finance 28(5); Archakov,
    Hansen (2024), A canonical representation of block matrices, Review of Economics and Statistics 106(4).
    """
    n_samples = row_count(n_samples)
    correlation, sd, names = correlation_of(covariance)
    semidefinite(np.linalg.eigvalsh(correlation))
    if blocks is None:
        labels = _clusters(correlation, n_samples)
    else:
        labels = np.unique(np.asarray(blocks), return_inverse=True)[1]
        if np.shape(blocks) != (sd.size,):
            raise ValueError(
                f"expected one label for each of {sd.size} assets, got shape {np.shape(blocks)}: a group is looked up by "
                "the asset's position; pass for example the sectors in the order of the columns."
            )
    within, between, _ = _means(correlation, labels)
    blend = between[np.ix_(labels, labels)]
    same = labels[:, None] == labels
    blend[same] = within[np.broadcast_to(labels, same.shape)[same]]
    np.fill_diagonal(blend, 1.0)
    return rescale(framed(blend, names), sd)


def _means(correlation, labels):
    """Mean correlation within groups (g,), between them (g, g), and their sizes (g,)."""
    member = (labels[:, None] == np.arange(labels.max() + 1)).astype(float)
    size = member.sum(axis=0)
    total = member.T @ correlation @ member
    pairs = size * (size - 1)
    within = np.divide(np.diag(total) - size, pairs, out=np.zeros_like(size), where=pairs > 0)
    return within, total / np.outer(size, size), size


def _log_determinant(within, between, size):
    """Of the block correlation: g eigenvalues of the group means, size - 1 times 1 - within of each group."""
    core = between * np.sqrt(np.outer(size, size))
    np.fill_diagonal(core, 1 + (size - 1) * within)
    values = np.maximum(np.linalg.eigvalsh(core), 1e-12)
    return np.log(values).sum() + ((size - 1) * np.log(np.maximum(1 - within, 1e-12))).sum()


def _clusters(correlation, n_samples):
    """Labels (d,) of the cut with the least criterion."""
    d = len(correlation)
    if d < 3:
        return np.zeros(d, int)
    tree = linkage(squareform(1 - correlation, checks=False), method="average")
    cuts = cut_tree(tree)
    best, least = None, np.inf
    # The criterion is for few parameters and many rows: g means of n - 1 rows are singular from g = n - 1 on.
    most = max(1, min(d - 1, (n_samples - 1) // 4))
    for g in range(1, most + 1):
        labels = cuts[:, d - g]
        value = (
            n_samples * _log_determinant(*_means(correlation, labels))
            + np.log(n_samples) * g * (g + 1) / 2
            + 2 * d * np.log(g)
        )
        if value < least:
            best, least = labels, value
    return best
