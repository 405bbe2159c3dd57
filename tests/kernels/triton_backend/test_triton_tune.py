# SPDX-License-Identifier: Apache-2.0
"""The tuner's path, interpreted: what it writes the table reads, but for the interpreter's own times."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from dmole_kernels import _tune as tune
from dmole_kernels.triton_backend.configs import FLAGS_OF, TABLE, TUNED, Config, configuration, misfits, with_tuned


def test_what_the_tuner_writes_the_table_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tuned.json"
    assert tune.main(["--output", str(output), "--kernels", "shrink,expand,sketch"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(tune.INTERPRETER) and "2 tried, 0 do not fit" in said
    record = json.loads(output.read_text(encoding="utf-8"))
    entry = record["interpreter"]
    assert entry["device"] == tune.INTERPRETER
    assert {kernel: set(bits) for kernel, bits in entry["kernels"].items()} == {
        "shrink": {"16", "32"}, "expand": {"16", "32"}, "sketch": {"32"},
    }  # fmt: skip
    with pytest.raises(ValueError, match="tuned.json has an entry for 'interpreter'; expected sm_80"):
        with_tuned(TABLE, record)
    chosen = with_tuned(TABLE, {"sm_90": entry})["sm_90"]
    assert configuration("shrink", chosen, 16) == Config(**entry["kernels"]["shrink"]["16"])
    assert configuration("sketch", chosen, 16) is configuration("sketch", "sm_90", 16)
    assert configuration("weight_gradient", chosen, 16) is configuration("weight_gradient", "sm_90", 16)


def test_a_record_that_the_kernels_cannot_use_is_refused() -> None:
    config = asdict(Config(rows=48, width=128, warps=4, stages=2))
    record = {"sm_90": {"kernels": {"expand": {"16": config}}}}
    with pytest.raises(ValueError, match="tuned.json for sm_90: expand, 16 bits: 48 rows; expected a multiple of"):
        with_tuned(TABLE, record)


def test_the_committed_record_names_its_devices_and_dates() -> None:
    for entry in json.loads(TUNED.read_text(encoding="utf-8")).values():
        assert entry.keys() == {"device", "date", "triton", "kernels"}


@pytest.mark.parametrize("kernel", tune.LAUNCHES)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_candidates_begin_with_the_table_and_fit_the_kernels_tuned_before(kernel: str, target: str) -> None:
    kernels = list(tune.LAUNCHES)
    for element in (0, 1):
        fitting = tune._fitting(kernel, element, TABLE[target], kernels)
        assert fitting[0] == TABLE[target][kernel][element]
        assert len(fitting) == len(set(fitting)) >= 8
        for config in fitting if kernel in FLAGS_OF else []:
            assert list(misfits(tune._with(TABLE[target], kernel, element, config))) == []


def test_after_the_deadline_no_entry_is_begun() -> None:
    record = tune.tune(("shrink",), device="cpu", most=1, deadline=time.monotonic() - 1, say=lambda line: None)
    assert record["interpreter"]["kernels"] == {}


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="--kernels has stretch; expected some of shrink, expand"):
        tune.main(["--kernels", "shrink,stretch"])
