#include <pybind11/pybind11.h>

#include <string>

#include "emulator_bindings.hpp"
#include "probes.h"

namespace py = pybind11;
using namespace llmkernels;

namespace {

void run(const std::string& name, bool bug, uintptr_t input, uintptr_t output, int count,
         unsigned grid, unsigned block, size_t shared_bytes) {
  probes::Launcher launcher = probes::find_feature(name.c_str());
  if (launcher == nullptr) launcher = probes::find_fragment_feature(name.c_str());
  if (launcher == nullptr) launcher = probes::find_twin(name.c_str(), bug);
  if (launcher == nullptr) launcher = probes::find_matrix_twin(name.c_str(), bug);
  if (launcher == nullptr) throw py::value_error("no kernel is called " + name);
  const probes::Probe probe{reinterpret_cast<const uint32_t*>(input),
                            reinterpret_cast<uint32_t*>(output), count};
  const cudaError_t error = launcher(probe, {grid, block, shared_bytes});
  if (error != cudaSuccess) throw std::runtime_error(name + ": " + cudaGetErrorString(error));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("run", run, py::arg("name"), py::kw_only(), py::arg("bug") = false, py::arg("input"),
        py::arg("output"), py::arg("count"), py::arg("grid") = 1, py::arg("block") = 32,
        py::arg("shared_bytes") = 0);
  emulator::bind(m);
}
