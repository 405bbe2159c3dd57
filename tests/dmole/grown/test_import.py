# SPDX-License-Identifier: Apache-2.0
"""A LoRA folder from elsewhere as an expert of a saved model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import dmole
from dmole.cli import status
from dmole.config import load_config
from dmole.data.collate import collate
from dmole.data.reading import read_stream
from dmole.data.sample import Sample
from dmole.grown.forget import forget
from dmole.grown.import_expert import import_expert
from dmole.grown.model import GrownModel
from dmole.grown.saved import SavedModelError, read
from dmole.runs.runner import run
from mini_cmit.model.tiny import build_tiny_model

peft = pytest.importorskip("peft")
Runs = dict[str, Path]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def finished(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """{method: its run}, with a router that tells the tasks apart."""
    output = tmp_path_factory.mktemp("importing") / "out"
    overrides = (
        f"stream={toy_folder}", "model=tiny", f"output={output}", "methods=[dmole, seq_ft]", "lora.rank=4",
        "training.num_train_epochs=1", "training.per_device_train_batch_size=4", "training.report_to=[none]",
        "evaluation={stages: last, zero_shot: false, max_new_tokens: 3}", "dmole.proxy_min_samples=4",
        "dmole.router={epochs: 200, decoder: linear, learning_rate: 0.005, final_learning_rate: 0.005}",
    )  # fmt: skip
    run(load_config(overrides=overrides))
    return {method: output / "runs" / f"{method}-seed0-default" for method in ("dmole", "seq_ft")}


@pytest.fixture
def copied(finished: Runs, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished["dmole"], tmp_path / "run"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blue and white pictures with a question of their own; the folder of the task is that of its files."""
    root = tmp_path_factory.mktemp("skies") / "skies"
    root.mkdir()
    (root / "stream.yaml").write_text("name: skies\ntasks: [{name: skies, metric: exact_match, directory: .}]\n")
    for split, count in (("train", 8), ("test", 2)):
        rows = []
        for number in range(count):
            Image.new("RGB", (16, 16), (0, 0, 100 + 10 * number)).save(root / f"{split}{number}.png")
            row = {"id": f"{split}-{number}", "image": f"{split}{number}.png", "answers": ["red"]}
            rows.append(json.dumps({**row, "instruction": "Is the image a letter? yes yes yes yes yes yes"}))
        (root / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def lora(finished: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stock PEFT writes, with one rank of its own at one place, all weights drawn."""
    names = [
        name for expert in read(finished["dmole"] / "model").state["pool"] for name in expert["linears"]["language"]
    ]
    targets = sorted(set(names))[:3]
    return peft_folder(tmp_path_factory.mktemp("lora") / "lora", targets, rank_pattern={targets[0]: 3})


def peft_folder(to: Path, targets: list[str], **settings: object) -> Path:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False, **settings)
    peft.get_peft_model(build_tiny_model(0).model, config).save_pretrained(str(to))
    return to


def logits(grown: GrownModel, samples: list[Sample], tasks: list[tuple[str, ...]]) -> torch.Tensor:
    batch = collate(grown.vlm, samples, with_answers=False)
    with grown.method.task_gates(batch, tasks), torch.no_grad():
        return torch.as_tensor(grown.vlm.model(**batch.encoded.inputs).logits)


def test_it_answers_as_peft_does_and_is_found_by_the_router(copied: Path, task: Path, lora: Path) -> None:

    before = dmole.load(copied)
    known = list(read_stream(json.loads((copied / "config.json").read_text())["config"]["stream"]).tasks[0].test)
    old = logits(before, known, [("colours",)] * len(known))
    folder, notes = import_expert(copied, lora, task)
    assert folder == copied / "model" and notes == ()
    grown = dmole.load(copied)
    assert grown.tasks == ("colours", "letters", "captions", "skies")
    assert torch.equal(logits(grown, known, [("colours",)] * len(known)), old)
    samples = list(read_stream(task).tasks[0].train)
    plain = build_tiny_model(0)
    loaded = peft.PeftModel.from_pretrained(plain.model, str(lora)).eval()
    with torch.no_grad():
        expected = loaded(**collate(plain, samples, with_answers=False).encoded.inputs).logits
    base = logits(grown, samples, [()] * len(samples))
    torch.testing.assert_close(logits(grown, samples, [("skies",)] * len(samples)), expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 0.01
    routes = grown.route(images=[list(s.images) for s in samples], text=[s.instruction for s in samples])
    assert sum(route.tasks[:1] == ("skies",) for route in routes) >= 7
    expert = next(expert for expert in grown.experts if expert.task == "skies")
    assert expert.name == "t04_skies" and sorted(expert.linears.values()) == [2, 2, 3]


def test_the_change_is_on_record_or_in_a_new_folder(copied: Path, task: Path, lora: Path, tmp_path: Path) -> None:
    before = read(copied / "model")
    folder, _ = import_expert(copied, lora, task, to=tmp_path / "grown")
    assert read(copied / "model").digest == before.digest
    saved = read(folder)
    assert saved.origin == before.digest and saved.changes[0]["import"] == "skies"
    assert saved.task_experts["skies"] == "t04_skies" and saved.trained_beside["skies"] == {}
    assert {"name": "skies", "metric": "exact_match"} in saved.tasks
    with pytest.raises(FileExistsError, match="to: .*grown exists; expected a new folder"):
        import_expert(copied, lora, task, to=tmp_path / "grown")
    forget(folder, "colours")
    assert "skies" in dmole.load(folder).tasks
    assert status(["import", str(copied), str(lora), "--task", str(task)]) == 0
    assert read(copied / "model").changes[0]["expert"] == "t04_skies"


def test_what_cannot_be_imported_is_refused(
    finished: Runs, copied: Path, task: Path, lora: Path, toy_folder: Path, tmp_path: Path
) -> None:
    digest = read(copied / "model").digest
    linear = json.loads((lora / "adapter_config.json").read_text())["target_modules"][0]
    with pytest.raises(ValueError, match="use_dora=True.*expected a plain LoRA adapter"):
        import_expert(copied, peft_folder(tmp_path / "dora", [linear], use_dora=True), task)
    with pytest.raises(
        ValueError,
        match=r"lora: .* has .model.multi_modal_projector.linear_1. \(1 such layers\), which is no candidate",
    ):
        import_expert(copied, peft_folder(tmp_path / "head", ["model.multi_modal_projector.linear_1"]), task)
    with pytest.raises(ValueError, match="has no adapter_config.json; expected a PEFT adapter"):
        import_expert(copied, task, task)
    with pytest.raises(ValueError, match="import: got a model of seq_ft, which has no router"):
        import_expert(finished["seq_ft"], lora, task)
    taken = Path(shutil.copytree(task, tmp_path / "taken"))
    (taken / "stream.yaml").write_text("name: skies\ntasks: [{name: letters, metric: exact_match, directory: .}]\n")
    with pytest.raises(SavedModelError, match="task: got 'letters', which .* has .*; expected a new name"):
        import_expert(copied, lora, taken)
    with pytest.raises(ValueError, match="whose stream.yaml lists 3 tasks"):
        import_expert(copied, lora, toy_folder)
    assert read(copied / "model").digest == digest


def test_a_lora_of_another_base_is_named(copied: Path, task: Path, lora: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(lora, tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "somebody/large"}))
    notes = import_expert(copied, other, task)[1]
    assert len(notes) == 1 and "names the base somebody/large; this model's is tiny" in notes[0]
