// SPDX-License-Identifier: Apache-2.0
// _C: what needs Python and not torch. The machine's instruction sets, facts of the build, and kernels on buffers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu.h"

namespace py = pybind11;

namespace {

std::vector<std::string> available_sets() {
  std::vector<std::string> names;
  for (const auto set : bitmill::kInstructionSets) {
    if (bitmill::available(set)) names.emplace_back(bitmill::name(set));
  }
  return names;
}

// Function to the sets, beyond the generic one, that it has kernels for.
std::map<std::string, std::vector<std::string>> kernels() {
  std::map<std::string, std::vector<std::string>> sets;
  for (const auto& row : bitmill::kKernels) sets[row.function].emplace_back(bitmill::name(row.set));
  return sets;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("instruction_sets", &available_sets, "Instruction sets that this machine and this build have.");
  m.def("kernels", &kernels, "Functions with kernels for instruction sets beyond the generic one.");
  m.def("compiler", [] { return std::string(__VERSION__); }, "The compiler that built this library.");
}
