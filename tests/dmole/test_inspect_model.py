# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dmole import inspect_model
from dmole.cli import status
from dmole.config import RunConfig, load_config
from dmole.methods import method_class, method_names
from dmole.models.adapters import detach
from dmole.models.loading import load
from tests.dmole.models.folders import write_folder

FolderOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder("idefics3", tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_towers_rows_budget_and_weights_are_printed(idefics3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["inspect", str(idefics3)]) == 0
    out = capsys.readouterr().out
    assert "Idefics3ForConditionalGeneration" in out and str(idefics3) in out
    assert "model.vision_model.encoder.layers.0.self_attn.k_proj" in out
    assert "model.text_model.layers.1.mlp.down_proj" in out
    assert "tokens: rows in proportion to the image tokens" in out
    assert "13 linears of 26 (vision 12, language 14)" in out
    for name in method_names():
        assert name in out
    assert "Contract" not in out


def test_check_passes_on_a_model_that_is_understood(idefics3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["inspect", str(idefics3), "--check"]) == 0
    out = capsys.readouterr().out
    assert "leak" in out and "FAILED" not in out


def test_check_exits_with_1_on_wrong_rows(idefics3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declared = tmp_path / "declared.yaml"
    declared.write_text("declaration:\n  rows: images\n")
    assert status(["inspect", str(idefics3), "--check", "--declaration", str(declared)]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "Set declaration.rows to images, tokens, tiles or padded." in out


def test_what_is_not_understood_exits_with_2(
    idefics3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = tmp_path / "declared.yaml"
    declared.write_text("vision: model.eyes\n")
    assert status(["inspect", str(idefics3), "--declaration", str(declared)]) == 2
    assert "declaration.vision: got 'model.eyes', which the model does not have" in capsys.readouterr().err
    declared.write_text("rows: patches\n")
    assert status(["inspect", str(idefics3), "--declaration", str(declared)]) == 2
    assert "declaration.rows is 'patches'; expected one of auto" in capsys.readouterr().err
    declared.write_text("- rows\n")
    assert status(["inspect", str(idefics3), "--declaration", str(declared)]) == 2
    assert "holds a list; expected a mapping" in capsys.readouterr().err
    shutil.copytree(idefics3, tmp_path / "bare")
    for name in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    assert status(["inspect", str(tmp_path / "bare")]) == 2
    assert "chat_template" in capsys.readouterr().err


def test_the_full_hash_is_another_kind(idefics3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["inspect", str(idefics3), "--full"]) == 0
    assert "base: full " in capsys.readouterr().out


@pytest.mark.parametrize("name", method_names())
def test_the_weights_are_those_that_the_method_trains(name: str, idefics3: Path) -> None:
    """D-MoLE's are its budget times the mean linear; the others train exactly what is printed."""
    config = load_config(overrides=["lora.rank=4"])
    vlm = load(idefics3).ready()
    printed = dict(inspect_model.inspect(vlm, config).methods)[name]
    assert printed is not None
    method = method_class(name)(vlm, config.method_settings(name), seed=0)  # type: ignore[arg-type]
    if name == "zero_shot":
        assert printed == 0
        return
    if name == "dmole":
        # Half of 26 linears at rank 4; the smallest and the largest linear bound the mean.
        sizes = [layer.in_features + layer.out_features for layer in method.adapters.values()]  # type: ignore[attr-defined]
        assert 13 * 4 * min(sizes) < printed < 13 * 4 * max(sizes)
        assert printed == round(13 * 4 * sum(sizes) / len(sizes))
        return
    method.place_adapter(1)  # type: ignore[attr-defined]
    assert sum(p.numel() for p in method.trainable_parameters().values()) == printed
    detach(vlm.model, method.layers)  # type: ignore[attr-defined]


def test_a_method_that_does_not_say_has_no_number() -> None:
    from dmole.methods.base import Method

    assert Method.trained_weights(RunConfig().method_settings("seq_ft"), {"vision": {"a": 8}}) is None
