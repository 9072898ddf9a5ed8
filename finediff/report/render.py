"""The report: one self-contained HTML file from a study.

`render` turns a study into text, `write_report` puts it in a file. The page loads nothing: figures are inline,
fonts are the reader's own, there is no script. What it says in each section:

    verdict   one sentence of the study, its status as a shape, a colour and a word
    figure    a drawing of `finediff.report.figures` and a caption that says what to look for
    table     numbers of `finediff.report.tables`; a tick where a generator is as close to the held-out rows as
              real rows are
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import jinja2

from finediff.provenance import whole_file
from finediff.report.sections import SECTIONS
from finediff.report.tables import NONE, asset_table, span
from finediff.report.verdicts import INDEPENDENT

__all__ = ["render", "write_report"]

_WORDS = {"good": "Good", "note": "Note", "poor": "Poor"}


def render(study) -> str:
    """The report of a study.

    Parameters
    ----------
    study : finediff.report.study.Study
        Or anything with its attributes.

    Returns
    -------
    str
        A whole HTML page. The same study gives the same text.

    Raises
    ------
    ValueError
        If a verdict has a status other than "good", "note" or "poor".
    """
    for key, verdict in study.verdicts.items():
        if verdict.status not in _WORDS:
            raise ValueError(
                f"expected a status among {list(_WORDS)}, got {verdict.status!r} for the verdict {key!r}, because "
                "each has its own mark, do choose one"
            )
    sections = []
    for number, (key, (title, build)) in enumerate(SECTIONS.items(), 1):
        lead, blocks = build(study)
        sections.append(
            {
                "id": key.replace(" ", "-"),
                "number": number,
                "title": title,
                "verdict": study.verdicts.get(key),
                "lead": lead,
                "blocks": blocks,
            }
        )
    appendix = [asset_table(study)]
    seen = Counter()
    for block in [*(block for section in sections for block in section["blocks"]), *appendix]:
        seen[block["kind"]] += 1
        block["number"] = seen[block["kind"]]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["tied"] = lambda text: (
        str(text).replace(" %", "\u00a0%").replace(" = ", "\u00a0=\u00a0")
    )
    template = environment.from_string(
        files("finediff.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        study=study,
        limits=" ".join((INDEPENDENT, *study.caveats)),
        facts=_facts(study),
        sections=sections,
        others=[v for k, v in study.verdicts.items() if k not in SECTIONS],
        words=_WORDS,
        appendix=appendix,
        provenance=_flat(study.manifest),
    )


def write_report(study, path) -> Path:
    """Write the report of a study whole or not at all.

    Parameters
    ----------
    study : finediff.report.study.Study
        As for `render`.
    path : str or Path
        The HTML file; its folder is made where it is missing.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        As `render`, or if ``path`` is a directory; a file that was there before is then untouched.
    """
    text = render(study)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def _facts(study) -> list[tuple[str, str]]:
    """Name and value of what the summary says about the fit."""
    seed = study.manifest.get("seed")
    n, m, d = len(study.returns), len(study.scenarios), study.returns.shape[1]
    return [
        ("Fitted", study.generator_name),
        (
            "On",
            f"{study.n_train:,} training rows of {n:,}; {len(study.held_out):,} rows were held out for judging",
        ),
        ("Assets", f"{d:,}"),
        ("Period", span(study.returns)),
        ("Scenarios", f"{m:,}, one period each"),
        ("Seed", NONE if seed is None else str(seed)),
        *((f"{name.capitalize()} split", split.description) for name, split in study.splits.items()),
    ]


def _flat(tree, prefix="") -> list[tuple[str, str]]:
    """Leaves of a nested mapping, each with its path."""
    rows = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{name} / ")
        elif isinstance(value, str):
            rows.append((name, value))
        elif isinstance(value, list | tuple) and all(isinstance(v, str | int | float) for v in value):
            rows.append((name, ", ".join(map(str, value))))
        else:
            rows.append((name, json.dumps(value, default=str, ensure_ascii=False)))
    return rows
