#pragma once

#include <atomic>
#include <cstdint>

#include "tacext/parallel.h"

namespace tacext {

/// Calls body(i) once for every i in [0, count): each thread takes the next that is free, where a
/// cut in advance would leave the others waiting for the one with the dearest tasks, or on the
/// busiest core. For tasks that are large beside an atomic increment, the dear ones first.
template <class Body>
void balanced_for(std::int64_t count, const ParallelFor& parallel_for, const Body& body) {
  std::atomic<std::int64_t> next{0};
  parallel_for(count, 1, [&](std::int64_t, std::int64_t) {
    for (std::int64_t i = next++; i < count; i = next++) body(i);
  });
}

}  // namespace tacext
