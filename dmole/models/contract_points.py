# SPDX-License-Identifier: Apache-2.0
"""The points of the contract test (`dmole.models.contract`): each yields findings about one model."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmole.models.contract_probes import (
    Finding,
    Probes,
    distance,
    finding,
    generated,
    logits,
    own_logits,
    relative,
    tolerance,
)
from dmole.models.identity import weight_bytes
from dmole.models.progress_bars import no_progress_bars
from dmole.models.prompts import Encoded
from dmole.models.towers import LANGUAGE, VISION, Calls
from dmole.models.vision_language import VisionLanguageModel
from dmole_kernels import ExpertHandle, GradNormRecorder, convert

EXPERTS = ("contract_a", "contract_b")
MIXED = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
SAMPLES = len(MIXED)
QUESTIONS = ("What is this?", "Which of these is the larger one, and why?", "Name the colours.")
# Saving a larger model to a temporary folder takes longer than the rest of the test together.
SAVED_BYTES = 4 * 2**30
ROWS_REMEDY = "Set declaration.rows to images, tokens, tiles or padded."


# 1, 2


def saved(vlm: VisionLanguageModel, batch: Encoded, save: bool | None) -> Iterator[Finding]:
    size = weight_bytes(vlm.model)
    if save is False or (save is None and size > SAVED_BYTES):
        yield finding(1, "save and load", "", True, f"not tried: {size / 2**30:.1f} GiB of weights")
        return
    with torch.no_grad(), no_progress_bars(), tempfile.TemporaryDirectory() as folder:
        own = float(vlm.loss(batch))
        vlm.model.save_pretrained(folder)
        again = type(vlm.model).from_pretrained(
            folder, dtype=vlm.model.dtype, attn_implementation=vlm.model.config._attn_implementation
        )
        again.eval().to(vlm.model.device)
        loss = float(dataclasses.replace(vlm, model=again).loss(batch))
    # Not to the bit: a product's last bits may depend on where its operands are in memory.
    yield finding(
        1, "save and load", "", abs(loss - own) <= 1e-5 * max(abs(own), 1.0), f"loss {own:.6g}, loaded {loss:.6g}",
        "save_pretrained or from_pretrained of this family loses weights: train from the original folder only.",
    )  # fmt: skip


def structure(vlm: VisionLanguageModel, batch: Encoded) -> Iterator[Finding]:
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
        yield finding(
            2, "towers and candidates", tower, not (missing or wrong or twice), figure,
            "Set declaration.candidates to a regular expression that leaves these out.",
        )  # fmt: skip


# 3, 9


def same_logits(vlm: VisionLanguageModel, before: Tensor, batch: Encoded) -> Iterator[Finding]:
    yield unchanged(3, "attached, no gates", before, logits(vlm, batch))


def same_text(vlm: VisionLanguageModel, before: Tensor, prompts: Encoded) -> Iterator[Finding]:
    yield unchanged(9, "generate, no gates", before, generated(vlm, prompts, beams=1))


def unchanged(point: int, name: str, before: Tensor, after: Tensor) -> Finding:
    same = before.shape == after.shape and torch.equal(before, after)
    return finding(
        point, name, "", same, "equal to the bit" if same else "not equal",
        "The model computes with its linears' weights by another way: leave those out by declaration.candidates.",
    )  # fmt: skip


# 4


@contextmanager
def gated(
    vlm: VisionLanguageModel, handles: Mapping[str, ExpertHandle], towers: Sequence[str], batch: Encoded,
    gate: Sequence[Sequence[float]],
) -> Iterator[None]:  # fmt: skip
    units = vlm.units(batch)
    with ExitStack() as stack:
        for tower in towers:
            stack.enter_context(handles[tower].use(torch.tensor(gate, device=vlm.device), EXPERTS, units=units[tower]))
        yield


def attached(vlm: VisionLanguageModel) -> dict[str, ExpertHandle]:
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
                    drawn = torch.randn(parameter.shape, generator=generator, device="cpu") * std
                    with torch.no_grad():
                        parameter.copy_(drawn)
    return handles


def uniform_gate(sample: int) -> list[tuple[float, float]]:
    return [MIXED[sample]] * SAMPLES


def unreached(tower: str) -> str:
    return f"Experts of the {tower} tower do not reach the logits: set declaration.{tower} to the tower that does."


def logit_swap(
    vlm: VisionLanguageModel, handles: Mapping[str, ExpertHandle], tower: str, batch: Encoded, name: str
) -> Iterator[Finding]:
    off = logits(vlm, batch)
    with gated(vlm, handles, [tower], batch, MIXED):
        mixed = logits(vlm, batch)
    leak, effect = 0.0, float("inf")
    for sample in range(SAMPLES):
        with gated(vlm, handles, [tower], batch, uniform_gate(sample)):
            uniform = logits(vlm, batch)
        own = distance(uniform, off, batch, sample)
        if tower != VISION or batch.images[sample]:
            effect = min(effect, own)
        leak = max(leak, distance(mixed, uniform, batch, sample))
    figure = f"leak {leak / max(effect, 1e-30):.1e} of an effect of {effect:.1e}"
    if effect <= 1e-3:
        yield finding(4, name, tower, False, figure, unreached(tower))
        return
    ok = leak <= tolerance(vlm) * effect
    yield finding(4, name, tower, ok, figure, ROWS_REMEDY)


def gradient_swap(
    vlm: VisionLanguageModel, handles: Mapping[str, ExpertHandle], tower: str, batch: Encoded
) -> Iterator[Finding]:
    parameters = handles[tower].parameters()

    def gradients(gate: Sequence[Sequence[float]], sample: int) -> list[Tensor]:
        with gated(vlm, handles, [tower], batch, gate):
            loss = own_logits(logits(vlm, batch, grad=True), batch, sample).float().square().mean()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    leak = largest = 0.0
    for sample in range(SAMPLES):
        pairs = zip(gradients(MIXED, sample), gradients(uniform_gate(sample), sample), strict=True)
        for one, other in pairs:
            largest = max(largest, float(other.abs().max()))
            leak = max(leak, float((one - other).abs().max()))
    ok = 0 < largest and leak <= tolerance(vlm) * largest
    figure = f"leak {leak / max(largest, 1e-30):.1e} of the largest gradient, {largest:.1e}"
    yield finding(4, "gradients", tower, ok, figure, ROWS_REMEDY if largest else unreached(tower))


# 5


def text_swap(
    vlm: VisionLanguageModel, handles: Mapping[str, ExpertHandle], prompts: Encoded, beams: int, name: str
) -> Iterator[Finding]:
    towers = list(handles)
    try:
        generated(vlm, prompts, beams=beams)
    except ValueError as error:
        # Llama 4 does not repeat its images for beams: no fault of the experts.
        yield finding(5, name, "", True, f"not tried, the base model refuses it: {error}"[:200])
        return
    with gated(vlm, handles, towers, prompts, MIXED):
        mixed = generated(vlm, prompts, beams=beams)
    differ = []
    for sample in range(SAMPLES):
        with gated(vlm, handles, towers, prompts, uniform_gate(sample)):
            uniform = generated(vlm, prompts, beams=beams)
        if not torch.equal(mixed[sample], uniform[sample]):
            differ.append(sample)
    figure = "each sample as alone" if not differ else f"samples {differ} differ"
    yield finding(5, name, "", not differ, figure, ROWS_REMEDY)


# 6, 7, 10


def proxy_norms(vlm: VisionLanguageModel, batch: Encoded) -> Iterator[Finding]:
    """On the first, middle and last candidate of each tower: autograd keeps a gradient of a whole weight for each."""
    for tower, names in vlm.candidates.items():
        chosen = {n: vlm.model.get_submodule(n) for n in dict.fromkeys((names[0], names[len(names) // 2], names[-1]))}
        plain = {
            name: linear
            for name, linear in chosen.items()
            if type(linear.weight) is nn.Parameter and linear.weight.is_floating_point() and not linear.weight.is_meta
        }
        if not plain:
            yield finding(6, "proxy norms", tower, True, "not tried: the weights are quantised or offloaded")
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
        ok = worst <= tolerance(vlm)
        yield finding(
            6, "proxy norms", tower, ok, f"within {worst:.1e} of autograd's",
            "The weights have other readers than their layers: leave those out by declaration.candidates.",
        )  # fmt: skip


def whole_loss(vlm: VisionLanguageModel, batch: Encoded) -> Iterator[Finding]:
    assert batch.labels is not None
    inputs = vlm.on_device(batch.inputs)
    with torch.no_grad():
        own = float(vlm.loss(batch))
        whole = float(vlm.model(**inputs, labels=batch.labels.to(inputs["input_ids"].device)).loss)
    ok = abs(own - whole) <= tolerance(vlm) * max(abs(whole), 1e-3)
    yield finding(
        7, "loss", "", ok, f"{own:.6g}, over the whole sequence {whole:.6g}", "Set declaration.logits_to_keep to false."
    )


def router_features(vlm: VisionLanguageModel, probes: Probes) -> Iterator[Finding]:
    """Vision features of the second batch and of each of its samples alone; text features of unequal questions."""
    remedy = "Set declaration.rows (vision) or declaration.text_features (language)."
    if probes.alone and VISION in vlm.towers:
        together, seen = vlm.vision_features(probes.two_none_one)
        each = [vlm.vision_features(alone) for alone in probes.alone]
        single, alone = torch.cat([one for one, _ in each]), torch.cat([has for _, has in each])
        off = relative(together, single)
        ok = off <= tolerance(vlm) and torch.equal(seen, alone)
        yield finding(10, "router features", VISION, ok, f"batch and alone within {off:.1e}", remedy)
    if vlm.processor is not None:
        off = relative(vlm.text_features(QUESTIONS), torch.cat([vlm.text_features([text]) for text in QUESTIONS]))
        yield finding(
            10, "router features", LANGUAGE, off <= tolerance(vlm), f"batch and alone within {off:.1e}", remedy
        )
