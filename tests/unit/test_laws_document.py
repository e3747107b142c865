"""The page of laws names tests; each of them exists, and each law has one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "laws.md"
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def absent_tests(document: str, root: Path) -> list[str]:
    """Tests that ``document`` names and that the project in ``root`` does not have."""
    return [
        f"{file}::{name}"
        for file, name in NAMED_TEST.findall(document)
        if not (root / file).is_file() or name not in functions_of(root / file)
    ]


def functions_of(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def laws_of(document: str) -> list[str]:
    """The rows of the tables of laws, without their heads."""
    tables = re.findall(r"^\| law \|.*\n\|[- |]+\|\n((?:\|.*\n)+)", document, re.MULTILINE)
    return [row for table in tables for row in table.splitlines()]


def test_every_law_names_tests_that_exist() -> None:
    document = PAGE.read_text()
    assert absent_tests(document, ROOT) == []
    assert len(laws_of(document)) >= 14
    assert [row for row in laws_of(document) if not NAMED_TEST.search(row)] == []


def test_a_test_that_is_gone_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text("def test_here() -> None: ...\n")
    document = "`tests/test_one.py::test_here` `tests/test_one.py::test_gone` `tests/test_two.py::test_here`"
    assert absent_tests(document, tmp_path) == ["tests/test_one.py::test_gone", "tests/test_two.py::test_here"]
