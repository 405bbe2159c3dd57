# SPDX-License-Identifier: Apache-2.0
"""D-MoLE through the runner's hooks, on real classes with random weights: placement, gates, routing, resume."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dmole.data.collate import Batch, collate
from dmole.data.sample import Sample, Stream, Task
from dmole.methods import method_class, method_names
from dmole.methods.budget import BudgetSettings
from dmole.methods.dmole.method import DMoLE
from dmole.methods.dmole.settings import DMoLESettings, RouterSettings, ablated
from dmole.methods.settings import LoraSettings, MethodSettings
from mini_cmit.model.tiny import build_tiny_model

ROUTER = RouterSettings(hidden=16, epochs=200, batch_size=8, learning_rate=1e-2, final_learning_rate=1e-3, margin=1.5)
OPTIONS = DMoLESettings(proxy_min_samples=4, proxy_batch_size=2, router=ROUTER)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    """Three tasks of plainly different images and wordings."""
    folder: Path = tmp_path_factory.mktemp("stream")
    looks = {
        "red": ((230, 10, 10), "Answer briefly.", "yes"),
        "blue": ((10, 10, 230), "Describe the image in one sentence.", "red green"),
        "grey": ((120, 120, 120), "Answer with the letter. Answer with the letter.", "no"),
    }
    tasks = []
    for name, (colour, instruction, answer) in looks.items():
        samples = []
        for i in range(14):
            image = folder / f"{name}{i}.png"
            Image.new("RGB", (16, 16), tuple(min(255, max(0, c + 2 * (i % 5))) for c in colour)).save(image)
            samples.append(Sample(id=f"{i}", images=(image,), instruction=instruction, answers=(answer,)))
        rows = tuple(samples)
        tasks.append(Task(name=name, metric="exact_match", train=rows[:8], validation=rows[8:11], test=rows[11:]))
    return Stream(name="tiny", tasks=tuple(tasks))


def make(options: DMoLESettings = OPTIONS, *, seed: int = 0, **settings: Any) -> DMoLE:
    given = {"lora": LoraSettings(rank=2, alpha=4.0, dropout=0.0), **settings}
    return DMoLE(build_tiny_model(0), MethodSettings(options=options, **given), seed=seed)


def batches(method: DMoLE, task: Task) -> Iterator[Batch]:
    for start in range(0, len(task.train), 4):
        yield collate(method.vlm, task.train[start : start + 4], with_answers=True)


def steps(method: DMoLE, task: Task, rate: float = 0.5) -> list[float]:
    losses = []
    parameters = method.trainable_parameters()
    for batch in batches(method, task):
        with method.training_gates(batch):
            loss = method.loss(batch)
            loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
                    parameter.grad = None
    return losses


def learn(method: DMoLE, stream: Stream, count: int) -> None:
    for stage in method.stages(stream)[:count]:
        method.begin_stage(stage.index, stage.task)
        steps(method, stage.task)
        method.end_stage(stage.index, stage.task)


@contextmanager
def watching(method: DMoLE, record: Callable[[str, tuple[str, ...], Tensor], None]) -> Iterator[None]:
    """Calls record(tower, experts, gate) for the gates in force at the first layer of each tower."""
    handles = []
    for tower, names in method.candidates.items():

        def hook(module: Any, inputs: Any, tower: str = tower) -> None:
            block = module.gates.block
            if block is not None:
                record(tower, block.names, block.gate)

        handles.append(method.adapters[names[0]].register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(method: DMoLE, batch: Batch) -> Tensor:
    with torch.no_grad():
        return method.vlm.model(
            **batch.encoded.inputs,
        ).logits


def test_the_registry_knows_it() -> None:
    assert "dmole" in method_names()
    assert method_class("dmole") is DMoLE
    assert DMoLE.Options is DMoLESettings


def test_before_any_task_the_model_is_the_base(stream: Stream) -> None:
    method = make()
    batch = collate(method.vlm, stream.tasks[0].test, with_answers=False)
    want = logits(make(), batch)
    with method.evaluation_gates(batch) as routing:
        assert torch.equal(logits(method, batch), want)
    assert routing is not None and routing.chosen == ((),) * 3


def test_a_stage_places_the_budget_and_trains_only_its_expert(stream: Stream) -> None:
    method = make()
    method.check(stream)
    task = stream.tasks[0]
    method.begin_stage(1, task)
    placement = method.pool["red"]
    candidates = sum(len(names) for names in method.candidates.values())
    assert sum(placement.budgets.values()) == len(placement.all_linears) == candidates // 2
    assert min(placement.budgets.values()) >= 1
    assert {tower: len(names) for tower, names in placement.linears.items()} == placement.budgets
    for tower, names in placement.linears.items():
        worst = min(placement.scores[tower][name] for name in names)
        assert all(placement.scores[tower][n] <= worst for n in method.candidates[tower] if n not in names)

    parameters = method.trainable_parameters()
    assert len(parameters) == 2 * len(placement.all_linears)
    assert all(p.dtype == torch.float32 for p in parameters.values())
    first = steps(method, task)
    assert steps(method, task)[0] < first[0]
    frozen = [n for n, p in method.vlm.model.named_parameters() if p.grad is not None and n not in parameters]
    assert frozen == []
    method.end_stage(1, task)
    assert method.trainable_parameters() == {}
    assert method.timings()["proxy_seconds"] > 0 and method.timings()["router_seconds"] > 0


def test_old_experts_are_active_frozen_beside_the_new_one(stream: Stream) -> None:
    method = make()
    learn(method, stream, 2)
    old = {name: p.detach().clone() for name, p in method.vlm.model.named_parameters()}
    task = stream.tasks[2]
    method.begin_stage(3, task)
    seen: list[tuple[tuple[str, ...], Tensor]] = []
    with watching(method, lambda tower, experts, gate: seen.append((experts, gate))):
        steps(method, task)
    assert len(seen) == 2 * 2  # two batches, two towers
    experts, gate = seen[0]
    assert experts == ("t01_red", "t02_blue", "t03_grey")
    assert gate[:, 2].tolist() == [1.0] * 4  # the new expert serves everyone
    errors = method.router.errors(method._stage.features_ND)  # type: ignore[union-attr]
    assert gate[:, :2].argmax(dim=1).tolist() == errors[:4].argmin(dim=1).tolist()
    assert gate[:, :2].sum(dim=1).tolist() == [1.0] * 4  # and one old task
    neighbours = method.pool["grey"].neighbours
    assert sum(neighbours.values()) == 8 and set(neighbours) <= {"red", "blue"}
    new = method.trainable_parameters()
    now = dict(method.vlm.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in old.items())
    assert any(not torch.equal(p, torch.zeros_like(p)) for name, p in new.items() if name.endswith("lora_b"))


@pytest.mark.parametrize(
    ("changes", "columns"),
    [
        ({"training_neighbour": "none"}, [0.0]),
        ({"training_neighbour": "batch_vote"}, [0.0]),
        ({"neighbour_within_threshold": True}, [0.0]),
        ({"routing": "none"}, [1.0]),
    ],
)
def test_other_ways_to_choose_the_old_expert(stream: Stream, changes: dict[str, Any], columns: list[float]) -> None:
    router = RouterSettings(hidden=8, epochs=60, learning_rate=1e-2)
    method = make(DMoLESettings(proxy_min_samples=4, router=router, **changes))
    learn(method, stream, 1)
    method.begin_stage(2, stream.tasks[1])
    gates: list[Tensor] = []
    batch = next(batches(method, stream.tasks[1]))
    with watching(method, lambda tower, experts, gate: gates.append(gate)), method.training_gates(batch):
        method.loss(batch)
    assert gates[0].tolist() == [[*columns, 1.0]] * 4


def test_samples_are_routed_each_by_itself_in_a_mixed_batch(stream: Stream) -> None:
    method = make()
    learn(method, stream, 2)
    mixed = [sample for trio in zip(*(task.test for task in stream.tasks), strict=True) for sample in trio]
    batch = collate(method.vlm, mixed, with_answers=False)
    seen: dict[str, Tensor] = {}
    with watching(method, lambda tower, experts, gate: seen.update({tower: gate})):
        with method.evaluation_gates(batch) as routing:
            together = logits(method, batch)
    assert routing is not None
    for n, chosen in enumerate(routing.chosen):
        own = ("red", "blue", "grey")[n % 3]
        if own == "grey":  # not learned: nobody knows it
            assert chosen == ()
        else:
            assert chosen[0] == own
    assert set(seen) == {"vision", "language"}
    assert torch.equal(seen["vision"], seen["language"])

    # A sample's answer does not depend on its batch mates; the unknown task's is the base model's.
    base = logits(method, batch)
    for n, sample in enumerate(mixed[:3]):
        single = collate(method.vlm, [sample], with_answers=False)
        with method.evaluation_gates(single) as alone:
            answer = logits(method, single)[0, -1]
        assert alone is not None and alone.chosen[0] == routing.chosen[n]
        assert torch.allclose(together[n, -1], answer, atol=1e-4)
        assert torch.allclose(together[n, -1], base[n, -1], atol=1e-6) == (routing.chosen[n] == ())


def test_batch_vote_serves_one_list_to_all(stream: Stream) -> None:
    method = make(DMoLESettings(proxy_min_samples=4, routing="batch_vote", router=ROUTER))
    learn(method, stream, 2)
    mixed = [*stream.tasks[0].test, *stream.tasks[1].test[:1]]
    with method.evaluation_gates(collate(method.vlm, mixed, with_answers=False)) as routing:
        assert routing is not None and routing.chosen == (("red",),) * 4


def test_evaluation_works_under_inference_mode_and_before_a_stage_ends(stream: Stream) -> None:
    method = make()
    learn(method, stream, 1)
    method.begin_stage(2, stream.tasks[1])
    batch = collate(method.vlm, stream.tasks[0].test, with_answers=False)
    with torch.inference_mode(), method.evaluation_gates(batch) as routing:
        logits(method, batch)
    assert routing is not None and routing.chosen == (("red",),) * 3
    steps(method, stream.tasks[1])
    method.end_stage(2, stream.tasks[1])


def copy_state(method: DMoLE) -> tuple[dict[str, Tensor], Any]:
    tensors, meta = method.state()
    return tensors, json.loads(json.dumps(meta))


@pytest.mark.parametrize("routing", ["per_sample", "none"])
@pytest.mark.parametrize("inside", [False, True], ids=["boundary", "inside"])
def test_resume_gives_the_same_numbers(stream: Stream, inside: bool, routing: Any) -> None:
    options = DMoLESettings(proxy_min_samples=4, router=ROUTER, routing=routing)
    first, second = stream.tasks[:2]

    def finish(method: DMoLE, *, begun: bool) -> None:
        if not begun:
            method.begin_stage(2, second)
        steps(method, second)
        method.end_stage(2, second)

    whole = make(options)
    learn(whole, stream, 1)
    if inside:
        whole.begin_stage(2, second)
        steps(whole, second)
    state = copy_state(whole)
    finish(whole, begun=inside)

    resumed = make(options)
    resumed.load_state(*state)
    finish(resumed, begun=inside)

    tensors, meta = copy_state(whole)
    again, meta_again = copy_state(resumed)
    assert meta == meta_again
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    batch = collate(whole.vlm, [*first.test, *second.test], with_answers=False)
    with whole.evaluation_gates(batch) as one, resumed.evaluation_gates(batch) as two:
        assert one == two
        assert torch.equal(logits(whole, batch), logits(resumed, batch))


def test_placement_depends_on_seed_stage_and_task_alone(stream: Stream) -> None:
    def placed(seed: int, noise: int) -> tuple[Any, dict[str, Tensor]]:
        method = make(seed=seed)
        torch.manual_seed(noise)
        method.begin_stage(1, stream.tasks[0])
        return method.pool.to_json(), {n: p.detach() for n, p in method.trainable_parameters().items()}

    (pool_a, a), (pool_b, b), (_, c) = placed(0, 1), placed(0, 2), placed(1, 1)
    assert pool_a == pool_b
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a.keys() & c.keys())


def test_ablations(stream: Stream) -> None:
    full = DMoLESettings(proxy_min_samples=4, router=ROUTER)
    v1, v2, v3, v4 = (make(ablated(full, name)) for name in ("v1", "v2", "v3", "v4"))
    for method in (v1, v2, v3, v4):
        method.check(stream)
        learn(method, stream, 1)
    assert set(v1.pool["red"].linears) == {"language"} and set(v2.pool["red"].linears) == {"vision"}
    room = {tower: len(names) for tower, names in v3.candidates.items()}
    assert len(v1.pool["red"].all_linears) == round(room["language"] / 2)
    budgets = v3.pool["red"].budgets
    assert abs(budgets["vision"] - budgets["language"]) <= 1
    assert v4.pool["red"].scores == {} and sum(v4.pool["red"].budgets.values()) == sum(budgets.values())
    batch = collate(v4.vlm, stream.tasks[1].test, with_answers=False)
    base = logits(v4, batch)
    with v4.evaluation_gates(batch) as routing:
        assert routing is None
        assert not torch.allclose(logits(v4, batch), base, atol=1e-6)


@pytest.mark.parametrize(
    ("budget", "floor", "message"),
    [
        (BudgetSettings(fraction=1.2), 0.0, r"budget: got \d+ linears, more than the \d+ candidates"),
        (BudgetSettings(fraction=0.01), 0.0, "budget: got 0 linears, smaller than one linear per tower"),
        (BudgetSettings(fraction=0.3, unit="layer"), 0.0, "budget: got 1 layers, smaller than one layer per tower"),
        (BudgetSettings(fraction=0.9), 0.9, "vision_floor: got 0.9, which is"),
    ],
)
def test_impossible_budgets_are_refused_before_anything_happens(
    budget: BudgetSettings, floor: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(DMoLESettings(vision_floor=floor), budget=budget)


def test_thresholds_from_validation_need_validation_samples(stream: Stream) -> None:
    router = RouterSettings(hidden=8, epochs=3, threshold_from="validation", feature_batch_size=4)
    options = DMoLESettings(proxy_min_samples=4, router=router)
    method = make(options)
    method.check(stream)
    learn(method, stream, 1)
    assert set(method.router.thresholds) == {"red"}
    bare = Stream(name="bare", tasks=(Task(name="t", metric="cider", train=(), validation=(), test=()),))
    with pytest.raises(ValueError, match="router.threshold_from: got 'validation' and task 't' has no"):
        method.check(bare)


def test_misuse_is_refused(stream: Stream) -> None:
    method = make()
    stranger = collate(method.vlm, stream.tasks[1].test, with_answers=True)
    with pytest.raises(ValueError, match="training_gates: got a batch before begin_stage"):
        method.training_gates(stranger)
    method.begin_stage(1, stream.tasks[0])
    with pytest.raises(ValueError, match="stage: got 2 while another one is open; expected end_stage first"):
        method.begin_stage(2, stream.tasks[1])
    with pytest.raises(ValueError, match="batch: got samples .* that are not in this stage's training data"):
        method.training_gates(stranger)


def test_the_report_is_json_and_says_where_experts_are(stream: Stream) -> None:
    method = make()
    learn(method, stream, 2)
    report = json.loads(json.dumps(method.report()))
    assert [entry["task"] for entry in report["experts"]] == ["red", "blue"]
    assert set(report["router"]["thresholds"]) == {"red", "blue"}
    assert report["expert_parameters"]["red"] > 0
    assert report["budget"] == sum(report["experts"][0]["budgets"].values())
