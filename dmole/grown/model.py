# SPDX-License-Identifier: Apache-2.0
"""`GrownModel`: a base model with everything that a run has taught it, ready to be asked.

    sample --router--> tasks that it fits --> their experts --> model.generate

Each sample of a batch has its own route. The base model, its classes and its processor are transformers' own. Calls may
run at the same time in several threads: which experts are active belongs to the thread that opened the gates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dmole.config import EvaluationSettings
from dmole.data.collate import Batch
from dmole.grown.answers import ExpertInfo, GrownAnswer, Route, expert_sizes, routes_of
from dmole.grown.instructions import instructions_in
from dmole.grown.requests import conversations_of, last_text, question
from dmole.grown.residency import Residency
from dmole.grown.saved import EXPERTS, check_files
from dmole.methods.base import Method, RoutingRecord
from dmole.models.adapters import expert_layers, remove_expert
from dmole.models.chat_template import Conversation
from dmole.models.prompts import Encoded
from dmole.models.units import image_tokens
from dmole.models.vision_language import VisionLanguageModel
from dmole.runs.generation import generate as generate_answers
from dmole_kernels import load_experts

REMEMBERED = 10_000  # samples whose routes `usage` looks back on


class GrownModel:
    """Made by `dmole.load`.

    Attributes:
        vlm: the base model with the experts attached; `vlm.model` and `vlm.processor` are transformers' objects.
        tasks: the tasks that it has learned, in order.
        generation: the settings with which it answers.
    """

    def __init__(
        self,
        method: Method,
        *,
        tasks: Sequence[str],
        generation: EvaluationSettings,
        precision: str = "no",
        folder: Path | None = None,
    ) -> None:
        self.method = method
        self.vlm: VisionLanguageModel = method.vlm
        self.tasks = tuple(tasks)
        self.generation = generation
        self.folder = folder
        self._precision = precision
        self._used: deque[tuple[str, ...]] = deque(maxlen=REMEMBERED)
        self._uses: Counter[str] = Counter()
        self._answered = 0
        self._lock = threading.Lock()
        self._residency = Residency()
        self._unloaded: set[str] = set()
        method.serving = True
        self.vlm.model.requires_grad_(False).eval()
        self._sizes = expert_sizes(self.vlm.model)

    @property
    def processor(self) -> Any:
        """The base model's processor."""
        return self.vlm.processor

    @property
    def experts(self) -> tuple[ExpertInfo, ...]:
        """Every expert: task, places, ranks, size and load."""
        tasks = {expert: task for task, expert in self.method.task_experts().items()}
        with self._lock:
            uses, answered = Counter(self._uses), self._answered
        found = []
        for name, (linears, parameters, size) in self._sizes.items():
            used = uses[tasks[name]] if name in tasks else answered
            found.append(
                ExpertInfo(
                    name=name, task=tasks.get(name), linears=linears, parameters=parameters, bytes=size,
                    resident=name not in self._unloaded, uses=used, share=used / answered if answered else 0.0,
                )
            )  # fmt: skip
        return tuple(found)

    def usage(self, last: int | None = None) -> dict[str, int]:
        """How many of the last samples used each task's expert; "" counts those that the base model answered alone.

        Args:
            last: how many samples to look back; None and more than 10,000 mean the last 10,000.
        """
        with self._lock:
            recent = list(self._used)
        counts = Counter(name for tasks in recent[-last if last else 0 :] for name in tasks or ("",))
        return {name: counts[name] for name in (*self.tasks, "")}

    def unload(self, task: str) -> None:
        """Frees the memory of a task's expert. It is read from the saved folder when a sample needs it again.

        Waits for the requests that run. Raises ValueError for a task without an expert of its own, and for a model that
        was not loaded from a folder.
        """
        experts = self.method.task_experts()
        if task not in experts:
            raise ValueError(f"task: got {task!r}; expected one of {', '.join(experts) or 'none: it has no experts'}.")
        if self.folder is None:
            raise ValueError("unload: the model was not loaded from a folder, from which the expert could be read.")
        with self._residency.changing():
            if experts[task] not in self._unloaded:
                remove_expert(expert_layers(self.vlm.model), experts[task])
                self._unloaded.add(experts[task])

    def _reload(self, names: Collection[str]) -> None:
        assert self.folder is not None
        with self._residency.changing():
            for name in sorted(set(names) & self._unloaded):
                # The file may have been damaged since it was unloaded.
                check_files(self.folder, f"{EXPERTS}/{name}/")
                load_experts(self.vlm.model, [self.folder / EXPERTS / name], [name])
                self._unloaded.remove(name)

    def answer(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        messages: Any = None,
        task: str | Sequence[str | None] | None = None,
        **changes: Any,
    ) -> Any:
        """Answers one question, or a batch in which each sample is answered by its own experts.

            grown.answer(images=["chart.png"], text="Which bar is highest?")              -> GrownAnswer
            grown.answer(images=[["a.png"], []], text=["What is this?", "Why is it?"])     -> [GrownAnswer, GrownAnswer]
            grown.answer(messages=[{"role": "user", "content": [...]}])                    -> GrownAnswer

        Args:
            images: paths or PIL images of the question, in the order in which the prompt shows them; for a batch a list
                of such lists. None: no image.
            text: the question, or the questions of a batch.
            messages: in place of images and text, a conversation in transformers' format, or a list of them. The
                router looks at all its images and at the text of the last user's message.
            task: the task whose expert answers, in place of the router's choice; one for all, or a list with one name
                per sample, in which None leaves the choice to the router.
            changes: settings of `evaluation:` for this call, such as `max_new_tokens=64` or `num_beams=2`.

        Raises:
            ValueError: for both or none of `text` and `messages`, other numbers of images than of questions, a task
                that the model has not learned, an unknown setting, a picture that cannot be read.
        """
        conversations, single = conversations_of(images, text, messages)
        batch = self._batch(conversations)
        settings = self._settings(changes)
        tasks = self._named(task, len(conversations))
        names = [f"request/{place}" for place in range(len(conversations))]
        with self._routed(batch, tasks) as routes, self._autocast():
            answers = generate_answers(self.vlm, batch, settings, names)
        found = [
            GrownAnswer(text=answer.text, cut=answer.cut, route=route, prompt_tokens=tokens)
            for answer, route, tokens in zip(answers, routes, batch.encoded.prompt_lengths, strict=True)
        ]
        return found[0] if single else found

    def route(self, images: Any = None, text: str | Sequence[str] | None = None, *, messages: Any = None) -> Any:
        """The `Route` of one question, or of each of a batch; arguments as in `answer`. Nothing is generated."""
        conversations, single = conversations_of(images, text, messages)
        with torch.inference_mode():
            routes = routes_of(self.method.routes(self._batch(conversations)), len(conversations))
        return routes[0] if single else routes

    def generate(
        self,
        *,
        task: str | Sequence[str | None] | None = None,
        instructions: Sequence[str] | None = None,
        images_per_sample: Sequence[int] | None = None,
        **inputs: Any,
    ) -> Tensor:
        """`model.generate` of transformers, with its arguments, under each sample's route.

            inputs = grown.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, ...)
            grown.generate(**inputs, max_new_tokens=64)

        Args:
            task: as in `answer`.
            instructions: the text of each sample's question, by which the router chooses; None takes it out of
                `input_ids`, by the model's chat template.
            images_per_sample: how many images each sample has; None counts them where that is possible.
            inputs: everything that the processor returned, left-padded, and generate's own arguments.

        Raises:
            ValueError: where instructions or numbers of images cannot be told from the inputs.
        """
        if not isinstance(inputs.get("input_ids"), Tensor):
            raise ValueError("input_ids: got none; expected those of the processor. Pass **processor(...).")
        count = len(inputs["input_ids"])
        tensors = {name: value.cpu() for name, value in inputs.items() if isinstance(value, Tensor)}
        images = self._image_counts(tensors, images_per_sample)
        encoded = Encoded(inputs=tensors, labels=None, images=images, prompt_lengths=(0,) * count)
        tasks = self._named(task, count)
        if instructions is None:
            needed = None in tasks and self.method.routed_by == "router"
            instructions = instructions_in(self.vlm, tensors) if needed else [""] * count
        if len(instructions) != count:
            raise ValueError(f"instructions: got {len(instructions)} for {count} samples; expected one each.")
        samples = tuple(question(place, instruction) for place, instruction in enumerate(instructions))
        batch = Batch(samples=samples, encoded=encoded, units=self.vlm.units(encoded))
        with torch.inference_mode(), self._routed(batch, tasks), self._autocast():
            return cast(Tensor, self.vlm.model.generate(**self.vlm.on_device(inputs)))

    # -- inside ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _routed(self, batch: Batch, tasks: Sequence[str | None]) -> Iterator[list[Route]]:
        """The gates of a batch, and the route of each sample; `tasks[s]` takes precedence over the router."""
        count = len(batch.samples)
        with contextlib.ExitStack() as stack, torch.inference_mode():
            named = [None if task is None else Route(tasks=(task,)) for task in tasks]
            record = self.method.routes(batch) if None in named else RoutingRecord(chosen=((),) * count)
            routes = [given or found for given, found in zip(named, routes_of(record, count), strict=True)]
            chosen = [route.tasks for route in routes]
            stack.enter_context(self._resident({name for names in chosen for name in names}))
            if record is None and not any(named):
                stack.enter_context(self.method.evaluation_gates(batch))
            else:
                stack.enter_context(self.method.task_gates(batch, chosen))
            with self._lock:
                self._answered += count
                self._used.extend(chosen)
                self._uses.update(name for names in chosen for name in names)
            yield routes

    @contextlib.contextmanager
    def _resident(self, tasks: Collection[str]) -> Iterator[None]:
        """The experts of these tasks are in memory, and stay there inside."""
        experts = self.method.task_experts()
        needed = {experts[task] for task in tasks if task in experts}
        while True:
            with self._residency.using():
                if not needed & self._unloaded:
                    yield
                    return
            self._reload(needed)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._precision == "no":
            return contextlib.nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self._precision]
        return torch.autocast(self.vlm.device.type, dtype)

    def _settings(self, changes: Mapping[str, Any]) -> EvaluationSettings:
        known = {spec.name for spec in dataclasses.fields(EvaluationSettings)} - {"stages", "zero_shot"}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(f"answer: got the setting {unknown[0]!r}; expected one of {', '.join(sorted(known))}.")
        return dataclasses.replace(self.generation, **changes)

    def _named(self, task: str | Sequence[str | None] | None, count: int) -> list[str | None]:
        names = [task] * count if task is None or isinstance(task, str) else list(task)
        if len(names) != count:
            raise ValueError(f"task: got {len(names)} for {count} samples; expected one name, or one per sample.")
        return names

    def _batch(self, conversations: Sequence[Conversation]) -> Batch:
        encoded = self.vlm.encode(conversations, with_answers=False)
        samples = tuple(question(place, last_text(row)) for place, row in enumerate(conversations))
        return Batch(samples=samples, encoded=encoded, units=self.vlm.units(encoded))

    def _image_counts(self, inputs: Mapping[str, Tensor], given: Sequence[int] | None) -> tuple[int, ...]:
        count = len(inputs["input_ids"])
        if given is not None:
            if len(given) != count:
                raise ValueError(f"images_per_sample: got {len(given)} for {count} samples; expected one number each.")
            return tuple(int(number) for number in given)
        tokens = image_tokens(inputs, self.vlm.image_token_id)
        if not any(name.startswith("pixel") for name in inputs):
            return (0,) * count
        if tokens is not None and self.vlm.declaration.rows == "tokens":
            return tuple(int(number > 0) for number in tokens)
        pictures = next((len(inputs[name]) for name in ("image_sizes", "image_grid_thw") if name in inputs), None)
        pictures = len(inputs["pixel_values"]) if pictures is None and "pixel_values" in inputs else pictures
        having = [int(number > 0) for number in tokens] if tokens is not None else [1] * count
        if count == 1 and pictures is not None and self.vlm.declaration.rows == "images":
            return (pictures,)
        if pictures == sum(having):
            return tuple(having)
        raise ValueError(
            f"images_per_sample: got None, and {pictures} images of {count} samples cannot be told apart; expected one "
            f"number per sample. Pass it."
        )
