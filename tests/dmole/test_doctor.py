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


def test_base_model(tmp_path: Path) -> None:
    finding = doctor.base_model(tmp_path)
    assert not finding.ok and finding.found == f"lacks {', '.join(doctor.MODEL_FILES)}"
    assert finding.fix.startswith("python -m mini_cmit.pretraining --output ")
    for name in doctor.MODEL_FILES:
        (tmp_path / name).write_bytes(b"x" * 2**20)
    assert doctor.base_model(tmp_path) == doctor.Finding(
        what="mini base model", found="1.0 MiB", ok=True, fix=finding.fix
    )


def test_the_doctor_looks_where_the_model_is_read() -> None:
    # The doctor must work without torch and so cannot import these.
    from mini_cmit.model.shipped import MINI_WEIGHTS
    from dmole.models.multimodal import PROCESSOR_FILE, WEIGHTS_FILE

    assert doctor.model_folder() == MINI_WEIGHTS
    assert {PROCESSOR_FILE, WEIGHTS_FILE} < set(doctor.MODEL_FILES)


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


def test_memory_is_plausible() -> None:
    memory = doctor.memory_gib()
    assert memory is None or 0.1 < memory < 100_000
