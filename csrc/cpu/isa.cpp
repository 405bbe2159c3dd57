// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "brgemm.h"

namespace dmole::cpu {

namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "brgemm"};
constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "'" : ", '") + name + "'";
  return text;
}

// The last of the list that this machine runs.
Isa widest_isa() {
  static const Isa found = [] {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
    if (pairs) return has_brgemm() ? Isa::brgemm : Isa::avx512_bf16;
    if (avx512) return Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
    return Isa::scalar;
  }();
  return found;
}

Isa parsed(const std::string& name, const char* source) {
  for (int level = 0; level <= static_cast<int>(widest_isa()); ++level) {
    if (name == kNames[level]) return static_cast<Isa>(level);
  }
  throw std::invalid_argument(std::string(source) + " is '" + name + "'; expected 'auto' or what this machine runs: " +
                              listed(available_isas()) + ". Choose one of these.");
}

}  // namespace

Isa detected_isa() {
  // Without AMX tiles brgemm is as slow as the kernels here.
  return widest_isa() == Isa::brgemm && !has_amx() ? Isa::avx512_bf16 : widest_isa();
}

Isa current_isa() {
  int level = chosen.load(std::memory_order_relaxed);
  if (level == kUnset) {
    const char* asked = std::getenv("DMOLE_KERNELS_ISA");
    const bool any = asked == nullptr || *asked == '\0' || std::string(asked) == "auto";
    level = static_cast<int>(any ? detected_isa() : parsed(asked, "DMOLE_KERNELS_ISA"));
    chosen.store(level, std::memory_order_relaxed);
  }
  return static_cast<Isa>(level);
}

void set_isa(const std::string& name) {
  const Isa isa = name == "auto" ? detected_isa() : parsed(name, "isa");
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
}

const char* cpu_maker() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "other";
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int level = 0; level <= static_cast<int>(widest_isa()); ++level) names.emplace_back(kNames[level]);
  return names;
}

}  // namespace dmole::cpu
