# SPDX-License-Identifier: Apache-2.0
"""A person's first day with a model of their own: inspect --check, two methods over three tasks, resume, verify.

The folders are those of `save_pretrained`, of five families whose processors need no torchvision, and of two that do:
these in the long test, which scripts/with_torchvision.py runs where torchvision is. The tasks have one image, two
images and none.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dmole.cli import status
from dmole.models.loading import load

from .models.folders import FAMILIES, write_folder

TASKS = {"colour": 1, "same": 2, "capital": 0}  # images of a sample
SETTINGS = (
    "threads=1", "training.num_train_epochs=1", "training.per_device_train_batch_size=3", "lora.rank=2",
    "evaluation.per_device_eval_batch_size=4", "evaluation.max_new_tokens=8", "dmole.proxy_min_samples=3",
    "dmole.router.epochs=2", "training.save_steps=1", "training.report_to=[none]",
)  # fmt: skip
COMPARED = ("matrix.csv", "predictions.jsonl.gz", "losses.csv")


def write_stream(root: Path) -> Path:
    """Three tasks with six training and three test samples; images are of two sizes, which some towers tell apart."""
    tasks = []
    for task, images in TASKS.items():
        tasks.append(f"  - {{name: {task}, metric: exact_match, directory: {task}}}")
        (root / task).mkdir(parents=True)
        for split, count in (("train", 6), ("test", 3)):
            rows = []
            for number in range(count):
                shown = []
                for place in range(images):
                    name = f"{split}{number}-{place}.png"
                    size = ((32, 48), (48, 32))[(number + place) % 2]
                    Image.new("RGB", size, ["red", "green"][number % 2]).save(root / task / name)
                    shown.append(name)
                rows.append(
                    {
                        "id": f"{task}-{split}-{number}",
                        **({"image": shown[0]} if images == 1 else {"images": shown}),
                        "instruction": "Answer briefly. " + "yes " * (number % 3 + 1),
                        "answers": [["red", "green"][number % 2]],
                    }
                )
            (root / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "stream.yaml").write_text("name: day\ntasks:\n" + "\n".join(tasks) + "\n")
    return root


def a_day(folder: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = write_stream(root / "stream")
    assert status(["inspect", str(folder), "--check"]) == 0
    said = capsys.readouterr().out
    assert "candidates" in said and "FAILED" not in said and "weights trained per task" in said
    assert run(folder, stream, root / "out", "--method", "dmole,seq_ft") == 0, capsys.readouterr().err
    assert status(["verify", str(root / "out")]) == 0, capsys.readouterr().out
    for method in ("dmole", "seq_ft"):
        result = json.loads((root / "out" / "runs" / f"{method}-seed0-default" / "result.json").read_text())
        assert result["summary"]["trainable_parameters"] > 0
        assert set(result["well_formed"]["3"]) == set(TASKS)
    towers = set(load(folder).candidates)
    experts = json.loads((root / "out" / "runs" / "dmole-seed0-default" / "result.json").read_text())
    assert set(experts["method"]["candidates"]) == towers == {"vision", "language"}


def a_stopped_run(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dmole.runs.single_run import SingleRun

    stream = write_stream(root / "stopped_stream")
    assert run(folder, stream, root / "whole", "--method", "dmole") == 0
    save, saved = SingleRun._save, []

    def stop(self: SingleRun, *arguments: object, **keywords: object) -> None:
        save(self, *arguments, **keywords)  # type: ignore[arg-type]
        saved.append(arguments)
        if len(saved) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(SingleRun, "_save", stop)
    assert run(folder, stream, root / "stopped", "--method", "dmole") == 130
    monkeypatch.setattr(SingleRun, "_save", save)
    assert run(folder, stream, root / "stopped", "--method", "dmole", "--resume") == 0
    place = Path("runs") / "dmole-seed0-default"
    for name in COMPARED:
        assert (root / "stopped" / place / name).read_bytes() == (root / "whole" / place / name).read_bytes()


def run(folder: Path, stream: Path, output: Path, *options: str) -> int:
    changes = [part for setting in SETTINGS for part in ("--set", setting)]
    return status(["run", str(stream), "--model", str(folder), "--output", str(output), *changes, *options])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_train_resume_and_verify(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_day(write_folder(family, tmp_path / "model"), tmp_path, capsys)


def test_a_stopped_run_of_a_foreign_model_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_stopped_run(write_folder("gemma3", tmp_path / "model"), tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "stopped")


# -- families whose processors need torchvision ------------------------------------------------------------------------

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="the processor's video processor needs torchvision: run scripts/with_torchvision.py",
)
VIDEO = ("qwen2_5_vl", "internvl")


@pytest.fixture
def video_folder(family: str, tmp_path: Path) -> Path:
    from .models.video_folders import write_video_folder

    return write_video_folder(family, tmp_path / "model")


@pytest.mark.torchvision
@needs_torchvision
@pytest.mark.parametrize("family", VIDEO)
def test_a_day_with_a_processor_that_has_a_video_processor(
    video_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(video_folder).processor.video_processor is not None
    a_day(video_folder, tmp_path, capsys)
    a_stopped_run(video_folder, tmp_path, monkeypatch)


@pytest.mark.torchvision
@needs_torchvision
@pytest.mark.parametrize("family", VIDEO)
def test_the_contract_through_such_a_processor(family: str, video_folder: Path) -> None:
    from dmole.models.contract import check, drawn_probes

    from .models.video_folders import RULES

    vlm = load(video_folder).ready()
    assert vlm.declaration.rows == RULES[family]
    findings = check(vlm, drawn_probes(vlm))
    assert [finding for finding in findings if not finding.ok] == []
    assert {finding.point for finding in findings} == {1, 2, 3, 4, 5, 6, 7, 9, 10}
