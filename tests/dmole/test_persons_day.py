# SPDX-License-Identifier: Apache-2.0
"""A person's first day with a model of their own: inspect --check, two methods over three tasks, resume, verify.

The folders are those of `save_pretrained`, of five families whose processors need no torchvision. The tasks have one
image, two images and none.
"""

from __future__ import annotations

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


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_train_resume_and_verify(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(family, tmp_path / "model")
    stream = write_stream(tmp_path / "stream")
    assert status(["inspect", str(folder), "--check"]) == 0
    said = capsys.readouterr().out
    assert "candidates" in said and "FAILED" not in said and "weights trained per task" in said

    def run(output: Path, *options: str) -> int:
        changes = [part for setting in SETTINGS for part in ("--set", setting)]
        return status(
            ["run", str(stream), "--model", str(folder), "--method", "dmole,seq_ft", "--output", str(output),
             *changes, *options]
        )  # fmt: skip

    assert run(tmp_path / "out") == 0, capsys.readouterr().err
    assert status(["verify", str(tmp_path / "out")]) == 0, capsys.readouterr().out
    for method in ("dmole", "seq_ft"):
        result = json.loads((tmp_path / "out" / "runs" / f"{method}-seed0-default" / "result.json").read_text())
        assert result["summary"]["trainable_parameters"] > 0
        assert set(result["well_formed"]["3"]) == set(TASKS)
    towers = set(load(folder).candidates)
    experts = json.loads((tmp_path / "out" / "runs" / "dmole-seed0-default" / "result.json").read_text())
    assert set(experts["method"]["candidates"]) == towers == {"vision", "language"}


def test_a_stopped_run_of_a_foreign_model_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmole.runs.single_run import SingleRun

    folder, stream = write_folder("gemma3", tmp_path / "model"), write_stream(tmp_path / "stream")

    def run(output: Path, *options: str) -> int:
        changes = [part for setting in SETTINGS for part in ("--set", setting)]
        return status(
            ["run", str(stream), "--model", str(folder), "--method", "dmole", "--output", str(output),
             *changes, *options]
        )  # fmt: skip

    assert run(tmp_path / "whole") == 0
    save, saved = SingleRun._save, []

    def stop(self: SingleRun, *arguments: object, **keywords: object) -> None:
        save(self, *arguments, **keywords)  # type: ignore[arg-type]
        saved.append(arguments)
        if len(saved) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(SingleRun, "_save", stop)
    assert run(tmp_path / "stopped") == 130
    monkeypatch.setattr(SingleRun, "_save", save)
    assert run(tmp_path / "stopped", "--resume") == 0
    place = Path("runs") / "dmole-seed0-default"
    for name in COMPARED:
        assert (tmp_path / "stopped" / place / name).read_bytes() == (tmp_path / "whole" / place / name).read_bytes()
    shutil.rmtree(tmp_path / "stopped")
