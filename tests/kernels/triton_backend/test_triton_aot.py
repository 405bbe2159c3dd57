# SPDX-License-Identifier: Apache-2.0
"""The committed record of ahead-of-time compilation keeps the limits, and the check notices what changes.

Compiling itself takes minutes and no interpreter: `python -m dmole_kernels check-aot`.
"""

from __future__ import annotations

import json
import re

import pytest

from dmole_kernels import _aot as aot
from dmole_kernels import triton_backend
from dmole_kernels.triton_backend.cases import every_launch
from dmole_kernels.triton_backend.configs import TARGETS

RECORD = json.loads(aot.RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("target", TARGETS)
def test_every_recorded_kernel_keeps_the_limits(target: str) -> None:
    entries = {key: entry for key, entry in RECORD["kernels"].items() if key.startswith(target + " ")}
    assert {key.split(" ")[1] for key in entries} == {launch.name for _, launch in every_launch(target)}
    assert [problem for key, entry in entries.items() for problem in aot.broken_limits(key, entry)] == []


def test_a_broken_limit_is_told() -> None:
    good = {"registers": 64, "spills": 0, "shared": 1024, "tensor_cores": "wgmma", "wants_tensor_cores": True}
    assert list(aot.broken_limits("sm_90 expand | x", good)) == []
    (spilled,) = aot.broken_limits("sm_90 expand | x", good | {"spills": 8})
    assert "8 bytes or registers spilled; expected none. Take smaller tiles" in spilled
    assert list(aot.broken_limits("sm_90 expand | x", good | {"spills": 8}, spills=False)) == []
    (large,) = aot.broken_limits("gfx942 expand | x", good | {"shared": 65540})
    assert "65540 bytes of shared memory; expected at most 65536" in large
    (slow,) = aot.broken_limits("sm_90 expand | x", good | {"tensor_cores": None})
    assert "no tensor-core instruction; expected one of tcgen05, wgmma, mma.sync, mfma" in slow


def test_a_difference_from_the_record_is_told_and_another_version_checks_hard_limits_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    key, entry = next((k, e) for k, e in RECORD["kernels"].items() if k.startswith("sm_90 "))
    recorded = {"triton": "3.9.0", "kernels": {key: entry}}
    assert aot.differences({key: entry}, recorded, "3.9.0", ["sm_90"]) == []
    (line,) = aot.differences({key: entry | {"registers": 1}}, recorded, "3.9.0", ["sm_90"])
    assert "expected" in line and "check-aot --write" in line
    assert len(aot.differences({"sm_90 new | x": entry}, recorded, "3.9.0", ["sm_90"])) == 2
    assert aot.differences({}, recorded, "3.9.0", ["sm_80"]) == []
    assert aot.differences({}, recorded, "4.0.0", ["sm_90"]) == []
    assert "only hard limits count, not spills" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["3.2.0", "3.4.0"])
def test_a_triton_that_cannot_compile_for_another_target_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match=f"check-aot got triton {version}; expected 3.5 or newer. Install a newer"):
        aot._check_version(version)


def test_without_triton_check_aot_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "available", lambda: False)
    with pytest.raises(ValueError, match=re.escape("expected triton>=3.2,<3.10. Run pip install 'triton>=3.2,<3.10'")):
        aot.check_aot([])


def test_unknown_arguments_and_interpreted_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="check-aot got .*; expected nothing, --quick or --write"):
        aot.check_aot(["--fast"])
    with pytest.raises(ValueError, match="TRITON_INTERPRET is set; expected compiled kernels"):
        aot.compile_slice("sm_90", 0, 1)
