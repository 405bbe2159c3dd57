# SPDX-License-Identifier: Apache-2.0
"""Both models go through the path of any other: `load` without a declaration, the contract, `encode`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dmole.models.multimodal import load_model
from PIL import Image

from dmole.data.collate import collate
from dmole.data.sample import Sample
from dmole.models.contract import check, drawn_probes
from dmole.models.loading import load
from dmole.models.vision_language import VisionLanguageModel
from mini_cmit.model.shipped import MINI_WEIGHTS
from mini_cmit.model.tiny import tiny_folder

PROMPTS = json.loads((Path(__file__).parent / "prompts.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMOLE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=["mini", "tiny"])
def folder(request: pytest.FixtureRequest) -> Path:
    return MINI_WEIGHTS if request.param == "mini" else tiny_folder()


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VisionLanguageModel:
    return load(folder)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """A question of every task and its answer, each with an image of its own; none of the size that is read."""
    made = []
    for number, row in enumerate(PROMPTS[::2]):
        image = tmp_path / f"{number}.png"
        Image.effect_mandelbrot((100 + number, 90), (-2.0, -1.5, 1.0 + 0.1 * number, 1.5), 100).save(image)
        made.append(Sample(id=row["task"], image=image, instruction=row["instruction"], answers=(row["answer"],)))
    return made


def test_the_rules_find_what_was_written_by_hand(vlm: VisionLanguageModel, folder: Path) -> None:
    assert vlm.towers == {"vision": "model.vision_tower", "language": "model.language_model"}
    assert vlm.candidates == load_model(folder).candidates
    assert vlm.model.dtype == torch.float32


def test_the_contract_holds(vlm: VisionLanguageModel) -> None:
    findings = check(vlm, drawn_probes(vlm))
    assert [finding for finding in findings if not finding.ok] == [] and len(findings) > 15


@pytest.mark.parametrize("with_answers", [True, False], ids=["training", "generation"])
def test_batches_are_those_that_were_joined_by_hand(
    with_answers: bool, vlm: VisionLanguageModel, folder: Path, samples: list[Sample]
) -> None:
    expected = collate(load_model(folder), samples, with_answers=with_answers)
    conversations = []
    for sample in samples:
        image = {"type": "image", "image": Image.open(sample.image)}
        turns = [{"role": "user", "content": [image, {"type": "text", "text": sample.instruction}]}]
        if with_answers:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": sample.answers[0]}]})
        conversations.append(turns)
    got = vlm.encode(conversations, with_answers=with_answers)
    assert set(got.inputs) == {"input_ids", "attention_mask", "pixel_values"}
    for name, tensor in got.inputs.items():
        assert torch.equal(tensor, getattr(expected, name)), name
    if with_answers:
        assert got.labels is not None and torch.equal(got.labels, expected.labels)
