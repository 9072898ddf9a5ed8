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

Every metric stands beside its real-vs-real floor, computed from as many rows on either side. One rule gives all
verdicts: b_k, the distance of metric k from its ideal (of a rate its root, of a p-value its logit), has the bound

    median b_k + c (95 % quantile of b_k - median b_k),      c: 95 % quantile of the furthest metric's z,

over random splits of real rows, so that in 95 % of splits no metric at all lies beyond its bound. Scenarios with
one metric beyond are told apart from real rows, a test of size 5 %; without any they are not. Where the training
rows themselves are told apart from the held-out ones (markets change), all bounds are moved out by as much.

Tails of portfolios are judged by `tail_test`: gaps of value at risk and expected shortfall, and their sums over
all figures, beside joint bounds from random splits of training and held-out rows into parts of their sizes;
`joint_crashes` puts an interval around the ratio of tail dependence, which holds the training rows' error too.

inputs <- cvm, metrics <- floor <- report; inputs, metrics <- tails.
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
from finediff.validation.tails import TailTest, joint_crashes, tail_test

__all__ = [
    "FLOOR_ROW",
    "Comparison",
    "CvMResult",
    "TailTest",
    "ValidationReport",
    "classifier_auc",
    "compare",
    "cvm_p_value",
    "cvm_portfolio_test",
    "cvm_two_sample",
    "energy_distance",
    "joint_crashes",
    "judge",
    "lower_tail_dependence",
    "panel_metrics",
    "portfolio_weights",
    "qq_data",
    "tail_test",
    "validate",
]
