// pybind11 glue of mvdream_fast._C: raw pointers and sizes come in, nothing else knows Python.
// Only mvdream_fast/ops may call it, after checking device, dtype, contiguity and shape.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/pages.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace mvdream_fast {
void bind_field(py::module_& m);
void bind_render(py::module_& m);
void bind_shapes(py::module_& m);
void bind_cuda(py::module_& m);
void bind_unet(py::module_& m);
void bind_launch(py::module_& m);
}  // namespace mvdream_fast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of mvdream_fast";
  m.def("build_info", [] {
    std::map<std::string, std::string> info;
    info["compiler"] = MVDREAM_FAST_COMPILER;
#ifdef _OPENMP
    info["openmp"] = std::to_string(_OPENMP);
#else
    info["openmp"] = "no";
#endif
#ifdef MVDREAM_FAST_HAS_CUDA
    info["cuda"] = MVDREAM_FAST_HAS_CUDA;
#else
    info["cuda"] = "no";
#endif
    using namespace mvdream_fast;
    info["isa"] = isa_name(current_isa());
    for (Isa isa : built_isas()) {
      std::string& list = info[cpu_has(isa) ? "isa_usable" : "isa_untested"];
      list += std::string(list.empty() ? "" : ", ") + isa_name(isa);
    }
    return info;
  });
  m.def("advise_huge_pages", [](std::uintptr_t address, int64_t bytes) {
    mvdream_fast::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
  });
  mvdream_fast::bind_field(m);
  mvdream_fast::bind_render(m);
  mvdream_fast::bind_shapes(m);
#ifdef MVDREAM_FAST_HAS_CUDA
  py::module_ cuda = m.def_submodule("cuda", "The same ops on CUDA tensors");
  mvdream_fast::bind_cuda(cuda);
#endif
  mvdream_fast::bind_unet(m);
  mvdream_fast::bind_launch(m);
}
