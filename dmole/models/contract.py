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

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dmole.models import contract_points as points
from dmole.models.contract_points import QUESTIONS, SAMPLES
from dmole.models.contract_probes import Finding, Probes, finding, generated, logits
from dmole.models.drawn import drawn_conversation, drawn_image
from dmole.models.vision_language import VisionLanguageModel

__all__ = ["Finding", "Probes", "check", "drawn_probes"]


def drawn_probes(vlm: VisionLanguageModel) -> Probes:
    """The batches of a model with a processor: drawn images of unequal shapes, questions of unequal length."""
    shapes = ((64, 64), (128, 64), (64, 160), (96, 96))
    images = [drawn_image(*shape, seed=number) for number, shape in enumerate(shapes)]

    def conversations(owners: Sequence[int]) -> list[list[dict[str, Any]]]:
        own = [[image for image, owner in zip(images, owners, strict=False) if owner == s] for s in range(SAMPLES)]
        return [drawn_conversation(mine, question) for mine, question in zip(own, QUESTIONS, strict=True)]

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

    def collect(point: int, name: str, tower: str, found: Callable[..., Iterator[Finding]], *arguments: Any) -> None:
        try:
            findings.extend(found(vlm, *arguments))
        except ValueError as error:
            # A refusal is an answer about this model, and the points after it have theirs.
            said = str(error)
            remedy = f"{said} {points.ROWS_REMEDY}" if point in (4, 5, 10) and "declaration." not in said else said
            findings.append(finding(point, name, tower, False, "refused", remedy))

    unequal, owned = probes.one_two_one, probes.two_none_one
    before, plain = generated(vlm, probes.prompts, beams=1), logits(vlm, owned)
    collect(1, "save and load", "", points.saved, owned, save)
    collect(2, "towers and candidates", "", points.structure, owned)
    collect(6, "proxy norms", "", points.proxy_norms, owned)
    collect(7, "loss", "", points.whole_loss, owned)
    collect(10, "router features", "", points.router_features, probes)
    handles = points.attached(vlm)
    try:
        collect(3, "attached, no gates", "", points.same_logits, plain, owned)
        for tower in handles:
            for owners, batch in (("0 1 1 2", unequal), ("0 0 2", owned)):
                name = f"logits, images of {owners}"
                collect(4, name, tower, points.logit_swap, handles, tower, batch, name)
            collect(4, "gradients", tower, points.gradient_swap, handles, tower, owned)
        for beams, name in ((1, "generate, greedy"), (2, "generate, 2 beams")):
            collect(5, name, "", points.text_swap, handles, probes.prompts, beams, name)
        collect(9, "generate, no gates", "", points.same_text, before, probes.prompts)
    finally:
        for handle in handles.values():
            handle.unconvert()
    return sorted(findings, key=lambda finding: finding.point)
