// prfl_fast._native: host code that must be fast, for Python. Arguments are checked by the callers in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "native/planner.hpp"

namespace py = pybind11;

namespace {

using prfl::planner::Int;

py::tuple solve_chain(const std::vector<std::vector<std::array<Int, 7>>>& blocks, Int budget, Int host,
                      const std::array<Int, 10>& limits, const std::vector<std::vector<int>>& seeds) {
  prfl::planner::Plan plan;
  {
    const py::gil_scoped_release released;
    prfl::planner::Chain chain;
    for (const auto& block : blocks) {
      std::vector<prfl::planner::Mode> modes;
      for (const auto& mode : block) modes.push_back({mode[0], mode[1], mode[2], mode[3], mode[4], mode[5], mode[6]});
      chain.push_back(std::move(modes));
    }
    plan = prfl::planner::solve(chain, budget, host,
                                {limits[0], limits[1], limits[2], limits[3], limits[4], limits[5], limits[6], limits[7],
                                 limits[8], limits[9]},
                                seeds);
  }
  return py::make_tuple(plan.found, plan.choice, plan.extra, plan.bound, plan.least_choice, plan.least,
                        plan.least_exact);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Host code that must be fast; prfl_fast/memory/solver/twin.py is the same in Python.";
  module.def("solve_chain", &solve_chain, py::arg("blocks"), py::arg("budget"), py::arg("host"), py::arg("limits"),
             py::arg("seeds"), "The planner core. Fields of modes, limits and result: csrc/native/planner.hpp, in that order.");
}
