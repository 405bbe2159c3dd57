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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from dmole.config import EvaluationSettings
from dmole.data.collate import Batch
from dmole.data.images import open_image
from dmole.data.sample import Sample
from dmole.grown.instructions import instructions_in
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

Picture = str | Path | Image.Image
REMEMBERED = 10_000  # samples whose routes `usage` looks back on


@dataclass(frozen=True, kw_only=True)
class Route:
    """Which tasks' experts a sample uses, best first, and why.

    Attributes:
        tasks: () means the base model alone.
        errors: by task, how far the sample is from it (D-MoLE, Eq. 9); {} where nothing was measured.
        thresholds: by task, the largest error that still fits (Eq. 10).
    """

    tasks: tuple[str, ...]
    errors: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)

    @property
    def unknown(self) -> bool:
        """Whether the router looked at the sample and no task fits."""
        return bool(self.errors) and not self.tasks

    def __str__(self) -> str:
        if not self.errors:
            return " + ".join(self.tasks) or "the same experts for every sample"
        near = sorted(self.errors, key=lambda task: self.errors[task] / self.thresholds[task])
        shown = ", ".join(f"{task} {self.errors[task]:.2g} of {self.thresholds[task]:.2g}" for task in near[:3])
        return f"{' + '.join(self.tasks) or 'unknown: the base model alone'} (error of threshold: {shown})"


@dataclass(frozen=True, kw_only=True)
class GrownAnswer:
    """An answer. `cut`: generation stopped at `max_new_tokens`, not at an end token."""

    text: str
    cut: bool
    route: Route
    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class ExpertInfo:
    """One expert as it is in the model.

    Attributes:
        linears: where it is, by qualified name, with its rank there.
        parameters, bytes: of its weights.
        resident: whether it is in memory; an expert that is not is read again when a sample needs it.
        uses: how many samples of this process have used it.
        share: `uses` over all samples that were answered; the load of the expert.
    """

    name: str
    task: str | None
    linears: Mapping[str, int]
    parameters: int
    bytes: int
    resident: bool
    uses: int
    share: float


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
        self._sizes = _sizes(self.vlm.model)

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
        conversations, single = self._conversations(images, text, messages)
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
        conversations, single = self._conversations(images, text, messages)
        with self._routed(self._batch(conversations), [None] * len(conversations), counted=False) as routes:
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
        samples = tuple(_question(place, instruction) for place, instruction in enumerate(instructions))
        batch = Batch(samples=samples, encoded=encoded, units=self.vlm.units(encoded))
        with torch.inference_mode(), self._routed(batch, tasks), self._autocast():
            return cast(Tensor, self.vlm.model.generate(**self.vlm.on_device(inputs)))

    # -- inside ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _routed(self, batch: Batch, tasks: Sequence[str | None], *, counted: bool = True) -> Iterator[list[Route]]:
        """The gates of a batch, and the route of each sample; `tasks[s]` takes precedence over the router."""
        count = len(batch.samples)
        with contextlib.ExitStack() as stack, torch.inference_mode():
            named = [None if task is None else Route(tasks=(task,)) for task in tasks]
            record = self.method.routes(batch) if None in named else RoutingRecord(chosen=((),) * count)
            routes = [given or found for given, found in zip(named, _routes(record, count), strict=True)]
            chosen = [route.tasks for route in routes]
            stack.enter_context(self._resident({name for names in chosen for name in names}))
            if record is None and not any(named):
                stack.enter_context(self.method.evaluation_gates(batch))
            else:
                stack.enter_context(self.method.task_gates(batch, chosen))
            if counted:
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

    def _conversations(self, images: Any, text: Any, messages: Any) -> tuple[list[Conversation], bool]:
        if (text is None) == (messages is None):
            got = "neither" if text is None else "both"
            raise ValueError(f"text, messages: got {got}; expected one of them. Pass text= with images=, or messages=.")
        if messages is not None:
            if images is not None:
                raise ValueError("images: got some beside messages; expected them inside. Put them into the content.")
            single = bool(messages) and isinstance(messages[0], Mapping)
            conversations = [messages] if single else list(messages)
            return [_opened(conversation) for conversation in conversations], single
        single = isinstance(text, str)
        texts = [text] if single else list(text)
        shown = [[]] * len(texts) if images is None else [images] if single else list(images)
        shown = [[part] if isinstance(part, str | Path | Image.Image) else list(part) for part in shown]
        if len(shown) != len(texts):
            raise ValueError(f"images: got {len(shown)} lists for {len(texts)} questions; expected one list for each.")
        if not texts:
            raise ValueError("text: got no question; expected at least one.")
        return [_asked(pictures, question) for question, pictures in zip(texts, shown, strict=True)], single

    def _batch(self, conversations: Sequence[Conversation]) -> Batch:
        encoded = self.vlm.encode(conversations, with_answers=False)
        samples = tuple(_question(place, _last_text(row)) for place, row in enumerate(conversations))
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


def _routes(record: RoutingRecord | None, count: int) -> list[Route]:
    if record is None:
        return [Route(tasks=())] * count
    if record.errors_NT is None:
        return [Route(tasks=tasks) for tasks in record.chosen]
    names = tuple(record.thresholds)
    return [
        Route(tasks=tasks, errors=dict(zip(names, errors, strict=True)), thresholds=record.thresholds)
        for tasks, errors in zip(record.chosen, record.errors_NT.tolist(), strict=True)
    ]


def _sizes(model: nn.Module) -> dict[str, tuple[dict[str, int], int, int]]:
    """By expert: its rank at each linear, its parameters and its bytes."""
    ranks: dict[str, dict[str, int]] = {}
    parameters: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        linear, inside, rest = name.partition(".bank.experts.")
        if inside:
            expert, _, matrix = rest.partition(".")
            if matrix == "lora_a":
                ranks.setdefault(expert, {})[linear] = len(parameter)
            parameters[expert] += parameter.numel()
            sizes[expert] += parameter.numel() * parameter.element_size()
    return {expert: (linears, parameters[expert], sizes[expert]) for expert, linears in ranks.items()}


def _question(place: int, instruction: str) -> Sample:
    return Sample(id=str(place), images=(), instruction=instruction, answers=("",))


def _asked(pictures: Sequence[Picture], text: str) -> Conversation:
    content = [
        *({"type": "image", "image": open_image(picture)} for picture in pictures),
        {"type": "text", "text": text},
    ]
    return [{"role": "user", "content": content}]


def _last_text(messages: Conversation) -> str:
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not asked:
        raise ValueError("messages: got none of a user; expected a question. Add it.")
    content = asked[-1]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def _opened(messages: Conversation) -> Conversation:
    """The conversation with its pictures opened; "image", "path" and "url" hold paths or PIL images."""
    opened = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image", "image": open_image(_picture(part))} if part.get("type") == "image" else dict(part)
                for part in content
            ]
        opened.append({**message, "content": content})
    return opened


def _picture(part: Mapping[str, Any]) -> Picture:
    found = next((part[name] for name in ("image", "path", "url") if part.get(name) is not None), None)
    if isinstance(found, str) and found.partition(":")[0] in ("http", "https", "data"):
        raise ValueError(f"image: got {found[:40]!r}; expected a path or a PIL image. Fetch it first.")
    if not isinstance(found, str | Path | Image.Image):
        raise ValueError(f"image: got {type(found).__name__}; expected a path or a PIL image.")
    return found
