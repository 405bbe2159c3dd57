# SPDX-License-Identifier: Apache-2.0
"""Every op of this package in plain PyTorch: the specification. In float64 it is the truth other backends are held to.

Nothing here is registered, checked or chosen; the op files do that. These functions also are the `reference` backend.

Shape letters: N rows (tokens), D in_features, P out_features, E experts, R packed ranks (sum of the experts' ranks),
G gate rows (each covers N / G consecutive rows), B samples, T tokens (grad norms) or tasks (router), H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dmole_kernels._philox import dropout_keep_mask


def _joined(pieces: Sequence[Tensor], dimension: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dimension)


def _packed(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return _joined(tensors, 0).to(dtype)


def _packed_b(lora_b: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """B^T [R, P], contiguous: PyTorch's products with a P x 8 matrix are three times slower."""
    # Cast and transposition in one pass; with nothing to cast, `to` hands the transposed view back as it is.
    return _joined([b.t() for b in lora_b], 0).to(dtype, memory_format=torch.contiguous_format).contiguous()


def column_gate(gate_GE: Tensor, scale: Sequence[float], ranks: Sequence[int], dtype: torch.dtype) -> Tensor:
    """C[g, j] = gate[g, e(j)] s[e(j)] as [G, 1, R], or [G, 1, 1] for a single expert (it broadcasts)."""
    if len(ranks) == 1:
        return (gate_GE * scale[0]).to(dtype).unsqueeze(1)
    pieces = [(gate_GE[:, e, None] * scale[e]).expand(-1, rank) for e, rank in enumerate(ranks)]
    return torch.cat(pieces, 1).to(dtype).unsqueeze(1)


def keep_mask(rows: int, features: int, dropout: float, seed: Tensor, stream: int, device: torch.device) -> Tensor:
    """As bytes of 0 and 1: a product with booleans takes PyTorch four times as long."""
    return dropout_keep_mask(int(seed), rows, features, dropout, stream=stream, device=device).view(torch.uint8)


def mask_streams(experts: int, per_expert: bool) -> list[tuple[int, list[int]]]:
    """(stream of the mask, experts that see it)."""
    return [(e, [e]) for e in range(experts)] if per_expert else [(0, list(range(experts)))]


def multi_lora_forward(
    x: Tensor, base: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], gate_GE: Tensor,
    scale: Sequence[float], dropout: float, per_expert: bool, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S = x^ A^T, y = base + (S * C) B^T. Returns y in base's shape and S [N, R]; computes in base's dtype."""
    dtype = x.dtype if base is None else base.dtype
    ranks = [a.shape[0] for a in lora_a]
    x_ND = x.reshape(-1, x.shape[-1]).to(dtype)
    b_RP = _packed_b(lora_b, dtype)
    pieces = []
    for stream, members in mask_streams(len(ranks), per_expert):
        dropped_ND = (
            x_ND if seed is None else x_ND * keep_mask(x_ND.shape[0], x_ND.shape[1], dropout, seed, stream, x_ND.device)
        )
        pieces.append(dropped_ND @ _packed([lora_a[e] for e in members], dtype).t())
    s_NR = _joined(pieces, 1)
    if seed is not None:
        # On S, which is small, rather than on x^.
        s_NR.mul_(1.0 / (1.0 - dropout))
    gated_NR = _gated(s_NR, column_gate(gate_GE, scale, ranks, dtype))
    if base is None:
        return (gated_NR @ b_RP).view(*x.shape[:-1], b_RP.shape[1]), s_NR
    y_NP = torch.addmm(base.reshape(-1, base.shape[-1]), gated_NR, b_RP)
    return y_NP.view(base.shape), s_NR


def _gated(columns_NR: Tensor, column_gate_G1R: Tensor) -> Tensor:
    gates = column_gate_G1R.shape[0]
    if columns_NR.numel() == 0:
        return columns_NR.clone()
    return (columns_NR.view(gates, -1, columns_NR.shape[1]) * column_gate_G1R).view(columns_NR.shape)


def multi_lora_backward(
    grad: Tensor, x: Tensor | None, s_NR: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    gate_GE: Tensor, scale: Sequence[float], dropout: float, per_expert: bool, seed: Tensor | None,
    need_x: bool, need_gate: bool, trainable: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """P = dY B, dS = P * C; dB = dY^T (S * C), dA = dS^T x^, dx = keep/(1-q) (dS A), dg = s sum_{j in e} P S.

    `trainable[e]` names the experts whose dA [R_t, D] and dB^T [R_t, P] are wanted, packed in order. What is not wanted
    comes back with zero elements and is never computed. x is read only for dA, S only for dB and dg; else both may be
    None.
    """
    dtype = grad.dtype
    ranks = [a.shape[0] for a in lora_a]
    features = lora_a[0].shape[1]
    stops = list(accumulate(ranks))
    parts = [slice(stop - rank, stop) for stop, rank in zip(stops, ranks, strict=True)]
    chosen = [e for e, flag in enumerate(trainable) if flag]
    grad_NP = grad.reshape(-1, grad.shape[-1])
    p_NR = grad_NP @ _packed_b(lora_b, dtype).t()
    column_gate_G1R = column_gate(gate_GE, scale, ranks, dtype)
    dx: Tensor | None = None
    db_RP: Tensor | None = None
    dgate_GE: Tensor | None = None

    if need_gate and s_NR is not None:
        dgate_GE = _gate_gradient(p_NR, s_NR, gate_GE.shape[0], ranks, scale).to(gate_GE.dtype)
    if chosen and s_NR is not None:
        db_RP = _columns(_gated(s_NR, column_gate_G1R), [parts[e] for e in chosen]).t() @ grad_NP

    ds_NR = _gated(p_NR, column_gate_G1R)
    if seed is not None:
        ds_NR.mul_(1.0 / (1.0 - dropout))
    x_ND = x.reshape(-1, features).to(dtype) if chosen and x is not None else None
    da_pieces = []
    for stream, members in mask_streams(len(ranks), per_expert):
        learning = [e for e in members if trainable[e]]
        if not learning and not need_x:
            continue
        keep_ND = None
        if seed is not None:
            keep_ND = keep_mask(ds_NR.shape[0], features, dropout, seed, stream, grad.device)
        if learning and x_ND is not None:
            dropped_ND = x_ND if keep_ND is None else x_ND * keep_ND
            da_pieces.append(_columns(ds_NR, [parts[e] for e in learning]).t() @ dropped_ND)
        if need_x:
            packed_RD = _packed([lora_a[e] for e in members], dtype)
            part_ND = _columns(ds_NR, [parts[e] for e in members]) @ packed_RD
            part_ND = part_ND if keep_ND is None else part_ND.mul_(keep_ND)
            dx = part_ND if dx is None else dx.add_(part_ND)

    nothing = grad.new_empty(0)
    return (
        nothing if dx is None else dx.view(*grad.shape[:-1], features),
        _joined(da_pieces, 0) if da_pieces else nothing.clone(),
        nothing.clone() if db_RP is None else db_RP,
        nothing.clone() if dgate_GE is None else dgate_GE,
    )


def _gate_gradient(p_NR: Tensor, s_NR: Tensor, gates: int, ranks: Sequence[int], scale: Sequence[float]) -> Tensor:
    """s[e] sum over the gate's rows and e's columns of P S, in float32 at least: many products into one number."""
    wide = torch.promote_types(p_NR.dtype, torch.float32)
    product_NR = p_NR.to(wide) * s_NR.to(wide)
    columns = product_NR.shape[1]
    rows_per_gate = product_NR.shape[0] // max(1, gates)
    sums_GR = product_NR.view(gates, rows_per_gate, columns).sum(1)
    pieces = [sums.sum(1) * factor for sums, factor in zip(torch.split(sums_GR, list(ranks), 1), scale, strict=True)]
    return torch.stack(pieces, 1)


def _columns(packed_NR: Tensor, parts: Sequence[slice]) -> Tensor:
    """The named column ranges side by side; a view when they are neighbours (one trainable expert: always)."""
    if all(left.stop == right.start for left, right in zip(parts, parts[1:], strict=False)):
        start, stop = parts[0].start, parts[-1].stop
        return packed_NR if stop - start == packed_NR.shape[1] else packed_NR[:, start:stop]
    return torch.cat([packed_NR[:, part] for part in parts], 1)


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


def router_score_jvp(tensors: Sequence[Tensor], tangents: Sequence[Tensor], sigmoid: bool) -> Tensor:
    """The change of error [N, T] along `tangents`, one for each of router_score_forward's tensors."""
    features_ND, encoder_weight_THD, encoder_bias_TH, decoder_weight_TDH, decoder_bias_TD = tensors
    dfeatures_ND, dencoder_weight_THD, dencoder_bias_TH, ddecoder_weight_TDH, ddecoder_bias_TD = tangents
    hidden_TNH = router_hidden(features_ND, encoder_weight_THD, encoder_bias_TH)
    dhidden_TNH = (
        dfeatures_ND @ encoder_weight_THD.transpose(1, 2)
        + features_ND @ dencoder_weight_THD.transpose(1, 2)
        + dencoder_bias_TH[:, None]
    ) * (hidden_TNH > 0)
    output_TND = hidden_TNH @ decoder_weight_TDH.transpose(1, 2) + decoder_bias_TD[:, None]
    doutput_TND = (
        dhidden_TNH @ decoder_weight_TDH.transpose(1, 2)
        + hidden_TNH @ ddecoder_weight_TDH.transpose(1, 2)
        + ddecoder_bias_TD[:, None]
    )
    if sigmoid:
        output_TND = output_TND.sigmoid()
        doutput_TND = doutput_TND * output_TND * (1.0 - output_TND)
    return (2.0 * (output_TND - features_ND) * (doutput_TND - dfeatures_ND)).mean(2).t()


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
