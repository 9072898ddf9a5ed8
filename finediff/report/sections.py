"""What each section of the report says: the sentence it opens with, its figures and their captions, its tables.

Every section is a function of the study alone and returns (lead, blocks); `SECTIONS` has them in the page's order.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from finediff.report import figures
from finediff.report.metrics import DOTS, JOINT, MARGINS, METRICS, ranking
from finediff.report.tables import (
    NONE,
    RULE,
    cell,
    day,
    floor_table,
    generator_table,
    number,
    per_cent,
    picture,
    span,
    table,
    words,
)
from finediff.report.verdicts import MATCHED
from finediff.report.walk import (
    ENSEMBLE,
    EQUAL,
    HISTORY,
    MONTH,
    N_SCENARIOS,
    NONLINEAR,
    QUARTER,
    RECENT,
    SAMPLE,
    against,
    generator_of,
)
from finediff.validation import FLOOR_ROW, qq_data
from finediff.validation.tails import lies_beyond

__all__ = ["SECTIONS"]


def _prose(text):
    return {"kind": "prose", "text": text}


def _panel(study):
    assets = ", ".join(map(str, study.returns.columns))
    blocks = [_prose(f"Assets, in the order of the panel: {assets}.")]
    if study.findings:
        rows = [
            [
                words(finding.severity.capitalize()),
                words(NONE if finding.column is None else finding.column),
                words(NONE if finding.date is None else day(finding.date)),
                words(f"{finding.message} {finding.remedy}"),
            ]
            for finding in study.findings
        ]
        title = "What the checks found. An error makes a fitted model wrong; a warning is to be judged by a person."
        blocks.append(table(title, ["Severity", "Asset", "First date", "Finding and remedy"], rows))
    else:
        blocks.append(_prose("The checks for missing, stale, misdated and mistyped values found nothing."))
    lead = f"{len(study.returns):,} rows of simple returns, {span(study.returns)}. All that follows rests on them."
    return lead, blocks


def _training(study):
    seen = {name: history for name, history in study.histories.items() if len(history.step)}
    solved = study.fit_summary or "estimated in one step"
    chosen = f"{study.generator_name} has no iterative training and no loss curve ({solved}). "
    if not seen:
        return chosen, []
    lead = (
        f"{'' if study.generator_name in seen else chosen}A diffusion network learns to take added noise out of real rows again. The loss on a tenth of the training "
        "rows, set aside for this purpose (not the rows of the judgement), shows "
        "how long it still learned something general, and where it would have begun to copy."
    )
    reasons = {
        "early": "stopped when the held-out loss no longer improved",
        "budget": "used all its steps",
    }
    ends = "; ".join(
        f"{name}: step {h.best_step:,} of {h.step[-1]:,} kept, {reasons.get(h.stopped, 'unfinished')}"
        for name, h in seen.items()
    )
    look = (
        "Look for a solid line (rows set aside) that falls and levels off. If it turns upwards, the weights "
        f"kept, at the dot, should lie before the turn. {ends}."
    )
    return lead, [picture(figures.loss_curves(seen), "Loss during training.", look)]


def _fit(study):
    lead = (
        "Does a single number drawn from the scenarios, an asset's return or a portfolio's, behave like one from "
        "rows that the generator never saw? "
        + RULE
        + " Good: not told apart on either split. Poor: told apart at random, "
        "with more than 25 % of the portfolios rejected. Note: all between."
    )
    portfolio = {name: split.qq for name, split in study.splits.items()}
    both = qq_data(study.held_out, study.scenarios, assets="all", n_points=100)
    which = "each asset"
    if study.returns.shape[1] > 24:
        which = "the 24 assets with the most quantiles outside their band"
    blocks = []
    if portfolio:
        blocks.append(
            picture(
                figures.qq_portfolio(portfolio),
                "Quantiles of the equal-weighted portfolio.",
                "Look for points inside the grey band, at the ends above all: points below the line on the left are "
                "losses that the scenarios make too large, points above it are losses made too small.",
            )
        )
    blocks += [
        picture(
            figures.tail_survival(study.train, study.held_out, study.scenarios),
            "How often a loss is exceeded, equal-weighted portfolio, logarithmic scale.",
            "Look for the blue line inside the grey band of the held-out rows; a line below it understates large "
            "losses. The Gaussian shows what thin tails would look like. Each curve ends at its worst period.",
        ),
        picture(
            figures.qq_assets(both),
            f"Quantiles of {which}, scenarios (upwards) against held-out rows.",
            "Look for a blue line that stays within the grey band; the number is the share of the quantiles that do.",
        ),
        *floor_table(study, MARGINS, "Single returns and portfolio returns"),
    ]
    return lead, blocks


def _dependence(study):
    lead = (
        "Diversification rests on how assets move together, in ordinary periods and in bad ones. The interval of the joint "
        "crashes is that of this ratio alone, from training and held-out rows dealt anew in blocks. Good: it holds 1, reaches no "
        "further than 1.5 times either way, and the correlations are within their bounds. Poor: it lies outside that range."
    )
    numbers = floor_table(study, JOINT, "Dependence, and nearness to the training rows")
    if study.returns.shape[1] < 2:
        return "The panel has one asset: there is no dependence between assets to compare.", numbers
    figure = picture(
        figures.correlation_maps(study.held_out, study.scenarios),
        "Correlations, blue positive and orange negative; assets that move together stand side by side.",
        "Look for the same blocks in the first two maps and for a third map without structure: a coloured row is one "
        "asset whose ties are wrong, a coloured block a sector. Mind the third map's own scale."
        + _order_words(study),
    )
    return lead, [figure, *numbers]


def _order_words(study):
    names = list(map(str, study.held_out.columns))
    if len(names) <= 30:
        return ""
    order = figures.asset_order(np.corrcoef(study.held_out.to_numpy(float).T))
    return " From top to bottom: " + ", ".join(names[i] for i in order) + "."


def _covariance(study):
    lead = (
        "A covariance from few rows is partly noise, and an optimiser seeks that noise out. Cleaning keeps what "
        "exceeds the range that noise alone would produce. Good: the scenarios' volatility is within 2 % of the lowest."
    )
    found = study.covariance_table
    shown = {
        "condition number": ("Condition number", 1),
        "error to held-out (%)": ("Error to held-out, %", 1),
        "held-out volatility of its minimum-variance portfolio (%)": (
            "Held-out volatility of its minimum-variance portfolio, %",
            2,
        ),
        "factors": ("Factors above noise", 0),
    }
    rows = [
        [words(name), *(number(row[column], digits) for column, (_, digits) in shown.items())]
        for name, row in zip(found.index, found.to_dict("records"))
    ]
    blocks = []
    if study.returns.shape[1] > 1:
        blocks += [
            picture(
                figures.eigenvalue_spectrum(study.train, study.scenarios, study.n_train),
                "Eigenvalues of the correlation matrix: training rows, scenarios, and both by rank. "
                "Logarithmic scales.",
                "Each eigenvalue is the variance of one independent pattern. Look for the same large values, right of "
                "the dashed edge, in both panels: they are the factors. Values under the orange shape are what "
                f"{study.n_train:,} rows of pure noise would give.",
            ),
            picture(
                figures.condition_numbers(found),
                "Condition number (largest over smallest eigenvalue), and what it must be read with.",
                "A small condition number makes stable portfolios, but is an improvement only if the error to the "
                "held-out covariance and the held-out volatility do not rise with it. The third scale does not start "
                "at zero.",
            ),
        ]
    note = "Volatility is annual. "
    if "held-out rows" in found.index:
        note += "held-out rows: the covariance of the very rows that the others are judged on, a reference that no "
        note += "estimate can reach. "
    if MATCHED in found.index:
        note += f"{MATCHED}: S + s² diag(S) of the sample covariance S, at the condition number of the scenarios' "
        note += "correlations; what the scenarios do better than this row is more than shrinkage of equal strength, as far as one split "
        note += "without a test can tell."
    columns = ["Covariance", *(label for label, _ in shown.values())]
    blocks.append(table("The covariances.", columns, rows, note))
    return lead, blocks


def _portfolio(study):
    if not study.allocations:
        return "No portfolio was asked for.", []
    lead = (
        "What an optimiser holds when it is given the numbers above. Returns and volatilities are per period. "
        "Good: minimum variance is spread over five positions or more."
    )
    if "maximum Sharpe" not in study.allocations:
        lead += " No portfolio that is allowed earns anything, so none has a maximum Sharpe ratio."
    assets = study.returns.columns
    # A Series is matched by name, an array by place.
    weights = pd.DataFrame({name: pd.Series(a.weights, assets) for name, a in study.allocations.items()})
    weights = weights.fillna(0.0)
    rows = []
    for name, allocation in study.allocations.items():
        w = weights[name].to_numpy()
        rows.append(
            [
                words(name),
                per_cent(allocation.volatility, 3),
                per_cent(allocation.expected_return, 3),
                cell(f"{(np.abs(w) > 5e-4).sum():,}"),
                number(1 / (w**2).sum(), 1),
                words(assets[int(w.argmax())]),
                per_cent(w.max(), 1),
                per_cent(min(w.min(), 0.0), 1),
                words(allocation.status),
            ]
        )
    columns = ["Portfolio", "Volatility, %", "Expected return, %", "Assets held",
               ("Effective number", "1 over the sum of squared weights: as diversified as this many equal holdings"),
               "Largest holding", "Its weight, %", "Shortest, %", "Solver"]  # fmt: skip
    shown = "" if len(assets) <= 40 else " The 40 assets with the largest weights are shown."
    figure = picture(
        figures.portfolio_weights(weights),
        "Weights; long positions blue, short positions orange.",
        "Look for a few holdings that carry everything, and for assets that one portfolio wants and the next does "
        "not: such weights follow the estimate, not the market." + shown,
    )
    note = "Effective number: 1 over the sum of squared weights, as diversified as this many equal holdings. "
    note += (
        "Volatility and expected return are those that the optimiser was told, not those of held-out rows."
    )
    return lead, [figure, table("The portfolios.", columns, rows, note)]


def _walk(study):
    monthly, quarterly = study.walks.monthly, study.walks.quarterly
    if monthly is None:
        return study.walks.absent, []
    lead = (
        f"What minimum variance, long and short, would have earned on each covariance: estimated anew every {MONTH} rows "
        f"from at most {HISTORY} rows before the decision ({SAMPLE} and {NONLINEAR}: {RECENT}), held until the next, "
        "without costs."
    )
    tables = {f"every {MONTH} rows": (monthly, NONLINEAR)}
    if quarterly is None:
        lead += f" {study.walks.generator_absent}"
    else:
        ours = generator_of(quarterly)
        tables[f"every {QUARTER} rows"] = (quarterly, ours)
        lead += (
            f" {ours} is fitted anew on {HISTORY} rows at the latest {len(quarterly.windows)} decisions {QUARTER} rows "
            f"apart, its covariance that of {N_SCENARIOS:,} scenarios, beside {NONLINEAR} and the {ENSEMBLE} on the same days."
        )
    tests = {
        when: (reference, against(walk, reference).drop(index=EQUAL, errors="ignore"))
        for when, (walk, reference) in tables.items()
    }
    figure = picture(
        figures.walk_volatility(monthly.returns.drop(columns=EQUAL), NONLINEAR, tests),
        "Volatility out of sample: over the last year at each date (left), and over all days with 95 % intervals.",
        "Look for a line that stays below zero, not one that is there once; and for intervals that do not touch zero "
        "(filled dots). Hollow dots are differences that chance explains. Equal weights lie far off and are in the table.",
    )
    return lead, [figure, *(_walk_table(*named) for named in tables.items())]


def _walk_table(when, tabled):
    walk, reference = tabled
    found, tests = walk.summary(), against(walk, reference)
    rows = []
    for name, row in found.iterrows():
        gap, t = tests.loc[name] if name in tests.index else (math.nan, math.nan)
        rows.append(
            [
                words(name),
                per_cent(row["annual volatility"]),
                number(gap, 1),
                number(t, 1),
                number(row["Sharpe"]),
                f"{number(row['Sharpe low'])} to {number(row['Sharpe high'])}",
                per_cent(row["turnover"], 0),
                per_cent(row["ES"]),
                per_cent(row["max drawdown"], 1),
            ]
        )
    columns = ["Covariance", "Volatility a year, %", (f"Against {reference}, %", "Relative difference in volatility"),
               ("t", "Paired, robust to autocorrelation; of log variance"), "Sharpe ratio", "95 % interval",
               ("Turnover, %", "Purchases plus sales at a decision"), ("ES, %", "Mean of the worst 5 % of periods"),
               "Worst drawdown, %"]  # fmt: skip
    title = f"Minimum variance {when}: {len(walk.windows):,} decisions, {span(walk.returns)}."
    note = "t: of the difference in volatility, paired by day (Newey–West); beyond ±2 it exceeds chance, for one "
    note += (
        "comparison chosen beforehand. Sharpe ratio: of returns as they are, not above an interest rate; its "
    )
    note += "intervals overlap far more than those of volatility. Turnover: purchases plus sales at a decision. ES: mean "
    note += "loss of the worst 5 % of periods."
    if walk.strategies[0] == EQUAL:
        note += f" The {ENSEMBLE}'s windows and blend were chosen on the bundled US shares, where its lead may be flattered."
    return table(title, columns, rows, note)


def _tail(study):
    lead = "Losses are positive numbers, per period. Real numbers are measured on the held-out rows."
    test = study.tail_test
    if test is None:
        return "There are too few held-out rows to measure a tail.", []
    rows = []
    for (name, level), row in zip(study.tail.index, study.tail.to_dict("records")):
        cells = [words(name), f"{100 * level:g} %"]
        for short in ("VaR", "ES"):
            found = test.figures.loc[(name, level), [f"{short} {k}" for k in ("gap", "low", "high")]]
            cells += [per_cent(row[f"{short} real"]), per_cent(row[f"{short} scenarios"]), *_gap(*found)]
        rows.append(cells)
    total = [words("Sum of all"), NONE]
    for short in ("VaR", "ES"):
        sums = [study.tail[f"{short} {side}"].sum() for side in ("real", "scenarios")]
        total += [*map(per_cent, sums), *_gap(*test.together.loc[short, ["gap", "low", "high"]])]
    rows.append(total)
    columns = ["Portfolio", "Level"]
    for short in ("VaR", "ES"):
        columns += [f"{short} held-out, %", f"{short} scenarios, %", "Gap, %", "By chance, %"]
    figure = picture(
        figures.tail_risk(study.tail, test.figures),
        "Value at risk and expected shortfall, held-out rows and scenarios.",
        "Look for diamonds inside the bars, which say what chance gives between real rows, as many as were trained on and "
        "held out. An orange diamond left of its bar means that the scenarios understate "
        "the risk; right of it, that they are more cautious than the held-out rows.",
    )
    note = "Gap: scenarios less held-out, of the held-out number; negative: the scenarios understate the loss. By chance: "
    note += "all these gaps together stay within their bounds in 95 % of random splits of the training and held-out rows into "
    note += "parts of their sizes, with rows drawn from the part of the training rows' size in the place of scenarios; ✓ within. "
    note += "Good: all are within, and neither VaR nor ES is understated in every figure. Poor: "
    note += "the sum of either is understated by more than chance gives."
    return lead, [figure, table("Tail risk.", columns, rows, note)]


def _gap(gap, low, high):
    """Cells of a gap, with its tick, and of its bounds."""
    signed = [("+" if value > 0 else "") + per_cent(value, 1) for value in (gap, low, high)]
    return cell(signed[0], mark=not lies_beyond(gap, low, high)), f"{signed[1]} to {signed[2]}"


def _generators(study):
    lead = (
        f"{study.generator_name} beside simpler rivals, and beside the floor: training rows put in the place of "
        "scenarios, which is as close as real rows come to real rows. " + RULE
    )
    if not study.splits:
        return lead, []
    distances = {name: _in_floors(split) for name, split in study.splits.items()}
    distances = {name: frame for name, frame in distances.items() if frame.notna().any(axis=None)}
    blocks = []
    if distances:
        known = pd.concat(distances).notna().any()
        blocks.append(
            picture(
                figures.generator_comparison(
                    {name: frame.loc[:, known] for name, frame in distances.items()}
                ),
                f"How far each generator is from the held-out rows, {known.sum()} of the measures.",
                "Look for dots in the shaded strip, within the bound: 0 is typical of real rows. One measure beyond, of "
                "these or of those in the tables, tells a generator apart. Where the training rows themselves are told apart, "
                "as markets change, the bounds are moved out by as much.",
            )
        )
    blocks += [generator_table(name, split) for name, split in study.splits.items()]
    used = {key for split in study.splits.values() for key in split.table.columns if key in METRICS}
    rows = [[words(metric.label), words(metric.meaning)] for key, metric in METRICS.items() if key in used]
    return lead, [*blocks, table("What the columns say.", ["Column", "Meaning"], rows)]


def _in_floors(split):
    """Distances in units of the bound, 0 where a generator is nearer than real rows typically are, in the table's order."""
    far = split.excess.loc[[*ranking(split), FLOOR_ROW], DOTS].clip(lower=0.0)
    return far.rename(columns={key: METRICS[key].label for key in DOTS})


SECTIONS = {
    "panel": ("The panel", _panel),
    "training": ("Training", _training),
    "fit": ("Returns of assets and portfolios", _fit),
    "dependence": ("Dependence between assets", _dependence),
    "covariance": ("Covariance", _covariance),
    "portfolio": ("Portfolios", _portfolio),
    "walk-forward": ("Walk-forward", _walk),
    "tail risk": ("Tail risk", _tail),
    "generators": ("Comparison of generators", _generators),
}
