# SPDX-License-Identifier: Apache-2.0
"""Orders of tasks, and what makes two runs the same run."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dmole.config import RunConfig
from dmole.config_error import ConfigError
from dmole.data.sample import Stream
from dmole.models.adapters import attach
from dmole.models.vision_language import VisionLanguageModel
from dmole.runs.plan import check_folder, check_samples, fresh_copy, order_label, order_names, plan_runs, stream_digest
from dmole_kernels import ExpertGates, MultiLoRALinear

NAMES = ("a", "b", "c", "d")


def test_orders() -> None:
    assert order_names("default", NAMES) == ["a", "b", "c", "d"]
    assert order_names("reversed", NAMES) == ["d", "c", "b", "a"]
    assert order_names("b, a,d,c", NAMES) == ["b", "a", "d", "c"]
    shuffled = order_names("shuffled2", NAMES)
    assert sorted(shuffled) == list(NAMES)
    assert shuffled == order_names("shuffled2", NAMES)
    assert len({tuple(order_names(f"shuffled{k}", NAMES)) for k in range(8)}) > 2
    assert order_label("shuffled2") == "shuffled2"
    assert order_label("b,a,d,c") == "order-" + order_label("b,a,d,c")[-8:]


@pytest.mark.parametrize("order", ["random", "shuffled", "shuffledx", "a,b,c", "a,b,c,c", "a,b,c,e"])
def test_unknown_orders(order: str) -> None:
    with pytest.raises(ConfigError, match=rf"orders has '{order}'; expected 'default', 'reversed', .*\(a, b, c, d\)"):
        order_names(order, NAMES)


def test_plans_cover_the_grid_and_know_what_matters(
    toy_config: Callable[..., RunConfig], toy_stream: Stream, tiny_model: VisionLanguageModel
) -> None:
    grid = ("methods=[dmole, seq_ft]", "seeds=[0, 1]", "orders=[default, reversed]")
    plans = plan_runs(toy_config(*grid), toy_stream, tiny_model)
    assert len({plan.folder.name for plan in plans}) == len({plan.fingerprint for plan in plans}) == 8
    assert plans[0].folder.name == "dmole-seed0-default"

    def prints(*overrides: str) -> set[str]:
        return {plan.fingerprint for plan in plan_runs(toy_config(*grid, *overrides), toy_stream, tiny_model)}

    same = {plan.fingerprint for plan in plans}
    assert prints("output=elsewhere", "training.save_steps=9") == same
    changes = (
        "training.num_train_epochs=2",
        "budget.fraction=0.75",
        "lora.rank=2",
        "evaluation.per_device_eval_batch_size=3",
        "threads=2",
    )
    for override in changes:
        assert not prints(override) & same
    # The options of one method are no other's business.
    assert len(prints("dmole.router.top_k=1") & same) == 4
    assert len(prints("seq_ft.mode=merge_and_restart") & same) == 4


def test_stream_digest_sees_content_and_not_order(toy_stream: Stream) -> None:
    digest = stream_digest(toy_stream)
    assert stream_digest(toy_stream.reorder(tuple(reversed(toy_stream.task_names)))) == digest
    assert stream_digest(toy_stream.limit(train=5)) != digest
    first = toy_stream.tasks[0]
    sample = dataclasses.replace(first.test[0], answers=("other",))
    changed = dataclasses.replace(first, test=(sample, *first.test[1:]))
    assert stream_digest(dataclasses.replace(toy_stream, tasks=(changed, *toy_stream.tasks[1:]))) != digest


def test_stream_digest_sees_a_picture_drawn_anew_under_its_old_name(toy_stream: Stream, tmp_path: Path) -> None:
    first = toy_stream.tasks[0]
    image = tmp_path / first.test[0].images[0].name
    shutil.copy(first.test[0].images[0], image)
    moved = dataclasses.replace(first, test=(dataclasses.replace(first.test[0], images=(image,)), *first.test[1:]))
    stream = dataclasses.replace(toy_stream, tasks=(moved, *toy_stream.tasks[1:]))
    assert stream_digest(stream) == stream_digest(toy_stream)
    Image.new("RGB", (16, 16), "#0000ff").save(image)
    assert stream_digest(stream) != stream_digest(toy_stream)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": "<image>\nDescribe."}, r"colours/train sample .* special token '<image>'"),
        ({"answers": ("red<eos>",)}, r"colours/train sample .* special token '<eos>'"),
    ],
    ids=["instruction", "answer"],
)
def test_special_tokens_in_texts_are_refused(
    change: dict[str, object], message: str, toy_stream: Stream, tiny_model: VisionLanguageModel
) -> None:
    check_samples(toy_stream, tiny_model, 8)
    first = toy_stream.tasks[0]
    sample = dataclasses.replace(first.train[1], **change)  # type: ignore[arg-type]
    changed = dataclasses.replace(first, train=(first.train[0], sample))
    with pytest.raises(ConfigError, match=message):
        check_samples(dataclasses.replace(toy_stream, tasks=(changed,)), tiny_model, 8)


@pytest.mark.parametrize(("text", "why"), [('{"fingerprint', "is not JSON"), ("[]", "holds no settings of a run")])
def test_a_damaged_config_file_is_named(
    text: str, why: str, toy_config: Callable[..., RunConfig], toy_stream: Stream, tiny_model: VisionLanguageModel
) -> None:
    plan = plan_runs(toy_config("methods=seq_ft"), toy_stream, tiny_model)[0]
    plan.folder.mkdir(parents=True)
    (plan.folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"seq_ft-seed0-default/config.json {why}.*--fresh"):
        check_folder(plan)


def test_a_fresh_copy_has_its_own_modules_and_the_same_weights(tiny_model: VisionLanguageModel) -> None:
    copied = fresh_copy(tiny_model)
    assert not set(map(id, tiny_model.model.modules())) & set(map(id, copied.model.modules()))
    pairs = zip(tiny_model.model.parameters(), copied.model.parameters(), strict=True)
    assert all(one is two for one, two in pairs)
    attach(copied.model, copied.candidates, gates={tower: ExpertGates() for tower in copied.candidates})
    assert not any(isinstance(module, MultiLoRALinear) for module in tiny_model.model.modules())
