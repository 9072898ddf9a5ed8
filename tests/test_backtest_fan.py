"""Workers and stores: the same numbers from one process, two and Ray; a killed run goes on."""

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.covariance import OAS, LedoitWolf

from finediff.backtest import Strategy, walk_forward
from finediff.backtest.fan import batch_size
from finediff.backtest.store import describe
from finediff.covariance import (
    ClippedCovariance,
    ConstantCorrelationShrinkage,
    FactorAnalyticCovariance,
    QuadraticInverseShrinkage,
    RotationallyInvariantCovariance,
    ScenarioCovariance,
    StudentTCovariance,
    WindowEnsembleCovariance,
    clip,
)
from finediff.generators import BootstrapGenerator, SmoothedBootstrapGenerator, StudentTGenerator
from finediff.portfolio import (
    LongOnly,
    MaximumSharpe,
    MinimumCVaR,
    MinimumVariance,
    TransactionCost,
    Turnover,
)


def panel(n=300, d=6, seed=0):
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((n, 1)) + rng.standard_t(5, (n, d))) * np.linspace(0.005, 0.02, d)
    return pd.DataFrame(rows, pd.bdate_range("2001-01-01", periods=n), [f"a{i}" for i in range(d)])


def several():
    newton = MinimumCVaR(constraints=[LongOnly()], method="newton")
    return {
        "1/N": "equal",
        "t": StudentTCovariance(),
        "factors": FactorAnalyticCovariance(),
        "ensemble": (WindowEnsembleCovariance((30, 80)), MinimumVariance([LongOnly()])),
        "scenarios": Strategy(StudentTGenerator(), newton, n_scenarios=400),
        "re-estimated": ScenarioCovariance(SmoothedBootstrapGenerator(), cleaner=clip, n_scenarios=500),
        "limited": (LedoitWolf(), MinimumVariance([LongOnly(), Turnover(limit=0.2)])),
        "limited scenarios": Strategy(
            BootstrapGenerator(),
            MinimumCVaR(constraints=[LongOnly(), TransactionCost(1e-3)], method="newton"),
            n_scenarios=300,
        ),
    }


SETTINGS = {"window": 100, "step": 15, "costs": 0.001, "initial": "equal"}


def same(a, b):
    pd.testing.assert_frame_equal(a.returns, b.returns, check_exact=True)
    pd.testing.assert_frame_equal(a.weights, b.weights, check_exact=True)
    pd.testing.assert_frame_equal(a.costs, b.costs, check_exact=True)


# ------------------------------------------------------------------ workers


def test_one_process_and_two_give_the_same_numbers():
    x = panel()
    one = walk_forward(x, several(), **SETTINGS)
    same(one, walk_forward(x, several(), n_jobs=2, **SETTINGS))
    same(one, walk_forward(x, several(), batch=3, **SETTINGS))
    same(one, walk_forward(x, several(), n_jobs=2, backend="threading", batch=1, **SETTINGS))


def test_an_error_in_a_worker_says_whose_it_is_and_when():
    x = panel()
    x["copy"] = x["a0"]
    with pytest.raises(ValueError, match=r"'plain' on 2001-05-18.*invertible covariance"):
        walk_forward(
            x, {"shrunk": LedoitWolf(), "plain": "history"}, n_jobs=2, backend="threading", **SETTINGS
        )


def test_an_error_while_workers_are_busy_is_told_alone():
    limited = (LedoitWolf(), MinimumVariance([LongOnly(), Turnover(limit=0.2)]))  # from cash
    settings = SETTINGS | {"initial": None, "step": 5}
    with pytest.raises(ValueError, match=r"'limited' on 2001-05-18.*Turnover"):
        walk_forward(panel(800), {"limited": limited, "t": StudentTCovariance()}, n_jobs=2, **settings)


def test_batches_are_neither_too_few_nor_too_long():
    assert batch_size(400, 2) == 16
    assert batch_size(40, 2) == 5
    assert batch_size(3, 8) == 1
    assert batch_size(40, 2, 7) == 7


def test_ray_gives_the_same_numbers(tmp_path):
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'finediff[distributed]'")
    code = """
        import sys
        import ray
        sys.path.insert(0, {tests!r})
        from test_backtest_fan import SETTINGS, panel, same, several
        from finediff.backtest import walk_forward
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        far = walk_forward(panel(), several(), n_jobs=2, backend="ray", **SETTINGS)
        same(walk_forward(panel(), several(), **SETTINGS), far)
        ray.shutdown()
        print("the same")
    """
    code = textwrap.dedent(code).format(tests=os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same" in done.stdout


def test_without_ray_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.util.joblib", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'finediff\[distributed\]'"):
        walk_forward(panel(), {"1/N": None}, backend="ray", **SETTINGS)


# ------------------------------------------------------------------ the store


def files(path):
    return {f.name: f.read_bytes() for f in sorted(path.glob("*.*"))}


class Counted(OAS):
    """An OAS that counts its fits, in the class."""

    fits = 0

    def fit(self, X, y=None):
        type(self).fits += 1
        return super().fit(X, y)


def test_a_store_holds_the_result_and_is_not_computed_twice(tmp_path):
    x, given = panel(), {"1/N": None, "oas": Counted()}
    plain = walk_forward(x, given, **SETTINGS)
    kept = walk_forward(x, given, store=tmp_path / "run", **SETTINGS)
    fits = Counted.fits
    again = walk_forward(x, given, store=tmp_path / "run", batch=2, **SETTINGS)
    assert Counted.fits == fits
    same(plain, kept)
    same(plain, again)
    pd.testing.assert_series_equal(again.seconds, kept.seconds)
    table = pd.read_parquet(tmp_path / "run" / "returns.parquet")
    np.testing.assert_array_equal(table["oas"], plain.returns["oas"])
    weights = pd.read_parquet(tmp_path / "run" / "weights.parquet")
    np.testing.assert_array_equal(weights, plain.weights)


def test_part_of_the_windows_is_enough(tmp_path):
    """Lost parts, of strategies that depend on the weights held as well, are computed again to the last bit."""
    x = panel()
    walk_forward(x, several(), store=tmp_path / "a", batch=2, **SETTINGS)
    whole = files(tmp_path / "a")
    parts = sorted((tmp_path / "a" / "parts").iterdir())
    late = [file for file in parts if int(file.stem.partition("-")[2]) >= 4]
    assert 0 < len(late) < len(parts)
    for file in late:
        file.unlink()
    (tmp_path / "a" / "returns.parquet").unlink()
    (tmp_path / "a" / "parts" / ".half.partial.safetensors").write_bytes(b"torn")
    walk_forward(x, several(), store=tmp_path / "a", n_jobs=2, batch=3, **SETTINGS)
    assert files(tmp_path / "a") == whole


KILLED = """
    import sys, time
    sys.path.insert(0, {tests!r})
    from test_backtest_fan import SETTINGS, panel
    from sklearn.covariance import OAS
    from finediff.backtest import walk_forward
    from finediff.portfolio import MinimumVariance, TransactionCost

    class Slow(OAS):
        __module__, __qualname__ = "slow", "Slow"

        def fit(self, X, y=None):
            time.sleep({pause})
            return super().fit(X, y)

    given = {{"slow": Slow(), "thrifty": (Slow(), MinimumVariance([TransactionCost(1e-5)]))}}
    walk_forward(panel(), given, store=sys.argv[1], batch=1, **SETTINGS)
"""


def test_killed_and_resumed_gives_the_same_files(tmp_path):
    tests = os.path.dirname(os.path.abspath(__file__))

    def started(path, pause):
        code = textwrap.dedent(KILLED).format(tests=tests, pause=pause)
        return subprocess.Popen([sys.executable, "-c", code, str(path)], stderr=subprocess.PIPE, text=True)

    whole, killed = started(tmp_path / "whole", 0), started(tmp_path / "killed", 0.2)
    parts = tmp_path / "killed" / "parts"
    for _ in range(1200):
        if parts.exists() and len(list(parts.glob("[0-9]*"))) >= 3:
            break
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert whole.wait(120) == 0, whole.stderr.read()
    whole.stderr.close()
    assert 3 <= len(list(parts.glob("[0-9]*"))) < 2 * 14
    assert not (tmp_path / "killed" / "returns.parquet").exists()
    resumed = started(tmp_path / "killed", 0)
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"x": panel(seed=1)}, "returns"),
        ({"x": panel().rename(columns={"a0": "b0"})}, "assets"),
        ({"given": {"shrunk": LedoitWolf(assume_centered=True)}}, "strategies"),
        ({"given": {"renamed": LedoitWolf()}}, "strategies"),
        ({"given": {"shrunk": (LedoitWolf(), MinimumVariance([LongOnly()]))}}, "strategies"),
        ({"given": {"shrunk": Strategy(LedoitWolf(), window=50)}}, "strategies"),
        ({"step": 16}, "settings"),
        ({"costs": 0.002}, "settings"),
        ({"coverage": 0.5}, "settings"),
        ({"still": 0.5}, "settings"),
    ],
)
def test_a_store_of_another_job_is_refused(tmp_path, change, different):
    def job(x=None, given=None, **settings):
        given = {"shrunk": LedoitWolf()} if given is None else given
        walk_forward(
            panel() if x is None else x, given, store=tmp_path / "run", **(SETTINGS | {"step": 80} | settings)
        )

    job()
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"different: [a-z, ]*{different}.*do name another directory"):
        job(**change)
    assert files(tmp_path / "run") == before
    job()


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"expected a new or empty directory.*job.json"):
        walk_forward(panel(), {"1/N": None}, store=tmp_path, **SETTINGS)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "job.json").write_text("{")
    with pytest.raises(ValueError, match="got one of another"):
        walk_forward(panel(), {"1/N": None}, store=tmp_path / "torn", **SETTINGS)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_descriptions_tell_settings_apart_and_are_json():
    def one(c, n):
        return clip(c, n, level=0.01)

    def two(c, n):
        return clip(c, n, level=0.05)

    things = [
        LedoitWolf(),
        LedoitWolf(block_size=10),
        OAS(),
        ScenarioCovariance(BootstrapGenerator()),
        ScenarioCovariance(BootstrapGenerator(method="stationary")),
        ScenarioCovariance(BootstrapGenerator(), cleaner=clip),
        ScenarioCovariance(BootstrapGenerator(), cleaner=one),
        ScenarioCovariance(BootstrapGenerator(), cleaner=two),
        ScenarioCovariance(BootstrapGenerator(), cleaner=functools.partial(clip, level=0.05)),
        np.arange(4.0),
        np.arange(4.0)[::-1],
        np.arange(4),
        pd.Series([1.0, 2.0]),
        pd.Series([1.0, 2.0], ["a", "b"]),
        panel(10),
        panel(10, seed=1),
        MinimumVariance(),
        MinimumVariance([LongOnly()]),
        0.1,
        0.2,
        None,
        "none",
        {1, 2},
        np.random.RandomState(0),
        np.random.RandomState(1),
    ]
    texts = [json.dumps(describe(thing), sort_keys=True) for thing in things]
    assert len(set(texts)) == len(things)
    assert texts[0] == json.dumps(describe(LedoitWolf()), sort_keys=True)


def test_the_bar_counts_every_window(capsys):
    walk_forward(panel(), {"1/N": None, "shrunk": LedoitWolf()}, progress=True, **SETTINGS)
    assert "28/28" in capsys.readouterr().err


# ------------------------------------------------------------------ closed forms of many windows in one go

CLOSED = {
    "clip": ClippedCovariance(),
    "shrunk": QuadraticInverseShrinkage(),
    "short": Strategy(QuadraticInverseShrinkage(), window=40),
    "constant": (ConstantCorrelationShrinkage(), MaximumSharpe([LongOnly()])),
    "ensemble": (WindowEnsembleCovariance((30, 80)), MaximumSharpe([LongOnly()])),
    "limited": (RotationallyInvariantCovariance(), MinimumVariance([LongOnly(), Turnover(limit=0.2)])),
}


def test_closed_forms_are_computed_together_to_the_same_bits(monkeypatch):
    rows = panel()
    rows.iloc[:130, 1] = np.nan  # listed late: assets differ between windows of one task
    rows.iloc[200:, 3] = np.nan
    together = walk_forward(rows, CLOSED, minimum=60, **SETTINGS)
    stacked, original = [], Strategy.many_inputs

    def counted(self, histories):
        found = original(self, histories)
        stacked.append(found is not None and len(histories) > 1)
        return found

    monkeypatch.setattr(Strategy, "many_inputs", counted)
    same(together, walk_forward(rows, CLOSED, minimum=60, batch=4, **SETTINGS))
    assert any(stacked)
    assert not all(stacked)
    monkeypatch.setattr(Strategy, "many_inputs", lambda self, histories: None)
    same(together, walk_forward(rows, CLOSED, minimum=60, **SETTINGS))


def test_a_window_that_fails_among_many_is_named():
    rows = panel()
    rows.iloc[120:160, 2] = 0.0  # stands still over one short window only

    with pytest.raises(ValueError, match=r"'short' on 2001-07-20.*constant column at \[2\]"):
        walk_forward(rows, {"short": Strategy(QuadraticInverseShrinkage(), window=20)}, **SETTINGS)


def test_a_mean_that_was_taken_for_zero_is_not_believed():
    rows = panel() + np.linspace(0, 0.004, 6)
    best = MaximumSharpe([LongOnly()])
    given = {"zero": (ConstantCorrelationShrinkage(assume_centered=True), best), "own": (LedoitWolf(), best)}
    weights = walk_forward(rows, given, **SETTINGS).weights
    for name in given:
        assert weights.loc[name].iloc[:, 3:].sum(axis=1).mean() > 0.6


class Grumbling(LedoitWolf):
    """Warns at every fit, each time of another row."""

    def fit(self, X, y=None):
        warnings.warn(f"a spell that ends at {X.index[-1].date()}", RuntimeWarning, stacklevel=2)
        return super().fit(X)


class Rising(LedoitWolf):
    """Fails at one date, having warned."""

    def fit(self, X, y=None):
        if X.index[-1] > pd.Timestamp("2001-12-01"):
            raise RuntimeError("no fit")
        warnings.warn(f"uneasy on {X.index[-1].date()}", FutureWarning, stacklevel=2)
        return super().fit(X)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_warnings_of_every_fit_are_told_once(n_jobs):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        walk_forward(panel(), {"grumbling": Grumbling(), "quiet": LedoitWolf()}, n_jobs=n_jobs, **SETTINGS)
    mine = [str(one.message) for one in heard if one.category is RuntimeWarning]
    assert mine == ["grumbling: a spell that ends at 2001-05-18 (The first of 14 such warnings.)"]


def test_what_was_said_before_a_failure_is_told():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="'rising' on 2001-12-"):
            walk_forward(panel(), {"rising": Rising()}, batch=2, **SETTINGS)
    assert [str(one.message)[:30] for one in heard if one.category is FutureWarning] == [
        "rising: uneasy on 2001-05-18 ("
    ]


def test_threads_leave_the_place_where_warnings_go_alone():
    for _ in range(3):
        walk_forward(panel(), {"t": LedoitWolf()}, n_jobs=4, backend="threading", batch=1, **SETTINGS)
    with pytest.warns(UserWarning, match="still heard"):
        warnings.warn("still heard", UserWarning, stacklevel=1)


class Latest(QuadraticInverseShrinkage):
    """Has a fit of its own."""

    def fit(self, X, y=None):
        return super().fit(np.asarray(X)[-50:])


def test_a_fit_of_its_own_is_honoured():
    other = Strategy(QuadraticInverseShrinkage(), window=50)
    weights = walk_forward(panel(), {"own": Latest(), "window": other}, **SETTINGS).weights
    pd.testing.assert_frame_equal(weights.loc["own"], weights.loc["window"], rtol=1e-12)
    together = Latest().fit_many(np.stack([panel().to_numpy(), panel(seed=1).to_numpy()]))[1]
    np.testing.assert_array_equal(together[0], Latest().fit(panel()).covariance_)
