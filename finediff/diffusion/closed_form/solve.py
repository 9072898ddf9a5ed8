"""One ridge per noise level, its penalty by exact k-fold cross-validation.

    (G + lambda D) B = R,   D = diag G,      loss_f(B) = tr B' G_f B - 2 tr B' R_f        (f = the fold left out)

G = sum E[phi phi'] and R = sum E[phi y'] add over rows, so over folds: a fit without f needs G - G_f and R - R_f,
and one eigendecomposition of D^-1/2 (G - G_f) D^-1/2 serves all lambda. With exact expectations over the noise the
choice has no Monte-Carlo error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finediff.diffusion.process import require

# Relative to D; across noise levels the best one spans seven decades.
RIDGES = tuple(10.0 ** (k / 2) for k in range(-16, 5))


@dataclass(frozen=True)
class RidgeFit:
    """Output of `fold_ridge`; a block that is off has weights 0 and gain 0.

    Attributes
    ----------
    weights : (..., p, q)
        B, fitted on all folds; float64.
    ridge : (...) or (..., q)
        The chosen lambda, relative to D; the second shape where each output has its own.
    gain : (..., q)
        What B wins on rows that it did not see over B = 0, summed over folds, in the unit of sum y^2.
    fold_gain : (..., K, q)
        The same, fold by fold; not zeroed where the block is off.
    """

    weights: Tensor
    ridge: Tensor
    gain: Tensor
    fold_gain: Tensor


def fold_ridge(
    G: Tensor,
    R: Tensor,
    ridges=RIDGES,
    *,
    scale: Literal["diagonal", "trace"] = "diagonal",
    per_output: bool = False,
    margin: float = 0.0,
) -> RidgeFit:
    """Ridge regression from the normal equations of K folds, its penalty by exact cross-validation.

    Every leading axis (noise levels, windows) is a problem of its own. Solves are in float64 whatever the input is.

    Parameters
    ----------
    G : (..., K, p, p)
        Per fold, the sum over its rows of E[phi phi']: symmetric positive semidefinite.
    R : (..., K, p, q)
        Per fold, the sum over its rows of E[phi y']. Divide both by the number of all rows for gains per row.
    ridges : sequence of floats
        Candidates for lambda > 0, relative to D; those below ten roundoffs of G's dtype are raised to it.
    scale : {"diagonal", "trace"}
        D = diag G (each feature by its own size), or the mean of that diagonal times the identity.
    per_output : bool
        One lambda, and one decision whether the block is on, for each of the q outputs; else one for all.
    margin : float
        Standard errors over the folds that the gain must exceed; at 0 it must be positive.

    Returns
    -------
    RidgeFit

    Raises
    ------
    ValueError
        If shapes do not fit, K < 2, or an entry is not finite.
    """
    good = G.ndim >= 3 and G.shape[-1] == G.shape[-2] and G.shape[-3] >= 2
    advice = "leave-one-fold-out needs two folds or more"
    require(good, "G of shape (..., K, p, p) with K >= 2", tuple(G.shape), advice)
    require(R.shape[:-1] == G.shape[:-1], f"R of shape {(*G.shape[:-1], 'q')}", tuple(R.shape))
    require(scale in ("diagonal", "trace"), "a scale 'diagonal' or 'trace'", repr(scale))
    require(G.isfinite().all() and R.isfinite().all(), "finite G and R", "NaN or infinity", "check the rows")
    smallest = 10 * torch.finfo(G.dtype).eps
    G, R = G.double(), R.double()
    ridges = torch.as_tensor(ridges, dtype=torch.float64, device=G.device).clamp(min=smallest)

    # Fit k < K leaves fold k out, fit K has all of them.
    total_G, total_R = G.sum(-3, keepdim=True), R.sum(-3, keepdim=True)
    fits_G, fits_R = torch.cat([total_G - G, total_G], -3), torch.cat([total_R - R, total_R], -3)
    size = fits_G.diagonal(dim1=-2, dim2=-1)
    if scale == "trace":
        size = size.mean(-1, keepdim=True).expand_as(size)
    root = torch.where(size > 0, size, torch.inf).rsqrt()[..., None]  # a feature that is 0 gets no weight
    values, vectors = torch.linalg.eigh(root * fits_G * root.mT)
    values, target = values.clamp(min=0), vectors.mT @ (root * fits_R)

    def left_out(values: Tensor) -> Tensor:
        return values[..., :-1, :, :]

    shrunk = target[..., :-1, :, None, :] / (values[..., :-1, :, None, None] + ridges[:, None])
    B = left_out(root) * (left_out(vectors) @ shrunk.flatten(-2))
    quadratic = (B * (G @ B)).sum(-2).unflatten(-1, (len(ridges), -1))
    linear = (B.unflatten(-1, (len(ridges), -1)) * R[..., None, :]).sum(-3)
    gains = 2 * linear - quadratic  # (..., K, candidates, q)

    judged = gains if per_output else gains.sum(-1, keepdim=True)
    best = judged.sum(-3).argmax(-2, keepdim=True)  # (..., 1, q or 1)
    fold_gain = gains.take_along_dim(best[..., None, :, :].expand(*gains.shape[:-2], 1, -1), -2)[..., 0, :]
    judged = judged.take_along_dim(best[..., None, :, :].expand(*gains.shape[:-2], 1, -1), -2)[..., 0, :]
    error = judged.std(-2) * G.shape[-3] ** 0.5
    on = (judged.sum(-2) > margin * error).double()  # (..., q or 1)
    ridge = ridges[best]
    weights = root[..., -1, :, :] * (
        vectors[..., -1, :, :] @ (target[..., -1, :, :] / (values[..., -1, :, None] + ridge))
    )
    ridge = ridge[..., 0, :] if per_output else ridge[..., 0, 0]
    return RidgeFit(weights * on[..., None, :], ridge, fold_gain.sum(-2) * on, fold_gain)
