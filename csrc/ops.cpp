// SPDX-License-Identifier: Apache-2.0
// The compiled extension's table of contents: every tensor op by its schema, and the module's own functions.
//
// Tensor ops are reached as torch.ops.dmole_kernels.<name> and are the "cpu" and "cuda" backends of the ops that Python
// registers (dmole_kernels/_registration.py), which carry the fake implementations and the derivatives.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "cpu/brgemm.h"
#include "cpu/frozen_linear_op.h"
#include "cpu/gemm_op.h"
#include "cpu/grad_norm_op.h"
#include "cpu/isa.h"
#include "cpu/masked_pool_op.h"
#include "cpu/multi_lora_op.h"
#include "cpu/router_score_op.h"
#include "cpu/row_map_op.h"
#include "cpu/scratch.h"
#ifdef DMOLE_WITH_CUDA
#include "cuda/multi_lora_op.h"
#endif

#define DMOLE_TEXT_OF(value) #value
#define DMOLE_TEXT(value) DMOLE_TEXT_OF(value)

TORCH_LIBRARY_FRAGMENT(dmole_kernels, library) {
  library.def("cpu_gemm(Tensor a, Tensor b) -> Tensor");
  library.def("cpu_frozen_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "cpu_multi_lora(Tensor x, Tensor? base, Tensor[] lora_a, Tensor[] lora_b, Tensor gate, float[] scale, "
      "float dropout, bool per_expert, Tensor? seed, bool every_column, Tensor? row_map) -> (Tensor, Tensor)");
  library.def(
      "cpu_multi_lora_backward(Tensor grad, Tensor? x, Tensor? shrunk, Tensor[] lora_a, Tensor[] lora_b, Tensor gate, "
      "float[] scale, float dropout, bool per_expert, Tensor? seed, bool need_x, bool need_gate, bool[] trainable, "
      "Tensor? row_map) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("cpu_squared_norm(Tensor x, Tensor grad, str method) -> Tensor");
  library.def("cpu_accumulate_gradient(Tensor(a!) buffer, Tensor x, Tensor grad) -> ()");
  library.def("cpu_accumulate_sketch(Tensor(a!) sketch, Tensor x, Tensor grad, Tensor left, Tensor right) -> ()");
  library.def(
      "cpu_router_score(Tensor features, Tensor encoder_weight, Tensor encoder_bias, Tensor decoder_weight, "
      "Tensor decoder_bias, bool sigmoid) -> Tensor");
  library.def("cpu_router_select(Tensor error, Tensor threshold, int top_k) -> Tensor");
  library.def("cpu_masked_max_pool(Tensor hidden, Tensor mask) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dmole_kernels, CPU, library) {
  library.impl("cpu_gemm", &dmole::cpu::gemm_op);
  library.impl("cpu_frozen_linear", &dmole::cpu::frozen_linear_op);
  library.impl("cpu_multi_lora", &dmole::cpu::multi_lora_forward_op);
  library.impl("cpu_multi_lora_backward", &dmole::cpu::multi_lora_backward_op);
  library.impl("cpu_squared_norm", &dmole::cpu::squared_norm_op);
  library.impl("cpu_accumulate_gradient", &dmole::cpu::accumulate_gradient_op);
  library.impl("cpu_accumulate_sketch", &dmole::cpu::accumulate_sketch_op);
  library.impl("cpu_router_score", &dmole::cpu::router_score_op);
  library.impl("cpu_router_select", &dmole::cpu::router_select_op);
  library.impl("cpu_masked_max_pool", &dmole::cpu::masked_max_pool_op);
}

#ifdef DMOLE_WITH_CUDA
TORCH_LIBRARY_FRAGMENT(dmole_kernels, library) {
  library.def(
      "cuda_decode(Tensor x, Tensor? base, Tensor gate, Tensor columns, Tensor spans, int outputs, "
      "ScalarType expert_dtype, bool a_aligned, bool b_aligned) -> (Tensor, Tensor)");
  library.def("cuda_row_map(Tensor gate, int rows) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dmole_kernels, CUDA, library) {
  library.impl("cuda_decode", &dmole::cuda::decode_op);
  library.impl("cuda_row_map", &dmole::cuda::row_map_op);
}
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace dmole::cpu;
  module.doc() = "Compiled kernels of dmole_kernels.";
  module.def("isa", [] { return std::string(isa_name(current_isa())); }, "Instruction set in use.");
  module.def("set_isa", &set_isa, pybind11::arg("name"), "Chooses one of available_isas(), or 'auto'.");
  module.def("available_isas", &available_isas, "What this machine runs, slowest first.");
  module.def("has_amx", &has_amx, "Whether the machine has AMX tiles that this process may use.");
  module.def("cpu_maker", [] { return std::string(cpu_maker()); }, "'intel', 'amd' or 'other'.");
  module.def(
      "set_threads", [](int count) { at::set_num_threads(count); }, pybind11::arg("count"),
      "Threads of the kernels: torch's own pool, so the same as torch.set_num_threads.");
  module.def("threads", [] { return at::get_num_threads(); }, "Threads of the kernels.");
  pybind11::class_<GateRows>(module, "RowMap", "Which rows use each expert; built once per step and shared by layers.")
      .def(pybind11::init<const at::Tensor&, int64_t>(), pybind11::arg("gate"), pybind11::arg("rows"))
      .def_readonly("table", &GateRows::table)
      .def_property_readonly("rows", [](const GateRows& rows) { return rows.map.rows; })
      .def_property_readonly("experts", [](const GateRows& rows) { return rows.map.experts; })
      .def_property_readonly("pairs", [](const GateRows& rows) { return rows.map.pairs; })
      .def("rows_of", &GateRows::rows_of, pybind11::arg("expert"))
      .def("experts_of", &GateRows::experts_of, pybind11::arg("begin"), pybind11::arg("end"));
  module.def("grad_norm_method", &grad_norm_method, pybind11::arg("tokens"), pybind11::arg("in_features"),
             pybind11::arg("out_features"), "'direct' or 'ghost': what 'auto' does for a sample of this shape.");
  module.def("poison_scratch", &poison_scratch, pybind11::arg("on"), "Tests: fills work memory with NaN.");
  module.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{
            {"compiler", __VERSION__},
            {"cxx", DMOLE_TEXT(__cplusplus)},
            {"torch", TORCH_VERSION},
#if defined(_OPENMP)
            {"threads", "torch's OpenMP threads"},
#else
            {"threads", "one thread, built without OpenMP"},
#endif
        };
      },
      "What the extension was built with.");
}
