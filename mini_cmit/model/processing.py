# SPDX-License-Identifier: Apache-2.0
"""The processor of the mini and the tiny model, and what makes transformers' Auto classes find its parts.

A conversation becomes ``<bos> <image> x n <user> instruction <assistant> answer <eos>``, with n as many tokens as the
vision tower has patches. A space goes in front of every text, so that a word has the same tokens at the start of a text
as inside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, PretrainedConfig
from transformers.models.llava import LlavaProcessor

from mini_cmit.model.image_processing import MiniImageProcessor, PixelImageProcessor

# The images of a turn stand in front of it, as in pretraining, wherever they are among the turn's texts.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content %}
{%- if message.role == 'user' %}
{%- for part in parts if part.type == 'image' %}{{ '<image>' }}{% endfor %}
{{- '<user>' }}
{%- for part in parts if part.type == 'text' %}{{ ' ' + part.text }}{% endfor %}
{%- elif message.role == 'assistant' %}
{{- '<assistant>' }}
{%- generation %}
{%- for part in parts if part.type == 'text' %}{{ ' ' + part.text }}{% endfor %}
{{- eos_token }}
{%- endgeneration %}
{%- else %}
{{- raise_exception("role: got '" + message.role + "'; expected user or assistant. The model knows no other.") }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}
"""


class MiniProcessor(LlavaProcessor):
    """LLaVA's processor for maps of any number of channels; LLaVA's own knows a height only beside 1 or 3 of them."""

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **_: Any) -> str:
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        tokens: str = self.image_token * ((height // self.patch_size) * (width // self.patch_size))
        return tokens


class _MiniKey(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Under which `AutoImageProcessor` and `AutoProcessor` hold the mini model's classes; the model is a LLaVA."""

    model_type = "mini_cmit"


class _TinyKey(PretrainedConfig):  # type: ignore[no-untyped-call]
    model_type = "mini_cmit_tiny"


def register() -> None:
    """Makes `AutoProcessor.from_pretrained` find the classes of this package; twice is as good as once."""
    for key, kind in ((_MiniKey, MiniImageProcessor), (_TinyKey, PixelImageProcessor)):
        # The same class whether torchvision is installed or not: features must not depend on it.
        AutoImageProcessor.register(key, image_processor_classes={"pil": kind, "torchvision": kind}, exist_ok=True)
    AutoProcessor.register(_MiniKey, MiniProcessor, exist_ok=True)  # type: ignore[no-untyped-call]
