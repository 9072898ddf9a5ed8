"""Tables of the report: numbers as text, cells, and the tables in which generators meet the held-out rows.

In a table of metrics a tick says that a number lies within its joint bound: real rows keep all bounds together in
95 % of cases, so a generator without a tick on a judged metric is told apart from real rows. A generator that
copies rows (`finediff.report.metrics.copiers`) cannot be the best of a column.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from markupsafe import Markup

from finediff.report.metrics import COSTS, METRICS, copiers, named, ranking, times
from finediff.validation import FLOOR_ROW

__all__ = [
    "NONE",
    "RULE",
    "asset_table",
    "cell",
    "day",
    "floor_table",
    "generator_table",
    "number",
    "per_cent",
    "span",
]
__all__ += ["picture", "table", "words"]

NONE = "–"
RULE = (
    "The rule of all verdicts: bounds are set so wide that real rows, put in the place of scenarios, keep all of them "
    "together in 95 % of random splits. Scenarios with one measure beyond its bound are told apart from real rows; "
    "without any they are not. p: how often real rows have a measure as far out."
)


# ---------------------------------------------------------------------------------------------- pieces


def number(value, digits=2) -> str:
    value = float(value)
    return f"{value:,.{digits}f}".replace("-", "−") if math.isfinite(value) else NONE


def per_cent(value, digits=2) -> str:
    return number(100 * float(value), digits)


def day(value) -> str:
    return value.strftime("%Y-%m-%d") if hasattr(value, "strftime") and not pd.isna(value) else str(value)


def span(frame) -> str:
    return f"{day(frame.index[0])} to {day(frame.index[-1])}"


def cell(text, *, mark=False, strong=False) -> dict:
    """A number as text, with a tick or in bold."""
    return {"text": text, "words": False, "mark": mark, "strong": strong, "small": ""}


def words(value, small="") -> dict:
    """A cell of words, set to the left, and a smaller line below."""
    return {"text": str(value), "words": True, "mark": False, "strong": False, "small": small}


def picture(svg, title, look) -> dict:
    """A figure and its caption; `look` says what to look for."""
    return {"kind": "figure", "svg": Markup(svg), "title": title, "look": look}


def table(title, columns, rows, note="", legend=False) -> dict:
    """`columns`: labels or (label, tooltip); the first is the row's head. `rows`: lists of cells or text."""
    return {
        "kind": "table",
        "title": title,
        "columns": [c if isinstance(c, tuple) else (c, "") for c in columns],
        "rows": [[c if isinstance(c, dict) else cell(c) for c in row] for row in rows],
        "note": note,
        "legend": legend,
    }


# ---------------------------------------------------------------------------------------------- tables


def floor_table(study, keys, title) -> list[dict]:
    """Metrics of the chosen generator on every split, each beside its floor and bound; no table without any."""
    columns = [title]
    for name in study.splits:
        columns += [f"{name} split", "real rows", "bound"]
    rows = []
    for key in keys:
        metric = METRICS[key]
        found = [split.report.table.loc[key] for split in study.splits.values()]
        if not any(math.isfinite(row["scenarios"]) for row in found):
            continue
        cells = [words(metric.label, metric.meaning)]
        for row in found:
            bound = math.nan if row["verdict"] == "not judged" else row["floor_high"]
            cells += [
                cell(number(row["scenarios"], metric.digits), mark=row["verdict"] == "within floor"),
                number(row["floor"], metric.digits),
                number(bound, metric.digits),
            ]
        rows.append(cells)
    if not rows:
        return []
    note = "✓ within the bound. Real rows: the same number for training rows put in the place of scenarios. Bound: "
    note += "real rows keep all bounds of this report's measures together in 95 % of random splits. "
    note += "A ratio is within between 1/bound and bound. –: no number, or not judged. "
    note += _moved(study.splits)
    return [table(f"{title}: {study.generator_name} on each split.", columns, rows, note)]


def generator_table(name, split) -> dict:
    """All generators on one split: a tick within the bound, bold for the nearest to the ideal that does not copy."""
    judged = split.report.table
    keys = [key for key in split.table.columns if key in METRICS]
    costs = [key for key in COSTS if key in split.table.columns]
    far = pd.DataFrame({key: split.table[key].map(METRICS[key].distance) for key in keys})
    copies = copiers(split)
    order = ranking(split)
    rivals = [row for row in order if row not in copies]
    nearest = far.loc[rivals].min()
    rows = []
    for row, values in split.table.loc[[*order, FLOOR_ROW]].to_dict("index").items():
        told = "told apart" if values["beyond"] else "not told apart"
        verdict = f"training rows, {told}" if row == FLOOR_ROW else told
        furthest = f"{times(values['furthest'])} {named(values['furthest_metric'])}"
        cells = [
            words(row, f"{verdict}, copies rows" if row in copies else verdict),
            str(values["beyond"]),
            words(furthest),
            number(values["p_value"], 3),
        ]
        for key in keys:
            metric = METRICS[key]
            within = far.at[row, key] <= metric.distance(judged.at[key, "floor_high"])
            contest = key != "memorised_fraction" and len(rivals) > 1 and row in rivals
            cells.append(
                cell(
                    number(values[key], metric.digits),
                    mark=row != FLOOR_ROW and within and judged.at[key, "verdict"] != "not judged",
                    strong=contest and far.at[row, key] == nearest[key],
                )
            )
        cells += [number(values[key], COSTS[key][1]) for key in costs]
        rows.append(cells)
    count = int(judged["excess"].notna().sum())
    columns = [
        "Generator",
        ("Beyond", f"How many of the {count} judged metrics lie beyond their joint bound"),
        ("Furthest", "The metric furthest out, in units of its bound: above 1 is beyond"),
        ("p", "How often real rows have a metric as far out"),
    ]
    columns += [(METRICS[key].label, METRICS[key].meaning) for key in keys] + [COSTS[key][0] for key in costs]
    note = ""
    if copies:
        *first, last = copies
        listed, verb = (f"{', '.join(first)} and {last}", "copy") if first else (last, "copies")
        note = f"{listed} {verb} training rows (column Memorised): what looks best there is not new, and is not in bold. "
    note += f"Beyond: how many of {count} judged measures, not all shown here, lie beyond their bounds; told apart: at "
    note += "least one does, which happens to real rows in 5 % of cases. Furthest: the measure furthest out, 0 typical of "
    note += "real rows, 1 the bound; p: how often real rows have one as far out. In order of Furthest, copies last. "
    note += _moved({name: split})
    return table(f"{name.capitalize()} split: {split.description}.", columns, rows, note, legend=True)


def _moved(splits) -> str:
    """Whether the bounds of a split were moved out for training rows that differ themselves."""
    names = [name for name, split in splits.items() if split.report.settings["bounds_moved"]]
    if not names:
        return ""
    own = "; ".join(f"{splits[name].table.at[FLOOR_ROW, 'beyond']} measures beyond" for name in names)
    return (
        f"On the {' and '.join(names)} split the training rows are themselves told apart from the held-out rows ({own}), "
        "so the bounds are moved out by as much: there, a generator is told apart only if it is further away than they are."
    )


def asset_table(study) -> dict:
    """Volatility, quantiles and worst return of each asset, held-out rows beside scenarios."""
    real, made = study.held_out.to_numpy(float), study.scenarios[study.held_out.columns].to_numpy(float)
    columns, cells = ["Asset"], [[words(name) for name in study.held_out.columns]]
    for label, measure in {
        "volatility, %": lambda x: x.std(axis=0, ddof=1),
        "1 % quantile, %": lambda x: np.quantile(x, 0.01, axis=0),
        "99 % quantile, %": lambda x: np.quantile(x, 0.99, axis=0),
        "worst, %": lambda x: x.min(axis=0),
    }.items():
        columns += [f"Held-out {label}", "scenarios"]
        cells += [[per_cent(v) for v in measure(real)], [per_cent(v) for v in measure(made)]]
    note = f"Per period. The worst of {len(made):,} scenarios is compared with the worst of {len(real):,} rows: the "
    note += "larger sample reaches further."
    return table("Asset by asset.", columns, list(zip(*cells)), note)
