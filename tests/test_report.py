"""The report: it stands alone, says what it must, escapes what it is given, and is the same file each time."""

import re
from dataclasses import replace
from functools import cache, cached_property
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from finediff import validation
from finediff.covariance import clip, correlation_from_covariance, n_factors
from finediff.diffusion.train import History
from finediff.generators import BootstrapGenerator, GaussianGenerator, StudentTGenerator
from finediff.panel import Finding, random_split, split
from finediff.portfolio import LongOnly, MinimumVariance
from finediff.report import figures
from finediff.report.metrics import METRICS
from finediff.report.render import render, write_report
from finediff.report.verdicts import _dependence as dependence_verdict
from finediff.report.verdicts import _fit as fit_verdict
from finediff.report.verdicts import _generators as generators_verdict
from finediff.report.verdicts import _tail as tail_verdict
from finediff.report.verdicts import walk_verdict
from finediff.report.walk import ENSEMBLE, EQUAL, HISTORY, NONLINEAR, QUARTER, Walks, walks
from finediff.risk import annual_volatility, tail_risk_table
from finediff.validation.floor import badness

ODD = '<b>&X"'
KEYS = ["panel", "training", "fit", "dependence", "covariance", "portfolio", "walk-forward", "tail risk"]
KEYS += ["generators"]
FIGURES = 11


def panel(d, n=360, seed=3):
    rng = np.random.default_rng(seed)
    market = rng.standard_t(4, (n, 1))
    x = 0.01 * (market * rng.uniform(0.3, 1, d) + rng.standard_t(4, (n, d)))
    names = [ODD, "$a_b$", *(f"Asset {i}" for i in range(d))][:d]
    return pd.DataFrame(x, columns=names, index=pd.bdate_range("2020-01-01", periods=n, name="Date"))


def judged(name, rivals, train, test):
    """As `finediff.report.study.SplitResult`."""
    drawn = {k: g.fit(train).sample(400, random_state=1) for k, g in rivals.items()}
    found = validation.judge(test, drawn, train, n_portfolios=10, n_null=20, random_state=0)
    costs = pd.DataFrame({"fit s": 0.1, "sample s": 0.01, "network evaluations": 0}, index=list(rivals))
    return SimpleNamespace(
        description=f"30 % of the rows, {name}",
        table=found.table.join(costs),
        report=found.reports["Student t"],
        qq=validation.qq_data(test, drawn["Student t"], assets="all"),
        excess=found.excess,
    )


@cache
def walked(n=1100):
    """Walk-forwards of three assets, whose number says nothing about the section."""
    return walks(panel(3, n), "Gaussian", GaussianGenerator(random_state=0), iterative=False)


def make_study(d, splits=None):
    """A study of d assets; the judgement on its splits is costly, and may be another study's."""
    returns = panel(d)
    rivals = {
        "Student t": StudentTGenerator(random_state=0),
        "Gaussian": GaussianGenerator(random_state=0),
        "Bootstrap": BootstrapGenerator(random_state=0),
    }
    parts = {"random": random_split(returns, 0.3, 0), "chronological": split(returns, 0.3)}
    train, held_out = parts["random"]
    scenarios = rivals["Student t"].fit(train).sample(400, random_state=1)
    splits = splits or {name: judged(name, rivals, *rows) for name, rows in parts.items()}
    covariances = {"sample": train.cov(), "scenarios": scenarios.cov(), "held-out rows": held_out.cov()}
    covariances["scenarios + clip"] = clip(scenarios.cov(), len(train))
    minimum = MinimumVariance([LongOnly()])
    solved = {name: minimum.solve(covariance=c) for name, c in covariances.items()}
    truth = held_out.cov()
    covariance_table = pd.DataFrame(
        {
            "condition number": {
                k: np.linalg.cond(correlation_from_covariance(c)) for k, c in covariances.items()
            },
            "error to held-out (%)": {k: 100 * np.linalg.norm(c - truth) for k, c in covariances.items()},
            "held-out volatility of its minimum-variance portfolio (%)": {
                k: 100 * annual_volatility(held_out, weights=a.weights) for k, a in solved.items()
            },
            "factors": {k: n_factors(c, len(train)) for k, c in covariances.items()},
        }
    )
    allocations = {"minimum variance": solved["scenarios"]}
    history = History([100, 200, 300], [1.0, 0.9, 0.8], [1.0, 0.95, 0.97], 200, "early")
    fields = {
        "title": "Scenarios & <tests>",
        "subtitle": "A simulated panel",
        "returns": returns,
        "train": train,
        "held_out": held_out,
        "findings": [Finding("stale", "warning", ODD, returns.index[0], f"{ODD} stands still.", "Drop it.")],
        "generator_name": "Student t",
        "scenarios": scenarios,
        "fit_summary": "",
        "histories": {"DDPM": history},
        "splits": splits,
        "covariances": covariances,
        "covariance_table": covariance_table,
        "n_train": len(train),
        "allocations": allocations,
        "walks": walked() if d > 1 else Walks(absent="A walk-forward is made for 2 to 100 assets."),
        "tail": tail_risk_table(held_out, scenarios, {"minimum variance": solved["scenarios"].weights}),
        "tail_test": validation.tail_test(
            held_out, scenarios, {"minimum variance": solved["scenarios"].weights}, n_null=100
        ),
        "crash_error": 0.1,
        "verdicts": {
            key: SimpleNamespace(status=status, text=f"The verdict of {key} is 5 %.")
            for key, status in zip(KEYS, ["good", "note", "poor"] * 3)
        },
        "manifest": {
            "data": {"sha256": "ab" * 32},
            "seed": 7,
            "versions": {"numpy": "2.0"},
            "commit": "c0ffee",
        },
    }
    return SimpleNamespace(**{"caveats": ("A caveat of this panel.",)} | fields)


def changed(study, **changes):
    return SimpleNamespace(**vars(study) | changes)


@pytest.fixture(scope="module")
def study():
    return make_study(4)


@pytest.fixture(scope="module")
def page(study):
    return render(study)


@pytest.fixture(scope="module")
def bare_page(study):
    """Of a study without all that it can be without, one verdict aside, and whose rows are numbered."""
    bare = changed(
        study,
        returns=study.returns.reset_index(drop=True),
        findings=[],
        histories={},
        splits={},
        allocations={},
        tail=study.tail.iloc[:0],
        tail_test=None,
        walks=Walks(),
        verdicts={"fit": study.verdicts["fit"]},
        caveats=(),
        manifest={},
    )
    return render(bare)


class Reader(HTMLParser):
    """Tags with their attributes, the words, ids, and whether every element that was opened is closed."""

    EMPTY = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open, self.styles = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if self.open[-1:] == ["style"] else self.words).append(data)

    @cached_property
    def text(self):
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def all(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in wanted.items())]


def test_nothing_is_loaded(page):
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & {
        tag for tag, _ in reader.tags
    }
    for _, attributes in reader.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
                assert value.startswith(("#", "data:image/png;base64,"))
            assert all(u.startswith("#") for u in re.findall(r"url\(\s*['\"]?([^)'\"]*)", value or ""))
    css = " ".join(reader.styles)
    assert "@import" not in css
    assert "url(" not in css
    assert "http" not in page


def test_every_figure_has_alternative_text_and_caption(page):
    reader = Reader(page)
    drawings = reader.all("svg", role="img")
    assert len(drawings) == len(reader.all("figure")) == len(reader.all("figcaption")) == FIGURES
    assert all(len(a["aria-label"]) > 30 for a in drawings)
    assert len({a["aria-label"] for a in drawings}) == FIGURES
    assert [f"Figure {i}." in reader.text for i in range(1, FIGURES + 1)] == [True] * FIGURES
    assert all(a.get("aria-hidden") == "true" for a in reader.all("svg") if a.get("role") != "img")


def test_ids_are_unique_and_references_meet_one(page):
    reader = Reader(page)
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert len(targets) > 100
    assert set(targets) <= set(ids)


def test_colours_are_roles(page):
    assert not re.search(r"#0000\d\d", page)
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    light, dark = (
        set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{([^}]*)\}", page)[:2]
    )
    assert used <= light
    assert {name for name in light if name not in ("--sans", "--serif")} == dark


def test_each_section_has_its_verdict_once_there_and_once_on_top(page):
    reader = Reader(page)
    for key, word in zip(KEYS, ["Good", "Note", "Poor"] * 3):
        assert reader.text.count(f"{word}. The verdict of {key} is 5 %.") == 2
    assert all(len(reader.all("section", id=key.replace(" ", "-"))) == 1 for key in KEYS)


def test_a_missing_verdict_renders_no_line(bare_page):
    assert Reader(bare_page).text.count("The verdict of") == 2


def test_an_unknown_status_is_refused(study):
    wrong = {"fit": SimpleNamespace(status="great", text="")}
    with pytest.raises(ValueError, match=r"expected a status among .* got 'great' for the verdict 'fit'"):
        render(changed(study, verdicts=wrong))


def test_the_summary_says_what_was_fitted_and_what_it_is_not_for(page, study):
    text = Reader(page).text
    assert f"{study.n_train} training rows of 360" in text
    assert "2020-01-01 to 2021-05-18" in text
    assert "Seed 7" in text
    assert "independent in time" in text
    assert "A caveat of this panel." in text
    assert "volatility clustering" in text
    for part in ("Prepared by", "Reviewed by", "ab" * 32, "c0ffee", "versions / numpy"):
        assert part in text


def test_what_is_given_is_escaped(page, study):
    reader = Reader(page)
    assert "<b>&X" not in page
    assert "Scenarios & <tests>" in reader.text
    for name in study.returns.columns:
        assert reader.text.count(name) >= 4  # list of assets, Q-Q plots, weights, appendix


def test_no_script_comes_in_through_a_name(study):
    evil = '"><script>alert(1)</script>'
    name = {ODD: evil}
    splits = {evil: study.splits["random"]}
    told = changed(
        study,
        title=evil,
        generator_name=evil,
        splits=splits,
        histories={evil: study.histories["DDPM"]},
        returns=study.returns.rename(columns=name),
        train=study.train.rename(columns=name),
        held_out=study.held_out.rename(columns=name),
        scenarios=study.scenarios.rename(columns=name),
        manifest={evil: {evil: [evil]}},
        verdicts={"fit": SimpleNamespace(status="good", text=evil)},
    )
    assert "script" not in {tag for tag, _ in Reader(render(told)).tags}


def test_rows_that_copy_are_named_and_never_best(page):
    rows = re.findall(r'<th scope="row" class="words">Bootstrap.*?</tr>', page, re.S)
    assert len(rows) == 2
    assert all("copies rows" in row and "<b>" not in row for row in rows)
    assert Reader(page).text.count("Bootstrap copies training rows") == 2


def test_ticks_are_those_of_the_validation_report(page, study):
    """The chosen generator's ticks, in its own tables and beside its rivals, are the verdicts of the report."""
    report = study.splits["random"].report.table
    own = [
        row
        for row in re.findall(r"<tr>.*?</tr>", page, re.S)
        if '<th scope="row" class="words">Student t' in row
    ]
    shown = list(study.splits["random"].table.columns[:10])
    cells = re.findall(r"<td>(.*?)</td>", own[0], re.S)[2:12]
    for key, cell in zip(shown, cells):
        assert ("✓" in cell) == (report.loc[key, "verdict"] == "within floor"), key


def test_the_words_are_those_of_the_tables(study):
    """Told apart, counts and p-values: the same in the sentences, in the table and in the metrics' own verdicts."""
    for how, part in zip(("at random", "in time order"), study.splits.values()):
        row, report = part.table.loc["Student t"], part.report
        count = int((report.table["verdict"] == "beyond floor").sum())
        assert count == row["beyond"] == int((part.excess.loc["Student t"] > 1).sum())
        assert (count > 0) == (row["furthest"] > 1) == (row["p_value"] <= 0.05) == (not report.within_floor)
        number = f"{count} of" if count else "none of"
        said = re.search(
            rf"plit {how}, {number} (\d+) measures.*?\(p = {row['p_value']:.3f}.*?told apart",
            fit_verdict(study).text,
        )
        assert said, fit_verdict(study).text
    passed = [
        name
        for name in study.splits["random"].table.index[:-1]
        if not study.splits["random"].table.loc[name, "beyond"]
    ]
    assert all(name in generators_verdict(study).text for name in passed if name != "Bootstrap")


@pytest.mark.parametrize(
    ("error", "ratio", "said", "status"),
    [
        (0.05, 1.02, "no more than chance", "good"),
        (0.05, 0.84, "too few joint crashes", "note"),
        (0.05, 1.2, "too many joint crashes", "note"),
        (0.05, 0.4, "too few joint crashes", "poor"),
        (0.30, 0.84, "too wide", "note"),
        (np.nan, 0.84, "too few joint crashes to compare", "note"),
    ],
)
def test_joint_crashes_are_good_only_where_their_interval_says_so(study, error, ratio, said, status):
    table = study.splits["random"].report.table.copy()
    table.loc["tail_dependence_ratio", "scenarios"] = ratio
    table.loc[["correlation_error", "correlation_max_error", "correlation_frobenius"], "verdict"] = (
        "within floor"
    )
    split = changed(study.splits["random"], report=SimpleNamespace(table=table))
    verdict = dependence_verdict(changed(study, splits={"random": split}, crash_error=error))
    assert said in verdict.text
    assert verdict.status == status


@pytest.mark.parametrize(
    ("stretch", "status", "said"),
    [(0.6, "poor", "more than chance"), (0.97, "note", "in all 2 figures"), (1.03, "good", "overstated")],
)
def test_the_tail_verdict_counts_what_the_table_ticks(study, stretch, status, said):
    """Scenarios that are the held-out rows, stretched: every loss is off by one factor."""
    weights = study.allocations["minimum variance"].weights
    rows = pd.concat([study.held_out] * 5) * stretch
    test = validation.tail_test(study.held_out, rows, {"mv": weights}, n_null=200)
    np.testing.assert_allclose(test.together["gap"], stretch - 1, atol=0.02)
    verdict = tail_verdict(changed(study, tail_test=test))
    assert verdict.status == status
    assert said in verdict.text
    assert (
        (test.outside > 0)
        == (test.p_value <= 0.05)
        == ("lie outside" in verdict.text or "1 of 6" in verdict.text)
    )


def test_metrics_measure_distance_as_validation_does(study):
    assert set(METRICS) == set(study.splits["random"].report.table.index)
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = pd.Series(rng.uniform(0.51, 2.0, len(METRICS)), index=list(METRICS))
        values["cvm_mean_p"] = rng.uniform()
        expected = badness(values[study.splits["random"].report.table.index])
        for key, metric in METRICS.items():
            assert metric.distance(values[key]) == pytest.approx(expected[key] - (key == "c2st_auc") * 0.5)
    assert np.isnan(METRICS["sd_ratio"].distance(np.nan))


def test_one_asset():
    reader = Reader(render(make_study(1)))
    assert "The panel has one asset" in reader.text
    assert len(reader.all("svg", role="img")) == FIGURES - 4


def test_sixty_assets(study):
    text = render(make_study(60, study.splits))
    reader = Reader(text)
    assert len(text) < 2_000_000
    assert len(reader.all("svg", role="img")) == FIGURES
    assert all(f"Asset {i}" in reader.text for i in range(58))


def test_numbered_rows_and_empty_rooms(bare_page):
    reader = Reader(bare_page)
    for said in (
        "0 to 359",
        "found nothing",
        "estimated in one step",
        "No portfolio was asked for",
        "too few held-out rows",
        "No walk-forward was asked for",
    ):
        assert said in reader.text
    assert len(reader.all("svg", role="img")) == FIGURES - 6


def test_a_loss_curve_without_held_out_rows():
    unseen = History([100, 200], [1.0, 0.9], [], 0, "")
    assert "no held-out rows" in figures.loss_curves({"no held-out rows": unseen})


def test_same_study_same_bytes(page, study):
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        assert render(study) == page
        assert dict(mpl.rcParams) == before


def test_writing_is_whole_or_not_at_all(study, page, tmp_path, monkeypatch):
    monkeypatch.setattr("finediff.report.render.render", lambda _: page)
    path = tmp_path / "new" / "report.html"
    assert write_report(study, path) == path
    assert path.read_text(encoding="utf-8") == page
    path.write_text("old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_report(study, path)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_assets_that_move_together_stand_side_by_side():
    """Two hidden blocks, shuffled: the order gathers each."""
    rng = np.random.default_rng(0)
    block = rng.permutation(np.repeat([0, 1], 6))
    c = np.where(block[:, None] == block, 0.8, 0.1)
    np.fill_diagonal(c, 1.0)
    order = figures.asset_order(c)
    assert sorted(order) == list(range(12))
    assert np.abs(np.diff(block[order])).sum() == 1


# ------------------------------------------------------------------------------------------------ walk-forward


def test_decisions_use_history_alone_and_generators_the_latest():
    result = walked()
    assert result.monthly.strategies[0] == EQUAL
    assert len(result.monthly.windows) == -(-600 // 21)
    assert result.quarterly.strategies == ["Gaussian", NONLINEAR, ENSEMBLE]
    assert len(result.quarterly.windows) == -(-600 // QUARTER)
    assert (result.monthly.windows["rows of history"] == HISTORY).all()
    few = walks(panel(3, 1100), "g", GaussianGenerator(), iterative=True, quarters=3).quarterly
    assert len(few.windows) == 3
    assert few.returns.index[-1] == panel(3, 1100).index[-1]


@pytest.mark.parametrize(
    ("rows", "d", "said"), [(999, 3, "999 rows"), (1000, 1, "has 1"), (1000, 101, "101")]
)
def test_without_a_walk_a_sentence_says_why(rows, d, said):
    result = walks(pd.DataFrame(np.zeros((rows, d))), "g", None, iterative=False)
    assert result.monthly is None
    assert re.search(said, result.absent)
    assert result.absent.endswith(".")


def test_a_failure_is_told_and_the_rest_stays():
    class Broken(GaussianGenerator):
        def fit(self, X, y=None):
            raise ValueError("nothing converged")

    result = walks(panel(3, 1000), "Broken", Broken(), iterative=False)
    assert result.quarterly is None
    assert "Broken" in result.generator_absent
    assert "nothing converged" in result.generator_absent
    left_out = walks(panel(3, 1000), "Slow", GaussianGenerator(), iterative=True)
    assert left_out.quarterly is None
    assert "too long" in left_out.generator_absent


def test_numbers_do_not_depend_on_processes():
    again = walks(panel(3, 1100), "Gaussian", GaussianGenerator(random_state=0), iterative=False, n_jobs=2)
    pd.testing.assert_frame_equal(again.quarterly.returns, walked().quarterly.returns)
    pd.testing.assert_frame_equal(again.monthly.returns, walked().monthly.returns)


@pytest.mark.parametrize(
    ("volatility", "said", "status"),
    [
        ((1, 2, 2), "It wins, by more than chance.", "good"),
        ((4, 2, 2), "worse than nonlinear shrinkage and the window ensemble by more than chance.", "note"),
        ((2, 4, 1), "It does better than nonlinear shrinkage and worse than the window ensemble.", "note"),
        (
            (2, 2, 1),
            "worse than the window ensemble by more than chance, and no differently from the other.",
            "note",
        ),
        (
            (2, 4, 2),
            "better than nonlinear shrinkage, and no differently from the other beyond chance.",
            "good",
        ),
        ((2, 2, 2), "by no more than chance.", "good"),
    ],
)
def test_the_sentence_claims_no_more_than_the_test(volatility, said, status):
    """Independent days whose volatilities are known: the generator's, nonlinear shrinkage's, the ensemble's."""
    walk = walked().quarterly
    noise = np.random.default_rng(0).standard_normal(walk.returns.shape) / 100
    known = replace(walk, returns=pd.DataFrame(noise * volatility, walk.returns.index, walk.returns.columns))
    verdict = walk_verdict(SimpleNamespace(walks=Walks(walked().monthly, known)))
    assert verdict.text.endswith(said)
    assert verdict.status == status


def test_the_walk_is_shown_with_its_numbers(page):
    reader, walk = Reader(page), walked().monthly
    found = walk.summary()
    for name in walk.strategies:
        assert f"{name} {100 * found.at[name, 'annual volatility']:.2f}" in reader.text
    assert "fitted anew on 500 rows at the latest 10 decisions 63 rows apart" in reader.text


def test_rows_without_dates_have_a_walk_too():
    plain = panel(3, 1100).reset_index(drop=True)
    result = walks(plain, "Gaussian", GaussianGenerator(random_state=0), iterative=False)
    tests = {"every 21 rows": (NONLINEAR, result.monthly.compare(NONLINEAR)["volatility"].drop(index=EQUAL))}
    svg = figures.walk_volatility(result.monthly.returns.drop(columns=EQUAL), NONLINEAR, tests)
    assert "period" in svg
    assert "nan" not in svg
