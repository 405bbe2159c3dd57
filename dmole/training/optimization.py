# SPDX-License-Identifier: Apache-2.0
"""torch's optimizers and transformers' schedules by TrainingArguments' names, and their state as plain tensors.

    w <- optimizer(w, grad, lr(step)),    lr(step) = learning_rate * schedule(step, warmup_steps, total)

State goes by parameter name, because a resumed stage makes new parameters: "<name>/exp_avg" and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import get_scheduler

from dmole.config_error import ConfigError
from dmole.training.settings import TrainingSettings

# What each optimizer remembers of a parameter that it has moved.
STATE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "adamw_torch": ("step", "exp_avg", "exp_avg_sq"),
        "adamw_torch_fused": ("step", "exp_avg", "exp_avg_sq"),
        "sgd": (),
        "adagrad": ("step", "sum"),
        "rmsprop": ("step", "square_avg"),
    }
)


def make_optimizer(settings: TrainingSettings, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimizer that `training.optim` names, as transformers' Trainer builds it."""
    trained = list(parameters.values())
    common: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optim in ("adamw_torch", "adamw_torch_fused"):
        return torch.optim.AdamW(
            trained,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            fused=settings.optim == "adamw_torch_fused",
            **common,
        )
    kinds: dict[str, type[Optimizer]] = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }
    made: Optimizer = kinds[settings.optim](trained, **common)
    return made


def make_schedule(settings: TrainingSettings, optimizer: Optimizer, total: int) -> LRScheduler:
    """transformers' schedule over `total` steps. ConfigError for arguments that it does not take."""
    try:
        made: LRScheduler = get_scheduler(
            settings.lr_scheduler_type,
            optimizer,
            num_warmup_steps=settings.count("warmup_steps", total),
            num_training_steps=total,
            scheduler_specific_kwargs=dict(settings.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"training.lr_scheduler_kwargs is {dict(settings.lr_scheduler_kwargs)!r}; expected the arguments of the "
            f"schedule {settings.lr_scheduler_type!r} ({error})."
        ) from error
    return made


def optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What the optimizer remembers, by parameter name."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
    return tensors


def load_optimizer_tensors(
    kind: str, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restore `optimizer_tensors`. ValueError, before anything is changed, where they are of other parameters."""
    keys, got = STATE[kind], set(tensors)
    # A parameter that no gradient has reached has no state: the last vision layer of a model that reads the one before
    # it. All of a parameter's tensors, or none of them.
    moved = [name for name in parameters if any(f"{name}/{key}" in got for key in keys)]
    expected = {f"{name}/{key}" for name in moved for key in keys}
    if got != expected:
        raise ValueError(
            f"the optimizer state has {sorted(got - expected)[:3]} and lacks {sorted(expected - got)[:3]}; "
            f"expected the state of the {len(parameters)} parameters that the stage trains."
        )
    whole = optimizer.state_dict()
    places = {name: place for place, name in enumerate(parameters)}
    # Cloned into torch's aligned memory: the bits of a product may depend on where its operands are.
    whole["state"] = {places[name]: {key: tensors[f"{name}/{key}"].clone() for key in keys} for name in moved}
    optimizer.load_state_dict(whole)


def load_schedule(schedule: LRScheduler, state: Mapping[str, Any]) -> None:
    """Restore `schedule.state_dict()`, and the rates that it had given to its optimizer."""
    schedule.load_state_dict(dict(state))
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
