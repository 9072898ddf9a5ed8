"""What is known: models whose E[x_0 | x_t] is a formula. Oracles of the tests, bases of the generators.

    law of x_0                                        E[x_0 | x_t = x]
    Gaussian       N(m, S)                            m + alpha S (alpha^2 S + sigma^2 I)^-1 (x - alpha m)
    mixture        sum_m w_m N(m_m, S_m)              sum_m P(m | x) E[x_0 | x, m]
    scale mixture  m + sqrt(v) N(0, S), P(v_m) = w_m  sum_m P(v_m | x) E[x_0 | x, v_m]
    product        sqrt(tau u_j) e_j, on one grid     sum_m P(tau u_j = v_m | x) E[x_0j | x_j, v_m]
    factor         m + B F + N(0, D)                  m + B F_hat + alpha D Lambda^-1 (x - alpha m - alpha B F_hat)
    empirical      a row of the panel at random       sum_i softmax_i(-|x - alpha x_i|^2 / 2 sigma^2) x_i

Each has ``denoise``, ``score``, ``log_prob(x, t)`` and exact draws ``sample(n, generator)``, at any t in
[0, 1], () or (batch,). Which one: the scale mixture is the base for returns (heavy tails, one volatility a
day); the factor model where d is large; the mixture for regimes; the empirical law is what a network that
minimises the training loss to the end becomes, so it measures memorisation and is never a generator.
"""

from finediff.diffusion.exact.factor import FactorScore
from finediff.diffusion.exact.factor_fit import FactorFit, fit_factors
from finediff.diffusion.exact.factor_law import FactorLaw, MixtureFactors, ScaleFactors
from finediff.diffusion.exact.factor_number import choose_factors, eigenvalue_ratio
from finediff.diffusion.exact.gaussian import ExactScore, GaussianScore
from finediff.diffusion.exact.mixture import EmpiricalScore, MixtureScore
from finediff.diffusion.exact.product import ProductScaleMixtureScore
from finediff.diffusion.exact.scale import ScaleMixtureScore

__all__ = [
    "EmpiricalScore",
    "ExactScore",
    "FactorFit",
    "FactorLaw",
    "FactorScore",
    "GaussianScore",
    "MixtureFactors",
    "MixtureScore",
    "ProductScaleMixtureScore",
    "ScaleFactors",
    "ScaleMixtureScore",
    "choose_factors",
    "eigenvalue_ratio",
    "fit_factors",
]
