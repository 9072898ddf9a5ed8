"""One plain sentence per section, each resting on numbers that the section shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finediff.report.metrics import copiers, named, ranking, times
from finediff.report.walk import ENSEMBLE, EQUAL, MONTH, NONLINEAR, QUARTER, SAMPLE, against, generator_of
from finediff.validation import FLOOR_ROW
from finediff.validation.tails import lies_beyond

MATCHED = "sample + matched diagonal"  # row of the covariance table
_CHANCE = 1.96  # |t| below: no more than chance
_FACTOR = 1.5  # an interval of a ratio that reaches further from 1 says nothing
_POOR_RATE = 0.25  # share of portfolios rejected above which scenarios that are told apart are poor
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
    rate = table.loc["cvm_rejection_rate", "scenarios"]
    text = (
        f"On rows it never saw, {study.generator_name}'s median asset has {table.loc['sd_ratio', 'scenarios']:.2f} times the real "
        f"volatility, and {_percent(rate)} of random portfolios are rejected by "
        f"Cramér–von Mises (real rows: {_percent(table.loc['cvm_rejection_rate', 'floor'])}). {_judged(here, 'at random')}; "
        f"{_lower(_judged(later, 'in time order'))}."
    )
    if len(study.held_out) < 500:
        text += f" {len(study.held_out)} held-out rows show large differences only."
    if here.within_floor and later.within_floor:
        return Verdict("good", text)
    return Verdict("poor" if not here.within_floor and rate > _POOR_RATE else "note", text)


def _judged(report, how: str) -> str:
    """Told apart from real rows or not on one split: the counts and the p-value of the tables, in words."""
    excess = report.table["excess"]
    count, judged = int((excess > 1).sum()), int(excess.notna().sum())
    far = excess.sort_values(ascending=False).index
    if not count:
        return (
            f"Split {how}, none of {judged} measures lies beyond the bounds that real rows keep (p = {report.p_value:.3f}; "
            f"furthest: {named(far[0])}, {times(excess.max())} times its bound): they are not told apart from real rows"
        )
    names = ", ".join(named(key) for key in far[: min(count, 3)])
    moved = ", moved out as the training rows differ too" if report.settings["bounds_moved"] else ""
    return (
        f"Split {how}, {count} of {judged} measures {'lies' if count == 1 else 'lie'} beyond the bounds that real rows keep"
        f"{moved} (p = {report.p_value:.3f}; {'furthest: ' if count > 1 else ''}{names}): they are told apart from real rows"
    )


def _dependence(study) -> Verdict:
    table = study.splits["random"].report.table
    if not np.isfinite(table.loc["correlation_error", "scenarios"]):
        return Verdict("note", "The panel has one asset: there is no dependence to judge.")
    error, floor = table.loc["correlation_error", "scenarios"], table.loc["correlation_error", "floor"]
    ties = ["correlation_error", "correlation_max_error", "correlation_frobenius"]
    beyond = [named(key) for key in ties if table.loc[key, "verdict"] == "beyond floor"]
    text = (
        f"Split at random, correlations miss the held-out ones by {error:.3f} on average, where the training rows themselves "
        f"miss them by {floor:.3f} ({'beyond the bound: ' + _list(beyond) if beyond else 'within the bounds'}); "
    )
    ratio, deviation = table.loc["tail_dependence_ratio", "scenarios"], study.crash_error
    if not (np.isfinite(deviation) and ratio > 0):
        return Verdict("note", f"{text}there are too few joint crashes to compare.")
    low, high = ratio * np.exp(-_CHANCE * deviation), ratio * np.exp(_CHANCE * deviation)
    wide = low < 1 / _FACTOR or high > _FACTOR
    text += f"assets crash together {ratio:.2f} times as often as they really do (95 % interval {low:.2f} to {high:.2f}): "
    if high < 1 or low > 1:
        text += f"too {'few' if high < 1 else 'many'} joint crashes"
        if table.loc["tail_dependence_ratio", "verdict"] == "within floor":
            text += ", by this interval, though not beyond the wider bound that all measures share"
        return Verdict("poor" if high < 1 / _FACTOR or low > _FACTOR else "note", text + ".")
    if wide:
        text += "the interval holds 1, but is too wide to say that it is right."
    else:
        text += "no more than chance."
    return Verdict("note" if wide or beyond else "good", text)


def _covariance(study) -> Verdict:
    table = study.covariance_table.drop(index="held-out rows", errors="ignore")
    volatility = table["held-out volatility of its minimum-variance portfolio (%)"]
    ours, best = volatility["scenarios"], volatility.idxmin()
    named = [name for name in dict.fromkeys((best, "sample", NONLINEAR, MATCHED)) if name != "scenarios"]
    others = ", ".join(
        f"{'lowest, ' if name == best else ''}{name} {volatility[name]:.2f} %" for name in named
    )
    text = (
        "Volatility a year, on the rows held out at random, of the unconstrained minimum-variance portfolio: covariance of the "
        f"scenarios {ours:.2f} %{' (the lowest)' if best == 'scenarios' else ''}; {others}. Condition number "
        f"{table.loc['scenarios', 'condition number']:.0f} (sample {table.loc['sample', 'condition number']:.0f}); a smaller one is "
        "not by itself better. One split decides nothing between figures this near; the walk-forward tests them."
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
    test = study.tail_test
    if test is None:
        return Verdict("note", "There are too few held-out rows to measure a tail.")
    figures, total = len(test.figures), 2 * len(test.figures) + 2
    said, understated, poor = [], False, False
    for short, name in (("VaR", "value at risk"), ("ES", "expected shortfall")):
        gap, low, high, below = test.together.loc[short, ["gap", "low", "high", "understated"]]
        sign = "understated" if gap < 0 else "overstated"
        same = int(below) if gap < 0 else figures - int(below)
        all_below = below == figures
        missed = bool(lies_beyond(gap, low, high) and gap < low)
        poor, understated = poor or missed, understated or missed or bool(all_below)
        said.append(
            f"{name} is {sign} by {_percent(abs(gap), 1)} in sum and in {'all' if same == figures else f'{same} of'} "
            f"{figures} figures ({'more than chance' if lies_beyond(gap, low, high) else 'chance'} gives "
            f"{_range(low, high)})"
        )
    text = f"Split at random, {'; '.join(said)}. "
    if test.outside:
        text += f"{test.outside} of {total} numbers lie outside the bounds of chance between real rows of these sizes (p = {test.p_value:.3f})"
        text += _furthest_figure(test)
    else:
        text += f"None of the {total} numbers lies outside the bounds of chance between real rows of these sizes (p = {test.p_value:.3f})"
        text += ", yet a side that all figures share is to be kept in mind" if understated else ""
    status = "poor" if poor else "note" if test.outside or understated else "good"
    return Verdict(status, text + ".")


def _furthest_figure(test) -> str:
    """The largest gap of a single figure outside its bounds, in words."""
    found = []
    for short in ("VaR", "ES"):
        for (label, level), row in test.figures.iterrows():
            gap = row[f"{short} gap"]
            if lies_beyond(gap, row[f"{short} low"], row[f"{short} high"]):
                found.append((abs(gap), f"{short} of {label} at {_percent(level)}: {_plus(gap)}"))
    return f", of single figures the largest gap is {max(found)[1]}" if found else ""


def _plus(gap: float) -> str:
    return f"{'+' if gap > 0 else '−'}{_percent(abs(gap), 1)}"


def _range(low: float, high: float) -> str:
    return f"{_plus(low)} to {_plus(high)}"


def _generators(study) -> Verdict:
    split = study.splits["random"]
    table, copies = split.table.drop(index=FLOOR_ROW), copiers(split)
    order = [name for name in ranking(split) if name not in copies]
    passed = [name for name in order if not table.loc[name, "beyond"]]
    text = f"Split at random, of {len(order)} generators{' that do not copy rows' * bool(copies)}, "
    if passed:
        text += f"{len(passed)} {'is' if len(passed) == 1 else 'are'} not told apart from real rows ({', '.join(passed)})"
    else:
        text += "none passes: all are told apart from real rows"
    ours = table.loc[study.generator_name]
    if study.generator_name in order:
        place = order.index(study.generator_name) + 1
        text += f"; {study.generator_name} comes {_ordinal(place)} by its furthest measure ("
    else:
        place = 0
        text += f"; {study.generator_name} copies rows and is not ranked (furthest measure "
    text += f"{named(ours['furthest_metric'])}, {times(ours['furthest'])} times its bound, p = {ours['p_value']:.3f})"
    if place > 1:
        best = table.loc[order[0]]
        text += f", {order[0]} first ({named(best['furthest_metric'])}, {times(best['furthest'])})"
    later = study.splits["chronological"].table
    lasting = [name for name in order if not later.loc[name, "beyond"]]
    text += f". Split in time order, {_list(lasting) if lasting else 'none'} {'is' if len(lasting) < 2 else 'are'} not told apart."
    if copies:
        text += (
            f" {_capital(', '.join(copies))} {'repeats' if len(copies) == 1 else 'repeat'} training rows: what they repeat "
            "is not new."
        )
    if not place:
        return Verdict("poor", text)
    lasts = study.generator_name in lasting or not lasting
    return Verdict("good" if place == 1 and passed and lasts else "note", text)


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
