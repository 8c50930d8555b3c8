// The Python module `rlsedit_fast.ops._cpu`. It takes addresses and sizes and does not depend on torch. `ops/cpu.py`
// checks the arguments; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include "rlsedit/cpu.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels, called with addresses; use rlsedit_fast.ops.cpu.";

    py::enum_<rlsedit::Isa>(m, "Isa", py::module_local())
        .value("automatic", rlsedit::Isa::automatic)
        .value("portable", rlsedit::Isa::portable)
        .value("avx2", rlsedit::Isa::avx2)
        .value("avx512", rlsedit::Isa::avx512);
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    m.def("runs", &rlsedit::runs, py::arg("isa"));
    m.def("panel_workspace", &rlsedit::panel_workspace, py::arg("d"), py::arg("n"), py::arg("threads"));
    m.def(
        "panel",
        [](std::uintptr_t base, int64_t stride, std::uintptr_t keys, std::uintptr_t out, std::uintptr_t workspace,
           int64_t d, int64_t n, int threads, rlsedit::Isa isa) {
            rlsedit::panel({reinterpret_cast<const float*>(base), stride, reinterpret_cast<const float*>(keys),
                            reinterpret_cast<float*>(out), reinterpret_cast<float*>(workspace), d, n, threads},
                           isa);
        },
        py::arg("base"), py::arg("stride"), py::arg("keys"), py::arg("out"), py::arg("workspace"), py::arg("d"),
        py::arg("n"), py::arg("threads"), py::arg("isa"), py::call_guard<py::gil_scoped_release>());
    m.attr("correct_split_workspace_per_thread") = rlsedit::correct_split_workspace_per_thread;
    m.def(
        "correct_split",
        [](std::uintptr_t high, std::uintptr_t low, int64_t stride, std::uintptr_t whitened, std::uintptr_t rows,
           std::uintptr_t workspace, int64_t d_v, int64_t d_k, int64_t n, int sign, int threads, rlsedit::Isa isa) {
            rlsedit::correct_split(
                {reinterpret_cast<uint16_t*>(high), reinterpret_cast<int16_t*>(low), stride,
                 reinterpret_cast<const float*>(whitened), reinterpret_cast<const float*>(rows),
                 reinterpret_cast<float*>(workspace), d_v, d_k, n, sign, threads},
                isa);
        },
        py::arg("high"), py::arg("low"), py::arg("stride"), py::arg("whitened"), py::arg("rows"), py::arg("workspace"),
        py::arg("d_v"), py::arg("d_k"), py::arg("n"), py::arg("sign"), py::arg("threads"), py::arg("isa"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "mirror",
        [](std::uintptr_t base, int64_t stride, int64_t d, int threads) {
            rlsedit::mirror(reinterpret_cast<float*>(base), stride, d, threads);
        },
        py::arg("base"), py::arg("stride"), py::arg("d"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}
