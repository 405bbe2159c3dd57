# SPDX-License-Identifier: Apache-2.0
"""
    Launch(kernel, grid, arguments, constants, config, dots, reads, writes).run()

A kernel launch as a value: ops build lists of them, and the same list is run, counted (how many, how many bytes) or
compiled ahead of time with exactly the types and divisibility that `run` would pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from dmole_kernels.triton_backend.configs import SMALLEST_DOT, Config, target_of_capability

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch. `dots` are the (m, n, k) of its matrix products; `reads` and `writes` name every operand's bytes.

    `owners` are the experts whose addresses are in a table among the arguments: a launch keeps them alive.

    An operand counts once per launch: repeated reads hit the second-level cache (`grid` places programs that read the
    same tile next to each other). The bytes are memory traffic, not loads.
    """

    name: str
    kernel: Any
    grid: int
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    config: Config
    dots: Sequence[tuple[int, int, int]] = ()
    reads: Mapping[str, int] = field(default_factory=dict)
    writes: Mapping[str, int] = field(default_factory=dict)
    owners: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        for dot in self.dots:
            if any(side < SMALLEST_DOT or side & (side - 1) for side in dot):
                raise ValueError(
                    f"kernel {self.name} has a dot of {dot[0]} x {dot[1]} x {dot[2]}; expected powers of two of at "
                    f"least {SMALLEST_DOT}, the minimum of GPUs. Change its line in triton_backend/configs.py."
                )
        if self.grid >= 2**31:
            raise ValueError(
                f"kernel {self.name} has a grid of {self.grid} programs; expected fewer than 2**31. Split the rows "
                f"into several calls."
            )

    @classmethod
    def bound(
        cls, kernel: Any, arguments: Mapping[str, Any], *, grid: int, config: Config,
        dots: Sequence[tuple[int, int, int]] = (), reads: Mapping[str, int], writes: Mapping[str, int],
    ) -> Launch:  # fmt: skip
        """The launch, with the arguments that the kernel has parameters for; constants have names in capitals."""
        chosen = {name: arguments[name] for name in kernel.arg_names}
        return cls(
            name=kernel.__name__,
            kernel=kernel,
            grid=grid,
            arguments={name: value for name, value in chosen.items() if not name.isupper() or len(name) == 1},
            constants={name: value for name, value in chosen.items() if name.isupper() and len(name) > 1},
            config=config,
            dots=dots,
            reads=reads,
            writes=writes,
            owners=arguments.get("owners", ()),
        )

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())

    def run(self) -> None:
        if self.grid == 0:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._start()
        else:
            self._start()

    def spills(self) -> int:
        """Registers that the compiler keeps in memory, for the GPU at hand."""
        compiled = self.kernel.warmup(
            **self.arguments, **self.constants, num_warps=self.config.warps, num_stages=self.config.stages, grid=(1,)
        )
        compiled._init_handles()  # Triton counts them when it loads the code
        return int(compiled.n_spills)

    def _start(self) -> None:
        self.kernel[(self.grid,)](
            **self.arguments, **self.constants, num_warps=self.config.warps, num_stages=self.config.stages
        )


Runner = Callable[[Launch], None]


def run(launch: Launch) -> None:
    launch.run()


def size(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _probe() -> None:
    pass


def interpreting() -> bool:
    """Whether `triton.jit` made interpreted functions. `triton.knobs`, which also knows it, is missing before 3.4."""
    return not isinstance(_probe, triton.JITFunction)


def target_of(device: torch.device) -> str:
    """The line of the configuration table for a device; "interpreter" under TRITON_INTERPRET=1."""
    if interpreting():
        return "interpreter"
    if device.type != "cuda":
        raise ValueError(
            f"backend='triton' got a tensor on {device.type!r}; expected 'cuda'. Move the tensors, pass "
            f"backend='reference', or set TRITON_INTERPRET=1 before the first import of triton to try the kernels."
        )
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    return target_of_capability(*torch.cuda.get_device_capability(device))


def computing(dtype: torch.dtype) -> dict[str, Any]:
    """The constants TYPE (operands of the dots), ACC (their sums) and UPCAST (see `tiles`)."""
    if dtype not in TYPES or (dtype == torch.float64 and not interpreting()):
        raise ValueError(
            f"backend='triton' got {dtype}; expected float16, bfloat16 or float32 (float64 in the interpreter only). "
            f"Cast the tensors or pass backend='reference'."
        )
    return {
        "TYPE": TYPES[dtype],
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "UPCAST": interpreting(),
    }


def signed(word: int) -> int:
    """A 32-bit word as the int32 that a launch passes."""
    return word - 2**32 if word >= 2**31 else word
