# SPDX-License-Identifier: Apache-2.0
"""A vision-language model of transformers, unmodified, with what continual training needs to know about it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dmole.models import features, identity, prompts
from dmole.models.chat_template import Conversation
from dmole.models.declaration import Declaration, Rows, declared
from dmole.models.drawn import drawn_conversation, drawn_image
from dmole.models.prompts import IGNORE, Encoded
from dmole.models.towers import LANGUAGE, VISION, Calls, find_candidates, find_towers, refuse_uncalled
from dmole.models.units import check_rule, image_tokens, measured_rows, rule_of, vision_units

# Square, wide, tall; small ones and ones that processors cut into tiles.
SHAPES = ((48, 48), (96, 32), (32, 96), (448, 448), (896, 448), (224, 672))


@dataclass(frozen=True, kw_only=True)
class VisionLanguageModel:
    """Made by `dmole.models.loading.load`, or by `wrap` around a model and a processor that are there already.

    The model is frozen and in evaluation mode; its classes are transformers' own.

    Attributes:
        model: any model of `AutoModelForImageTextToText`.
        processor: its `AutoProcessor`; None where batches are made elsewhere.
        declaration: what holds for the model: the caller's fields over those of `KNOWN`.
        towers: qualified names by "vision" and "language"; a model may lack one.
        candidates: by tower, the linears that may carry experts.
        source: the folder or hub id that it was loaded from, "" for a model that was made in memory.
    """

    model: Any
    processor: Any
    declaration: Declaration
    towers: dict[str, str]
    candidates: dict[str, tuple[str, ...]]
    source: str = ""

    @property
    def rows(self) -> dict[str, Literal["samples", "units"]]:
        """By tower, what the rows of its layers are: a vision tower without units would take images for samples."""
        kinds: dict[str, Literal["samples", "units"]] = {VISION: "units", LANGUAGE: "samples"}
        return {tower: kinds[tower] for tower in self.candidates}

    @property
    def image_token_id(self) -> int | None:
        """The id of an image token in `input_ids`: declared, the config's, or the processor's."""
        if self.declaration.image_token_id is not None:
            return self.declaration.image_token_id
        for holder, name in (
            (self.model.config, "image_token_id"),
            (self.model.config, "image_token_index"),
            (self.processor, "image_token_id"),
        ):
            found = getattr(holder, name, None)
            if isinstance(found, int):
                return found
        return None

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embeddings, or the one that they are loaded to for their forward."""
        embeddings = self.model.get_input_embeddings()
        hook = getattr(embeddings, "_hf_hook", None)
        elsewhere = getattr(hook, "execution_device", None) if embeddings.weight.is_meta else None
        return embeddings.weight.device if elsewhere is None else torch.device(elsewhere)

    def encode(self, conversations: Sequence[Conversation], *, with_answers: bool) -> Encoded:
        """Conversations as a batch on the CPU, see `dmole.models.prompts.encode`."""
        if self.processor is None:
            raise ValueError(
                "processor: got None; expected the processor of the model. Load the model with dmole.models.load, or "
                "pass wrap(model, processor)."
            )
        if with_answers and self.model.config.is_encoder_decoder:
            raise ValueError(
                f"model: got {type(self.model).__name__}, an encoder-decoder, for which a conversation with its answer "
                f"would put the answer into the encoder's input; expected a decoder-only model. Choose another one."
            )
        return prompts.encode(self.processor, conversations, with_answers=with_answers, declaration=self.declaration)

    def on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs on the device of the model's embeddings; floating ones in the model's dtype."""
        device, dtype = self.device, self.model.dtype

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype) if value.is_floating_point() else value.to(device)

        return {name: moved(value) for name, value in inputs.items()}

    def units(self, encoded: Encoded) -> dict[str, list[int]]:
        """By tower, how much of its input belongs to each sample of the batch: `units` of `ExpertGates.use`.

        With rows "auto", the vision tower's rows are measured by a forward that is left at its first candidate
        (`ready` finds the rule once, so that no batch is measured). Raises ValueError where rows cannot be told apart.
        """
        found = {}
        if VISION in self.candidates:
            found[VISION] = self._vision_units(encoded)
        if LANGUAGE in self.candidates:
            found[LANGUAGE] = [1] * len(encoded.images)
        return found

    def _vision_units(self, encoded: Encoded) -> list[int]:
        rows, length = self.declaration.rows, None
        if rows == "auto" and any(encoded.images):
            length = self.vision_rows(encoded)
        return vision_units(
            rows, images=encoded.images, inputs=encoded.inputs, image_token_id=self.image_token_id,
            config=self.model.config, length=length,
        )  # fmt: skip

    def vision_rows(self, encoded: Encoded) -> int:
        """L of the vision tower's first candidate in this batch."""
        # A tower of convolutions has no candidates, and its features have rows as well.
        layers = self.candidates.get(VISION, (self.towers[VISION],))
        return measured_rows(self.model, layers, self.on_device(encoded.inputs))

    def loss(self, encoded: Encoded) -> Tensor:
        """The model's own loss for the labels, mean over the answers' tokens. Everything that the processor returned
        goes to forward: without `token_type_ids` Gemma 3 and PaliGemma compute another loss.

        Where forward names `logits_to_keep`, the head computes logits from one position before the first answer on.

        Raises:
            ValueError: without labels, or for logits of another length than was asked for.
        """
        if encoded.labels is None:
            raise ValueError("labels: got None; expected those of the answers. Encode with with_answers=True.")
        inputs = self.on_device(encoded.inputs)
        labels = encoded.labels.to(inputs["input_ids"].device)
        if not self.keeps_logits:
            return cast(Tensor, self.model(**inputs, labels=labels, use_cache=False).loss)
        first = int((labels != IGNORE).any(dim=0).int().argmax())
        keep = labels.shape[1] - max(first - 1, 0)
        output = self.model(**inputs, labels=labels[:, -keep:], logits_to_keep=keep, use_cache=False)
        if output.logits.shape[1] != keep:
            raise ValueError(
                f"logits_to_keep: got logits of {output.logits.shape[1]} positions for {keep}; expected as many, or "
                f"the loss would be that of other tokens. Set declaration.logits_to_keep to false."
            )
        return cast(Tensor, output.loss)

    @property
    def keeps_logits(self) -> bool:
        """Whether the loss asks the head for the last positions only. Encoder-decoders shift their labels otherwise,
        and a forward that takes the keyword by **kwargs may drop it."""
        if self.declaration.logits_to_keep is not None:
            return self.declaration.logits_to_keep
        return not self.model.config.is_encoder_decoder and takes(self.model, "logits_to_keep")

    def vision_features(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """The router's vision features [B, D] and which samples have any, see `dmole.models.features`."""
        if VISION not in self.towers:
            raise ValueError(
                f"vision: got towers {self.towers}; expected a vision tower, which the router reads. Set "
                f"declaration.vision."
            )
        units = self._vision_units(encoded)
        return features.vision_features(self.model, self.towers[VISION], self.on_device(encoded.inputs), units)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """The router's text features [B, D] of instructions alone, see `dmole.models.features`."""
        ids, mask = prompts.instruction_ids(self.processor, texts, declaration=self.declaration)
        module = self.towers[LANGUAGE] if self.declaration.text_features is None else self.declaration.text_features
        return features.text_features(self.model, module, ids.to(self.device), mask.to(self.device))

    def decode(self, rows: Iterable[Sequence[int]]) -> list[tuple[str, bool]]:
        """Each row of generated tokens as text up to its first end token, and whether it has one."""
        ends, answers = self.end_token_ids, []
        for ids in rows:
            length = next((place for place, token in enumerate(ids) if token in ends), None)
            text = cast(str, self.tokenizer.decode(ids[:length], skip_special_tokens=True)).strip()
            answers.append((text, length is not None))
        return answers

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def end_token_ids(self) -> frozenset[int]:
        """What ends an answer: where generation stops (`prompts.stop_ids`), and the tokenizer's own end token."""
        stops = prompts.stop_ids(self.processor, self.model.generation_config, declaration=self.declaration)
        own = self.tokenizer.eos_token_id
        return frozenset(stops if own is None else [*stops, own])

    def inputs_digest(self) -> str:
        """The sha256 of what turns conversations into tensors: processor, tokenizer, chat template, labels' rule."""
        settings = {
            name: part.to_dict() if hasattr(part, "to_dict") else str(part)
            for name in ("image_processor", "video_processor", "feature_extractor")
            if (part := getattr(self.processor, name, None)) is not None
        }
        rules: Any = None
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # Padding and truncation are left out: calls change them.
            whole = json.loads(backend.to_str())
            rules = [whole[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
        own = {
            name: value
            for name, value in vars(self.processor).items()
            if isinstance(value, str | int | float | bool | type(None))
        }
        template = getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        parts = [type(self.processor).__name__, own, settings, rules, template, self.declaration.labels]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def base_identity(self, *, full: bool | None = None) -> dict[str, Any]:
        """Which base this is, see `dmole.models.identity.base_identity`."""
        return identity.base_identity(self.model, self.source, full=full)

    def ready(self) -> VisionLanguageModel:
        """Call it before training: the same model with "auto" rows resolved, after what is assumed has been checked.

        Images of several shapes are drawn; the rows of the vision tower are measured for each, which gives the rule or
        has to agree with the declared one, and one forward has to call every candidate. Raises ValueError that names
        the field to set.
        """
        declaration = self.declaration
        if VISION in self.candidates and declaration.rows != "padded":
            declaration = replace(declaration, rows=self._checked_rule())
        # Two images, for the units that a text-only tower needs none of.
        self.refuse_uncalled_candidates(
            self.encode([drawn_conversation([drawn_image(*SHAPES[0])] * 2)], with_answers=True)
        )
        return replace(self, declaration=declaration)

    def _checked_rule(self) -> Rows:
        """The rule for rows of the vision tower: found, or the declared one if it fits what is measured."""
        rows, measured, tiles = self.declaration.rows, [], []
        for shape in SHAPES:
            # Two samples: of a single image [1, T, d] the second dimension would be counted. As conversations of one
            # image each, since some processors treat several images in a prompt otherwise.
            encoded = self.encode([drawn_conversation([drawn_image(*shape)])] * 2, with_answers=True)
            tokens = image_tokens(encoded.inputs, self.image_token_id)
            measured.append((self.vision_rows(encoded), None if tokens is None else sum(tokens)))
            if rows == "tiles":
                tiles.append(sum(self._vision_units(encoded)))
        if rows == "auto":
            return rule_of(measured)
        check_rule(rows, measured, tiles or None)
        return rows

    def refuse_uncalled_candidates(self, encoded: Encoded) -> None:
        """Runs one forward, without gradients, of a batch with images and text. Raises ValueError, with the field to
        set, for a candidate that it does not call: an expert there would never act."""
        names = [name for tower in self.candidates.values() for name in tower]
        with Calls(self.model, names) as calls, torch.no_grad():
            self.model(**self.on_device(encoded.inputs))
        missing = set(calls.missing)
        refuse_uncalled({t: [name for name in own if name in missing] for t, own in self.candidates.items()})


def wrap(
    model: nn.Module, processor: Any = None, declaration: Declaration | None = None, *, source: str = ""
) -> VisionLanguageModel:
    """Towers and candidates of a model that is there; freezes it. Raises ValueError, see `dmole.models.towers`."""
    config: Any = getattr(model, "config", None)
    resolved = declared(getattr(config, "model_type", ""), declaration or Declaration())
    if resolved.logits_to_keep and getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "declaration.logits_to_keep: got true for an encoder-decoder, whose labels are a sequence of their own; "
            "expected false, or the loss would be that of other tokens. Leave it out."
        )
    towers = find_towers(model, resolved)
    candidates = find_candidates(model, towers, resolved)
    model.requires_grad_(False).eval()
    return VisionLanguageModel(
        model=model, processor=processor, declaration=resolved, towers=towers, candidates=candidates, source=source
    )


def takes(model: nn.Module, keyword: str) -> bool:
    """Whether the model's forward names this keyword: one that `**kwargs` swallows may have no effect."""
    return keyword in inspect.signature(type(model).forward).parameters
