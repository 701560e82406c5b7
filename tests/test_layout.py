"""The floor plan of the modules, and that both READMEs have the same commands."""

import ast
import re

import pytest

from tests.helpers import ROOT

# A module may import modules of the floors above it in this list only.
FLOORS = (
    {"common"},
    {"distributed", "formats"},
    {"rows"},
    {"data"},
    {"calibration", "metrics", "page", "settings", "tokens"},
    {"analysis", "attention", "splits", "vocabulary"},
    {"encoder", "figures", "targets"},
    {"graphs", "labels", "selection"},
    {"model"},
    {"checkpoint"},
    {"export", "task"},
    {"step"},
    {"graph_step"},
    {"train", "predictor", "ensemble", "report"},
    {"pretrain", "sweep", "bulk"},
    {"infer", "demo"},
)
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor}


def imports_of(path) -> set[str]:
    """The top-level names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module.split(".")[0])
    return found


def test_every_module_has_a_floor():
    assert set(MODULES) == set(FLOOR_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    for name in imports_of(ROOT / f"{module}.py"):
        assert name not in ("tests", "tools"), f"{module} imports {name}"
        if name in FLOOR_OF:
            assert FLOOR_OF[name] < FLOOR_OF[module], f"{module} imports {name}"


def test_the_sample_imports_neither_programs_nor_tests():
    for path in (ROOT / "sample").glob("*.py"):
        assert imports_of(path) & {*MODULES, "tests", "tools"} <= {"data"}


def test_modules_are_short():
    for module in MODULES:
        lines = (ROOT / f"{module}.py").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 380, module
        assert max(map(len, lines)) <= 100, module


def commands(name: str) -> list[str]:
    """The indented lines, and the commands in backticks, of a README."""
    text = (ROOT / name).read_text(encoding="utf-8")
    inline = re.findall(r"`((?:python|pip|tensorboard|torchrun)[^`]*)`", text)
    return re.findall(r"^    (.+)$", text, re.MULTILINE) + inline


def test_both_readmes_have_the_same_commands_and_figures():
    assert commands("README.md") == commands("README.ko.md")
    tables = []
    for name in ("README.md", "README.ko.md"):
        lines = [x for x in (ROOT / name).read_text(encoding="utf-8").splitlines() if x[:1] == "|"]
        tables.append([re.findall(r"\d+\.\d+", line) for line in lines])
    assert tables[0] == tables[1]


def test_the_readme_is_short():
    for name in ("README.md", "README.ko.md"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 150
