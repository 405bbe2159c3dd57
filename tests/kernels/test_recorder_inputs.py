# SPDX-License-Identifier: Apache-2.0
"""GradNormRecorder: masks, and the ways to call a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmole_kernels import ExpertGates, GradNormRecorder, MultiLoRALinear
from tests.kernels.recorder_truth import (
    BATCHES,
    EACH_QUANTITY,
    Function,
    Quantity,
    check,
    draw,
    expected,
    looped,
    make_layer,
    truth,
    values,
)

# Masks


MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])


def masked_truth(quantity: Quantity, layer: nn.Linear, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The other tokens leave the graph by selection, so their values do not matter."""

    def function(layer: nn.Linear, pair: Tensor) -> Tensor:
        x, keep = pair[..., :-1], pair[..., -1].bool()
        return layer(x[keep]).sin().sum()

    return expected(quantity, function, layer, [torch.cat([x, mask[..., None].to(x.dtype)], -1)])


@EACH_QUANTITY
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
@pytest.mark.parametrize("poisoned", ["gradient", "input"])
def test_nan_in_masked_tokens_does_not_spread(quantity: Quantity, dtype: torch.dtype, poisoned: str) -> None:
    layer, x, mask = make_layer(), BATCHES[0], MASK.to(dtype, copy=True)
    right = masked_truth(quantity, layer, x, MASK)
    keep = MASK.bool()[..., None]
    if poisoned == "input":
        x = torch.where(keep, x, torch.tensor([torch.nan, torch.inf, 1.0] * 2, dtype=x.dtype))
    with GradNormRecorder({"layer": layer}, quantity=quantity) as recorder:
        with recorder.mask(mask):
            output = layer(x)
        # The caller may reuse the mask.
        mask.fill_(1)
        grad = output.detach().cos()
        if poisoned == "gradient":
            grad = torch.where(keep, grad, torch.nan)
        output.backward(grad)
    for found, value in zip(values(recorder.norms()["layer"], quantity), right, strict=True):
        torch.testing.assert_close(found, value)


def test_the_innermost_mask_that_names_the_layer_counts() -> None:
    a, b, c = (make_layer() for _ in range(3))
    x, inner = BATCHES[0], MASK.roll(1, 0)
    with GradNormRecorder({"a": a, "b": b, "c": c}, quantity="per_sample") as recorder:
        with recorder.mask(MASK, ["a", "b"]):
            with recorder.mask(inner, ["a"]):
                loss = a(x).sin().sum() + b(x).sin().sum() + c(x).sin().sum()
            (a(x).sin().sum() + loss).backward()
    norms = recorder.norms()
    torch.testing.assert_close(norms["b"].weight_values, masked_truth("per_sample", b, x, MASK)[0])
    torch.testing.assert_close(norms["c"].weight_values, masked_truth("per_sample", c, x, torch.ones_like(MASK))[0])

    def both(layer: nn.Linear, pair: Tensor) -> Tensor:
        x, masks = pair[..., :-2], pair[..., -2:].bool()
        return sum(layer(x[masks[..., i]]).sin().sum() for i in range(2))  # type: ignore[return-value]

    pair = torch.cat([x, torch.stack([MASK, inner], -1).to(x.dtype)], -1)
    torch.testing.assert_close(norms["a"].weight_values, expected("per_sample", both, a, [pair])[0])


def test_masks_that_do_not_fit_are_refused() -> None:
    layer, x = make_layer(), BATCHES[0]
    recorder = GradNormRecorder({"layer": layer})
    additive = torch.zeros(4, 3).masked_fill(MASK == 0, -torch.inf)
    with pytest.raises(ValueError, match="mask is float32; expected bool, or integers 0 and 1. Pass mask == 0 for"):
        recorder.mask(additive).__enter__()
    with pytest.raises(ValueError, match="mask has integers other than 0 and 1; expected 1 for the tokens to keep"):
        recorder.mask(MASK - 1).__enter__()
    with recorder:
        for mask, right in ((MASK.mT, x), (MASK[:, :2], x), (MASK, x[:, 0]), (MASK[0], x[0, 0])):
            shapes = (
                rf"mask has shape \({', '.join(map(str, mask.shape))},?\) but the input of 'layer' is \(.*; expected"
            )
            with recorder.mask(mask), pytest.raises(ValueError, match=shapes):
                layer(right)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_mask_of_forward_holds_for_a_recomputation_after_its_block(reentrant: bool) -> None:
    layer, x = make_layer(), BATCHES[0]
    with GradNormRecorder({"layer": layer}, quantity="per_sample") as recorder:
        with recorder.mask(MASK):
            output = checkpoint(layer, x.clone().requires_grad_(), use_reentrant=reentrant)
        output.sin().sum().backward()
    torch.testing.assert_close(recorder.norms()["layer"].weight_values, masked_truth("per_sample", layer, x, MASK)[0])


def test_a_recomputation_that_may_have_had_either_mask_is_refused() -> None:
    layer, x = make_layer(), BATCHES[0].clone().requires_grad_()
    with GradNormRecorder({"layer": layer}) as recorder:
        with recorder.mask(MASK):
            output = checkpoint(layer, x, use_reentrant=True)
        output = output + checkpoint(layer, x, use_reentrant=True)
        with pytest.raises(
            ValueError, match="'layer' is recomputed in backward and had different masks in forward; ex"
        ):
            output.sum().backward()


# Ways to call a layer


def in_place_residual(layer: nn.Linear, x: Tensor) -> Tensor:
    output = layer(x)
    output += x
    output.mul_(2.0)
    return output.square().sum()


CALLS: dict[str, Function] = {
    "keyword": lambda layer, x: layer(input=x).square().sum(),
    "in_place_residual": in_place_residual,
    "input_with_gradient": lambda layer, x: layer(x.clone().requires_grad_()).square().sum(),
    "expanded": lambda layer, x: layer(x[:, :1].expand(-1, 3, -1)).square().sum(),
    "transposed": lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1).square().sum(),
    "through_4_dimensions": lambda layer, x: layer(x[:, None]).square().sum(),
    "two_dimensional": lambda layer, x: layer(x[:, 0]).square().sum(),
}


@EACH_QUANTITY
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_ways_to_call(name: str, bias: bool, quantity: Quantity) -> None:
    if name == "transposed" and quantity == "per_sample":
        pytest.skip("the first dimension is not the samples")
    layer = make_layer(bias)
    if bias or quantity == "accumulated":
        check(quantity, CALLS[name], BATCHES, layer)
        return
    with GradNormRecorder({"layer": layer}, quantity=quantity) as recorder:
        CALLS[name](layer, BATCHES[0]).backward()
    norm = recorder.norms()["layer"]
    torch.testing.assert_close(norm.weight_values, expected(quantity, CALLS[name], layer, BATCHES[:1])[0])
    assert norm.bias == norm.bias_values.numel() == 0


@EACH_QUANTITY
def test_a_one_dimensional_input_is_one_sample(quantity: Quantity) -> None:
    layer, x = make_layer(), BATCHES[0][0, 0]
    for function in (looped, in_place_residual):
        with GradNormRecorder({"layer": layer}, quantity=quantity) as recorder:
            function(layer, x).backward()
        norm = recorder.norms()["layer"]
        for found, gradient in zip(values(norm, quantity), truth(function, layer, x), strict=True):
            torch.testing.assert_close(found, gradient.norm()[None])


@EACH_QUANTITY
@pytest.mark.parametrize("shape", [(0, 3, 6), (2, 0, 6), (0, 6)])
def test_an_empty_batch(shape: tuple[int, ...], quantity: Quantity) -> None:
    layer = make_layer()
    with GradNormRecorder({"layer": layer}, quantity=quantity) as recorder:
        looped(layer, torch.zeros(shape, dtype=torch.float64)).backward()
    norm = recorder.norms()["layer"]
    count = {"accumulated": 1, "per_batch": 1, "per_sample": shape[0]}[quantity]
    found = values(norm, quantity) if count else (norm.weight_values, norm.bias_values)
    assert all(value.shape == (count,) and not value.any() for value in found)
    assert (norm.weight, norm.bias, norm.calls) == (0.0, 0.0, 1)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_input_modified_in_place_after_the_call_is_refused(frozen: bool) -> None:
    layer, x = make_layer().requires_grad_(not frozen), BATCHES[0].clone()
    with GradNormRecorder({"layer": layer}) as recorder:
        output = layer(x)
        x += 1
        with pytest.raises(
            (ValueError, RuntimeError), match="the input of 'layer' was modified in place after the call"
        ):
            output.sum().backward()
    assert recorder.norms()["layer"].calls == 0


@EACH_QUANTITY
def test_other_forward_hooks_see_and_replace_the_output(quantity: Quantity) -> None:
    layer = make_layer()
    layer.register_forward_hook(lambda module, inputs, output: output * 3)
    check(quantity, looped, BATCHES, layer)


@EACH_QUANTITY
def test_autocast_records_the_product_that_ran(quantity: Quantity) -> None:
    """A float32 layer in bfloat16: the weight gradient is that of the rounded input, here summed in float64."""
    layer, x = make_layer(dtype=torch.float32), draw(4, 300, 6).float() * 1.2345
    grad = draw(4, 300, 6, seed=1).bfloat16()
    with GradNormRecorder({"layer": layer}, quantity=quantity) as recorder:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(x)
        output.backward(grad)
    wide = nn.Linear(6, 6, dtype=torch.float64)
    right = expected(
        quantity,
        lambda layer, pair: (layer(pair[..., :6]) * pair[..., 6:]).sum(),
        wide,
        [torch.cat([x.bfloat16(), grad], -1).double()],
    )
    for found, value in zip(values(recorder.norms()["layer"], quantity), right, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=0)


@EACH_QUANTITY
def test_bias_norms_are_summed_in_float32(quantity: Quantity) -> None:
    """4096 rows of one sign in bfloat16, which a sum in bfloat16 would stop counting at 256."""
    layer = make_layer(dtype=torch.bfloat16)
    grad = (1 + draw(2, 4096, 6).abs()).bfloat16()
    with GradNormRecorder({"layer": layer}, quantity=quantity) as recorder:
        layer(draw(2, 4096, 6, seed=1).bfloat16()).backward(grad)
    sums = grad.double().sum(1)
    right = sums.norm(dim=1) if quantity == "per_sample" else sums.sum(0).norm()[None]
    torch.testing.assert_close(values(recorder.norms()["layer"], quantity)[1].double(), right, rtol=1e-5, atol=0)


@EACH_QUANTITY
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_base_of_a_multi_lora_linear_with_open_gates(checkpointed: bool, quantity: Quantity) -> None:
    layer, gates = make_layer(), ExpertGates()
    module = MultiLoRALinear(layer, gates=gates)
    module.bank.add("e", rank=2, alpha=4.0)
    with torch.no_grad():
        module.bank.expert("e").lora_b.copy_(draw(6, 2))
    gate = torch.ones(4, 1, dtype=torch.float64)

    def function(_: nn.Linear, x: Tensor) -> Tensor:
        with gates.use(gate[: x.shape[0]], ["e"]):
            x = x.clone().requires_grad_()
            again = {"use_reentrant": False, "context_fn": gates.checkpoint_contexts}
            hidden = checkpoint(module, x, **again) if checkpointed else module(x)
            return torch.tanh(module(hidden)).square().sum()

    assert check(quantity, function, BATCHES, module.base).forward_calls == 4
