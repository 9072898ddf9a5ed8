"""Do scenarios follow the law of rows that the generator never saw?

x: n real rows, y: m scenarios, w: portfolio weights. For one portfolio, N = n + m, r the (mid-)ranks of the
pooled returns, x_(1) <= x_(2) <= ... sorted, F_n and G_m the two distribution functions,

    U = n sum_i (r(x_(i)) - i)^2 + m sum_j (r(y_(j)) - j)^2                       (Cramer-von Mises)
    T = U/(n m N) - (4 n m - 1)/(6 N)  =  (n m/N^2) sum_k (F_n - G_m)^2(z_k)      where there are no ties
    P(T <= t) -> sum_k Gamma(k+1/2)/k! sqrt(4k+1) exp(-q_k) K_1/4(q_k) / (pi^3/2 t^1/2),  q_k = (4k+1)^2/(16t)

Portfolios share the market, so their p-values move together: the rejection rate at 5 % is judged against its
own null law, the rates between random splits of real rows (T is free of the sizes in the limit, so a split
need not have the sizes of the test). Ranks are computed once; a split is a 0/1 mask over them.

    energy distance = (2 E|x-y| - E|x-x'| - E|y-y'|) / (2 E|x-y|), in [0, 1]      (Szekely & Rizzo)
    tail dependence = P(x_i and x_j both among their worst u rows) / u            mean over pairs, u = 2..5 %

Every metric stands beside its real-vs-real floor, computed from as many rows on either side. `floor_high`
is the 95 % bound of that floor. Of K metrics K/20 exceed theirs by chance: the verdict of a report compares

    max_k (b_k - median b_k)/(floor_high_k - median b_k),      b_k: distance of metric k from its ideal,

with the 99 % quantile of the same maximum over the splits.

inputs <- cvm, metrics <- floor <- report.
"""

from finediff.validation.cvm import (
    CvMResult,
    cvm_p_value,
    cvm_portfolio_test,
    cvm_two_sample,
    portfolio_weights,
)
from finediff.validation.metrics import (
    classifier_auc,
    energy_distance,
    lower_tail_dependence,
    panel_metrics,
    qq_data,
)
from finediff.validation.report import FLOOR_ROW, Comparison, ValidationReport, compare, judge, validate

__all__ = [
    "FLOOR_ROW",
    "Comparison",
    "CvMResult",
    "ValidationReport",
    "classifier_auc",
    "compare",
    "cvm_p_value",
    "cvm_portfolio_test",
    "cvm_two_sample",
    "energy_distance",
    "judge",
    "lower_tail_dependence",
    "panel_metrics",
    "portfolio_weights",
    "qq_data",
    "validate",
]
