# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from dmole.models.drawn import drawn_conversation, drawn_image
from dmole.models.identity import base_identity, weight_files
from dmole.models.loading import load
from dmole.models.vision_language import VisionLanguageModel
from tests.dmole.models.folders import FAMILIES

FolderOf = Callable[[str], Path]


def loss(vlm: VisionLanguageModel) -> float:
    with torch.no_grad():
        return float(vlm.loss(vlm.encode([drawn_conversation([drawn_image(64, 32)])], with_answers=True)))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_on_disk_may_differ_from_those_in_memory(family: str, folder_of: FolderOf) -> None:
    """`load_state_dict` of the file would lose weights where they do; every tensor of the model comes from it here."""
    folder = folder_of(family)
    vlm = load(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert type(vlm.model) is type(model) and vlm.source == str(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(vlm.model.state_dict()[name], tensor), name


def test_some_family_has_other_names_on_disk(folder_of: FolderOf) -> None:
    differ = []
    for family in FAMILIES:
        saved = load_file(folder_of(family) / "model.safetensors")
        differ += [family] * bool(set(saved) - set(load(folder_of(family)).model.state_dict()))
    assert differ


def test_sharded_weights(folder_of: FolderOf, tmp_path: Path) -> None:
    vlm = load(folder_of("llava"))
    vlm.model.save_pretrained(tmp_path, max_shard_size="60KB")
    vlm.processor.save_pretrained(tmp_path)
    files, index = weight_files(str(tmp_path))
    assert len(files) > 2 and b"weight_map" in index
    assert loss(load(tmp_path)) == loss(vlm)


def test_the_dtype_is_the_checkpoints_unless_another_is_asked_for(folder_of: FolderOf, tmp_path: Path) -> None:
    vlm = load(folder_of("llava"), dtype=torch.bfloat16)
    assert vlm.model.dtype == torch.bfloat16
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    assert load(tmp_path).model.dtype == torch.bfloat16
    assert load(tmp_path, dtype="float32").model.dtype == torch.float32


def test_int8_weights_stay_candidates(folder_of: FolderOf) -> None:
    plain, vlm = load(folder_of("llava")), load(folder_of("llava"), quantization="int8")
    assert vlm.candidates == plain.candidates
    for names in vlm.candidates.values():
        for name in names:
            linear = vlm.model.get_submodule(name)
            assert type(linear) is nn.Linear and type(linear.weight) is not nn.Parameter
    assert 0 < abs(loss(vlm) - loss(plain)) < 0.1


def test_another_quantization_is_refused(folder_of: FolderOf) -> None:
    with pytest.raises(ValueError, match=r"quantization: got 'int3'; expected one of int8, or a quantization config"):
        load(folder_of("llava"), quantization="int3")


def test_a_device_map(folder_of: FolderOf) -> None:
    assert loss(load(folder_of("llava"), device_map={"": "cpu"})) == loss(load(folder_of("llava")))


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: the folder '.*nothing' does not exist"):
        load(tmp_path / "nothing")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: '.*' has no config.json; expected a folder that save_pretrained"):
        load(tmp_path)


def test_a_folder_without_a_processor_is_refused(folder_of: FolderOf, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder_of("llava") / name, tmp_path)
    with pytest.raises(ValueError, match=r"processor: '.*' has neither processor_config.json nor preprocessor_config"):
        load(tmp_path)


def test_a_part_that_auto_processor_takes_for_a_processor_is_refused(folder_of: FolderOf, tmp_path: Path) -> None:
    """A vision-encoder-decoder has no processor class: what comes back is one of its parts."""
    shutil.copy(folder_of("llava") / "tokenizer.json", tmp_path)
    settings = json.loads((folder_of("llava") / "tokenizer_config.json").read_text())
    settings.pop("processor_class")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    parts = {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vision-encoder-decoder", **parts}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessorPil"}))
    with pytest.raises(ValueError, match=r"processor: AutoProcessor made a .* without image_processor or tokenizer of"):
        load(tmp_path)


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"is a llama model, which AutoModelForImageTextToText does not have"):
        load(tmp_path)


def test_weights_that_are_missing_are_refused(folder_of: FolderOf, tmp_path: Path) -> None:
    """transformers would draw them and only log a warning."""
    shutil.copytree(folder_of("llava"), tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    state.pop(next(name for name in state if name.endswith("layers.1.mlp.fc1.weight")))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model: the weights of .* lack \['.*layers.1.mlp.fc1.weight'\] \(1\)"):
        load(tmp_path)


# -- identity ------------------------------------------------------------------------------------------------------


def test_the_identity_of_headers_sees_other_shapes_and_the_full_one_other_values(
    folder_of: FolderOf, tmp_path: Path
) -> None:
    vlm = load(folder_of("llava"))
    quick, full = vlm.base_identity(full=False), vlm.base_identity(full=True)
    assert vlm.base_identity() == full  # small ones are read whole
    assert quick["kind"] == "headers" and full["kind"] == "full" and quick["commit"] is None
    assert load(folder_of("llava")).base_identity(full=False) == quick
    shutil.copytree(folder_of("llava"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    other = load(tmp_path)
    assert other.base_identity(full=False)["sha256"] == quick["sha256"]
    assert other.base_identity(full=True)["sha256"] != full["sha256"]
    assert load(folder_of("gemma3")).base_identity(full=False)["sha256"] != quick["sha256"]


def test_the_identity_of_shards_covers_the_index(folder_of: FolderOf, tmp_path: Path) -> None:
    vlm = load(folder_of("llava"))
    vlm.model.save_pretrained(tmp_path, max_shard_size="60KB")
    before = base_identity(vlm.model, str(tmp_path))["sha256"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text() + "\n")
    assert base_identity(vlm.model, str(tmp_path))["sha256"] != before


def test_a_model_made_in_memory_is_told_by_its_tensors(folder_of: FolderOf) -> None:
    model = load(folder_of("llava")).model
    first = base_identity(model, "")
    assert first["kind"] == "tensors" and base_identity(model, "") == first
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert base_identity(model, "")["sha256"] != first["sha256"]


def test_a_folder_without_safetensors_has_no_identity(folder_of: FolderOf, tmp_path: Path) -> None:
    model = load(folder_of("llava")).model
    with pytest.raises(ValueError, match=r"model: '.*' has no model.safetensors; expected model.safetensors, or"):
        base_identity(model, str(tmp_path))
