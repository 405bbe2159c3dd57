# SPDX-License-Identifier: Apache-2.0
"""The doctor reports what is there, and for each lack the command to type."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dmole import doctor


def test_requirements_are_read_from_metadata_lines() -> None:
    found = doctor.requirements(
        ["torch<2.15,>=2.6", 'rdkit>=2025.3; extra == "data"', 'mkdocstrings[python]>=0.28; extra == "docs"']
    )
    assert [(item.name, str(item.specifier), doctor.is_optional(item)) for item in found] == [
        ("torch", "<2.15,>=2.6", False),
        ("rdkit", ">=2025.3", True),
        ("mkdocstrings", ">=0.28", True),
    ]
    assert [doctor.is_optional(item, "data") for item in found] == [False, False, True]


def test_a_missing_package_says_what_to_type() -> None:
    missing = doctor.package_finding(Requirement("no-such-package>=1"))
    assert not missing.ok and missing.fix == 'pip install "no-such-package>=1"'
    optional = doctor.package_finding(Requirement('no-such-package; extra == "peft"'))
    assert optional.ok and optional.found == "not installed (optional)"


@pytest.mark.parametrize(
    ("version", "versions", "expected"),
    [("2.13.0+cpu", ">=2.6,<2.15", True), ("2.15.0", "<2.15", False), ("2.14.0.dev1", ">=2.6", True)],
)
def test_the_tested_range(version: str, versions: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    finding = doctor.package_finding(Requirement(f"torch{versions}"))
    assert finding.ok is expected
    if not expected:
        assert finding.found == "2.15.0, outside the tested <2.15" and finding.fix == 'pip install "torch<2.15"'


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (
            "raise RuntimeError('operator torchvision::nms\\n does not exist')",
            "fails to import (RuntimeError: operator torchvision::nms does not exist)",
        ),
        ("import no_such_module", "fails to import (ModuleNotFoundError: No module named 'no_such_module')"),
        ("__version__ = '0.28.0+cpu'", "0.28.0+cpu"),
    ],
)
def test_a_torchvision_that_fails_to_import_is_a_finding(
    source: str, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu")
    finding = doctor.torchvision_finding()
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    assert (finding.found, finding.ok) == (found, found == "0.28.0+cpu")
    if not finding.ok:
        assert finding.fix == (
            'pip install "torchvision==0.28.*" from the index that torch 2.13 was installed from; '
            "or pip uninstall torchvision, which few models need"
        )


def test_a_torchvision_that_is_absent_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.6.0")
    finding = doctor.torchvision_finding()
    assert finding.ok and finding.found.startswith("not installed (optional: processors that take videos too")
    assert finding.fix == 'pip install "torchvision==0.21.*" from the index that torch 2.6 was installed from'


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
    assert findings["broken"].found.endswith(
        "which fails to import (ModuleNotFoundError: No module named 'no_such_module'); expected an importable name. "
        "Mend or uninstall somebody."
    )


def test_the_whole_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DMOLE_CACHE", str(tmp_path / "cache"))
    findings = {finding.what: finding for finding in doctor.examine()}
    for what in (
        "python",
        "torch",
        "transformers",
        "torchvision",
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
