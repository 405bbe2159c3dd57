# SPDX-License-Identifier: Apache-2.0
"""Router features of any vision-language model, from its frozen towers and unmodified classes.

    vision[s] = max over the visible rows and tokens of sample s of the vision tower's output     [B, D_vision]
    text[s]   = max over the tokens of the instruction of the decoder's last hidden state         [B, D_text]

Which rows belong to which sample is `units`, as in `dmole.models.units`. A feature does not depend on the sample's
batch mates beyond the rounding of sums: padding tokens, images that only pad a batch, and patches that only pad an
image are left out of the maximum. Call both functions without gates and in evaluation mode; they build no graph.

Shape letters: B samples, L rows of the tower, T tokens of a row, D features.
Source: D-MoLE, ICML 2025, arXiv 2506.11672, section 3.3.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmole_kernels import masked_max_pool


@torch.no_grad()
def vision_features(
    model: nn.Module, tower: str, inputs: Mapping[str, Tensor], units: Sequence[int], *, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """The maxima [B, D] of the vision tower's output over each sample's rows, and which samples [B] have any.

    The tower's output is caught by a hook while `model.get_image_features` runs, or the whole model where that asks for
    something that the processor does not make. It may be [images, T, D], [rows, D], [1, rows, D], a list of such, or
    come in several calls. A sample without images has a row of zeros and False.

    Args:
        tower: the vision tower's qualified name.
        inputs: everything that the processor returned for B samples.
        units: how much of the tower's input belongs to each sample.
        width: D, needed where no sample has an image; None means `hidden_size` of the tower's config.

    Returns:
        float32 [B, D] and bool [B], on the inputs' device.

    Raises:
        ValueError: the tower was not called, its rows are no whole number a sample, or D is not known.
    """
    device = inputs["input_ids"].device
    module = model.get_submodule(tower)
    if not sum(units):
        if width is None:
            width = getattr(getattr(module, "config", None), "hidden_size", None)
        if width is None:
            raise ValueError(
                f"width: got none for a batch without images, and {tower!r} has no config.hidden_size; expected the "
                f"width of its output. Pass width."
            )
        return torch.zeros(len(units), width, device=device), torch.zeros(len(units), dtype=torch.bool, device=device)
    outputs = _outputs(model, module, inputs)
    if not outputs:
        raise ValueError(
            f"declaration.vision: got {tower!r}, which a batch with images does not call; expected the tower that the "
            f"images pass through. Set declaration.vision."
        )
    pooled, visible = _pooled_rows(outputs, sum(units))
    counts = _row_counts(len(pooled), units)
    features = [
        part.amax(0) if len(part) else pooled.new_full(pooled.shape[1:], -math.inf)
        for part in torch.split(pooled, counts)
    ]
    seen = torch.stack([part.any() for part in torch.split(visible, counts)])
    # Not `-inf * False`: that is nan.
    return torch.stack(features).where(seen[:, None], 0.0).to(device), seen.to(device)


@torch.no_grad()
def text_features(model: nn.Module, tower: str, ids: Tensor, mask: Tensor) -> Tensor:
    """float32 [B, D]: the maxima of the decoder's last hidden state over the tokens of each instruction alone.

    Args:
        tower: the qualified name of the language tower; of a model with a head, its decoder is taken.
        ids, mask: int64 [B, T], right-padded, as `dmole.models.prompts.instruction_ids` makes them.

    Raises:
        ValueError: the tower returns no last hidden state [B, T, D] for text alone.
    """
    module: Any = model.get_submodule(tower)
    if getattr(module, "get_output_embeddings", lambda: None)() is not None:
        module = module.get_decoder()
    # Nothing is generated. transformers makes a sliding window's cache on torch's default device, not on the input's.
    keywords = {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}
    hidden = getattr(module(input_ids=ids, attention_mask=mask, **keywords), "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.shape[:2] != ids.shape:
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else None
        raise ValueError(
            f"declaration.text_features: got a last hidden state {shape} from {tower!r} for {tuple(ids.shape)} tokens; "
            f"expected [samples, tokens, features]. Set declaration.text_features to the module that returns it."
        )
    return masked_max_pool(hidden.float(), mask.to(hidden.device).bool())


def _outputs(model: nn.Module, tower: nn.Module, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """What every call of the tower returned, with which of its rows and tokens are visible (None: all)."""
    caught: list[tuple[Tensor, Tensor | None]] = []
    names = inspect.signature(tower.forward).parameters

    owner = threading.get_ident()

    def hook(_: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        # Another thread that runs the model meanwhile calls this hook too, without kwargs if it is just being removed.
        if threading.get_ident() != owner:
            return
        kwargs, output = rest
        masks = {**dict(zip(names, args, strict=False)), **kwargs}
        for hidden in _hidden(output):
            caught.append((hidden, _visible(hidden, masks, inputs)))

    floating = next(p.dtype for p in tower.parameters() if p.is_floating_point())
    given = {name: value.to(floating) if value.is_floating_point() else value for name, value in inputs.items()}
    handle = tower.register_forward_hook(hook, with_kwargs=True)
    try:
        get: Any = getattr(model, "get_image_features", None)
        wanted = {} if get is None else inspect.signature(get).parameters
        named = {name: p for name, p in wanted.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if named and all(name in given for name, p in named.items() if p.default is p.empty):
            get(**{name: given[name] for name in named if name in given})
        else:
            model(**given)
    finally:
        handle.remove()
    return caught


def _hidden(output: Any) -> list[Tensor]:
    """The tensors of a tower's output, last hidden states only."""
    if isinstance(output, Tensor):
        return [output]
    found = getattr(output, "last_hidden_state", None)
    if found is not None:
        return _hidden(found)
    if isinstance(output, list):
        return [hidden for item in output for hidden in _hidden(item)]
    return _hidden(output[0])


def _visible(hidden: Tensor, arguments: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Which entries of `hidden`, without its features, are no padding: bool hidden.shape[:-1], or None for all.

    Padding comes in two forms: masks that the tower itself gets (of patches, of tiles), and images of zeros that fill a
    batch in which samples have different numbers of images.
    """
    shape = hidden.shape[:-1]
    visible: Tensor | None = None
    for name, mask in arguments.items():
        if "mask" not in name or not isinstance(mask, Tensor) or mask.is_floating_point():
            continue
        fitted = _fitted(mask.to(hidden.device).bool(), shape)
        if fitted is not None:
            visible = fitted if visible is None else visible & fitted
    pixels = inputs.get("pixel_values")
    if isinstance(pixels, Tensor) and pixels.dim() >= 5:
        filled = (pixels != 0).flatten(-3).any(-1).to(hidden.device)
        # [samples, images, tokens, features]; a tower that gets the images in one row has [images, tokens, features].
        fitted = _fitted(filled, shape) if len(shape) > filled.dim() else None
        if fitted is None and filled.numel() == shape[0]:
            fitted = _fitted(filled.flatten(), shape)
        if fitted is not None:
            visible = fitted if visible is None else visible & fitted
    return visible


def _fitted(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """`mask` over the leading dimensions of `shape`, or with its last ones as tokens; None where it fits neither."""
    if mask.dim() > len(shape) and mask.flatten(1).shape == shape:
        return mask.flatten(1)
    if mask.shape != shape[: mask.dim()]:
        return None
    return mask.view(*mask.shape, *[1] * (len(shape) - mask.dim())).expand(shape)


def _pooled_rows(outputs: Sequence[tuple[Tensor, Tensor | None]], units: int) -> tuple[Tensor, Tensor]:
    """The outputs as rows [L, D] with -inf where nothing is visible, and which rows [L] are."""
    rows: list[Tensor] = []
    seen: list[Tensor] = []
    for hidden, visible in outputs:
        if visible is None:
            visible = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        if hidden.shape[0] == 1 and hidden.dim() > 2:
            hidden, visible = hidden[0], visible[0]
        if len(outputs) > 1 and len(outputs) == units:
            # One output an image: its rows need not be as many as another's.
            hidden, visible = hidden[None], visible[None]
        hidden = hidden.float().masked_fill(~visible[..., None], -math.inf)
        rows.append(hidden.flatten(1, -2).amax(1) if hidden.dim() > 2 else hidden)
        seen.append(visible.flatten(1).any(1) if visible.dim() > 1 else visible)
    return torch.cat(rows), torch.cat(seen)


def _row_counts(rows: int, units: Sequence[int]) -> list[int]:
    total = sum(units)
    if any(rows * unit % total for unit in units):
        raise ValueError(
            f"units: got {list(units)} for the {rows} rows of the vision tower's output; expected a whole number of "
            f"rows for each sample. Set declaration.rows."
        )
    return [rows * unit // total for unit in units]
