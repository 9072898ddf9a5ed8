"""Are the tails of portfolios, and crashes that assets share, those of rows the generator never saw?

With VaR and ES at level a of portfolio p, on n real rows and m scenarios fitted to t training rows,

    D_k = scenarios' loss - real loss, k = (measure, portfolio, level);   D_measure = sum of its D_k
    z_k = (D_k - median D_k)/(95 % quantile - median) above the median, /(median - 5 % quantile) below

over chance: the n + t real rows split at random into n and t, and m draws with replacement from the t in the place
of scenarios. It holds the errors of the held-out rows, of the training rows, which no generator can undo, and of m
draws (small beside them where m exceeds t); exact for scenarios that are such draws, however heavy the tails and
however much the portfolios share.
Without training rows the two panels are shuffled: exact under one law. c is the 95 % quantile of max_k |z_k|: in
95 % of splits all figures and both sums are within median -+ c (distance to the quantile, at least one standard
deviation). The sums see what is systematic and small in each figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from finediff.risk.measures import rank
from finediff.validation.inputs import generator, panels
from finediff.validation.metrics import tail_dependence

_SIZE = 0.05
_LEAST = 1.0  # standard deviations, least distance to a quantile: coarse returns pile gaps up on one value
MEASURES = ("VaR", "ES")


@dataclass(frozen=True, eq=False)
class TailTest:
    """Gaps of tail figures beside what chance gives.

    Attributes
    ----------
    figures : DataFrame
        Index (portfolio, level); columns "VaR gap", "VaR low", "VaR high", "ES gap", "ES low", "ES high": the
        scenarios' loss less the real one, and its joint bounds, as fractions of the real loss. Negative: the
        scenarios understate the loss.
    together : DataFrame
        Index "VaR", "ES"; columns "gap", "low", "high": of the sum over all figures, as fractions of the sum of
        the real losses; "understated": how many figures have a negative gap.
    p_value : float
        (1 + splits whose furthest number lies as far out) / (1 + splits): at most 5 % where, and only where,
        a number lies outside its bounds. A number that no split moves has bounds that coincide, and is left out.
    """

    figures: pd.DataFrame
    together: pd.DataFrame
    p_value: float

    @property
    def outside(self) -> int:
        """How many figures and sums lie outside their bounds."""
        parts = [
            self.together,
            *(self.figures[[f"{m} {k}" for k in ("gap", "low", "high")]] for m in MEASURES),
        ]
        return int(sum(lies_beyond(*part.iloc[:, :3].to_numpy().T).sum() for part in parts))


def tail_test(
    real,
    scenarios,
    portfolios: Mapping[str, Sequence[float]],
    levels: Sequence[float] = (0.01, 0.05),
    *,
    train=None,
    n_null: int = 1000,
    random_state=0,
) -> TailTest:
    """Value at risk and expected shortfall of portfolios: scenarios against real rows, all figures jointly.

    Parameters
    ----------
    real, scenarios : array or DataFrame (n, d), (m, d)
        Simple returns that the generator never saw, and scenarios.
    portfolios : mapping of name to weights (d,)
        Finite, not all zero. A Series is matched to the columns of a DataFrame by name.
    levels : sequence of float
        Probabilities of the lower tail; at least one row of either panel beyond each.
    train : array or DataFrame (t, d), optional
        Rows the scenarios were fitted to. Without them the scenarios are taken for draws of the true law: those of
        a fitted generator then lie outside in far more than 5 % of cases.
    n_null : int
        Splits, at least 20.
    random_state : None, int, RandomState or Generator
        Seed of the splits.

    Raises
    ------
    ValueError
        On non-finite values, columns that disagree, no portfolio or level, weights that are not d finite numbers
        or all zero, a level beyond the worst row, n_null < 20.

    Notes
    -----
    Splits take rows as exchangeable, which those of a random split are; losses that cluster make later
    rows differ by more than that. Where returns come in coarse ticks, a VaR may be the same in all splits: it is
    then not judged; smooth scenarios differ from such returns by up to half a tick, which counts.
    """
    x, y, z = panels(real, scenarios, train)
    if not portfolios or not len(levels) or n_null < 20:
        raise ValueError(
            f"expected portfolios, levels and n_null >= 20, got {len(portfolios)}, {len(levels)} and {n_null}, because "
            "a joint bound needs figures and one split in twenty beyond it: give more"
        )
    names = getattr(real, "columns", None)
    w = np.column_stack([_weights(name, given, names, x.shape[1]) for name, given in portfolios.items()])
    index = pd.MultiIndex.from_product([list(portfolios), list(levels)], names=["portfolio", "level"])
    k = len(index)
    observed = np.stack([_losses(rows @ w, levels) for rows in (x, y)])  # side, measure, figure
    null = _chance(
        x @ w, (y if z is None else z) @ w, len(y), levels, n_null, generator(random_state), z is None
    )
    losses = np.concatenate([observed[:, None], null], axis=1)  # side, 1 + split, measure, figure
    gaps = losses[1] - losses[0]
    numbers = np.concatenate([gaps.reshape(-1, 2 * k), gaps.sum(axis=2)], axis=1)  # (1 + n_null, 2 k + 2)
    # Scales of all, the observed among them: every row of numbers has the same chance to lie furthest out.
    middle, low, high = (np.quantile(numbers, q, axis=0) for q in (0.5, 0.05, 0.95))
    deviation = numbers[1:].std(axis=0)
    # Rounding alone: nothing that chance could spread.
    moves = deviation > 1e-9 * np.append(np.abs(observed[0]).ravel(), np.abs(observed[0]).sum(axis=1))
    below, above = (
        np.where(moves, np.maximum(spread, _LEAST * deviation), 0.0)
        for spread in (middle - low, high - middle)
    )
    off = (numbers - middle)[:, moves]
    furthest = np.maximum(off / above[moves], -off / below[moves]).max(axis=1, initial=0.0)
    # A gap that ties with the bound is within it, whatever rounding says.
    c = np.sort(furthest[1:])[-int(_SIZE * (n_null + 1))] * (1 + 1e-9)
    bounds = np.stack([numbers[0], middle - c * below, middle + c * above])
    scaled = {}
    for i, measure in enumerate(MEASURES):
        part = bounds[:, i * k : (i + 1) * k] / np.abs(observed[0, i])
        scaled |= {f"{measure} {name}": row for name, row in zip(("gap", "low", "high"), part)}
    together = pd.DataFrame(
        (bounds[:, 2 * k :] / np.abs(observed[0].sum(axis=1))).T,
        index=list(MEASURES),
        columns=["gap", "low", "high"],
    )
    together["understated"] = (gaps[0] < 0).sum(axis=1)
    p_value = float((1 + (furthest[1:] >= furthest[0]).sum()) / (1 + n_null))
    return TailTest(pd.DataFrame(scaled, index=index), together, p_value)


def lies_beyond(gap, low, high):
    """Does a gap lie outside its bounds? Bounds that coincide know no chance and judge nothing."""
    return (low < high) & ((gap < low) | (gap > high))


def _weights(name, given, names, d: int) -> np.ndarray:
    """Weights (d,) in the order of the columns `names` (None: as they come)."""
    if isinstance(given, pd.Series) and names is not None:
        missing = [label for label in names if label not in given.index]
        if missing or len(given) != d:
            told = f"none for {missing[0]!r}" if missing else f"{len(given)} weights"
            raise ValueError(
                f"expected one weight for each of the {d} assets in portfolio {name!r}, got {told}, because weights are matched "
                "by name: reindex them to the columns of real, with 0 for an asset that is not held"
            )
        given = given[names]
    w = np.asarray(given, dtype=float)
    if w.shape != (d,) or not np.isfinite(w).all() or not w.any():
        got = (
            f"shape {w.shape}"
            if w.shape != (d,)
            else "zeros only"
            if np.isfinite(w).all()
            else "NaN or infinity"
        )
        raise ValueError(
            f"expected {d} finite weights, not all zero, in portfolio {name!r}, got {got}, because it has no loss to "
            "compare: mend or drop that portfolio"
        )
    return w


def _chance(real, other, m: int, levels, n_null: int, rng, shuffled: bool) -> np.ndarray:
    """Losses (2 sides, n_null, 2 measures, figures) under chance, from returns (n, P), (t, P) of P portfolios.

    shuffled: the second side is all rows that are not in the first; otherwise m draws from them.
    """
    pool = np.concatenate([real, other])
    order = np.argsort(pool, axis=0, kind="stable").T
    ordered = np.take_along_axis(pool.T, order, axis=1)
    n, total = len(real), len(pool)
    out = np.empty((2, n_null, 2, len(order) * len(levels)))
    for s in range(n_null):
        rows = rng.permutation(total)
        drawn = rows[n:] if shuffled else rows[n + rng.integers(total - n, size=m)]
        for side, chosen in enumerate((rows[:n], drawn)):
            count = np.bincount(chosen, minlength=total)
            parts = [_counted(returns, count[at], levels) for returns, at in zip(ordered, order)]
            out[side, s] = np.concatenate(parts, axis=1)
    return out


def _losses(returns: np.ndarray, levels) -> np.ndarray:
    """VaR and ES (2, P levels), as `finediff.risk` has them, of returns (n, P)."""
    each = np.ones(len(returns), dtype=int)
    return np.concatenate([_counted(column, each, levels) for column in np.sort(returns, axis=0).T], axis=1)


def _counted(ordered: np.ndarray, count: np.ndarray, levels) -> np.ndarray:
    """VaR and ES (2, levels) of returns sorted upwards, of which each stands `count` times."""
    held = np.cumsum(count)
    out = np.empty((2, len(levels)))
    for j, level in enumerate(levels):
        na, k = rank(int(held[-1]), level)
        at = int(np.searchsorted(held, k))
        left = na - (held[at - 1] if at else 0)  # of the row that holds the quantile
        out[:, j] = -ordered[at], -(ordered[:at] @ count[:at] + left * ordered[at]) / na
    return out


def joint_crashes(real, scenarios, *, train=None, n_boot: int = 200, random_state=0) -> float:
    """Standard error of log(tail dependence of the scenarios / tail dependence of the real rows).

    With training rows: root mean square of the log ratio between two parts of all real rows, of the sizes of
    training and held-out rows, dealt in blocks of n^(1/3) neighbours, so that crashes in a row count as one
    event; its mean, which is not quite 0 in parts of unlike sizes, is an error too. Without them: real rows drawn
    again in such (circular) blocks. Either is joined by the error of scenarios, drawn again one by one.

    Parameters
    ----------
    real, scenarios : array or DataFrame (n, d), (m, d)
        As for `finediff.validation.lower_tail_dependence`.
    train : array or DataFrame (t, d), optional
        Rows the scenarios were fitted to. Without them the scenarios are taken for draws of the true law, and the
        error is too small for a fitted generator.
    n_boot : int
        Bootstrap samples, or deals, at least 20.
    random_state : None, int, RandomState or Generator
        Seed.

    Returns
    -------
    float
        NaN for fewer than 50 rows or 2 assets, or where no two assets ever crash together.

    Raises
    ------
    ValueError
        On non-finite values, columns that disagree, n_boot < 20.

    References
    ----------
    H. R. Kuensch, "The jackknife and the bootstrap for general stationary observations" (1989).
    """
    x, y, z = panels(real, scenarios, train)
    if n_boot < 20:
        raise ValueError(f"expected n_boot >= 20, got {n_boot}, because fewer give no error: pass 200")
    if x.shape[1] < 2 or min(len(rows) for rows in (x, y, z) if rows is not None) < 50:
        return float("nan")
    rng = generator(random_state)
    length = int(np.ceil(len(x) ** (1 / 3)))
    with np.errstate(divide="ignore", invalid="ignore"):
        if z is None:
            chance = _redrawn(x, length, n_boot, rng).var(ddof=1)
        else:
            blocks = [b for rows in (x, z) for b in np.array_split(rows, -(-len(rows) // length))]
            deals = (np.vstack([blocks[i] for i in rng.permutation(len(blocks))]) for _ in range(n_boot))
            logs = [np.log([tail_dependence(part.T) for part in (d[: len(x)], d[len(x) :])]) for d in deals]
            chance = np.mean(np.diff(logs) ** 2)
        error = float(np.sqrt(chance + _redrawn(y, 1, n_boot, rng).var(ddof=1)))
    return error if np.isfinite(error) else float("nan")


def _redrawn(rows: np.ndarray, length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Logs (count,) of the tail dependence of rows drawn again in circular blocks of `length`."""
    n = len(rows)
    starts = rng.integers(n, size=(count, -(-n // length), 1))
    drawn = ((starts + np.arange(length)) % n).reshape(count, -1)[:, :n]
    return np.log([tail_dependence(rows[index].T) for index in drawn])
