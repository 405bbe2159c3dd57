# SPDX-License-Identifier: Apache-2.0
"""A forgotten task: who depends on it, what stays bit-equal, what is gone from the disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import dmole
from dmole.data.collate import collate
from dmole.data.sample import Stream
from dmole.grown.forget import consequences, forget
from dmole.grown.model import GrownModel
from dmole.grown.saved import SavedModelError, read

from .test_saved import stored

Runs = dict[str, Path]


@pytest.fixture
def copied(finished: Runs, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished["dmole"], tmp_path / "run"))


def routed_logits(grown: GrownModel, stream: Stream) -> tuple[list[tuple[str, ...]], torch.Tensor]:
    """The routes of a batch of all tasks, and the logits under them."""
    batch = collate(grown.vlm, [sample for task in stream.tasks for sample in task.test], with_answers=False)
    with grown._routed(batch, [None] * len(batch.samples)) as routes, torch.no_grad():
        return [route.tasks for route in routes], grown.vlm.model(**batch.encoded.inputs).logits


def test_it_is_said_who_depends_on_a_task(copied: Path) -> None:
    found = consequences(copied, "colours")
    pool = json.loads((copied / "result.json").read_text())["method"]["experts"]
    assert found.beside == {p["task"]: p["neighbours"]["colours"] for p in pool if p["neighbours"].get("colours")}
    routes = {key: route for key, (_, route) in stored(copied).items()}
    for task in ("colours", "letters", "captions"):
        assert found.rerouted[task] == sum("colours" in (r or ()) for (name, _), r in routes.items() if name == task)
    assert sum(found.answers.values()) == 12
    assert "test answers never used it and stay as they are" in str(found)
    assert read(copied / "model").changes == ()  # nothing has happened


def test_samples_that_never_used_it_answer_bit_equal(copied: Path, toy_stream: Stream) -> None:
    before_routes, before = routed_logits(dmole.load(copied), toy_stream)
    forget(copied, "colours")
    after_routes, after = routed_logits(dmole.load(copied), toy_stream)
    kept = [place for place, route in enumerate(before_routes) if "colours" not in route]
    gone = [place for place, route in enumerate(before_routes) if "colours" in route]
    assert kept and gone
    assert torch.equal(before[kept], after[kept])
    assert [after_routes[place] for place in kept] == [before_routes[place] for place in kept]
    assert all("colours" not in route for route in after_routes)
    assert all(not torch.equal(before[place], after[place]) for place in gone)


def test_its_weights_are_gone_unless_they_are_kept(copied: Path, toy_stream: Stream, tmp_path: Path) -> None:
    kept = Path(shutil.copytree(copied, tmp_path / "kept"))
    run_digest = read(copied / "model").digest
    forget(copied, "colours")
    assert sorted(path.name for path in (copied / "model" / "experts").iterdir()) == ["t02_letters", "t03_captions"]
    saved = read(copied / "model")
    assert saved.origin == run_digest and saved.changes == ({"forget": "colours", "keep_weights": False},)
    assert [task["name"] for task in saved.tasks] == ["letters", "captions"]
    forget(kept, "colours", keep_weights=True)
    grown = dmole.load(kept)
    sample = toy_stream.tasks[0].test[0]
    assert "colours" not in grown.route(images=list(sample.images), text=sample.instruction).errors
    assert grown.answer(images=list(sample.images), text=sample.instruction, task="colours").route.tasks == ("colours",)
    forget(copied, "letters")
    forget(copied, "captions")
    assert dmole.load(copied).experts == ()


def test_what_cannot_be_forgotten_is_refused(finished: Runs) -> None:
    with pytest.raises(SavedModelError, match="task: got 'maps'; expected one with an expert of its own in .*colours"):
        consequences(finished["dmole"], "maps")
    with pytest.raises(SavedModelError, match="none: its tasks share their weights"):
        forget(finished["seq_ft"], "colours")
