#include "../emulator_bindings.hpp"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include "block.hpp"
#include "grid.hpp"
#include "heap.hpp"
#include "race.hpp"
#include "report.hpp"

namespace py = pybind11;

namespace llmkernels::emulator {

namespace {

// A guarded buffer as Python holds it: its memory can be viewed, and is given back at the latest
// with the object.
class GuardedBuffer {
 public:
  GuardedBuffer(size_t bytes, size_t offset, const std::string& label)
      : begin_(allocate_guarded(bytes, offset, label).begin), bytes_(bytes) {}
  ~GuardedBuffer() { free(); }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  void free() {
    if (begin_ != nullptr) free_guarded(begin_);
    begin_ = nullptr;
  }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(begin_); }
  py::buffer_info view() const {
    if (begin_ == nullptr) throw py::value_error("the guarded buffer has been freed");
    return {begin_, 1, py::format_descriptor<unsigned char>::format(),
            static_cast<py::ssize_t>(bytes_)};
  }
  size_t bytes() const { return bytes_; }

 private:
  unsigned char* begin_;
  size_t bytes_;
};

void set_options(uint64_t seed, bool random_schedule, bool race, bool bank_conflicts) {
  if (race && !kernels_are_watched)
    throw py::value_error("race: expected False, got True: this build does not watch memory");
  options = {seed, random_schedule, race, bank_conflicts};
}

// As offsets into the module's file, where a symbol table names them.
std::set<uintptr_t> launched_offsets() {
  std::set<uintptr_t> offsets;
  for (const void* kernel : launched_kernels()) {
    Dl_info object;
    if (dladdr(kernel, &object) == 0) continue;
    offsets.insert(reinterpret_cast<uintptr_t>(kernel) -
                   reinterpret_cast<uintptr_t>(object.dli_fbase));
  }
  return offsets;
}

}  // namespace

void bind(py::module_& module) {
  options.race = kernels_are_watched;
  py::module_ m = module.def_submodule("emulator", "Steers the CPU host that runs these kernels.");
  m.attr("race_build") = kernels_are_watched;
  m.def("options", set_options, py::kw_only(), py::arg("seed") = 0,
        py::arg("random_schedule") = false, py::arg("race") = kernels_are_watched,
        py::arg("bank_conflicts") = false,
        "Sets what the following launches do; what is not given returns to its default.");
  m.def("report", report_lines,
        "What was found wrong since clear(): a sentence each, its kind first.");
  m.def("clear", clear_report, "Forgets the report.");
  m.def("launched", launched_offsets,
        "Every kernel launched so far, by its offset in the module's file.");
  py::class_<GuardedBuffer>(
      m, "GuardedBuffer", py::buffer_protocol(), py::module_local(),
      "Bytes of NaN between guards: a kernel's accesses beside them are reported.")
      .def(py::init<size_t, size_t, const std::string&>(), py::arg("bytes"), py::arg("offset") = 0,
           py::arg("label") = "buffer")
      .def_property_readonly("address", &GuardedBuffer::address)
      .def("__len__", &GuardedBuffer::bytes)
      .def("free", &GuardedBuffer::free)
      .def_buffer(&GuardedBuffer::view);
}

}  // namespace llmkernels::emulator
