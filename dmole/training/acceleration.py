# SPDX-License-Identifier: Apache-2.0
"""accelerate's `Accelerator` for a run: device, precision, processes and trackers.

What `Accelerator.prepare` gets is a stage's loss as a module (`StageLoss`), not the model. A prepared model would keep
its `forward` wrapped in autocast, so that what runs between two stages (proxy, router features, evaluation) computed in
another precision than after a restart. The module has the trained parameters alone: DistributedDataParallel then
neither broadcasts the frozen base at each stage nor its buffers at each step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dmole.config_error import ConfigError
from dmole.training.processes import is_sharded
from dmole.training.settings import TrainingSettings

if TYPE_CHECKING:
    from dmole.data.collate import Batch
    from dmole.methods.base import Method

LOGS = "logs"
# What accelerate may be launched with. Its own FSDP and DeepSpeed engines take the model away from the stage loop.
REFUSED_ENGINES = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


def make_accelerator(
    settings: TrainingSettings, *, folder: Path | None = None, trackers: Sequence[GeneralTracker] = ()
) -> Accelerator:
    """The accelerator that trains with `settings`.

    Args:
        folder: The run's folder, below which trackers may write. None: those of `report_to` are checked, not used.
        trackers: Trackers of the caller's own, besides those of `report_to`.

    Raises ConfigError for a precision that the device does not have, another one than `accelerate launch` was given,
    an engine that is not supported, and a tracker that is not installed.
    """
    precision = settings.precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise ConfigError(
            f"accelerate was launched with mixed precision {launched!r} and the run's settings say {precision!r}; "
            f"expected one of them alone. Set training.{launched}, or launch without --mixed_precision."
        )
    # One process may train several configurations, and accelerate keeps the first one's precision for all.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    threads = torch.get_num_threads()
    installed = _tracker_names(settings)
    chosen = [*(installed if folder is not None else ()), *trackers]
    accelerator = Accelerator(
        mixed_precision=precision,
        # Where there is no device but the CPU, accelerate takes torchrun's processes for one each unless told.
        cpu=not torch.accelerator.is_available(),
        # The loop says with each window how many batches it has (`StageTraining`).
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        # Batches are split over the processes before they reach accelerate: the schedule moves once a step.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # Processes use different experts, and a batch of texts none of the vision tower's.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=chosen or None,
        project_dir=None if folder is None else str(folder / LOGS),
    )
    launched_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched_processes:
        raise ConfigError(
            f"accelerate sees {accelerator.num_processes} processes; expected the {launched_processes} that were "
            "launched (WORLD_SIZE), or each of them would train alone. Make no Accelerator before the run."
        )
    if accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise ConfigError(
            "accelerate launch --cpu was given several processes and started one process; expected several. Without "
            "MPI it starts no more: launch with torchrun --nproc-per-node or with accelerate launch --multi_gpu, "
            "which train on CPUs as well."
        )
    torch.set_num_threads(threads)  # of several processes on a CPU, accelerate changes it
    if accelerator.distributed_type in REFUSED_ENGINES:
        raise ConfigError(
            f"accelerate was launched with {accelerator.distributed_type.value}; expected no engine of accelerate's "
            "own. Launch with torchrun or accelerate launch without one."
        )
    if settings.fp16 and accelerator.scaler is None:
        # accelerate would train in float32 and say nothing.
        raise ConfigError(
            f"training.fp16 is True on a {accelerator.device.type}, which has no scaled float16; expected false. "
            "Use bf16."
        )
    return accelerator


def place(model: nn.Module, accelerator: Accelerator) -> None:
    """The model moves to the accelerator's device, unless it was loaded over several."""
    if not accelerator.verify_device_map(model):
        model.to(accelerator.device)


def _tracker_names(settings: TrainingSettings) -> list[str]:
    installed = {str(name) for name in get_available_trackers()}
    if settings.report_to is None:
        return ["tensorboard"] if "tensorboard" in installed else []
    chosen = [name for name in settings.report_to if name != "none"]
    for name in chosen:
        if name not in installed:
            raise ConfigError(
                f"training.report_to has {name!r}, which is not installed; expected one of "
                f"{', '.join(sorted(installed)) or 'none'}. Install it, or leave it out."
            )
    return chosen


@contextlib.contextmanager
def tracking(accelerator: Accelerator, name: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """`accelerator.log` reaches the trackers inside; they are finished at the end."""
    accelerator.init_trackers(name, config=dict(_flat(settings)))
    try:
        yield
    finally:
        # Not end_training(), which destroys the process group as well.
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float | str | bool]]:
    """Trackers take plain values by name: nested ones get dotted names, lists become text."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, int | float | str) else str(value)


@contextlib.contextmanager
def activation_checkpointing(model: Any, settings: TrainingSettings) -> Iterator[None]:
    """Recompute the activations of every layer in backward inside the block, if `settings` ask for it.

    Raises ConfigError for a model without it, and inside, where a reentrant checkpoint would cut a layer off from the
    loss: its input needs no gradient, so that its experts would get none.
    """
    if not settings.activation_checkpointing:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"training.activation_checkpointing is True and {type(model).__name__} does not support it; expected false."
        )
    chosen: dict[str, Any] = {"use_reentrant": False, **settings.activation_checkpointing_kwargs}
    hooks = []
    if chosen["use_reentrant"]:
        for name, module in model.named_modules():
            if isinstance(module, GradientCheckpointingLayer):
                hooks.append(module.register_forward_pre_hook(_needs_gradient(name), with_kwargs=True))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    enable(chosen)
    if chosen["use_reentrant"]:
        # A reentrant checkpoint passes gradients on only where its input has one.
        model.disable_input_require_grads()
        model.enable_input_require_grads()
    try:
        yield
    finally:
        disable()
        model.disable_input_require_grads()
        for hook in hooks:
            hook.remove()


def _needs_gradient(name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
            raise ConfigError(
                f"training.activation_checkpointing_kwargs.use_reentrant is True, and {name} gets no input that needs "
                "a gradient: what it holds would not train. Use use_reentrant: false."
            )

    return hook


class StageLoss(nn.Module):
    """A stage's loss as a function of a batch, with the parameters that the stage trains and no others."""

    def __init__(self, method: Method, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        self.method = method

    def forward(self, batch: Batch) -> Tensor:
        loss: Tensor = self.method.loss(batch)
        return loss


def reduced_by_ddp(model: nn.Module, settings: TrainingSettings) -> bool:
    """Whether DistributedDataParallel can reduce the gradients of several processes.

    Not beside a base that is sharded: its gathers in backward and the reductions of processes that use different
    experts would meet in different orders. Not with reentrant checkpoints: they hide from DistributedDataParallel
    which parameters a loss depends on, so that it takes all of them for unused.
    """
    reentrant = settings.activation_checkpointing and settings.activation_checkpointing_kwargs.get("use_reentrant")
    return not (reentrant or is_sharded(model))


def summed(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value's sum over the processes."""
    if accelerator.num_processes == 1:
        return list(values)
    total = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), reduction="sum")
    found: list[float] = total.tolist()
    return found


def random_state(accelerator: Accelerator) -> Tensor:
    """[processes, bytes] uint8: what dropout draws from, of the CPU and of the device, for every process."""
    own = torch.get_rng_state()
    if accelerator.device.type != "cpu":
        own = torch.cat([own, torch.get_device_module(accelerator.device).get_rng_state(accelerator.device)])
    if accelerator.num_processes == 1:
        return own[None]
    every = accelerator.gather(own[None].to(accelerator.device))
    whole: Tensor = every.cpu()
    return whole


def set_random_state(accelerator: Accelerator, state: Tensor) -> None:
    """Restore `random_state`. ValueError for another number of processes or another kind of device."""
    if state.shape[0] != accelerator.num_processes:
        raise ValueError(
            f"the checkpoint was written by {state.shape[0]} processes; got {accelerator.num_processes}. Start as many."
        )
    own = state[accelerator.process_index].clone()
    size = torch.get_rng_state().numel()
    rest = own[size:]
    if (accelerator.device.type != "cpu") != bool(rest.numel()):
        raise ValueError(
            f"the checkpoint was written on another kind of device than {accelerator.device.type}; expected the same. "
            "Resume where the run began."
        )
    torch.set_rng_state(own[:size].clone())
    if rest.numel():
        torch.get_device_module(accelerator.device).set_rng_state(rest.clone(), accelerator.device)
