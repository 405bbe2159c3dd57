# SPDX-License-Identifier: Apache-2.0
"""The product with a frozen weight: in its own kernel at every level, and who makes it when."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dmole_kernels import ExpertGates, FrozenLinears, MultiLoRALinear, cpu, frozen_linear, use_backend
from dmole_kernels.testing import judge, poisoned_memory, product_error, rejected, threads

own = pytest.mark.skipif(cpu.EXTENSION is None, reason=f"no compiled extension: {cpu.MISSING}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# Rows, features, outputs: none, one, prime, and both sides of where the kernel changes its form.
SHAPES = [(0, 8, 3), (1, 1, 1), (1, 37, 13), (2, 70, 33), (3, 70, 33), (24, 1031, 19), (25, 1031, 19), (211, 53, 517)]


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The own kernel for every shape, and NaN in all memory that it does not write."""
    monkeypatch.setattr(cpu, "LINEAR", "own")
    with poisoned_memory():
        yield


def drawn(rows: int, features: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, features), (outputs, features), (outputs,))
    )
    return x, weight * features**-0.5, bias


def assert_near(actual: Tensor, exact: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """The rule of all kernels for `x @ weight.T + bias`, in the dtype of the result."""
    expected = product_error(x.detach(), weight.detach(), actual.dtype, bias)
    assert not rejected(judge({"y": actual}, {"y": expected}, {"y": exact}))


@own
@DTYPES
@pytest.mark.parametrize("layout", ["rows", "transposed weight", "strided"])
def test_near_float64(level: str, forced: None, layout: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, weight, bias = drawn(*shape, dtype)
        if layout == "transposed weight":
            weight = weight.t().contiguous().t()
        if layout == "strided":
            x = torch.stack([x, x], 2)[:, :, 0]
            weight = torch.stack([weight, weight], 2)[:, :, 0]
        for with_bias in (bias, None):
            actual = frozen_linear(x, weight, with_bias)
            exact = F.linear(x.double(), weight.double(), None if with_bias is None else with_bias.double())
            assert_near(actual, exact, x, weight, with_bias)


@own
@DTYPES
def test_a_row_has_the_same_bits_beside_any_others_and_on_any_number_of_threads(
    level: str, forced: None, dtype: torch.dtype
) -> None:
    for rows, features, some in ((300, 90, 40), (24, 1100, 1)):
        x, weight, bias = drawn(rows, features, 1300, dtype)
        with threads(1):
            whole = frozen_linear(x, weight, bias)
            assert torch.equal(frozen_linear(x[7 : 7 + some], weight, bias), whole[7 : 7 + some])
        with threads(2):
            assert torch.equal(frozen_linear(x, weight, bias), whole)
            assert torch.equal(frozen_linear(x.view(2, -1, features), weight, bias).view(rows, -1), whole)


@own
@DTYPES
def test_the_gradient_goes_to_x_alone(level: str, forced: None, dtype: torch.dtype) -> None:
    for shape in ((5, 70, 33), (60, 1100, 33)):
        x, weight, bias = drawn(*shape, dtype)
        x.requires_grad_()
        y = frozen_linear(x, weight, bias)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        (dx,) = torch.autograd.grad(y, x, grad)
        assert_near(dx, grad.double() @ weight.double(), grad, weight.t())


@own
def test_autocast_rounds_a_float_weight_as_the_layer_would(level: str, forced: None) -> None:
    for rows in (3, 40):
        x, weight, bias = drawn(rows, 1100, 33, torch.float32)
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            actual = frozen_linear(x, weight, bias)
        halves = [part.detach().bfloat16().double() for part in (x, weight, bias)]
        assert actual.dtype == torch.bfloat16
        assert_near(actual.detach(), F.linear(*halves), *halves)
        (dx,) = torch.autograd.grad(actual, x, torch.ones_like(actual))
        # Summed in float32, rounded to bfloat16 on the way to a float32 x.
        truth = torch.ones(rows, 33).double() @ halves[1]
        expected = product_error(torch.ones(rows, 33), halves[1].t(), torch.bfloat16)
        assert not rejected(judge({"dx": dx}, {"dx": expected}, {"dx": truth}))


@own
def test_the_op_is_registered_as_torch_wants_it() -> None:
    x, weight, bias = drawn(5, 20, 12, torch.float32)
    for rows in (x, x.clone().requires_grad_()):
        torch.library.opcheck(torch.ops.dmole_kernels.frozen_linear.default, (rows, weight, bias))


def test_compiles_whole() -> None:
    x, weight, bias = drawn(5, 20, 12, torch.float32)
    compiled = torch.compile(frozen_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))


@own
def test_the_table_says_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LINEAR", "auto")
    monkeypatch.setattr(cpu, "CPU_MAKER", "intel")
    assert not cpu.takes_linear(16, 2048, torch.float32)
    assert cpu.explain_linear().startswith("PyTorch")
    monkeypatch.setattr(cpu, "CPU_MAKER", "amd")
    monkeypatch.setattr(cpu, "EXTENSION", SimpleNamespace(isa=lambda: "avx512_bf16"))
    monkeypatch.setattr(cpu, "_MKL", True)
    assert cpu.takes_linear(2048, 2048, torch.float32)
    assert not cpu.takes_linear(1, 2048, torch.float32, transposed=True)
    assert cpu.takes_linear(16, 2048, torch.bfloat16)
    assert not cpu.takes_linear(17, 2048, torch.bfloat16)
    assert cpu.takes_linear(8, 4096, torch.bfloat16) and not cpu.takes_linear(16, 4096, torch.bfloat16)
    assert cpu.takes_linear(64, 192, torch.bfloat16, transposed=True)
    assert not cpu.takes_linear(64, 1024, torch.bfloat16, transposed=True)
    assert cpu.explain_linear().startswith("own kernels for float32")
    monkeypatch.setattr(cpu, "EXTENSION", SimpleNamespace(isa=lambda: "avx2"))
    assert not cpu.takes_linear(2048, 2048, torch.float32)
    monkeypatch.setattr(cpu, "LINEAR", "vendor")
    assert cpu.explain_linear() == "PyTorch (DMOLE_KERNELS_LINEAR=vendor)"


def test_the_reference_is_pytorch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LINEAR", "own")
    x, weight, bias = drawn(40, 64, 33, torch.float32)
    with use_backend("reference"):
        assert torch.equal(frozen_linear(x, weight, bias), F.linear(x, weight, bias))


def test_a_hook_on_the_base_and_a_base_of_another_class_are_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    x = torch.randn(3, 8)
    gates = ExpertGates()
    elsewhere = MultiLoRALinear(nn.Linear(2, 2), gates=gates)
    elsewhere.bank.add("held elsewhere", 1, alpha=1.0)
    seen: list[Tensor] = []
    doubled, hooked = Doubled(8, 4), nn.Linear(8, 4)
    hooked.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with gates.use(torch.ones(3, 1), ["held elsewhere"]):
        y = MultiLoRALinear(doubled, gates=gates, any_forward=True)(x)
        torch.testing.assert_close(y, 2 * F.linear(x, doubled.weight, doubled.bias))
        y = MultiLoRALinear(hooked, gates=gates)(x)
    assert len(seen) == 1 and seen[0] is y


@own
def test_inside_the_block_frozen_linears_take_the_own_kernel_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LINEAR", "own")
    model = nn.Sequential(nn.Linear(20, 12), nn.GELU(), nn.Linear(12, 5, bias=False))
    model[0].requires_grad_(False)
    x = torch.randn(7, 20, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as recorded, FrozenLinears():
        y = model(x)
        y.sum().backward()
    calls = {event.key: event.count for event in recorded.key_averages()}
    assert calls["dmole_kernels::cpu_frozen_linear"] == 2  # y and dx of the frozen one
    assert model[2].weight.grad is not None
    torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(x.grad, torch.autograd.grad(model(x).sum(), x)[0])


def test_errors_name_what_was_wrong() -> None:
    x, weight, bias = drawn(5, 20, 12, torch.float32)
    with pytest.raises(ValueError, match="weight or bias requires grad; expected a frozen layer"):
        frozen_linear(x, weight.requires_grad_())
    weight = weight.detach()
    with pytest.raises(ValueError, match=r"x has shape \(5, 20\), weight \(20, 12\), bias None; expected \[..., in\]"):
        frozen_linear(x, weight.t())
    with pytest.raises(ValueError, match="x is torch.float32 and weight torch.bfloat16; expected one dtype"):
        frozen_linear(x, weight.bfloat16())
    wrong = subprocess.run(
        [sys.executable, "-c", "import dmole_kernels"], env={**os.environ, "DMOLE_KERNELS_LINEAR": "fast"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "DMOLE_KERNELS_LINEAR is 'fast'; expected 'auto', 'own' or 'vendor'" in wrong.stderr


@own
def test_the_kernel_checks_what_it_is_given() -> None:
    x, weight, bias = drawn(5, 20, 12, torch.float32)
    with pytest.raises(ValueError, match="linear: x is Double; the cpu backend expects float32 or bfloat16"):
        torch.ops.dmole_kernels.cpu_frozen_linear(x.double(), weight, bias)
    with pytest.raises(ValueError, match=r"linear: x has shape \[5, 20\], weight \[12, 20\], bias \[5\]; expected"):
        torch.ops.dmole_kernels.cpu_frozen_linear(x, weight, bias[:5])
