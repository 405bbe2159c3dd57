# SPDX-License-Identifier: Apache-2.0
"""GradNormRecorder on layers that are called several times, by keyword, recomputed, masked or bypassed.

The truth is torch.autograd.grad in float64 on weights that require grad.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from dmole_kernels import GradNorm, GradNormRecorder

Quantity = Literal["accumulated", "per_batch", "per_sample"]
QUANTITIES: tuple[Quantity, ...] = ("accumulated", "per_batch", "per_sample")
EACH_QUANTITY = pytest.mark.parametrize("quantity", QUANTITIES)
Function = Callable[[nn.Linear, Tensor], Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_layer(bias: bool = True, width: int = 6, dtype: torch.dtype = torch.float64) -> nn.Linear:
    """Frozen, with a norm of about one, so that a layer may follow itself."""
    layer = nn.Linear(width, width, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(draw(width, width, seed=7) / width**0.5)
        if bias:
            layer.bias.copy_(draw(width, seed=8))
    return layer.requires_grad_(False).to(dtype)


def truth(function: Function, layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the loss function(layer, x) by autograd."""
    layer.requires_grad_(True)
    parameters = (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
    found = torch.autograd.grad(function(layer, x), parameters)
    layer.requires_grad_(False)
    return found[0], found[1] if layer.bias is not None else torch.zeros(1, dtype=torch.float64)


def expected(quantity: Quantity, function: Function, layer: nn.Linear, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Norms [values] of weight and bias: one value (accumulated), one for each batch, or one for each sample."""
    if quantity == "per_sample":
        batches = [x[i : i + 1] for x in batches for i in range(x.shape[0])]
    pairs = [truth(function, layer, x) for x in batches]
    if quantity == "accumulated":
        pairs = [(sum(w for w, _ in pairs), sum(b for _, b in pairs))]  # type: ignore[list-item]
    weights, biases = zip(*pairs, strict=True)
    return torch.stack([w.norm() for w in weights]), torch.stack([b.norm() for b in biases])


def values(norm: GradNorm, quantity: Quantity) -> tuple[Tensor, Tensor]:
    if quantity == "accumulated":
        assert not norm.weight_values.numel()
        return torch.tensor([norm.weight], dtype=torch.float64), torch.tensor([norm.bias], dtype=torch.float64)
    assert norm.weight == pytest.approx(float(norm.weight_values.mean()))
    return norm.weight_values, norm.bias_values


def check(
    quantity: Quantity, function: Function, batches: list[Tensor], layer: nn.Linear | None = None,
    right: Function | None = None,
) -> GradNorm:  # fmt: skip
    """Records one backward call of function(layer, x) for each batch, and compares with autograd (of `right`)."""
    layer = make_layer() if layer is None else layer
    with GradNormRecorder({"layer": layer}, quantity=quantity) as recorder:
        for x in batches:
            function(layer, x).backward()
    norm = recorder.norms()["layer"]
    truths = expected(quantity, right or function, layer, batches)
    for found, value in zip(values(norm, quantity), truths, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)
    assert norm.calls == len(batches)
    assert layer.weight.grad is None
    return norm


BATCHES = [draw(4, 3, 6, seed=s) for s in range(2)]


def looped(layer: nn.Linear, x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.tanh(layer(x))
    return x.square().sum()


def two_lengths(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(x).sin().sum() + layer(x[:, :2].cos()).square().sum()


# A layer called several times


@EACH_QUANTITY
@pytest.mark.parametrize("function", [looped, two_lengths])
def test_a_layer_called_several_times_has_the_norm_of_the_sum(quantity: Quantity, function: Function) -> None:
    norm = check(quantity, function, BATCHES)
    assert norm.forward_calls == (6 if function is looped else 4)


def test_calls_of_several_forwards_in_one_backward_are_summed_and_two_backwards_are_two_batches() -> None:
    layer, (x, y) = make_layer(), BATCHES
    with GradNormRecorder({"layer": layer}, quantity="per_batch") as recorder:
        (looped(layer, x) + looped(layer, y)).backward()
        # Both graphs exist before the first backward.
        first, second = looped(layer, x), looped(layer, y)
        first.backward()
        second.backward()
    found = recorder.norms()["layer"].weight_values
    together, _ = expected("per_batch", looped, layer, [torch.cat([x, y])])
    apart, _ = expected("per_batch", looped, layer, [x, y])
    torch.testing.assert_close(found, torch.cat([together, apart]))


@EACH_QUANTITY
def test_a_kept_graph_gives_each_backward_call_its_values(quantity: Quantity) -> None:
    layer, x = make_layer(), BATCHES[0]
    with GradNormRecorder({"layer": layer}, quantity=quantity) as recorder:
        loss = looped(layer, x)
        loss.backward(retain_graph=True)
        # The calls of the first loss are reached again, beside a new one.
        (loss + layer(x).sum()).backward()

    def second(layer: nn.Linear, x: Tensor) -> Tensor:
        return looped(layer, x) + layer(x).sum()

    norm = recorder.norms()["layer"]
    assert norm.calls == 2
    if quantity == "accumulated":
        right = (truth(looped, layer, x)[0] + truth(second, layer, x)[0]).norm()[None]
    else:
        right = torch.cat([expected(quantity, function, layer, [x])[0] for function in (looped, second)])
    torch.testing.assert_close(values(norm, quantity)[0], right)


def test_calls_with_different_numbers_of_samples_are_refused_per_sample() -> None:
    layer, x = make_layer(), BATCHES[0]

    def function(layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x).sum() + layer(x[:2]).square().sum()

    check("per_batch", function, [x])
    check("accumulated", function, [x])
    with (
        GradNormRecorder({"layer": layer}, quantity="per_sample") as recorder,
        pytest.raises(ValueError, match=r"'layer' was called with \[\d, \d\] samples in one graph; expected the same"),
    ):
        function(layer, x).backward()
    assert recorder.norms()["layer"].calls == 0


def times(count: int) -> Function:
    """The layer `count` times in a row, without checkpoints."""

    def function(layer: nn.Linear, x: Tensor) -> Tensor:
        for _ in range(count):
            x = torch.tanh(layer(x))
        return x.square().sum()

    return function


@EACH_QUANTITY
@pytest.mark.parametrize("call_before", [True, False])
@pytest.mark.parametrize("call_after", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_count_each_call_once(
    quantity: Quantity, reentrant: bool, call_after: bool, call_before: bool
) -> None:
    """A shared layer in two checkpoints, twice in the second, and outside of them."""

    def function(layer: nn.Linear, x: Tensor) -> Tensor:
        hidden = torch.tanh(layer(x)) if call_before else x.clone().requires_grad_()
        hidden = checkpoint(lambda t: torch.tanh(layer(t)), hidden, use_reentrant=reentrant)
        hidden = checkpoint(lambda t: torch.tanh(layer(torch.tanh(layer(t)))), hidden, use_reentrant=reentrant)
        return (torch.tanh(layer(hidden)) if call_after else hidden).square().sum()

    count = 3 + call_before + call_after
    norm = check(quantity, function, BATCHES, right=times(count))
    assert norm.forward_calls == 2 * count


@EACH_QUANTITY
# The inner of two reentrant checkpoints runs its first forward under the no_grad of the outer one.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [True, False])
def test_nested_checkpoints_are_part_of_one_backward_call(reentrant: bool, quantity: Quantity) -> None:
    def function(layer: nn.Linear, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return torch.tanh(layer(x))

        def outer(x: Tensor) -> Tensor:
            first = checkpoint(inner, x, use_reentrant=reentrant)
            result: Tensor = checkpoint(inner, first, use_reentrant=reentrant)
            return result

        hidden: Tensor = checkpoint(outer, x.clone().requires_grad_(), use_reentrant=reentrant)
        return hidden.square().sum()

    check(quantity, function, BATCHES, right=times(2))


def test_a_kept_graph_with_a_reentrant_checkpoint() -> None:
    layer, x = make_layer(), BATCHES[0]
    with GradNormRecorder({"layer": layer}, quantity="per_batch") as recorder:
        with torch.no_grad():
            layer(x)
        hidden = checkpoint(lambda t: torch.tanh(layer(t)), x.clone().requires_grad_(), use_reentrant=True)
        loss = checkpoint(lambda t: torch.tanh(layer(t)), hidden, use_reentrant=True).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    right, _ = expected("per_batch", times(2), layer, [x, x])
    torch.testing.assert_close(recorder.norms()["layer"].weight_values, right)


class _CallsInBackward(torch.autograd.Function):
    """Calls the layer twice in backward, and not in forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        for _ in range(2):
            with torch.enable_grad():
                loss = ctx.layer(ctx.saved_tensors[0].detach()).square().sum()
            loss.backward()
        return None, None


def test_calls_that_happen_in_backward_alone_are_part_of_it() -> None:
    layer, x = make_layer(), BATCHES[0]
    with GradNormRecorder({"layer": layer}, quantity="per_sample") as recorder:
        _CallsInBackward.apply(x.clone().requires_grad_(), layer).backward()  # type: ignore[no-untyped-call]
    right, _ = expected("per_sample", lambda layer, x: 2 * layer(x).square().sum(), layer, [x])
    torch.testing.assert_close(recorder.norms()["layer"].weight_values, right)


def test_a_layer_called_once_holds_its_tensors_no_longer_than_backward_does() -> None:
    """When backward reaches the first layer, the input of the second is freed, unless the second has another call that
    precedes the first layer."""
    first, second = make_layer(), make_layer()
    for called_twice in (False, True):
        kept: list[StorageWeakRef] = []
        alive: list[bool] = []

        def seen(grad: Tensor, alive: list[bool] = alive, kept: list[StorageWeakRef] = kept) -> None:
            alive.extend(not reference.expired() for reference in kept)

        with GradNormRecorder({"first": first, "second": second}, quantity="per_sample"):
            x = BATCHES[0].clone().requires_grad_()
            hidden = first(second(x) if called_twice else x)
            hidden.register_hook(seen)
            copied = hidden * 2
            kept.append(StorageWeakRef(copied.untyped_storage()))
            output = second(copied)
            loss = output.square().sum()
            del copied, hidden, output
            loss.backward()
        assert alive == [called_twice]


def test_the_recorder_is_freed_without_garbage_collection() -> None:
    layer = make_layer()
    gc.disable()
    try:
        with GradNormRecorder({"layer": layer}) as recorder:
            looped(layer, BATCHES[0]).backward()
        reference = weakref.ref(recorder)
        del recorder
        assert reference() is None
    finally:
        gc.enable()


# Failed backward calls


class _Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyError("planted")


@EACH_QUANTITY
def test_a_backward_that_raises_is_no_batch(quantity: Quantity) -> None:
    layer, x = make_layer(), BATCHES[0]
    with GradNormRecorder({"layer": layer}, quantity=quantity) as recorder:
        with pytest.raises(KeyError, match="planted"):
            layer(_Fail.apply(layer(x))).sum().backward()  # type: ignore[no-untyped-call]
        looped(layer, x).backward()
    if quantity == "accumulated":
        with pytest.raises(ValueError, match="a backward call raised while recording, so the accumulated sums hold"):
            recorder.norms()
        return
    norm = recorder.norms()["layer"]
    assert norm.calls == 1
    torch.testing.assert_close(norm.weight_values, expected(quantity, looped, layer, [x])[0])


# Parameters that others use


def test_a_parameter_of_another_module_is_refused() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 6), "head": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
    linears = {"the head": model["head"]}
    GradNormRecorder(linears, model=model)  # type: ignore[arg-type]
    model["twice"] = model["head"]
    GradNormRecorder(linears, model=model)  # type: ignore[arg-type]
    model["other"].bias = model["head"].bias
    with pytest.raises(ValueError, match=r"the bias of 'the head' is also other.bias of model; expected a parameter"):
        GradNormRecorder(linears, model=model)  # type: ignore[arg-type]
    del model["other"]
    model["embed"].weight = model["head"].weight
    with pytest.raises(
        ValueError, match=r"the weight of 'the head' is also embed.weight of model; .* Leave 'the head'"
    ):
        GradNormRecorder(linears, model=model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="linear 'a' is not a module of model; expected one"):
        GradNormRecorder({"a": nn.Linear(2, 2)}, model=model)
    with pytest.raises(ValueError, match="linears 'a' and 'b' share one bias; expected distinct parameters"):
        tied = nn.Linear(2, 2)
        other = nn.Linear(2, 2)
        other.bias = tied.bias
        GradNormRecorder({"a": tied, "b": other})


READS: dict[str, Function] = {
    "linear": lambda layer, x: F.linear(x, layer.weight),
    "keyword": lambda layer, x: F.linear(input=x, weight=layer.weight),
    "matmul": lambda layer, x: x @ layer.weight,
    "transpose": lambda layer, x: x @ layer.weight.T,
    "penalty": lambda layer, x: layer.weight.square().sum(),
    "bias": lambda layer, x: x + layer.bias,
    "in_a_list": lambda layer, x: torch.cat([x[0], layer.weight]),
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", READS)
def test_use_of_a_parameter_outside_its_layer_is_refused(name: str, frozen: bool) -> None:
    layer, x = make_layer().requires_grad_(not frozen), BATCHES[0]
    side = "bias" if name == "bias" else "weight"
    with GradNormRecorder({"q": layer}):
        layer(x)
        with pytest.raises(ValueError, match=f"the {side} of 'q' is used by .* outside the forward of its layer; expe"):
            READS[name](layer, x)
    READS[name](layer, x)


def test_reads_without_gradient_are_allowed() -> None:
    layer, x = make_layer(), BATCHES[0]
    with GradNormRecorder({"q": layer}):
        assert layer.weight.shape == (6, 6)
        assert x.to(layer.weight).type_as(layer.weight).dtype == layer.weight.dtype
        F.linear(x, layer.weight.detach())
        F.linear(x, layer.weight.data)
        torch.zeros_like(layer.weight)
        layer.weight.new_zeros(2)
        assert bool((layer.weight != 0).all())
        layer.requires_grad_(False)
        with torch.no_grad():
            layer.weight.mul_(1.0)


# Layers without a call or gradient


def test_a_layer_that_is_never_called_is_an_error_by_name() -> None:
    layer, unused, dead, silent = (make_layer() for _ in range(4))
    linears = {"used": layer, "unused": unused, "dead": dead, "silent": silent}
    with GradNormRecorder(linears) as recorder:
        dead(BATCHES[0])
        layer(BATCHES[0]).sum().backward()
        with torch.no_grad():
            silent(BATCHES[0])
    with pytest.raises(ValueError, match=r"linears \['unused', 'silent'\] were never called while recording; expected"):
        recorder.norms()
    with GradNormRecorder({"used": layer, "silent": silent}) as recorder:
        layer(BATCHES[0]).sum().backward()
        with torch.no_grad():
            silent(BATCHES[0])
    with pytest.raises(ValueError, match=r"linears \['silent'\] were called only under torch.no_grad while recording"):
        recorder.norms()
    with GradNormRecorder({"used": layer, "dead": dead}) as recorder:
        dead(BATCHES[0])
        layer(BATCHES[0]).sum().backward()
    norm = recorder.norms()["dead"]
    assert (norm.weight, norm.bias, norm.calls, norm.forward_calls) == (0.0, 0.0, 0, 1)


def test_a_layer_called_on_another_process_only_is_no_error() -> None:
    with GradNormRecorder({"layer": make_layer()}) as recorder:
        pass
    recorder.reduce_(lambda tensor: tensor.add_(2))
    norm = recorder.norms()["layer"]
    assert (norm.calls, norm.forward_calls, norm.weight) == (2, 2, pytest.approx(12.0))


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


@pytest.fixture(autouse=True)
def no_hooks_are_left() -> Iterator[None]:
    yield
    assert not torch.overrides._get_current_function_mode_stack()
