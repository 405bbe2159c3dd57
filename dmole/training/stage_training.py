# SPDX-License-Identifier: Apache-2.0
"""The optimizer steps of one stage, which can stop between any two of them and go on with the same numbers.

    for step in 0 .. total - 1:
        for batch in window(step):                        gradient_accumulation_steps batches in each process
            with accumulate(loss), gates(batch):          around forward AND backward
                backward(loss(batch) * tokens(batch) / tokens(window))
        clip, optimizer step, schedule step

loss(batch) is a mean over the batch's answer tokens and tokens(window) is counted over all processes, so the window's
gradient is that of the one big batch, however its answers are spread. Gates stay open during backward, because
activation checkpointing runs the layers again there.

Device, precision, loss scaling, accumulation, DistributedDataParallel and trackers are accelerate's (`acceleration`),
schedules are transformers', optimizers torch's (`optimization`). window(step) follows from (seed, stage, epoch) alone
(`batches`). What a resume needs besides the method's own state is in `StageTraining.state`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from dmole.config_error import ConfigError
from dmole.data.collate import collate
from dmole.files import JSON
from dmole.methods.base import Method, Stage
from dmole.profile import Profile
from dmole.seeding import derived_seed
from dmole.training.acceleration import (
    StageLoss,
    activation_checkpointing,
    make_accelerator,
    random_state,
    reduced_by_ddp,
    set_random_state,
    summed,
)
from dmole.training.batches import Piece, answer_tokens, load, steps_per_epoch, windows
from dmole.training.damage import DamageError, check_finite, check_norm, gradient_norm, remedy
from dmole.training.optimization import (
    load_optimizer_tensors,
    load_schedule,
    make_optimizer,
    make_schedule,
    optimizer_tensors,
)
from dmole.training.settings import TrainingSettings
from dmole.training.validation import Validation, validation_loss
from dmole_kernels import reduce_gradients

if TYPE_CHECKING:
    from dmole.data.collate import Batch


def stage_steps(settings: TrainingSettings, stage: Stage, *, processes: int = 1) -> int:
    """How many optimizer steps the stage takes, unless it stops early."""
    per_epoch = steps_per_epoch(settings, len(stage.task.train), processes)
    return math.ceil(settings.epochs(stage.task.name) * per_epoch)


class StageTraining:
    """One stage between `method.begin_stage` and `method.end_stage`.

    Args:
        log: called as `log(values, step=...)` every `logging_steps` steps and after each validation, such as
            `Accelerator.log`; None logs nothing.
        first_step: steps of the stages before this one, for the axis of `log`.

    The model must be on the accelerator's device (`dmole.training.acceleration.place`).

    Raises ValueError for a method that trains nothing here or whose parameters are not float32; ConfigError for
    settings that the stage's data or the device cannot satisfy.
    """

    def __init__(
        self,
        method: Method,
        stage: Stage,
        settings: TrainingSettings,
        *,
        seed: int,
        profile: Profile,
        log: Callable[..., object] | None = None,
        first_step: int = 0,
    ) -> None:
        self.method = method
        self.stage = stage
        self.settings = settings
        self.seed = seed
        self.profile = profile
        self.log = log
        # One a stage: an accelerator keeps every optimizer that it has prepared, moments and all.
        self.accelerator: Accelerator = make_accelerator(settings)
        self.first_step = first_step
        self.step = 0
        self.total = stage_steps(settings, stage, processes=self.accelerator.num_processes)
        self.losses: list[float] = []
        self.parameters = method.trainable_parameters()
        if not self.parameters:
            raise ValueError(f"{method.name} trains no parameter in stage {stage.index} ({stage.task.name}).")
        for name, parameter in self.parameters.items():
            # bf16 weights swallow the small late updates of AdamW.
            if parameter.dtype != torch.float32 or not parameter.requires_grad:
                raise ValueError(
                    f"{name} is {parameter.dtype}, requires_grad={parameter.requires_grad}; "
                    "expected a float32 parameter that requires a gradient."
                )
        check_validation(settings, stage)
        optimizer = make_optimizer(settings, self.parameters)
        self.optimizer, self.schedule = self.accelerator.prepare(
            optimizer, make_schedule(settings, optimizer, self.total)
        )
        self._ddp = self.accelerator.num_processes == 1 or reduced_by_ddp(method.vlm.model, settings)
        self.loss = self.accelerator.prepare_model(
            StageLoss(method, self.parameters.values()), device_placement=False, evaluation_mode=not self._ddp
        )
        self.validation = Validation(settings, self.parameters)
        # From here on dropout draws from torch's global state; `load_state` overwrites it on resume.
        process = self.accelerator.process_index
        torch.manual_seed(derived_seed(seed, "dropout", stage.index, *([process] if process else [])))

    @property
    def trainable_count(self) -> int:
        """How many weights this stage trains."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or validation has not become better for too long."""
        return self.step >= self.total or self.validation.exhausted

    def run(self, after_step: Callable[[StageTraining], None]) -> None:
        """Train from `self.step` to the end, calling `after_step(self)` after each optimizer step."""
        model = self.method.vlm.model
        model.train()
        try:
            with activation_checkpointing(model, self.settings), contextlib.closing(self._windows()) as coming:
                while not self.finished:
                    with self.profile.part("data"):
                        window = next(coming)
                    self._one_step(window)
                    self._after_step()
                    after_step(self)
        finally:
            model.train(False)
        self.validation.load_best()
        self.check_numbers()

    def _place(self, step: int) -> str:
        return f"at step {step} of {self.total} of stage {self.stage.index} ({self.stage.task.name})"

    def check_numbers(self) -> None:
        """Raise `DamageError` for a trained parameter that is not finite."""
        check_finite(self.parameters, self._place(self.step), self.settings.learning_rate)

    def check_logits(self) -> None:
        """Raise `DamageError` for logits of the first training samples that are not finite, with dropout off."""
        samples = self.stage.task.train[: self.settings.per_device_train_batch_size]
        batch = send_to_device(collate(self.method.vlm, samples, with_answers=True), self.accelerator.device)
        inputs = self.method.vlm.on_device(batch.encoded.inputs)
        with torch.no_grad(), self.method.training_gates(batch), self.accelerator.autocast():
            logits = self.method.vlm.model(**inputs, use_cache=False).logits
        real = batch.encoded.inputs["attention_mask"].bool().to(logits.device)
        if real.shape == logits.shape[:2]:
            logits = logits[real]  # attention of padding may be over nothing
        check_finite({"the logits": logits}, self._place(self.step), self.settings.learning_rate)

    def _windows(self) -> Generator[list[tuple[Piece, Batch]], None, None]:
        """The batches of each coming step, those of this process, on the CPU."""
        pieces = windows(
            self.settings,
            len(self.stage.task.train),
            seed=self.seed,
            stage=self.stage.index,
            first=self.step,
            total=self.total,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        workers = self.settings.dataloader_num_workers
        return load(self.method.vlm, self.stage.task.train, pieces, workers=workers)

    def _one_step(self, window: list[tuple[Piece, Batch]]) -> None:
        accelerator, profile = self.accelerator, self.profile
        tokens = [answer_tokens(batch) * piece.counts for piece, batch in window]
        (count,) = summed(accelerator, sum(tokens))
        # DistributedDataParallel takes the mean over the processes, and `backward` divides by the number of batches.
        accelerator.step, accelerator.gradient_accumulation_steps = 0, len(window)
        whole = accelerator.num_processes * len(window)
        losses: list[Tensor] = []
        for (_, batch), own in zip(window, tokens, strict=True):
            with contextlib.ExitStack() as inside:
                inside.enter_context(accelerator.accumulate(self.loss))
                with profile.part("forward"):
                    batch = send_to_device(batch, accelerator.device)
                    inside.enter_context(self.method.training_gates(batch))
                    loss = self.loss(batch)
                    if own != count:
                        loss = loss * (own / count)
                    losses.append(loss.detach())
                with profile.part("backward"):
                    accelerator.backward(loss * whole)
        with profile.part("optimizer"):
            if not self._ddp:
                reduce_gradients(self.parameters)
            (value,) = summed(accelerator, sum(float(loss) for loss in losses))
            where = self._place(self.step + 1)
            if not math.isfinite(value):
                raise DamageError(
                    f"the loss is {value} {where}; expected a finite number. {remedy(self.settings.learning_rate)}"
                )
            self._norm: Tensor | None = None
            if self.settings.max_grad_norm > 0:
                self._norm = accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
            if accelerator.scaler is None:  # which skips a step with such gradients, and lowers its scale
                norm = gradient_norm(self.parameters) if self._norm is None else self._norm
                check_norm(float(norm), where, self.settings.learning_rate)
            self._rate = float(self.schedule.get_last_lr()[0])
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        self.losses.append(value)
        self.step += 1

    def _after_step(self) -> None:
        """What is due after a step: an entry of the trackers, a validation."""
        settings, place = self.settings, self.first_step + self.step
        every = settings.count("logging_steps", self.total)
        if self.log is not None and (self.step % every == 0 or self.step == self.total):
            recent = self.losses[-(self.step % every or every) :]
            values = {"train/loss": math.fsum(recent) / len(recent), "train/learning_rate": self._rate}
            if self._norm is not None:
                values["train/grad_norm"] = float(self._norm)
            self.log({**values, "train/stage": self.stage.index}, step=place)
        if self.due("eval"):
            with self.profile.part("validation"):
                loss = validation_loss(self.method, self.stage.task.validation, settings, self.accelerator)
            if not math.isfinite(loss):
                raise DamageError(
                    f"the validation loss is {loss} {self._place(self.step)}; expected a finite number. "
                    f"{remedy(settings.learning_rate)}"
                )
            self.validation.add(self.step, loss)
            if self.log is not None:
                self.log({"eval/loss": loss}, step=place)

    def due(self, what: str) -> bool:
        """Whether `what` ("eval" or "save") happens after the step that was just taken.

        A stage is validated after its last step too, whatever `eval_steps` is, so that its last weights take part in
        the choice of the best. A checkpoint there is the runner's own.
        """
        strategy = getattr(self.settings, f"{what}_strategy")
        if strategy == "no":
            return False
        if self.finished:
            return what == "eval"
        if strategy == "steps":
            return self.step % self.settings.count(f"{what}_steps", self.total) == 0
        per_epoch = steps_per_epoch(self.settings, len(self.stage.task.train), self.accelerator.num_processes)
        return self.step % per_epoch == 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        """The optimizer's tensors by parameter name, the random state of every process, schedule, step and losses.

        Every process calls this, because it gathers.
        """
        best, validation = self.validation.state()
        tensors = optimizer_tensors(self.optimizer.optimizer, self.parameters)
        tensors |= {f"best/{name}": value for name, value in best.items()}
        tensors["rng"] = random_state(self.accelerator)
        scaler = self.accelerator.scaler
        return tensors, {
            "step": self.step,
            "losses": self.losses,
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "validation": validation,
        }

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
        """Restore `state()`'s answer; the method's own state must have been restored before this object was made."""
        best = {name.removeprefix("best/"): value for name, value in tensors.items() if name.startswith("best/")}
        own = {name: value for name, value in tensors.items() if name != "rng" and not name.startswith("best/")}
        load_optimizer_tensors(self.settings.optim, self.optimizer.optimizer, self.parameters, own)
        load_schedule(self.schedule.scheduler, meta["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(meta["scaler"])
        self.validation.load_state(best, meta["validation"])
        self.step = int(meta["step"])
        self.losses = [float(loss) for loss in meta["losses"]]
        set_random_state(self.accelerator, tensors["rng"])


def check_validation(settings: TrainingSettings, stage: Stage) -> None:
    """Raise ConfigError where settings ask for a validation loss and the stage's task has nothing to measure it on."""
    if settings.eval_strategy != "no" and not stage.task.validation:
        raise ConfigError(
            f"training.eval_strategy is {settings.eval_strategy!r}, and task {stage.task.name!r} has no validation "
            "samples; expected some in every task. Add them, or use 'no'."
        )
