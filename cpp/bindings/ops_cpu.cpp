// SPDX-License-Identifier: Apache-2.0
// The instruction set that the CPU ops of this library run on.
#include "boxing.h"
#include "checks.h"
#include "cpu.h"

namespace bitmill {
namespace {

// Selects the named set; an empty name only asks. Answers the set in use.
std::string instruction_set_any(std::string wanted) {
  for (const InstructionSet set : kInstructionSets) {
    if (wanted == name(set) && select(set)) wanted.clear();
  }
  if (!wanted.empty()) fail("instruction_set: \"", wanted, "\" is not one that this machine and this build have");
  return name(selected());
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", BITMILL_BOX(bitmill::instruction_set_any));
}
