// SPDX-License-Identifier: Apache-2.0
// _C: what needs Python and not torch. The machine's instruction sets, facts of the build, probes of the peaks, kernels
// on NumPy buffers (bitmill.arrays checks the arguments; here sizes are read from the arrays), and a look at many
// dictionaries at once (bitmill.unchanged).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "binary_matmul.h"
#include "bitpack.h"
#include "cpu.h"
#include "fp4.h"
#include "layout.h"
#include "probe.h"

namespace py = pybind11;
using namespace bitmill;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void require(Status status) {
  if (status != Status::ok) throw std::invalid_argument(describe(status));
}

std::vector<std::string> available_sets() {
  std::vector<std::string> names;
  for (const auto set : kInstructionSets) {
    if (available(set)) names.emplace_back(name(set));
  }
  return names;
}

std::string instruction_set(const std::string& wanted) {
  for (const auto set : kInstructionSets) {
    if (wanted == name(set) && select(set)) return wanted;
  }
  if (!wanted.empty()) {
    throw std::invalid_argument("instruction_set: \"" + wanted + "\" is not one that this machine and this build have");
  }
  return name(selected());
}

// Function to the sets, beyond the generic one, that it has kernels for.
std::map<std::string, std::vector<std::string>> kernels() {
  std::map<std::string, std::vector<std::string>> sets;
  for (const auto& row : kKernels) sets[row.function].emplace_back(name(row.set));
  return sets;
}

// x [m, k] float32 or float16 bits.
py::tuple pack_rows(const py::array& x, bool half, const std::string& levels, float threshold) {
  BitpackParams p;
  p.x = x.data();
  p.dtype = half ? Dtype::f16 : Dtype::f32;
  p.m = x.shape(0);
  p.k = p.row_stride = x.shape(1);
  p.levels = levels == "sign" ? Levels::sign : levels == "plus" ? Levels::plus : Levels::bool_;
  p.threshold = threshold;
  const bool two_planes = p.levels == Levels::sign;
  Array<int32_t> sign({p.m, word_count(p.k)}), nonzero({two_planes ? p.m : 0, word_count(p.k)});
  p.sign = sign.mutable_data();
  p.nonzero = two_planes ? nonzero.mutable_data() : nullptr;
  require(bitpack(p));
  return py::make_tuple(sign, nonzero);
}

Array<int8_t> unpack_rows(const Array<int32_t>& sign, const std::optional<Array<int32_t>>& nonzero, int64_t k) {
  Array<int8_t> values({static_cast<int64_t>(sign.shape(0)), k});
  require(bitunpack(sign.data(), nonzero ? nonzero->data() : nullptr, sign.shape(0), k, values.mutable_data()));
  return values;
}

Array<int32_t> pack_tiles(const Array<uint8_t>& codes, int bits) {
  const int64_t n = codes.shape(0), k = codes.shape(1);
  Array<int32_t> tiles({tile_count(n), word_count(k, bits), kTileRows});
  require(tile_pack(codes.data(), n, k, bits, tiles.mutable_data()));
  return tiles;
}

Array<uint8_t> unpack_tiles(const Array<int32_t>& tiles, int64_t n, int64_t k, int bits) {
  Array<uint8_t> codes({n, k});
  require(tile_unpack(tiles.data(), n, k, bits, codes.mutable_data()));
  return codes;
}

Array<int32_t> multiply(const Array<int32_t>& a, const std::optional<Array<int32_t>>& a_nonzero,
                        const Array<int32_t>& weight, int64_t n, int64_t k, bool boolean) {
  BinaryMatmulParams p;
  p.m = a.shape(0);
  p.n = n;
  p.k = k;
  Array<int32_t> dot({p.m, n});
  p.a = a.data();
  p.a_nonzero = a_nonzero ? a_nonzero->data() : nullptr;
  p.operand = boolean ? Operand::bool_ : a_nonzero ? Operand::ternary : Operand::sign;
  p.weight = weight.data();
  p.dot = dot.mutable_data();
  require(binary_matmul(p));
  return dot;
}

Fp4Format format_of(const std::string& format) { return format == "e1m2" ? kE1M2 : format == "e3m0" ? kE3M0 : kE2M1; }

Rounding rounding_of(const std::string& rounding) {
  if (rounding == "stochastic") return Rounding::stochastic;
  if (rounding == "toward_zero") return Rounding::toward_zero;
  return rounding == "half_away" ? Rounding::half_away : Rounding::nearest_even;
}

Array<uint8_t> cast_rows(const py::array& x, bool half, const std::string& format, const std::string& rounding,
                         int64_t seed, int64_t offset) {
  Fp4CastParams p;
  p.x = x.data();
  p.dtype = half ? Dtype::f16 : Dtype::f32;
  p.m = x.shape(0);
  p.k = p.row_stride = x.shape(1);
  p.format = format_of(format);
  p.rounding = rounding_of(rounding);
  p.random = {static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)};
  Array<uint8_t> packed({p.m, ceil_div(p.k, 2)});
  p.packed = packed.mutable_data();
  require(fp4_cast(p));
  return packed;
}

Array<float> uncast_rows(const Array<uint8_t>& packed, int64_t k, const std::string& format) {
  Array<float> values({static_cast<int64_t>(packed.shape(0)), k});
  require(fp4_uncast(packed.data(), packed.shape(0), k, format_of(format), values.mutable_data()));
  return values;
}

double read_rate(const Array<uint8_t>& data) {
  const void* bytes = data.data();
  const int64_t count = data.size();
  const py::gil_scoped_release unlocked;
  return read_bandwidth(bytes, count);
}

double copy_rate(Array<uint8_t>& to, const Array<uint8_t>& source) {
  if (to.size() != source.size()) throw std::invalid_argument("copy_bandwidth: both arrays must have the same size");
  void* target = to.mutable_data();
  const void* bytes = source.data();
  const int64_t count = source.size();
  const py::gil_scoped_release unlocked;
  return copy_bandwidth(target, bytes, count);
}

PyObject* dict_at(const py::list& dicts, Py_ssize_t i) {
  PyObject* dict = PyList_GET_ITEM(dicts.ptr(), i);
  if (!PyDict_Check(dict))
    throw py::type_error("all_unchanged: empty and tables must hold dictionaries, got another object");
  return dict;
}

// Hundreds of dictionaries that other work has pushed out of the caches: asked for ahead, they arrive together, which
// makes this five times as fast as the loops of Python's own functions.
bool all_unchanged(const py::list& empty, const py::list& tables, const py::list& keys, const py::list& values) {
  constexpr Py_ssize_t kDictsAhead = 48, kKeysAhead = 24, kLines = 6;
  const auto count = static_cast<Py_ssize_t>(tables.size());
  if (keys.size() != tables.size() || values.size() != tables.size()) {
    throw std::invalid_argument("all_unchanged: tables, keys and values must have the same length");
  }
  for (const py::handle each : empty) __builtin_prefetch(&reinterpret_cast<PyDictObject*>(each.ptr())->ma_used);
  for (size_t i = 0; i < empty.size(); ++i) {
    if (PyDict_GET_SIZE(dict_at(empty, static_cast<Py_ssize_t>(i))) != 0) return false;
  }
  for (Py_ssize_t i = -kDictsAhead; i < count; ++i) {
    const Py_ssize_t far = i + kDictsAhead, near = i + kKeysAhead;
    if (far < count) __builtin_prefetch(PyList_GET_ITEM(tables.ptr(), far));
    if (near >= 0 && near < count) {
      const auto* dict = reinterpret_cast<PyDictObject*>(dict_at(tables, near));
      const auto* entries = reinterpret_cast<const char*>(dict->ma_keys);
      for (Py_ssize_t line = 0; line < kLines; ++line) __builtin_prefetch(entries + 64 * line);
    }
    if (i < 0) continue;
    PyObject* key = PyList_GET_ITEM(keys.ptr(), i);
    if (!PyUnicode_CheckExact(key)) throw py::type_error("all_unchanged: keys must be str, got another object");
    PyObject* found = PyDict_GetItemWithError(dict_at(tables, i), key);
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    if ((found ? found : Py_None) != PyList_GET_ITEM(values.ptr(), i)) return false;
  }
  return true;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("instruction_sets", &available_sets, "Instruction sets that this machine and this build have.");
  m.def("instruction_set", &instruction_set, py::arg("wanted") = "", "Select a set for this library; \"\" only asks.");
  m.def("kernels", &kernels, "Functions with kernels for instruction sets beyond the generic one.");
  m.def("compiler", [] { return std::string(__VERSION__); }, "The compiler that built this library.");
  const py::call_guard<py::gil_scoped_release> unlocked;  // several threads may probe at once
  m.def("popcount_peak", &popcount_peak, unlocked,
        "Bit multiply-adds a second that one core reaches with xor, popcount and add"
        " on registers; 0 if this machine has no vector popcount.");
  m.def("float32_peak", &float32_peak, unlocked, "The same of float32 FMA.");
  m.def("bfloat16_peak", &bfloat16_peak, unlocked, "The same of bfloat16 dot products.");
  m.def("int8_peak", &int8_peak, unlocked, "The same of int8 dot products.");
  m.def("read_bandwidth", &read_rate, "Bytes a second of one sequential read of the array.");
  m.def("copy_bandwidth", &copy_rate, "Bytes a second of a copy of `source` to `to`, an array of the same size.");
  m.def("binary_matmul_seconds", &binary_matmul_seconds, unlocked,
        "Median seconds of the integer product alone, one thread.");
  m.def(
      "all_unchanged", &all_unchanged,
      "Whether the first dictionaries are empty, and each of the others has the value for its key, or none for None.");
  m.def("bitpack", &pack_rows);
  m.def("bitunpack", &unpack_rows);
  m.def("tile_pack", &pack_tiles);
  m.def("tile_unpack", &unpack_tiles);
  m.def("binary_matmul", &multiply);
  m.def("fp4_cast", &cast_rows);
  m.def("fp4_uncast", &uncast_rows);
}
