"""Scenarios against rows that the generator never saw: one report, or one table over generators."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from finediff.validation.cvm import CvMResult
from finediff.validation.floor import Floor, from_badness
from finediff.validation.inputs import generator, panels, plain, subset

FLOOR_ROW = "real vs real (floor)"
_MAIN = ["cvm_mean_p", "cvm_rejection_rate", "sd_ratio", "kurtosis_ratio", "q1_error", "correlation_error"]
_MAIN += ["energy_distance", "c2st_auc", "nn_ratio", "memorised_fraction"]


@dataclass(frozen=True, eq=False)
class ValidationReport:
    """Every metric of a set of scenarios beside its real-vs-real floor.

    Attributes
    ----------
    verdict : str
        One plain sentence.
    within_floor : bool
        No judged metric lies beyond its bound: the scenarios are not told apart from real rows. Of real rows in
        the place of scenarios 95 % are within.
    p_value : float
        (1 + random splits of real rows whose furthest metric lies as far out) / (1 + splits); within_floor is
        p_value > 5 %.
    table : DataFrame
        See `to_frame`.
    cvm : CvMResult
    settings : dict
        Sizes, counts and seed of the run.
    """

    verdict: str
    within_floor: bool
    p_value: float
    table: pd.DataFrame
    cvm: CvMResult
    settings: dict

    def to_frame(self) -> pd.DataFrame:
        """Metrics by ``scenarios``, ``floor``, ``floor_high``, ``verdict``, ``excess``.

        ``floor`` is the value of real rows in the place of scenarios: the training rows where they were
        given, the mean over random splits otherwise. ``floor_high`` is a joint bound: in 95 % of random splits
        of real rows no metric lies beyond its own. Where the training rows themselves lie beyond it, all bounds
        are moved out by as much as the training rows exceed the mean of the splits. A ratio is within its floor
        between 1/floor_high and floor_high, ``cvm_mean_p`` above floor_high, all else below. ``excess`` is the
        distance in units of the bound: 0 is typical of real rows, above 1 is beyond; NaN where not judged.
        """
        return self.table.copy()

    def to_dict(self) -> dict:
        """Plain numbers, strings and lists, for JSON; NaN and infinity become None."""
        return {
            "verdict": self.verdict,
            "within_floor": self.within_floor,
            "p_value": plain(self.p_value),
            "metrics": {
                name: {key: plain(value) for key, value in row.items()}
                for name, row in self.table.to_dict("index").items()
            },
            "cvm": self.cvm.to_dict(),
            "settings": {key: plain(value) for key, value in self.settings.items()},
        }


@dataclass(frozen=True, eq=False)
class Comparison:
    """Generators judged by one floor.

    Attributes
    ----------
    table : DataFrame
        As `compare` returns it.
    reports : dict
        From a generator's name to its ValidationReport.
    excess : DataFrame (generators, metrics)
        Distances in units of the bounds, `FLOOR_ROW` last; see `ValidationReport.to_frame`.
    """

    table: pd.DataFrame
    reports: dict[str, ValidationReport]
    excess: pd.DataFrame


def validate(
    real, synthetic, train=None, *, n_portfolios=200, n_null=200, max_rows=5000, random_state=0
) -> ValidationReport:
    """Judge scenarios against rows that the generator never saw.

    Parameters
    ----------
    real : array or DataFrame (n, d)
        Simple returns per period that the generator never saw. Testing on training rows rewards copies.
    synthetic : array or DataFrame (m, d)
        Scenarios; frames must carry the same columns in the same order.
    train : array or DataFrame (t, d), optional
        The generator's training rows. They give the floor (training rows in the place of scenarios) and the
        memorisation metrics. Without them the floor comes from random halves of `real`.
    n_portfolios : int
        Random portfolios of the Cramer-von Mises test.
    n_null : int
        Random splits of real rows behind every bound, at least 20.
    max_rows : int
        Rows used of each sample, drawn at random from more.
    random_state : None, int, RandomState or Generator
        Seed of everything that is drawn.

    Raises
    ------
    ValueError
        On non-finite values (naming the column), columns that disagree, an asset that never moves, fewer than
        20 rows on either side of a comparison, n_null < 20, or held-out rows that stand in `train`.

    Notes
    -----
    Scenario and floor numbers use equally many rows: errors shrink with size, and unequal sizes would flatter
    one side. More scenarios than real rows are compared in 8 random subsets and averaged. The
    size of 5 % is that of splits; fresh real rows were told apart in 4 % of 50 cases on 20 US shares (1,400 rows
    a side), in 7 % of 120 cases on a simulated t law (5 degrees of freedom, 300 rows), and in 16 % with 120 rows,
    because so few heavy-tailed rows know little of their own tails. Bounds assume that rows are exchangeable between splits;
    volatility clusters make a split in time differ by more than that, and the verdict says so. The portfolio metrics hold money weights and so depend on the scale of assets;
    the others do not change when an asset is rescaled.
    """
    judged = judge(
        real,
        {"": synthetic},
        train,
        n_portfolios=n_portfolios,
        n_null=n_null,
        max_rows=max_rows,
        random_state=random_state,
    )
    return judged.reports[""]


def compare(
    real, synthetics, train=None, *, n_portfolios=200, n_null=200, max_rows=5000, random_state=0
) -> pd.DataFrame:
    """One row per generator and a last row for real against real: the table of `judge`.

    Parameters and errors are those of `judge`.

    Returns
    -------
    DataFrame
        Ten main metrics of `validate`; ``beyond``: how many of all metrics lie beyond their joint bounds;
        ``furthest``, ``furthest_metric``: the largest distance in units of its bound, and whose it is;
        ``p_value``; ``verdict``: "beyond floor" where ``beyond`` > 0 (furthest > 1, p_value <= 5 %: the same),
        "within floor" otherwise. The last row, `FLOOR_ROW`, has the training rows in the place of scenarios,
        before any bound is moved for them, and the verdict "floor".
    """
    judged = judge(
        real,
        synthetics,
        train,
        n_portfolios=n_portfolios,
        n_null=n_null,
        max_rows=max_rows,
        random_state=random_state,
    )
    return judged.table


def judge(
    real, synthetics, train=None, *, n_portfolios=200, n_null=200, max_rows=5000, random_state=0
) -> Comparison:
    """The table of `compare` and every generator's report, from one floor.

    Parameters
    ----------
    real, train, n_portfolios, n_null, max_rows, random_state
        As in `validate`.
    synthetics : mapping from a generator's name to its scenarios (m_i, d)
        All are compared at the size of the smallest.

    Raises
    ------
    ValueError
        As `validate`; also without any generator.
    """
    if not synthetics:
        raise ValueError(
            "expected at least one generator, got none, because there is nothing to compare: pass a dict"
        )
    if n_null < 20:
        raise ValueError(
            f"expected n_null >= 20, got {n_null}, because a 95 % bound needs one split in twenty beyond it, "
            "do pass 200"
        )
    rng = generator(random_state)
    seed = int(rng.integers(2**63))
    samples = {}
    for name, synthetic in synthetics.items():
        x, y, t = panels(real, synthetic, train)
        samples[name] = subset(y, max_rows, np.random.default_rng(seed))
    x = subset(x, max_rows, rng)
    floor = Floor(x, t, min(map(len, samples.values())), n_portfolios, n_null, rng)
    settings = {
        "n_portfolios": n_portfolios,
        "n_null": n_null,
        "max_rows": max_rows,
        "random_state": random_state if isinstance(random_state, int) else None,
    }
    reports, rows = {}, {}
    for name, y in samples.items():
        given = [len(real), len(synthetics[name]), 0 if train is None else len(train)]
        report = reports[name] = _report(floor, y, settings | {"rows_given": given})
        excess = report.table["excess"]
        rows[name] = report.table["scenarios"][_MAIN].to_dict() | {
            "beyond": int((excess > 1).sum()),
            "furthest": float(excess.max()),
            "furthest_metric": excess.idxmax(),
            "p_value": report.p_value,
            "verdict": "within floor" if report.within_floor else "beyond floor",
        }
    own = floor.excess(floor.values)
    unmoved = own if floor.own_excess is None else floor.own_excess
    rows[FLOOR_ROW] = floor.values[_MAIN].to_dict() | {
        "beyond": int((unmoved > 1).sum()),
        "furthest": float(unmoved.max()),
        "furthest_metric": unmoved.idxmax(),
        "p_value": floor.own_p,
        "verdict": "floor",
    }
    excess = pd.DataFrame(
        {name: report.table["excess"] for name, report in reports.items()} | {FLOOR_ROW: own}
    ).T
    return Comparison(pd.DataFrame.from_dict(rows, orient="index"), reports, excess)


def _report(floor: Floor, y: np.ndarray, settings: dict) -> ValidationReport:
    values, result = floor.measure(y)
    excess = floor.excess(values)
    beyond, p = excess > 1, floor.p_value(excess)
    label = pd.Series("not judged", index=values.index, dtype=object)
    label[excess.notna()] = "within floor"
    label[beyond] = "beyond floor"
    within = not beyond.any()
    judged, far = int(excess.notna().sum()), excess.max()
    furthest = (
        f"{excess.idxmax()} at {far:.2f} times its bound"
        if np.isfinite(far)
        else f"{excess.idxmax()}, off the scale"
    )
    verdict = (
        f"{'Within' if within else 'Beyond'} the real-vs-real floor (p = {p:.3f}): {int(beyond.sum())} of {judged} "
        f"metrics lie beyond bounds that real rows keep together in 95 % of cases, furthest {furthest}"
    )
    if beyond["memorised_fraction"]:
        verdict += "; scenarios repeat training rows"
    if floor.train_differs:
        verdict += (
            f"; the training rows themselves differ from the real rows by more than chance ({int((floor.own_excess > 1).sum())} metrics "
            "beyond), and the bounds are moved out by as much"
        )
    table = pd.DataFrame(
        {
            "scenarios": values,
            "floor": floor.values,
            "floor_high": from_badness(floor.high),
            "verdict": label,
            "excess": excess,
        }
    )
    settings = settings | {
        "rows_real": floor.n,
        "rows_synthetic": floor.m,
        "bounds_moved": floor.train_differs,
    }
    return ValidationReport(verdict + ".", within, p, table, result, settings)
