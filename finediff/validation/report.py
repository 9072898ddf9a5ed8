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
        Are the scenarios, over all judged metrics together, no further from the real rows than chance allows?
    p_value : float
        Fraction of random splits of real rows whose furthest metric lies as far out.
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
        """Metrics by ``scenarios``, ``floor``, ``floor_high``, ``verdict``.

        ``floor`` is the value of real rows in the place of scenarios: the training rows where they were
        given, the mean over random splits otherwise. ``floor_high`` is the 95 % bound over random splits,
        moved out by as much as the training rows themselves exceed the mean of the splits; a ratio is within
        its floor between 1/floor_high and floor_high, ``cvm_mean_p`` above floor_high, all else below.
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
    """

    table: pd.DataFrame
    reports: dict[str, ValidationReport]


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
    one side. More scenarios than real rows are compared in 8 random subsets and averaged. Bounds assume that
    rows are exchangeable between splits; volatility clusters make a split in time differ by more than that,
    and the verdict says so. The portfolio metrics hold money weights and so depend on the scale of assets;
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
        Ten main metrics of `validate`, ``beyond`` (how many of all metrics lie outside their 95 % bound)
        and ``verdict`` ("within floor", "beyond floor"; "floor" in the last row, `FLOOR_ROW`).
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
        rows[name] = report.table["scenarios"][_MAIN].to_dict()
        rows[name]["beyond"] = int((report.table["verdict"] == "beyond floor").sum())
        rows[name]["verdict"] = "within floor" if report.within_floor else "beyond floor"
    own = {"beyond": int(floor.beyond(floor.values).sum()), "verdict": "floor"}
    rows[FLOOR_ROW] = floor.values[_MAIN].to_dict() | own
    return Comparison(pd.DataFrame.from_dict(rows, orient="index"), reports)


def _report(floor: Floor, y: np.ndarray, settings: dict) -> ValidationReport:
    values, result = floor.measure(y)
    z, beyond = floor.excess(values), floor.beyond(values)
    label = pd.Series("not judged", index=values.index, dtype=object)
    label[z.notna()] = "within floor"
    label[beyond] = "beyond floor"
    worst = float(z.max())
    within = worst <= floor.threshold
    p = float((1 + (floor.furthest >= worst).sum()) / (1 + len(floor.furthest)))
    count = f"{int(beyond.sum())} of {int(z.notna().sum())} metrics lie outside their 95 % bound"
    if within:
        verdict = f"Within the real-vs-real floor: {count}, as chance allows (p = {p:.3f})"
    else:
        top = ", ".join(z[beyond].sort_values(ascending=False).index[:3])
        verdict = f"Beyond the real-vs-real floor (p = {p:.3f}): {count}, furthest {top}"
    if beyond["memorised_fraction"]:
        verdict += "; scenarios repeat training rows"
    if floor.train_differs():
        verdict += "; the training rows themselves differ from the real rows by more than chance"
    table = pd.DataFrame(
        {"scenarios": values, "floor": floor.values, "floor_high": from_badness(floor.high), "verdict": label}
    )
    settings = settings | {"rows_real": floor.n, "rows_synthetic": floor.m}
    return ValidationReport(verdict + ".", bool(within), p, table, result, settings)
