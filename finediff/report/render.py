"""The report: one self-contained HTML file from a study.

`render` turns a study into text, `write_report` puts it in a file. The page loads nothing: figures are inline,
fonts are the reader's own, there is no script. What it says in each section:

    verdict   one sentence of the study, its status as a shape, a colour and a word
    figure    a drawing of `finediff.report.figures` and a caption that says what to look for
    table     numbers; a tick where a generator is as close to the held-out rows as real rows are

A generator copies rows if at least `_COPIES` of its scenarios lie on a training row and that is beyond the
bound of real rows; such a generator cannot be the best of a column.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from itertools import count
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from finediff.report import figures
from finediff.report.metrics import COSTS, DOTS, JOINT, MARGINS, METRICS
from finediff.report.verdicts import INDEPENDENT
from finediff.validation import FLOOR_ROW, qq_data

__all__ = ["render", "write_report"]

_COPIES = 0.1
_QQ_POINTS = 100
_QQ_WORDS = "the 24 assets with the most quantiles outside their band"
_NONE = "–"


_WORDS = {"good": "Good", "note": "Note", "poor": "Poor"}
_TITLES = {
    "panel": "The panel",
    "training": "Training",
    "fit": "Returns of assets and portfolios",
    "dependence": "Dependence between assets",
    "covariance": "Covariance",
    "portfolio": "Portfolios",
    "tail risk": "Tail risk",
    "generators": "Comparison of generators",
}


def render(study) -> str:
    """The report of a study.

    Parameters
    ----------
    study : finediff.report.study.Study
        Or anything with its attributes.

    Returns
    -------
    str
        A whole HTML page. The same study gives the same text.

    Raises
    ------
    ValueError
        If a verdict has a status other than "good", "note" or "poor".
    """
    for key, verdict in study.verdicts.items():
        if verdict.status not in _WORDS:
            raise ValueError(
                f"expected a status among {list(_WORDS)}, got {verdict.status!r} for the verdict {key!r}, because "
                "each has its own mark, do choose one"
            )
    page = _Page()
    sections = []
    for number, (key, title) in enumerate(_TITLES.items(), 1):
        lead, blocks = _SECTIONS[key](study, page)
        sections.append(
            {
                "id": key.replace(" ", "-"),
                "number": number,
                "title": title,
                "verdict": study.verdicts.get(key),
                "lead": lead,
                "blocks": blocks,
            }
        )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["tied"] = lambda text: str(text).replace(" %", "\u00a0%")
    template = environment.from_string(
        files("finediff.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        study=study,
        limits=INDEPENDENT,
        facts=_facts(study),
        sections=sections,
        others=[v for k, v in study.verdicts.items() if k not in _TITLES],
        words=_WORDS,
        appendix=[_asset_table(study, page)],
        provenance=_flat(study.manifest),
    )


def write_report(study, path) -> Path:
    """Write the report of a study whole or not at all.

    Parameters
    ----------
    study : finediff.report.study.Study
        As for `render`.
    path : str or Path
        The HTML file; its folder is made where it is missing.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        As `render`; a file that was there before is then untouched.
    """
    path = Path(path)
    text = render(study)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


# --------------------------------------------------------------------------------------- blocks of the page


class _Page:
    """Numbers the figures and tables of one page."""

    def __init__(self):
        self._figures, self._tables = count(1), count(1)

    def figure(self, svg, title, look):
        return {
            "kind": "figure",
            "number": next(self._figures),
            "svg": Markup(svg),
            "title": title,
            "look": look,
        }

    def table(self, title, columns, rows, note="", legend=False):
        """`columns`: labels or (label, tooltip); the first is the row's head. `rows`: lists of cells."""
        return {
            "kind": "table",
            "number": next(self._tables),
            "title": title,
            "columns": [c if isinstance(c, tuple) else (c, "") for c in columns],
            "rows": [[c if isinstance(c, dict) else _cell(c) for c in row] for row in rows],
            "note": note,
            "legend": legend,
        }


def _cell(text, *, words=False, mark=False, strong=False, small=""):
    return {"text": text, "words": words, "mark": mark, "strong": strong, "small": small}


def _text(value, small=""):
    return _cell(str(value), words=True, small=small)


def _prose(text):
    return {"kind": "prose", "text": text}


def _number(value, digits=2) -> str:
    value = float(value)
    if not math.isfinite(value):
        return _NONE
    return f"{value:,.{digits}f}".replace("-", "−")


def _per_cent(value, digits=2) -> str:
    return _number(100 * float(value), digits)


def _day(value) -> str:
    return value.strftime("%Y-%m-%d") if hasattr(value, "strftime") and not pd.isna(value) else str(value)


def _span(frame) -> str:
    return f"{_day(frame.index[0])} to {_day(frame.index[-1])}"


def _find(tree, wanted):
    """First value under one of the keys, outermost level first; None without any."""
    for key in wanted:
        if tree.get(key) is not None:
            return tree[key]
    for value in tree.values():
        if isinstance(value, Mapping) and (found := _find(value, wanted)) is not None:
            return found
    return None


def _facts(study):
    seed = _find(study.manifest, ("seed", "random_state"))
    n, m, d = len(study.returns), len(study.scenarios), study.returns.shape[1]
    facts = [
        ("Fitted", study.generator_name),
        ("On", f"{study.n_train:,} training rows of {n:,}; {len(study.held_out):,} rows were kept aside"),
        ("Assets", f"{d:,}"),
        ("Period", _span(study.returns)),
        ("Scenarios", f"{m:,}, one period each"),
        ("Seed", _NONE if seed is None else str(seed)),
    ]
    for name, split in study.splits.items():
        facts.append((f"{name.capitalize()} split", split.description))
    return facts


def _flat(tree, prefix=""):
    rows = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{name} / ")
        elif isinstance(value, str):
            rows.append((name, value))
        elif isinstance(value, list | tuple) and all(isinstance(v, str | int | float) for v in value):
            rows.append((name, ", ".join(map(str, value))))
        else:
            rows.append((name, json.dumps(value, default=str, ensure_ascii=False)))
    return rows


# ----------------------------------------------------------------------------------------------- sections


def _panel(study, page):
    assets = ", ".join(map(str, study.returns.columns))
    blocks = [_prose(f"Assets, in the order of the panel: {assets}.")]
    if study.findings:
        rows = [
            [
                _text(finding.severity.capitalize()),
                _text(_NONE if finding.column is None else finding.column),
                _text(_NONE if finding.date is None else _day(finding.date)),
                _text(f"{finding.message} {finding.remedy}"),
            ]
            for finding in study.findings
        ]
        title = "What the checks found. An error makes a fitted model wrong; a warning is to be judged by a person."
        blocks.append(page.table(title, ["Severity", "Asset", "First date", "Finding and remedy"], rows))
    else:
        blocks.append(_prose("The checks for missing, stale, misdated and mistyped values found nothing."))
    lead = f"{len(study.returns):,} rows of simple returns, {_span(study.returns)}. All that follows rests on them."
    return lead, blocks


def _training(study, page):
    seen = {name: history for name, history in study.histories.items() if len(history.step)}
    if not seen:
        return (
            f"{study.generator_name} is estimated in one step: there is no iterative training and no loss curve.",
            [],
        )
    lead = (
        "A diffusion model learns to take added noise out of real rows again. The loss on rows kept aside shows "
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
        "Look for a solid line (rows kept aside) that falls and levels off. If it turns upwards, the weights "
        f"kept, at the dot, should lie before the turn. {ends}."
    )
    return lead, [page.figure(figures.loss_curves(seen), "Loss during training.", look)]


def _fit(study, page):
    lead = (
        "Does a single number drawn from the scenarios, an asset's return or a portfolio's, behave like one from "
        "rows that the generator never saw?"
    )
    portfolio = {name: split.qq for name, split in study.splits.items()}
    both = qq_data(study.held_out, study.scenarios, assets="all", n_points=_QQ_POINTS)
    d = study.returns.shape[1]
    blocks = []
    if portfolio:
        blocks.append(
            page.figure(
                figures.qq_portfolio(portfolio),
                "Quantiles of the equal-weighted portfolio.",
                "Look for points inside the grey band, at the ends above all: points below the line on the left are "
                "losses that the scenarios make too large, points above it are losses made too small.",
            )
        )
    blocks += [
        page.figure(
            figures.tail_survival(study.train, study.held_out, study.scenarios),
            "How often a loss is exceeded, equal-weighted portfolio, logarithmic scale.",
            "Look for the blue line inside the grey band of the held-out rows; a line below it understates large "
            "losses. The Gaussian shows what thin tails would look like. Each curve ends at its worst period.",
        ),
        page.figure(
            figures.qq_assets(both),
            f"Quantiles of {'each asset' if d <= 24 else _QQ_WORDS}, scenarios (upwards) against held-out rows.",
            "Look for a blue line that stays within the grey band; the number is the share of the quantiles that do.",
        ),
        *_floor_table(study, page, MARGINS, "Single returns and portfolio returns"),
    ]
    return lead, blocks


def _dependence(study, page):
    lead = "Diversification rests on how assets move together, in ordinary periods and in bad ones."
    table = _floor_table(study, page, JOINT, "Dependence, and nearness to the training rows")
    if study.returns.shape[1] < 2:
        return "The panel has one asset: there is no dependence between assets to compare.", table
    figure = page.figure(
        figures.correlation_maps(study.held_out, study.scenarios),
        "Correlations, blue positive and orange negative; assets that move together stand side by side.",
        "Look for the same blocks in the first two maps and for a third map without structure: a coloured row is one "
        "asset whose ties are wrong, a coloured block a sector. Mind the third map's own scale."
        + _order_words(study),
    )
    return lead, [figure, *table]


def _order_words(study):
    names = list(map(str, study.held_out.columns))
    if len(names) <= 30:
        return ""
    order = figures.asset_order(np.corrcoef(study.held_out.to_numpy(float).T))
    return " From top to bottom: " + ", ".join(names[i] for i in order) + "."


def _covariance(study, page):
    lead = (
        "A covariance from few rows is partly noise, and an optimiser seeks that noise out. Cleaning keeps what "
        "exceeds the range that noise alone would produce."
    )
    table = study.covariance_table
    long = "held-out volatility of its minimum-variance portfolio (%)"
    digits = {"condition number": 1, "error to held-out (%)": 1, long: 2, "factors": 0}
    labels = {"condition number": "Condition number", "error to held-out (%)": "Error to held-out, %",
              long: "Held-out volatility of its minimum-variance portfolio, %",
              "factors": "Factors above noise"}  # fmt: skip
    rows = [
        [_text(name), *(_number(row[column], digits.get(column, 3)) for column in table.columns)]
        for name, row in zip(table.index, table.to_dict("records"))
    ]
    blocks = []
    if study.returns.shape[1] > 1:
        blocks += [
            page.figure(
                figures.eigenvalue_spectrum(study.train, study.scenarios, study.n_train),
                "Eigenvalues of the correlation matrix: training rows, scenarios, and both by rank. "
                "Logarithmic scales.",
                "Each eigenvalue is the variance of one independent pattern. Look for the same large values, right of "
                "the dashed edge, in both panels: they are the factors. Values under the orange shape are what "
                f"{study.n_train:,} rows of pure noise would give.",
            ),
            page.figure(
                figures.condition_numbers(table),
                "Condition number (largest over smallest eigenvalue), and what it must be read with.",
                "A small condition number makes stable portfolios, but is an improvement only if the error to the "
                "held-out covariance and the held-out volatility do not rise with it. The third scale does not start "
                "at zero.",
            ),
        ]
    note = "Volatility is annual. "
    if "held-out rows" in table.index:
        note += "held-out rows: the covariance of the very rows that the others are judged on, a reference that no "
        note += "estimate can reach."
    columns = ["Covariance", *(labels.get(c, c) for c in table.columns)]
    blocks.append(page.table("The covariances.", columns, rows, note))
    return lead, blocks


def _portfolio(study, page):
    if not study.allocations:
        return "No portfolio was asked for.", []
    lead = (
        "What an optimiser holds when it is given the numbers above. Returns and volatilities are per period."
    )
    if "maximum Sharpe" not in study.allocations:
        lead += " No portfolio that is allowed earns anything, so none has a maximum Sharpe ratio."
    assets = study.returns.columns
    weights = pd.DataFrame(
        {
            name: a.weights.reindex(assets)
            if isinstance(a.weights, pd.Series)
            else pd.Series(a.weights, assets)
            for name, a in study.allocations.items()
        }
    ).fillna(0.0)
    rows = []
    for name, allocation in study.allocations.items():
        w = weights[name].to_numpy()
        rows.append(
            [
                _text(name),
                _per_cent(allocation.volatility, 3),
                _per_cent(allocation.expected_return, 3),
                _cell(f"{(np.abs(w) > 5e-4).sum():,}"),
                _number(1 / (w**2).sum(), 1),
                _text(assets[int(w.argmax())]),
                _per_cent(w.max(), 1),
                _per_cent(min(w.min(), 0.0), 1),
                _text(allocation.status),
            ]
        )
    columns = ["Portfolio", "Volatility, %", "Expected return, %", "Assets held",
               ("Effective number", "1 over the sum of squared weights: as diversified as this many equal holdings"),
               "Largest holding", "Its weight, %", "Shortest, %", "Solver"]  # fmt: skip
    shown = "" if len(assets) <= 40 else " The 40 assets with the largest weights are shown."
    figure = page.figure(
        figures.portfolio_weights(weights),
        "Weights; long positions blue, short positions orange.",
        "Look for a few holdings that carry everything, and for assets that one portfolio wants and the next does "
        "not: such weights follow the estimate, not the market." + shown,
    )
    note = "Effective number: 1 over the sum of squared weights, as diversified as this many equal holdings. "
    note += (
        "Volatility and expected return are those that the optimiser was told, not those of held-out rows."
    )
    return lead, [figure, page.table("The portfolios.", columns, rows, note)]


def _tail(study, page):
    lead = "Losses are positive numbers, per period. Real numbers are measured on the held-out rows."
    if not len(study.tail):
        return "There are too few held-out rows to measure a tail.", []
    rows = []
    for (name, level), row in zip(study.tail.index, study.tail.to_dict("records")):
        cells = [_text(name), f"{100 * level:g} %"]
        for short in ("VaR", "ES"):
            gap = (row[f"{short} scenarios"] - row[f"{short} real"]) / (row[f"{short} real s.e."] or math.nan)
            cells += [
                _per_cent(row[f"{short} real"]),
                "± " + _per_cent(row[f"{short} real s.e."]),
                _per_cent(row[f"{short} scenarios"]),
                _cell(("+" if gap > 0 else "") + _number(gap, 1), mark=abs(gap) <= 1.96),
            ]
        rows.append(cells)
    columns = ["Portfolio", "Level"]
    for short in ("VaR", "ES"):
        columns += [f"{short} held-out, %", "s.e.", f"{short} scenarios, %", "Gap in s.e."]
    figure = page.figure(
        figures.tail_risk(study.tail),
        "Value at risk and expected shortfall, held-out rows and scenarios.",
        "Look for diamonds inside the bars. An orange diamond left of its bar means that the scenarios understate "
        "the risk; right of it, that they are more cautious than the held-out rows.",
    )
    note = "✓ within 1.96 standard errors. The standard errors hold for independent rows; volatility that clusters "
    note += "makes the true ones larger. Negative gap: the scenarios show less risk."
    return lead, [figure, page.table("Tail risk.", columns, rows, note)]


def _generators(study, page):
    lead = (
        f"{study.generator_name} beside simpler rivals, and beside the floor: training rows put in the place of "
        "scenarios, which is as close as real rows come to real rows."
    )
    if not study.splits:
        return lead, []
    distances, tables = {}, []
    for name, split in study.splits.items():
        table, bounds = split.table, split.report.table["floor_high"]
        judged = split.report.table["verdict"] != "not judged"
        distances[name] = pd.DataFrame(
            {
                METRICS[key].label: [
                    _in_floors(key, value, bounds.get(key, math.nan)) for value in table[key].astype(float)
                ]
                for key in DOTS
                if key in table
            },
            index=table.index,
        )
        tables.append(_generator_table(page, name, split, bounds, judged))
    distances = {name: frame for name, frame in distances.items() if frame.notna().to_numpy().any()}
    blocks = []
    if distances:
        some = {c for frame in distances.values() for c in frame if frame[c].notna().any()}
        columns = [METRICS[key].label for key in DOTS if METRICS[key].label in some]
        distances = {name: frame.reindex(columns=columns) for name, frame in distances.items()}
        blocks.append(
            page.figure(
                figures.generator_comparison(distances),
                "How far each generator is from the held-out rows, five measures.",
                "Look for dots in the shaded strip: there, scenarios are no further from the held-out rows than real "
                "rows are. On the chronological split real rows differ too, as markets change, and the strip is wider "
                "by as much.",
            )
        )
    used = {key for split in study.splits.values() for key in split.table.columns if key in METRICS}
    rows = [[_text(metric.label), _text(metric.meaning)] for key, metric in METRICS.items() if key in used]
    return lead, [*blocks, *tables, page.table("What the columns say.", ["Column", "Meaning"], rows)]


def _in_floors(key, value, bound):
    """Distance from the ideal in units of the bound's distance; NaN where that is zero or unknown."""
    unit = METRICS[key].distance(float(bound)) if bound is not None else math.nan
    return METRICS[key].distance(value) / unit if unit > 0 else math.nan


def _within(key, value, bound):
    return METRICS[key].distance(value) <= METRICS[key].distance(bound)


def _generator_table(page, name, split, bounds, judged):
    table = split.table
    keys = [key for key in table.columns if key in METRICS]
    costs = [key for key in COSTS if key in table.columns]
    rivals = [row for row in table.index if row != FLOOR_ROW]
    copies = []
    if "memorised_fraction" in keys:
        share = table["memorised_fraction"].astype(float)
        bound = float(bounds.get("memorised_fraction", math.nan))
        copies = [row for row in rivals if share[row] >= _COPIES and not share[row] <= bound]
    honest = [row for row in rivals if row not in copies]
    best = {}
    for key in keys:
        far = pd.Series(
            {row: METRICS[key].distance(float(table.at[row, key])) for row in honest}, dtype=float
        )
        if key != "memorised_fraction" and len(honest) > 1 and far.notna().any():
            best[key] = far[far == far.min()].index
    rows = []
    for row in table.index:
        floor = row == FLOOR_ROW
        verdict = "training rows" if floor else str(table.at[row, "verdict"])
        cells = [_text(row, f"{verdict}, copies rows" if row in copies else verdict)]
        beyond = table.at[row, "beyond"]
        cells.append(_NONE if pd.isna(beyond) else f"{int(beyond)}")
        for key in keys:
            value = float(table.at[row, key])
            tick = not floor and bool(judged.get(key, False)) and _within(key, value, float(bounds[key]))
            shown = _number(value, METRICS[key].digits)
            cells.append(_cell(shown, mark=tick, strong=not floor and row in best.get(key, ())))
        for key in costs:
            value = table.at[row, key]
            cells.append(_NONE if pd.isna(value) else _number(value, COSTS[key][1]))
        rows.append(cells)
    columns = ["Generator", ("Beyond", "How many of all metrics lie outside their 95 % bound")]
    columns += [(METRICS[key].label, METRICS[key].meaning) for key in keys] + [COSTS[key][0] for key in costs]
    note = ""
    if copies:
        named = " and ".join(
            [", ".join(map(str, copies[:-1])), str(copies[-1])] if copies[1:] else map(str, copies)
        )
        verb = "copy" if copies[1:] else "copies"
        note = f"{named} {verb} training rows (column Memorised): what looks best there is not new, and is not in bold. "
    note += "Beyond: how many of all metrics lie outside their bound. "
    return page.table(f"{name.capitalize()} split: {split.description}.", columns, rows, note, legend=True)


def _floor_table(study, page, keys, title):
    """Metrics of the chosen generator on every split, each beside its floor and bound."""
    if not study.splits:
        return []
    columns = [title]
    for name in study.splits:
        columns += [f"{name} split", "real rows", "bound"]
    rows = []
    for key in keys:
        metric = METRICS[key]
        cells = [_text(metric.label, metric.meaning)]
        some = False
        for split in study.splits.values():
            row = split.report.table.loc[key] if key in split.report.table.index else {}
            value, judged = (
                float(row.get("scenarios", math.nan)),
                row.get("verdict", "not judged") != "not judged",
            )
            some |= math.isfinite(value)
            cells += [
                _cell(_number(value, metric.digits), mark=row.get("verdict") == "within floor"),
                _number(row.get("floor", math.nan), metric.digits),
                _number(row.get("floor_high", math.nan) if judged else math.nan, metric.digits),
            ]
        if some:
            rows.append(cells)
    if not rows:
        return []
    note = "✓ within the bound. Real rows: the same number for training rows put in the place of scenarios. Bound: "
    note += "what 95 % of random splits of real rows stay within; about one metric in twenty is outside by chance. "
    note += "A ratio is within between 1/bound and bound. –: no number, or not judged."
    return [page.table(f"{title}: {study.generator_name} on each split.", columns, rows, note)]


def _asset_table(study, page):
    real, made = study.held_out.to_numpy(float), study.scenarios[study.held_out.columns].to_numpy(float)
    columns, cells = ["Asset"], [[_text(name) for name in study.held_out.columns]]
    for label, measure in {
        "volatility, %": lambda x: x.std(axis=0, ddof=1),
        "1 % quantile, %": lambda x: np.quantile(x, 0.01, axis=0),
        "99 % quantile, %": lambda x: np.quantile(x, 0.99, axis=0),
        "worst, %": lambda x: x.min(axis=0),
    }.items():
        columns += [f"Held-out {label}", "scenarios"]
        cells += [[_per_cent(v) for v in measure(real)], [_per_cent(v) for v in measure(made)]]
    note = f"Per period. The worst of {len(made):,} scenarios is compared with the worst of {len(real):,} rows: the "
    note += "larger sample reaches further."
    return page.table("Asset by asset.", columns, list(zip(*cells)), note)


_SECTIONS = {
    "panel": _panel,
    "training": _training,
    "fit": _fit,
    "dependence": _dependence,
    "covariance": _covariance,
    "portfolio": _portfolio,
    "tail risk": _tail,
    "generators": _generators,
}
