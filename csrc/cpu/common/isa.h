// Run-time choice of the instruction set. Each CPU kernel file is compiled once per set into its own namespace
// (xlayer::cpu::baseline, ::avx2, ::avx512); the choice is made once per process.
#pragma once

namespace xlayer::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best set that this processor has, or the one named by XLAYER_CPU_ISA if the processor has that too.
Isa isa();
const char* isa_name(Isa isa);

}  // namespace xlayer::cpu

// Defines xlayer::cpu::FAMILY::NAME(const ARGS&), which calls the variant for isa(). For isa.cpp only.
#if defined(__x86_64__)
#define XLAYER_DISPATCH(FAMILY, RETURN, NAME, ARGS)  \
    namespace baseline::FAMILY {                     \
    RETURN NAME(const ARGS&);                        \
    }                                                \
    namespace avx2::FAMILY {                         \
    RETURN NAME(const ARGS&);                        \
    }                                                \
    namespace avx512::FAMILY {                       \
    RETURN NAME(const ARGS&);                        \
    }                                                \
    namespace FAMILY {                               \
    RETURN NAME(const ARGS& args) {                  \
        switch (isa()) {                             \
            case Isa::avx512:                        \
                return avx512::FAMILY::NAME(args);   \
            case Isa::avx2:                          \
                return avx2::FAMILY::NAME(args);     \
            default:                                 \
                return baseline::FAMILY::NAME(args); \
        }                                            \
    }                                                \
    }
#else
#define XLAYER_DISPATCH(FAMILY, RETURN, NAME, ARGS)                        \
    namespace baseline::FAMILY {                                           \
    RETURN NAME(const ARGS&);                                              \
    }                                                                      \
    namespace FAMILY {                                                     \
    RETURN NAME(const ARGS& args) { return baseline::FAMILY::NAME(args); } \
    }
#endif
