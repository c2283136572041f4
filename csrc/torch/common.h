// Shared parts of the operator files: checks that name the argument, dtype mapping, a kernel's inputs and outputs, and
// the scopes that run a kernel on the CPU or on CUDA. Stable ABI only: no ATen, no c10.
//
// Every operator has the same form. A class <Operator>Arguments, made of the operator's arguments, checks them, holds
// the contiguous copies that its contract `args` points into, and allocates outputs; the operator fills in the outputs'
// pointers and has a scope run the kernel. Operators that are one kernel on every device are templates of the scope.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "xlayer/profiler.h"
#include "xlayer/types.h"
#include "xlayer/workspace.h"

// The namespace of the operators. The emulator (tests/emulator) runs the CUDA kernels on tensors of the CPU, in a
// namespace of its own, so that both libraries can be loaded into one process.
#ifdef XLAYER_EMULATED
#include <cstring>

#include "checker.h"
#define XLAYER_OPS xlayer_emulated
#define XLAYER_CUDA_KEY CPU
#else
#define XLAYER_OPS xlayer
#define XLAYER_CUDA_KEY CUDA
#endif
#if defined(XLAYER_CUDA) || defined(XLAYER_EMULATED)
#define XLAYER_HAS_CUDA_KERNELS
#endif

// Only CUDA builds of torch have this function, and only their headers declare it. Weak, so that one library loads in
// CPU builds too, where the address is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
// Since torch 2.13: the message of this thread's last error in torch. Weak, as above.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace xlayer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_string(const Tensor& tensor) {
    std::string text = "[";
    for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
    return text + "]";
}

// Limit of a tensor's elements, empty dimensions counted as 1: more than any memory holds, but a tensor without
// elements, or one that is expanded, can have the shape. Sizes below it can be multiplied by the kernels' constants.
constexpr int64_t kMaxElements = int64_t{1} << 50;

inline void check_elements(torch::headeronly::IntHeaderOnlyArrayRef shape, const char* name) {
    int64_t elements = 1;
    for (int64_t length : shape) elements = product_of_sizes(elements, length > 1 ? length : 1);
    if (elements <= kMaxElements) return;
    std::string text;
    for (int64_t length : shape) text += (text.empty() ? "" : ", ") + std::to_string(length);
    STD_TORCH_CHECK(false, name, " must have at most 2^50 elements (empty dimensions count as 1), got shape [", text,
                    "]");
}

inline void check_elements(const Tensor& tensor, const char* name) { check_elements(tensor.sizes(), name); }

// The dispatcher lets None through where a tensor is required.
inline void check_given(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.defined(), name, " must be a tensor, got None");
}

// The tensor has exactly this shape; -1 accepts any length.
inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
    check_given(tensor, name);
    bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
    std::string wanted;
    int64_t d = 0;
    for (int64_t length : shape) {
        fits = fits && (length < 0 || tensor.size(d) == length);
        wanted += (d ? ", " : "") + (length < 0 ? std::string("*") : std::to_string(length));
        ++d;
    }
    STD_TORCH_CHECK(fits, name, " must have shape [", wanted, "], got ", shape_string(tensor));
    check_elements(tensor, name);
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must have dtype ", torch::headeronly::toString(dtype),
                    ", got ", torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& first, const char* first_name) {
    STD_TORCH_CHECK(tensor.is_cuda() == first.is_cuda() && tensor.is_cpu() == first.is_cpu() &&
                        tensor.get_device_index() == first.get_device_index(),
                    name, " must be on the same device as ", first_name);
}

// The kernels' name for a tensor's dtype; refuses every dtype that no kernel has.
inline DType kernel_dtype(const Tensor& tensor, const char* name) {
    check_given(tensor, name);
    switch (tensor.scalar_type()) {
        case ScalarType::Double:
            return DType::float64;
        case ScalarType::Float:
            return DType::float32;
        case ScalarType::BFloat16:
            return DType::bfloat16;
        case ScalarType::Half:
            return DType::float16;
        default:
            STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16, got ",
                            torch::headeronly::toString(tensor.scalar_type()));
    }
    __builtin_unreachable();
}

// Calls f, which calls torch. The stable ABI keeps torch's own message for itself, which matters when memory is full:
// it is thrown on where torch has it to give, and else in words of ours.
template <class F>
auto with_message_of_torch(const char* otherwise, const F& f) {
    try {
        return f();
    } catch (const std::runtime_error&) {
        const bool keeps_messages = torch_exception_get_what_without_backtrace != nullptr;
        const char* message = keeps_messages ? torch_exception_get_what_without_backtrace() : nullptr;
        throw std::runtime_error(message != nullptr && *message != '\0' ? message : otherwise);
    }
}

inline void call_torch(const char* op, const char* overload, StableIValue* stack, const char* otherwise) {
    with_message_of_torch(otherwise, [&] {
        if (torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS)
            throw std::runtime_error(otherwise);
    });
}

inline Tensor as_contiguous(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;  // a check of shapes will say so
    return with_message_of_torch("not enough memory for a contiguous copy of an argument",
                                 [&] { return torch::stable::contiguous(tensor); });
}

// The tensor itself if neighbours along its last dimension are neighbours in memory, else a contiguous copy.
// A tensor without a last dimension is left to the checks of shapes.
inline Tensor unit_stride_last(const Tensor& tensor) {
    if (!tensor.defined() || tensor.dim() == 0) return tensor;
    const int64_t last = tensor.dim() - 1;
    return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : as_contiguous(tensor);
}

// A new contiguous tensor for a kernel to write to; its contents are arbitrary, for the emulator NaN. `name` is what
// the emulator calls it when a kernel leaves its bounds.
inline Tensor new_memory(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype,
                         [[maybe_unused]] const char* name) {
    Tensor tensor = with_message_of_torch("not enough memory for the operator's results and scratch",
                                          [&] { return torch::stable::new_empty(like, shape, dtype); });
#ifdef XLAYER_EMULATED
    const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
    if (bytes > 0) std::memset(tensor.mutable_data_ptr(), 0xFF, bytes);
    emulator::allow_memory(tensor.const_data_ptr(), bytes, true, name);
#endif
    return tensor;
}

// The same for a result, whose sizes are checked.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype,
                       const char* name) {
    check_elements(shape, name);
    return new_memory(like, shape, dtype, name);
}

inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> shape, const char* name) {
    return allocate(like, shape, like.scalar_type(), name);
}

// The accumulation type of a dtype, for statistics and parameters.
inline ScalarType accumulation_type(DType dtype) {
    return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
}

// The workspace of one call, aligned.
inline Tensor new_workspace(const Tensor& like, int64_t bytes, void** aligned) {
    STD_TORCH_CHECK(bytes < kMaxBytes, "the workspace of this call would exceed 2^61 bytes");
    Tensor buffer = new_memory(like, {bytes + kWorkspaceAlignment}, ScalarType::Byte, "workspace");
    const auto address = reinterpret_cast<uintptr_t>(buffer.mutable_data_ptr());
    *aligned = reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment);
    return buffer;
}

// The data of a tensor that a kernel reads. The emulator lets it read what the strides reach, and write nothing there.
inline const void* kernel_input(const Tensor& tensor, [[maybe_unused]] const char* name) {
#ifdef XLAYER_EMULATED
    int64_t elements = tensor.numel() == 0 ? 0 : 1;
    for (int64_t d = 0; elements > 0 && d < tensor.dim(); ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
    emulator::allow_memory(tensor.const_data_ptr(), static_cast<size_t>(elements) * tensor.element_size(), false, name);
#endif
    return tensor.const_data_ptr();
}

// One call of torch_parallel_for. An exception must not leave a worker thread: the first one is kept here, and thrown
// again in the thread that made the call.
class PoolTask {
  public:
    PoolTask(ThreadPool::Body body, void* context) : body_(body), context_(context) {}

    static void run(int64_t begin, int64_t end, int64_t grain, ThreadPool::Body body, void* context) {
        PoolTask task(body, context);
        const AOTITorchError status = torch_parallel_for(begin, end, grain, &PoolTask::range, &task);
        if (task.error_) std::rethrow_exception(task.error_);
        STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "torch_parallel_for failed");
    }

  private:
    static void range(int64_t begin, int64_t end, void* opaque) {
        auto& task = *static_cast<PoolTask*>(opaque);
        try {
            task.body_(begin, end, task.context_);
        } catch (...) {
            if (!task.failed_.exchange(true)) task.error_ = std::current_exception();
        }
    }

    ThreadPool::Body body_;
    void* context_;
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;
};

// torch's own intra-op threads.
inline ThreadPool torch_pool() { return {&PoolTask::run, static_cast<int64_t>(torch::stable::get_num_threads())}; }

// One call of an operator on the CPU.
class CpuScope {
  public:
    explicit CpuScope(const Tensor&) {}

    // Runs a kernel in a workspace of the size that it asks for.
    template <class Args>
    void run(const Tensor& like, Args& args, int64_t (*workspace_bytes)(const Args&),
             void (*kernel)(const Args&)) const {
        const Tensor workspace = new_workspace(like, workspace_bytes(args), &args.workspace);
        kernel(args);
    }
    template <class Args>
    void run(const Args& args, void (*kernel)(const Args&)) const {
        kernel(args);
    }
};

#ifdef XLAYER_EMULATED
// For the length of an operator: the emulator's kernels may touch the tensors that were named in it, and nothing else.
class CudaScope {
  public:
    explicit CudaScope(const Tensor&) { emulator::forget_memory(); }
    CudaScope(const CudaScope&) = delete;
    ~CudaScope() { emulator::forget_memory(); }
    void* stream() const { return nullptr; }

    // Runs a kernel in a workspace of the size that it asks for.
    template <class Args>
    void run(const Tensor& like, Args& args, int64_t (*workspace_bytes)(const Args&),
             void (*kernel)(const Args&, void*)) const {
        const Tensor workspace = new_workspace(like, workspace_bytes(args), &args.workspace);
        kernel(args, stream());
    }
    template <class Args>
    void run(const Args& args, void (*kernel)(const Args&, void*)) const {
        kernel(args, stream());
    }
};
#else
// For the length of a CUDA operator: makes the tensor's device current and holds torch's current stream there. `name`,
// the function that it stands in, is what profilers show around the operator's launches.
class CudaScope {
  public:
    explicit CudaScope(const Tensor& tensor, const char* name = __builtin_FUNCTION())
        : range_(name), guard_(tensor.get_device_index()) {
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                        "this PyTorch has no CUDA streams: it is a CPU build");
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_) == AOTI_TORCH_SUCCESS,
                        "could not get the current CUDA stream");
    }
    void* stream() const { return stream_; }

    // Runs a kernel in a workspace of the size that it asks for.
    template <class Args>
    void run(const Tensor& like, Args& args, int64_t (*workspace_bytes)(const Args&),
             void (*kernel)(const Args&, void*)) const {
        const Tensor workspace = new_workspace(like, workspace_bytes(args), &args.workspace);
        kernel(args, stream());
    }
    template <class Args>
    void run(const Args& args, void (*kernel)(const Args&, void*)) const {
        kernel(args, stream());
    }

  private:
    ProfilerRange range_;
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_ = nullptr;
};
#endif

}  // namespace xlayer
