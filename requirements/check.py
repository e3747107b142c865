"""Check that a pinned set is complete: every requirement of every pinned package is pinned in it, in a fitting version.

    python requirements/check.py installed cpu [dev]    against the packages installed in this environment; no network
    python requirements/check.py index cuda [dev]       against the metadata of each wheel that pip would take from its
                                                        index, for every supported Python and machine

``--no-deps`` installs exactly what a lock names, so a gap in the lock would only show as a failing import; this shows
it as a name. ``index`` needs pip 25 or newer: it lets pip read the metadata inside each wheel without downloading it.
Exit status 1 and one line per gap; a requirement in ``cpu_left_out.txt`` is no gap. Needs the package ``packaging``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lock import CPU, CUDA, DEV, GLIBC, HERE, MACHINES, PYTHONS, wanted_requirements
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SETS = {locked_set.name: locked_set for locked_set in (CPU, CUDA, DEV)}

Environment = dict[str, str]


@dataclass(frozen=True)
class Package:
    """What one installed or indexed distribution says about itself."""

    name: str
    version: str
    requires: tuple[Requirement, ...]


def main(arguments: Sequence[str]) -> int:
    """Run one of the two checks and print what is missing."""
    if len(arguments) < 2 or arguments[0] not in ("installed", "index") or not set(arguments[1:]) <= set(SETS):
        sys.stderr.write(__doc__ or "")
        return 2
    check = installed_gaps if arguments[0] == "installed" else indexed_gaps
    gaps = check(arguments[1:])
    for gap in gaps:
        sys.stdout.write(f"{gap}\n")
    if not gaps:
        sys.stdout.write(f"complete ({arguments[0]}): {', '.join(arguments[1:])}\n")
    return 1 if gaps else 0


def installed_gaps(names: Sequence[str]) -> list[str]:
    """Compare the locks with the environment that runs this."""
    environment = {key: str(value) for key, value in default_environment().items()}
    pins = [pin for pin in read_pins(names) if holds(pin, environment)]
    packages = [project(names)]
    gaps: list[str] = []
    for pin in pins:
        try:
            found = metadata.distribution(pin.name)
        except metadata.PackageNotFoundError:
            gaps.append(f"{pin.name} is pinned and not installed")
            continue
        packages.append(package_of(pin.name, found.version, found.requires or []))
    return gaps + find_gaps(pins, packages, environment, left_out(names))


def indexed_gaps(names: Sequence[str]) -> list[str]:
    """Compare the locks with the wheels on the index, for every supported platform."""
    gaps: list[str] = []
    for python in PYTHONS:
        for machine in MACHINES:
            environment = environment_of(python, machine)
            pins = [pin for pin in read_pins(names) if holds(pin, environment)]
            packages = [project(names), *packages_on_index(pins, python, machine)]
            found = find_gaps(pins, packages, environment, left_out(names))
            sys.stdout.write(f"Python {python}, {machine}: {len(packages) - 1} wheels read, {len(found)} gaps\n")
            gaps += [f"{gap} (Python {python}, {machine})" for gap in found]
    return gaps


def project(names: Sequence[str]) -> Package:
    """ChatLearn itself, with the extras that go into these sets."""
    wanted = [line for name in names for line in wanted_requirements(SETS[name])]
    return package_of("chatlearn", "", [line for line in wanted if line and not line.startswith("#")])


def read_pins(names: Sequence[str]) -> list[Requirement]:
    """The pins of some locks; the cpu set stands on torch's own file."""
    files = [HERE / f"{name}.txt" for name in names]
    if "cpu" in names:
        files.append(HERE / "torch_cpu.txt")
    return [pin for path in files for pin in parse_lock(path.read_text())]


def parse_lock(text: str) -> list[Requirement]:
    """The requirements of a lock file, without hashes and comments."""
    joined = text.replace("\\\n", " ")
    lines = (line.split(" --hash")[0].strip() for line in joined.splitlines() if not line.startswith("#"))
    return [Requirement(line) for line in lines if line]


def left_out(names: Sequence[str]) -> frozenset[str]:
    """The packages whose absence is meant."""
    if "cpu" not in names:
        return frozenset()
    return frozenset(pin.name for pin in parse_lock((HERE / "cpu_left_out.txt").read_text()))


def find_gaps(
    pins: Iterable[Requirement], packages: Iterable[Package], environment: Environment, meant: frozenset[str]
) -> list[str]:
    """Follow every requirement, with the extras that somebody asks for, and name those that no pin satisfies."""
    pinned: dict[str, str] = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    known: dict[str, Package] = {canonicalize_name(package.name): package for package in packages}
    gaps = [
        f"{name} is pinned to {pinned[name]}, found {package.version}"
        for name, package in known.items()
        if name in pinned and package.version != pinned[name]
    ]
    asked: set[tuple[str, str]] = {(name, "") for name in known}
    waiting = list(asked)
    while waiting:
        name, extra = waiting.pop()
        for requirement in known[name].requires:
            target = canonicalize_name(requirement.name)
            if not holds(requirement, environment, extra) or (target in meant and target not in pinned):
                continue
            if target not in pinned:
                gaps.append(f"{name} requires {requirement}, which is not pinned")
            elif not requirement.specifier.contains(pinned[target], prereleases=True):
                gaps.append(f"{name} requires {requirement}, pinned is {pinned[target]}")
            new = {(target, wanted) for wanted in requirement.extras if target in known} - asked
            asked |= new
            waiting += new
    return sorted(set(gaps))


def holds(requirement: Requirement, environment: Environment, extra: str = "") -> bool:
    """True where the requirement's marker is true, with ``extra`` asked for."""
    return requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra})


def environment_of(python: str, machine: str) -> Environment:
    """The marker environment of one supported platform."""
    full = f"{python}.9"
    return {
        "implementation_name": "cpython",
        "implementation_version": full,
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": full,
        "python_version": python,
        "sys_platform": "linux",
    }


def packages_on_index(pins: Sequence[Requirement], python: str, machine: str) -> list[Package]:
    """Let pip plan an installation for another platform and return the metadata of every wheel it would take."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder, "wanted.txt"), Path(folder, "report.json")
        # Without hashes: pip reads metadata lazily only where it need not hash the whole file.
        # torch's CPU build is not on the index; its installed metadata are checked by `installed`.
        # `===` keeps pip from taking a build such as 2.13.0+cpu for 2.13.0.
        wanted.write_text("\n".join(f"{pin.name}={pin.specifier}" for pin in pins if "+" not in str(pin.specifier)))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
        command += ["--use-feature=fast-deps", "--only-binary=:all:", "--target", folder, "--report", str(report)]
        command += ["--python-version", python, "-r", str(wanted)]
        for tag in platform_tags(machine):
            command += ["--platform", tag]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(
                f"requirements/check.py: pip found no wheel set for Python {python}, {machine}:\n{done.stderr[-2000:]}"
            )
        planned = json.loads(report.read_text())["install"]
    return [
        package_of(entry["metadata"]["name"], entry["metadata"]["version"], entry["metadata"].get("requires_dist", []))
        for entry in planned
    ]


def package_of(name: str, version: str, requires: Iterable[str]) -> Package:
    return Package(name, version, tuple(Requirement(text) for text in requires))


def platform_tags(machine: str) -> list[str]:
    """Every platform tag that a Linux of this machine with the supported glibc accepts."""
    major, newest = (int(part) for part in GLIBC.split("_"))
    return [f"manylinux_{major}_{minor}_{machine}" for minor in range(newest, 4, -1)] + [
        f"manylinux2014_{machine}",
        f"manylinux2010_{machine}",
        f"manylinux1_{machine}",
        f"linux_{machine}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
