"""The bad-input table: what goes in, what is said. `python tests/test_bad_input.py` writes docs/bad_input.md."""

import contextlib
import re
import sys
import tempfile
import warnings
from functools import cache
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest

DOCUMENT = Path(__file__).parent.parent / "docs" / "bad_input.md"


def prices(n=200) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    index = pd.bdate_range("2020-01-01", periods=n, name="Date")
    steps = np.exp(0.01 * rng.standard_normal((n, 3)))
    return pd.DataFrame(100 * np.cumprod(steps, 0), columns=["AAA", "BBB", "CCC"], index=index)


def returns(n=200) -> pd.DataFrame:
    return prices(n + 1).pct_change().iloc[1:]


def put(frame, row, column, value) -> pd.DataFrame:
    frame = frame.copy()
    if isinstance(value, str):
        frame = frame.astype(object)
    frame.iloc[row, column] = value
    return frame


def fit(frame):
    from finediff import GaussianGenerator

    return GaussianGenerator(random_state=0).fit(frame)


def gaussian():
    return fit(returns())


@cache
def ridge():
    from finediff import RidgeScoreGenerator

    return RidgeScoreGenerator(random_state=0).fit(returns())


def command(*arguments):
    """The error line of the command line; its exit code must be 2 and nothing may be written."""
    from finediff.cli import main

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        prices().to_csv("prices.csv")
        put(prices(), 10, 1, np.nan).to_csv("gap.csv")
        put(prices(), 10, 1, 100 * prices().iloc[10, 1]).to_csv("slip.csv")
        returns().to_csv("returns.csv")
        returns().cov().to_csv("covariance.csv")
        Path("groups.csv").write_text("asset,group\nAAA,tech\nBBB,tech\n")
        gaussian().save("gaussian")
        ridge().save("ridge")
        Path("words.csv").write_text("Date,AAA\n2020-01-01,cheap\n2020-01-02,dear\n")
        before = set(Path.cwd().rglob("*"))
        errors = StringIO()
        with (
            mock.patch.object(sys, "argv", ["finediff", *arguments]),
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(StringIO()),
            pytest.raises(SystemExit) as stop,
        ):
            main()
        assert stop.value.code == 2
        assert set(Path.cwd().rglob("*")) == before
        lines = [line for line in errors.getvalue().splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, lines
        raise ValueError(lines[0])


def solve(objective, **data):
    import finediff.portfolio as portfolio

    return getattr(portfolio, objective)(constraints=data.pop("constraints", ())).solve(**data)


def call(path: str, *arguments, **keywords):
    import finediff

    return getattr(finediff, path)(*arguments, **keywords)


# (what goes in, the call, a fragment of what is said)
TABLE = [
    ("a missing return", lambda: fit(put(returns(), 5, 1, np.nan)), "NaN (a missing value) in column 'BBB'"),
    ("an infinite return", lambda: fit(put(returns(), 5, 2, np.inf)), "infinity (inf) in column 'CCC'"),
    ("a text column", lambda: fit(put(returns(), 5, 0, "n/a")), "text in column 'AAA'"),
    ("one row", lambda: fit(returns(1)), "minimum of 2 is required"),
    ("prices as returns", lambda: fit(prices()), "look like prices"),
    ("returns in percent", lambda: fit(100 * returns()), "per cent"),
    ("three rows for three assets", lambda: fit(returns(3)), "at least 50 returns"),
    ("a late listing", lambda: call("to_returns", put(prices(), slice(0, 40), 1, np.nan)), "missing"),
    ("a negative price", lambda: call("to_returns", put(prices(), 7, 1, -3.0)), "BBB"),
    ("dates twice", lambda: call("to_returns", pd.concat([prices(), prices()])), "date"),
    ("dates backwards", lambda: call("split", returns().iloc[::-1]), "increasing"),
    ("no scenarios", lambda: gaussian().sample(0), "expected n_samples to be a positive integer, got 0"),
    (
        "half a scenario",
        lambda: gaussian().sample(2.5),
        "expected n_samples to be a positive integer, got 2.5",
    ),
    ("sampling before fitting", lambda: call("GaussianGenerator").sample(5), "not fitted"),
    ("loading what was never saved", lambda: type(gaussian()).load("nowhere"), "without generator.json"),
    ("an unknown device", lambda: call("DDPMGenerator", device="gpu0").fit(returns()), "try device='cpu'"),
    (
        "a held-out share above 1",
        lambda: call("DDPMGenerator", held_out=2).fit(returns()),
        "a share in [0, 1)",
    ),
    ("a t with one degree of freedom", lambda: call("StudentTGenerator", dof=1).fit(returns()), "infinite"),
    (
        "an unknown bootstrap",
        lambda: call("BootstrapGenerator", method="moving").fit(returns()),
        "'iid' or 'stationary'",
    ),
    (
        "more factors than assets",
        lambda: call("FactorDiffusionGenerator", n_factors=5).fit(returns()),
        "at most 3 factors",
    ),
    (
        "an unknown way to count factors",
        lambda: call("FactorDiffusionGenerator", n_factors="scree").fit(returns()),
        "expected n_factors to be a whole number",
    ),
    (
        "an asset that was never traded",
        lambda: call("FactorDiffusionGenerator").fit(put(returns(), slice(None), 1, np.nan)),
        "drop what was never traded",
    ),
    (
        "windows of two days",
        lambda: call("WindowEnsembleCovariance", (63, 2)).fit(returns()),
        "expected",
    ),
    (
        "an unknown source of a covariance",
        lambda: call("ScenarioCovariance", gaussian(), source="both").fit(returns()),
        "implied",
    ),
    (
        "a CVaR without scenarios",
        lambda: call("MinimumCVaR").solve(covariance=np.eye(3)),
        "scenarios",
    ),
    ("a covariance that is no square", lambda: call("clip", np.ones((2, 3)), 100), "(2, 3)"),
    ("a negative variance", lambda: call("clip", np.diag([1.0, -1.0]), 100), "positive"),
    (
        "maximum Sharpe of falling assets",
        lambda: solve("MaximumSharpe", covariance=np.eye(2), mean=np.array([-1.0, -2.0])),
        "no portfolio attains the highest ratio",
    ),
    (
        "a mean as a column",
        lambda: solve("MeanVariance", covariance=np.eye(2), mean=np.ones((2, 1))),
        "(2, 1)",
    ),
    (
        "too tight a cap",
        lambda: command("optimise", "covariance.csv", "--max-weight", "0.1"),
        "raise the cap",
    ),
    ("scenarios of other assets", lambda: call("validate", returns(), returns().iloc[:, :2]), "columns"),
    ("scenarios in another order", lambda: call("validate", returns(), returns().iloc[:, ::-1]), "order"),
    ("`finediff check` of no file", lambda: command("check", "none.csv"), "no such file"),
    ("`finediff fit` of words", lambda: command("fit", "words.csv"), "expected"),
    ("`finediff fit` of returns as prices", lambda: command("fit", "returns.csv"), "--kind returns"),
    ("`finediff fit` with a price times 100", lambda: command("fit", "slip.csv"), "as a mistyped price does"),
    ("`finediff fit` with a gap", lambda: command("fit", "gap.csv"), "missing"),
    ("`finediff sample` of no model", lambda: command("sample", "model"), "without generator.json"),
    (
        "`finediff sample` of no rows",
        lambda: command("sample", "model", "-n", "0"),
        "expected --n to be a whole number, at least 1, got '0'",
    ),
    (
        "a result into a .txt file",
        lambda: command("covariance", "prices.csv", "--out", "c.txt"),
        ".parquet or .csv",
    ),
    (
        "`finediff optimise` without means",
        lambda: command("optimise", "prices.csv", "--objective", "max-sharpe"),
        "expected --scenarios",
    ),
    (
        "`finediff covariance` of a model and an estimator",
        lambda: command("covariance", "prices.csv", "--model", "model", "--estimator", "qis"),
        "got both",
    ),
    (
        "`finediff optimise` of tails without scenarios",
        lambda: command("optimise", "covariance.csv", "--objective", "min-cvar"),
        "expected --scenarios",
    ),
    (
        "`finediff backtest` against a stranger",
        lambda: command("backtest", "prices.csv", "--reference", "sharpe"),
        "expected --reference among",
    ),
    (
        "`finediff backtest` of too few rows",
        lambda: command("backtest", "prices.csv", "--window", "500"),
        "expected",
    ),
    ("an unknown model", lambda: command("fit", "prices.csv", "--model", "gan"), "got 'gan': choose one"),
    ("a misspelt model", lambda: command("fit", "prices.csv", "--model", "rigde"), "did you mean ridge?"),
    ("a misspelt option", lambda: command("fit", "prices.csv", "--modle", "ridge"), "did you mean --model?"),
    ("an unknown option", lambda: command("fit", "prices.csv", "--jobs", "2"), "finediff fit --help lists"),
    ("a misspelt command", lambda: command("backtset", "prices.csv"), "did you mean backtest?"),
    ("a command without its panel", lambda: command("fit"), "expected panel ("),
    ("an option without its value", lambda: command("fit", "prices.csv", "--seed"), "a value after --seed"),
    ("a flag with a value", lambda: command("backtest", "p.csv", "--long-only=yes"), "leave it out"),
    ("two panels", lambda: command("fit", "prices.csv", "more.csv"), "got more.csv besides"),
    (
        "a word for a number",
        lambda: command("sample", "ridge", "-n", "many"),
        "whole number, at least 1, got 'many'",
    ),
    (
        "`finediff fit --missing keep` with the default",
        lambda: command("fit", "gap.csv", "--missing", "keep"),
        "choose --model factor",
    ),
    (
        "`finediff report --missing keep`",
        lambda: command("report", "gap.csv", "--missing", "keep"),
        "expected --missing drop_rows or drop_assets",
    ),
    (
        "a stress of a stranger",
        lambda: command("sample", "ridge", "--stress", "AAB=-.1"),
        "did you mean AAA?",
    ),
    (
        "`finediff sample` of more than a file holds",
        lambda: command("sample", "ridge", "-n", 10**11),
        "--out scenarios",
    ),
    ("a stress in percent", lambda: command("sample", "ridge", "--stress", "AAA=-10%"), "AAPL=-0.07 is -7 %"),
    ("a stress without a number", lambda: command("sample", "ridge", "--stress", "AAA"), "ASSET=RETURN"),
    (
        "an infinite stress",
        lambda: command("sample", "ridge", "--stress", "AAA=inf"),
        "got 'inf': AAPL=-0.07 is -7 %",
    ),
    (
        "a stress by a band without ends",
        lambda: command("sample", "ridge", "--stress", "AAA=:"),
        "it would hold for every return",
    ),
    (
        "a stress of what cannot be steered",
        lambda: command("sample", "gaussian", "--stress", "AAA=-.1"),
        "finediff fit --model ridge",
    ),
    (
        "a limit of an unknown group",
        lambda: command("optimise", "covariance.csv", "--groups", "groups.csv", "--group-max", "teck=.3"),
        "did you mean tech?",
    ),
    (
        "prices for scenarios",
        lambda: command("optimise", "covariance.csv", "--objective", "min-cvar", "--scenarios", "prices.csv"),
        "turn prices into returns",
    ),
    (
        "a limit in percent",
        lambda: command("optimise", "covariance.csv", "--groups", "groups.csv", "--group-max", "tech=10"),
        "write tech=0.1 for 10 %",
    ),
    (
        "a limit without groups",
        lambda: command("optimise", "covariance.csv", "--group-max", "tech=.3"),
        "expected --groups together with",
    ),
    (
        "groups that are no groups",
        lambda: command("optimise", "covariance.csv", "--groups", "prices.csv", "--group-max", "tech=.3"),
        "the columns asset and group",
    ),
]


def said(action) -> str:
    """The message of the error or warning, on one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            action()
        except (ValueError, TypeError, UserWarning) as problem:
            return " ".join(str(problem).split())
    return ""


@pytest.mark.parametrize(("what", "action", "fragment"), TABLE, ids=[row[0] for row in TABLE])
def test_bad_input_is_one_clear_sentence(what, action, fragment):
    message = said(action)
    assert fragment in message
    assert len(message) < 600
    assert "Traceback" not in message


def document() -> str:
    rows = "".join(f"| {what} | {said(action)} |\n".replace("  ", " ") for what, action, _ in TABLE)
    return (
        "# What finediff says to bad input\n\n"
        "In Python a `ValueError` (a `PanelWarning` where it only looks wrong); on the command line one line and exit code 2.\n"
        "Written by `python tests/test_bad_input.py`, checked by the tests.\n\n"
        "| input | message |\n|---|---|\n" + rows
    )


def test_the_document_is_up_to_date():
    assert re.sub(r"\s+", " ", DOCUMENT.read_text()) == re.sub(r"\s+", " ", document())


if __name__ == "__main__":
    DOCUMENT.write_text(document())
