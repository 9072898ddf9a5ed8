"""One plain sentence per section, each resting on numbers that the section shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from finediff.report.metrics import METRICS
from finediff.report.walk import ENSEMBLE, EQUAL, MONTH, NONLINEAR, QUARTER, SAMPLE, against, generator_of
from finediff.validation import FLOOR_ROW

MATCHED = "sample + matched diagonal"  # row of the covariance table
_CHANCE = 1.96  # |t| below: no more than chance
INDEPENDENT = (
    "These scenarios are independent in time: they describe one period ahead, without volatility clustering. "
    "Do not chain them into multi-day paths."
)


@dataclass(frozen=True)
class Verdict:
    """status: "good", "note" (read before use) or "poor"; text: one sentence."""

    status: str
    text: str


def verdicts(study) -> dict[str, Verdict]:
    """The sentences of a `finediff.report.study.Study`, by section."""
    return {
        "panel": _panel(study),
        **({"training": _training(study)} if study.histories else {}),
        "fit": _fit(study),
        "dependence": _dependence(study),
        "covariance": _covariance(study),
        "portfolio": _portfolio(study),
        **({} if study.walks.monthly is None else {"walk-forward": walk_verdict(study)}),
        "tail risk": _tail(study),
        "generators": _generators(study),
    }


def _panel(study) -> Verdict:
    found, n = study.findings, len(study.findings)
    if not found:
        return Verdict("good", f"The panel check found nothing wrong in {study.returns.size:,} returns.")
    things = "finding" if n == 1 else "findings"
    text = f"The panel check has {n} {things}, first: {found[0].message} What follows rests on {len(study.returns):,} rows."
    return Verdict("poor" if study.findings[0].severity == "error" and _kept(study) else "note", text)


def _kept(study) -> bool:
    """Is the first finding still in the returns that were used? Missing values were dealt with by the policy."""
    return study.findings[0].code != "missing_values"


def _training(study) -> Verdict:
    late = [
        name for name, h in study.histories.items() if h.stopped != "early" and h.best_step > 0.9 * h.step[-1]
    ]
    best = ", ".join(
        f"{name} at step {h.best_step:,} of {h.step[-1]:,}" for name, h in study.histories.items()
    )
    chosen = f"{study.generator_name}: {study.fit_summary}. " if study.fit_summary else ""
    if late:
        return Verdict(
            "note",
            f"{chosen}Best losses on the rows set aside: {best}. {_list(late)} still improved: try more steps.",
        )
    return Verdict("good", f"{chosen}The best loss on the rows set aside came before the end: {best}.")


def _fit(study) -> Verdict:
    here, later = study.splits["random"].report, study.splits["chronological"].report
    table = here.table
    text = (
        f"On rows it never saw, {study.generator_name}'s median asset has {table.loc['sd_ratio', 'scenarios']:.2f} times the real "
        f"volatility, and {_percent(table.loc['cvm_rejection_rate', 'scenarios'])} of random portfolios are told apart by "
        f"Cramér–von Mises (real rows: {_percent(table.loc['cvm_rejection_rate', 'floor'])}). {_judged(here, 'at random')}; "
        f"{_lower(_judged(later, 'in time order'))}."
    )
    if len(study.held_out) < 500:
        text += f" {len(study.held_out)} held-out rows show large differences only."
    if here.within_floor and later.within_floor:
        return Verdict("good", text)
    return Verdict("note" if table.loc["cvm_rejection_rate", "scenarios"] <= 0.25 else "poor", text)


def _judged(report, how: str) -> str:
    """Within or beyond the floor on one split, and by which metrics, in words."""
    beyond = report.table.index[report.table["verdict"] == "beyond floor"]
    names = [METRICS[key].label[0].lower() + METRICS[key].label[1:] for key in beyond]
    if report.within_floor:
        return f"Split {how}, they are as close to those rows as chance allows"
    return f"Split {how}, they differ by more than chance ({', '.join(names) or 'taken together'})"


def _dependence(study) -> Verdict:
    table = study.splits["random"].report.table
    error, floor = table.loc["correlation_error", "scenarios"], table.loc["correlation_error", "floor"]
    tail = table.loc["tail_dependence_ratio", "scenarios"]
    text = (
        f"Split at random, correlations miss the held-out ones by {error:.3f} on average, where the training rows themselves miss them by "
        f"{floor:.3f}; assets crash together {tail:.2f} times as often as they really do."
    )
    status = "good" if error <= floor + 0.02 and abs(np.log(max(tail, 1e-9))) < 0.25 else "note"
    return Verdict(status, text)


def _covariance(study) -> Verdict:
    table = study.covariance_table.drop(index="held-out rows", errors="ignore")
    volatility = table["held-out volatility of its minimum-variance portfolio (%)"]
    ours, best = volatility["scenarios"], volatility.idxmin()
    named = [name for name in dict.fromkeys((best, "sample", MATCHED)) if name != "scenarios"]
    others = ", ".join(
        f"{'lowest, ' if name == best else ''}{name} {volatility[name]:.2f} %" for name in named
    )
    text = (
        "Volatility a year, on the rows held out at random, of the unconstrained minimum-variance portfolio: covariance of the "
        f"scenarios {ours:.2f} %{' (the lowest)' if best == 'scenarios' else ''}; {others}. Condition number "
        f"{table.loc['scenarios', 'condition number']:.0f} (sample {table.loc['sample', 'condition number']:.0f}); a smaller one is "
        "not by itself better."
    )
    return Verdict("good" if ours <= volatility.min() * 1.02 else "note", text)


def walk_verdict(study) -> Verdict:
    """Which covariance won out of sample, and whether the generator's differs by more than chance."""
    monthly, quarterly = study.walks.monthly, study.walks.quarterly
    volatility = monthly.summary()["annual volatility"]
    best = volatility.idxmin()
    rival = SAMPLE if best == NONLINEAR else NONLINEAR
    t = against(monthly, rival).at[best, "t"]
    text = (
        f"Out of sample, re-estimated every {MONTH} rows, minimum variance was least volatile with {_named(best)}: "
        f"{_percent(volatility[best], 2)} a year, {_percent(volatility[rival], 2)} with {rival} (t = {_signed(t)}"
        f"{'' if abs(t) > _CHANCE else ', no more than chance'}), {_percent(volatility[EQUAL], 2)} with equal weights."
    )
    status = "good" if best != EQUAL else "note"
    if quarterly is None:
        return Verdict(status, text)
    ours, volatility = generator_of(quarterly), quarterly.summary()["annual volatility"]
    t = against(quarterly, ours)["t"]  # of the others: positive where they are more volatile
    beaten = [_named(name) for name in t.index if t[name] > _CHANCE]
    beating = [_named(name) for name in t.index if t[name] < -_CHANCE]
    figures = "; ".join(f"{name} {_percent(volatility[name], 2)}, t = {_signed(t[name])}" for name in t.index)
    if beaten and beating:
        said = f"It does better than {_list(beaten)} and worse than {_list(beating)}"
    elif len(beaten) == len(t):
        said = "It wins, by more than chance"
    elif beaten:
        said = f"It does better than {_list(beaten)}, and no differently from the other beyond chance"
    elif beating:
        said = f"It does not win: it is worse than {_list(beating)} by more than chance"
        said += "" if len(beating) == len(t) else ", and no differently from the other"
    elif volatility.idxmin() == ours:
        said = "It is lowest, by no more than chance"
    else:
        said = "It does not win, and differs by no more than chance"
    text += (
        f" At the last {len(quarterly.windows)} decisions {QUARTER} rows apart, {ours}'s covariance had "
        f"{_percent(volatility[ours], 2)} ({figures}). {said}."
    )
    return Verdict("note" if beating else status, text)


def _named(strategy: str) -> str:
    return f"the {strategy}" if strategy == ENSEMBLE else strategy


def _signed(t: float) -> str:
    return f"{t:.1f}".replace("-", "−") if np.isfinite(t) else "none"


def _portfolio(study) -> Verdict:
    weights = study.allocations["minimum variance"].weights
    held = weights[weights > 1e-6]
    text = (
        f"Long-only with a cap, minimum variance holds {len(held)} of {len(weights)} assets, the largest {weights.idxmax()} at {_percent(weights.max())}; "
        f"the effective number of positions is {1 / (weights**2).sum():.1f}. "
        + (
            "The maximum-Sharpe weights carry the estimation error of the mean returns."
            if "maximum Sharpe" in study.allocations
            else "No long-only portfolio within the cap has a positive mean return, so there is no maximum Sharpe one."
        )
    )
    return Verdict("note" if 1 / (weights**2).sum() < 5 else "good", text)


def _tail(study) -> Verdict:
    tail = study.tail
    gap = (tail["VaR scenarios"] - tail["VaR real"]) / tail["VaR real s.e."]
    outside = gap[gap.abs() > 2]
    label, level = gap.abs().idxmax()
    row = tail.loc[(label, level)]
    text = (
        f"Split at random, {len(gap) - len(outside)} of {len(gap)} value-at-risk figures of portfolios lie within two standard errors of the held-out "
        f"rows'; the furthest is {label} at {_percent(level)}: {_percent(row['VaR scenarios'], 2)} in the scenarios, {_percent(row['VaR real'], 2)} "
        f"(s.e. {_percent(row['VaR real s.e.'], 2)}) in reality."
    )
    if len(outside) and (outside < 0).any():
        return Verdict(
            "poor" if len(outside) > len(gap) / 2 else "note", text + " The scenarios understate risk there."
        )
    return Verdict("note" if len(outside) else "good", text)


def _generators(study) -> Verdict:
    table = study.splits["random"].table.drop(index=FLOOR_ROW)
    copies = table.index[table["memorised_fraction"] > 0.5]
    rivals = table.drop(index=copies)
    ours, order = rivals.loc[study.generator_name], rivals["energy_distance"].sort_values()
    place = int(order.index.get_loc(study.generator_name)) + 1
    text = (
        f"By energy distance to the held-out rows {study.generator_name} comes {_ordinal(place)} of {len(order)} generators that "
        f"do not copy rows (times 1,000: {1e3 * ours['energy_distance']:.2f}; best {order.index[0]} with "
        f"{1e3 * order.iloc[0]:.2f}, real rows {1e3 * _floor(study)['energy_distance']:.2f})."
    )
    if len(copies):
        text += (
            f" {_capital(_list(copies))} {'repeats' if len(copies) == 1 else 'repeat'} training rows: nothing in their "
            "scenarios is new."
        )
    return Verdict("good" if place == 1 else "note", text)


def _floor(study) -> pd.Series:
    return study.splits["random"].table.loc[FLOOR_ROW]


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _list(names) -> str:
    return " and ".join(names)


def _ordinal(place: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(place, f"{place}th")
