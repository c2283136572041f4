// hdim backward: the caller recomputes the scores (score.cu); the steps are those of backward.cuh.
#include "cuda/hdim/backward.cuh"

namespace xlayer::cuda::hdim {
namespace {

constexpr int64_t kKeyBytes = 32 * 1024;  // of keys in shared memory, in grad_weights

template <class T, class Activation, int G>
GradPlan make_plan(const PairSizes& s) {
    constexpr int64_t kTargetWarps = 2048;  // warps: two for each that a large GPU holds at once
    GradPlan plan;
    plan.keys = make_pair_tiling<T, G, kGradTiles<T, Activation, G>>(s, kTargetWarps);
    const int64_t limit = kKeyBytes / static_cast<int64_t>(tile_pitch(G) * sizeof(T)) / 16 * 16;
    plan.weight_chunk = s.pitch < limit ? s.pitch : limit;
    plan.weight_chunks = plan.weight_chunk == 0 ? 0 : ceil_div(s.keys, plan.weight_chunk);
    plan.weight_tiles = s.hidden / 16;
    plan.weight_slice = slice_length(s.queries, s.batch * plan.weight_chunks * plan.weight_tiles, kTargetWarps);
    plan.weight_slices = ceil_div(s.queries, plan.weight_slice);
    return plan;
}

template <class T>
GradPartials<T> take_partials(Workspace& space, const PairSizes& s, const GradPlan& plan) {
    using A = Accumulator<T>;
    const int64_t width = 8 * s.groups, chunks = plan.weight_chunks, slices = plan.weight_slices;
    GradPartials<T> to;
    to.query_of_pairs = space.take<A>(s.batch, plan.keys.key_tiles, s.queries, width);
    to.query_of_weights = space.take<A>(s.batch, chunks, plan.weight_tiles, s.queries, width);
    to.key = space.take<A>(s.batch, plan.keys.query_slices, s.keys, width);
    to.weight = space.take<A>(s.batch, chunks, slices, s.hidden, 4, width);
    to.hidden = space.take<A>(s.batch, chunks, slices, s.hidden, 2);
    return to;
}

}  // namespace

int64_t grad_pairs_workspace(const HdimInputs& in) {
    const PairSizes sizes(in);
    Workspace space(nullptr);
    dispatch_pair_types(in, [&](auto element, auto activation, auto groups) {
        using T = decltype(element);
        take_packed<T>(space, sizes);
        take_partials<T>(space, sizes, make_plan<T, decltype(activation), decltype(groups)::value>(sizes));
    });
    return space.bytes;
}

void grad_pairs(const HdimGradPairs& args, void* stream) {
    const PairSizes sizes(args.in);
    dispatch_pair_types(args.in, [&](auto element, auto activation, auto groups) {
        using T = decltype(element);
        using Activation = decltype(activation);
        constexpr int G = decltype(groups)::value;
        Workspace space(args.workspace);
        const Packed<T> packed = take_packed<T>(space, sizes);
        const GradPlan plan = make_plan<T, Activation, G>(sizes);
        const GradPartials<T> partials = take_partials<T>(space, sizes, plan);
        softmax_backward<T>(args, sizes, stream);
        grad_keys<T, Activation, G>(args, packed, sizes, plan, partials, stream);
        grad_weights<T, Activation, G>(args, packed, sizes, plan, partials, stream);
        finish<T>(args, packed, sizes, plan, partials, stream);
    });
}

}  // namespace xlayer::cuda::hdim
