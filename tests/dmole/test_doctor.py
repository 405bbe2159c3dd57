# SPDX-License-Identifier: Apache-2.0
"""The doctor reports what is there, and for each lack the command to type."""

from pathlib import Path

import pytest

from dmole import doctor


def test_requirements_are_read_from_metadata_lines() -> None:
    found = doctor.requirements(
        [
            "torch<2.15,>=2.6",
            'rdkit>=2025.3; extra == "data"',
            "pycocoevalcap==1.2",
            'mkdocstrings[python]>=0.28; extra == "docs"',
        ]
    )
    assert [(item.name, item.versions, item.extra) for item in found] == [
        ("torch", "<2.15,>=2.6", ""),
        ("rdkit", ">=2025.3", "data"),
        ("pycocoevalcap", "==1.2", ""),
        ("mkdocstrings", ">=0.28", "docs"),
    ]


@pytest.mark.parametrize(
    ("version", "versions", "expected"),
    [
        ("2.13.0+cpu", ">=2.6,<2.15", True), ("2.5.1", ">=2.6,<2.15", False), ("2.15", ">=2.6,<2.15", False),
        ("2.15.0", "<2.15", False), ("1.2", "==1.2", True), ("1.2.0", "==1.2", True), ("1.3", "==1.2", False),
        ("5.23.0", ">=5.0,<6", True), ("1.4.9", "~=1.4.2", True), ("1.5.0", "~=1.4.2", False), ("3", "!=3", False),
        ("0.21.2.post1", ">=0.15,<0.22", True), ("1.0", "", True), ("1.0", "weird", False),
    ],
)  # fmt: skip
def test_in_range(version: str, versions: str, expected: bool) -> None:
    assert doctor.in_range(version, versions) is expected


def test_a_missing_package_says_what_to_type() -> None:
    missing = doctor.package_finding(doctor.Requirement(name="no-such-package", versions=">=1", extra=""))
    assert not missing.ok and missing.fix == 'pip install "no-such-package>=1"'
    optional = doctor.package_finding(doctor.Requirement(name="no-such-package", versions="", extra="peft"))
    assert optional.ok and optional.found == "not installed (optional)"


def test_a_version_outside_the_tested_range() -> None:
    finding = doctor.package_finding(doctor.Requirement(name="torch", versions="<1", extra=""))
    assert not finding.ok and "outside the tested <1" in finding.found and finding.fix == 'pip install "torch<1"'


def test_a_package_adds_its_lines_and_one_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = tmp_path / "site"
    (written / "somebody-1.0.dist-info").mkdir(parents=True)
    (written / "somebody-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n"
    )
    (written / "somebody-1.0.dist-info" / "entry_points.txt").write_text(
        "[dmole.doctor]\nbroken = somebody_broken:findings\nwhole = somebody_whole:findings\n"
    )
    (written / "somebody_broken.py").write_text("import no_such_module\n")
    (written / "somebody_whole.py").write_text(
        "from dmole.doctor import Finding\n\n"
        "def findings():\n    return [Finding(what='theirs', found='here', ok=True)]\n"
    )
    monkeypatch.syspath_prepend(str(written))
    findings = {finding.what: finding for finding in doctor.examine()}
    assert findings["theirs"].ok
    assert not findings["broken"].ok
    assert findings["broken"].found == "fails with ModuleNotFoundError: No module named 'no_such_module'"


def test_the_whole_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DMOLE_CACHE", str(tmp_path / "cache"))
    findings = {finding.what: finding for finding in doctor.examine()}
    for what in (
        "python",
        "torch",
        "transformers",
        "backend",
        "threads",
        "cache folder",
        "mini benchmark",
        "mini base model",
    ):
        assert what in findings, what
    assert findings["torch"].ok and findings["backend"].ok
    assert (
        str(tmp_path / "cache") in findings["cache folder"].found and "not made yet" in findings["cache folder"].found
    )
    assert all(finding.ok or finding.fix for finding in findings.values())
