// For csrc/bindings.cpp: adds the submodule `emulator`, by which tests steer the emulator, to an
// emulated module.
#pragma once

#include <pybind11/pybind11.h>

namespace llmkernels::emulator {

void bind(pybind11::module_& module);

}  // namespace llmkernels::emulator
