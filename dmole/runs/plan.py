# SPDX-License-Identifier: Apache-2.0
"""Which runs a configuration asks for, and every check that can be made before the first of them trains.

A plan is one (method, seed, order of tasks). Its `identity` holds whatever decides its numbers; equal fingerprints mean
equal numbers, so a folder with another fingerprint is somebody else's and is never written to.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from dmole.config import ORDER_HELP, RunConfig, fingerprint
from dmole.config_error import ConfigError
from dmole.data.collate import conversation
from dmole.data.images import image_size
from dmole.data.sample import Stream
from dmole.files import JSON, file_digest
from dmole.methods import method_class
from dmole.methods.base import Stage
from dmole.metrics import METRICS
from dmole.models.chat_template import Conversation
from dmole.models.prompt_checks import check_conversations
from dmole.models.vision_language import VisionLanguageModel
from dmole.runs.evaluation import evaluated_stages
from dmole.runs.progress import Costs
from dmole.seeding import derived_generator
from dmole.training.batches import samples_per_step
from dmole.training.settings import WITHOUT_EFFECT
from dmole.training.stage_training import check_validation, stage_steps

# What decides the numbers of every method's runs. Where results go and how often state is saved changes none.
SHARED_SETTINGS = (
    "training",
    "evaluation",
    "lora",
    "budget",
    "candidates",
    "threads",
    "declaration",
    "dtype",
    "quantization",
)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One method with one seed on one order of the tasks."""

    method: str
    seed: int
    order: str
    stream: Stream
    folder: Path
    identity: dict[str, JSON]
    # Of a run that goes on from a finished one with one more task (`dmole.grown.extend`): that run, and the folders of
    # the tasks that are not in its stream.
    extends: dict[str, JSON] | None = None

    @property
    def fingerprint(self) -> str:
        """Equal for runs whose numbers must be equal."""
        return fingerprint(self.identity)


def plan_runs(config: RunConfig, stream: Stream, model: VisionLanguageModel, *, processes: int = 1) -> list[RunPlan]:
    """Every (order, seed, method) of the configuration, in the order in which they run.

    processes: how many train together; a step sees so many times the samples of one.
    """
    for name in config.training.epochs_of:
        if name not in stream.task_names:
            raise ConfigError(f"training.epochs_of has {name!r}; expected a task of {', '.join(stream.task_names)}.")
    base, data, inputs = _base_digest(model, config), stream_digest(stream), model.inputs_digest()
    plain = config.to_dict()
    shared = {key: plain[key] for key in SHARED_SETTINGS}
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
                    "metrics": {task.metric: METRICS[task.metric].version for task in ordered.tasks},
                    "base_weights": base,
                    "inputs": inputs,
                    "options": plain.get(method, {}),
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
    digest_of = functools.lru_cache(maxsize=2**16)(file_digest)
    for task in sorted(stream.tasks, key=lambda task: task.name):
        for split in ("train", "validation", "test"):
            for sample in getattr(task, split):
                # A picture's bytes and not its name: one that is drawn anew under the old name is other data.
                shown = [digest_of(image) for image in sample.images]
                parts = [task.name, task.metric, split, sample.id, shown, sample.instruction]
                parts += [sample.answers, sample.options]
                if sample.turns:
                    parts += [[(turn.role, turn.parts) for turn in sample.turns], sample.taught]
                digest.update(json.dumps(parts).encode())
    return digest.hexdigest()


def fresh_copy(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """The same base with modules of its own and shared weights: methods exchange modules of the network that they are
    given, and write to no weight that they have not replaced."""
    shared = {id(tensor): tensor for tensor in (*vlm.model.parameters(), *vlm.model.buffers())}
    return dataclasses.replace(vlm, model=copy.deepcopy(vlm.model, shared))


def _base_digest(vlm: VisionLanguageModel, config: RunConfig) -> str:
    identity = vlm.base_identity(full=True if config.hash_weights else None)
    return str(identity["sha256"] if identity["commit"] is None else f"{identity['sha256']}@{identity['commit']}")


def check_plan(plan: RunPlan, config: RunConfig, model: VisionLanguageModel) -> list[Stage]:
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


def check_samples(stream: Stream, vlm: VisionLanguageModel, max_new_tokens: int) -> None:
    """Raise `ConfigError` for a sample that cannot be trained on or answered: longer than the model's positions, with a
    special token in its text, or with a reference that takes more than `max_new_tokens` tokens.

    Of images the sizes alone are read, each file's once.
    """
    read_size = functools.lru_cache(maxsize=2**16)(image_size)

    def unread(path: Path) -> _Unread:
        return _Unread(stream.image_sizes.get(path) or read_size(path))

    def conversations(split: str) -> Iterator[tuple[str, Conversation]]:
        for task in stream.tasks:
            for sample in getattr(task, split):
                shown = [unread(path) for path in sample.images]
                for answer in sample.answers[:1] if split == "train" else sample.answers:
                    yield f"{task.name}/{split} sample {sample.id!r}", conversation(sample, answer, images=shown)

    for split, limit in (("train", None), ("validation", None), ("test", max_new_tokens)):
        check_conversations(
            vlm.processor, conversations(split), vlm.model.config, declaration=vlm.declaration, max_new_tokens=limit
        )


class _Unread(Image.Image):
    """A picture of which only the size is known."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._size = size


def check_folder(plan: RunPlan) -> None:
    """Raise `ConfigError` unless what is in the run's folder, settings and results, belongs to the plan."""
    settings, results = plan.folder / "config.json", plan.folder / "result.json"
    found = {path: _document(path) for path in (settings, results) if path.exists()}
    if results in found and settings not in found:
        raise ConfigError(f"{settings} is missing beside a result. Restore it, or pass --fresh to delete that run.")
    for path, document in found.items():
        # Results of earlier versions do not say to which settings they belong.
        if document.get("fingerprint", plan.fingerprint if path == results else None) == plan.fingerprint:
            continue
        old = document.get("identity")
        if not isinstance(old, dict):
            old = {}
        changed = sorted(key for key in {*old, *plan.identity} if old.get(key) != plan.identity.get(key))
        different = f" (different: {', '.join(changed)})" if path == settings else ""
        raise ConfigError(
            f"{plan.folder} holds {'a run' if path == settings else 'the results of a run'} with other settings"
            f"{different}; expected the same ones. Choose another output folder, or pass --fresh to delete that run."
        )


def _document(path: Path) -> dict[str, JSON]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not JSON: it was truncated or edited. Restore it, or pass --fresh to delete that run."
        ) from error
    if not isinstance(found, dict):
        what = "settings" if path.name == "config.json" else "results"
        raise ConfigError(f"{path} holds no {what} of a run. Restore it, or pass --fresh to delete that run.")
    return found


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
