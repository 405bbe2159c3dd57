# SPDX-License-Identifier: Apache-2.0
"""
    y = base(x) + sum_e gate_e alpha_e / rank_e B_e A_e dropout(x)

`MultiLoRALinear`: `multi_lora` as a drop-in for `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module
from torch.utils import _python_dispatch as _dispatch

from dmole_kernels._expert_bank import Expert, ExpertBank, sharded_error
from dmole_kernels._frozen_linear import own_is_faster, own_linear
from dmole_kernels._fused_linear import run_fused
from dmole_kernels._gate_block import GateBlock, Rows, ambient_blocks, check_gate, merged_error, traced_rows
from dmole_kernels._gates import ExpertGates
from dmole_kernels._lora_call import LoraCall
from dmole_kernels._multi_lora import MULTI_LORA, DropoutMode, check_dropout, run, run_eager, seed_for
from dmole_kernels._plain_names import use_plain_names
from dmole_kernels._registration import refuse_transforms

# Newer than the oldest torch of the range, in which an export is a compilation like any other.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
_LINEAR_FORWARD = nn.Linear.forward


class MultiLoRALinear(nn.Module):
    """`nn.Linear` plus the gated experts of its `bank`.

    Args:
        base: the layer to extend; it is frozen here and keeps its own forward and hooks.
        gates: which experts are active when forward gets no gate of its own; shared by many layers.
        dropout: chance of zeroing an element of the experts' input while training.
        dropout_mode: "shared" (one mask for all experts of the layer, the default) or "per_expert".
        rows: what the rows of x are for the ambient gate: "samples", "units" (`ExpertGates.use` then needs units), or
            None: samples unless the block has units.
        any_forward: accept a subclass of `nn.Linear`, or another module with a 2-D `weight`, whose forward computes
            `x W^T + b` and is what the model calls.
        backend: which kernels multiply with the experts; see `choose_backend`.
        fuse_base: an experiment of the Triton backend: base and experts in one launch (`fused_linear`). It reads the
            base's weight and bias, so hooks on the base do not see the call.

    Without an open block, or with gates of zero only, forward is `base(x)` to the bit. Otherwise the product of a plain
    frozen `nn.Linear` (exactly this class, plain Parameters, no hooks, no patched forward) is `frozen_linear`'s; any
    other base is called. Experts are float32 (float64 beside a float64 base): small updates vanish in bfloat16.

    In a `state_dict` the base has the names that it has in the plain model (`q_proj.weight`), so states of the plain
    and the converted model load into each other; experts are `q_proj.bank.experts.<name>.lora_a` and `lora_b`.

    Raises:
        ValueError: for a base without a 2-D weight, a subclass of `nn.Linear` without `any_forward`, gates that are no
            `ExpertGates`, or a dropout, rows or backend that does not exist.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        gates: ExpertGates | None = None,
        dropout: float = 0.0,
        dropout_mode: DropoutMode = "shared",
        rows: Rows = None,
        any_forward: bool = False,
        backend: str = "auto",
        fuse_base: bool = False,
    ) -> None:
        super().__init__()
        weight = check_base(base, any_forward=any_forward)
        check_dropout(dropout, dropout_mode)
        check_gates(gates)
        if rows not in (None, "samples", "units"):
            raise ValueError(f"rows={rows!r}; expected 'samples', 'units' or None. Leave it out for samples.")
        MULTI_LORA.pick(backend, weight.device.type, None)
        self.base = base.requires_grad_(False)
        self.gates = gates
        self.dropout = dropout
        self.dropout_mode: DropoutMode = dropout_mode
        self.rows: Rows = rows
        self.backend = backend
        self.fuse_base = fuse_base
        self.out_features, self.in_features = base.out_features, base.in_features
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.bank = ExpertBank(self.in_features, self.out_features, dtype=dtype, like=base)
        self.gated = False  # whether some forward that can be trained had a block
        self.place = ""  # the layer's name in the model, for errors; set by `convert`
        # The base's weight as it was, while experts are merged into it.
        self.unmerged_weight: Tensor | None
        self.register_buffer("unmerged_weight", None, persistent=False)
        use_plain_names(self)
        if gates is not None:
            gates.register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.gates is not None:
            self.gates.register(self)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, input: Tensor, gate: Tensor | None = None, experts: Sequence[str] | None = None) -> Tensor:
        """y [..., out_features] for input [..., in_features]; an explicit gate replaces the ambient one.

        Args:
            gate: [samples, experts] or [samples, tokens, experts], its leading dimensions a prefix of input's.
            experts: the names of its columns, all of them held by this layer; by default the bank's own order.
        """
        x = input
        # Not is_compiling(): it is true for every thread while one of them compiles.
        if torch.compiler.is_dynamo_compiling() or _is_exporting():
            return self._traced(x, gate, experts)
        if gate is not None:
            block: GateBlock | None = self._explicit_block(gate, experts)
        else:
            block = self._ambient_block()
        modules = self._modules
        if block is None or not block.active:
            y: Tensor = modules["base"](x)  # type: ignore[misc]
            return y
        refuse_transforms("MultiLoRALinear")
        # Dictionaries, not attributes: a Module takes microseconds to look up each of its children.
        bank: ExpertBank = modules["bank"]  # type: ignore[assignment]
        held: dict[str, Expert] = bank._modules["experts"]._modules  # type: ignore[assignment, union-attr]
        device_type = x.device.type
        autocast = torch.is_autocast_enabled(device_type) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
        backend = MULTI_LORA.pick(self.backend, device_type, dtype)
        rows = self.rows if gate is None else None
        try:
            found = block.for_layer(bank._names, x.shape[:-1] or (1,), rows, x.device, backend == "cpu")
        except ValueError as error:
            raise ValueError(f"{self.place}: {error}" if self.place else str(error)) from None
        if found.gate is None:
            return self._base_output(x, backend)
        # Autocast would cast x in the base, the op cast it again, and once more in backward, and each cast its dx back.
        x = x.to(dtype)
        lora_a, lora_b, scale = [], [], []
        for name in found.names:
            expert = held[name]
            parameters = expert._parameters
            lora_a.append(parameters["lora_a"])
            lora_b.append(parameters["lora_b"])
            scale.append(expert.scale)
        dropout = self.dropout if self.training else 0.0
        call = LoraCall(
            x, None, lora_a, lora_b, found.gate, scale, dropout, self.dropout_mode == "per_expert",  # type: ignore[arg-type]
            seed_for(x.device, dropout, None) if dropout else None, block.trained and torch.is_grad_enabled(),
        )  # fmt: skip
        if self.fuse_base:
            return run_fused(call, self.base.weight, self.base.bias, backend)
        call.base = y = self._base_output(x, backend)
        if y.dtype != dtype:
            backend = MULTI_LORA.pick(self.backend, device_type, y.dtype)
        if backend == "cpu" and found.row_map is not None:
            call.row_map = found.row_map.table
        return (run if _dispatch._is_in_torch_dispatch_mode else run_eager)(call, backend)

    def _explicit_block(self, gate: Tensor, experts: Sequence[str] | None) -> GateBlock:
        names = self.bank.names if experts is None else experts
        self._check_held(names)
        return GateBlock(gate, names, None, "", "")

    def _check_held(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.bank:
                raise ValueError(
                    f"experts: got {name!r}, which {self.place or 'this layer'} does not hold; expected some of "
                    f"{list(self.bank.names)}. Add it to the layer's bank, or leave it out with its column of the gate."
                )
            if name in self.bank.merged:
                raise merged_error(name)
            if self.bank.experts._modules[name].sharded:
                raise sharded_error(name)

    def _ambient_block(self) -> GateBlock | None:
        """The open block of this layer's gates. Raises where their absence is a mistake."""
        gates = self.gates
        if gates is None:
            return None
        block = ambient_blocks.innermost(gates.identity)
        if torch._C._current_graph_task_id() != -1:
            self._check_recomputation(block)
        elif block is not None:
            block.ran.add(id(self))
            if self.training or torch.is_grad_enabled():
                self.__dict__["gated"] = True
        if block is None:
            if "_is_replica" in self.__dict__:
                raise ValueError(
                    "the layer is a replica in a thread of nn.DataParallel, which has no gates; expected one process "
                    "per device. Use DistributedDataParallel."
                )
            gates.refuse_other_copies()
        return block

    def _check_recomputation(self, block: GateBlock | None) -> None:
        """For a call during backward: raises ValueError where its gates cannot be those of its forward."""
        if block is None and self.gated:
            raise ValueError(
                "the layer runs again during backward, outside the `gates.use` block of its forward; expected the "
                "same block, since the recomputation would be the base model's. Call backward inside the block, or "
                "give the checkpoint context_fn=gates.checkpoint_contexts. For the base model open a block with gates "
                "of zero."
            )
        if block is not None and id(self) not in block.ran and block.backward != torch._C._current_graph_task_id():
            raise ValueError(
                "the layer runs again during backward, in a `gates.use` block in which its forward did not run; "
                "expected the block of its forward. Call backward inside that block, or give the checkpoint "
                "context_fn=gates.checkpoint_contexts."
            )

    def _base_output(self, x: Tensor, backend: str) -> Tensor:
        """base(x); a plain frozen `nn.Linear` goes through `frozen_linear`, which computes the same equation."""
        base = self._modules["base"]
        assert base is not None
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        plain = (
            type(base) is nn.Linear
            and type(weight) is nn.Parameter
            and (bias is None or type(bias) is nn.Parameter)
            and nn.Linear.forward is _LINEAR_FORWARD
            and "forward" not in base.__dict__
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
            and not (_torch_module._global_forward_hooks or _torch_module._global_forward_pre_hooks)
            and not (_torch_module._global_backward_hooks or _torch_module._global_backward_pre_hooks)
        )
        if not plain or weight is None or weight.requires_grad or (bias is not None and bias.requires_grad):
            y: Tensor = base(x)
            return y
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            y = base(x)
            return y
        # The backend is that of the experts; only the cpu backend has a product for the base, for some shapes.
        own = backend == "cpu" and own_is_faster(x, weight)
        return own_linear(x, weight, bias) if own else F.linear(x, weight, bias)

    def _traced(self, x: Tensor, gate: Tensor | None, experts: Sequence[str] | None) -> Tensor:
        """forward under torch.compile, where neither values nor the set of active experts may decide anything: every
        expert that the layer holds is computed, and a gate of zero leaves it out of the sum."""
        if self.fuse_base:
            raise ValueError(
                "a layer with fuse_base is being compiled; expected eager mode, it is no registered op. Leave "
                "fuse_base off."
            )
        if x.dim() == 1:
            return self._traced(x[None], gate, experts)[0]
        if gate is None:
            block = None if self.gates is None else ambient_blocks.innermost(self.gates.identity)
            if block is None:
                return self.base(x)  # type: ignore[no-any-return]
            if _is_exporting():
                raise ValueError(
                    "the layer is exported inside a `gates.use` block, which would make the gates constants of the "
                    "exported program; expected gates as inputs. Pass forward a gate, or export without a block."
                )
            gate, names, counts = block.canonical_gate, block.canonical_names, block.counts
            rows = self.rows
        else:
            names = check_gate(gate, self.bank.names if experts is None else experts)
            self._check_held(names)
            counts, rows = None, None
        held = [name for name in names if name in self.bank.experts._modules]
        if not held:
            return self.base(x)  # type: ignore[no-any-return]
        if len(held) != len(names):
            gate = gate[..., [names.index(name) for name in held]]
        gate = traced_rows(gate.to(x.device), x, counts, rows).reshape(-1, len(held))
        chosen = [self.bank.experts[name] for name in held]
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        if autocast:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = self.base(x)
        dropout = self.dropout if self.training else 0.0
        call = LoraCall(
            x, y, [e.lora_a for e in chosen], [e.lora_b for e in chosen], gate, [e.scale for e in chosen],  # type: ignore[misc]
            dropout, self.dropout_mode == "per_expert", seed_for(x.device, dropout, None),
            gate.requires_grad and torch.is_grad_enabled(),
        )  # fmt: skip
        return run(call, MULTI_LORA.pick(self.backend, x.device.type, y.dtype))

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint: which attributes are below `base`, whose name is in no state_dict."""
        return dict.fromkeys(("weight", "bias"), "base")

    def extra_repr(self) -> str:
        rows = "" if self.rows is None else f", rows={self.rows}"
        return f"dropout={self.dropout:g}, dropout_mode={self.dropout_mode}{rows}, backend={self.backend}"


def check_gates(gates: ExpertGates | None) -> None:
    if gates is not None and not isinstance(gates, ExpertGates):
        raise ValueError(f"gates is a {type(gates).__name__}; expected ExpertGates or None. Pass ExpertGates().")


def check_base(base: nn.Module, *, any_forward: bool = False) -> Tensor:
    """The weight of a module that can carry experts. Raises ValueError for one that cannot."""
    if isinstance(base, MultiLoRALinear):
        raise ValueError("base is a MultiLoRALinear; expected a plain layer. Add experts to the one that is there.")
    weight = getattr(base, "weight", None)
    sides = ("in_features", "out_features")
    if not isinstance(weight, Tensor) or not all(isinstance(getattr(base, side, None), int) for side in sides):
        raise ValueError(
            f"base is a {type(base).__name__} without a weight tensor or without in_features and out_features; "
            f"expected nn.Linear. Wrap the linear layers of the model only."
        )
    if type(base) is not nn.Linear and not any_forward:
        reason = "an nn.Linear subclass" if isinstance(base, nn.Linear) else "no nn.Linear"
        if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
            reason = "the output projection of nn.MultiheadAttention, which reads its weight without calling it"
        raise ValueError(
            f"base is a {type(base).__name__}, {reason}; expected exactly nn.Linear, whose forward is known: experts "
            f"in a place that the model does not call vanish in silence. Pass any_forward=True if the model calls this "
            f"module and it computes x W^T + b."
        )
    return weight
