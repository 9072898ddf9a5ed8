"""Tables of the report: numbers as text, cells, and the tables in which generators meet the held-out rows.

In a table of metrics a tick says that a generator is as close to the held-out rows as real rows are. A generator
copies rows if at least `_COPIES` of its scenarios lie on a training row and that is beyond the bound of real rows;
such a generator cannot be the best of a column.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from markupsafe import Markup

from finediff.report.metrics import COSTS, METRICS
from finediff.validation import FLOOR_ROW

__all__ = [
    "NONE",
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
_COPIES = 0.1


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
    note += "what 95 % of random splits of real rows stay within; about one metric in twenty is outside by chance. "
    note += "A ratio is within between 1/bound and bound. –: no number, or not judged."
    return [table(f"{title}: {study.generator_name} on each split.", columns, rows, note)]


def generator_table(name, split) -> dict:
    """All generators on one split: a tick within the bound, bold for the nearest to the ideal that does not copy."""
    judged = split.report.table
    keys = [key for key in split.table.columns if key in METRICS]
    costs = [key for key in COSTS if key in split.table.columns]
    far = pd.DataFrame({key: split.table[key].map(METRICS[key].distance) for key in keys})
    copies = _copies(split)
    rivals = [row for row in split.table.index if row != FLOOR_ROW and row not in copies]
    nearest = far.loc[rivals].min()
    rows = []
    for row, values in split.table.to_dict("index").items():
        verdict = "training rows" if row == FLOOR_ROW else values["verdict"]
        cells = [words(row, f"{verdict}, copies rows" if row in copies else verdict), str(values["beyond"])]
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
    columns = ["Generator", ("Beyond", "How many of all metrics lie outside their 95 % bound")]
    columns += [(METRICS[key].label, METRICS[key].meaning) for key in keys] + [COSTS[key][0] for key in costs]
    note = ""
    if copies:
        *first, last = copies
        named, verb = (f"{', '.join(first)} and {last}", "copy") if first else (last, "copies")
        note = f"{named} {verb} training rows (column Memorised): what looks best there is not new, and is not in bold. "
    note += "Beyond: how many of all metrics lie outside their bound. "
    return table(f"{name.capitalize()} split: {split.description}.", columns, rows, note, legend=True)


def _copies(split) -> list[str]:
    share = split.table["memorised_fraction"].drop(FLOOR_ROW)
    bound = split.report.table.at["memorised_fraction", "floor_high"]
    return list(share.index[(share >= _COPIES) & ~(share <= bound)])


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
