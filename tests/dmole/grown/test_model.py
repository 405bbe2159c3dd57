# SPDX-License-Identifier: Apache-2.0
"""`dmole.load`: answers, routes, generate, experts; each sample by its own experts, in any number of threads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dmole
from dmole.data.sample import Stream
from dmole.grown.model import GrownModel

from .test_saved import stored

Runs = dict[str, Path]


@pytest.fixture(scope="module")
def grown(finished: Runs) -> GrownModel:
    return dmole.load(finished["dmole"])


def asked(stream: Stream, count: int = 2) -> dict[str, Any]:
    """images and text of a batch that mixes all tasks."""
    samples = [sample for task in stream.tasks for sample in task.test[:count]]
    return {"images": [list(sample.images) for sample in samples], "text": [sample.instruction for sample in samples]}


def test_answers_and_routes_are_those_of_the_run(grown: GrownModel, finished: Runs, toy_stream: Stream) -> None:
    wanted = stored(finished["dmole"])
    answers = grown.answer(**asked(toy_stream))
    keys = [(task.name, sample.id) for task in toy_stream.tasks for sample in task.test[:2]]
    assert [(answer.text, list(answer.route.tasks)) for answer in answers] == [wanted[key] for key in keys]
    assert len({answer.route.tasks for answer in answers}) > 1


def test_a_question_alone_is_answered_as_in_a_batch(grown: GrownModel, toy_stream: Stream) -> None:
    batch = asked(toy_stream)
    together = grown.answer(**batch)
    for images, text, answer in zip(batch["images"], batch["text"], together, strict=True):
        alone = grown.answer(images=images, text=text)
        assert (alone.text, alone.route.tasks) == (answer.text, answer.route.tasks)
        picture = [Image.open(path) for path in images]
        message = [{"type": "image", "image": shown} for shown in picture] + [{"type": "text", "text": text}]
        said = grown.answer(messages=[{"role": "user", "content": message}])
        assert (said.text, said.route) == (alone.text, alone.route)


def test_generate_takes_what_the_processor_makes(grown: GrownModel, toy_stream: Stream) -> None:
    batch = asked(toy_stream)
    answers = grown.answer(**batch)
    conversations = []
    for images, text in zip(batch["images"], batch["text"], strict=True):
        content = [*({"type": "image", "path": str(path)} for path in images), {"type": "text", "text": text}]
        conversations.append([{"role": "user", "content": content}])
    inputs = grown.processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"text_kwargs": {"padding": True, "padding_side": "left"}},
    )  # fmt: skip
    ends = sorted(grown.vlm.end_token_ids)
    output = grown.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
    new = output[:, inputs["input_ids"].shape[1] :]
    assert [text for text, _ in grown.vlm.decode(new.tolist())] == [answer.text for answer in answers]
    with pytest.raises(ValueError, match="instructions: got a prompt that ends with .* Pass instructions="):
        grown.generate(input_ids=inputs["input_ids"][:, :-3], attention_mask=inputs["attention_mask"][:, :-3])


def test_a_route_says_why(grown: GrownModel, toy_stream: Stream) -> None:
    routes = grown.route(**asked(toy_stream))
    for route in routes:
        assert set(route.errors) == set(route.thresholds) == {"colours", "letters", "captions"}
        fitting = {task for task, error in route.errors.items() if error <= route.thresholds[task]}
        assert set(route.tasks) <= fitting and len(route.tasks) == min(2, len(fitting))
        assert route.unknown == (not fitting)
    strange = grown.route(text="zq zq zq zq zq zq zq zq")
    assert strange.unknown and str(strange).startswith("unknown: the base model alone (error of threshold:")


def test_a_task_that_the_caller_names_takes_precedence(grown: GrownModel, finished: Runs, toy_stream: Stream) -> None:
    batch = asked(toy_stream)
    for task in ("colours", "letters"):
        assert {answer.route.tasks for answer in grown.answer(**batch, task=task)} == {(task,)}
    with pytest.raises(ValueError, match="task: got 'maps'"):
        grown.answer(**batch, task="maps")
    finetune = dmole.load(finished["finetune"])
    with pytest.raises(ValueError, match="one adapter per task and no router; expected one of colours.* Pass task="):
        finetune.answer(**batch)
    wanted = stored(finished["finetune"])
    for task in toy_stream.tasks:
        questions = {"images": [list(s.images) for s in task.test], "text": [s.instruction for s in task.test]}
        answers = finetune.answer(**questions, task=task.name)
        assert [answer.text for answer in answers] == [wanted[task.name, sample.id][0] for sample in task.test]
    with pytest.raises(ValueError, match="whose samples all use the same experts; expected none"):
        dmole.load(finished["seq_ft"]).answer(**batch, task="colours")


def test_experts_have_ranks_places_sizes_and_use_counts(finished: Runs, toy_stream: Stream) -> None:
    grown = dmole.load(finished["dmole"])
    assert [expert.task for expert in grown.experts] == ["colours", "letters", "captions"]
    assert all(
        set(expert.linears.values()) == {4} and expert.bytes == 4 * expert.parameters for expert in grown.experts
    )
    assert {expert.uses for expert in grown.experts} == {0}
    answers = grown.answer(**asked(toy_stream))
    grown.route(**asked(toy_stream))  # asks nothing
    uses = {expert.task: expert.uses for expert in grown.experts}
    assert uses == {task: sum(task in answer.route.tasks for answer in answers) for task in toy_stream.task_names}
    assert sum(uses.values()) > 0


def test_requests_of_many_threads_get_their_own_answers(grown: GrownModel, toy_stream: Stream) -> None:
    batch = asked(toy_stream, count=4)
    single = [
        grown.answer(images=images, text=text) for images, text in zip(batch["images"], batch["text"], strict=True)
    ]
    with ThreadPoolExecutor(8) as pool:
        threads = torch.get_num_threads()
        places = [place % len(single) for place in range(36)]
        found = list(pool.map(lambda p: grown.answer(images=batch["images"][p], text=batch["text"][p]), places))
        assert torch.get_num_threads() == threads
    assert [(answer.text, answer.route.tasks) for answer in found] == [
        (single[p].text, single[p].route.tasks) for p in places
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "text, messages: got neither"),
        ({"text": "a", "messages": []}, "text, messages: got both"),
        ({"text": ["a", "b"], "images": [[]]}, "images: got 1 lists for 2 questions"),
        ({"text": "a", "tokens": 3}, "answer: got the setting 'tokens'; expected one of do_sample"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "https://x/y.png"}]}]},
            "image: got 'https",
        ),
        ({"text": ["a", "b"], "task": ["colours"]}, "task: got 1 for 2 samples"),
    ],
)
def test_wrong_arguments_are_refused(grown: GrownModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grown.answer(**arguments)
