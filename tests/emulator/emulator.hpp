// What csrc/common/platform.cuh includes in place of CUDA's headers: enough of CUDA C++ to compile
// csrc with g++ and run it on fibers. One file per family of features; a new family (mbarriers,
// TMA, wgmma) adds its own to host/ and engine/. Nothing here may hold a standard
// container: kernel units are instrumented, the engine must not be.
#pragma once

#include "host/convert.hpp"
#include "host/cp_async.hpp"
#include "host/intrinsics.hpp"
#include "host/language.hpp"
#include "host/launch.hpp"
#include "host/math.hpp"
#include "host/matrix.hpp"
#include "host/runtime.hpp"
#include "host/synchronization.hpp"
#include "host/warp.hpp"
