# SPDX-License-Identifier: Apache-2.0
"""A conversation's text is made once, and made anew whenever something that it follows from has changed."""

import copy
from typing import Any

import pytest
from PIL import Image

from dmole.models import row_text as module
from dmole.models.prompts import normalised, template_of
from dmole.models.row_text import RowText, row_text
from dmole.models.vision_language import VisionLanguageModel


def row(question: str = "red", answer: str = "green", **more: Any) -> list[dict[str, Any]]:
    image = {"type": "image", "image": Image.new("RGB", (16, 16), question)}
    asked = {"role": "user", "content": [image, {"type": "text", "text": question, **more}]}
    return normalised([asked, {"role": "assistant", "content": answer}], with_answers=True)


def found(vlm: VisionLanguageModel, messages: list[dict[str, Any]], labels: Any = "prefix") -> RowText:
    return row_text(vlm.processor, template_of(vlm.processor, vlm.declaration), messages, labels)


def test_the_same_text_is_made_once_whatever_its_images(
    tiny_model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = module._row_text
    monkeypatch.setattr(module, "_row_text", lambda *given: made.append(given) or real(*given))
    first = found(tiny_model, row())
    other = row()
    other[0]["content"][0]["image"] = Image.new("RGB", (32, 48), "blue")
    assert found(tiny_model, other) is first and len(made) == 1
    ((start, end),) = first.spans
    assert tiny_model.processor.tokenizer.decode(first.ids[start:end]).split() == ["green<eos>"]
    for changed, labels in ((row("blue"), "prefix"), (row(answer="red"), "prefix"), (row(), None)):
        assert found(tiny_model, changed, labels) != first
    assert len(made) == 4
    # Whatever else a template may read is not part of what is kept.
    assert found(tiny_model, row(colour="red")) == found(tiny_model, row(colour="blue")) == first
    assert len(made) == 6


def test_a_changed_template_or_tokenizer_makes_it_anew(tiny_model: VisionLanguageModel) -> None:
    first = found(tiny_model, row())
    processor = copy.deepcopy(tiny_model.processor)
    processor.chat_template = processor.chat_template.replace("<assistant>", "<assistant><assistant>", 1)
    template = template_of(processor, tiny_model.declaration)
    assert row_text(processor, template, row(), "prefix") != first
    assert tiny_model.processor.tokenizer.add_tokens(["reen"]) == 1
    assert found(tiny_model, row()).ids != first.ids


def test_a_refused_text_is_refused_every_time(tiny_model: VisionLanguageModel) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="special token '<eos>'"):
            found(tiny_model, row(answer="red<eos>"))
