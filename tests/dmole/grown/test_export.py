# SPDX-License-Identifier: Apache-2.0
"""Exported folders: stock PEFT gives the answers of the grown model; what servers cannot read is not written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dmole
from dmole.config import load_config
from dmole.data.collate import collate
from dmole.data.sample import Stream
from dmole.grown.export import export
from dmole.grown.saved import SavedModelError
from dmole.models.declaration import Declaration
from dmole.runs.runner import run
from dmole.sources import open_base

peft = pytest.importorskip("peft")
Runs = dict[str, Path]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def peft_logits(folder: Path, batch: Any) -> torch.Tensor:
    """Of the base with the folder as PEFT loads it."""
    model = peft.PeftModel.from_pretrained(open_base("tiny", declaration=Declaration()).model, folder).eval()
    with torch.no_grad():
        return model(**batch.encoded.inputs).logits


def grown_logits(run_folder: Path, batch: Any, tasks: tuple[str, ...]) -> torch.Tensor:
    grown = dmole.load(run_folder)
    with torch.no_grad(), grown.method.task_gates(batch, [tasks] * len(batch.samples)):
        return grown.vlm.model(**batch.encoded.inputs).logits


@pytest.mark.parametrize("tasks", [("colours",), ("colours", "letters"), ("colours", "letters", "captions")])
def test_stock_peft_computes_what_the_grown_model_computes(
    tasks: tuple[str, ...], finished: Runs, toy_stream: Stream, tmp_path: Path
) -> None:
    folder, warnings = export(finished["dmole"], tasks, tmp_path / "lora")
    assert any("layers in the vision tower" in warning for warning in warnings)
    batch = collate(open_base("tiny", declaration=Declaration()), toy_stream.tasks[0].test, with_answers=False)
    wanted = grown_logits(finished["dmole"], batch, tasks)
    torch.testing.assert_close(peft_logits(folder, batch), wanted, rtol=1e-4, atol=1e-4)
    assert (grown_logits(finished["dmole"], batch, ()) - wanted).abs().max() > 1e-2
    config = json.loads((folder / "adapter_config.json").read_text())
    # What vLLM's reader knows: one rank, one alpha, no patterns.
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["r"] == 4 * len(tasks) and config["peft_type"] == "LORA" and config["bias"] == "none"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in tensors)
    assert {len(t) for name, t in tensors.items() if name.endswith("lora_A.weight")} == {4 * len(tasks)}


def test_one_expert_is_exported_byte_for_byte(finished: Runs, tmp_path: Path) -> None:
    folder, _ = export(finished["dmole"], ("letters",), tmp_path / "lora")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (finished["dmole"] / "model/experts/t02_letters" / name).read_bytes()


def test_the_vision_tower_is_left_out_on_request(finished: Runs, tmp_path: Path) -> None:
    folder, warnings = export(finished["dmole"], ("colours",), tmp_path / "lora", language_only=True)
    assert any("are left out: answers differ" in warning for warning in warnings)
    names = list(load_file(folder / "adapter_model.safetensors"))
    assert names and not any("vision" in name for name in names)


def test_methods_with_one_adapter_export_it_for_every_task(finished: Runs, toy_stream: Stream, tmp_path: Path) -> None:
    first, _ = export(finished["seq_ft"], ("colours",), tmp_path / "first")
    second, _ = export(finished["seq_ft"], ("captions",), tmp_path / "second")
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_what_cannot_be_exported_is_refused(finished: Runs, toy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match="task: got 'maps'; expected one of colours, letters, captions"):
        export(finished["dmole"], ("maps",), tmp_path / "lora")
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="to: .*taken exists; expected a new folder"):
        export(finished["dmole"], ("colours",), tmp_path / "taken")
    output = tmp_path / "merged"
    run(
        load_config(
            overrides=(
                f"stream={toy_folder}", "model=tiny", f"output={output}", "methods=[seq_ft]", "train_samples=4",
                "seq_ft.mode=merge_and_restart", "training.num_train_epochs=1", "evaluation.max_new_tokens=3",
                "lora.rank=4", "evaluation.stages=last", "training.report_to=[none]",
            )
        )
    )  # fmt: skip
    with pytest.raises(SavedModelError, match="export: the model of seq_ft .* that is not a LoRA"):
        export(output, ("colours",), tmp_path / "lora")
