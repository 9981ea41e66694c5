"""Tested versions of the dependencies, and advice for errors under other versions."""

from __future__ import annotations

import contextlib
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

PACKAGE = Path(__file__).parents[1]  # lit_align, with the constraints file of an installed package


def tested() -> dict[str, str]:
    """Tested version of each package, by canonical name; empty if the constraints file is missing."""
    # Look in the source tree first, then in the installed package.
    for file in (PACKAGE.parent / "docker" / "constraints.txt", PACKAGE / "constraints.txt"):
        if file.is_file():
            pins = re.findall(r"^([\w.-]+)==(\S+)$", file.read_text(), re.MULTILINE)
            return {canonicalize_name(name): version for name, version in pins}
    return {}


def requirements() -> dict[str, Requirement]:
    """Direct dependencies with their bounds, by canonical name; empty if lit_align is not installed."""
    try:
        lines = metadata.requires("lit_align") or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(x.name): x for x in parsed if x.marker is None or x.marker.evaluate({"extra": ""})}


def installed(name: str) -> str | None:
    """Installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_dependency(module: str) -> bool:
    """True if a top-level module belongs to a package that lit_align needs, directly or not, or was tested with."""
    needed = {*tested(), *requirements()}
    ahead = list(needed)
    while ahead:
        with contextlib.suppress(metadata.PackageNotFoundError):
            for line in metadata.requires(ahead.pop()) or []:
                name, extra = canonicalize_name(Requirement(line).name), "extra" in line
                if not extra and name not in needed:
                    needed.add(name)
                    ahead.append(name)
    owners = {canonicalize_name(owner) for owner in metadata.packages_distributions().get(module, [])}
    return bool(owners & needed)


def outside() -> list[str]:
    """One phrase for each direct dependency that is missing or outside of the tested bounds."""
    found = []
    for name, requirement in requirements().items():
        version = installed(name)
        if version is None:
            found.append(f"{name} is not installed (tested: {_bounds(requirement)})")
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{name} {version} (tested: {_bounds(requirement)})")
    return found


def blamed(error: BaseException) -> list[str]:
    """One phrase for each package that an error names or comes from and whose version is not the tested one."""
    pins = tested()
    owners = metadata.packages_distributions()
    named: list[str] = []
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, ImportError) and current.name:
            named.append(current.name)
        traceback = current.__traceback__
        while traceback is not None:
            named.append(str(traceback.tb_frame.f_globals.get("__name__") or ""))
            traceback = traceback.tb_next
        current = current.__cause__ or current.__context__
    phrases = {}
    for module in named:
        for owner in owners.get(module.split(".")[0], []):
            name = canonicalize_name(owner)
            version = installed(name)
            if version and name in pins and _differ(version, pins[name]):
                phrases[name] = f"{name} {version} (tested: {pins[name]})"
    return list(phrases.values())


def advice(error: BaseException) -> str | None:
    """One sentence on versions that may explain an error; None if all of them are the tested ones."""
    suspects = {phrase.split()[0]: phrase for phrase in [*blamed(error), *outside()]}
    if not suspects:
        return None
    pins = tested()
    wanted = " ".join(f"'{name}=={pins[name]}'" for name in suspects if name in pins)
    way_out = f"; the tested versions: pip install {wanted}" if wanted else ""
    return f"installed versions that were not tested: {', '.join(suspects.values())}{way_out}"


def tested_together(*names: str) -> str:
    """One sentence on packages that must match each other: the installed and the tested versions."""
    pins = tested()
    here = ", ".join(f"{name} {installed(name)}" for name in names)
    known = [f"{name}=={pins[name]}" for name in names if name in pins]
    way_out = f"; tested: {', '.join(known)} (pip install {' '.join(map(repr, known))})" if known else ""
    return f"installed: {here}{way_out}"


def failed_import(error: BaseException) -> str:
    """Error line for a dependency that cannot be imported."""
    what = f"a dependency cannot be imported: {type(error).__name__}: {error}"
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    return f"{what}; {advice(error) or f'all versions are the tested ones, under {python}: reinstall lit_align'}"


def _bounds(requirement: Requirement) -> str:
    return ",".join(sorted(map(str, requirement.specifier), key=lambda part: not part.startswith(">")))


def _differ(version: str, pin: str) -> bool:
    try:
        return Version(version).public != Version(pin).public  # 2.13.0+cpu is 2.13.0
    except InvalidVersion:
        return version != pin
