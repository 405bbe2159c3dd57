# SPDX-License-Identifier: Apache-2.0
"""Every op of this package in plain PyTorch: the specification. In float64 it is the truth other backends are held to.

Nothing here is registered, checked or chosen; the op files do that. These functions also are the `reference` backend.

Shape letters: N rows (tokens), D in_features, P out_features, E experts, R packed ranks (sum of the experts' ranks),
G gate rows (each covers N / G consecutive rows), B samples, T tokens (grad norms) or tasks (router), H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmole_kernels.philox import dropout_keep_mask

# ---- multi-expert LoRA: the packed, column-gated form -----------------------------------------------------------------


def _packed(tensors: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
    packed = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
    return packed.to(dtype)


def column_gate(gate_GE: Tensor, scale: Sequence[float], ranks: Sequence[int], dtype: torch.dtype) -> Tensor:
    """C[g, j] = gate[g, e(j)] s[e(j)] as [G, 1, R], or [G, 1, 1] for a single expert (it broadcasts)."""
    if len(ranks) == 1:
        return (gate_GE * scale[0]).to(dtype).unsqueeze(1)
    pieces = [(gate_GE[:, e, None] * scale[e]).expand(-1, rank) for e, rank in enumerate(ranks)]
    return torch.cat(pieces, 1).to(dtype).unsqueeze(1)


def dropped_input(x_ND: Tensor, dropout: float, seed: int, stream: int) -> Tensor:
    """x^ = x * keep / (1 - q)."""
    keep_ND = dropout_keep_mask(seed, x_ND.shape[0], x_ND.shape[1], dropout, stream=stream, device=x_ND.device)
    return (x_ND * keep_ND).mul_(1.0 / (1.0 - dropout))


def multi_lora_forward(
    x: Tensor, base: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], gate_GE: Tensor,
    scale: Sequence[float], dropout: float, per_expert: bool, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S = x^ A^T, y = base + (S * C) B^T. Returns y in base's shape and S [N, R]; computes in base's dtype."""
    dtype = x.dtype if base is None else base.dtype
    ranks = [a.shape[0] for a in lora_a]
    x_ND = x.reshape(-1, x.shape[-1]).to(dtype)
    b_PR = _packed(lora_b, 1, dtype)
    if seed is not None and dropout > 0.0 and per_expert:
        number = int(seed.item())
        shrunk = [dropped_input(x_ND, dropout, number, e) @ a.to(dtype).t() for e, a in enumerate(lora_a)]
        s_NR = torch.cat(shrunk, 1)
    else:
        if seed is not None and dropout > 0.0:
            x_ND = dropped_input(x_ND, dropout, int(seed.item()), 0)
        s_NR = x_ND @ _packed(lora_a, 0, dtype).t()
    gated_NR = _gated(s_NR, column_gate(gate_GE, scale, ranks, dtype))
    if base is None:
        return (gated_NR @ b_PR.t()).view(*x.shape[:-1], b_PR.shape[0]), s_NR
    y_NP = torch.addmm(base.reshape(-1, base.shape[-1]), gated_NR, b_PR.t())
    return y_NP.view(base.shape), s_NR


def _gated(columns_NR: Tensor, column_gate_G1R: Tensor) -> Tensor:
    gates = column_gate_G1R.shape[0]
    if columns_NR.numel() == 0:
        return columns_NR.clone()
    return (columns_NR.view(gates, -1, columns_NR.shape[1]) * column_gate_G1R).view(columns_NR.shape)


def multi_lora_backward(
    grad: Tensor, x: Tensor | None, s_NR: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], gate_GE: Tensor,
    scale: Sequence[float], dropout: float, per_expert: bool, seed: Tensor | None,
    need_x: bool, need_gate: bool, trainable: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """P = dY B, dS = P * C; dB = dY^T (S * C), dA = dS^T x^, dx = keep/(1-q) (dS A), dg = s sum_{j in e} P S.

    `trainable[e]` names the experts whose dA [R_t, D] and dB [P, R_t] are wanted, packed in order. What is not wanted
    comes back with zero elements and is never computed; x is read only for dA, S only for dB and dg: else both may be None.
    """
    dtype = grad.dtype
    ranks = [a.shape[0] for a in lora_a]
    grad_NP = grad.reshape(-1, grad.shape[-1])
    rows, features = grad_NP.shape[0], lora_a[0].shape[1]
    p_NR = grad_NP @ _packed(lora_b, 1, dtype)
    column_gate_G1R = column_gate(gate_GE, scale, ranks, dtype)
    ds_NR = _gated(p_NR, column_gate_G1R)
    starts = [sum(ranks[:e]) for e in range(len(ranks))]
    wanted = [slice(starts[e], starts[e] + ranks[e]) for e, flag in enumerate(trainable) if flag]
    dropping = seed is not None and dropout > 0.0
    number = int(seed.item()) if seed is not None and dropping else 0

    if need_gate and s_NR is not None:
        # In float32 at least: a gate's gradient sums N / G rows times r columns into one number.
        wide = torch.promote_types(dtype, torch.float32)
        product_NR = p_NR.to(wide) * s_NR.to(wide)
        sums_GR = product_NR.view(gate_GE.shape[0], -1, sum(ranks)).sum(1) if rows else product_NR.new_zeros(
            gate_GE.shape[0], sum(ranks)
        )  # fmt: skip
        pieces = [sums.sum(1) * s for sums, s in zip(sums_GR.split(ranks, 1), scale, strict=True)]
        dgate_GE = torch.stack(pieces, 1).to(gate_GE.dtype)
    else:
        dgate_GE = grad.new_empty(0)

    keep_ND: dict[int, Tensor] = {}
    streams = range(len(ranks)) if per_expert else range(1)
    if dropping and (need_x or wanted):
        keep_ND = {
            k: dropout_keep_mask(number, rows, features, dropout, stream=k, device=grad.device)
            for k in streams
            if need_x or trainable[k] or not per_expert
        }
    inverse = 1.0 / (1.0 - dropout) if dropping else 1.0

    if wanted and x is not None and s_NR is not None:
        gated_NR = _gated(s_NR, column_gate_G1R)
        db_PR = grad_NP.t() @ _columns(gated_NR, wanted)
        x_ND = x.reshape(-1, features).to(dtype)
        if not dropping:
            da_RD = _columns(ds_NR, wanted).t() @ x_ND
        elif per_expert:
            chosen = [e for e, flag in enumerate(trainable) if flag]
            da_RD = torch.cat(
                [ds_NR[:, part].t() @ (x_ND * keep_ND[e]) for e, part in zip(chosen, wanted, strict=True)]
            ).mul_(inverse)
        else:
            da_RD = (_columns(ds_NR, wanted).t() @ (x_ND * keep_ND[0])).mul_(inverse)
    else:
        da_RD, db_PR = grad.new_empty(0), grad.new_empty(0)

    if not need_x:
        dx = grad.new_empty(0)
    elif dropping and per_expert:
        dx = torch.zeros(rows, features, dtype=dtype, device=grad.device)
        for e, (a, start) in enumerate(zip(lora_a, starts, strict=True)):
            dx += (ds_NR[:, start : start + ranks[e]] @ a.to(dtype)).mul_(keep_ND[e])
        dx.mul_(inverse)
    else:
        dx = ds_NR @ _packed(lora_a, 0, dtype)
        if dropping:
            dx.mul_(keep_ND[0]).mul_(inverse)
    if need_x:
        dx = dx.view(*grad.shape[:-1], features)
    return dx, da_RD, db_PR, dgate_GE


def _columns(packed_NR: Tensor, parts: Sequence[slice]) -> Tensor:
    """The named column ranges side by side; a view when they are neighbours (one trainable expert: always)."""
    if all(left.stop == right.start for left, right in zip(parts, parts[1:], strict=False)):
        return packed_NR[:, parts[0].start : parts[-1].stop]
    return torch.cat([packed_NR[:, part] for part in parts], 1)


# ---- gradient norms of a linear layer ---------------------------------------------------------------------------------

DIRECT_TILE = 256  # output features per tile of G^T X: the p x d gradient is never written
GHOST_TILE = 512  # tokens per tile of the Gram matrices


def squared_norm_direct(x_BTD: Tensor, grad_BTP: Tensor) -> Tensor:
    """sum((G^T X)^2) per sample, in tiles of output features."""
    total_B = x_BTD.new_zeros(x_BTD.shape[0])
    for start in range(0, grad_BTP.shape[2], DIRECT_TILE):
        tile_BWD = grad_BTP[:, :, start : start + DIRECT_TILE].transpose(1, 2) @ x_BTD
        total_B += tile_BWD.square_().sum((1, 2))
    return total_B


def squared_norm_ghost(x_BTD: Tensor, grad_BTP: Tensor) -> Tensor:
    """sum_{t,t'} (x_t . x_t') (g_t . g_t') per sample; tiles below the diagonal equal those above: half the work."""
    total_B = x_BTD.new_zeros(x_BTD.shape[0])
    tokens = x_BTD.shape[1]
    for start in range(0, tokens, GHOST_TILE):
        rows = slice(start, min(start + GHOST_TILE, tokens))
        for other in range(start, tokens, GHOST_TILE):
            columns = slice(other, min(other + GHOST_TILE, tokens))
            gram_x = x_BTD[:, rows] @ x_BTD[:, columns].transpose(1, 2)
            gram_g = grad_BTP[:, rows] @ grad_BTP[:, columns].transpose(1, 2)
            total_B += gram_x.mul_(gram_g).sum((1, 2)) * (1.0 if other == start else 2.0)
    # Cancellation between rows can leave a norm of zero at -1e-12: not a number under the square root.
    return total_B.clamp_(min=0.0)


def accumulate_gradient(buffer_PD: Tensor, x_ND: Tensor, grad_NP: Tensor) -> None:
    """M += G^T X."""
    buffer_PD.addmm_(grad_NP.t().to(buffer_PD.dtype), x_ND.to(buffer_PD.dtype))


def accumulate_sketch(sketch_KL: Tensor, x_ND: Tensor, grad_NP: Tensor, left_PK: Tensor, right_DL: Tensor) -> None:
    """Y += (G L)^T (X R) = L^T (G^T X) R: linear in the gradient, so additive over batches and processes."""
    dtype = sketch_KL.dtype
    sketch_KL.addmm_((grad_NP.to(dtype) @ left_PK).t(), x_ND.to(dtype) @ right_DL)


# ---- router -----------------------------------------------------------------------------------------------------------


def router_hidden(features_ND: Tensor, encoder_weight_THD: Tensor, encoder_bias_TH: Tensor) -> Tensor:
    return torch.einsum("nd,thd->tnh", features_ND, encoder_weight_THD).add_(encoder_bias_TH[:, None]).relu_()


def router_score_forward(
    features_ND: Tensor, encoder_weight_THD: Tensor, encoder_bias_TH: Tensor,
    decoder_weight_TDH: Tensor, decoder_bias_TD: Tensor, sigmoid: bool,
) -> Tensor:  # fmt: skip
    """error[n, t] = mean_d (decode_t(relu(encode_t(z_n)))_d - z_nd)^2."""
    hidden_TNH = router_hidden(features_ND, encoder_weight_THD, encoder_bias_TH)
    output_TND = torch.baddbmm(decoder_bias_TD[:, None], hidden_TNH, decoder_weight_TDH.transpose(1, 2))
    if sigmoid:
        output_TND = output_TND.sigmoid_()
    return output_TND.sub_(features_ND).square_().mean(2).t().contiguous()


def router_score_backward(
    grad_NT: Tensor, features_ND: Tensor, encoder_weight_THD: Tensor, encoder_bias_TH: Tensor,
    decoder_weight_TDH: Tensor, decoder_bias_TD: Tensor, sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    hidden_TNH = router_hidden(features_ND, encoder_weight_THD, encoder_bias_TH)
    output_TND = torch.baddbmm(decoder_bias_TD[:, None], hidden_TNH, decoder_weight_TDH.transpose(1, 2))
    if sigmoid:
        output_TND = output_TND.sigmoid_()
    difference_TND = (output_TND - features_ND) * (grad_NT.t()[:, :, None] * (2.0 / max(1, features_ND.shape[1])))
    slope_TND = difference_TND * output_TND * (1.0 - output_TND) if sigmoid else difference_TND
    dhidden_TNH = (slope_TND @ decoder_weight_TDH) * (hidden_TNH > 0)
    dfeatures_ND = torch.einsum("tnh,thd->nd", dhidden_TNH, encoder_weight_THD) - difference_TND.sum(0)
    return (
        dfeatures_ND,
        dhidden_TNH.transpose(1, 2) @ features_ND,
        dhidden_TNH.sum(1),
        slope_TND.transpose(1, 2) @ hidden_TNH,
        slope_TND.sum(1),
    )


def router_select(error_NT: Tensor, threshold_T: Tensor, top_k: int) -> Tensor:
    """gate[n, t] = 1 where error <= threshold_t and fewer than top_k tasks under their threshold are nearer."""
    admitted_NT = error_NT <= threshold_T
    ranked_NT = error_NT.masked_fill(~admitted_NT, float("inf")).sort(dim=1, stable=True).indices
    place_NT = torch.empty_like(ranked_NT).scatter_(
        1, ranked_NT, torch.arange(ranked_NT.shape[1], device=ranked_NT.device).expand_as(ranked_NT).contiguous()
    )
    return (admitted_NT & (place_NT < top_k)).to(error_NT.dtype)


def masked_max_pool(hidden_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """max over the tokens with mask True, and the token each maximum came from (the first of equals)."""
    masked_BTD = hidden_BTD.masked_fill(~mask_BT[:, :, None], float("-inf"))
    values_BD, token_BD = masked_BTD.max(1)
    return values_BD, token_BD
