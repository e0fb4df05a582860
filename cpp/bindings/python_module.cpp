// SPDX-License-Identifier: Apache-2.0
// _C: what needs Python and not torch. The machine's instruction sets, facts of the build, and kernels on buffers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("instruction_sets", &available_sets, "Instruction sets that this machine and this build have.");
  m.def("compiler", [] { return std::string(__VERSION__); }, "The compiler that built this library.");
}
