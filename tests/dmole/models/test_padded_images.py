# SPDX-License-Identifier: Apache-2.0
"""Inputs with a row for each sample, padded to the most images of the batch: Idefics2's and Mllama's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmole.models import contract_points as points
from dmole.models.prompts import encode
from dmole.models.vision_language import wrap

from .batches_and_samples import check_batch, widened
from .conversations import NONE, ONE, SMALL, TWO, Declared, assistant, picture, user
from .padded import PADDED


@pytest.fixture
def padded(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, processor = PADDED[request.param]()
    return widened(network).eval(), processor


@pytest.mark.parametrize("with_answers", [True, False], ids=["training", "generation"])
@pytest.mark.parametrize(
    ("padded", "batches"),
    [("idefics2", ["images", "mixed", "text_first"]), ("mllama", ["one", "two", "same", "images"])],
    indirect=["padded"],
)
def test_a_batch_of_padded_images_equals_its_samples_alone(
    padded: tuple[nn.Module, Any], batches: list[str], with_answers: bool
) -> None:
    network, processor = padded
    for batch in batches:
        check_batch(processor, network, batch, with_answers)


@pytest.mark.parametrize("padded", ["mllama"], indirect=True)
def test_images_are_repeated_where_text_attends_to_all_of_its_sample(padded: tuple[nn.Module, Any]) -> None:
    three = [user("Which?", SMALL, picture(24, 16, 7), picture(16, 16, 8)), assistant("red")]
    inputs = encode(padded[1], [TWO, three], with_answers=True, declaration=Declared()).inputs
    pixels, mask = inputs["pixel_values"], inputs["cross_attention_mask"]
    assert pixels.shape[:2] == (2, 6) and mask.shape[:3] == (*inputs["input_ids"].shape, 6)
    assert torch.equal(pixels[0, :2], pixels[0, 2:4]) and torch.equal(pixels[0, :2], pixels[0, 4:])
    assert torch.equal(pixels[1, :3], pixels[1, 3:]) and not torch.equal(pixels[0, 0], pixels[0, 1])
    assert mask.amax((1, 3)).tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
        assert torch.equal(inputs[name][1, :3], inputs[name][1, 3:])


@pytest.mark.parametrize("padded", ["mllama"], indirect=True)
def test_the_swap_test_holds_for_samples_with_one_and_two_images(padded: tuple[nn.Module, Any]) -> None:
    """Each tower: logits of a sample under mixed gates are those under its own gate for all, on 2, 1 and 1 images."""
    network, processor = padded
    vlm = wrap(network, processor)
    batch = vlm.encode([TWO, ONE, [user("Describe it.", SMALL), assistant("no")]], with_answers=True)
    handles = points.attached(vlm)
    try:
        for tower in ("vision", "language"):
            found = [*points.logit_swap(vlm, handles, tower, batch, "2 1 1")]
            found += points.gradient_swap(vlm, handles, tower, batch)
            assert len(found) >= 2 and [finding for finding in found if not finding.ok] == []
    finally:
        for handle in handles.values():
            handle.unconvert()


@pytest.mark.parametrize("padded", ["mllama"], indirect=True)
def test_samples_that_cannot_have_as_many_images_are_refused(padded: tuple[nn.Module, Any]) -> None:
    def some(number: int) -> list[Any]:
        return [user("Which?", *[SMALL] * number), assistant("red")]

    for images in ([1, 0], [4, 5]):
        with pytest.raises(ValueError) as raised:
            encode(padded[1], [some(n) if n else NONE for n in images], with_answers=True, declaration=Declared())
        assert str(raised.value).startswith("processor: got cross_attention_mask (")
        assert f"for samples with {images} images; expected numbers that all divide one of" in str(raised.value)
        assert "evaluation.per_device_eval_batch_size" in str(raised.value)


@pytest.mark.parametrize("padded", ["mllama"], indirect=True)
def test_mllama_itself_cannot_mix_text_with_images(padded: tuple[nn.Module, Any]) -> None:
    """Alone, text without images skips the cross-attention layers. Beside a sample with an image it does not: whatever
    the mask lets it see, and whatever is put into the place of its image, its logits are others."""
    network, processor = padded
    alone = encode(processor, [NONE], with_answers=True, declaration=Declared()).inputs
    seen = encode(processor, [ONE], with_answers=True, declaration=Declared()).inputs
    width = max(alone["input_ids"].shape[1], seen["input_ids"].shape[1])

    def beside(name: str) -> Tensor:
        both = seen[name].new_zeros(2, width, *seen[name].shape[2:])
        both[0, : seen[name].shape[1]] = seen[name]
        if name in alone:
            both[1, : alone[name].shape[1]] = alone[name]
        return both

    kept = alone["attention_mask"][0] == 1
    with torch.no_grad():
        expected = network(**alone).logits[0, kept]
        for shown in (0, 1):
            for pixels, tiles in ((0.0, 0), (0.0, 1), (1.0, 1)):
                inputs = {name: beside(name) for name in ("input_ids", "attention_mask", "cross_attention_mask")}
                inputs["cross_attention_mask"][1] = shown
                for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
                    inputs[name] = torch.cat([seen[name], seen[name] * (pixels if name == "pixel_values" else tiles)])
                got = network(**inputs).logits[1, : len(kept)][kept]
                assert (got - expected).abs().max() > 1e-2, (shown, pixels, tiles)
        with_image = network(**{**inputs, "cross_attention_mask": beside("cross_attention_mask")}).logits[0]
        torch.testing.assert_close(
            with_image[: seen["input_ids"].shape[1]], network(**seen).logits[0], rtol=1e-4, atol=1e-4
        )
