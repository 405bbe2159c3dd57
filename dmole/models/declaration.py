# SPDX-License-Identifier: Apache-2.0
"""What may be said about a model where the general rules are wrong for it.

Towers, candidates and rows are found by rules that read the model (`dmole.models.towers`, `dmole.models.units`).
`KNOWN` holds one line for each family of transformers that the rules misread; a user gives the same fields in YAML:

    declaration:
      vision: model.encoder.image
      rows: tiles
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dmole.config_error import ConfigError, did_you_mean, require
from dmole.patterns import check_pattern

Rows = Literal["auto", "tokens", "images", "tiles", "padded"]
Labels = Literal["prefix", "assistant_mask"]


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """Facts about a model; every field may be left out, which leaves it to the rules."""

    # The vision tower's qualified name, as in model.named_modules().
    vision: str | None = None
    # The language tower's qualified name; "" is the whole model.
    language: str | None = None
    # A list of endings (q_proj, mlp.fc1) keeps those of the linears that the rule finds; a text is a regular expression
    # that matches the whole name, and is taken over all linears of a tower instead.
    candidates: tuple[str, ...] | str | None = None
    # What the rows of the vision tower are. images: every image has as many. tokens: as many as the image has tokens in
    # input_ids, times a constant. tiles: as image_grid_pinpoints cuts them. padded: every sample has as many, images or
    # not. auto: found by running the model.
    rows: Rows = "auto"
    # The id that stands for one image token in input_ids.
    image_token_id: int | None = None
    # Qualified name of the module whose last hidden state is the router's text feature.
    text_features: str | None = None
    # Whether the loss asks the head for the last positions only; none: where forward names logits_to_keep.
    logits_to_keep: bool | None = None
    # How the answer's tokens are found, see dmole.models.answers.
    labels: Labels = "prefix"
    # Texts of the chat template that look like special tokens and that the model reads as plain text.
    plain_markers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vision", "language", "text_features"):
            value = getattr(self, name)
            require(
                value is None or isinstance(value, str), f"declaration.{name}", value,
                "the qualified name of a module, as in model.named_modules()",
            )  # fmt: skip
        if isinstance(self.candidates, str):
            try:
                check_pattern("declaration.candidates", self.candidates)
            except ConfigError as error:
                raise ConfigError(f"{error} Give a list for endings, such as [q_proj, v_proj].") from error
        elif self.candidates is not None:
            named = isinstance(self.candidates, tuple | list) and len(self.candidates) > 0
            fits = named and all(isinstance(ending, str) and ending for ending in self.candidates)
            # As it was written: a tuple was a list in YAML.
            shown = list(self.candidates) if isinstance(self.candidates, tuple) else self.candidates
            require(fits, "declaration.candidates", shown, "endings of names, such as [q_proj, v_proj]")
        require(self.rows in get_args(Rows), "declaration.rows", self.rows, f"one of {', '.join(get_args(Rows))}")
        require(
            self.labels in get_args(Labels), "declaration.labels", self.labels, f"one of {', '.join(get_args(Labels))}"
        )
        markers: object = self.plain_markers
        require(
            isinstance(markers, tuple) and all(isinstance(text, str) for text in markers),
            "declaration.plain_markers", self.plain_markers, "texts such as ['<user>']",
        )  # fmt: skip
        token = self.image_token_id
        require(
            token is None or (isinstance(token, int) and not isinstance(token, bool) and token >= 0),
            "declaration.image_token_id", token, "a token's id",
        )  # fmt: skip
        require(
            self.logits_to_keep in (None, True, False), "declaration.logits_to_keep", self.logits_to_keep,
            "true, false or nothing",
        )  # fmt: skip

    def over(self, below: Declaration) -> Declaration:
        """This declaration where it says something, `below` elsewhere."""
        said = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return dataclasses.replace(below, **said)


def read_declaration(plain: Mapping[str, Any]) -> Declaration:
    """`Declaration` from a mapping, such as a YAML section. Raises ConfigError that names the key."""
    known = [field.name for field in dataclasses.fields(Declaration)]
    values = dict(plain)
    for key in values:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ConfigError(f"declaration: got the key {key!r}; {hint} Expected some of {', '.join(known)}.")
    for key in ("candidates", "plain_markers"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    return Declaration(**values)


# By `config.model_type`. A line here is a family that the rules misread, found by the contract test.
KNOWN: dict[str, Declaration] = {
    # An image is cut into tiles whose number its tokens do not tell.
    "llava_next": Declaration(rows="tiles"),
    "llava_next_video": Declaration(rows="tiles"),
    "llava_onevision": Declaration(rows="tiles"),
    "granite4_vision": Declaration(rows="tiles"),
    # The tower gets as many images for every sample, black ones where a sample has fewer.
    "mllama": Declaration(rows="padded"),
    # Cross-attention to the image is a stack of its own, beside that of the decoder's layers.
    "idefics": Declaration(rows="padded", candidates=r".*layers\.\d+\..*"),
    # Encoder and decoder are two stacks of unlike layers.
    "florence2": Declaration(candidates=r".*(layers|blocks)\.\d+\..*"),
}


def declared(model_type: str, given: Declaration) -> Declaration:
    """What holds for a model of this type: `given` takes precedence over the line in `KNOWN`."""
    return given.over(KNOWN.get(model_type, Declaration()))
