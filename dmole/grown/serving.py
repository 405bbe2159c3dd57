# SPDX-License-Identifier: Apache-2.0
"""A demonstration server: OpenAI's `/v1/chat/completions` over one `GrownModel`, with mixed batches.

    requests of different tasks -> one queue -> batches of up to `max_batch` that wait at most `max_wait` -> answer

Each sample of a batch is answered by its own experts, so requests need not be sorted by task. `model` in a request is
the server's model, whose router chooses, or the name of a task, whose expert then answers. The reply's field `dmole`
holds the route with errors and thresholds.

This is no rival of vLLM: no continuous batching, no streaming, one process, one device. It listens on loopback unless
told otherwise, has no authentication, and fetches nothing: pictures come inside the request as `data:` URIs.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, Field
from starlette.responses import Response

from dmole.data.images import ImageError, open_image
from dmole.grown.answers import GrownAnswer
from dmole.grown.model import GrownModel

GROWN = "grown"


@dataclass(frozen=True, kw_only=True)
class ServingLimits:
    """What one request may ask for, and how requests become batches."""

    max_batch: int = 16
    max_wait: float = 0.02  # seconds that the first request of a batch waits for others
    max_waiting: int = 256  # requests in the queue; more get 503
    max_tokens: int = 512
    max_images: int = 8
    max_messages: int = 32
    max_bytes: int = 32 * 2**20  # of a request's body


class ImageUrl(BaseModel):
    url: str


class Part(BaseModel):
    """One part of a message's content."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageUrl | None = None


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class ChatRequest(BaseModel):
    """The fields of OpenAI's request that are served; other values of `n` and `stream` are refused."""

    model: str = GROWN
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int = Field(default=0, ge=0)
    n: Literal[1] = 1
    stream: Literal[False] = False


class Refusal(ValueError):
    """A request that is not served: the HTTP status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(reason)


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A request in the queue. Requests with equal `settings` may share a batch."""

    messages: list[dict[str, Any]]
    task: str | None
    settings: tuple[tuple[str, Any], ...]
    future: asyncio.Future[GrownAnswer]


def create_app(grown: GrownModel, limits: ServingLimits | None = None) -> FastAPI:
    """The application, for uvicorn or any other ASGI server. One process may run one of it over `grown`."""
    limits = limits or ServingLimits()
    queue: asyncio.Queue[Waiting] = asyncio.Queue(limits.max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(_work(grown, queue, limits))
        yield
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker

    app = FastAPI(title="dmole", lifespan=lifespan)

    @app.middleware("http")
    async def size(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "")
        if request.method == "POST" and not length.isdigit():
            return _error(411, "Content-Length: got none; expected the size of the body.")
        if length and int(length) > limits.max_bytes:
            return _error(413, f"body: got {length} bytes; expected at most {limits.max_bytes}. Send smaller pictures.")
        return await call(request)

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return _error(refusal.status, str(refusal))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in (GROWN, *grown.tasks)]}

    @app.get("/v1/experts")
    async def experts() -> dict[str, Any]:
        return {"experts": [{**vars(expert), "linears": len(expert.linears)} for expert in grown.experts]}

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest) -> dict[str, Any]:
        if asked.model not in (GROWN, *grown.tasks):
            raise Refusal(404, f"model: got {asked.model!r}; expected {GROWN} or one of {', '.join(grown.tasks)}.")
        messages = await asyncio.to_thread(_messages, asked.messages, limits)
        future: asyncio.Future[GrownAnswer] = asyncio.get_running_loop().create_future()
        waiting = Waiting(
            messages=messages,
            task=None if asked.model == GROWN else asked.model,
            settings=_settings(asked, grown, limits),
            future=future,
        )
        try:
            queue.put_nowait(waiting)
        except asyncio.QueueFull as error:
            raise Refusal(503, f"queue: {limits.max_waiting} requests are waiting; try again later.") from error
        try:
            answer = await future
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        tokens = len(grown.vlm.tokenizer.encode(answer.text, add_special_tokens=False))
        return _reply(asked, answer, tokens)

    return app


def serve(grown: GrownModel, *, host: str = "127.0.0.1", port: int = 8000, limits: ServingLimits | None = None) -> None:
    """Serve until Ctrl-C. A `host` other than loopback opens the model to other machines."""
    import uvicorn

    uvicorn.run(create_app(grown, limits), host=host, port=port, log_level="warning")


async def _work(grown: GrownModel, queue: asyncio.Queue[Waiting], limits: ServingLimits) -> None:
    """Takes batches from the queue, one after another, for ever."""
    while True:
        batch = [await queue.get()]
        until = time.monotonic() + limits.max_wait
        later: list[Waiting] = []
        while len(batch) < limits.max_batch and (left := until - time.monotonic()) > 0:
            try:
                found = await asyncio.wait_for(queue.get(), left)
            except asyncio.TimeoutError:
                break
            (batch if found.settings == batch[0].settings else later).append(found)
        for group in [batch, *([waiting] for waiting in later)]:
            alive = [waiting for waiting in group if not waiting.future.cancelled()]
            if alive:
                await _answer(grown, alive)


async def _answer(grown: GrownModel, batch: Sequence[Waiting]) -> None:
    """Answers a batch. One request that is refused must not fail its neighbours: each is then tried alone."""
    try:
        answers = await asyncio.to_thread(
            grown.answer,
            messages=[waiting.messages for waiting in batch],
            task=[waiting.task for waiting in batch],
            **dict(batch[0].settings),
        )
    except Exception as error:
        if len(batch) == 1:
            if not batch[0].future.done():
                batch[0].future.set_exception(error)
            return
        for waiting in batch:
            await _answer(grown, [waiting])
        return
    for waiting, answer in zip(batch, answers, strict=True):
        if not waiting.future.done():
            waiting.future.set_result(answer)


def _settings(asked: ChatRequest, grown: GrownModel, limits: ServingLimits) -> tuple[tuple[str, Any], ...]:
    """The request's settings of `evaluation:`; those of the run where the request says nothing."""
    tokens = asked.max_completion_tokens or asked.max_tokens or grown.generation.max_new_tokens
    if tokens > limits.max_tokens:
        raise Refusal(400, f"max_tokens: got {tokens}; expected at most {limits.max_tokens}.")
    settings: dict[str, Any] = {"max_new_tokens": tokens}
    if asked.temperature:
        settings.update(do_sample=True, temperature=asked.temperature, top_p=asked.top_p or 1.0, seed=asked.seed)
    elif asked.temperature == 0:
        settings.update(do_sample=False, temperature=1.0, top_p=1.0, top_k=0, seed=0)
    return tuple(sorted(settings.items()))


def _messages(messages: Sequence[Message], limits: ServingLimits) -> list[dict[str, Any]]:
    """transformers' messages with opened pictures."""
    if len(messages) > limits.max_messages:
        raise Refusal(400, f"messages: got {len(messages)}; expected at most {limits.max_messages}.")
    if messages[-1].role != "user":
        raise Refusal(400, f"messages: the last one is the {messages[-1].role}'s; expected the user's.")
    found: list[dict[str, Any]] = []
    images = 0
    for message in messages:
        parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        content: list[dict[str, Any]] = []
        for part in parts:
            if part.type == "text":
                content.append({"type": "text", "text": part.text})
                continue
            images += 1
            if images > limits.max_images:
                raise Refusal(400, f"image_url: got more than {limits.max_images} pictures.")
            content.append({"type": "image", "image": _picture(part.image_url.url if part.image_url else "")})
        found.append({"role": message.role, "content": content})
    return found


def _picture(url: str) -> Image.Image:
    header, comma, data = url.partition(",")
    if not (comma and header.startswith("data:image/") and header.endswith(";base64")):
        raise Refusal(
            400, f"image_url: got {url[:40]!r}; expected data:image/png;base64,... Nothing is fetched from elsewhere."
        )
    try:
        return open_image(base64.b64decode(data, validate=True))
    except (binascii.Error, ImageError) as error:
        raise Refusal(400, f"image_url: {error}") from error


def _reply(asked: ChatRequest, answer: GrownAnswer, tokens: int) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": "length" if answer.cut else "stop",
            }
        ],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": answer.prompt_tokens + tokens,
        },
        "dmole": {
            "route": list(answer.route.tasks),
            "errors": dict(answer.route.errors),
            "thresholds": dict(answer.route.thresholds),
            "unknown": answer.route.unknown,
        },
    }


def _error(status: int, message: str) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)
