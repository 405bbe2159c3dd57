# SPDX-License-Identifier: Apache-2.0
"""
The router's score and its masked pooling as one Triton launch each. Autoencoders are trained rarely and are small: the
derivative and the selection use `reference`, plain PyTorch on the same device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmole_kernels.triton_backend import router
from dmole_kernels.triton_backend.columns import rows_of
from dmole_kernels.triton_backend.configs import Config, Target, configuration
from dmole_kernels.triton_backend.launch import Launch, Runner, computing, run, size, target_of

LARGEST_HIDDEN = 256
POOL = Config(rows=1, width=128, warps=4, stages=1)


def router_score_forward(
    features_ND: Tensor, encoder_weight_THD: Tensor, encoder_bias_TH: Tensor,
    decoder_weight_TDH: Tensor, decoder_bias_TD: Tensor, sigmoid: bool, *,
    target: Target | None = None, runner: Runner = run,
) -> Tensor:  # fmt: skip
    """error[n, t], as the reference; the hidden size is at most 256, which one program keeps in registers."""
    target = target_of(features_ND.device) if target is None else target
    tasks, hidden, width = encoder_weight_THD.shape
    if hidden > LARGEST_HIDDEN:
        raise ValueError(
            f"encoder_weight has a hidden size of {hidden}; expected at most {LARGEST_HIDDEN} for backend='triton'. "
            f"Pass backend='reference'."
        )
    error_NT = features_ND.new_empty((features_ND.shape[0], tasks))
    if error_NT.numel() == 0 or width == 0:
        return error_NT.zero_()
    features_ND = rows_of(features_ND)
    weights = {
        "encoder_weight": encoder_weight_THD.contiguous(),
        "encoder_bias": encoder_bias_TH.contiguous(),
        "decoder_weight": decoder_weight_TDH.contiguous(),
        "decoder_bias": decoder_bias_TD.contiguous(),
    }
    config = configuration("router_score", target, features_ND.element_size() * 8)
    block = max(16, 1 << max(0, hidden - 1).bit_length())
    arguments = (
        computing(features_ND.dtype)
        | weights
        | {
            "features": features_ND,
            "error": error_NT,
            "N": features_ND.shape[0],
            "T": tasks,
            "D": width,
            "H": hidden,
            "step": features_ND.stride(0),
            "ROWS": config.rows,
            "WIDTH": config.width,
            "BLOCK_H": block,
            "SIGMOID": sigmoid,
        }
    )
    runner(
        Launch.bound(
            router.router_score,
            arguments,
            grid=-(-features_ND.shape[0] // config.rows) * tasks,
            config=config,
            dots=[(config.rows, block, config.width), (config.rows, config.width, block)],
            reads={"features": size(features_ND), "weights": size(*weights.values())},
            writes={"error": size(error_NT)},
        )
    )
    return error_NT


def masked_max_pool(
    hidden_BTD: Tensor, mask_BT: Tensor, *, target: Target | None = None, runner: Runner = run
) -> tuple[Tensor, Tensor]:
    """Maxima over the tokens with mask True, and the token of each."""
    if target is None:
        target_of(hidden_BTD.device)
    samples, tokens, width = hidden_BTD.shape
    values_BD = hidden_BTD.new_empty((samples, width))
    token_BD = torch.empty((samples, width), dtype=torch.int64, device=hidden_BTD.device)
    if values_BD.numel() == 0:
        return values_BD, token_BD
    hidden_BTD, mask_BT = hidden_BTD.contiguous(), mask_BT.contiguous().view(torch.uint8)
    arguments = {
        "hidden": hidden_BTD,
        "mask": mask_BT,
        "values": values_BD,
        "tokens": token_BD,
        "T": tokens,
        "D": width,
        "WIDTH": POOL.width,
        "ACC": computing(hidden_BTD.dtype)["ACC"],
    }
    runner(
        Launch.bound(
            router.masked_max_pool,
            arguments,
            grid=samples * -(-width // POOL.width),
            config=POOL,
            reads={"hidden": size(hidden_BTD), "mask": size(mask_BT)},
            writes={"values": size(values_BD), "tokens": size(token_BD)},
        )
    )
    return values_BD, token_BD
