#include "cpu/common/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "xlayer/aggregate.h"
#include "xlayer/hdim.h"
#include "xlayer/hyper.h"
#include "xlayer/quantize.h"
#include "xlayer/routing.h"

namespace xlayer::cpu {

namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && supported(Isa::avx2);
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        default:
            return true;
    }
#else
    return isa == Isa::baseline;
#endif
}

Isa choose() {
    const char* wanted = std::getenv("XLAYER_CPU_ISA");
    for (Isa candidate : {Isa::avx512, Isa::avx2, Isa::baseline}) {
        if (wanted != nullptr && *wanted != '\0' && std::strcmp(wanted, isa_name(candidate)) != 0) continue;
        if (supported(candidate)) return candidate;
    }
    return Isa::baseline;
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        default:
            return "baseline";
    }
}

Isa isa() {
    static const Isa chosen = choose();
    return chosen;
}

// One line per kernel entry point.
XLAYER_DISPATCH(aggregate, void, ema_scan_forward, EmaScanForward)
XLAYER_DISPATCH(aggregate, int64_t, ema_scan_forward_workspace, EmaScanForward)
XLAYER_DISPATCH(aggregate, void, ema_scan_backward, EmaScanBackward)
XLAYER_DISPATCH(aggregate, int64_t, ema_scan_backward_workspace, EmaScanBackward)
XLAYER_DISPATCH(aggregate, void, depth_gru_forward, DepthGruForward)
XLAYER_DISPATCH(aggregate, int64_t, depth_gru_forward_workspace, DepthGruForward)
XLAYER_DISPATCH(aggregate, void, depth_gru_backward, DepthGruBackward)
XLAYER_DISPATCH(aggregate, int64_t, depth_gru_backward_workspace, DepthGruBackward)
XLAYER_DISPATCH(aggregate, void, depth_attention_forward, DepthAttentionForward)
XLAYER_DISPATCH(aggregate, int64_t, depth_attention_forward_workspace, DepthAttentionForward)
XLAYER_DISPATCH(aggregate, void, depth_attention_backward, DepthAttentionBackward)
XLAYER_DISPATCH(aggregate, int64_t, depth_attention_backward_workspace, DepthAttentionBackward)
XLAYER_DISPATCH(hdim, void, masked_mean_forward, MaskedMeanForward)
XLAYER_DISPATCH(hdim, void, masked_mean_backward, MaskedMeanBackward)
XLAYER_DISPATCH(hdim, void, forward, HdimForward)
XLAYER_DISPATCH(hdim, void, backward, HdimBackward)
XLAYER_DISPATCH(hdim, int64_t, forward_workspace, HdimForward)
XLAYER_DISPATCH(hdim, int64_t, backward_workspace, HdimBackward)
XLAYER_DISPATCH(hyper, void, forward, HyperForward)
XLAYER_DISPATCH(hyper, void, backward, HyperBackward)
XLAYER_DISPATCH(hyper, int64_t, forward_workspace, HyperForward)
XLAYER_DISPATCH(hyper, int64_t, backward_workspace, HyperBackward)
XLAYER_DISPATCH(quantize, void, vq_nearest, VqNearest)
XLAYER_DISPATCH(quantize, int64_t, vq_nearest_workspace, VqNearest)
XLAYER_DISPATCH(quantize, void, vq_statistics, VqStatistics)
XLAYER_DISPATCH(quantize, int64_t, vq_statistics_workspace, VqStatistics)
XLAYER_DISPATCH(quantize, void, fsq_forward, FsqForward)

}  // namespace xlayer::cpu
