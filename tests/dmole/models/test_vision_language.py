# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmole.models.adapters import add_experts, attach, expert_parameters
from dmole.models.declaration import KNOWN, Declaration, declared, read_declaration
from dmole.models.drawn import drawn_conversation, drawn_image
from dmole.models.loading import load
from dmole.models.prompts import Encoded
from dmole.models.vision_language import VisionLanguageModel, takes, wrap
from dmole_kernels import ExpertGates
from tests.dmole.models.families.wide import WIDE
from tests.kernels.families.tiny import FAMILIES, TEXT_SIZES, VIT_SIZES

FolderOf = Callable[[str], Path]


def encoded(family: str, owners: list[int], samples: int = 3) -> Encoded:
    batch = FAMILIES[family].batch(owners, samples)
    mask = batch.arguments["attention_mask"]
    labels = batch.arguments["input_ids"].clone()
    for row, length in zip(labels, mask.sum(1).tolist(), strict=True):
        row[: length - 3] = -100
        row[length:] = -100
    images = tuple(owners.count(s) for s in range(samples))
    return Encoded(inputs=batch.arguments, labels=labels, images=images, prompt_lengths=(0,) * samples)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled tokens, each predicted one position earlier."""
    logits = logits[:, -labels.shape[1] :]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


# -- loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_cross_entropy_of_the_answers(family: str) -> None:
    vlm = wrap(FAMILIES[family].build())
    batch = encoded(family, [0, 1, 1, 2])
    assert batch.labels is not None
    logits = vlm.model(**batch.inputs).logits
    torch.testing.assert_close(vlm.loss(batch), cross_entropy(logits, batch.labels))
    whole = vlm.model(**batch.inputs, labels=batch.labels).loss
    torch.testing.assert_close(vlm.loss(batch), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_every_tensor_of_the_processor_reaches_the_loss(family: str) -> None:
    """Without `token_type_ids` the image is masked causally: another loss, and nothing raises."""
    vlm = wrap(FAMILIES[family].build())
    batch = encoded(family, [0, 1, 1, 2])
    kept = {name: value for name, value in batch.inputs.items() if name != "token_type_ids"}
    try:
        without = float(vlm.model(**kept, labels=batch.labels).loss)
    except ValueError:  # PaliGemma asks for them where labels are given and the model trains
        return
    assert abs(float(vlm.loss(batch)) - without) > 1e-6


def test_a_batch_without_labels_has_no_loss() -> None:
    vlm = wrap(FAMILIES["llava"].build())
    batch = dataclasses.replace(encoded("llava", [0, 1, 2]), labels=None)
    with pytest.raises(ValueError, match=r"labels: got None.*with_answers=True"):
        vlm.loss(batch)


def test_an_encoder_decoder_is_not_asked_for_the_last_logits() -> None:
    """Its labels are the decoder's own sequence: sliced ones with sliced logits would be another loss."""
    vlm = wrap(WIDE["florence2"].build())
    assert not vlm.keeps_logits
    assert wrap(FAMILIES["llava"].build()).keeps_logits


def test_an_encoder_decoder_cannot_be_made_to_keep_logits() -> None:
    with pytest.raises(ValueError, match=r"declaration.logits_to_keep: got true for an encoder-decoder"):
        wrap(WIDE["florence2"].build(), declaration=Declaration(logits_to_keep=True))


def test_a_forward_that_swallows_logits_to_keep_is_not_asked_for_it() -> None:
    vlm = wrap(WIDE["video_llama_3"].build())
    assert not takes(vlm.model, "logits_to_keep") and not vlm.keeps_logits
    batch = encoded("llava", [])
    text = {name: value for name, value in batch.inputs.items() if name != "pixel_values"}
    assert batch.labels is not None
    found = vlm.loss(dataclasses.replace(batch, inputs=text))
    torch.testing.assert_close(found, cross_entropy(vlm.model(**text).logits, batch.labels))


def test_an_encoder_decoder_is_refused_for_training(folder_of: FolderOf) -> None:
    """The encoder would read the answer that the decoder learns to write."""
    vlm = wrap(WIDE["florence2"].build(), load(folder_of("llava")).processor)
    with pytest.raises(ValueError, match=r"model: got Florence2ForConditionalGeneration, an encoder-decoder"):
        vlm.encode([drawn_conversation([])], with_answers=True)


# -- units ---------------------------------------------------------------------------------------------------------


def test_three_images_of_three_samples_are_refused_without_units() -> None:
    """Images owned by samples 0, 0 and 2: a gate [3, 1] fits x [3, T, d], where image 1 is not that of sample 1."""
    vlm = wrap(FAMILIES["llava"].build())
    assert vlm.rows == {"vision": "units", "language": "samples"}
    gates = {tower: ExpertGates() for tower in vlm.candidates}
    adapters = attach(vlm.model, vlm.candidates, gates=gates, rows=vlm.rows)
    add_experts(adapters, adapters, "a", rank=2, alpha=4.0)
    for parameter in expert_parameters(adapters).values():
        nn.init.normal_(parameter)
    batch = encoded("llava", [0, 0, 2])
    gate = torch.tensor([[1.0], [0.0], [0.0]])
    with torch.no_grad():
        off = vlm.model(**batch.inputs).logits
        with gates["vision"].use(gate, ["a"]), pytest.raises(ValueError, match=r"not samples .* has no\s+units"):
            vlm.model(**batch.inputs)
        with gates["vision"].use(gate, ["a"], units=vlm.units(batch)["vision"]):
            on = vlm.model(**batch.inputs).logits
    changed = (on - off).abs().amax((1, 2))
    assert changed[0] > 1e-3 and changed[1:].max() < 1e-5


def test_units_of_one_tower_alone() -> None:
    model = FAMILIES["llava"].build()
    language = wrap(model, declaration=Declaration(candidates=r".*language_model.*q_proj"))
    assert language.units(encoded("llava", [0, 0, 2])) == {"language": [1, 1, 1]}


def test_known_lines_give_way_to_what_is_declared() -> None:
    assert declared("mllama", Declaration()).rows == "padded"
    assert declared("mllama", Declaration(rows="tokens")).rows == "tokens"
    assert declared("mllama", Declaration(vision="a")) == Declaration(vision="a", rows="padded")
    assert declared("something_new", Declaration()) == Declaration()
    assert len(KNOWN) <= 12


def test_a_declaration_is_read_from_plain_settings() -> None:
    read = read_declaration({"rows": "tiles", "candidates": ["q_proj"], "plain_markers": ["<user>"]})
    assert read == Declaration(rows="tiles", candidates=("q_proj",), plain_markers=("<user>",))
    assert read_declaration({"candidates": ".*q_proj"}).candidates == ".*q_proj"


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"row": "tiles"}, r"declaration: got the key 'row'.*Did you mean 'rows'"),
        ({"rows": "patches"}, r"declaration.rows is 'patches'; expected one of auto, tokens, images, tiles, padded"),
        ({"candidates": "("}, r"declaration.candidates is '\('; expected a regular expression"),
        ({"candidates": []}, r"declaration.candidates is \[\]; expected endings"),
        ({"labels": "suffix"}, r"declaration.labels is 'suffix'; expected one of prefix, assistant_mask"),
        ({"image_token_id": "<image>"}, r"declaration.image_token_id is '<image>'; expected a token's id"),
        ({"vision": 3}, r"declaration.vision is 3; expected the qualified name"),
        ({"logits_to_keep": "yes"}, r"declaration.logits_to_keep is 'yes'; expected true, false"),
        ({"plain_markers": "<user>"}, r"declaration.plain_markers is '<user>'; expected texts"),
    ],
    ids=str,
)
def test_a_wrong_declaration_names_its_key(plain: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_declaration(plain)


# -- with a processor ----------------------------------------------------------------------------------------------


@pytest.fixture
def vlm(folder_of: FolderOf) -> VisionLanguageModel:
    return load(folder_of("idefics3"))


def test_ready_refuses_a_candidate_that_is_never_called(vlm: VisionLanguageModel) -> None:
    vlm.model.model.text_model.layers[1].spare = nn.Linear(32, 32)
    again = wrap(vlm.model, vlm.processor)
    with pytest.raises(ValueError, match=r"\['model.text_model.layers.1.spare'\] \(1 of the language tower\) were not"):
        again.ready()


def test_rows_found_once_agree_with_rows_measured_for_each_batch(vlm: VisionLanguageModel) -> None:
    ready = vlm.ready()
    images = [drawn_image(64, 64), drawn_image(16, 64, seed=1), drawn_image(96, 32, seed=2)]
    batch = vlm.encode([drawn_conversation(images[:2]), drawn_conversation([]), drawn_conversation(images[2:])],
                       with_answers=True)  # fmt: skip
    measured = vlm.units(batch)["vision"]
    found = ready.units(batch)["vision"]
    assert [a * sum(found) for a in measured] == [b * sum(measured) for b in found]
    assert measured[1] == 0 and measured[0] != 2 * measured[2]


def test_answers_are_cut_at_the_end_of_turn(vlm: VisionLanguageModel) -> None:
    tokenizer = vlm.tokenizer
    ids = tokenizer.encode("A red boat.", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert end in vlm.end_token_ids
    more = tokenizer.encode("and more", add_special_tokens=False)
    assert vlm.decode([[*ids, end, *more], ids]) == [("A red boat.", True), ("A red boat.", False)]


def test_the_digest_of_inputs_follows_what_makes_them(vlm: VisionLanguageModel, folder_of: FolderOf) -> None:
    digest = vlm.inputs_digest()
    assert load(folder_of("idefics3")).inputs_digest() == digest
    vlm.tokenizer("a text", padding="max_length", truncation=True, max_length=7)
    assert vlm.inputs_digest() == digest
    vlm.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    other_mean = vlm.inputs_digest()
    vlm.processor.chat_template = vlm.processor.chat_template + " "
    other_template = vlm.inputs_digest()
    masked = dataclasses.replace(vlm, declaration=Declaration(labels="assistant_mask")).inputs_digest()
    assert len({digest, other_mean, other_template, masked}) == 4


def test_a_model_without_a_processor_cannot_encode() -> None:
    with pytest.raises(ValueError, match=r"processor: got None; .*wrap\(model, processor\)"):
        wrap(FAMILIES["llava"].build()).encode([drawn_conversation([])], with_answers=True)


def test_inputs_go_to_the_models_dtype() -> None:
    vlm = wrap(FAMILIES["llava"].build().to(torch.bfloat16))
    moved = vlm.on_device({"pixel_values": torch.zeros(1, 3, 4, 4), "input_ids": torch.ones(1, 2, dtype=torch.long)})
    assert moved["pixel_values"].dtype == torch.bfloat16 and moved["input_ids"].dtype == torch.long
    assert VIT_SIZES["hidden_size"] == TEXT_SIZES["hidden_size"]
