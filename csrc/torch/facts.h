// Facts about libxlayer that it exports as plain C, so that _native (which knows no torch) and a debugger can ask.
#pragma once

#define XLAYER_FACT extern "C" __attribute__((visibility("default")))

XLAYER_FACT const char* xlayer_version();
XLAYER_FACT const char* xlayer_isa();               // the instruction set that the CPU kernels run with here
XLAYER_FACT const char* xlayer_compiled_isas();     // all that were compiled, space-separated, best last
XLAYER_FACT const char* xlayer_cuda_archs();        // in CMake's form, space-separated; empty without CUDA kernels
XLAYER_FACT const char* xlayer_built_with_torch();  // version of the torch whose headers were used
XLAYER_FACT bool xlayer_stream_symbol_resolved();   // can torch's current CUDA stream be asked for?
