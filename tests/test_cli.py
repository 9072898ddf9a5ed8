"""The command line: the verbs in a row, exit codes, whole results."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from finediff.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """finediff in this process: (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["finediff", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def prices(tmp_path_factory):
    """Prices of four assets over 600 days, in a file."""
    rng = np.random.default_rng(0)
    returns = 0.01 * (rng.standard_t(5, (600, 1)) + rng.standard_t(5, (600, 4)))
    frame = pd.DataFrame(
        100 * np.cumprod(1 + returns, axis=0),
        columns=list("ABCD"),
        index=pd.bdate_range("2015-01-01", periods=600, name="Date"),
    )
    path = tmp_path_factory.mktemp("panel") / "prices.parquet"
    frame.to_parquet(path)
    return path


def test_the_verbs_in_a_row(run, prices, tmp_path):
    model, scenarios = tmp_path / "model", tmp_path / "scenarios.parquet"
    covariance, weights = tmp_path / "covariance.parquet", tmp_path / "weights.csv"
    assert run("check", prices)[0] == 0
    assert run("fit", prices, "--out", model, "--model", "student-t", "--seed", 3)[0] == 0
    assert run("sample", model, "-n", 3000, "--out", scenarios, "--seed", 4)[0] == 0
    assert run("covariance", prices, "--model", model, "--out", covariance)[0] == 0
    assert run("optimise", covariance, "--max-weight", 0.4, "--out", weights)[0] == 0
    code, text, _ = run("validate", prices, scenarios, "--out", tmp_path / "validation.csv")
    assert code == 0
    assert "real-vs-real floor" in text

    drawn = pd.read_parquet(scenarios)
    assert list(drawn.columns) == list("ABCD")
    assert len(drawn) == 3000
    # The t's own covariance, within four standard errors of 3,000 draws with nu near 5.
    real = pd.read_parquet(prices).pct_change().dropna()
    assert np.allclose(drawn.std(), real.std(), rtol=4 * np.sqrt(8 / 4 / 3000) + 0.1)
    held = pd.read_csv(weights, index_col=0)["weight"]
    assert held.sum() == pytest.approx(1, abs=1e-9)
    assert held.max() <= 0.4 + 1e-9

    about = json.loads((tmp_path / "scenarios.manifest.json").read_text())
    assert about["seed"] == 4
    assert about["versions"]["torch"]
    assert len(about["data"]["sha256"]) == 64
    for name in (
        "model/manifest.json",
        "covariance.manifest.json",
        "weights.manifest.json",
        "validation.manifest.json",
    ):
        assert (
            json.loads((tmp_path / name).read_text())["command"]
            in name.replace("weights", "optimise") + " fit validate"
        )


def test_same_seed_same_bits(run, prices, tmp_path):
    for name in ("a", "b"):
        assert run("fit", prices, "--out", tmp_path / name, "--steps", 5, "--seed", 7)[0] == 0
        assert (
            run("sample", tmp_path / name, "-n", 50, "--out", tmp_path / f"{name}.csv", "--seed", 8)[0] == 0
        )
    assert (tmp_path / "a/arrays.safetensors").read_bytes() == (
        tmp_path / "b/arrays.safetensors"
    ).read_bytes()
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_check_tells_clean_from_findings_from_unreadable(run, prices, tmp_path):
    assert run("check", prices)[:2] == (0, "600 rows, 4 assets, no findings\n")
    frame = pd.read_parquet(prices)
    frame.iloc[10:40, 1] = frame.iloc[10, 1]
    stale, gap, unsorted = tmp_path / "stale.csv", tmp_path / "gap.csv", tmp_path / "unsorted.csv"
    frame.to_csv(stale)
    holed = frame.copy()
    holed.iloc[100, 2] = np.nan
    holed.to_csv(gap)
    frame.iloc[::-1].to_csv(unsorted)
    for path, word in ((stale, "stale_prices"), (gap, "missing_values"), (unsorted, "unsorted_dates")):
        code, text, _ = run("check", path)
        assert code == 1
        assert word in text
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    code, text, error = run("check", tmp_path / "broken.parquet")
    assert code == 2
    assert text == ""
    assert error.startswith("error: expected a table")


def test_a_name_that_cannot_be_written_is_refused_before_the_work(run, prices, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "finediff.generators.DDPMGenerator.fit", lambda *_: pytest.fail("it was trained in vain")
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    code, _, error = run("fit", prices, "--out", tmp_path / "mine")
    assert code == 2
    assert "nothing of yours is lost" in error
    code, _, error = run("sample", tmp_path / "no model yet", "--out", tmp_path / "s.txt")
    assert code == 2
    assert "expected a file ending in .parquet or .csv" in error


def test_doctor_names_versions(run):
    code, text, _ = run("doctor")
    assert code == 0
    assert "torch" in text
    assert "GPU" in text


def test_demo_writes_everything(run, tmp_path):
    out = tmp_path / "demo"
    code, text, error = run("demo", "--out", out, "--steps", 20, "--start", "2018-01-01", "--jobs", 1)
    assert code == 0, error
    assert text == f"report: {out / 'report.html'}\n"
    names = {"report.html", "scenarios.parquet", "covariance.parquet", "weights.csv", "manifest.json"}
    assert {path.name for path in out.iterdir()} == names
    assert pd.read_parquet(out / "scenarios.parquet").shape == (10_000, 20)
    page = (out / "report.html").read_text()
    for name in ("ddpm", "flow", "gaussian", "student-t", "bootstrap", "block-bootstrap", "real vs real"):
        assert name in page
    assert "independent in time" in page
    # A second run replaces the first whole; a directory of somebody else's is left alone.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    code, _, error = run("demo", "--out", tmp_path / "mine", "--steps", 1)
    assert code == 2
    assert "nothing of yours is lost" in error
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_sample_leaves_no_half_file(prices, tmp_path, run, how):
    assert run("fit", prices, "--out", tmp_path / "model", "--steps", 2)[0] == 0
    command = [
        sys.executable,
        "-m",
        "finediff.cli",
        "sample",
        "model",
        "-n",
        "3000000",
        "--out",
        "scenarios.parquet",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    time.sleep(6)
    assert process.poll() is None, "it was finished before it could be killed"
    process.send_signal(how)
    process.wait(timeout=30)
    assert not list(tmp_path.glob("*.parquet"))
    assert not list(tmp_path.glob("*.manifest.json"))


def test_backtest_is_walk_forward(run, prices, tmp_path):
    from sklearn.covariance import LedoitWolf

    from finediff.backtest import walk_forward
    from finediff.portfolio import LongOnly, MinimumVariance

    arguments = ("--window", 200, "--step", 50, "--long-only", "--costs", 0.001, "--jobs", 1)
    chosen = ("--estimator", "ledoit-wolf", "--estimator", "clip", "--model", "gaussian")
    code, text, _ = run("backtest", prices, "--out", tmp_path / "walk", *arguments, *chosen)
    assert code == 0
    assert "8 decisions" in text
    assert "t of volatility against gaussian" in text
    returns = pd.read_parquet(prices).pct_change().dropna()
    strategies = {"ledoit-wolf": LedoitWolf()}
    twin = walk_forward(returns, strategies, 200, 50, MinimumVariance([LongOnly()]), costs=0.001)
    found = pd.read_parquet(tmp_path / "walk/returns.parquet")
    assert list(found) == ["equal weights", "ledoit-wolf", "clip", "gaussian"]
    assert np.array_equal(found["ledoit-wolf"], twin.returns["ledoit-wolf"])
    summary = pd.read_csv(tmp_path / "walk/summary.csv", index_col=0)
    assert summary.loc["ledoit-wolf", "annual volatility"] == pytest.approx(
        np.sqrt(252) * found["ledoit-wolf"].std(), rel=1e-3
    )


def test_every_estimator_and_objective_by_its_name(run, prices, tmp_path):
    from finediff.cli.options import Estimator, Objective

    matrix, real = tmp_path / "covariance.csv", pd.read_parquet(prices).pct_change().dropna()
    for estimator in Estimator:
        code, text, _ = run("covariance", prices, "--estimator", estimator.value, "--out", matrix)
        assert (code, text.split(":")[0]) == (0, estimator.value)
        variances = np.diag(pd.read_csv(matrix, index_col=0))
        assert np.allclose(variances, real.var(), rtol=0.5)  # another window, other tails
    real.to_parquet(tmp_path / "returns.parquet")
    for objective in Objective:
        weights = tmp_path / f"{objective.value}.csv"
        with_rows = ("--scenarios", tmp_path / "returns.parquet")
        assert run("optimise", matrix, "--objective", objective.value, *with_rows, "--out", weights)[0] == 0
        held = pd.read_csv(weights, index_col=0)["weight"]
        assert held.sum() == pytest.approx(1, abs=1e-8)
        assert (held >= -1e-9).all()


def test_a_panel_with_holes_feeds_the_factor_model(run, prices, tmp_path):
    frame = pd.read_parquet(prices)
    frame.iloc[:250, 1] = np.nan
    frame.to_parquet(tmp_path / "late.parquet")
    arguments = ("fit", tmp_path / "late.parquet", "--model", "factor", "--out", tmp_path / "model")
    assert run(*arguments)[0] == 2
    assert run(*arguments, "--missing", "keep")[0] == 0
    assert run("sample", tmp_path / "model", "-n", 500, "--out", tmp_path / "many")[0] == 0
    drawn = pd.read_parquet(tmp_path / "many")
    assert list(drawn.columns) == list("ABCD")
    assert drawn["B"].std() == pytest.approx(frame["B"].pct_change(fill_method=None).std(), rel=0.4)


def started(folder, *arguments):
    """finediff in a process group of its own, which a terminal's Ctrl-C would reach whole."""
    return subprocess.Popen(
        [sys.executable, "-m", "finediff.cli", *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listening,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def listening():
    """Signals as a terminal leaves them: what the tests' own shell ignores, as in the background, a child would too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def processes(group):
    """Running processes of a group; those that only wait for their parent's answer are gone."""
    found = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if line.split()[0] == str(group) and "Z" not in line]


def seconds_of_work(process):
    """CPU time of a process, whole seconds."""
    found = subprocess.run(["ps", "-o", "cputimes=", "-p", str(process)], capture_output=True, text=True)
    return int(found.stdout or 0)


def killed_worker(walk):
    workers = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    mine = [line.split() for line in workers.splitlines() if "LokyProcess" in line]
    os.kill(int(next(pid for pid, parent, *_ in mine if parent == str(walk.pid))), signal.SIGKILL)


def many_interrupts(walk):
    for _ in range(20):
        os.killpg(walk.pid, signal.SIGINT)
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("how", "code", "begins"),
    [
        (many_interrupts, 130, "stopped: "),
        (lambda walk: walk.send_signal(signal.SIGHUP), 129, "stopped: "),
        (
            killed_worker,
            1,
            "error: expected the workers to live, got one killed by the system (SIGKILL), usually because memory ran out: "
            "choose fewer --jobs; ",
        ),
    ],
    ids=["Ctrl-C", "SIGHUP", "worker"],
)
def test_a_stopped_backtest_says_how_to_go_on(prices, tmp_path, how, code, begins):
    # Networks with many steps: it cannot be finished before it is stopped.
    arguments = (
        "backtest",
        prices,
        "--estimator",
        "qis",
        "--model",
        "ddpm",
        "--steps",
        10**6,
        "--resume",
        "kept",
    )
    walk = started(tmp_path, *arguments, "--window", 500, "--jobs", 2)
    while not list(tmp_path.glob("kept/parts/*")):
        assert walk.poll() is None
        time.sleep(0.1)
    how(walk)
    out, error = walk.communicate(timeout=60)
    assert (walk.returncode, out) == (code, "")
    start, *others, stop = error.splitlines()
    # A worker that is only starting when the whole group is interrupted says so itself.
    assert not others or how is many_interrupts, error
    assert (
        start
        == "backtest: 5 windows x 3 strategies = 15 portfolios of 4 assets, minimum variance, long and short"
    )
    assert stop.startswith(begins)
    assert stop.endswith("of 15 portfolios are kept in kept, and the same command goes on from them")
    assert int(stop.removeprefix(begins).split()[0]) > 0
    assert not list(tmp_path.glob("**/*partial*"))
    assert not (tmp_path / "reports/backtest").exists()
    for _ in range(50):
        if not processes(walk.pid):
            break
        time.sleep(0.1)
    assert not processes(walk.pid)


@pytest.mark.parametrize(
    ("verb", "how", "code"),
    [("fit", signal.SIGINT, 130), ("report", signal.SIGTERM, 143)],
)
def test_a_stopped_command_says_so_in_one_line(prices, tmp_path, verb, how, code):
    slow = ("--model", "ddpm", "--steps", 10**6, "--out", "result")
    process = started(tmp_path, verb, prices, *slow, *(("--jobs", 1) if verb == "report" else ()))
    while (
        process.poll() is None and seconds_of_work(process.pid) < 2
    ):  # by then it is under way, however busy the machine
        time.sleep(0.1)
    assert process.poll() is None, "it was finished before it could be stopped"
    os.killpg(process.pid, how)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert error.splitlines()[-1] == "stopped: nothing was written"
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(prices, tmp_path, unbuffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "finediff.cli", "check", str(prices)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        ("check prices >&-", 0, ""),
        ("check prices >&- 2>&-", 0, ""),
        ("fitt 2>/dev/full", 2, ""),
        ("fitt 2>&-", 2, ""),
        ("check prices >/dev/full", 2, "No space left on device"),
    ],
)
def test_a_stream_that_takes_nothing_leaves_the_exit_code(prices, end, code, told):
    shell = f"{sys.executable} -m finediff.cli {end.replace('prices', str(prices))}"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == bool(told)


def test_a_backtest_in_a_pipe_says_what_it_does(run, prices, tmp_path):
    arguments = ("backtest", prices, "--estimator", "oas", "--window", 300, "--step", 100, "--jobs", 1)
    kept = ("--resume", tmp_path / "kept", "--out", tmp_path / "walk", "--long-only")
    code, text, error = run(*arguments, *kept)
    start, end = error.splitlines()
    assert code == 0
    assert (
        start == "backtest: 3 windows x 2 strategies = 6 portfolios of 4 assets, minimum variance, long-only"
    )
    assert end.startswith("done in ")
    assert text.splitlines()[-1].startswith("3 decisions, ")
    assert ", minimum variance, long-only: " in text
    assert f"long-only; 6 kept in {tmp_path / 'kept'}\n" in run(*arguments, *kept)[2]


def test_a_stress_is_kept_by_every_scenario(run, prices, tmp_path):
    assert run("fit", prices, "--out", tmp_path / "model")[0] == 0
    wishes = ("--stress", "A=-0.07", "--stress", "C=-0.01:0.02", "--stress", "D=:0.03")
    for name in ("drawn.parquet", "drawn"):
        code, text, _ = run("sample", tmp_path / "model", "-n", 400, *wishes, "--out", tmp_path / name)
        assert code == 0
        assert "under A=-0.07, C=-0.01:0.02, D=:0.03," in text
        drawn = pd.read_parquet(tmp_path / name)
        assert np.allclose(drawn["A"], -0.07, atol=1e-6)
        assert drawn["C"].between(-0.01 - 1e-6, 0.02 + 1e-6).all()
        assert drawn["D"].max() <= 0.03 + 1e-6
        assert drawn["B"].mean() < -0.01  # half of its variance is the market's
    about = json.loads((tmp_path / "drawn.manifest.json").read_text())
    assert "A=-0.07" in about["configuration"]["stress"]


def test_limits_of_groups_hold(run, prices, tmp_path):
    covariance, groups, weights = tmp_path / "c.csv", tmp_path / "groups.csv", tmp_path / "w.csv"
    code, text, _ = run("covariance", prices, "--out", covariance)
    assert code == 0
    assert text.startswith("window-ensemble: ")
    assert run("covariance", prices, "--clean", "--out", covariance)[1].startswith("sample: ")
    assert "min-variance, long-only: " in run("optimise", covariance, "--out", weights)[1]
    free = pd.read_csv(weights, index_col=0)["weight"]
    groups.write_text("asset,group\nA,north\nB,north\nC,south\n")
    limits = ("--groups", groups, "--group-max", "north=0.2", "--group-min", "south=0.5")
    code, text, error = run("optimise", covariance, *limits, "--no-long-only", "--out", weights)
    held = pd.read_csv(weights, index_col=0)["weight"]
    assert code == 0
    assert "min-variance, long and short, north=0.2 at most, south=0.5 at least: " in text
    assert "no group limit holds for D" in error
    assert free[["A", "B"]].sum() > 0.21
    assert free["C"] < 0.49
    assert held[["A", "B"]].sum() == pytest.approx(0.2, abs=1e-6)
    assert held["C"] == pytest.approx(0.5, abs=1e-6)
