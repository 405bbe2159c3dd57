# SPDX-License-Identifier: Apache-2.0
"""GradNormRecorder on layers that are called several times or recomputed, and on backward calls that raise."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from dmole_kernels import GradNormRecorder
from tests.kernels.recorder_truth import (
    BATCHES,
    EACH_QUANTITY,
    Function,
    Quantity,
    check,
    expected,
    looped,
    make_layer,
    times,
    truth,
    values,
)


def two_lengths(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(x).sin().sum() + layer(x[:, :2].cos()).square().sum()


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
