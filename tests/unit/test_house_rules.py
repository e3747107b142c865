"""Rules of the house that no linter knows. Every rule is tried on the project and on a planted violation."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_FILE = 400  # lines; a longer one has a second subject that wants a file of its own
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "base", "core", "manager"}
HEAVY = {"torch", "ray", "vllm", "transformers"}
LIGHT_MODULES = ("chatlearn", "chatlearn.config.read", "chatlearn.cli", "chatlearn.errors")
# Folders that belong to one machine or one person. A path in the project is relative, or its user names it.
MACHINE_PATH = re.compile(r"(?:(?<![\w.}$)/])|\bfile://)/(?:home|root|Users|work|opt|mnt|srv)/\w")
# A reward function is a user's code and may raise anything; at the border of its process that becomes a score's error.
BROAD_ON_PURPOSE = ("chatlearn/reward/grader_process.py",)

Rule = Callable[[Path], list[str]]


def python_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts)


def syntax_of(folder: Path) -> Iterator[tuple[Path, ast.AST]]:
    """Every node of every module, with the file it stands in."""
    for path in python_files(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path, node


def written_files(root: Path) -> list[Path]:
    """What a person wrote: everything but the folders and files that ``.gitignore`` names as generated."""
    ignore = root / ".gitignore"
    patterns = [".git", *(line.strip("/") for line in (ignore.read_text().splitlines() if ignore.exists() else []))]
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not any(fnmatch(name, pattern) for pattern in patterns))
        found += [
            Path(folder, name) for name in sorted(files) if not any(fnmatch(name, pattern) for pattern in patterns)
        ]
    return found


# --- the rules: each takes a project's folder and names the violations -----------------------------------------------


def long_files(root: Path) -> list[str]:
    return [
        f"{path} has {length} lines"
        for path in written_files(root)
        if path.suffix == ".py" and (length := len(path.read_text().splitlines())) > LONGEST_FILE
    ]


def nameless_files(root: Path) -> list[str]:
    names = [path for path in (root / "chatlearn").rglob("*") if path.is_dir() or path.suffix == ".py"]
    return [f"{path} says nothing about its contents" for path in names if path.stem in NAMELESS]


@functools.cache
def names_of_others() -> frozenset[str]:
    """Every module name that the standard library or an installed package has taken."""
    return frozenset(sys.stdlib_module_names) | set(metadata.packages_distributions()) - {"chatlearn"}


def shadowing_names(root: Path) -> list[str]:
    """Documented commands run files inside the package, so Python looks into ``chatlearn/`` before anywhere else."""
    taken = names_of_others() - {"__init__", "__main__"}
    modules = (path for path in (root / "chatlearn").rglob("*") if path.suffix == ".py" or path.is_dir())
    return [f"{path} would replace {path.stem}" for path in modules if path.stem in taken]


def broad_handlers(root: Path) -> list[str]:
    def is_broad(kind: ast.expr | None) -> bool:
        kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
        return any(one is None or (isinstance(one, ast.Name) and one.id == "Exception") for one in kinds)

    return [
        f"{path}:{node.lineno} catches everything"
        for path, node in syntax_of(root / "chatlearn")
        if isinstance(node, ast.ExceptHandler)
        and is_broad(node.type)
        and str(path.relative_to(root)) not in BROAD_ON_PURPOSE
    ]


def talking_doors(root: Path) -> list[str]:
    """A package's ``__init__`` is one docstring; the topmost one also carries the version."""
    found: list[str] = []
    for path in (root / "chatlearn").rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        most = 2 if path.parent == root / "chatlearn" else 1
        if ast.get_docstring(tree) is None or len(tree.body) > most:
            found.append(f"{path} must be a docstring and nothing else")
    return found


def hardware_words(root: Path) -> list[str]:
    """Only ``device.py`` speaks of one vendor's hardware.

    Elsewhere no identifier contains ``cuda``, and the string "cuda" (or "cuda:0") is never handed on: it may stand in a
    ``Literal`` and in a comparison, and in the configuration, where it is a value that users write.
    """
    found: list[str] = []
    for path in python_files(root / "chatlearn"):
        if path == root / "chatlearn" / "device.py":
            continue
        tree = ast.parse(path.read_text())
        is_configuration = root / "chatlearn" / "config" in path.parents
        allowed = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.Compare)
            or (is_configuration and isinstance(node, ast.Constant))
            or (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal")
            for inner in ast.walk(node)
        }
        found += [
            f"{path}:{node.lineno} speaks of CUDA"
            for node in ast.walk(tree)
            if isinstance(node, ast.expr) and id(node) not in allowed and names_cuda(node)
        ]
    return found


def names_cuda(node: ast.expr) -> bool:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return "cuda" in name.lower()
        case ast.Constant(value=str(text)):
            return text == "cuda" or text.startswith("cuda:")
        case _:
            return False


def machine_paths(root: Path) -> list[str]:
    found: list[str] = []
    for path in written_files(root):
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:  # weights and pictures
            continue
        found += [
            f"{path}:{number} {line.strip()[:80]}" for number, line in enumerate(lines, 1) if MACHINE_PATH.search(line)
        ]
    return found


RULES: tuple[tuple[Rule, str, str], ...] = (
    (long_files, "chatlearn/novel.py", "x = 1\n" * (LONGEST_FILE + 1)),
    (nameless_files, "chatlearn/data/utils.py", ""),
    (nameless_files, "chatlearn/common/parts.py", ""),
    (shadowing_names, "chatlearn/logging.py", ""),
    (shadowing_names, "chatlearn/ray/actors.py", ""),
    (broad_handlers, "chatlearn/run.py", "try:\n    go()\nexcept (ValueError, Exception):\n    pass\n"),
    (broad_handlers, "chatlearn/run.py", "try:\n    go()\nexcept:\n    pass\n"),
    (talking_doors, "chatlearn/data/__init__.py", '"""Data."""\nfrom chatlearn.data import rows\n'),
    (talking_doors, "chatlearn/data/__init__.py", ""),
    (hardware_words, "chatlearn/trainer/load.py", "import torch\ntorch.cuda.synchronize()\n"),
    (hardware_words, "chatlearn/trainer/load.py", "weights = weights.cuda()\n"),
    (hardware_words, "chatlearn/trainer/load.py", 'weights = weights.to("cuda:1")\n'),
    (hardware_words, "chatlearn/trainer/load.py", 'use_cuda = kind == "cuda"\n'),
    (machine_paths, "docs/tour.md", "Look into " + "/ho" + "me/ada/chatlearn.\n"),
    (machine_paths, "scripts/go.sh", "pip install --find-links " + "/o" + "pt/wheels torch\n"),
)


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _, _ in RULES), ids=lambda rule: rule.__name__)
def test_the_project_obeys(rule: Rule) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize(("rule", "path", "text"), RULES)
def test_a_planted_violation_is_found(rule: Rule, path: str, text: str, tmp_path: Path) -> None:
    planted = tmp_path / path
    planted.parent.mkdir(parents=True)
    planted.write_text(text)
    assert len(rule(tmp_path)) >= 1


def test_what_users_write_may_name_the_hardware(tmp_path: Path) -> None:
    module = tmp_path / "chatlearn" / "layout.py"
    module.parent.mkdir()
    module.write_text('Kind = Literal["cpu", "cuda"]\n\n\ndef shared(kind: Kind) -> bool:\n    return kind == "cuda"\n')
    assert hardware_words(tmp_path) == []


def loaded_by(modules: tuple[str, ...], folder: Path = ROOT) -> set[str]:
    """The heavy packages that a fresh interpreter in ``folder`` holds after importing ``modules``."""
    program = textwrap.dedent(f"""
        import importlib, sys
        for module in {modules!r}:
            importlib.import_module(module)
        print(*(set({sorted(HEAVY)!r}) & set(sys.modules)))
    """)
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_configuration_loads_without_the_heavy_packages() -> None:
    assert loaded_by(LIGHT_MODULES) == set()


def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "ray.py").touch()  # stands for the real one, which takes seconds to import
    (tmp_path / "schema.py").write_text("import ray\n")
    assert loaded_by(("schema",), tmp_path) == {"ray"}
