# SPDX-License-Identifier: Apache-2.0
"""`model/`: written by every method, sealed, read back to the same predictions."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import dmole
from dmole.config import EvaluationSettings, build_section
from dmole.data.sample import Stream
from dmole.grown import saved as saving
from dmole.grown.loading import restore
from dmole.grown.saved import DOCUMENT, FORMAT, SavedModelError, read
from dmole.methods import method_names
from dmole.models.declaration import Declaration
from dmole.runs.evaluation import generation_queue, predict
from dmole.sources import open_base
from dmole.training.acceleration import make_accelerator
from dmole.training.settings import TrainingSettings
from dmole.training.stage_training import Profile


def stored(run: Path) -> dict[tuple[str, str], tuple[str, list[str] | None]]:
    """The run's own final predictions: {(task, id): (text, route)}."""
    final = json.loads((run / "result.json").read_text())["final_rows"]
    with gzip.open(run / "predictions.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return {
        (line["task"], line["id"]): (line["prediction"], line["route"])
        for line in lines
        if line["stage"] == final[line["task"]]
    }


@pytest.mark.parametrize("method", method_names())
def test_a_saved_model_repeats_the_last_predictions(method: str, finished: dict[str, Path], toy_stream: Stream) -> None:
    run = finished[method]
    vlm = open_base("tiny", declaration=Declaration())
    restored = restore(read(run / "model"), vlm)
    config = json.loads((run / "config.json").read_text())["config"]
    settings = build_section(EvaluationSettings, config["evaluation"])
    tasks = sorted(toy_stream.tasks, key=lambda task: task.name)
    found: dict[tuple[str, str], tuple[str, list[str] | None]] = {}
    # Finetune is tested task by task, with the adapter of each.
    for group in [[task] for task in tasks] if restored.routed_by == "caller" else [tasks]:
        if restored.routed_by == "caller":
            restored.adapter = restored.task_experts()[group[0].name]  # type: ignore[attr-defined]
        queue = generation_queue(vlm, group, settings.per_device_eval_batch_size)
        for answers in predict(restored, queue, settings, make_accelerator(TrainingSettings()), profile=Profile()):
            for said in answers:
                found[said.task, said.id] = (said.text, None if said.route is None else list(said.route))
    assert found == stored(run)
    assert len({text for text, _ in found.values()}) > (0 if method == "zero_shot" else 1)


def test_dmole_leaves_an_expert_for_each_task_and_its_router(finished: dict[str, Path]) -> None:
    folder = finished["dmole"] / "model"
    assert sorted(path.name for path in (folder / "experts").iterdir()) == [
        "t01_colours", "t02_letters", "t03_captions",
    ]  # fmt: skip
    document = json.loads((folder / DOCUMENT).read_text())
    assert document["format"] == FORMAT and document["method"] == "dmole"
    assert [task["name"] for task in document["tasks"]] == ["colours", "letters", "captions"]
    assert set(read(folder).tensors) >= {"router.threshold_T", "router.encoder_weight_THD"}
    assert json.loads((finished["dmole"] / "result.json").read_text())["model"] == document["sha256"]
    assert 'dmole.load("this folder")' in (folder / "README.md").read_text()


@pytest.fixture
def copied(finished: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished["dmole"] / "model", tmp_path / "model"))


@pytest.mark.parametrize(
    "name", ["experts/t01_colours/adapter_model.safetensors", "method.safetensors", "README.md", DOCUMENT]
)
def test_an_edited_file_is_refused_by_name(name: str, copied: Path) -> None:
    path = copied / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(SavedModelError, match=path.name):
        read(copied)


def test_a_missing_or_strange_file_is_refused_by_name(copied: Path) -> None:
    (copied / "experts" / "t01_colours" / "extra.bin").write_bytes(b"")
    with pytest.raises(SavedModelError, match=r"extra.bin is not in dmole.json"):
        read(copied)
    (copied / "experts" / "t01_colours" / "extra.bin").unlink()
    (copied / "method.safetensors").unlink()
    with pytest.raises(SavedModelError, match=r"method.safetensors is missing"):
        read(copied)


def resealed(folder: Path, **changes: Any) -> None:
    """dmole.json with other values and a right seal."""
    body = {**json.loads((folder / DOCUMENT).read_text()), **changes}
    body.pop("sha256")
    (folder / DOCUMENT).write_text(json.dumps({**body, "sha256": saving.sealed_digest(body)}))


def test_a_newer_format_is_refused_with_the_reason(copied: Path) -> None:
    resealed(copied, format=FORMAT + 1, something_new={})
    with pytest.raises(SavedModelError, match=rf"has format {FORMAT + 1}; this version of dmole reads up to .* Update"):
        read(copied)


def test_another_base_and_another_processor_are_refused(copied: Path, tmp_path: Path) -> None:
    vlm = open_base("tiny", declaration=Declaration())
    with_other_weights = tmp_path / "other"
    vlm.processor.save_pretrained(with_other_weights)
    next(vlm.model.parameters()).data.add_(1.0)
    vlm.model.save_pretrained(with_other_weights)
    with pytest.raises(SavedModelError, match="base: got .*other, whose sha256 is .* Pass base="):
        dmole.load(copied, base=str(with_other_weights))
    base = json.loads((copied / DOCUMENT).read_text())["base"]
    resealed(copied, base={**base, "inputs": "0" * 64})
    with pytest.raises(SavedModelError, match="processor: that of"):
        dmole.load(copied)


def test_a_folder_without_a_model_and_one_of_several_runs_are_refused(
    finished: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(SavedModelError, match=r"has no model/dmole.json; expected the folder of a finished run"):
        dmole.load(tmp_path)
    with pytest.raises(SavedModelError, match=r"which holds 5 runs; expected one of .*dmole-seed0-default"):
        dmole.load(finished["dmole"].parent.parent)
