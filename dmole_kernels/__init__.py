# SPDX-License-Identifier: Apache-2.0
"""Tensors in, tensors out: gated multi-expert LoRA, gradient norms and the autoencoder router.

Independent of tasks, data sets and models. `python -m dmole_kernels` prints which implementation runs.
"""

from dmole_kernels._backend import BACKENDS, BackendChoice, choose_backend, explain_backend, use_backend
from dmole_kernels._convert import convert
from dmole_kernels._expert_bank import Expert, ExpertBank, ExpertDescription
from dmole_kernels._expert_folders import load_experts, save_experts
from dmole_kernels._expert_handle import ExpertHandle, experts_of
from dmole_kernels._frozen_linear import FrozenLinears, frozen_linear
from dmole_kernels._gate_block import GateBlock
from dmole_kernels._gates import ExpertGates
from dmole_kernels._grad_norm import (
    accumulate_gradient,
    accumulate_sketch,
    grad_norm_per_batch,
    grad_norm_per_sample,
    sketch_relative_std,
)
from dmole_kernels._grad_norm_recorder import GradNorm, GradNormRecorder
from dmole_kernels._masked_pool import masked_max_pool
from dmole_kernels._multi_lora import multi_lora
from dmole_kernels._multi_lora_linear import MultiLoRALinear
from dmole_kernels._philox import dropout_keep_mask
from dmole_kernels._reduce_gradients import reduce_gradients
from dmole_kernels._router_score import router_score, router_select
from dmole_kernels.cpu import RowMap

__all__ = [
    "BACKENDS",
    "BackendChoice",
    "Expert",
    "ExpertBank",
    "ExpertDescription",
    "ExpertGates",
    "ExpertHandle",
    "FrozenLinears",
    "GateBlock",
    "GradNorm",
    "GradNormRecorder",
    "MultiLoRALinear",
    "RowMap",
    "accumulate_gradient",
    "accumulate_sketch",
    "choose_backend",
    "convert",
    "dropout_keep_mask",
    "experts_of",
    "explain_backend",
    "frozen_linear",
    "grad_norm_per_batch",
    "grad_norm_per_sample",
    "load_experts",
    "masked_max_pool",
    "multi_lora",
    "reduce_gradients",
    "router_score",
    "router_select",
    "save_experts",
    "use_backend",
    "sketch_relative_std",
]
