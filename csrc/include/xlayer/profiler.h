// Names what runs to Nvidia's profilers: NVTX ranges in the domain `xlayer`, in builds with XLAYER_NVTX. Without it,
// nothing is left of them; with it and no profiler, a range costs NVTX's own test of one pointer.
#pragma once

#ifdef XLAYER_NVTX
#include <nvtx3/nvtx3.hpp>
#endif

namespace xlayer {

#ifdef XLAYER_NVTX
struct ProfilerDomain {
    static constexpr const char* name{"xlayer"};
};
using ProfilerRange = nvtx3::scoped_range_in<ProfilerDomain>;
#else
struct ProfilerRange {
    explicit ProfilerRange(const char*) {}
};
#endif

}  // namespace xlayer
