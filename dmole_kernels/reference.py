# SPDX-License-Identifier: Apache-2.0
"""Every op of this package in plain PyTorch: the specification. Tests compare other backends with it in float64.

These functions are also the `reference` backend; the op files check arguments, register ops and select the backend.

Shape letters: N rows (tokens), D in_features, P out_features, E experts, R packed ranks (sum of the experts' ranks),
G gate rows (each covers N / G consecutive rows), B samples, T tokens (grad norms) or tasks (router), H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dmole_kernels._lora_call import LoraCall, PackedExperts, Wanted
from dmole_kernels._philox import dropout_keep_mask


def _joined(pieces: Sequence[Tensor], dimension: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dimension)


def _packed_b(lora_b: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """B^T [R, P], contiguous: PyTorch's products with a P x 8 matrix are three times slower."""
    # Cast and transposition in one pass; with nothing to cast, `to` hands the transposed view back as it is.
    return _joined([b.t() for b in lora_b], 0).to(dtype, memory_format=torch.contiguous_format).contiguous()


def pack_experts(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], dtype: torch.dtype) -> PackedExperts:
    """The experts side by side, for `LoraCall.packed`: A [R, D] and B^T [R, P]."""
    return PackedExperts(_joined(lora_a, 0).to(dtype), _packed_b(lora_b, dtype))


def _packed(call: LoraCall, outputs: int, dtype: torch.dtype) -> PackedExperts:
    if call.packed is not None:
        return call.packed
    if call.starts is None:
        return pack_experts(call.lora_a, call.lora_b, dtype)
    # Zeros in the columns of the other linears.
    b_RP = torch.zeros(sum(call.ranks), outputs, dtype=dtype, device=call.lora_b[0].device)
    for e, columns in enumerate(_column_ranges(call.ranks)):
        b_RP[columns, call.columns(e)] = call.lora_b[e].t().to(dtype)
    return PackedExperts(_joined(call.lora_a, 0).to(dtype), b_RP)


def column_gate(gate_GE: Tensor, scale: Sequence[float], ranks: Sequence[int], dtype: torch.dtype) -> Tensor:
    """C[g, j] = gate[g, e(j)] s[e(j)] as [G, 1, R], or [G, 1, 1] for a single expert (it broadcasts).

    In float32 at least, whatever the dtypes of gate and call: a scale of 1e5 is inf in float16, and a product rounded
    to bfloat16 is off by 2e-3.
    """
    gate_GE = gate_GE.to(torch.promote_types(torch.promote_types(dtype, gate_GE.dtype), torch.float32))
    if len(ranks) == 1:
        return (gate_GE * scale[0]).unsqueeze(1)
    pieces = [(gate_GE[:, e, None] * scale[e]).expand(-1, rank) for e, rank in enumerate(ranks)]
    return torch.cat(pieces, 1).unsqueeze(1)


def keep_mask(rows: int, features: int, dropout: float, seed: Tensor, stream: int, device: torch.device) -> Tensor:
    """As bytes of 0 and 1: a product with booleans is four times slower in PyTorch."""
    return dropout_keep_mask(int(seed), rows, features, dropout, stream=stream, device=device).view(torch.uint8)


def mask_streams(experts: int, per_expert: bool) -> list[tuple[int, list[int]]]:
    """(stream of the mask, experts that see it)."""
    return [(e, [e]) for e in range(experts)] if per_expert else [(0, list(range(experts)))]


def multi_lora_forward(call: LoraCall) -> tuple[Tensor, Tensor]:
    """S = x^ A^T, y = base + (S * C) B^T, where a gate of zero skips the expert whatever its values are.

    Returns y in base's shape and S [N, R] (unmasked: the gate's gradient needs it); computes in base's dtype.
    """
    assert call.x is not None
    dtype, ranks = call.dtype, call.ranks
    packed = _packed(call, call.outputs, dtype)
    x_ND = call.x.reshape(-1, call.x.shape[-1]).to(dtype)
    ranges = _column_ranges(ranks)
    pieces = []
    for stream, members in mask_streams(len(ranks), call.per_expert):
        keep_ND = _keep(call, x_ND.shape[0], x_ND.shape[1], stream, x_ND.device)
        dropped_ND = x_ND if keep_ND is None else x_ND * keep_ND
        pieces.append(dropped_ND @ packed.a_RD[ranges[members[0]].start : ranges[members[-1]].stop].t())
    s_NR = _joined(pieces, 1)
    if call.seed is not None:
        # On S, which is small, rather than on x^.
        s_NR.mul_(1.0 / (1.0 - call.dropout))
    gated_NR = _gated(s_NR, column_gate(call.gate, call.scale, ranks, dtype))
    shape = (*call.x.shape[:-1], packed.b_RP.shape[1])
    if call.base is None:
        y_NP = gated_NR @ packed.b_RP
    else:
        y_NP = torch.addmm(call.base.reshape(-1, shape[-1]), gated_NR, packed.b_RP)
    if not _all_finite(y_NP):
        # 0 * inf inside the product: each expert alone, so that rows without it can be masked.
        y_NP = torch.zeros_like(y_NP) if call.base is None else call.base.reshape(-1, shape[-1]).clone()
        for e, columns in enumerate(ranges):
            y_NP += _where_used(call.gate[:, e], gated_NR[:, columns] @ packed.b_RP[columns])
    return y_NP.view(shape), s_NR


def _column_ranges(ranks: Sequence[int]) -> list[slice]:
    """The packed columns of each expert."""
    return [slice(stop - rank, stop) for stop, rank in zip(accumulate(ranks), ranks, strict=True)]


def _keep(call: LoraCall, rows: int, features: int, stream: int, device: torch.device) -> Tensor | None:
    return None if call.seed is None else keep_mask(rows, features, call.dropout, call.seed, stream, device)


def _gated(columns_NR: Tensor, column_gate_G1R: Tensor) -> Tensor:
    """columns * C, and zero where C is, even beside inf and NaN."""
    if columns_NR.numel() == 0:
        return columns_NR.clone()
    gates = column_gate_G1R.shape[0]
    product = columns_NR.view(gates, -1, columns_NR.shape[1]) * column_gate_G1R
    return product.masked_fill_(column_gate_G1R == 0, 0.0).to(columns_NR.dtype).view(columns_NR.shape)


def _where_used(gate_G: Tensor, rows_NX: Tensor) -> Tensor:
    """The rows whose gate is not zero, and zeros elsewhere."""
    if rows_NX.numel() == 0:
        return rows_NX
    used_N1 = (gate_G != 0).repeat_interleave(rows_NX.shape[0] // gate_G.shape[0])[:, None]
    return torch.where(used_N1, rows_NX, torch.zeros((), dtype=rows_NX.dtype, device=rows_NX.device))


def _all_finite(tensor: Tensor) -> bool:
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # A captured graph cannot read values; the masked form is correct for all of them.
    return bool(torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))))


def multi_lora_backward(
    call: LoraCall, grad: Tensor, s_NR: Tensor | None, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P = dY B, dS = P * C; dB = dY^T (S * C), dA = dS^T x^, dx = keep/(1-q) (dS A), dg = s sum_{j in e} P S.

    dA [R_t, D] and dB^T [R_t, P] of the wanted experts are packed in order. Gradients that are not requested are
    not computed and have zero elements. As in the forward, a gate of zero skips the expert in dA, dB and dx whatever
    the values of the row and the expert are, but not in dg.
    """
    dtype, ranks = grad.dtype, call.ranks
    features = call.lora_a[0].shape[1]
    ranges = _column_ranges(ranks)
    chosen = [e for e, flag in enumerate(wanted.experts) if flag]
    packed = _packed(call, grad.shape[-1], dtype)
    grad_NP = grad.reshape(-1, grad.shape[-1])
    x_ND = call.x.reshape(-1, features).to(dtype) if chosen and call.x is not None else None
    p_NR = grad_NP @ packed.b_RP.t()
    column_gate_G1R = column_gate(call.gate, call.scale, ranks, dtype)
    gated_NR = _gated(s_NR, column_gate_G1R) if chosen and s_NR is not None else None
    ds_NR = _gated(p_NR, column_gate_G1R)
    if call.seed is not None:
        ds_NR.mul_(1.0 / (1.0 - call.dropout))
    tensors = (packed.a_RD, x_ND, grad_NP, gated_NR, ds_NR)

    together = [[e for e in members] for _, members in mask_streams(len(ranks), call.per_expert)]
    dx, da, db = _products(call, together, ranges, wanted, *tensors, masked=False)
    if not all(tensor is None or _all_finite(tensor) for tensor in (dx, da, db)):
        dx, da, db = _products(call, [[e] for e in range(len(ranks))], ranges, wanted, *tensors, masked=True)

    nothing = grad.new_empty(0)
    dgate = None
    if wanted.gate and s_NR is not None:
        dgate = _gate_gradient(p_NR, s_NR, call.gate.shape[0], ranks, call.scale).to(call.gate.dtype)
    return (
        nothing if dx is None else dx.view(*grad.shape[:-1], features),
        nothing.clone() if da is None else da,
        nothing.clone() if db is None else db,
        nothing.clone() if dgate is None else dgate,
    )


def _products(
    call: LoraCall, groups: Sequence[Sequence[int]], ranges: Sequence[slice], wanted: Wanted, a_RD: Tensor,
    x_ND: Tensor | None, grad_NP: Tensor, gated_NR: Tensor | None, ds_NR: Tensor, *, masked: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dA and dB^T, for groups of neighbouring experts; masked: one expert a group, over the rows that use it."""
    dx: Tensor | None = None
    da_pieces, db_pieces = [], []
    for members in groups:
        trainable = [e for e in members if wanted.experts[e]]
        if not trainable and not wanted.x:
            continue
        span = slice(ranges[members[0]].start, ranges[members[-1]].stop)
        stream = members[0] if call.per_expert else 0
        keep_ND = _keep(call, ds_NR.shape[0], a_RD.shape[1], stream, ds_NR.device)

        def used(rows_NX: Tensor, expert: int = members[0]) -> Tensor:
            return _where_used(call.gate[:, expert], rows_NX) if masked else rows_NX

        if trainable and x_ND is not None and gated_NR is not None:
            dropped_ND = x_ND if keep_ND is None else x_ND * keep_ND
            da_pieces.append(_columns(ds_NR, [ranges[e] for e in trainable]).t() @ used(dropped_ND))
            db_pieces.append(_columns(gated_NR, [ranges[e] for e in trainable]).t() @ used(grad_NP))
        if wanted.x:
            part_ND = used(ds_NR[:, span] @ a_RD[span])
            part_ND = part_ND if keep_ND is None else part_ND.mul_(keep_ND)
            dx = part_ND if dx is None else dx.add_(part_ND)
    return dx, _joined(da_pieces, 0) if da_pieces else None, _joined(db_pieces, 0) if db_pieces else None


def _gate_gradient(p_NR: Tensor, s_NR: Tensor, gates: int, ranks: Sequence[int], scale: Sequence[float]) -> Tensor:
    """s[e] sum over the gate's rows and e's columns of P S, in float32 at least: many products into one number."""
    sum_dtype = torch.promote_types(p_NR.dtype, torch.float32)
    product_NR = p_NR.to(sum_dtype) * s_NR.to(sum_dtype)
    columns = product_NR.shape[1]
    rows_per_gate = product_NR.shape[0] // max(1, gates)
    sums_GR = product_NR.view(gates, rows_per_gate, columns).sum(1)
    pieces = [sums.sum(1) * factor for sums, factor in zip(torch.split(sums_GR, list(ranks), 1), scale, strict=True)]
    return torch.stack(pieces, 1)


def _columns(packed_NR: Tensor, ranges: Sequence[slice]) -> Tensor:
    """The named column ranges side by side; a view when they are neighbours (one trainable expert: always)."""
    if all(left.stop == right.start for left, right in zip(ranges, ranges[1:], strict=False)):
        start, stop = ranges[0].start, ranges[-1].stop
        return packed_NR if stop - start == packed_NR.shape[1] else packed_NR[:, start:stop]
    return torch.cat([packed_NR[:, columns] for columns in ranges], 1)


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


def router_select(error_NT: Tensor, threshold_T: Tensor, top_k: int) -> Tensor:
    """gate[n, t] = 1 where error <= threshold_t and fewer than top_k tasks under their threshold are nearer."""
    admitted_NT = error_NT <= threshold_T
    # By error, then the admitted ones first, both stable: an admitted error of inf precedes all that are not admitted.
    by_error_NT = error_NT.argsort(dim=1, stable=True)
    passed_NT = (~admitted_NT).gather(1, by_error_NT).to(torch.uint8).argsort(dim=1, stable=True)
    ranked_NT = by_error_NT.gather(1, passed_NT)
    places = torch.arange(ranked_NT.shape[1], device=ranked_NT.device)
    place_NT = torch.empty_like(ranked_NT).scatter_(1, ranked_NT, places.expand_as(ranked_NT).contiguous())
    return (admitted_NT & (place_NT < top_k)).to(error_NT.dtype)


def masked_max_pool(hidden_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """max over the tokens with mask True, and the token each maximum came from (the first of equals)."""
    if hidden_BTD.shape[1] == 0:  # No samples either, since every sample has an unmasked token.
        empty = hidden_BTD.new_empty((hidden_BTD.shape[0], hidden_BTD.shape[2]))
        return empty, empty.to(torch.int64)
    masked_BTD = hidden_BTD.masked_fill(~mask_BT[:, :, None], float("-inf"))
    values_BD, token_BD = masked_BTD.max(1)
    return values_BD, token_BD
