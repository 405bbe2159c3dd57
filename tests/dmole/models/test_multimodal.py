# SPDX-License-Identifier: Apache-2.0
"""The model as dmole sees it: prompts, towers, candidates, save and load."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dmole.data.collate import IGNORE, collate
from dmole.data.sample import Sample
from dmole.models.multimodal import MultimodalModel, candidate_linears, load_model
from mini_cmit.model.tiny import build_tiny_model


@pytest.fixture(scope="module")
def tiny() -> MultimodalModel:
    return build_tiny_model()


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    Image.new("RGB", (20, 20), "#ff0000").save(tmp_path / "a.png")
    texts = [("Answer briefly.", "red"), ("What is shown in this image? Answer with the letter.", "A")]
    return [
        Sample(id=str(i), image=tmp_path / "a.png", instruction=instruction, answers=(answer,))
        for i, (instruction, answer) in enumerate(texts)
    ]


def test_digits_stay_apart_and_text_survives(tiny: MultimodalModel) -> None:
    text = "Answer 275 12 30 now. U.S."
    tokens = tiny.tokenizer.convert_ids_to_tokens(tiny.text_ids(text))
    assert [token.removeprefix("Ġ") for token in tokens if any(c.isdigit() for c in token)] == list("2751230")
    assert tiny.decode(tiny.answer_ids(text)) == text
    assert tiny.decode([*tiny.answer_ids("red"), *tiny.text_ids("green")]) == "red"


def test_the_prompt_holds_the_image_first(tiny: MultimodalModel) -> None:
    ids = tiny.prompt_ids("Answer briefly.")
    image = tiny.model.config.image_token_id
    assert ids[1 : 1 + tiny.image_tokens] == [image] * tiny.image_tokens and ids.count(image) == tiny.image_tokens == 4
    assert tiny.tokenizer.convert_ids_to_tokens([ids[0], ids[5], ids[-1]]) == ["<bos>", "<user>", "<assistant>"]


def test_both_towers_have_candidates_and_nothing_else_has(tiny: MultimodalModel) -> None:
    assert {tower: len(names) for tower, names in tiny.candidates.items()} == {"vision": 12, "language": 14}
    assert not any("projector" in name or "head" in name for names in tiny.candidates.values() for name in names)
    attention = candidate_linears(tiny.model, ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"))
    assert {tower: len(names) for tower, names in attention.items()} == {"vision": 8, "language": 8}
    with pytest.raises(ValueError, match="the vision tower has no linear layer under 'model.vision_tower.' ending in"):
        candidate_linears(tiny.model, ("gate_proj",))


def test_labels_cover_the_answer_alone_and_padding_follows_the_use(
    tiny: MultimodalModel, samples: list[Sample]
) -> None:
    batch = collate(tiny, samples, with_answers=True)
    for row, sample in enumerate(samples):
        labelled = batch.input_ids[row][batch.labels[row] != IGNORE]
        assert labelled.tolist() == tiny.answer_ids(sample.answers[0])
        length = int(batch.attention_mask[row].sum())
        assert batch.attention_mask[row, :length].all() and (batch.labels[row, length:] == IGNORE).all()
    prompts = collate(tiny, samples, with_answers=False)
    assert prompts.attention_mask[:, -1].all() and (prompts.labels == IGNORE).all()
    assert prompts.input_ids[0, -1] == prompts.input_ids[1, -1] == tiny.prompt_ids("")[-1]
    assert prompts.pixel_values.shape == (2, 3, 16, 16)


def test_a_saved_model_loads_with_the_same_outputs(
    tiny: MultimodalModel, samples: list[Sample], tmp_path: Path
) -> None:
    tiny.save(tmp_path / "m", dtype=torch.float32)
    loaded = load_model(tmp_path / "m")
    batch = collate(tiny, samples, with_answers=True)
    again = collate(loaded, samples, with_answers=True)
    assert torch.equal(batch.input_ids, again.input_ids)
    with torch.inference_mode():
        outputs = [
            m.model(input_ids=b.input_ids, attention_mask=b.attention_mask, pixel_values=b.pixel_values).logits
            for m, b in ((tiny, batch), (loaded, again))
        ]
    kept = batch.attention_mask.bool()
    torch.testing.assert_close(outputs[0][kept], outputs[1][kept])
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_damaged_folder_is_refused_by_name(tiny: MultimodalModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model.safetensors does not exist; expected a folder written by"):
        load_model(tmp_path)
    tiny.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model.safetensors lacks .*; expected the tensors of config.json"):
        load_model(tmp_path / "m")
    config["text_config"]["num_hidden_layers"] = 2
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    settings = json.loads((tmp_path / "m" / "processor_config.json").read_text())
    settings["image_processor"]["image_processor_type"] = "SonarImageProcessor"
    (tmp_path / "m" / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="Unrecognized image processor"):
        load_model(tmp_path / "m")
