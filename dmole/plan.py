# SPDX-License-Identifier: Apache-2.0
"""Which runs a configuration asks for, and every check that can be made before the first of them trains.

A plan is one (method, seed, order of tasks). Its `identity` holds whatever decides its numbers; equal fingerprints mean
equal numbers, so a folder with another fingerprint is somebody else's and is never written to.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dmole import checkpoint
from dmole.batches import samples_per_step
from dmole.config import ORDER_HELP, RunConfig, fingerprint
from dmole.config_error import ConfigError
from dmole.data.sample import Stream
from dmole.evaluation import evaluated_stages
from dmole.methods import method_class
from dmole.methods.base import JSON, Stage
from dmole.models.multimodal import MultimodalModel
from dmole.progress import Costs
from dmole.seeding import derived_generator
from dmole.training import check_validation, stage_steps
from dmole.training_settings import WITHOUT_EFFECT


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One method with one seed on one order of the tasks."""

    method: str
    seed: int
    order: str
    stream: Stream
    folder: Path
    identity: dict[str, JSON]

    @property
    def fingerprint(self) -> str:
        """Equal for runs whose numbers must be equal."""
        return fingerprint(self.identity)


def plan_runs(config: RunConfig, stream: Stream, model: MultimodalModel, *, processes: int = 1) -> list[RunPlan]:
    """Every (order, seed, method) of the configuration, in the order in which they run.

    processes: how many train together; a step sees so many times the samples of one.
    """
    for name in config.training.epochs_of:
        if name not in stream.task_names:
            raise ConfigError(f"training.epochs_of has {name!r}; expected a task of {', '.join(stream.task_names)}.")
    base, data, inputs = checkpoint.weights_digest(model.model), stream_digest(stream), model.inputs_digest()
    plain = config.to_dict()
    # Where results go and how often state is saved changes no number.
    shared = {key: plain[key] for key in ("training", "evaluation", "lora", "candidates", "threads")}
    shared["training"] = {key: value for key, value in plain["training"].items() if key not in WITHOUT_EFFECT}
    plans: list[RunPlan] = []
    for order in config.orders:
        ordered = stream.reorder(order_names(order, stream.task_names))
        for seed in config.seeds:
            for method in config.methods:
                identity = {
                    "method": method,
                    "seed": seed,
                    "tasks": list(ordered.task_names),
                    "stream": data,
                    "base_weights": base,
                    "inputs": inputs,
                    "options": plain.get(method, {}),
                    "dmole": plain["dmole"],
                    "processes": processes,
                    **shared,
                }
                folder = Path(config.output) / "runs" / f"{method}-seed{seed}-{order_label(order)}"
                plans.append(
                    RunPlan(
                        method=method,
                        seed=seed,
                        order=order_label(order),
                        stream=ordered,
                        folder=folder,
                        identity=identity,
                    )
                )
    return plans


def order_names(order: str, names: Sequence[str]) -> list[str]:
    """The task names in the order that `order` asks for."""
    if order == "default":
        return list(names)
    if order == "reversed":
        return list(reversed(names))
    number = order.removeprefix("shuffled")
    if number != order and number.isdecimal():
        places = torch.randperm(
            len(names), generator=derived_generator("task order", int(number)), device="cpu"
        ).tolist()
        return [names[place] for place in places]
    listed = [name.strip() for name in order.split(",")]
    if sorted(listed) != sorted(names):
        raise ConfigError(f"orders has {order!r}; expected {ORDER_HELP} ({', '.join(names)}).")
    return listed


def order_label(order: str) -> str:
    """A short name for folders and tables."""
    return f"order-{hashlib.sha256(order.encode()).hexdigest()[:8]}" if "," in order else order


def stream_digest(stream: Stream) -> str:
    """Which data a run used: the sha256 over all samples and their images' bytes, whatever the order of the tasks."""
    digest = hashlib.sha256()
    images: dict[Path, str] = {}
    for task in sorted(stream.tasks, key=lambda task: task.name):
        for split in ("train", "validation", "test"):
            for sample in getattr(task, split):
                if sample.image not in images:
                    # Its bytes and not its name: a picture drawn anew under the old name is other data.
                    images[sample.image] = checkpoint.file_digest(sample.image)
                parts = (task.name, task.metric, split, sample.id, images[sample.image], sample.instruction)
                digest.update(json.dumps([*parts, sample.answers, sample.options]).encode())
    return digest.hexdigest()


def fresh_copy(model: MultimodalModel) -> MultimodalModel:
    """The same base with its own weights and modules: methods change the network they are given."""
    return dataclasses.replace(model, model=copy.deepcopy(model.model))


def check_plan(plan: RunPlan, config: RunConfig, model: MultimodalModel) -> list[Stage]:
    """The stages of a run; raises ValueError for whatever would fail hours into it."""
    method = method_class(plan.method)(fresh_copy(model), config.method_settings(plan.method), seed=plan.seed)
    method.check(plan.stream)
    stages = method.stages(plan.stream)
    for stage in stages:
        check_validation(config.training, stage)
    if not stages and not config.evaluation.zero_shot:
        raise ConfigError(
            f"evaluation.zero_shot is False; expected True for the method {plan.method}, which has no stage and "
            "measures the pretrained model alone. Set it to true, or leave the method out."
        )
    return evaluated_stages(stages, config.evaluation.stages)


def check_lengths(stream: Stream, model: MultimodalModel, max_new_tokens: int) -> None:
    """Raise `ConfigError` for a sample that is longer than the model's positions, or that holds a special token.

    And for a test answer that has more than `max_new_tokens` tokens, its end included: no generated answer could be it.

    "<image>" in an instruction, as other projects' files have it, would stand for an image token that no image fills.
    """
    room = int(model.model.config.get_text_config().max_position_embeddings)
    special = {number: token.content for number, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    frame = len(model.prompt_ids("")) - len(model.text_ids(""))
    for task in stream.tasks:
        for split, samples in (("train", task.train), ("test", task.test)):
            for sample in samples:
                instruction = model.text_ids(sample.instruction)
                taught = [] if split == "test" else model.text_ids(sample.answers[0])
                for what, ids in (("instruction", instruction), ("answer", taught)):
                    if found := [special[number] for number in ids if number in special]:
                        raise ConfigError(
                            f"{task.name}/{split} sample {sample.id!r} has the model's special token {found[0]!r} in "
                            f"its {what}; expected plain text. Remove it: the prompt puts the image in front itself."
                        )
                if split == "test":
                    longest = max((len(model.answer_ids(answer)), answer) for answer in sample.answers)
                    if longest[0] > max_new_tokens:
                        raise ConfigError(
                            f"{task.name}/test sample {sample.id!r} has the answer {longest[1]!r}, which takes "
                            f"{longest[0]} tokens with its end; evaluation.max_new_tokens is {max_new_tokens}, so "
                            f"every generated answer would be cut before it. Raise it to at least {longest[0]}."
                        )
                answer = max_new_tokens if split == "test" else len(model.answer_ids(sample.answers[0]))
                length = frame + len(instruction) + answer
                if length > room:
                    raise ConfigError(
                        f"{task.name}/{split} sample {sample.id!r} takes {length} tokens with its answer; the model "
                        f"has {room} positions. Shorten the instruction or lower evaluation.max_new_tokens."
                    )


def check_folder(plan: RunPlan) -> None:
    path = plan.folder / "config.json"
    if not path.exists():
        return
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON: it was truncated or edited. Restore it, or pass --fresh to delete that run."
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings of a run. Restore it, or pass --fresh to delete that run.")
    if found.get("fingerprint") == plan.fingerprint:
        return
    old = found.get("identity", {})
    changed = sorted(key for key in {*old, *plan.identity} if old.get(key) != plan.identity.get(key))
    raise ConfigError(
        f"{plan.folder} holds a run with other settings (different: {', '.join(changed)}); expected the same ones. "
        "Choose another output folder, or pass --fresh to delete that run."
    )


def work_units(
    stages: Sequence[Stage], stream: Stream, config: RunConfig, costs: Costs, *, processes: int = 1
) -> float:
    """The work of a run in the units of `costs`."""
    tests = {task.name: len(task.test) for task in stream.tasks}
    steps = sum(stage_steps(config.training, stage, processes=processes) for stage in stages)
    trained = steps * samples_per_step(config.training, processes)
    tested = sum(tests[name] for stage in stages for name in stage.evaluates)
    if config.evaluation.zero_shot:
        tested += sum(tests.values())
    return costs.trained_sample * trained + costs.answer * tested
