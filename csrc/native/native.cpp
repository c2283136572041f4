// xlayer_ext._native: facts about the build and this machine, and what its processor can do at most. Knows no torch;
// what libxlayer knows, it is asked for through the plain C functions of csrc/torch/facts.h, once torch has loaded it.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "roof.h"

namespace py = pybind11;

namespace {

struct KernelResources {
    const char* kernel;
    const char* arch;
    int threads, registers, shared_bytes, stack_bytes, spill_store_bytes, spill_load_bytes, register_ceiling;
    double occupancy, occupancy_floor;
};

const std::vector<KernelResources> kKernels = {
#include "kernel_resources.inc"
};

// libxlayer lies beside this module. RTLD_NOLOAD: this module must not be what loads it.
void* library() {
    Dl_info here;
    if (dladdr(reinterpret_cast<const void*>(&library), &here) == 0) return nullptr;
    const std::string path(here.dli_fname);
    return dlopen((path.substr(0, path.rfind('/') + 1) + "libxlayer.so").c_str(), RTLD_LAZY | RTLD_NOLOAD);
}

template <class Result>
std::optional<Result> fact(const char* name) {
    void* handle = library();
    if (handle == nullptr) return std::nullopt;
    void* symbol = dlsym(handle, name);
    dlclose(handle);  // gives back the reference that dlopen took; torch keeps its own
    if (symbol == nullptr) return std::nullopt;
    return reinterpret_cast<Result (*)()>(symbol)();
}

std::vector<std::string> words(const char* name) {
    std::istringstream stream(fact<const char*>(name).value_or(""));
    return {std::istream_iterator<std::string>(stream), {}};
}

std::vector<std::string> archs() { return words("xlayer_cuda_archs"); }

py::list kernel_resources() {
    py::list rows;
    for (const KernelResources& kernel : kKernels) {
        py::dict row;
        row["kernel"] = kernel.kernel;
        row["arch"] = kernel.arch;
        row["threads"] = kernel.threads;
        row["registers"] = kernel.registers;
        row["shared_bytes"] = kernel.shared_bytes;
        row["stack_bytes"] = kernel.stack_bytes;
        row["spill_store_bytes"] = kernel.spill_store_bytes;
        row["spill_load_bytes"] = kernel.spill_load_bytes;
        row["register_ceiling"] = kernel.register_ceiling;
        row["occupancy"] = kernel.occupancy;
        row["occupancy_floor"] = kernel.occupancy_floor;
        rows.append(row);
    }
    return rows;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Facts about the native build and this machine. Those of libxlayer are None or empty until it is loaded.";
    m.attr("__version__") = XLAYER_VERSION;
    m.def("library_version", [] { return fact<const char*>("xlayer_version"); }, "Version of the loaded libxlayer.");
    m.def(
        "built_with_torch", [] { return fact<const char*>("xlayer_built_with_torch"); },
        "Version of the torch whose headers libxlayer was built with.");
    m.def("isa", [] { return fact<const char*>("xlayer_isa"); }, "Instruction set that the CPU kernels run with.");
    m.def(
        "compiled_isas", [] { return words("xlayer_compiled_isas"); },
        "Instruction sets that the CPU kernels were compiled for.");
    m.def("cuda_built", [] { return !archs().empty(); }, "Whether libxlayer holds CUDA kernels.");
    m.def("archs", &archs, "CUDA architectures that the kernels were compiled for, in CMake's form (90a-real).");
    m.def(
        "stream_symbol_resolved", [] { return fact<bool>("xlayer_stream_symbol_resolved").value_or(false); },
        "Whether this torch can name its current CUDA stream; false in CPU builds of torch.");
    m.def("nvtx", [] { return XLAYER_NVTX != 0; }, "Whether kernel launches are marked with NVTX ranges.");
    m.def(
        "kernel_resources", &kernel_resources,
        "One dict per CUDA kernel and architecture, from ptxas: kernel, arch, threads (of a block, 0 if not bounded), "
        "registers (per thread), shared_bytes (with what its source says that a launch asks for), stack_bytes, "
        "spill_store_bytes, spill_load_bytes, occupancy (resident threads over the most possible; 0 if not known), and "
        "register_ceiling and occupancy_floor, which its source promises (0 if it does not).");

    using xlayer::roof::Roof;
    const auto without_gil = py::call_guard<py::gil_scoped_release>();
    m.def("roof_isas", &xlayer::roof::supported_isas,
          "Instruction sets of this processor that `Roof` knows, the widest first; libxlayer need not be loaded.");
    py::class_<Roof>(m, "Roof", "Times what a processor can do at most, with one instruction set and some threads.")
        .def(py::init<const std::string&, int>(), py::arg("isa"), py::arg("threads"))
        .def_property_readonly("isa", &Roof::isa)
        .def_property_readonly("threads", &Roof::threads)
        .def("lanes", &Roof::lanes, py::arg("dtype"), "Numbers in one vector; dtype is float32 or float64.")
        .def("flops_per_step", &Roof::flops_per_step, py::arg("dtype"),
             "Operations of all threads in one step of `multiply_adds`, two for each multiply-add.")
        .def("multiply_adds", &Roof::multiply_adds, py::arg("dtype"), py::arg("steps"), py::arg("additions"),
             py::arg("blocks"), without_gil,
             "Seconds of so many steps of independent multiply-adds, and of so many additions (a multiple of 64) that "
             "need one another, one cycle each: a pair for each block, fewer where the machine is busy.")
        .def("move", &Roof::move, py::arg("kind"), py::arg("footprint"), py::arg("blocks"), without_gil,
             "Bytes read and written in a block, and the seconds of each; kind is copy, streaming copy, library copy, "
             "read, write or streaming write. About `footprint` bytes are touched, and kept for the next call.");
}
