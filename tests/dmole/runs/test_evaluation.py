# SPDX-License-Identifier: Apache-2.0
"""Answers alone against in company, their ends, which stages test which tasks, and a queue that mixes tasks."""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dmole.config import EvaluationSettings
from dmole.data.collate import collate
from dmole.data.sample import Sample, Stream
from dmole.methods import method_class
from dmole.methods.base import Stage
from dmole.methods.settings import MethodSettings
from dmole.models.adapters import add_experts, attach, experts_on
from dmole.models.vision_language import VisionLanguageModel
from dmole.profile import Profile
from dmole.runs.evaluation import Prediction, evaluate, evaluated_stages, final_rows, generation_queue, score
from dmole.runs.generation import Answer, generate, sampling
from dmole.seeding import derived_generator
from dmole.training.acceleration import make_accelerator
from dmole.training.settings import TrainingSettings
from dmole_kernels import ExpertGates


@pytest.fixture
def talkative(tiny_model: VisionLanguageModel) -> VisionLanguageModel:
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


NAMES = tuple(f"t/{number}" for number in range(6))


def texts(
    model: VisionLanguageModel, samples: list[Sample], names: Sequence[str] = NAMES, **settings: Any
) -> list[str]:
    batch = collate(model, samples, with_answers=False)
    return [answer.text for answer in generate(model, batch, EvaluationSettings(**settings), names[: len(samples)])]


GREEDY: dict[str, Any] = {"max_new_tokens": 8}
BEAMS: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3}
SAMPLED: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 3}
WAYS = pytest.mark.parametrize("way", [GREEDY, BEAMS, SAMPLED], ids=["greedy", "beams", "sampled"])


@pytest.mark.parametrize("beams", [1, 3])
def test_equals_transformers_generation(beams: int, toy_stream: Stream, talkative: VisionLanguageModel) -> None:
    batch = collate(talkative, mixed(toy_stream), with_answers=False)
    assert (batch.encoded.inputs["attention_mask"][:, 0] == 0).any(), "the batch should have padding"
    out = talkative.model.generate(
        **batch.encoded.inputs,
        max_new_tokens=12,
        num_beams=beams,
        do_sample=False,
    )
    expected = [text for text, _ in talkative.decode(out[:, batch.input_ids.shape[1] :].tolist())]
    assert texts(talkative, mixed(toy_stream), max_new_tokens=12, num_beams=beams) == expected
    assert len(set(expected)) > 1


@WAYS
def test_an_answer_does_not_depend_on_batch_mates(
    way: dict[str, Any], toy_stream: Stream, talkative: VisionLanguageModel
) -> None:
    samples = mixed(toy_stream)
    together = texts(talkative, samples, **way)
    alone = [texts(talkative, [sample], [name], **way)[0] for sample, name in zip(samples, NAMES, strict=True)]
    assert together == alone
    assert len(set(together)) > 1


@pytest.fixture
def two_experts(talkative: VisionLanguageModel) -> dict[str, ExpertGates]:
    gates = {tower: ExpertGates() for tower in talkative.candidates}
    adapters = attach(talkative.model, talkative.candidates, gates=gates)
    for name in ("one", "two"):
        add_experts(adapters, adapters, name, rank=4, alpha=64.0, generator=derived_generator(name))
    generator = derived_generator("b")
    for parameter_name, parameter in talkative.model.named_parameters():
        if parameter_name.endswith("lora_b"):
            parameter.data.normal_(generator=generator)
    return gates


@WAYS
def test_each_row_keeps_its_own_expert(
    way: dict[str, Any], toy_stream: Stream, talkative: VisionLanguageModel, two_experts: dict[str, ExpertGates]
) -> None:
    samples = mixed(toy_stream)
    routes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])

    def answer(some: list[Sample], gate: torch.Tensor, names: Sequence[str] = NAMES) -> list[str]:
        units = dict.fromkeys(two_experts, [1] * len(some))
        with experts_on(two_experts, gate, ("one", "two"), units=units):
            return texts(talkative, some, names, **way)

    together = answer(samples, routes)
    alone = [
        answer([sample], routes[row : row + 1], [name])[0]
        for row, (sample, name) in enumerate(zip(samples, NAMES, strict=True))
    ]
    assert together == alone
    assert together != answer(samples, routes.flip(1)), "the experts should matter"


def test_beams_without_units_are_refused(
    toy_stream: Stream, talkative: VisionLanguageModel, two_experts: dict[str, ExpertGates]
) -> None:
    # Three beams of six samples have the rows of eighteen: a gate of six rows must not be read as something else.
    with contextlib.ExitStack() as stack:
        for gates in two_experts.values():
            stack.enter_context(gates.use(torch.ones(6, 2), ("one", "two")))
        with pytest.raises(ValueError, match=r"pass use\(\.\.\., units="):
            texts(talkative, mixed(toy_stream), **BEAMS)


def test_sampling_has_the_distribution_of_the_warped_logits() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    settings = EvaluationSettings(do_sample=True, temperature=0.7, top_k=4, top_p=0.95)
    rows = 20_000
    processors = sampling(settings, [f"t/{row}" for row in range(rows)])
    scores = processors(torch.zeros(rows, 1, dtype=torch.long), logits_V.repeat(rows, 1))
    counts_V = torch.bincount(scores.argmax(dim=1), minlength=5)
    # By hand: 0.7 as temperature, the likeliest four, of which three add up to 95 %.
    expected_V = torch.softmax(logits_V[:3] / 0.7, dim=0)
    assert counts_V[3:].tolist() == [0, 0]
    deviation_V = (expected_V * (1 - expected_V) / rows).sqrt()
    assert (((counts_V[:3] / rows - expected_V).abs()) < 4 * deviation_V).all()


def test_sampling_repeats_with_its_seed_and_draws_nothing_from_the_global_state(
    toy_stream: Stream, talkative: VisionLanguageModel
) -> None:
    samples, state = mixed(toy_stream), torch.get_rng_state()
    first = texts(talkative, samples, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), state)
    assert texts(talkative, samples, **SAMPLED) == first
    assert texts(talkative, samples, **{**SAMPLED, "seed": 4}) != first
    assert texts(talkative, samples, **GREEDY) != first


def test_the_settings_take_precedence_over_the_models_own(toy_stream: Stream, talkative: VisionLanguageModel) -> None:
    samples = mixed(toy_stream)
    expected = texts(talkative, samples, **GREEDY)
    own = talkative.model.generation_config
    own.do_sample, own.temperature, own.num_beams, own.repetition_penalty, own.max_new_tokens = True, 5.0, 2, 3.0, 2
    assert texts(talkative, samples, **GREEDY) == expected
    assert texts(talkative, samples, **GREEDY, repetition_penalty=3.0) != expected


def test_generation_stops_at_the_end_token_and_at_the_limit(toy_stream: Stream, talkative: VisionLanguageModel) -> None:
    batch = collate(talkative, mixed(toy_stream), with_answers=False)

    def answers(limit: int) -> list[Answer]:
        return generate(talkative, batch, EvaluationSettings(max_new_tokens=limit), NAMES)

    one, longer = answers(1), answers(6)
    assert all(long.text.startswith(short.text) for short, long in zip(one, longer, strict=True))
    assert all(answer.cut for answer in one)
    calls: list[int] = []
    hook = talkative.model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        # Make the end token win everywhere: the head is tied to the embedding.
        talkative.model.lm_head.weight[int(talkative.tokenizer.eos_token_id)] = 10.0
    talkative.model.model.language_model.norm.register_forward_hook(lambda module, inputs, out: torch.ones_like(out))
    assert answers(6) == [Answer(text="", cut=False)] * len(batch.samples)
    assert len(calls) == 1
    hook.remove()


def test_an_answer_ends_at_any_of_the_models_end_tokens(toy_stream: Stream, talkative: VisionLanguageModel) -> None:
    samples = mixed(toy_stream)
    whole = texts(talkative, samples, **GREEDY)
    batch = collate(talkative, samples, with_answers=False)
    first = talkative.model.generate(
        **batch.encoded.inputs,
        max_new_tokens=2,
        do_sample=False,
    )
    second = int(first[0, -1])
    talkative.model.generation_config.eos_token_id = [second]
    got = generate(talkative, batch, EvaluationSettings(**GREEDY), NAMES)
    assert not got[0].cut and whole[0].startswith(got[0].text) and len(got[0].text) < len(whole[0])
    assert talkative.end_token_ids == {second, talkative.tokenizer.eos_token_id}


def test_bf16_is_autocast(toy_stream: Stream, talkative: VisionLanguageModel) -> None:
    seen: list[torch.dtype] = []
    layer = talkative.model.get_submodule(talkative.candidates["language"][0])
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for bf16 in (False, True):
        with make_accelerator(TrainingSettings(bf16=bf16)).autocast():
            texts(talkative, mixed(toy_stream), max_new_tokens=1)
    hook.remove()
    assert seen == [torch.float32, torch.bfloat16]
    assert layer.weight.dtype == torch.float32


# Not beams: transformers' beam search makes its first mask on the default device and moves it.
@pytest.mark.parametrize("way", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_no_tensor_is_made_on_the_default_device(
    way: dict[str, Any], toy_stream: Stream, talkative: VisionLanguageModel, two_experts: dict[str, ExpertGates]
) -> None:
    samples = mixed(toy_stream)
    batch, gate = collate(talkative, samples, with_answers=False), torch.ones(6, 2)
    expected = texts(talkative, samples, **way)
    torch.set_default_device("meta")
    try:
        # A tensor made without its input's device has no values here.
        answers = generate(talkative, batch, EvaluationSettings(**way), NAMES)
        units = dict.fromkeys(two_experts, [1] * 6)
        with experts_on(two_experts, gate, ("one", "two"), units=units):
            generate(talkative, batch, EvaluationSettings(**way), NAMES)
        generation_queue(talkative, toy_stream.tasks, 5)
    finally:
        torch.set_default_device(None)
    assert [answer.text for answer in answers] == expected


def test_as_many_names_as_samples_are_needed(toy_stream: Stream, talkative: VisionLanguageModel) -> None:
    batch = collate(talkative, mixed(toy_stream), with_answers=False)
    with pytest.raises(ValueError, match=r"names: got 2 for 6 samples; expected one each\."):
        generate(talkative, batch, EvaluationSettings(), NAMES[:2])


def test_queue_holds_every_sample_once_and_mixes_tasks(toy_stream: Stream, tiny_model: VisionLanguageModel) -> None:
    queue = generation_queue(tiny_model, toy_stream.tasks, 5)
    assert [len(batch) for batch in queue] == [5, 5, 2]
    asked = sorted((task, sample.id) for batch in queue for task, sample in batch)
    assert asked == sorted((task.name, sample.id) for task in toy_stream.tasks for sample in task.test)
    assert all(len({task for task, _ in batch}) > 1 for batch in queue[:2])
    assert list(generation_queue(tiny_model, toy_stream.tasks, 5)) == list(queue)
    assert list(queue[1::2]) == list(queue)[1::2]


def test_scores_use_each_samples_own_answers(toy_stream: Stream) -> None:
    right = [
        Prediction(task=task.name, id=sample.id, text=sample.answers[0], route=None, cut=sample is task.test[0])
        for task in reversed(toy_stream.tasks)
        for sample in reversed(task.test)
    ]
    result = score(toy_stream.tasks, right)
    assert result.points["colours"] == 100.0
    assert result.points["letters"] == 100.0
    assert result.well_formed == {task.name: 1.0 for task in toy_stream.tasks}
    assert result.cut == {task.name: 1 for task in toy_stream.tasks}
    assert [p.id for p in result.predictions] == [sample.id for task in toy_stream.tasks for sample in task.test]


def test_evaluating_counts_samples_and_seconds(toy_stream: Stream, tiny_model: VisionLanguageModel) -> None:
    method = method_class("zero_shot")(tiny_model, MethodSettings(), seed=0)
    settings, profile, seen = EvaluationSettings(per_device_eval_batch_size=5, max_new_tokens=2), Profile(), []
    queue = generation_queue(tiny_model, toy_stream.tasks, settings.per_device_eval_batch_size)
    result = evaluate(
        method,
        toy_stream.tasks,
        queue,
        settings,
        make_accelerator(TrainingSettings()),
        profile=profile,
        after_batch=seen.append,
    )
    assert seen == [5, 5, 2]
    assert {p.route for p in result.predictions} == {None}
    assert set(profile.seconds) == {"evaluation_data", "evaluation_generate", "evaluation_score"}


def protocol(method: str, toy_stream: Stream, tiny_model: VisionLanguageModel) -> list[Stage]:
    return method_class(method)(tiny_model, MethodSettings(), seed=0).stages(toy_stream)


@pytest.mark.parametrize(
    ("method", "mode", "expected"),
    [
        ("seq_ft", "all", {1: "abc", 2: "abc", 3: "abc"}),
        ("seq_ft", "diagonal", {1: "a", 2: "b", 3: "c"}),
        ("seq_ft", "last", {1: "", 2: "", 3: "abc"}),
        # Each of these tests a task once anyway: what is left out costs nothing.
        ("finetune", "diagonal", {1: "a", 2: "b", 3: "c"}),
        ("finetune", "last", {1: "a", 2: "b", 3: "c"}),
        ("joint", "diagonal", {3: "abc"}),
        ("joint", "last", {3: "abc"}),
        ("zero_shot", "last", {}),
    ],
)
def test_the_stages_that_are_tested(
    method: str, mode: str, expected: dict[int, str], toy_stream: Stream, tiny_model: VisionLanguageModel
) -> None:
    letter = dict(zip(toy_stream.task_names, "abc", strict=True))
    stages = evaluated_stages(protocol(method, toy_stream, tiny_model), mode)  # type: ignore[arg-type]
    assert {stage.row: "".join(letter[name] for name in stage.evaluates) for stage in stages} == expected


def test_the_row_of_a_final_score_is_the_protocols(toy_stream: Stream, tiny_model: VisionLanguageModel) -> None:
    names = toy_stream.task_names
    rows = {
        method: list(final_rows(protocol(method, toy_stream, tiny_model), names).values())
        for method in ("zero_shot", "joint")
    }
    assert rows == {"zero_shot": [0, 0, 0], "joint": [3, 3, 3]}
