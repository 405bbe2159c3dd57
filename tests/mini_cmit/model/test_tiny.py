# SPDX-License-Identifier: Apache-2.0
"""The tiny model: a plain transformers folder of random weights that a seed decides."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava import LlavaProcessor

from dmole.data.collate import collate
from dmole.data.sample import Sample
from mini_cmit.model.image_processing import PixelImageProcessor
from mini_cmit.model.tiny import build_tiny_model, tiny_folder, write_tiny_model


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    Image.new("RGB", (20, 20), "#ff8000").save(tmp_path / "a.png")
    texts = [("Answer briefly. yes no", "red"), ("Describe the image in one sentence.", "a green 27!")]
    return [
        Sample(id=str(i), images=(tmp_path / "a.png",), instruction=instruction, answers=(answer,))
        for i, (instruction, answer) in enumerate(texts)
    ]


def test_the_folder_holds_the_model_and_its_processor(samples: list[Sample], tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", seed=3, side=12)
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    assert type(processor) is LlavaProcessor and type(processor.image_processor) is PixelImageProcessor
    in_memory = build_tiny_model(3, side=12)
    state = in_memory.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    expected = collate(in_memory, samples, with_answers=True)
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.open(sample.images[0])},
                    {"type": "text", "text": sample.instruction},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": sample.answers[0]}]},
        ]
        for sample in samples
    ]
    batch = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    assert sorted(batch) == ["attention_mask", "input_ids", "pixel_values"]
    for name in batch:
        assert torch.equal(batch[name], expected.encoded.inputs[name]), name
    with torch.inference_mode():
        assert torch.isfinite(model(**batch).logits).all()


def test_a_seed_decides_the_weights_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (build_tiny_model(seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_registered_folder_is_written_once(capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder()
    assert (folder / "model.safetensors").is_file() and tiny_folder() == folder
    assert capfd.readouterr().err == "", "transformers' bars are not drawn through dmole's display"
