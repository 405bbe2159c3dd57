# SPDX-License-Identifier: Apache-2.0
"""`dmole serve` with a real client over HTTP: mixed batches, routes, limits, refusals."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from PIL import Image

import dmole
from dmole.data.collate import collate
from dmole.data.sample import Sample, Stream
from dmole.grown.model import GrownModel
from dmole.grown.serving import ServingLimits, create_app

Runs = dict[str, Path]


@pytest.fixture(scope="module")
def grown(finished: Runs) -> GrownModel:
    return dmole.load(finished["dmole"])


@pytest.fixture(scope="module")
def address(grown: GrownModel) -> Iterator[str]:
    """A server on a free port of loopback."""
    limits = ServingLimits(max_wait=0.2, max_tokens=8, max_bytes=200_000, max_images=2)
    server = uvicorn.Server(uvicorn.Config(create_app(grown, limits), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def picture(image: Image.Image) -> dict[str, Any]:
    data = io.BytesIO()
    image.save(data, "PNG")
    return url(f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}")


def url(text: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": text}}


def said(content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


def request(sample: Sample, **fields: Any) -> dict[str, Any]:
    content = [picture(Image.open(path)) for path in sample.images] + [{"type": "text", "text": sample.instruction}]
    return {"messages": [{"role": "user", "content": content}], **fields}


def ask(address: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)


def test_64_requests_at_once_get_the_answers_of_each_alone(address: str, grown: GrownModel, toy_stream: Stream) -> None:
    samples = [task.test[place % 4] for place in range(22) for task in toy_stream.tasks][:64]
    alone = {id(s): grown.answer(images=list(s.images), text=s.instruction) for s in samples}
    sizes: list[int] = []
    answer = grown.answer

    def counted(*arguments: Any, **keywords: Any) -> Any:
        sizes.append(len(keywords["messages"]))
        return answer(*arguments, **keywords)

    grown.answer = counted  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(64) as pool:
            replies = [reply.json() for reply in pool.map(lambda s: ask(address, request(s)), samples)]
    finally:
        del grown.answer  # type: ignore[method-assign]
    for sample, reply in zip(samples, replies, strict=True):
        wanted = alone[id(sample)]
        assert reply["choices"][0]["message"]["content"] == wanted.text
        assert reply["choices"][0]["finish_reason"] == ("length" if wanted.cut else "stop")
        assert tuple(reply["dmole"]["route"]) == wanted.route.tasks
        assert reply["usage"]["prompt_tokens"] == wanted.prompt_tokens
    assert sum(sizes) == 64 and max(sizes) > 8  # requests of different tasks shared batches
    assert len({tuple(reply["dmole"]["route"]) for reply in replies}) > 1


def test_logits_in_a_mixed_batch_differ_no_more_than_the_base_does(grown: GrownModel, toy_stream: Stream) -> None:
    samples = [sample for task in toy_stream.tasks for sample in task.test]
    routes = [
        route.tasks
        for route in grown.route(images=[list(s.images) for s in samples], text=[s.instruction for s in samples])
    ]

    def logits(chosen: list[Sample], tasks: list[tuple[str, ...]]) -> list[torch.Tensor]:
        batch = collate(grown.vlm, chosen, with_answers=False)
        with torch.no_grad(), grown.method.task_gates(batch, tasks):
            return list(grown.vlm.model(**batch.encoded.inputs).logits[:, -1])

    def largest(tasks: list[tuple[str, ...]]) -> float:
        together = logits(samples, tasks)
        alone = [logits([s], [t])[0] for s, t in zip(samples, tasks, strict=True)]
        return max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True))

    assert len(set(routes)) > 1
    # The base computes other last bits in a batch too; one rounding more, because logits under experts are larger.
    rounding = torch.finfo(torch.float32).eps * max(float(row.abs().max()) for row in logits(samples, routes))
    assert largest(routes) <= largest([()] * len(samples)) + rounding


def test_a_task_can_be_asked_for_by_the_name_of_the_model(address: str, grown: GrownModel, toy_stream: Stream) -> None:
    sample = toy_stream.tasks[0].test[0]
    names = [model["id"] for model in httpx.get(f"{address}/v1/models").json()["data"]]
    assert names == ["grown", "colours", "letters", "captions"]
    for name in names[1:]:
        reply = ask(address, request(sample, model=name, max_tokens=6)).json()
        wanted = grown.answer(images=list(sample.images), text=sample.instruction, task=name)
        assert reply["dmole"]["route"] == [name]
        assert reply["choices"][0]["message"]["content"] == wanted.text
    experts = httpx.get(f"{address}/v1/experts").json()["experts"]
    assert [expert["task"] for expert in experts] == ["colours", "letters", "captions"]


def test_a_temperature_samples_with_the_seed(address: str, toy_stream: Stream) -> None:
    body = request(toy_stream.tasks[0].test[0], temperature=3.0, max_tokens=8)
    texts = [
        ask(address, {**body, "seed": seed}).json()["choices"][0]["message"]["content"] for seed in (1, 1, 2, 3, 4)
    ]
    assert texts[0] == texts[1] and len(set(texts)) > 1


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "maps"}, 404, "model: got 'maps'; expected grown or one of colours"),
        ({"max_tokens": 9}, 400, "max_tokens: got 9; expected at most 8"),
        (said([url("http://x/y.png")]), 400, "Nothing is fetched"),
        (said([url("data:image/png;base64,AAAA")]), 400, "image_url: image"),
        (said("yes", role="assistant"), 400, "the last one is the assistant's"),
        (said([picture(Image.new("RGB", (8, 8)))] * 3), 400, "more than 2 pictures"),
        (said("x" * 300_000), 413, "expected at most 200000"),
        (said("<image>"), 400, "special token"),
        ({"messages": []}, 422, "messages"),
        ({"stream": True}, 422, "stream"),
        ({"n": 2}, 422, "n"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    address: str, toy_stream: Stream, change: dict[str, Any], status: int, message: str
) -> None:
    reply = ask(address, {**request(toy_stream.tasks[0].test[0]), **change})
    assert reply.status_code == status
    assert message in reply.text


def test_a_refused_request_does_not_fail_its_batch(address: str, grown: GrownModel, toy_stream: Stream) -> None:
    sample = toy_stream.tasks[0].test[0]
    bad = said("<image>")
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda body: ask(address, body), [request(sample), bad, request(sample), bad]))
    assert [reply.status_code for reply in replies] == [200, 400, 200, 400]
    wanted = grown.answer(images=list(sample.images), text=sample.instruction).text
    assert {reply.json()["choices"][0]["message"]["content"] for reply in replies[::2]} == {wanted}


def test_it_listens_on_loopback_by_default() -> None:
    import inspect

    from dmole.grown.serving import serve

    assert inspect.signature(serve).parameters["host"].default == "127.0.0.1"
