#include "facts.h"

#include "common.h"
#include "cpu/common/isa.h"

const char* xlayer_version() { return XLAYER_VERSION; }

const char* xlayer_isa() { return xlayer::cpu::isa_name(xlayer::cpu::isa()); }

const char* xlayer_compiled_isas() { return XLAYER_COMPILED_ISAS; }

const char* xlayer_cuda_archs() { return XLAYER_CUDA_ARCHS; }

const char* xlayer_built_with_torch() { return XLAYER_BUILT_WITH_TORCH; }

bool xlayer_stream_symbol_resolved() { return aoti_torch_get_current_cuda_stream != nullptr; }
