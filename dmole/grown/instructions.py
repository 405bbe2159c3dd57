# SPDX-License-Identifier: Apache-2.0
"""The text of the user's question, taken out of the tokens of a prompt: the router needs it, `generate` has the tokens.

<s>user <image> x 64  Which bar is highest? </s> assistant
                      ^ after the last image token, or what the template writes before a text
                                           ^ what the template writes after a text, up to the answer
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dmole.models.chat_template import PROBE
from dmole.models.prompts import template_of
from dmole.models.vision_language import VisionLanguageModel


def instructions_in(vlm: VisionLanguageModel, inputs: Mapping[str, Tensor]) -> list[str]:
    """The last question of each left-padded prompt.

    Raises ValueError for a prompt that does not end as the model's chat template ends a question.
    """
    template = template_of(vlm.processor, vlm.declaration)
    row = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
    before, after = template.render(vlm.processor, row, prompt=True).split(PROBE)
    # The opening of the user's turn alone: what comes before it (a system message, a start token) may differ.
    opening = before.strip().splitlines()[-1] if before.strip() else ""
    masks = inputs.get("attention_mask")
    found = []
    for place, ids in enumerate(inputs["input_ids"]):
        kept = ids if masks is None else ids[masks[place].bool()]
        numbers = kept.tolist()
        if vlm.image_token_id in numbers:
            last = len(numbers) - 1 - numbers[::-1].index(vlm.image_token_id)
            numbers = numbers[last + 1 :]
        text = vlm.tokenizer.decode(numbers, skip_special_tokens=False).rstrip()
        end = after.rstrip()
        if not text.endswith(end):
            raise ValueError(
                f"instructions: got a prompt that ends with {text[-40:]!r}; expected {end!r}, with which the model's "
                f"chat template opens the answer. Pass instructions=[...], or apply the template with "
                f"add_generation_prompt=True."
            )
        text = text.removesuffix(end) if end else text
        if opening and opening in text:
            text = text.rpartition(opening)[2]
        # Tokens that close an image stand before the text.
        while (match := template.control.search(text)) is not None:
            text = text[match.end() :]
        found.append(text.strip())
    return found
