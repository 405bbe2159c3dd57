# SPDX-License-Identifier: Apache-2.0
"""Blocks of gates and of use_backend that overlap in time: threads, asyncio tasks, generators, wrappers, backward."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmole_kernels import ExpertGates, MultiLoRALinear, choose_backend, use_backend

NAMES = ("charts", "maps", "films", "tables")
FEATURES = 6
COMPILED: Any = {"backend": "eager", "dynamic": True, "fullgraph": True}


def make_model(layers: int = 2) -> tuple[nn.Sequential, ExpertGates]:
    torch.manual_seed(0)
    gates = ExpertGates()
    model = nn.Sequential(*(MultiLoRALinear(nn.Linear(FEATURES, FEATURES), gates=gates) for _ in range(layers)))
    for layer in model:
        for name in NAMES:
            layer.bank.add(name, 2, alpha=4.0)
            nn.init.normal_(layer.bank.expert(name).lora_b)
    return model, gates


def truth(model: nn.Module, x: Tensor, gate: Tensor, names: tuple[str, ...]) -> Tensor:
    """In float64, without the gates' machinery; gate [samples, names] of zeros gives the base model."""
    y = x.double()
    for layer in model:
        out = y @ layer.base.weight.double().t() + layer.base.bias.double()
        for column, name in enumerate(names):
            expert = layer.bank.expert(name)
            delta = y @ expert.lora_a.double().t() @ expert.lora_b.double().t() * expert.scale
            out = out + gate[:, column].double().view(-1, *[1] * (x.dim() - 1)) * delta
        y = out
    return y.detach()


class Request:
    """A batch with a gate, names and a length of its own, and what the model must answer."""

    def __init__(self, model: nn.Module, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        samples, tokens = 2 + number % 3, 2 + number % 4
        chosen = torch.randperm(len(NAMES), generator=generator)[: 1 + number % 2].tolist()
        self.names = tuple(NAMES[i] for i in chosen)
        self.x = torch.randn(samples, tokens, FEATURES, generator=generator)
        self.gate = torch.randn(samples, len(self.names), generator=generator)
        self.expected = truth(model, self.x, self.gate, self.names)
        self.base = truth(model, self.x, self.gate * 0, self.names)

    def is_answered_by(self, y: Tensor) -> bool:
        return torch.allclose(y.double(), self.expected, rtol=1e-4, atol=1e-4)

    def is_base(self, y: Tensor) -> bool:
        return torch.allclose(y.double(), self.base, rtol=1e-4, atol=1e-4)


def test_requests_can_be_told_apart() -> None:
    model, _ = make_model()
    requests = [Request(model, number) for number in range(0, 48, 12)]
    for one in requests:
        assert not one.is_base(one.expected)
        assert not any(one.is_answered_by(other.expected) for other in requests if other is not one)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_thousand_requests_on_eight_threads(compiled: bool) -> None:
    model, gates = make_model()
    requests = [Request(model, number) for number in range(1000)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = [torch.compile(layer, **COMPILED) if compiled else layer for layer in model]
    # Threads that find no graph each compile one, whatever the model is: here they find it.
    for request in requests[: 24 if compiled else 0]:
        with torch.no_grad(), gates.use(request.gate, request.names):
            [layer(request.x) for layer in layers]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    barrier = threading.Barrier(8)

    def serve(first: int) -> int:
        wrong = 0
        barrier.wait()
        for request in requests[first::8]:
            with torch.no_grad(), gates.use(request.gate, request.names):
                y = request.x
                for layer in layers:
                    y = layer(y)
                    time.sleep(0)
            wrong += not request.is_answered_by(y)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(serve, range(8))) == 0
    assert gates.block is None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs <= (4 if compiled else 0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_thousand_requests_in_eight_tasks(compiled: bool) -> None:
    model, gates = make_model()
    requests = [Request(model, number) for number in range(1000)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = [torch.compile(layer, **COMPILED) if compiled else layer for layer in model]

    async def serve(first: int) -> int:
        wrong = 0
        for request in requests[first::8]:
            with gates.use(request.gate, request.names):
                y = request.x
                for layer in layers:
                    with torch.no_grad():
                        y = layer(y)
                    await asyncio.sleep(0)
            wrong += not request.is_answered_by(y)
        return wrong

    async def main() -> int:
        return sum(await asyncio.gather(*(serve(first) for first in range(8))))

    # Grad modes belong to the thread, not to a task: a no_grad block around an await would overlap others.
    assert asyncio.run(main()) == 0
    assert gates.block is None


def test_training_on_threads_gives_each_its_own_gate_gradients() -> None:
    """Reentrant checkpoints: every layer runs again in backward, on its own thread and in its own block."""
    model, gates = make_model()
    # The gates and inputs learn here, and belong to one thread each. With a parameter that several threads share, torch
    # 2.13 can deadlock: one holds the lock of its gradient accumulator and waits for the GIL, another the reverse.
    model.requires_grad_(False)

    def train(number: int) -> bool:
        request = Request(model, number)
        gate, x = request.gate.clone().requires_grad_(), request.x.clone().requires_grad_()
        with gates.use(gate, request.names):
            y = checkpoint(model, x, use_reentrant=True)
            time.sleep(0)
            y.backward(y.detach())
        found = gate.grad
        wide = request.gate.double().requires_grad_()
        expected = graph_truth(model, request.x, wide, request.names)
        expected.backward(expected.detach())
        return found is not None and torch.allclose(found.double(), wide.grad, rtol=1e-4, atol=1e-4)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(train, range(64)))


def graph_truth(model: nn.Module, x: Tensor, gate: Tensor, names: tuple[str, ...]) -> Tensor:
    y = x.double()
    for layer in model:
        out = y @ layer.base.weight.double().t() + layer.base.bias.double()
        for column, name in enumerate(names):
            expert = layer.bank.expert(name)
            delta = y @ expert.lora_a.double().t() @ expert.lora_b.double().t() * expert.scale
            out = out + gate[:, column, None, None] * delta
        y = out
    return y


def stream(model: nn.Module, gates: ExpertGates, request: Request, steps: int) -> Iterator[Tensor]:
    with gates.use(request.gate, request.names):
        for _ in range(steps):
            yield model(request.x)


def stream_by_a_wrapper(model: nn.Module, gates: ExpertGates, request: Request, steps: int) -> Iterator[Tensor]:
    @contextlib.contextmanager
    def gated() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(gates.use(request.gate, request.names))
            yield

    with gated():
        for _ in range(steps):
            yield model(request.x)


class Gated:
    """A context manager of a user's own, entered by a function and not by the generator itself."""

    def __init__(self, gates: ExpertGates, request: Request) -> None:
        self.block = gates.use(request.gate, request.names)

    def __enter__(self) -> None:
        self.block.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.block.__exit__(*error)


def stream_by_a_class(model: nn.Module, gates: ExpertGates, request: Request, steps: int) -> Iterator[Tensor]:
    with Gated(gates, request):
        for _ in range(steps):
            yield model(request.x)


def stream_by_a_helper(model: nn.Module, gates: ExpertGates, request: Request, steps: int) -> Iterator[Tensor]:
    def opened() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(gates.use(request.gate, request.names))
        return stack

    with opened():
        for _ in range(steps):
            yield model(request.x)


def stream_through_another(model: nn.Module, gates: ExpertGates, request: Request, steps: int) -> Iterator[Tensor]:
    yield from stream(model, gates, request, steps)


STREAMS = pytest.mark.parametrize(
    "opened", [stream, stream_by_a_wrapper, stream_by_a_class, stream_by_a_helper, stream_through_another]
)


@STREAMS
def test_interleaved_generators(opened: Callable[..., Iterator[Tensor]]) -> None:
    model, gates = make_model()
    requests = [Request(model, number) for number in range(6)]
    streams = [opened(model, gates, request, 2 + i) for i, request in enumerate(requests)]
    outside = Request(model, 77)
    alive = list(zip(streams, requests, strict=True))
    order = torch.Generator().manual_seed(3)
    while alive:
        place = int(torch.randint(len(alive), (), generator=order))
        one, request = alive[place]
        y = next(one, None)
        if y is None:
            del alive[place]
        else:
            assert request.is_answered_by(y)
        # A block around the call is the right answer while generators are suspended ...
        with gates.use(outside.gate, outside.names):
            assert outside.is_answered_by(model(outside.x))
    # ... and without one after they have ended.
    assert outside.is_base(model(outside.x))


@STREAMS
def test_a_suspended_generator_gates_nothing_outside(opened: Callable[..., Iterator[Tensor]]) -> None:
    model, gates = make_model()
    request, outside = Request(model, 1), Request(model, 2)
    running = opened(model, gates, request, 3)
    next(running)
    with pytest.raises(ValueError, match="is open in a generator that is not running in this thread; expected"):
        model(outside.x)
    assert request.is_answered_by(next(running))
    # An abandoned generator ends its block when it is collected.
    del running
    gc.collect()
    assert outside.is_base(model(outside.x))


def test_a_generator_inside_a_block_and_a_block_inside_a_generator() -> None:
    model, gates = make_model()
    inner, outer = Request(model, 1), Request(model, 2)
    with gates.use(outer.gate, outer.names):
        running = stream(model, gates, inner, 9)
        assert inner.is_answered_by(next(running))
        # The generator's block was opened last, but it is suspended.
        assert outer.is_answered_by(model(outer.x))
        assert inner.is_answered_by(next(running))
    with pytest.raises(ValueError, match="a generator that is not running"):
        model(outer.x)
    # A block around the call of next() is outside the generator's.
    with gates.use(outer.gate, outer.names):
        assert inner.is_answered_by(next(running))
        assert outer.is_answered_by(model(outer.x))
    running.close()
    assert outer.is_base(model(outer.x))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_generator_whose_steps_run_in_several_contexts(compiled: bool) -> None:
    """As a web server runs the steps of a generator: each in a thread of a pool, in a fresh copy of the context."""
    model, gates = make_model()
    torch._dynamo.reset()
    served: Any = torch.compile(model, **COMPILED) if compiled else model
    requests = [Request(model, number) for number in range(4)]
    streams = [stream(served, gates, request, 5) for request in requests]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        for step in range(5):
            for request, running in zip(requests, streams, strict=True):
                answer = (one if step % 2 else two).submit(contextvars.copy_context().run, next, running)
                if compiled and step:
                    # Frames cannot be read inside a graph: an error, not the base model.
                    with pytest.raises((ValueError, RuntimeError), match="runs, perhaps around this call, in another"):
                        answer.result()
                else:
                    assert request.is_answered_by(answer.result())
            if compiled and step:
                break
    for running in streams:
        running.close()
    assert requests[0].is_base(served(requests[0].x))


def test_compiled_generators_interleave() -> None:
    model, gates = make_model()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, **COMPILED)
    one, two, outer = (Request(model, number) for number in (1, 2, 3))
    first, second = stream(compiled, gates, one, 4), stream_by_a_class(compiled, gates, two, 4)
    for _ in range(2):
        assert one.is_answered_by(next(first))
        assert two.is_answered_by(next(second))
        with gates.use(outer.gate, outer.names):
            assert outer.is_answered_by(compiled(outer.x))
            assert one.is_answered_by(next(first))
    with pytest.raises((ValueError, RuntimeError), match="is open in a generator that is not running"):
        compiled(outer.x)
    first.close()
    second.close()
    assert outer.is_base(compiled(outer.x))


def test_asynchronous_generators_overlap() -> None:
    model, gates = make_model()

    async def stream_of(request: Request, steps: int) -> AsyncIterator[Tensor]:
        with gates.use(request.gate, request.names):
            for _ in range(steps):
                await asyncio.sleep(0)
                yield model(request.x)
                await asyncio.sleep(0)

    @contextlib.asynccontextmanager
    async def gated(request: Request) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        with gates.use(request.gate, request.names):
            yield

    async def consume(number: int) -> int:
        one, two, outer = (Request(model, 3 * number + i) for i in range(3))
        wrong = 0
        first, second = stream_of(one, 4), stream_of(two, 4)
        async with gated(outer):
            for _ in range(4):
                wrong += not one.is_answered_by(await anext(first))
                wrong += not outer.is_answered_by(model(outer.x))
                wrong += not two.is_answered_by(await anext(second))
                await asyncio.sleep(0)
                wrong += not outer.is_answered_by(model(outer.x))
        await first.aclose()
        await second.aclose()
        return wrong + (not outer.is_base(model(outer.x)))

    async def main() -> int:
        return sum(await asyncio.gather(*(consume(number) for number in range(8))))

    assert asyncio.run(main()) == 0


def test_to_thread_and_tasks_inherit_the_block_while_it_is_open() -> None:
    model, gates = make_model()
    request = Request(model, 5)

    async def late() -> Tensor:
        await asyncio.sleep(0.01)
        return model(request.x)

    async def main() -> None:
        with gates.use(request.gate, request.names):
            assert request.is_answered_by(await asyncio.to_thread(model, request.x))
            assert request.is_answered_by(await asyncio.create_task(late()))
            task = asyncio.create_task(late())
            # A thread that is started without a copy of the context has none of its gates.
            bare = ThreadPoolExecutor(1)
            assert request.is_base(bare.submit(model, request.x).result())
            bare.shutdown()
        # It inherited a block that has been left: neither the base model nor stale gates.
        with pytest.raises(ValueError, match="inherited has been left; expected the call before that. Open a block in"):
            await task
        assert request.is_base(model(request.x))

    asyncio.run(main())


def test_a_task_may_open_its_own_block_after_the_inherited_one_was_left() -> None:
    model, gates = make_model()
    outer, inner = Request(model, 5), Request(model, 6)

    async def own() -> None:
        await asyncio.sleep(0.01)
        with gates.use(inner.gate, inner.names):
            assert inner.is_answered_by(model(inner.x))

    async def main() -> None:
        with gates.use(outer.gate, outer.names):
            task = asyncio.create_task(own())
        await task

    asyncio.run(main())


def test_exceptions_and_wrappers_leave_the_blocks_as_they_were() -> None:
    model, gates = make_model()
    outer, inner = Request(model, 1), Request(model, 2)

    @contextlib.contextmanager
    def gated(request: Request) -> Iterator[None]:
        with gates.use(request.gate, request.names):
            yield

    with gates.use(outer.gate, outer.names):
        for opened in (gated, lambda r: gates.use(r.gate, r.names), lambda r: Gated(gates, r)):
            with pytest.raises(KeyError), opened(inner):
                assert inner.is_answered_by(model(inner.x))
                raise KeyError
            assert outer.is_answered_by(model(outer.x))
        with contextlib.ExitStack() as stack:
            stack.enter_context(gated(inner))
            assert inner.is_answered_by(model(inner.x))
            stack.enter_context(gated(outer))
            assert outer.is_answered_by(model(outer.x))
        assert outer.is_answered_by(model(outer.x))
    assert outer.is_base(model(outer.x))


@pytest.mark.parametrize("what", ["gates", "backend"])
def test_leaving_out_of_order_is_an_error(what: str) -> None:
    _, gates = make_model()

    def opened() -> Any:
        return gates.use(torch.ones(1, 1), ["maps"]) if what == "gates" else use_backend("reference")

    first, second = opened(), opened()
    first.__enter__()
    second.__enter__()
    with pytest.raises(ValueError, match="is left before one that was entered after it; expected the reverse order"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    with pytest.raises(ValueError, match="is left in another thread or task than it was entered in|was entered before"):
        second.__exit__(None, None, None)
    with pytest.raises(ValueError, match="was entered before; expected a new one. Call it again"):
        first.__enter__()

    forgotten: list[Any] = []

    def generator() -> Iterator[None]:
        one, two = opened(), opened()
        forgotten.extend((one, two))
        one.__enter__()
        two.__enter__()
        yield
        one.__exit__(None, None, None)

    running = generator()
    next(running)
    with pytest.raises(ValueError, match="is left before one that was entered after it"):
        next(running)
    forgotten[1].__exit__(None, None, None)


@pytest.mark.parametrize("what", ["gates", "backend"])
def test_leaving_in_another_thread_is_an_error(what: str) -> None:
    _, gates = make_model()
    block: Any = gates.use(torch.ones(1, 1), ["maps"]) if what == "gates" else use_backend("reference")
    block.__enter__()
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="is left in another thread or task"):
        pool.submit(block.__exit__, None, None, None).result()
    # It is closed all the same, and the next block forgets it.
    with gates.use(torch.zeros(1, 1), ["maps"]):
        pass
    with use_backend("auto"):
        pass


def test_two_towers_with_blocks_of_their_own() -> None:
    vision, vision_gates = make_model()
    language, language_gates = make_model()
    with torch.no_grad():
        for parameter in language.parameters():
            parameter.mul_(-0.5)
    image, text = Request(vision, 4), Request(language, 5)
    with vision_gates.use(image.gate, image.names), language_gates.use(text.gate, text.names):
        assert image.is_answered_by(vision(image.x))
        assert text.is_answered_by(language(text.x))
        with vision_gates.use(image.gate * 0, image.names):
            assert image.is_base(vision(image.x))
            assert text.is_answered_by(language(text.x))
    assert image.is_base(vision(image.x))
    assert text.is_base(language(text.x))


def test_use_backend_belongs_to_a_thread_a_task_and_a_generator() -> None:
    usual = choose_backend().name

    def serve(name: str) -> bool:
        right = True
        for _ in range(50):
            with use_backend(name):
                time.sleep(0)
                right &= choose_backend().name == ("reference" if name == "reference" else usual)
        return right and choose_backend().name == usual

    async def serve_in_a_task(name: str) -> bool:
        right = True
        for _ in range(50):
            with use_backend(name):
                await asyncio.sleep(0)
                right &= choose_backend().name == ("reference" if name == "reference" else usual)
        return right and choose_backend().name == usual

    async def main() -> bool:
        return all(await asyncio.gather(*(serve_in_a_task(name) for name in ["reference", "auto"] * 4)))

    def generator(name: str) -> Iterator[str]:
        with use_backend(name):
            for _ in range(3):
                yield choose_backend().name

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(serve, ["reference", "auto"] * 4))
    assert asyncio.run(main())
    one, two = generator("reference"), generator("auto")
    for _ in range(3):
        assert (next(one), next(two)) == ("reference", usual)
    one.close()
    two.close()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choose_backend().name == usual


def test_worker_threads_of_the_autograd_engine_inherit_the_block() -> None:
    """On a GPU a reentrant checkpoint recomputes in a thread of the engine, which has backward's context in its TLS."""
    model, gates = make_model()
    request = Request(model, 3)

    def as_worker(function: Callable[[], Any]) -> Any:
        context = contextvars.copy_context()

        def run() -> Any:
            torch._C._stash_obj_in_tls("context", context)
            try:
                return function()
            finally:
                torch._C._remove_obj_from_tls("context")

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run).result()

    def running() -> Iterator[Tensor]:
        with gates.use(request.gate, request.names):
            yield as_worker(lambda: model(request.x))

    with gates.use(request.gate, request.names):
        assert request.is_answered_by(as_worker(lambda: model(request.x)))
    assert request.is_base(as_worker(lambda: model(request.x)))
    for one in (running(), running()):
        assert request.is_answered_by(next(one))
        with pytest.raises(ValueError, match="a generator that is not running"):
            as_worker(lambda: model(request.x))
        one.close()
    with use_backend("reference"):
        assert as_worker(lambda: choose_backend().name) == "reference"


def test_a_replica_of_data_parallel_refuses() -> None:
    """DataParallel runs replicas in threads that know no block: the base model in silence."""
    model, gates = make_model()
    layer: Any = model[0]
    request = Request(model, 1)
    # What nn.parallel.replicate makes of a module; it copies the children and parameters, which a GPU would hold.
    replica = layer._replicate_for_data_parallel()
    with gates.use(request.gate, request.names), ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="a replica in a thread of nn.DataParallel, which has no gates; expected"):
            pool.submit(replica, request.x).result()
        assert pool.submit(lambda: "alive").result() == "alive"
