// SPDX-License-Identifier: Apache-2.0
// How a function becomes a row of the table of ops. torch's conversion of a str argument loses one std::string a call
// (pytorch issue 191340; the header of torch 2.13 still does): 48 bytes that also keep the heap around them from being
// used again. So what torch boxes takes the string's handle, and the string is made, and the handle deleted, here.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <type_traits>
#include <utility>

namespace bitmill {

template <class T>
using Boxed = std::conditional_t<std::is_same_v<T, std::string>, StringHandle, T>;

template <class T>
T unboxed(Boxed<T> argument) {
  if constexpr (std::is_same_v<T, std::string>) {
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(argument, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(argument, &data));
    std::string text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(argument));
    return text;
  } else {
    return argument;
  }
}

template <auto function>
struct Boxing;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Boxing<function> {
  static Result call(Boxed<Arguments>... arguments) { return function(unboxed<Arguments>(std::move(arguments))...); }
};

}  // namespace bitmill

#define BITMILL_BOX(function) TORCH_BOX(&bitmill::Boxing<&function>::call)
