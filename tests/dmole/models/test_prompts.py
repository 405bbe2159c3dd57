# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from dmole.models.prompts import IGNORE, Encoded, encode, instruction_ids

from .conversations import LATER, NONE, ONE, SMALL, TALK, TWO, Declared, assistant, user
from .folders import END_OF_TURN, FAMILIES, write_folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(family, tmp_path_factory.mktemp(family))


@pytest.fixture
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


BATCHES = {
    "one": [ONE],
    "two": [TWO],
    "none": [NONE],
    "images": [ONE, TWO],
    "mixed": [ONE, NONE, TWO],
    "text_first": [NONE, ONE, [user("Describe it.", SMALL), assistant("no")]],
}


def rows(encoded: Encoded) -> Iterator[tuple[list[int], list[int]]]:
    """Each sample's ids and labels without padding."""
    assert encoded.labels is not None
    for ids, mask, labels in zip(
        encoded.inputs["input_ids"], encoded.inputs["attention_mask"], encoded.labels, strict=True
    ):
        assert (labels[mask == 0] == IGNORE).all()
        yield ids[mask == 1].tolist(), labels[mask == 1].tolist()


def answers(processor: Any, encoded: Encoded) -> list[str]:
    return [
        "".join(processor.tokenizer.decode([n for n in labels if n != IGNORE]).split()) for _, labels in rows(encoded)
    ]


@pytest.mark.parametrize("batch", BATCHES)
def test_labels_are_the_answer_and_the_end_of_turn(processor: Any, family: str, batch: str) -> None:
    encoded = encode(processor, BATCHES[batch], with_answers=True, declaration=Declared())
    expected = ["".join(row[-1]["content"][0]["text"].split()) + END_OF_TURN[family] for row in BATCHES[batch]]
    assert answers(processor, encoded) == expected
    assert encoded.images == tuple(
        sum(p["type"] == "image" for m in row for p in m["content"]) for row in BATCHES[batch]
    )


@pytest.mark.parametrize("conversation", [ONE, TWO, NONE], ids=["one", "two", "none"])
def test_labels_follow_the_ids_of_the_prompt(processor: Any, conversation: Any) -> None:
    asked = encode(processor, [conversation], with_answers=False, declaration=Declared())
    whole = encode(processor, [conversation], with_answers=True, declaration=Declared())
    prompt = asked.inputs["input_ids"][0].tolist()
    ((ids, labels),) = rows(whole)
    assert asked.labels is None
    assert ids[: len(prompt)] == prompt
    assert [label == IGNORE for label in labels[: len(prompt) + 1]] == [True] * len(prompt) + [False]
    assert asked.prompt_lengths == whole.prompt_lengths == (len(prompt),)


@pytest.mark.parametrize("conversation", [LATER, TALK], ids=["image_in_second_turn", "text"])
def test_every_assistant_turn_is_labelled(processor: Any, family: str, conversation: Any) -> None:
    encoded = encode(processor, [NONE, conversation], with_answers=True, declaration=Declared())
    texts = [message["content"][0]["text"] for message in conversation[1::2]]
    end = END_OF_TURN[family]
    first = texts[0] + ("" if family.startswith("llava") else end)
    assert answers(processor, encoded)[1] == "".join((first + texts[1] + end).split())
    # The labels are the input's own ids, in place.
    ids, labels = list(rows(encoded))[1]
    assert all(label in (IGNORE, number) for number, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize("with_answers", [True, False], ids=["training", "generation"])
@pytest.mark.parametrize("batch", ["images", "mixed", "text_first"])
def test_a_batch_equals_its_samples_alone(processor: Any, model: Any, batch: str, with_answers: bool) -> None:
    together = encode(processor, BATCHES[batch], with_answers=with_answers, declaration=Declared())
    mask = together.inputs["attention_mask"]
    assert mask[:, 0 if with_answers else -1].all()  # right padding, left padding
    with torch.no_grad():
        logits = model(**together.inputs).logits
        for s, conversation in enumerate(BATCHES[batch]):
            alone = encode(processor, [conversation], with_answers=with_answers, declaration=Declared())
            kept = mask[s] == 1
            assert together.inputs["input_ids"][s, kept].tolist() == alone.inputs["input_ids"][0].tolist()
            if with_answers:
                assert together.labels is not None and alone.labels is not None
                assert together.labels[s, kept].tolist() == alone.labels[0].tolist()
            assert together.prompt_lengths[s] == alone.prompt_lengths[0]
            torch.testing.assert_close(logits[s, kept], model(**alone.inputs).logits[0], rtol=1e-4, atol=1e-5)


def test_padding_side_of_the_tokenizer_is_kept(processor: Any) -> None:
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        for with_answers in (True, False):
            encode(processor, [ONE, NONE], with_answers=with_answers, declaration=Declared())
        assert processor.tokenizer.padding_side == side


def test_conversations_are_not_changed(processor: Any) -> None:
    conversation = [{"role": "user", "content": "Yes or no?"}, {"role": "assistant", "content": "yes"}]
    before = copy.deepcopy(conversation)
    encoded = encode(processor, [conversation], with_answers=True, declaration=Declared())
    assert conversation == before
    assert answers(processor, encoded)[0].startswith("yes")


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_tensors_are_on_the_cpu_whatever_the_default_device(processor: Any, default: str) -> None:
    torch.set_default_device(default)
    try:
        for with_answers in (True, False):
            encoded = encode(processor, [ONE, NONE, TWO], with_answers=with_answers, declaration=Declared())
            ids, mask = instruction_ids(processor, ["What is it?"])
            moved = encoded.to("meta", torch.bfloat16)
    finally:
        torch.set_default_device(None)
    assert {value.device.type for value in (*encoded.inputs.values(), ids, mask)} == {"cpu"}
    assert {value.device.type for value in moved.inputs.values()} == {"meta"}
    assert moved.inputs["pixel_values"].dtype == torch.bfloat16
    assert moved.inputs["input_ids"].dtype == torch.int64
