# SPDX-License-Identifier: Apache-2.0
"""What a training loop gets wrong in silence, one test each: the window's loss, gates in backward, dropout's random
state, what a stage leaves behind in the model."""

import contextlib
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from dmole.config_error import ConfigError
from dmole.data.collate import Batch, collate
from dmole.data.sample import Stream
from dmole.methods import method_class
from dmole.methods.base import Method, answer_loss
from dmole.methods.dmole.allocation import layer_scores
from dmole.methods.dmole.settings import DMoLESettings, RouterSettings
from dmole.methods.settings import LoraSettings, MethodSettings
from dmole.profile import Profile
from dmole.training.batches import answer_tokens
from dmole.training.settings import TrainingSettings
from dmole.training.stage_training import StageTraining
from mini_cmit.model.tiny import build_tiny_model

SETTINGS = TrainingSettings(num_train_epochs=1.0, per_device_train_batch_size=4, warmup_steps=0.0)


def begun(stream: Stream, *, method: str = "seq_ft", dropout: float = 0.0) -> Method:
    options = DMoLESettings(proxy_min_samples=4, router=RouterSettings(epochs=3))
    settings = MethodSettings(lora=LoraSettings(rank=4, dropout=dropout), dmole=options)
    made = method_class(method)(build_tiny_model(0), settings, seed=3)
    made.begin_stage(1, stream.tasks[0])
    with torch.no_grad():
        # B is zero at first, and half of the gradients with it.
        generator = torch.Generator().manual_seed(5)
        for parameter in made.trainable_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made


def trained(stream: Stream, settings: TrainingSettings, **choice: object) -> tuple[Method, StageTraining]:
    method = begun(stream, **choice)  # type: ignore[arg-type]
    running = StageTraining(method, method.stages(stream)[0], settings, seed=3, profile=Profile())
    running.run(lambda running: None)
    return method, running


def weights(method: Method) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in method.trainable_parameters().items()}


def first_gradients(stream: Stream, settings: TrainingSettings, *, method: str = "seq_ft") -> dict[str, Tensor]:
    """The gradients of the first step, as the optimizer sees them."""
    kept: dict[str, Tensor] = {}
    made = begun(stream, method=method)
    running = StageTraining(made, made.stages(stream)[0], settings, seed=3, profile=Profile())

    def keep(optimizer: object, arguments: object, keywords: object) -> None:
        if not kept:
            kept.update({n: p.grad.clone() for n, p in running.parameters.items() if p.grad is not None})

    running.optimizer.optimizer.register_step_pre_hook(keep)
    running.run(lambda running: None)
    return kept


# -- one big batch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["seq_ft", "dmole"])
def test_an_accumulation_window_is_one_big_batch(toy_stream: Stream, method: str) -> None:
    """Answers of different lengths: a mean of the batches' means would weigh short answers more."""
    captions = toy_stream.reorder(["captions", "colours", "letters"])
    tokens = {len(build_tiny_model(0).tokenizer.tokenize(sample.answers[0])) for sample in captions.tasks[0].train}
    mixed = dataclasses.replace(
        captions.tasks[0],
        train=tuple(
            dataclasses.replace(sample, answers=(sample.answers[0] * (1 + index % 3),))
            for index, sample in enumerate(captions.tasks[0].train)
        ),
    )
    stream = dataclasses.replace(captions, tasks=(mixed, *captions.tasks[1:]))
    assert len(tokens) >= 1
    off = dataclasses.replace(SETTINGS, max_grad_norm=0.0)
    whole = first_gradients(stream, off, method=method)
    cut = dataclasses.replace(off, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    parts = first_gradients(stream, cut, method=method)
    assert whole.keys() == parts.keys() and len(whole) > 4
    norm = torch.stack([gradient.norm() for gradient in whole.values()]).norm()
    difference = torch.stack([(whole[name] - parts[name]).norm() for name in whole]).norm()
    assert difference <= 1e-5 * norm
    _, one = trained(stream, off, method=method)
    _, four = trained(stream, cut, method=method)
    assert four.total == one.total == 3
    assert four.losses == pytest.approx(one.losses, rel=1e-5)


def test_the_last_window_of_an_epoch_counts_what_it_holds(toy_stream: Stream) -> None:
    # 10 samples in windows of 4: the last one holds 2, in one batch of two possible ones.
    cut = dataclasses.replace(SETTINGS, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert trained(toy_stream, cut)[1].losses == pytest.approx(trained(toy_stream, SETTINGS)[1].losses, rel=1e-5)


def test_a_launcher_s_accumulation_does_not_divide_once_more(
    toy_stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = first_gradients(toy_stream, SETTINGS)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    assert all(torch.equal(gradient, plain[name]) for name, gradient in first_gradients(toy_stream, SETTINGS).items())


# -- gates and checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["seq_ft", "dmole"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_activation_checkpointing_trains_the_same_numbers(toy_stream: Stream, method: str, reentrant: bool) -> None:
    plain, running = trained(toy_stream, SETTINGS, method=method)
    again = dataclasses.replace(
        SETTINGS, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    counted = 0

    def count(module: object, inputs: object, output: object) -> None:
        nonlocal counted
        counted += 1

    made = begun(toy_stream, method=method)
    watched = next(m for n, m in made.vlm.model.named_modules() if n.endswith("language_model.layers.0.self_attn"))
    handle = watched.register_forward_hook(count)
    recomputing = StageTraining(made, made.stages(toy_stream)[0], again, seed=3, profile=Profile())
    recomputing.run(lambda running: None)
    handle.remove()
    assert counted == 2 * recomputing.total, "the layers must run again during backward"
    assert recomputing.losses == running.losses
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(made).items())


def test_dropout_is_the_same_when_layers_run_again(toy_stream: Stream) -> None:
    plain, running = trained(toy_stream, SETTINGS, dropout=0.3)
    again = dataclasses.replace(SETTINGS, activation_checkpointing=True)
    made, recomputing = trained(toy_stream, again, dropout=0.3)
    assert recomputing.losses == running.losses
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(made).items())


def test_a_reentrant_checkpoint_that_would_cut_a_tower_off_is_refused(toy_stream: Stream) -> None:
    method = begun(toy_stream)
    settings = dataclasses.replace(
        SETTINGS, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}
    )
    # As in a tower whose embeddings transformers does not find.
    method.vlm.model.enable_input_require_grads = lambda: None  # type: ignore[method-assign]
    running = StageTraining(method, method.stages(toy_stream)[0], settings, seed=3, profile=Profile())
    with pytest.raises(ConfigError, match=r"use_reentrant is True, and .*layers.0 gets no input that needs a gradient"):
        running.run(lambda running: None)


# -- what a stage leaves behind ---------------------------------------------------------------------------------------


def hooks(model: torch.nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [sum(len(getattr(module, kind)) for kind in kinds) for module in model.modules()]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_stage_leaves_the_model_as_it_was(toy_stream: Stream, checkpointing: bool) -> None:
    """A proxy or an evaluation after a stage computes in the precision and on the path of a fresh process."""
    settings = dataclasses.replace(
        SETTINGS,
        bf16=True,
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": True} if checkpointing else {},
    )
    method = begun(toy_stream)
    model = method.vlm.model
    answer_loss(method.vlm, collate(method.vlm, toy_stream.tasks[0].train[:2], with_answers=True))
    before = hooks(model)  # transformers' own, of the first call
    StageTraining(method, method.stages(toy_stream)[0], settings, seed=3, profile=Profile()).run(lambda running: None)
    assert "forward" not in vars(model) and not hasattr(model, "_is_accelerate_prepared")
    assert not any(module.training for module in model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert hooks(model) == before
    samples = toy_stream.tasks[1].train
    fresh = build_tiny_model(0)
    expected = layer_scores(fresh, samples, loss=answer_loss, batch_size=4)
    assert layer_scores(method.vlm, samples, loss=answer_loss, batch_size=4) == expected
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and not torch.is_autocast_enabled("cpu")


def test_two_stages_in_bf16_both_compute_in_bf16(toy_stream: Stream) -> None:
    """Another configuration in the same process must not keep the first one's precision."""
    losses = {
        precision: trained(toy_stream, dataclasses.replace(SETTINGS, bf16=precision))[1].losses
        for precision in (True, False)
    }
    for precision in (False, True):
        again = trained(toy_stream, dataclasses.replace(SETTINGS, bf16=precision))[1].losses
        assert again == losses[precision]
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


# -- validation -------------------------------------------------------------------------------------------------------


class Drawing:
    """A method whose validation draws from the global generator, as sampling in an evaluation does."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.gates = method.training_gates

    def validation_gates(self, batch: Batch) -> contextlib.AbstractContextManager[None]:
        torch.rand(1000)
        return self.gates(batch)


def test_validation_does_not_shift_dropout(validated_stream: Stream) -> None:
    _, plain = trained(validated_stream, SETTINGS, dropout=0.5)
    often = dataclasses.replace(SETTINGS, eval_strategy="steps", eval_steps=1)
    method = begun(validated_stream, dropout=0.5)
    method.validation_gates = Drawing(method).validation_gates  # type: ignore[method-assign]
    running = StageTraining(method, method.stages(validated_stream)[0], often, seed=3, profile=Profile())
    running.run(lambda running: None)
    assert running.losses == plain.losses
    assert [step for step, _ in running.validation.history] == [1, 2, 3]


def test_the_validation_loss_is_the_mean_over_all_answer_tokens(validated_stream: Stream) -> None:
    settings = dataclasses.replace(SETTINGS, eval_strategy="epoch", per_device_eval_batch_size=4)
    method, running = trained(validated_stream, settings)
    task = validated_stream.tasks[0]
    total, tokens = 0.0, 0
    for sample in task.validation:
        batch = collate(method.vlm, [sample], with_answers=True)
        with torch.no_grad(), method.validation_gates(batch):
            total += float(method.loss(batch)) * answer_tokens(batch)
        tokens += answer_tokens(batch)
    assert running.validation.history == [(3, pytest.approx(total / tokens, rel=1e-5))]


def test_dmole_validates_with_the_new_expert_and_the_neighbour(validated_stream: Stream) -> None:
    method = begun(validated_stream, method="dmole")
    method.end_stage(1, validated_stream.tasks[0])
    method.begin_stage(2, validated_stream.tasks[1])
    settings = dataclasses.replace(SETTINGS, eval_strategy="epoch")
    running = StageTraining(method, method.stages(validated_stream)[1], settings, seed=3, profile=Profile())
    used: list[tuple[str, ...]] = []
    gates = method.gates["language"]  # type: ignore[attr-defined]

    def watch(module: object, inputs: object) -> None:
        if not method.vlm.model.training and gates.block is not None:
            used.append(gates.block.active)

    layer = next(iter(method.adapters.values()))  # type: ignore[attr-defined]
    handle = layer.register_forward_pre_hook(watch)
    running.run(lambda running: None)
    handle.remove()
    assert used and all(names[-1] == method.pool["letters"].expert for names in used)  # type: ignore[attr-defined]
    assert math.isfinite(running.validation.history[0][1])


# A rate at which the tiny model gets worse after a while.
WORSENING = TrainingSettings(
    num_train_epochs=12.0,
    per_device_train_batch_size=4,
    learning_rate=0.3,
    lr_scheduler_type="constant",
    eval_strategy="steps",
    eval_steps=1,
    load_best_model_at_end=True,
    early_stopping_patience=3,
)


def test_the_best_weights_are_kept_and_patience_ends_a_stage(validated_stream: Stream) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    method = begun(validated_stream)
    running = StageTraining(method, method.stages(validated_stream)[0], WORSENING, seed=3, profile=Profile())
    running.run(lambda running: seen.setdefault(running.step, weights(method)) and None)
    losses = dict(running.validation.history)
    best = min(losses, key=lambda step: losses[step])
    assert running.step == best + 3 < running.total
    assert running.finished and len(running.losses) == running.step
    assert all(torch.equal(value, seen[best][name]) for name, value in weights(method).items())
    assert any(not torch.equal(value, seen[running.step][name]) for name, value in weights(method).items())


def test_a_resumed_stage_knows_its_best_weights_and_patience(validated_stream: Stream) -> None:
    whole_method, whole = trained(validated_stream, WORSENING, dropout=0.2)
    assert whole.validation.best is not None and whole.step < whole.total
    method = begun(validated_stream, dropout=0.2)
    running = StageTraining(method, method.stages(validated_stream)[0], WORSENING, seed=3, profile=Profile())

    class Stop(Exception):
        pass

    def stop(running: StageTraining) -> None:
        # Two of the three losses that are not better have been seen.
        if running.validation.not_better == 2 and running.step == whole.step - 1:
            raise Stop

    with pytest.raises(Stop):
        running.run(stop)
    tensors, meta = running.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = StageTraining(method, method.stages(validated_stream)[0], WORSENING, seed=3, profile=Profile())
    resumed.load_state(tensors, meta)
    resumed.run(lambda running: None)
    assert resumed.validation.history == whole.validation.history
    assert resumed.losses == whole.losses
    assert all(torch.equal(value, weights(whole_method)[name]) for name, value in weights(method).items())


def test_validation_without_samples_is_refused(toy_stream: Stream) -> None:
    with pytest.raises(ConfigError, match=r"eval_strategy is 'epoch', and task 'colours' has no validation samples"):
        trained(toy_stream, dataclasses.replace(SETTINGS, eval_strategy="epoch"))


def test_a_validation_loss_that_is_not_finite_is_an_error(validated_stream: Stream) -> None:
    method = begun(validated_stream)
    settings = dataclasses.replace(SETTINGS, eval_strategy="steps", eval_steps=1)
    running = StageTraining(method, method.stages(validated_stream)[0], settings, seed=3, profile=Profile())

    def poison(optimizer: object, arguments: object, keywords: object) -> None:
        with torch.no_grad():
            next(p for name, p in running.parameters.items() if ".fc1." in name).fill_(float("nan"))

    running.optimizer.optimizer.register_step_post_hook(poison)
    with pytest.raises(ValueError, match=r"the validation loss is nan at step 1 of 3 of stage 1 \(colours\)"):
        running.run(lambda running: None)


# -- precision --------------------------------------------------------------------------------------------------------


def test_fp16_is_refused_where_accelerate_would_train_in_float32(toy_stream: Stream) -> None:
    with pytest.raises(ConfigError, match=r"training.fp16 is True on a cpu, which has no scaled float16; .*Use bf16"):
        trained(toy_stream, dataclasses.replace(SETTINGS, fp16=True))


def test_another_precision_of_the_launcher_is_refused(toy_stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match=r"launched with mixed precision 'bf16' and the run's settings say 'no'"):
        trained(toy_stream, SETTINGS)
    assert trained(toy_stream, dataclasses.replace(SETTINGS, bf16=True))[1].step == 3


def test_processes_that_accelerate_does_not_see_are_refused(
    toy_stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would train by itself and write the same files."""
    trained(toy_stream, SETTINGS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"accelerate sees 1 processes; expected the 2 that were launched"):
        trained(toy_stream, SETTINGS)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["float32_base", "bfloat16_base"])
def test_experts_and_their_moments_stay_float32_under_bf16(toy_stream: Stream, base: torch.dtype) -> None:
    model = build_tiny_model(0)
    model.model.to(base)
    method = method_class("seq_ft")(model, MethodSettings(lora=LoraSettings(rank=4)), seed=3)
    method.begin_stage(1, toy_stream.tasks[0])
    running = StageTraining(
        method, method.stages(toy_stream)[0], dataclasses.replace(SETTINGS, bf16=True), seed=3, profile=Profile()
    )
    running.run(lambda running: None)
    tensors, _ = running.state()
    assert {value.dtype for name, value in tensors.items() if name != "rng"} == {torch.float32}
    assert {parameter.dtype for parameter in running.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adagrad", "rmsprop"])
def test_every_optimizer_resumes_to_the_same_bits(toy_stream: Stream, optim: str) -> None:
    settings = dataclasses.replace(SETTINGS, optim=optim)  # type: ignore[arg-type]
    whole_method, whole = trained(toy_stream, settings)
    method = begun(toy_stream)
    running = StageTraining(method, method.stages(toy_stream)[0], settings, seed=3, profile=Profile())
    kept = []

    def keep(running: StageTraining) -> None:
        if running.step == 1:
            tensors, meta = running.state()
            kept.append(({n: t.clone() for n, t in tensors.items()}, {**meta, "losses": list(meta["losses"])}))
            kept.append(weights(method))

    running.run(keep)
    assert running.losses == whole.losses
    with torch.no_grad():
        for name, parameter in method.trainable_parameters().items():
            parameter.copy_(kept[1][name])  # type: ignore[call-overload]
    resumed = StageTraining(method, method.stages(toy_stream)[0], settings, seed=3, profile=Profile())
    resumed.load_state(*kept[0])  # type: ignore[arg-type]
    resumed.run(lambda running: None)
    assert resumed.losses == whole.losses
    assert all(torch.equal(value, weights(whole_method)[name]) for name, value in weights(method).items())
