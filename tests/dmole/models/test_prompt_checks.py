# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoProcessor, MambaConfig

from dmole.config_error import ConfigError
from dmole.models.prompt_checks import answer_length, check_conversations, prompt_length
from dmole.models.prompts import IGNORE, encode

from .conversations import LATER, NONE, ONE, TALK, TWO, Declared, assistant, picture, user
from .folders import FAMILIES, POSITIONS, write_folder


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = write_folder(request.param, tmp_path_factory.mktemp(request.param))
    return AutoProcessor.from_pretrained(folder), AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("conversation", [ONE, TWO, NONE, TALK, LATER], ids=["one", "two", "none", "talk", "later"])
def test_lengths_are_those_of_the_encoded_conversation(loaded: tuple[Any, Any], conversation: Any) -> None:
    processor, _ = loaded
    for with_answers in (True, False):
        encoded = encode(processor, [conversation], with_answers=with_answers, declaration=Declared())
        length = prompt_length(processor, conversation, with_answers=with_answers, declaration=Declared())
        assert length == encoded.inputs["input_ids"].shape[1]
    labels = encode(processor, [conversation], with_answers=True, declaration=Declared()).labels
    assert labels is not None
    last = labels[0, encode(processor, [conversation], with_answers=True, declaration=Declared()).prompt_lengths[0] :]
    assert answer_length(processor, conversation, declaration=Declared()) == int((last != IGNORE).sum())


def test_what_fits_exactly_passes_and_one_token_more_does_not(loaded: tuple[Any, Any]) -> None:
    processor, config = loaded
    asked = [user("What is it?", picture(24, 40, 9))]
    room = POSITIONS - prompt_length(processor, asked, with_answers=False, declaration=Declared())
    check_conversations(processor, [("a", asked)], config, declaration=Declared(), max_new_tokens=room)
    with pytest.raises(ConfigError) as raised:
        check_conversations(
            processor, [("charts/test 7", asked)], config, declaration=Declared(), max_new_tokens=room + 1
        )
    assert str(raised.value) == (
        f"charts/test 7: length: got {POSITIONS + 1} tokens with 1 images and the answer; expected at most the model's "
        f"{POSITIONS} positions. Shorten the text, take fewer or smaller images, or lower evaluation.max_new_tokens."
    )
    long = [user("What is it?", picture(24, 40, 9)), assistant("yes " * POSITIONS)]
    with pytest.raises(ConfigError, match=f"charts/train 1: length: got .* expected at most the model's {POSITIONS}"):
        check_conversations(
            processor, [("charts/train 0", ONE), ("charts/train 1", long)], config, declaration=Declared()
        )


def test_a_reference_longer_than_max_new_tokens_is_refused(loaded: tuple[Any, Any]) -> None:
    processor, config = loaded
    needed = answer_length(processor, ONE, declaration=Declared())
    check_conversations(processor, [("a", ONE)], config, declaration=Declared(), max_new_tokens=needed)
    with pytest.raises(ConfigError, match=f"a: evaluation.max_new_tokens: got {needed - 1} for an answer of {needed} "):
        check_conversations(processor, [("a", ONE)], config, declaration=Declared(), max_new_tokens=needed - 1)


def test_special_tokens_are_found_in_questions_and_references(loaded: tuple[Any, Any]) -> None:
    processor, config = loaded
    token = processor.tokenizer.eos_token
    for conversation in ([user(f"What {token}"), assistant("a")], [user("What"), assistant(f"a {token}")]):
        for limit in (None, 20):
            with pytest.raises(ConfigError, match=f"b: text: got the model's special token '{token}'"):
                named = [("a", NONE), ("b", conversation)]
                check_conversations(processor, named, config, declaration=Declared(), max_new_tokens=limit)


def test_a_model_without_a_limit_takes_any_length(loaded: tuple[Any, Any]) -> None:
    named = [("a", NONE)]
    check_conversations(loaded[0], named, MambaConfig(), declaration=Declared(), max_new_tokens=10**6)
