"""Resolve the pinned sets again and write ``cpu.txt``, ``cuda.txt`` and ``dev.txt``.

    python requirements/lock.py              keep every pin that still fits, add and drop what pyproject.toml asks for
    python requirements/lock.py --upgrade    take the newest versions that fit together

Needs uv (https://docs.astral.sh/uv) on the PATH and Python 3.11 or newer, nothing else. Each set is resolved once for
every supported Python and machine, wheels only, and the answers are merged: a pin that holds everywhere stands bare,
one that differs carries a marker, and the hashes are exactly those of the wheels that one of the platforms would take.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64", "aarch64")
# glibc 2.34: some CUDA wheels for aarch64 exist for nothing older.
GLIBC = "2_34"
PLATFORMS = tuple((python, machine) for python in PYTHONS for machine in MACHINES)
HEADER = """\
# {title}
# Made by: python requirements/lock.py (see there; do not edit). Check it: python requirements/check.py index {checked}
# Install: pip install --no-deps --only-binary :all: --require-hashes -r requirements/{name}.txt
# Download: at most {megabytes} MB on one platform (Python {pythons}; {machines}; glibc {glibc} or newer).
"""


@dataclass(frozen=True)
class LockedSet:
    """One lock file: which extras of pyproject.toml go in, what is added or left out, and what it is checked with."""

    name: str
    title: str
    checked: str
    extras: tuple[str, ...]
    with_runtime: bool = True
    additions: str | None = None
    left_out: str | None = None


@dataclass(frozen=True)
class Pin:
    """A version and the wheels (sha256 -> bytes) that one platform could take of it."""

    version: str
    wheels: tuple[tuple[str, int], ...]


Platform = tuple[str, str]
Pins = dict[str, Pin]
Resolved = dict[Platform, Pins]

CPU = LockedSet(
    name="cpu",
    title="Everything to train and generate on a CPU, except torch (torch_cpu.txt) and cpu_left_out.txt.",
    checked="cpu",
    extras=("cpu", "wandb"),
    additions="cpu.in",
    left_out="cpu_left_out.txt",
)
CUDA = LockedSet(
    name="cuda",
    title="Everything to train and generate on NVIDIA GPUs.",
    checked="cuda",
    extras=("cuda", "wandb"),
    additions="cuda.in",
)
DEV = LockedSet(
    name="dev",
    title="Tools for the checks and tests, on top of cpu.txt or cuda.txt.",
    checked="cpu dev",
    extras=("dev",),
    with_runtime=False,
)


def main() -> None:
    """Write the three files, in the order in which they lend each other versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="forget the present pins")
    upgrade = parser.parse_args().upgrade
    if shutil.which("uv") is None:
        sys.exit("requirements/lock.py: uv is not on the PATH; install it with: pip install uv")

    cpu = resolve_everywhere(CPU, {} if upgrade else present_pins(CPU.name))
    shared = newest_of(cpu)
    cuda = resolve_everywhere(CUDA, shared if upgrade else shared | present_pins(CUDA.name))
    dev = resolve_everywhere(DEV, shared if upgrade else present_pins(DEV.name) | shared)
    for locked_set, pins in ((CPU, cpu), (CUDA, cuda), (DEV, without_shared(dev, cpu, cuda))):
        text = render(locked_set, pins)
        (HERE / f"{locked_set.name}.txt").write_text(text)
        sys.stdout.write(
            f"requirements/{locked_set.name}.txt: {len({name for by in pins.values() for name in by})} packages\n"
        )


def present_pins(name: str) -> dict[str, str]:
    """The versions that a lock file pins today; the first one where markers tell several apart."""
    path = HERE / f"{name}.txt"
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text() if path.exists() else "", re.MULTILINE)
    return dict(reversed(found))


def newest_of(pins: Resolved) -> dict[str, str]:
    """The versions of the first platform: what other sets should agree with."""
    return {name: pin.version for name, pin in pins[PLATFORMS[0]].items()}


def resolve_everywhere(locked_set: LockedSet, preferred: dict[str, str]) -> Resolved:
    """Resolve for every platform; each one prefers the versions found for those before it."""
    resolved: Resolved = {}
    for platform in PLATFORMS:
        resolved[platform] = resolve(locked_set, platform, preferred)
        preferred = {name: pin.version for name, pin in resolved[platform].items()} | preferred
    return resolved


def resolve(locked_set: LockedSet, platform: Platform, preferred: dict[str, str]) -> Pins:
    """Ask uv for one platform; it keeps ``preferred`` versions where they fit."""
    python, machine = platform
    with tempfile.TemporaryDirectory() as folder:
        wanted, answer = Path(folder, "wanted.in"), Path(folder, "pylock.toml")
        wanted.write_text("\n".join(wanted_requirements(locked_set)))
        answer.write_text(seed(preferred))
        command = ["uv", "pip", "compile", str(wanted), "--quiet", "--only-binary", ":all:", "--format", "pylock.toml"]
        command += ["--python-version", python, "--python-platform", f"{machine}-manylinux_{GLIBC}", "-o", str(answer)]
        if locked_set.left_out:
            command += ["--override", str(HERE / locked_set.left_out)]
        if subprocess.run(command, check=False).returncode:
            sys.exit(
                f"requirements/lock.py: no solution for {locked_set.name} on Python {python}, {machine} (see above)"
            )
        return read_answer(answer)


def wanted_requirements(locked_set: LockedSet) -> list[str]:
    """The requirements that pyproject.toml and the set's own file name."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    wanted: list[str] = list(project["dependencies"]) if locked_set.with_runtime else []
    for extra in locked_set.extras:
        wanted += project["optional-dependencies"][extra]
    if locked_set.additions:
        wanted += (HERE / locked_set.additions).read_text().splitlines()
    return wanted


def seed(preferred: dict[str, str]) -> str:
    """A lock of names and versions alone, which uv reads as preferences."""
    packages = "".join(f'[[packages]]\nname = "{name}"\nversion = "{version}"\n' for name, version in preferred.items())
    return f'lock-version = "1.0"\ncreated-by = "chatlearn"\n{packages}'


def read_answer(path: Path) -> Pins:
    """uv's lock of one platform as pins."""
    return {
        package["name"]: Pin(
            package["version"],
            tuple(sorted((wheel["hashes"]["sha256"], wheel.get("size", 0)) for wheel in package["wheels"])),
        )
        for package in tomllib.loads(path.read_text())["packages"]
    }


def without_shared(dev: Resolved, *others: Resolved) -> Resolved:
    """Leave out of ``dev`` what every other set pins too; a version that disagrees is an error."""
    return {platform: own_pins(pins, [other[platform] for other in others]) for platform, pins in dev.items()}


def own_pins(dev: Pins, others: list[Pins]) -> Pins:
    """The pins of one platform that some other set lacks."""
    for name, pin in dev.items():
        if any(name in other and other[name].version != pin.version for other in others):
            sys.exit(f"requirements/lock.py: {name} {pin.version} of the dev set is pinned differently in another set")
    return {name: pin for name, pin in dev.items() if not all(name in other for other in others)}


def render(locked_set: LockedSet, resolved: Resolved) -> str:
    """The lock file: a header, then one requirement with its hashes per name, version and marker."""
    largest = max(
        sum(max((size for _, size in pin.wheels), default=0) for pin in pins.values()) for pins in resolved.values()
    )
    header = HEADER.format(
        title=locked_set.title,
        name=locked_set.name,
        checked=locked_set.checked,
        megabytes=largest // 10**6 + 1,
        pythons=f"{PYTHONS[0]} to {PYTHONS[-1]}",
        machines=" and ".join(MACHINES),
        glibc=GLIBC.replace("_", "."),
    )
    names = sorted({name for pins in resolved.values() for name in pins})
    return header + "".join(line for name in names for line in requirement_lines(name, resolved))


def requirement_lines(name: str, resolved: Resolved) -> list[str]:
    """The lines of one package: usually one version for all platforms."""
    holders = [(pins[name].version, platform) for platform, pins in resolved.items() if name in pins]
    lines: list[str] = []
    for version, group in groupby(sorted(holders), key=lambda holder: holder[0]):
        platforms = tuple(platform for _, platform in group)
        hashes = sorted({digest for platform in platforms for digest, _ in resolved[platform][name].wheels})
        lines.append(
            " \\\n    ".join([f"{name}=={version}{marker(platforms)}", *(f"--hash=sha256:{d}" for d in hashes)]) + "\n"
        )
    return lines


def marker(platforms: tuple[Platform, ...]) -> str:
    """The environment marker that is true on ``platforms`` and on no other supported one."""
    if set(platforms) == set(PLATFORMS):
        return ""
    pythons = tuple(python for python in PYTHONS if any(python == p for p, _ in platforms))
    machines = tuple(machine for machine in MACHINES if any(machine == m for _, m in platforms))
    if len(pythons) * len(machines) != len(platforms):
        return " ; " + " or ".join(f"(python_version == '{p}' and platform_machine == '{m}')" for p, m in platforms)
    clauses: list[str] = []
    if pythons != PYTHONS:
        clauses.append("(" + " or ".join(f"python_version == '{python}'" for python in pythons) + ")")
    if machines != MACHINES:
        clauses.append(" or ".join(f"platform_machine == '{machine}'" for machine in machines))
    return " ; " + " and ".join(clauses)


if __name__ == "__main__":
    main()
