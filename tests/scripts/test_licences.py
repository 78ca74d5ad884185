"""Licences of dependencies: which are allowed, how they are read, and that the page is of the locks as they are."""

from __future__ import annotations

from importlib.metadata import Distribution
from pathlib import Path

import pytest

from scripts import licences
from scripts.licences import EXCEPTIONS, REQUIREMENTS, Package, known_before, locked, named_licences, packages

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("requirements", REQUIREMENTS)
def test_every_dependency_has_a_licence_that_is_allowed(requirements: str) -> None:
    found = packages(requirements, known_before())
    assert found
    wrong = [f"{p.name} {p.version}: {p.licence}" for p in found if not p.fits]
    assert not wrong, "allow it in scripts/licences.py, or do without it (make licences renews what is known)"


@pytest.mark.parametrize("requirements", REQUIREMENTS)
def test_the_page_lists_every_version_as_it_is_locked(requirements: str) -> None:
    page = (ROOT / "docs" / "licences.md").read_text()
    section = page.partition(f"## requirements/{requirements}\n")[2].partition("\n## ")[0]
    rows = [tuple(line.split(" | ")[:2]) for line in section.splitlines() if line.startswith("| ")][2:]
    listed = {(name.removeprefix("| "), version) for name, version in rows}
    assert listed == set(locked(ROOT / "requirements" / requirements).items()), "make licences"


def test_all_requirements_are_looked_at() -> None:
    assert {path.name for path in (ROOT / "requirements").iterdir()} == set(REQUIREMENTS)


def test_exceptions_are_packages_that_are_locked() -> None:
    names = {name for requirements in REQUIREMENTS for name in locked(ROOT / "requirements" / requirements)}
    assert names >= EXCEPTIONS.keys()


@pytest.mark.parametrize(
    ("licence", "fits"),
    [
        ("MIT", True),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", True),
        ("Apache-2.0 WITH LLVM-exception AND BSD-2-Clause", True),
        ("GPL-3.0-only", False),
        ("MIT AND GPL-3.0-only", False),
        ("AGPL-3.0-or-later", False),
        ("unknown", False),
        ("proprietary", False),
    ],
)
def test_what_is_allowed(licence: str, fits: bool) -> None:
    assert Package("some", "1", licence).fits is fits


def test_the_licences_of_an_expression() -> None:
    assert named_licences("A AND (B OR C WITH x-exception) AND D") == {"A", "B", "C", "D"}


class _Package(Distribution):
    def __init__(self, folder: Path, metadata: str, licence: str = "") -> None:
        self._folder = folder
        self._texts = {"METADATA": f"Metadata-Version: 2.1\nName: some\nVersion: 1\n{metadata}\n", "RECORD": ""}
        if licence:
            (folder / "LICENSE").write_text(licence)
            self._texts["RECORD"] = "LICENSE,,\n"

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path: object) -> Path:
        return self._folder / str(path)


@pytest.mark.parametrize(
    ("metadata", "licence", "stated"),
    [
        ("License-Expression: MIT OR X\nLicense: BSD", "", "MIT OR X"),
        ("License: Apache 2.0", "", "Apache-2.0"),
        ("License: a whole text\nClassifier: License :: OSI Approved :: BSD License", "", "BSD-3-Clause"),
        ("Classifier: License :: OSI Approved :: ISC License (ISCL)", "", "ISC"),
        ("", "Permission is hereby granted,\nfree of charge, to any person obtaining a copy", "MIT"),
        ("", "All rights reserved", "unknown"),
        ("License: GPL-3.0", "", "GPL-3.0-only"),
        ("License: Commercial", "", "unknown"),
        ("Classifier: License :: Other/Proprietary License", "", "proprietary"),
    ],
)
def test_where_a_licence_is_read(tmp_path: Path, metadata: str, licence: str, stated: str) -> None:
    assert licences.stated_licence(_Package(tmp_path, metadata, licence)) == stated


def test_a_package_that_is_not_installed_keeps_what_was_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "x.lock").write_text(
        "# made\nno-such-package==2 \\\n    --hash=sha256:00\npytest==0.0\n"
    )
    monkeypatch.setattr(licences, "ROOT", tmp_path)
    found = packages("x.lock", {("no-such-package", "2"): "ISC", ("pytest", "9"): "MIT"})
    assert [(p.name, p.version, p.licence) for p in found] == [
        ("no-such-package", "2", "ISC"),
        ("pytest", "0.0", "unknown"),
    ]
