"""Draws of a law of random volatilities given low <= A x_0 <= high: volatilities first, then a Gaussian.

P(v | wish) ~ P(v) P(low <= A x <= high | v):  a pool of volatilities, wider than their law, is weighted and redrawn
              (sampling importance resampling: Rubin 1987)
A x | v, wish      within bounds, coordinate by coordinate (Geweke; Hajivassiliou; Keane)
x | A x, v         Gaussian, exactly: the model's own affair
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_POOL = 2**17  # volatilities among which a stressed day's are chosen


def pool_size(A: Tensor, low: Tensor, high: Tensor) -> int:
    """How many volatilities to draw for a wish A (k, d), low and high (n, k): fewer where each row has its own."""
    return min(_POOL if _same(low, high) else _POOL // 16, max(2**12, 2**24 // A.numel()))  # bounds memory


def wide(law: Tensor, count: int, generator) -> tuple[Tensor, Tensor]:
    """Draws (count,) from half a law (M,) and half an even one, and the logs of the law's weights at them."""
    law = law.double()
    proposal = 0.5 * law + 0.5 / len(law)
    drawn = torch.multinomial(proposal, count, replacement=True, generator=generator)
    return drawn, (law / proposal).log()[drawn]


def draw_given(
    low: Tensor,
    high: Tensor,
    root: Tensor,
    log_weights: Tensor,
    complete: Callable[[Tensor, Tensor], Tensor],
    generator: torch.Generator | None,
) -> Tensor:
    """(n, d) rows, each from a member of a pool that was drawn by how likely it makes the wish.

    Parameters
    ----------
    low, high : (n, k)
        Equal where a value is wanted; infinite where a side is open.
    root, log_weights : (P, k, k), (P,)
        Of each member: the Cholesky factor of A x's covariance, and the log of its weight in the pool.
    complete : callable
        (members (m,), y (m, k)) -> x (m, d) with A x = y.
    generator : torch.Generator, optional
        Of the draws.
    """
    rows = []
    for group in [slice(None)] if _same(low, high) else [slice(i, i + 1) for i in range(len(low))]:
        bounds = low[group][0], high[group][0]
        y, wish = truncated(root, *bounds, generator)
        share = (log_weights + wish).softmax(0)
        chosen = torch.multinomial(share, len(low[group]), replacement=True, generator=generator)
        # A member drawn twice would repeat its y: one Metropolis step from the same proposal, always taken for k = 1.
        old, (fresh, weight) = y[chosen], truncated(root[chosen], *bounds, generator)
        u = torch.rand(len(chosen), dtype=old.dtype, device=old.device, generator=generator)
        rows.append(complete(chosen, torch.where((u.log() <= weight - wish[chosen])[:, None], fresh, old)))
    return torch.cat(rows)


def _same(low: Tensor, high: Tensor) -> bool:
    return bool((low == low[:1]).all() and (high == high[:1]).all())


def truncated(root: Tensor, low: Tensor, high: Tensor, generator) -> tuple[Tensor, Tensor]:
    """y ~ N(0, root root') within bounds (k,), one for each root (P, k, k), and the log of its weight (P,)."""
    e, y, log_weights = torch.zeros_like(root[:, 0]), torch.zeros_like(root[:, 0]), 0.0
    for r in range(root.shape[1]):
        mean, size = (root[:, r, :r] * e[:, :r]).sum(1), root[:, r, r]
        a, b = (low[r] - mean) / size, (high[r] - mean) / size
        if low[r] == high[r]:
            e[:, r], log_weights = a, log_weights - 0.5 * a.square() - size.log()
        else:
            flip = a > 0  # in the lower tail probabilities keep their digits
            a, b = torch.where(flip, -b, a), torch.where(flip, -a, b)
            start, share = (
                torch.special.ndtr(a),
                (torch.special.ndtr(b) - torch.special.ndtr(a)).clamp(min=1e-300),
            )
            u = torch.rand(len(a), dtype=a.dtype, device=a.device, generator=generator)
            inside = torch.special.ndtri(start + u * share).clamp(a, b)
            e[:, r], log_weights = torch.where(flip, -inside, inside), log_weights + share.log()
        y[:, r] = mean + size * e[:, r]
    return y, log_weights
