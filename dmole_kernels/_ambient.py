# SPDX-License-Identifier: Apache-2.0
"""`with` blocks whose setting belongs to one thread, asyncio task or generator, and which torch.compile can read.

A setting is stored in a `contextvars.ContextVar`, so threads and asyncio tasks each have their own. Two additions:

- A generator shares the context of its caller, or is resumed in another one at each step. A block that a generator
  opened, itself or through a function that it called, therefore belongs to its frame and applies while that is running
  (for a generator that contextlib drives, as `@contextmanager` does, to the function whose `with` statement entered
  it). A lookup while all such generators are suspended is ambiguous: `strict` settings raise, others use the block
  opened last, as a plain ContextVar would. An inherited block that has been left since raises too where the setting is
  strict, and is ignored otherwise.
- torch.compile does not trace `ContextVar.get` or frames, but it reads a property whose getter is a builtin at every
  call, as a guarded input of the graph. `_Reader.now` is such a property. It must not run Python code: guards
  are checked on several threads at once, and torch.compile would compile what they call.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
import sys
from contextvars import ContextVar
from types import FrameType
from typing import Any, Generic, TypeVar

import torch

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_CONTEXTLIB = contextlib.__file__
_is_key_in_tls = torch._C._is_key_in_tls


class _Reader(itertools.starmap):  # type: ignore[type-arg]
    """`_Reader(f, repeat(arguments)).now` is f(*arguments)."""

    now = property(next)


class AmbientBlock:
    """What one `with` block sets; `identity` names the setting (several objects may share one `Ambient`)."""

    __slots__ = ("closed", "identity", "owner", "running", "serial", "suspendable")

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.closed = False
        self.suspendable = False  # opened by a generator
        self.owner: FrameType | None = None  # the frame of the generator or coroutine that opened it
        self.serial = 0
        # `running.now`: whether its owner runs, in any thread; a suspended generator's frame has no caller.
        self.running: Any = None


Block = TypeVar("Block", bound=AmbientBlock)


class Ambient(Generic[Block]):
    """The open blocks of one setting."""

    def __init__(self, name: str, *, strict: bool) -> None:
        self.name = name
        self.strict = strict
        self._variable: ContextVar[tuple[Block, ...]] = ContextVar(name, default=())
        self._context: Any = _Reader(self._variable.get, itertools.repeat(()))  # .now: the blocks of this context
        self._of_generators: dict[Block, None] = {}  # in all threads
        self.in_generators = False  # whether there are any
        # .now: whether the generator of one of them runs.
        frames = itertools.starmap(map, itertools.repeat((operator.attrgetter("owner.f_back"), self._of_generators)))
        self._running: Any = _Reader(any, zip(frames, strict=False))
        self._serials = itertools.count(1)

    def refuse_in_graphs(self) -> None:
        """For what makes a block: raises ValueError inside a compiled function."""
        if torch.compiler.is_dynamo_compiling():
            raise ValueError(
                f"{self.name} is opened inside a compiled function; expected the `with` block around the call of it. "
                f"Move the block out of the function."
            )

    def enter(self, block: Block, frame: FrameType) -> None:
        """Opens `block` for the function that `frame` runs: the frame of its `with` statement."""
        if block.serial:
            raise ValueError(f"this block of {self.name} was entered before; expected a new one. Call it again.")
        block.owner = _owner(frame)
        block.suspendable = block.owner is not None and bool(block.owner.f_code.co_flags & _GENERATOR)
        block.serial = next(self._serials)
        self._variable.set((*(b for b in self._variable.get() if not b.closed), block))
        if block.suspendable:
            frames = map(operator.attrgetter("owner.f_back"), itertools.repeat(block))
            block.running = _Reader(operator.truth, zip(frames, strict=False))
            self._of_generators[block] = None
            self.in_generators = True

    def leave(self, block: Block) -> None:
        """Closes `block`. Raises ValueError when a block that was opened after it is still open."""
        owner, was_closed = block.owner, block.closed
        block.closed, block.owner = True, None
        self._of_generators.pop(block, None)
        self.in_generators = len(self._of_generators) > 0
        blocks = self._variable.get()
        if block in blocks:
            later = blocks[blocks.index(block) + 1 :]
            self._variable.set(tuple(b for b in blocks if b is not block))
        elif block.suspendable and not was_closed:
            # A pool of threads resumes a generator in one context after another; the collector ends it anywhere.
            later = tuple(b for b in self._of_generators if b.serial > block.serial)
        else:
            raise ValueError(
                f"a block of {self.name} is left in another thread or task than it was entered in; expected the same. "
                f"Enter and leave it in one function."
            )
        if any(b.owner is owner and not b.closed for b in later):
            raise ValueError(
                f"a block of {self.name} is left before one that was entered after it; expected the reverse order. Use "
                f"`with` statements, which nest."
            )

    def innermost(self, identity: str) -> Block | None:
        """The block with this identity that applies here, or None. Raises ValueError where that is ambiguous."""
        blocks: tuple[Block, ...] = self._context.now
        if self.in_generators:
            return self._traced(identity, blocks) if torch.compiler.is_dynamo_compiling() else self._by_frames(identity)
        if not blocks and not torch.compiler.is_dynamo_compiling() and _is_key_in_tls("context"):
            blocks = self._of_the_caller_of_backward()
        for block in reversed(blocks):
            if block.identity == identity:
                if not block.closed:
                    return block
                if self.strict and not block.suspendable:
                    raise ValueError(_LEFT.format(self.name))
        return None

    def open_blocks(self) -> list[Block]:
        """All blocks that were opened in this context, of running generators or not."""
        return [b for b in self._variable.get() or self._of_the_caller_of_backward() if not b.closed]

    def _of_the_caller_of_backward(self) -> tuple[Block, ...]:
        """In a worker thread of the autograd engine, which has no context of its own: the blocks around backward."""
        blocks: tuple[Block, ...] = ()
        if _is_key_in_tls("context"):
            blocks = torch._C._get_obj_in_tls("context").get(self._variable, ())
        return blocks

    def _by_frames(self, identity: str) -> Block | None:
        """Of the blocks of this context and those of generators that run here: the one whose frame is innermost, and of
        several in one frame the one opened last."""
        blocks = self._variable.get()
        worker = not blocks
        if worker:
            blocks = self._of_the_caller_of_backward()
        depth: dict[int, int] = {}
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            depth[id(frame)] = -len(depth)
            frame = frame.f_back
        outermost = -len(depth)
        found: tuple[int, int, Block] | None = None
        suspended: Block | None = None
        refusal = ""
        for block in dict.fromkeys((*blocks, *tuple(self._of_generators))):
            owner = block.owner
            if block.identity != identity:
                continue
            if block.closed:
                refusal = refusal or ("" if block.suspendable else _LEFT)
                continue
            if not block.suspendable or id(owner) in depth:
                place = depth.get(id(owner), outermost)
            elif block not in blocks:
                continue  # of another thread or task
            elif worker and block.running.now:
                place = outermost + 1  # It waits in backward, in another thread.
            else:
                suspended, refusal = block, _SUSPENDED
                continue
            if found is None or (place, block.serial) > found[:2]:
                found = (place, block.serial, block)
        if found is not None:
            return found[2]
        if self.strict and refusal:
            raise ValueError(refusal.format(self.name))
        return suspended

    def _traced(self, identity: str, blocks: tuple[Block, ...]) -> Block | None:
        """As `_by_frames` where frames cannot be read: a generator that runs comes before what is around it."""
        candidates = [block for block in blocks if block.identity == identity and not block.closed]
        for block in reversed(candidates):
            if block.suspendable and block.running.now:
                return block
        for block in reversed(candidates):
            if not block.suspendable:
                return block
        if self.strict and candidates:
            raise ValueError(_SUSPENDED.format(self.name))
        if self.strict and self._running.now:
            raise ValueError(_ELSEWHERE.format(self.name))
        return candidates[-1] if candidates else None


_LEFT = (
    "the block of {} that this task or thread inherited has been left; expected the call before that. Open a block in "
    "the task itself, or wait for the task inside the block."
)
_ELSEWHERE = (
    "a generator with a block of {} runs, perhaps around this call, in another context than it was opened in; expected "
    "one that a compiled function can see. Run all steps of a generator in one context, or open a block around the "
    "call (gates of zero give the base model)."
)
_SUSPENDED = (
    "a block of {} is open in a generator that is not running in this thread; expected the call inside that generator, "
    "or a block around the call. Open one here (gates of zero give the base model)."
)


def _owner(frame: FrameType | None) -> FrameType | None:
    """The generator or coroutine that a block entered in `frame` belongs to: its own, or the nearest that called it."""
    while frame is not None:
        flags = frame.f_code.co_flags
        if frame.f_code.co_filename != _CONTEXTLIB:
            driver = frame.f_back
            driven = driver is not None and driver.f_code.co_filename == _CONTEXTLIB
            if flags & inspect.CO_COROUTINE or (flags & _GENERATOR and not driven):
                return frame
        frame = frame.f_back
    return None
