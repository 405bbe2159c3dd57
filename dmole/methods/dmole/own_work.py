# SPDX-License-Identifier: Apache-2.0
"""What D-MoLE computes besides training steps and answers: the proxy, and the router's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dmole.methods.base import Layers, OwnWork, Stage
from dmole.methods.dmole.allocation import proxy_subset
from dmole.methods.dmole.settings import DMoLESettings

if TYPE_CHECKING:
    from dmole.data.sample import Stream

SKETCH = 64 * 64  # elements of a gradient's sketch


def own_work(options: DMoLESettings, stages: Sequence[Stage], stream: Stream, layers: Layers) -> OwnWork:
    """The proxy's subset of every stage; the features of every training sample, and once of every test sample."""
    layers = {tower: linears for tower, linears in layers.items() if options.towers in ("both", tower)}
    scored = routed = 0
    buffers = features = 0.0
    if options.allocator != "uniform":
        fraction, minimum = options.proxy_fraction, options.proxy_min_samples
        scored = sum(len(proxy_subset(s.task.train, fraction=fraction, minimum=minimum)) for s in stages)
        for layer in (layer for tower in layers.values() for layer in tower.values()):
            whole = layer.in_features * layer.out_features
            buffers += 4.0 * (whole if options.proxy_method == "exact" else SKETCH)
    if options.routing != "none":
        held_out = options.router.threshold_from == "validation"
        read = [len(stage.task.train) + held_out * len(stage.task.validation) for stage in stages]
        tested = {name for stage in stages for name in stage.evaluates}
        tests = sum(len(task.test) for task in stream.tasks if task.name in tested)
        routed = sum(read) + tests
        width = sum(next(iter(tower.values())).in_features for tower in layers.values())
        features = 4.0 * width * (max(read, default=0) + tests)
    return OwnWork(forward=scored + routed, backward=scored, memory_bytes=buffers + features)
