# SPDX-License-Identifier: Apache-2.0
"""The contract test: does everything that is assumed of a model hold for this one, with these weights?

     1  saving and loading gives the same loss
     2  towers are disjoint; every candidate is exactly an nn.Linear and is called
     3  with experts attached and no gates the logits are the base's, to the bit
     4  logits and gradients of a sample follow its own gate alone (each tower, images owned 0 1 1 2 and 0 0 2)
     5  the same for generated text, greedy and with two beams
     6  the proxy's gradient norms are autograd's
     7  the loss is the model's own over the whole sequence
     9  without gates the model generates what it did before experts were attached
    10  router features of a sample do not depend on the rest of the batch

In 4 and 5 every sample of a mixed batch must give what it gives where all samples have its gate. A gate that reached
another sample's rows is as large as an expert's whole effect; `leak` is the difference in units of that effect.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmole.models.drawn import drawn_conversation, drawn_image
from dmole.models.identity import weight_bytes
from dmole.models.prompts import Encoded
from dmole.models.towers import LANGUAGE, VISION, Calls
from dmole.models.vision_language import VisionLanguageModel
from dmole_kernels import ExpertHandle, GradNormRecorder, convert

EXPERTS = ("contract_a", "contract_b")
MIXED = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
SAMPLES = len(MIXED)
NEW_TOKENS = 4
# Saving a larger model to a temporary folder takes longer than the rest of the test together.
SAVED_BYTES = 4 * 2**30
ROWS_REMEDY = "Set declaration.rows to images, tokens, tiles or padded."


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report: `figure` is what was measured, `remedy` what to do where it is not ok."""

    point: int
    name: str
    tower: str
    ok: bool
    figure: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Batches of three samples: images owned 0 1 1 2 and 0 0 2, the latter also as prompts to generate from.

    alone: each sample of the latter by itself; () where batches were made by hand and cannot be taken apart.
    """

    one_two_one: Encoded
    two_none_one: Encoded
    prompts: Encoded
    alone: tuple[Encoded, ...] = ()


def drawn_probes(vlm: VisionLanguageModel) -> Probes:
    """The batches of a model with a processor: drawn images of unequal shapes, questions of unequal length."""
    shapes = ((64, 64), (128, 64), (64, 160), (96, 96))
    images = [drawn_image(*shape, seed=number) for number, shape in enumerate(shapes)]
    questions = ["What is this?", "Which of these is the larger one, and why?", "Name the colours."]

    def conversations(owners: Sequence[int]) -> list[list[dict[str, Any]]]:
        own = [[image for image, owner in zip(images, owners, strict=False) if owner == s] for s in range(SAMPLES)]
        return [drawn_conversation(mine, question) for mine, question in zip(own, questions, strict=True)]

    owned = conversations([0, 0, 2])
    return Probes(
        one_two_one=vlm.encode(conversations([0, 1, 1, 2]), with_answers=True),
        two_none_one=vlm.encode(owned, with_answers=True),
        prompts=vlm.encode(owned, with_answers=False),
        alone=tuple(vlm.encode([conversation], with_answers=True) for conversation in owned),
    )


def check(vlm: VisionLanguageModel, probes: Probes, *, save: bool | None = None) -> list[Finding]:
    """Every point above, in order; the model is left as it was, frozen and without experts.

    Args:
        save: whether to write the model to a temporary folder for point 1; None: up to 4 GiB of weights.
    """
    findings: list[Finding] = []

    def collect(point: int, name: str, found: Callable[..., Iterator[Finding]], *arguments: Any) -> None:
        try:
            findings.extend(found(vlm, *arguments))
        except ValueError as error:
            # A refusal is an answer about this model, and the points after it have theirs.
            findings.append(_finding(point, name, "", False, str(error)))

    unequal, owned = probes.one_two_one, probes.two_none_one
    before, plain = _generated(vlm, probes.prompts, beams=1), _logits(vlm, owned)
    collect(1, "save and load", _saved, owned, save)
    collect(2, "towers and candidates", _structure, owned)
    collect(6, "proxy norms", _norms, owned)
    collect(7, "loss", _loss, owned)
    collect(10, "router features", _features, probes)
    handles = _attached(vlm)
    try:
        collect(3, "attached, no gates", _same_logits, plain, owned)
        for tower in handles:
            for owners, batch in (("0 1 1 2", unequal), ("0 0 2", owned)):
                name = f"logits, images of {owners}"
                collect(4, name, _swap, handles, tower, batch, name)
            collect(4, "gradients", _gradients, handles, tower, owned)
        for beams, name in ((1, "generate, greedy"), (2, "generate, 2 beams")):
            collect(5, name, _generation, handles, probes.prompts, beams, name)
        collect(9, "generate, no gates", _same_text, before, probes.prompts)
    finally:
        for handle in handles.values():
            handle.unconvert()
    return sorted(findings, key=lambda finding: finding.point)


def _finding(point: int, name: str, tower: str, ok: bool, figure: str, remedy: str = "") -> Finding:
    return Finding(point=point, name=name, tower=tower, ok=ok, figure=figure, remedy="" if ok else remedy)


# 1, 2


def _saved(vlm: VisionLanguageModel, batch: Encoded, save: bool | None) -> Iterator[Finding]:
    size = weight_bytes(vlm.model)
    if save is False or (save is None and size > SAVED_BYTES):
        yield _finding(1, "save and load", "", True, f"not tried: {size / 2**30:.1f} GiB of weights")
        return
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        own = float(vlm.loss(batch))
        vlm.model.save_pretrained(folder)
        again = type(vlm.model).from_pretrained(
            folder, dtype=vlm.model.dtype, attn_implementation=vlm.model.config._attn_implementation
        )
        again.eval().to(vlm.model.device)
        loss = float(dataclasses.replace(vlm, model=again).loss(batch))
    yield _finding(
        1, "save and load", "", loss == own, f"loss {own:.6g}, loaded {loss:.6g}",
        "save_pretrained or from_pretrained of this family loses weights: train from the original folder only.",
    )  # fmt: skip


def _structure(vlm: VisionLanguageModel, batch: Encoded) -> Iterator[Finding]:
    names = [name for tower in vlm.candidates.values() for name in tower]
    twice = len(names) - len(set(names))
    other = [name for name in names if type(vlm.model.get_submodule(name)) is not nn.Linear]
    with Calls(vlm.model, names) as calls, torch.no_grad():
        vlm.model(**vlm.on_device(batch.inputs))
    for tower, own in vlm.candidates.items():
        missing = [name for name in own if name in set(calls.missing)]
        wrong = [name for name in own if name in other]
        figure = f"{len(own)} candidates, {len(missing)} not called"
        if missing or wrong:
            figure += f": {', '.join((missing + wrong)[:3])}"
        yield _finding(
            2, "towers and candidates", tower, not (missing or wrong or twice), figure,
            "Set declaration.candidates to a regular expression that leaves these out.",
        )  # fmt: skip


# 3, 9


def _same_logits(vlm: VisionLanguageModel, before: Tensor, batch: Encoded) -> Iterator[Finding]:
    yield _unchanged(3, "attached, no gates", before, _logits(vlm, batch))


def _same_text(vlm: VisionLanguageModel, before: Tensor, prompts: Encoded) -> Iterator[Finding]:
    yield _unchanged(9, "generate, no gates", before, _generated(vlm, prompts, beams=1))


def _unchanged(point: int, name: str, before: Tensor, after: Tensor) -> Finding:
    same = before.shape == after.shape and torch.equal(before, after)
    return _finding(
        point, name, "", same, "equal to the bit" if same else "not equal",
        "The model computes with its linears' weights by another way: leave those out by declaration.candidates.",
    )  # fmt: skip


# 4


@contextmanager
def _gated(
    vlm: VisionLanguageModel, handles: Mapping[str, ExpertHandle], towers: Sequence[str], batch: Encoded,
    gate: Sequence[Sequence[float]],
) -> Iterator[None]:  # fmt: skip
    units = vlm.units(batch)
    with ExitStack() as stack:
        for tower in towers:
            stack.enter_context(handles[tower].use(torch.tensor(gate, device=vlm.device), EXPERTS, units=units[tower]))
        yield


def _attached(vlm: VisionLanguageModel) -> dict[str, ExpertHandle]:
    """Two experts with random weights on every candidate, one handle for each tower."""
    rows: dict[str, Any] = {name: "samples" if tower == LANGUAGE else "units" for tower, name in vlm.towers.items()}
    handles = {tower: convert(vlm.model, list(names), rows=rows) for tower, names in vlm.candidates.items()}
    generator = torch.Generator().manual_seed(1)
    for handle in handles.values():
        for name, rank in zip(EXPERTS, (2, 3), strict=True):
            handle.add(name, rank=rank, alpha=4.0 * rank)
            for layer in handle.layers.values():
                expert = layer.bank.expert(name)
                for parameter, std in ((expert.lora_a, 0.3 * (32 / layer.in_features) ** 0.5), (expert.lora_b, 0.3)):
                    drawn = torch.randn(parameter.shape, generator=generator) * std
                    with torch.no_grad():
                        parameter.copy_(drawn)
    return handles


def _uniform(sample: int) -> list[tuple[float, float]]:
    return [MIXED[sample]] * SAMPLES


def _swap(
    vlm: VisionLanguageModel, handles: Mapping[str, ExpertHandle], tower: str, batch: Encoded, name: str
) -> Iterator[Finding]:
    off = _logits(vlm, batch)
    with _gated(vlm, handles, [tower], batch, MIXED):
        mixed = _logits(vlm, batch)
    leak, effect = 0.0, float("inf")
    for sample in range(SAMPLES):
        with _gated(vlm, handles, [tower], batch, _uniform(sample)):
            uniform = _logits(vlm, batch)
        own = _distance(uniform, off, batch, sample)
        if tower != VISION or batch.images[sample]:
            effect = min(effect, own)
        leak = max(leak, _distance(mixed, uniform, batch, sample))
    figure = f"leak {leak / max(effect, 1e-30):.1e} of an effect of {effect:.1e}"
    if effect <= 1e-3:
        yield _finding(
            4, name, tower, False, figure,
            f"Experts of the {tower} tower do not reach the logits: set declaration.{tower} to the tower that does.",
        )  # fmt: skip
        return
    ok = leak <= _tolerance(vlm) * effect
    yield _finding(4, name, tower, ok, figure, ROWS_REMEDY)


def _gradients(
    vlm: VisionLanguageModel, handles: Mapping[str, ExpertHandle], tower: str, batch: Encoded
) -> Iterator[Finding]:
    parameters = handles[tower].parameters()

    def gradients(gate: Sequence[Sequence[float]], sample: int) -> list[Tensor]:
        with _gated(vlm, handles, [tower], batch, gate):
            loss = _own(_logits(vlm, batch, grad=True), batch, sample).float().square().mean()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    leak = largest = 0.0
    for sample in range(SAMPLES):
        pairs = zip(gradients(MIXED, sample), gradients(_uniform(sample), sample), strict=True)
        for one, other in pairs:
            largest = max(largest, float(other.abs().max()))
            leak = max(leak, float((one - other).abs().max()))
    ok = 0 < largest and leak <= _tolerance(vlm) * largest
    figure = f"leak {leak / max(largest, 1e-30):.1e} of the largest gradient, {largest:.1e}"
    yield _finding(4, "gradients", tower, ok, figure, ROWS_REMEDY)


# 5


def _generation(
    vlm: VisionLanguageModel, handles: Mapping[str, ExpertHandle], prompts: Encoded, beams: int, name: str
) -> Iterator[Finding]:
    towers = list(handles)
    with _gated(vlm, handles, towers, prompts, MIXED):
        mixed = _generated(vlm, prompts, beams=beams)
    differ = []
    for sample in range(SAMPLES):
        with _gated(vlm, handles, towers, prompts, _uniform(sample)):
            uniform = _generated(vlm, prompts, beams=beams)
        if not torch.equal(mixed[sample], uniform[sample]):
            differ.append(sample)
    figure = "each sample as alone" if not differ else f"samples {differ} differ"
    yield _finding(5, name, "", not differ, figure, ROWS_REMEDY)


# 6, 7, 10


def _norms(vlm: VisionLanguageModel, batch: Encoded) -> Iterator[Finding]:
    """On the first, middle and last candidate of each tower: autograd keeps a gradient of a whole weight for each."""
    for tower, names in vlm.candidates.items():
        chosen = {n: vlm.model.get_submodule(n) for n in dict.fromkeys((names[0], names[len(names) // 2], names[-1]))}
        plain = {n: m for n, m in chosen.items() if type(m.weight) is nn.Parameter and m.weight.is_floating_point()}
        if not plain:
            yield _finding(6, "proxy norms", tower, True, "not tried: autograd has none for quantised weights")
            continue
        with GradNormRecorder(plain, model=vlm.model) as recorder:
            torch.autograd.backward(vlm.loss(batch))
        norms = recorder.norms()
        weights = [linear.weight for linear in plain.values()]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            truth = torch.autograd.grad(vlm.loss(batch), weights, allow_unused=True)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        worst = 0.0
        for name, gradient in zip(plain, truth, strict=True):
            exact = 0.0 if gradient is None else float(gradient.float().norm())
            worst = max(worst, abs(norms[name].weight - exact) / max(exact, 1e-12))
        ok = worst <= _tolerance(vlm)
        yield _finding(
            6, "proxy norms", tower, ok, f"within {worst:.1e} of autograd's",
            "The weights have other readers than their layers: leave those out by declaration.candidates.",
        )  # fmt: skip


def _loss(vlm: VisionLanguageModel, batch: Encoded) -> Iterator[Finding]:
    assert batch.labels is not None
    inputs = vlm.on_device(batch.inputs)
    with torch.no_grad():
        own = float(vlm.loss(batch))
        whole = float(vlm.model(**inputs, labels=batch.labels.to(inputs["input_ids"].device)).loss)
    ok = abs(own - whole) <= _tolerance(vlm) * max(abs(whole), 1e-3)
    yield _finding(
        7, "loss", "", ok, f"{own:.6g}, over the whole sequence {whole:.6g}", "Set declaration.logits_to_keep to false."
    )


def _features(vlm: VisionLanguageModel, probes: Probes) -> Iterator[Finding]:
    yield from ()


# What the points share


def _tolerance(vlm: VisionLanguageModel) -> float:
    """As a part of an expert's whole effect, which a gate on a wrong row changes by about 1."""
    return 1e-2 if vlm.model.dtype in (torch.float32, torch.float64) else 0.1


def _logits(vlm: VisionLanguageModel, batch: Encoded, *, grad: bool = False) -> Tensor:
    with torch.set_grad_enabled(grad):
        found: Tensor = vlm.model(**vlm.on_device(batch.inputs)).logits
    return found


def _own(logits: Tensor, batch: Encoded, sample: int) -> Tensor:
    """The logits of the sample's real tokens. Some models put image features before the text: the mask ends there."""
    mask = batch.inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or logits.shape[1] < mask.shape[1]:
        return logits[sample]
    real = mask[sample].bool().to(logits.device)
    return logits[sample, -len(real) :][real]


def _distance(one: Tensor, other: Tensor, batch: Encoded, sample: int) -> float:
    return float((_own(one, batch, sample) - _own(other, batch, sample)).abs().max())


def _generated(vlm: VisionLanguageModel, prompts: Encoded, *, beams: int) -> Tensor:
    with torch.no_grad():
        found: Tensor = vlm.model.generate(
            **vlm.on_device(prompts.inputs), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
            num_beams=beams,
        )  # fmt: skip
    return found
