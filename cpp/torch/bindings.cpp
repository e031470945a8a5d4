// _core: all that is not a tensor. Tensors go through torch.ops.tacext.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cuda_info.h"
#include "tacext/build_info.h"
#include "tacext/minimal_perturbation.h"

namespace py = pybind11;

namespace {

tacext::SolverSettings make_settings(double tolerance, std::int64_t max_iterations,
                                     bool closed_form) {
  if (!(tolerance > 0 && tolerance < 1))
    throw py::value_error("SolverSettings: tolerance: expected a number between 0 and 1, got " +
                          std::string(py::str(py::float_(tolerance))) + "; the default is 1e-9");
  if (max_iterations < 0)
    throw py::value_error("SolverSettings: max_iterations: expected 0 (automatic) or more, got " +
                          std::to_string(max_iterations) + "; leave it out");
  return {tolerance, max_iterations, closed_form};
}

py::tuple as_tuple(const tacext::SolverSettings& s) {
  return py::make_tuple(s.tolerance, s.max_iterations, s.closed_form);
}

std::string repr(const tacext::SolverSettings& s) {
  return "SolverSettings(tolerance=" + std::string(py::repr(py::float_(s.tolerance))) +
         ", max_iterations=" + std::to_string(s.max_iterations) +
         ", closed_form=" + (s.closed_form ? "True" : "False") + ")";
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "Build information, solver settings and status of tacext's native library.";
  m.attr("torch_version") = TACEXT_TORCH_VERSION;
  m.def("version", &tacext::version);
  m.def("simd_level", &tacext::simd_level);
  m.def("has_cuda", &tacext::has_cuda);
  m.def("cuda_device_count", &tacext::cuda_device_count);

  py::native_enum<tacext::Status>(m, "Status", "enum.IntEnum", "How a class's problem ended.")
      .value("OPTIMAL", tacext::Status::kOptimal)
      .value("UNREACHABLE", tacext::Status::kUnreachable)
      .value("ITERATION_LIMIT", tacext::Status::kIterationLimit)
      .finalize();

  py::class_<tacext::SolverSettings>(m, "SolverSettings",
                                     "Settings of the exact solver; immutable.")
      .def(py::init(&make_settings), py::kw_only(),
           py::arg("tolerance") = tacext::SolverSettings{}.tolerance,
           py::arg("max_iterations") = tacext::SolverSettings{}.max_iterations,
           py::arg("closed_form") = tacext::SolverSettings{}.closed_form)
      .def_readonly("tolerance", &tacext::SolverSettings::tolerance)
      .def_readonly("max_iterations", &tacext::SolverSettings::max_iterations)
      .def_readonly("closed_form", &tacext::SolverSettings::closed_form)
      .def("__repr__", &repr)
      .def(
          "__eq__",
          [](const tacext::SolverSettings& a, const tacext::SolverSettings& b) {
            return as_tuple(a).equal(as_tuple(b));
          },
          py::is_operator())
      .def("__hash__", [](const tacext::SolverSettings& s) { return py::hash(as_tuple(s)); })
      .def(py::pickle(&as_tuple, [](const py::tuple& t) {
        return make_settings(t[0].cast<double>(), t[1].cast<std::int64_t>(), t[2].cast<bool>());
      }));
}
