// Runs CUDA kernels on the CPU and reports what a GPU would get wrong. Include it before the kernel; see README.md.
#pragma once

#ifdef __CUDACC__
#error "nvcc compiles kernels without this header"
#endif
#define PRFL_CUDA_ON_CPU

#include "access.h"
#include "async_copy.h"
#include "intrinsics.h"
#include "launch.h"
#include "matrix.h"
#include "qualifiers.h"
#include "warp.h"
