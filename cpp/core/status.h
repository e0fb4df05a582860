// SPDX-License-Identifier: Apache-2.0
// What a core function answers. The core never throws and never prints: the bindings turn a code into a sentence.
#pragma once

namespace bitmill {

enum class Status {
  ok,
  bad_size,      // a negative size, or k above kMaxColumns
  bad_argument,  // a combination of arguments that the function does not define
  corrupt,       // packed arrays that contradict each other
  device_error,  // a GPU refused a launch
};

constexpr const char* describe(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::bad_size:
      return "a size is negative, or k is above 16777216";
    case Status::bad_argument:
      return "this combination of arguments is not defined";
    case Status::corrupt:
      return "the packed arrays contradict each other";
    case Status::device_error:
      return "the GPU refused a launch";
  }
  return "unknown status";
}

}  // namespace bitmill
