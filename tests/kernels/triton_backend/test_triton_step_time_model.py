# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from transformers import LlamaConfig, LlavaConfig

from benchmarks.step_time_model import GPUS, MODELS, Gpu, base_time, launch_time, loop_time, ours_time, table


def test_a_launch_costs_its_slowest_resource() -> None:
    gpu = Gpu(target="sm_90", flops=1e12, bandwidth=1e12)
    assert launch_time(gpu, 2e12, 1e12) == 2.0
    assert launch_time(gpu, 1e12, 3e12) == 3.0
    assert launch_time(gpu, 1.0, 1.0) == 3e-6


def test_the_table_says_that_it_is_a_model_and_experts_hardly_change_ours() -> None:
    assert table()[0].startswith("| model, not measured")
    assert len(table()) == 2 + 2 * 3 * 2
    for gpu in GPUS.values():
        few, many = (ours_time(gpu, 4096, 4096, experts) for experts in (9, 64))
        assert many < 2 * few < loop_time(gpu, 4096, 4096, 9)
        assert base_time(gpu, 4096, 4096) > 0


def test_llava_s_shapes_are_those_of_its_configuration() -> None:
    config = LlavaConfig().text_config
    assert isinstance(config, LlamaConfig)
    hidden, inner = config.hidden_size, config.intermediate_size
    assert config.num_key_value_heads * config.head_dim == hidden
    linears = ((hidden, hidden),) * 4 + ((hidden, inner),) * 2 + ((inner, hidden),)
    assert MODELS["LLaVA 7B"] == (config.num_hidden_layers, linears)
