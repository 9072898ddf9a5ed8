"""Out of sample: how volatile each strategy was over time, and whether the differences exceed chance.

relative volatility   100 (s_k / s_0 - 1), standard deviations of the same 252 days
interval              100 (exp(g +- 1.96 g/t) - 1), g the difference of log volatility, t its paired statistic
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, MaxNLocator

from finediff.report.svg import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    TEAL,
    canvas,
    drawn,
    legend,
    number,
    per_cent,
    shortened,
    stroke,
)

_YEAR = 252
_POINTS = 400
_LOOKS = (
    {"color": TEAL, "linewidth": 2.2},
    {"color": ORANGE, "linewidth": 1.5, "linestyle": (0, (5, 2))},
    {"color": MUTED, "linewidth": 1.3, "linestyle": (0, (1.5, 1.5))},
)


@drawn
def walk_volatility(returns: pd.DataFrame, reference: str, tests: dict) -> str:
    """Volatility over the last year against a reference, and the whole period's differences with their intervals.

    Parameters
    ----------
    returns : DataFrame (n, k)
        Realised returns, one column a strategy; n > 252, at most three beside the reference.
    reference : str
        Column that is the zero line.
    tests : dict
        Title -> (reference, DataFrame with "difference" in % and "t"), a panel each.

    Returns
    -------
    str
        SVG.
    """
    rolling = returns.rolling(_YEAR).std().iloc[_YEAR - 1 :]
    rolling = 100 * (rolling.div(rolling[reference], axis=0) - 1)
    others = [name for name in returns.columns if name != reference]
    looks = dict(zip(reversed(others), _LOOKS))  # the last is the bar: it gets the heaviest line
    figure = canvas(400)
    outer = figure.add_gridspec(1, 2, width_ratios=[1.25, 1])
    over_time = figure.add_subplot(outer[0])
    kept = rolling.iloc[:: max(1, len(rolling) // _POINTS)]
    dated = isinstance(kept.index, pd.DatetimeIndex)
    time = (
        kept.index.year + kept.index.day_of_year / 366
        if dated
        else np.arange(len(kept)) * (len(rolling) / len(kept))
    )
    over_time.axhline(0, color=INK, linewidth=1.4)
    for name, look in looks.items():
        over_time.plot(time, kept[name], **look)
    over_time.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    over_time.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    over_time.set_xlabel("end of the year that is measured" if dated else "period")
    over_time.set_title(f"one-year volatility against {shortened(reference, 24)}")
    per_cent(over_time.yaxis)
    over_time.margins(x=0.01)

    heights = [len(table) + 1.2 for _, table in tests.values()]
    inner = outer[1].subgridspec(len(tests), 1, height_ratios=heights)
    first, told = None, []
    for row, (title, (against, table)) in zip(inner, tests.items()):
        axes = first = figure.add_subplot(row, sharex=first)
        place = np.arange(len(table))[::-1]
        for at, (name, found) in zip(place, table.iterrows()):
            gap, t = np.log1p(found["difference"] / 100), found["t"]
            half = 1.96 * abs(gap / t) if np.isfinite(t) and t else 0.0
            low, high = 100 * np.expm1([gap - half, gap + half])
            clear = low > 0 or high < 0
            color = looks.get(name, {"color": INK})["color"]
            axes.hlines(at, low, high, color=color, linewidth=2)
            axes.plot(
                found["difference"],
                at,
                "o",
                color=color,
                markersize=7,
                markerfacecolor=color if clear else "none",
            )
            told.append(f"{name} against {against} {number(round(found['difference'], 1))} %")
        axes.axvline(0, color=INK if against == reference else BLUE, linewidth=1.4)
        axes.set_yticks(place, [shortened(name, 20) for name in table.index], color=INK)
        axes.set_ylim(-0.6, len(table) - 0.4)
        axes.set_title(title)
        axes.set_xlabel(f"against {shortened(against, 24)}")
        axes.spines["left"].set_visible(False)
        axes.grid(False, axis="y")
        per_cent(axes.xaxis, 4)
    legend(
        figure,
        [
            stroke(f"{shortened(reference, 24)} (zero)", INK, linewidth=1.4),
            *(stroke(shortened(name, 24), **look) for name, look in looks.items()),
        ],
    )
    return figure, f"Volatility out of sample, over time and altogether: {'; '.join(told)}."
