# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What do synthetic scenarios of twenty US shares look like, and can they be trusted?
#
# From real prices to a risk report: fit a diffusion model on some of the days, draw scenarios, and judge them on
# the days the model never saw. Change the parameters and run all cells; the last one writes the report.

# %% tags=["parameters"]
source = "sp500"  # or a .csv / .parquet of prices, or tickers
start = "2000-01-01"
steps = 2500  # largest number of training steps
seed = 0
out = "reports/notebook"

# %% [markdown]
# ## Is the panel what it seems to be?

# %%
from pathlib import Path

from finediff.panel import check_panel, load_prices, random_split, to_returns

prices = load_prices(source, start=start)
returns = to_returns(prices)
for finding in check_panel(returns):
    print(finding)
print(
    f"{returns.shape[0]} days, {returns.shape[1]} assets, {returns.index[0]:%Y-%m-%d} to {returns.index[-1]:%Y-%m-%d}"
)

# %% [markdown]
# ## Fit on some days, sample as many as you like
#
# Every generator is a scikit-learn estimator; scenarios keep the names of the assets. The model learns what a
# *single day* can look like: scenarios are independent in time.

# %%
from finediff.generators import RidgeScoreGenerator

train, held_out = random_split(returns, 0.3, random_state=seed)
generator = RidgeScoreGenerator(random_state=seed).fit(train)
scenarios = generator.sample(5000, random_state=seed + 1)
scenarios.describe(percentiles=[0.01, 0.99]).T.round(4)

# %% [markdown]
# ## Judge them on the days the model never saw
#
# `floor` is what real days score against other real days: no generator should be asked for more.

# %%
from finediff.validation import validate

report = validate(held_out, scenarios, train, random_state=seed)
print(report.verdict)
report.to_frame()

# %% [markdown]
# ## From scenarios to a covariance and a portfolio

# %%
from finediff.covariance import ScenarioCovariance
from finediff.portfolio import LongOnly, MaximumWeight, MinimumVariance
from finediff.risk import tail_risk_table

covariance = (
    ScenarioCovariance(generator, prefit=True, n_scenarios=5000, random_state=seed).fit(train).covariance_
)
weights = MinimumVariance([LongOnly(), MaximumWeight(0.2)]).solve(covariance=covariance).weights
tail_risk_table(held_out, scenarios, {"minimum variance": weights}).round(4)

# %% [markdown]
# ## The whole report, with the rivals in the same run

# %%
from finediff.generators import BootstrapGenerator, CopulaGenerator, DDPMGenerator, GaussianGenerator
from finediff.provenance import manifest
from finediff.report.render import write_report
from finediff.report.study import study

result = study(
    returns,
    {
        "ridge": RidgeScoreGenerator(random_state=seed),
        "ddpm": DDPMGenerator(steps=steps, random_state=seed),
        "gaussian": GaussianGenerator(random_state=seed),
        "t-copula": CopulaGenerator(random_state=seed),
        "bootstrap": BootstrapGenerator(random_state=seed),
    },
    title="First report",
    random_state=seed,
    n_jobs=1,
    manifest=manifest(
        command="notebook", configuration={"start": start, "steps": steps}, seed=seed, data=returns
    ),
)
write_report(result, Path(out) / "report.html")
for section, verdict in result.verdicts.items():
    print(f"{section:12} {verdict.status:5} {verdict.text}")
