# SPDX-License-Identifier: Apache-2.0
"""`with` blocks whose setting belongs to one thread, asyncio task or generator, and which torch.compile can read.

A setting lives in a `contextvars.ContextVar`, so threads and asyncio tasks each have their own. Two additions:

- A generator shares the context of its caller. A block that a generator opened, itself or through a function that it
  called, therefore applies while that generator runs, which is decided by its frame (a generator that contextlib
  drives, as `@contextmanager` does, stands for the function whose `with` statement entered it). What is asked while
  all such generators are suspended has no right answer: `strict` settings raise, others take the block opened last, as
  a plain ContextVar would. A block that a task or thread inherited and that has been left since raises too where the
  setting is strict, and is passed over otherwise.
- torch.compile does not trace `ContextVar.get`, but it reads a property whose getter is a builtin anew at every call,
  as a guarded input of the graph. `_Reader.blocks` is that property.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from contextvars import ContextVar
from types import FrameType
from typing import Any, Generic, TypeVar

import torch

_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_CONTEXTLIB = contextlib.__file__


class AmbientBlock:
    """What one `with` block sets; `identity` names the setting (several objects may share one `Ambient`)."""

    __slots__ = ("closed", "identity", "owner", "suspendable")

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.closed = False
        self.suspendable = False
        self.owner: FrameType | None = None


Block = TypeVar("Block", bound=AmbientBlock)


class Ambient(Generic[Block]):
    """The open blocks of one kind, innermost last."""

    def __init__(self, name: str, *, strict: bool) -> None:
        self.name = name
        self.strict = strict
        self._variable: ContextVar[tuple[Block, ...]] = ContextVar(name)
        # Without a default, `get(reader)` answers with the reader itself where the variable was never set.
        self._reader: Any = type("_Reader", (), {"blocks": property(self._variable.get)})()
        # Saves the thread that imports the package the longer way of a thread that has no value.
        self._variable.set(())

    def enter(self, block: Block, frame: FrameType) -> None:
        """Opens `block` for the function that `frame` runs: the frame of its `with` statement."""
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{self.name} is opened inside a compiled function; expected the `with` block around the call of it. "
                f"Move the block out, or pass the layer an explicit gate."
            )
        if block.closed or block in self._variable.get(()):
            raise ValueError(f"this block of {self.name} was entered before; expected a new one. Call it again.")
        block.owner = _generator_frame(frame)
        block.suspendable = block.owner is not None
        self._variable.set((*(b for b in self._variable.get(()) if not b.closed), block))

    def leave(self, block: Block) -> None:
        """Closes `block`. Raises ValueError when a block that was opened after it is still open."""
        owner = block.owner
        block.closed, block.owner = True, None
        blocks = self._variable.get(())
        if block not in blocks:
            if block.suspendable:  # The garbage collector may end a generator anywhere; a closed block applies nowhere.
                return
            raise ValueError(
                f"a block of {self.name} is left in another thread or task than it was entered in; expected the same. "
                f"Enter and leave it in one function."
            )
        later = blocks[blocks.index(block) + 1 :]
        self._variable.set(tuple(b for b in blocks if b is not block))
        if any(b.owner is owner and not b.closed for b in later):
            raise ValueError(
                f"a block of {self.name} is left before one that was entered after it; expected the reverse order. Use "
                f"`with` statements, which nest."
            )

    def innermost(self, identity: str) -> Block | None:
        """The block with this identity that applies here, or None."""
        blocks = self._reader.blocks
        if blocks is self._reader:
            blocks = self._inherited()
        for block in reversed(blocks):
            if block.identity != identity:
                continue
            if block.closed:
                if self.strict and not block.suspendable:
                    raise ValueError(
                        f"the block of {self.name} that this task or thread inherited has been left; expected the call "
                        f"before that. Open a block in the task itself, or wait for the task inside the block."
                    )
            elif block.suspendable:
                return self._of_the_running_generator(identity, blocks)
            else:
                return block
        return None

    def open_blocks(self) -> tuple[Block, ...]:
        blocks = self._reader.blocks
        return self._inherited() if blocks is self._reader else blocks

    def _inherited(self) -> tuple[Block, ...]:
        """In a worker thread of the autograd engine: the blocks around the call of backward."""
        if torch.compiler.is_compiling() or not torch._C._is_key_in_tls("context"):
            return ()
        blocks: tuple[Block, ...] = torch._C._get_obj_in_tls("context").get(self._variable, ())
        return blocks

    def _of_the_running_generator(self, identity: str, blocks: tuple[Block, ...]) -> Block | None:
        candidates = [block for block in blocks if block.identity == identity and not block.closed]
        if torch.compiler.is_compiling():
            if len(candidates) == 1:
                return candidates[0]
            raise ValueError(
                f"{len(candidates)} blocks of {self.name} are open, some in generators; expected one inside a compiled "
                f"function, which cannot see which generator runs. Run each generator in a contextvars.copy_context()."
            )
        # A worker thread of the autograd engine works for the thread that waits in backward: any running frame counts.
        inherited = self._reader.blocks is self._reader
        running = set()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not inherited:
            running.add(id(frame))
            frame = frame.f_back
        for block in reversed(candidates):
            owner = block.owner
            # A suspended generator's frame has no caller.
            if owner is None or (owner.f_back is not None if inherited else id(owner) in running):
                return block
        if self.strict:
            raise ValueError(
                f"a block of {self.name} is open in a generator that is not running in this thread; expected the call "
                f"inside that generator, or a block around the call. Open one here (gates of zero give the base model)."
            )
        return candidates[-1]


def _generator_frame(frame: FrameType | None) -> FrameType | None:
    """The generator that a block entered in `frame` belongs to: its own, or the nearest one that called it; None where
    there is none. A coroutine's caller is its task, which has a context of its own."""
    while frame is not None:
        flags = frame.f_code.co_flags
        if frame.f_code.co_filename != _CONTEXTLIB:
            if flags & inspect.CO_COROUTINE:
                return None
            driver = frame.f_back
            if flags & _SUSPENDABLE and (driver is None or driver.f_code.co_filename != _CONTEXTLIB):
                return frame
        frame = frame.f_back
    return None
