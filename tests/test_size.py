"""Small is a feature: what a reader has to read is limited, and nothing is won by leaving out what explains it."""

import ast
import re

import pytest
from conftest import ROOT, SCRIPTS

BUDGETS = {"cgan": (540, 28_500), "gan": (490, 26_000), "vae": (660, 37_700), "vqvae": (620, 33_900)}
BUDGETS["pixelcnn"] = (840, 47_300)  # lines, bytes


@pytest.mark.parametrize("name", SCRIPTS)
def test_lines(name):
    text = (ROOT / f"{name}.py").read_text()
    lines = text.splitlines()
    plumbing = next(i for i, line in enumerate(lines) if re.match("# -+ the plumbing", line))
    assert len(lines) <= BUDGETS[name][0]
    assert len(text.encode()) <= BUDGETS[name][1]  # so that nothing is won by denser code
    assert len(lines) - plumbing <= 280
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstrings(name):
    """Every class and function that another project may call says what it is."""
    for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_plumbing_holds_no_ideas(name):
    """Plain functions: no class, no generator, and above it no class that knows of processes."""
    source = (ROOT / f"{name}.py").read_text()
    head, plumbing = re.split("^# -+ the plumbing", source, flags=re.MULTILINE)
    for node in ast.walk(ast.parse("#" + plumbing)):
        assert not isinstance(node, (ast.ClassDef, ast.Yield, ast.YieldFrom)), ast.unparse(node)
    for node in ast.parse(head).body:
        if isinstance(node, ast.ClassDef):
            assert not {"RANK", "WORLD", "dist", "opt"} & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
