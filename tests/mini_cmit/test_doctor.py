# SPDX-License-Identifier: Apache-2.0
"""What the doctor says about the mini benchmark and its model."""

from pathlib import Path

from packaging.requirements import Requirement

from dmole.doctor import Finding
from mini_cmit import doctor
from mini_cmit.model.base import PROCESSOR_FILE, WEIGHTS_FILE


def test_base_model(tmp_path: Path) -> None:
    finding = doctor.base_model(tmp_path)
    assert not finding.ok and finding.found == f"lacks {', '.join(doctor.MODEL_FILES)}"
    assert finding.fix.startswith("python -m mini_cmit.pretraining --output ")
    for name in doctor.MODEL_FILES:
        (tmp_path / name).write_bytes(b"x" * 2**20)
    assert doctor.base_model(tmp_path) == Finding(what="mini base model", found="1.0 MiB", ok=True, fix=finding.fix)


def test_the_shipped_model_is_whole_and_has_what_the_loader_asks_for() -> None:
    (model,) = (finding for finding in doctor.findings() if finding.what == "mini base model")
    assert model.ok and model.found == "13.5 MiB"
    assert {PROCESSOR_FILE, WEIGHTS_FILE} < set(doctor.MODEL_FILES)


def test_packages_of_the_material_are_listed_by_name() -> None:
    needed = [Requirement(f'{name}; extra == "data"') for name in ("numpy", "no-such-package")]
    finding = doctor.benchmark(needed)
    assert not finding.ok and finding.found == "lacks no-such-package"
    assert doctor.benchmark(needed[:1]).found == "all 1 packages"
