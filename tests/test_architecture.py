"""Who may import whom, what may be imported when, and what may not be used at all: read from the source by ast."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

PACKAGE = Path(importlib.util.find_spec("finediff").origin).parent
LONGEST = 500  # lines of a module

# ------------------------------------------------------------------ the plan, as data

# Rooms, and the rooms each may import. The shop window finediff/__init__.py imports lazily and is no room.
MAY_IMPORT = {
    "provenance": set(),
    "panel": set(),
    "markets": set(),
    "risk": set(),
    "memorisation": set(),
    "covariance": set(),
    "networks": set(),
    "diffusion": set(),
    "portfolio": {"risk"},
    "generators": {"panel", "networks", "diffusion", "provenance", "covariance"},
    "validation": {"covariance", "risk", "memorisation"},
    "backtest": {"portfolio", "covariance", "generators", "risk", "provenance"},
    "integrations": {"generators", "covariance"},
}
MAY_IMPORT["report"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)

# Inside diffusion: a module imports from the lines above its own only.
DIFFUSION = [
    {"process", "quadrature"},
    {"score"},
    {"exact", "objective", "closed_form", "sample"},
    {"guide", "likelihood", "train", "residual"},
    {"memory", "distill", "deterministic", "factor_residual"},
]
ALONE = {"discrete"}

# Libraries, and the only rooms that may import them at all.
HOMES = {
    "torch": {"diffusion", "networks", "generators"},
    "torchdiffeq": {"diffusion"},
    "cvxpy": {"portfolio"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "typer": {"cli"},
}
# Libraries that are imported inside the function that needs them, and the modules that may do without.
LATE = {
    "arch": set(),
    "yfinance": set(),
    "torchdiffeq": set(),
    "rich": {"cli"},
    "skfolio": {"integrations.skfolio"},
}
# The mathematics needs nothing else; torchdiffeq (an adaptive solver) comes late.
MATHEMATICS = {"torch", "numpy", "scipy", "torchdiffeq"}
# On a machine that only trains generators these are missing.
MISSING_ON_A_NODE = (
    "cvxpy skfolio matplotlib arch rich typer jinja2 statsmodels yfinance pyarrow torchdiffeq ray"
).split()

FORBIDDEN = {
    "pickle": "a pickle runs code when it is opened: safetensors and JSON",
    "cloudpickle": "a pickle runs code when it is opened: safetensors and JSON",
    "dill": "a pickle runs code when it is opened: safetensors and JSON",
    "marshal": "a pickle runs code when it is opened: safetensors and JSON",
    "shelve": "a pickle runs code when it is opened: safetensors and JSON",
    "joblib.dump": "a pickle runs code when it is opened: safetensors and JSON",
    "joblib.load": "a pickle runs code when it is opened: safetensors and JSON",
    "numpy.save": "may pickle: safetensors",
    "torch.save": "a pickle runs code when it is opened: safetensors and JSON",
    "torch.load": "a pickle runs code when it is opened: safetensors and JSON",
    "pandas.read_pickle": "a pickle runs code when it is opened: safetensors and JSON",
    "random": "global state: a numpy or torch generator that is handed down",
    "torch.manual_seed": "global state: torch.Generator().manual_seed(...)",
    "torch.seed": "global state",
    "torch.set_rng_state": "global state",
    "torch.random": "global state",
    "torch.cuda.manual_seed": "global state",
    "torch.cuda.manual_seed_all": "global state",
    "torch.set_default_dtype": "global state",
    "torch.set_default_device": "global state",
}
NUMPY_RANDOM_ALLOWED = {
    "default_rng",
    "Generator",
    "RandomState",
    "SeedSequence",
    "BitGenerator",
    "PCG64",
    "MT19937",
}


# ------------------------------------------------------------------ reading the source


@dataclass(frozen=True)
class Import:
    target: str  # dotted, absolute
    late: bool  # inside a function
    line: int


def imports(tree: ast.AST, module: str, is_package: bool = False) -> list[Import]:
    """Every import of a module, TYPE_CHECKING blocks left out; ``from a import b`` counts as a.b."""
    found = []

    def visit(node: ast.AST, late: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child, late)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, late, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            found.extend(Import(f"{base}.{alias.name}", late, node.lineno) for alias in node.names)
        inside = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def forbidden(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, name, reason) of what the house does not use, under whatever name it was imported."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def judge(name: str, line: int) -> Iterator[tuple[int, str, str]]:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            reason = FORBIDDEN.get(".".join(parts[:length]))
            if reason:
                yield line, name, reason
                return
        if parts[:2] == ["numpy", "random"] and len(parts) > 2 and parts[2] not in NUMPY_RANDOM_ALLOWED:
            yield line, name, "global state: numpy.random.default_rng or RandomState, handed down"

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from judge(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield from judge(f"{node.module}.{alias.name}", node.lineno)
        elif isinstance(node, ast.Attribute):
            chain, base = [node.attr], node.value
            while isinstance(base, ast.Attribute):
                chain.append(base.attr)
                base = base.value
            if isinstance(base, ast.Name) and base.id in names:
                yield from judge(".".join([names[base.id], *reversed(chain)]), node.lineno)
            if node.attr == "to_pickle":
                yield node.lineno, node.attr, "a pickle runs code when it is opened"


@lru_cache
def sources() -> dict[str, tuple[Path, ast.Module]]:
    """Dotted name below finediff ("" for the shop window) -> (file, tree)."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = file, ast.parse(file.read_text(), filename=str(file))
    return found


def imports_of(name: str) -> list[Import]:
    file, tree = sources()[name]
    return imports(tree, f"finediff.{name}" if name else "finediff", is_package=file.name == "__init__.py")


def inner(name: str) -> Iterator[tuple[Import, str]]:
    """(import, dotted name below finediff of the module that it reaches)."""
    for item in imports_of(name):
        top, _, rest = item.target.partition(".")
        if top != "finediff":
            continue
        parts = rest.split(".")
        while parts and ".".join(parts) not in sources():
            parts.pop()  # the last part is a name inside the module
        yield item, ".".join(parts)


def room(name: str) -> str:
    return name.partition(".")[0]


MODULES = [name for name in sources() if name]
every_module = pytest.mark.parametrize("name", MODULES)


# ------------------------------------------------------------------ rooms


def test_every_room_has_its_place_in_the_plan():
    assert {room(name) for name in MODULES} <= set(MAY_IMPORT)
    inside = {name.split(".")[1] for name in MODULES if name.startswith("diffusion.")}
    assert inside <= set().union(*DIFFUSION) | ALONE


def test_the_plan_has_no_circles():
    def below(name, path=()):
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        for other in MAY_IMPORT[name]:
            below(other, (*path, name))

    for name in MAY_IMPORT:
        below(name)


@every_module
def test_rooms_import_only_the_rooms_they_may(name):
    here = room(name)
    for item, target in inner(name):
        if not target:
            assert here in ("cli", "report"), (
                f"{name}, line {item.line}: {item.target} comes through the shop window; import it from its room"
            )
            continue
        there = room(target)
        assert there == here or there in MAY_IMPORT[here], (
            f"{name}, line {item.line}: {here} may import {sorted(MAY_IMPORT[here])}, not {there}"
        )


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("diffusion.")])
def test_diffusion_runs_one_way(name):
    floor = {module: number for number, modules in enumerate(DIFFUSION) for module in modules}
    here = name.split(".")[1]
    for item, target in inner(name):
        there = target.split(".")[1] if "." in target else ""
        if there == here:
            continue
        assert there, f"{name}, line {item.line}: import the module, not the room"
        assert here not in ALONE, f"{name}, line {item.line}: {here} stands alone"
        assert there not in ALONE, f"{name}, line {item.line}: {there} stands alone"
        assert floor[there] < floor[here], f"{name}, line {item.line}: {there} is not below {here}"


def test_modules_import_each_other_without_circles():
    """Imports inside functions count: a circle broken by a late import is still a circle."""
    edges = {name: {target for _, target in inner(name) if target != name} for name in MODULES}
    # A package's __init__ re-exports its modules, which may not count as importing it back.
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for target in sorted(edges.get(name, ())):
            visit(target)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


# ------------------------------------------------------------------ libraries


@every_module
def test_libraries_stay_in_their_rooms(name):
    here = room(name)
    for item in imports_of(name):
        library = item.target.partition(".")[0]
        if library in HOMES:
            assert here in HOMES[library], (
                f"{name}, line {item.line}: {library} is for {sorted(HOMES[library])}"
            )
        if library in LATE and not item.late:
            assert name in LATE[library], (
                f"{name}, line {item.line}: import {library} inside the function that needs it"
            )


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in ("diffusion", "networks")])
def test_the_mathematics_needs_no_finance(name):
    for item in imports_of(name):
        library = item.target.partition(".")[0]
        assert library in MATHEMATICS | {"finediff"} | sys.stdlib_module_names, (
            f"{name}, line {item.line}: {library} does not belong to the mathematics"
        )


@pytest.mark.parametrize("name", sources(), ids=lambda name: name or "finediff")
def test_no_pickles_and_no_global_randomness(name):
    found = list(forbidden(sources()[name][1]))
    assert not found, "\n".join(f"{name}, line {line}: {what} ({why})" for line, what, why in found)


@pytest.mark.parametrize("name", sources(), ids=lambda name: name or "finediff")
def test_modules_are_short(name):
    file, _ = sources()[name]
    lines = len(file.read_text().splitlines())
    assert lines <= LONGEST, (
        f"{file.name} has {lines} lines: split it by meaning into a folder of the same name"
    )


# ------------------------------------------------------------------ in a fresh interpreter


def run_python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_importing_finediff_imports_nothing_heavy():
    run_python(
        """
        import sys
        import finediff
        heavy = {"torch", "numpy", "scipy", "pandas", "sklearn", "cvxpy", "matplotlib", "skfolio"} & set(sys.modules)
        assert not heavy, heavy
        """
    )


def test_generators_work_where_only_the_mathematics_is_installed():
    """Imported, fitted, drawn from, saved and loaded with everything else refusing to be imported."""
    run_python(
        f"""
        import sys, tempfile

        class Wall:
            tried = set()

            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {MISSING_ON_A_NODE!r}:
                    self.tried.add(name)
                    raise ImportError(f"{{name}} is not installed on this machine")

        sys.meta_path.insert(0, Wall())
        try:
            import cvxpy
        except ImportError:
            pass
        else:
            raise AssertionError("the wall has a hole")

        import numpy as np
        from finediff.generators import DDPMGenerator, GaussianGenerator, ScenarioGenerator

        X = np.random.default_rng(0).standard_normal((60, 3)) / 100
        for generator in (GaussianGenerator(random_state=0), DDPMGenerator(steps=2, width=8, random_state=0)):
            draws = generator.fit(X).sample(4, random_state=1)
            with tempfile.TemporaryDirectory() as folder:
                generator.save(folder + "/saved")
                again = ScenarioGenerator.load(folder + "/saved").sample(4, random_state=1)
            assert np.array_equal(draws, again)
        """
    )


# ------------------------------------------------------------------ the reader itself


def test_the_reader_sees_every_way_to_import():
    source = textwrap.dedent(
        """
        from typing import TYPE_CHECKING
        import a.b as c
        from . import sibling
        from .sibling import thing
        from ..other.deep import name
        if TYPE_CHECKING:
            import unseen
        else:
            import seen
        try:
            import tried
        except ImportError:
            pass
        class K:
            import classy
            def method(self):
                import late
                return lambda: __import__
        """
    )
    found = {(item.target, item.late) for item in imports(ast.parse(source), "finediff.report.render")}
    assert found == {
        ("typing.TYPE_CHECKING", False),
        ("a.b", False),
        ("finediff.report.sibling", False),
        ("finediff.report.sibling.thing", False),
        ("finediff.other.deep.name", False),
        ("seen", False),
        ("tried", False),
        ("classy", False),
        ("late", True),
    }
    (item,) = imports(ast.parse("from .law import chart"), "finediff.report.figures", is_package=True)
    assert item.target == "finediff.report.figures.law.chart"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p\np.dumps(1)",
        "from joblib import dump",
        "def f():\n    import torch\n    torch.save({}, 'x')",
        "import torch as th\nth.manual_seed(0)",
        "from torch import manual_seed",
        "import torch\ntorch.cuda.manual_seed_all(0)",
        "import torch\ntorch.random.manual_seed(0)",
        "import numpy as np\nnp.random.seed(0)",
        "import numpy.random\nnumpy.random.randn(3)",
        "from numpy import random\nrandom.normal()",
        "from numpy.random import randn",
        "import random",
        "frame.to_pickle('x')",
    ],
)
def test_the_reader_sees_what_is_forbidden(source):
    assert list(forbidden(ast.parse(source)))


def test_the_reader_lets_generators_pass():
    source = """
import joblib, numpy as np, torch
rng = np.random.default_rng(0); old = np.random.RandomState(0); isinstance(rng, np.random.Generator)
torch.Generator().manual_seed(0); rng.random(3); self.random_state; joblib.Parallel(2)
from sklearn.utils import check_random_state
"""
    assert not list(forbidden(ast.parse(source)))
