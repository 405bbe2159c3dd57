# SPDX-License-Identifier: Apache-2.0
"""Generation against transformers' own, alone against in company, and a queue that mixes tasks."""

import pytest
import torch

from dmole.config import EvaluationSettings, MethodSettings
from dmole.data.collate import collate
from dmole.data.sample import Sample, Stream
from dmole.evaluation import Prediction, evaluate, generate, generation_queue, score
from dmole.methods import method_class
from dmole.models.adapters import add_experts, attach
from dmole.models.multimodal import MultimodalModel
from dmole.seeding import derived_generator
from dmole.training import Profile
from dmole_kernels import ExpertGates


@pytest.fixture
def talkative(tiny_model: MultimodalModel) -> MultimodalModel:
    """The tiny model with large random weights: it says something, and something else for every prompt."""
    generator = derived_generator("talkative")
    with torch.no_grad():
        for parameter in tiny_model.model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.4, generator=generator)
        # The image tokens' embeddings aside, only words can win.
        tiny_model.model.model.language_model.embed_tokens.weight[:6] *= 0.1
    return tiny_model


def mixed(toy_stream: Stream) -> list[Sample]:
    return [task.test[number] for number in range(2) for task in toy_stream.tasks]


def test_equals_transformers_greedy_generation(toy_stream: Stream, talkative: MultimodalModel) -> None:
    batch = collate(talkative, mixed(toy_stream), with_answers=False)
    assert (batch.attention_mask[:, 0] == 0).any(), "the batch should have padding"
    out = talkative.model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values,
        max_new_tokens=12,
        do_sample=False,
    )
    expected = [talkative.decode(row) for row in out[:, batch.input_ids.shape[1] :].tolist()]
    assert generate(talkative, batch, max_new_tokens=12) == expected
    assert len(set(expected)) > 1


def test_an_answer_does_not_depend_on_batch_mates(toy_stream: Stream, talkative: MultimodalModel) -> None:
    samples = mixed(toy_stream)
    together = generate(talkative, collate(talkative, samples, with_answers=False), max_new_tokens=8)
    alone = [
        generate(talkative, collate(talkative, [sample], with_answers=False), max_new_tokens=8)[0] for sample in samples
    ]
    assert together == alone


def test_each_row_keeps_its_own_expert(toy_stream: Stream, talkative: MultimodalModel) -> None:
    gates = {tower: ExpertGates() for tower in talkative.candidates}
    adapters = attach(talkative.model, talkative.candidates, gates=gates)
    for name in ("one", "two"):
        add_experts(adapters, adapters, name, rank=4, alpha=64.0, generator=derived_generator(name))
    generator = derived_generator("b")
    for parameter_name, parameter in talkative.model.named_parameters():
        if parameter_name.endswith("lora_b"):
            parameter.data.normal_(generator=generator)
    samples = mixed(toy_stream)
    routes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])

    def answer(some: list[Sample], gate: torch.Tensor) -> list[str]:
        with gates["vision"].use(gate, ("one", "two")), gates["language"].use(gate, ("one", "two")):
            return generate(talkative, collate(talkative, some, with_answers=False), max_new_tokens=6)

    together = answer(samples, routes)
    assert together == [answer([sample], routes[row : row + 1])[0] for row, sample in enumerate(samples)]
    assert together != answer(samples, routes.flip(1)), "the experts should matter"


def test_generation_stops_at_the_end_token_and_at_the_limit(toy_stream: Stream, talkative: MultimodalModel) -> None:
    batch = collate(talkative, mixed(toy_stream), with_answers=False)
    one = generate(talkative, batch, max_new_tokens=1)
    longer = generate(talkative, batch, max_new_tokens=6)
    assert all(long.startswith(short) for short, long in zip(one, longer, strict=True))
    calls: list[int] = []
    hook = talkative.model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        # Make the end token win everywhere: the head is tied to the embedding.
        talkative.model.lm_head.weight[int(talkative.tokenizer.eos_token_id)] = 10.0
    talkative.model.model.language_model.norm.register_forward_hook(lambda module, inputs, out: torch.ones_like(out))
    assert generate(talkative, batch, max_new_tokens=6) == [""] * len(batch.samples)
    assert len(calls) == 1
    hook.remove()


def test_queue_holds_every_sample_once_and_mixes_tasks(toy_stream: Stream, tiny_model: MultimodalModel) -> None:
    queue = generation_queue(tiny_model, toy_stream.tasks, 5)
    assert [len(batch) for batch in queue] == [5, 5, 2]
    asked = sorted((task, sample.id) for batch in queue for task, sample in batch)
    assert asked == sorted((task.name, sample.id) for task in toy_stream.tasks for sample in task.test)
    assert all(len({task for task, _ in batch}) > 1 for batch in queue[:2])
    assert generation_queue(tiny_model, toy_stream.tasks, 5) == queue


def test_scores_use_each_samples_own_answers(toy_stream: Stream) -> None:
    right = [
        Prediction(task=task.name, id=sample.id, text=sample.answers[0], route=None)
        for task in reversed(toy_stream.tasks)
        for sample in reversed(task.test)
    ]
    result = score(toy_stream.tasks, right)
    assert result.points["colours"] == 100.0
    assert result.points["letters"] == 100.0
    assert result.well_formed == {task.name: 1.0 for task in toy_stream.tasks}
    assert [p.id for p in result.predictions] == [sample.id for task in toy_stream.tasks for sample in task.test]


def test_evaluating_counts_samples_and_seconds(toy_stream: Stream, tiny_model: MultimodalModel) -> None:
    method = method_class("zero_shot")(tiny_model, MethodSettings(), seed=0)
    settings, profile, seen = EvaluationSettings(batch_size=5, max_new_tokens=2), Profile(), []
    queue = generation_queue(tiny_model, toy_stream.tasks, settings.batch_size)
    result = evaluate(method, toy_stream.tasks, queue, settings, profile=profile, after_batch=seen.append)
    assert seen == [5, 5, 2]
    assert {p.route for p in result.predictions} == {None}
    assert set(profile.seconds) == {"evaluation_data", "evaluation_generate", "evaluation_score"}
