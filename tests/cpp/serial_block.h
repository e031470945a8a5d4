#pragma once

#include <cstdint>

#include "active_set_block.cuh"

namespace tacext::cuda {

/// The Block policy of active_set_block.cuh for a block of one thread.
struct SerialBlock {
  std::int64_t thread() const { return 0; }
  std::int64_t threads() const { return 1; }
  std::int64_t group() const { return 0; }
  std::int64_t groups() const { return 1; }
  std::int64_t lane() const { return 0; }
  std::int64_t lanes() const { return 1; }
  void barrier() const {}
  double group_sum(double value) const { return value; }
  double sum(double value) const { return value; }
  Choice largest(Choice choice) const { return choice; }
};

}  // namespace tacext::cuda
