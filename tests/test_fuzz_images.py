# SPDX-License-Identifier: Apache-2.0
"""scripts/fuzz_images.py: its committed record, a short run of it, and that it would notice."""

import importlib.util
import json
import os
import struct
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

# Python 3.12 and newer, of the workers that the script forks; they only decode pictures.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_images", ROOT / "scripts" / "fuzz_images.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


def test_five_thousand_damaged_pictures_ended_as_pixels_or_as_named_findings() -> None:
    record = json.loads((ROOT / "results" / "fuzz_images.json").read_text())
    assert record["pictures"] >= 5000 and record["wrong"] == []
    assert sum(record["outcomes"].values()) == record["pictures"]
    assert all(name == "opened" or name.startswith("finding: ") for name in record["outcomes"])
    # Every format that can be written and read, in turn; damage that is seen and damage that is not.
    counts = {form: sum(found.values()) for form, found in record["formats"].items()}
    assert {"AVIF", "BLP", "DDS", "GIF", "ICNS", "JPEG", "JPEG2000", "PNG", "QOI", "TGA", "TIFF", "WEBP"} <= set(counts)
    assert min(counts.values()) >= record["pictures"] // len(counts)
    assert set(record["mutations"]) == {mutate.__name__ for mutate in SCRIPT.MUTATIONS}
    assert 0.2 < record["outcomes"]["opened"] / record["pictures"] < 0.8
    assert record["memory_grown_mib"] < record["memory_allowed_mib"]
    assert len(record["commit"]) == 12 and record["versions"]["pil"]


@given(number=st.integers(0, 10**9), seed=st.integers(0, 10**9))
@settings(
    max_examples=int(os.environ.get("DMOLE_DRAWS", "150")), deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_a_drawn_damaged_picture_ends_as_pixels_or_as_a_named_finding(number: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", SCRIPT.PIXELS)
        form, mutation, content = SCRIPT.mutated(number, seed)
        found = SCRIPT.outcome(content)
        assert not found.startswith("wrong"), (form, mutation, found)


def test_a_run_counts_every_picture() -> None:
    record = SCRIPT.fuzz(2 * len(SCRIPT.originals()), seed=3)
    assert all(sum(found.values()) == 2 for found in record["formats"].values())
    assert record["wrong"] == [] and sum(record["mutations"].values()) == record["pictures"]


def _raises(content: bytes) -> Any:
    raise struct.error("unpack requires a buffer of 4 bytes")


def _hangs(content: bytes) -> Any:
    time.sleep(60)


def _dies(content: bytes) -> Any:
    os._exit(1)


def _grows(content: bytes) -> Any:
    return bytes(2 * SCRIPT.MEMORY)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (_raises, "wrong: error: unpack requires a buffer of 4 bytes"),
        (_hangs, "wrong: no answer in 0.5 seconds"),
        (_dies, "wrong: the process ended"),
        (_grows, "wrong: MemoryError: "),
        (lambda content: Image.new("L", (1, 1)), "wrong: L (1, 1), inspected as "),
    ],
)
def test_what_must_not_be_is_noticed(fault: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCRIPT, "open_image", fault)
    monkeypatch.setattr(SCRIPT, "SECONDS", 0.5)
    monkeypatch.setattr(SCRIPT, "mutated", lambda number, seed: ("PNG", "none", SCRIPT.originals()["PNG"][0]))
    record = SCRIPT.fuzz(1, seed=0)
    (found,) = record["wrong"]
    assert found["outcome"].startswith(expected) and record["outcomes"] == {"wrong": 1}
