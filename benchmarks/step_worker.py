# SPDX-License-Identifier: Apache-2.0
"""Takes training steps of the mini demo with the code of the checkout that PYTHONPATH names, for `training_step`.

Reads lines "<steps>" and answers with the seconds that so many steps took. The file runs with an older checkout's
package too, so it takes nothing from it but what both have.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


class _Pause(Exception):
    pass


def training(method_name: str, *, bf16: bool) -> Any:
    """The first stage of the demo, begun."""
    from rich.console import Console

    from dmole.config import load_config
    from dmole.methods import method_class
    from dmole.recipes import mini_small
    from dmole.sources import open_model, open_stream

    config = load_config(base=mini_small(), overrides=[f"training.bf16={str(bf16).lower()}"])
    console = Console(file=io.StringIO())
    model = opened(open_model, config, console)
    stream = open_stream(config.stream, console).limit(train=config.train_samples, test=config.test_samples)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    method = method_class(method_name)(model, config.method_settings(method_name), seed=0)
    stage = method.stages(stream)[0]
    method.begin_stage(stage.index, stage.task)
    try:
        home: Any = importlib.import_module("dmole.training.stage_training")
    except ImportError:
        home = importlib.import_module("dmole.training")  # an older checkout's
    return home.StageTraining(method, stage, config.training, seed=0, profile=home.Profile())


def opened(open_model: Callable[..., Any], config: Any, console: Any) -> Any:
    """The model of a configuration, by today's `open_model` or by that of an older checkout."""
    old = list(inspect.signature(open_model).parameters) != ["config"]
    return open_model(config.model, console) if old else open_model(config)


def take(stage: Any, steps: int) -> float:
    """Seconds of `steps` steps; the stage starts over before it ends."""
    if stage.step + steps >= stage.total:
        stage.step = 0
    last = stage.step + steps

    def pause(running: Any) -> None:
        if running.step == last:
            raise _Pause

    start = time.perf_counter()
    with contextlib.suppress(_Pause):
        stage.run(pause)
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    stage = training(sys.argv[1], bf16=sys.argv[2] == "bf16")
    print("ready", flush=True)
    for line in sys.stdin:
        print(take(stage, int(line)), flush=True)


if __name__ == "__main__":
    main()
