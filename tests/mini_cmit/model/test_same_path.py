# SPDX-License-Identifier: Apache-2.0
"""Both models go through the path of any other: `load` without a declaration, the contract, `encode`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from dmole.data.collate import IGNORE, collate
from dmole.data.sample import Sample
from dmole.models.contract import check, drawn_probes
from dmole.models.loading import load
from dmole.models.vision_language import VisionLanguageModel
from mini_cmit.model.base import load_base
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
    return load(folder).ready()


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """A question of every task and its answer, each with an image of its own; none of the size that is read."""
    made = []
    for number, row in enumerate(PROMPTS[::2]):
        image = tmp_path / f"{number}.png"
        Image.effect_mandelbrot((100 + number, 90), (-2.0, -1.5, 1.0 + 0.1 * number, 1.5), 100).save(image)
        made.append(Sample(id=row["task"], images=(image,), instruction=row["instruction"], answers=(row["answer"],)))
    return made


def test_the_rules_find_what_was_written_by_hand(vlm: VisionLanguageModel, folder: Path) -> None:
    assert vlm.towers == {"vision": "model.vision_tower", "language": "model.language_model"}
    towers = {tower: [name for name in names if ".layers." in name] for tower, names in vlm.candidates.items()}
    assert {tower: list(names) for tower, names in vlm.candidates.items()} == towers
    layers = len(vlm.model.model.language_model.layers)
    assert {tower: len(names) for tower, names in towers.items()} == {"vision": 6 * layers, "language": 7 * layers}
    assert vlm.model.dtype == torch.float32


def test_the_contract_holds(vlm: VisionLanguageModel) -> None:
    findings = check(vlm, drawn_probes(vlm))
    assert [finding for finding in findings if not finding.ok] == [] and len(findings) > 15


@pytest.mark.parametrize("with_answers", [True, False], ids=["training", "generation"])
def test_batches_are_those_that_were_joined_by_hand(
    with_answers: bool, vlm: VisionLanguageModel, folder: Path, samples: list[Sample]
) -> None:
    base = load_base(folder)
    end = int(base.tokenizer.eos_token_id)
    prompts = [base.prompt_ids(sample.instruction) for sample in samples]
    answers = [[*base.text_ids(sample.answers[0]), end] if with_answers else [] for sample in samples]
    batch = collate(vlm, samples, with_answers=with_answers)
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    for s, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = [*prompt, *answer]
        padding = [0] * (width - len(ids))
        shown = [1] * len(ids)
        assert batch.input_ids[s].tolist() == (ids + padding if with_answers else padding + ids)
        mask = batch.encoded.inputs["attention_mask"][s].tolist()
        assert mask == (shown + padding if with_answers else padding + shown)
        if with_answers:
            assert batch.labels[s].tolist() == [IGNORE] * len(prompt) + answer + [IGNORE] * len(padding)
    assert set(batch.encoded.inputs) == {"input_ids", "attention_mask", "pixel_values"}
    pictures = [Image.open(sample.images[0]) for sample in samples]
    pixels = base.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.encoded.inputs["pixel_values"], pixels)
    assert batch.units == {"vision": [1] * len(samples), "language": [1] * len(samples)}
