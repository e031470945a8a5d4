#pragma once

#include <cstdint>
#include <functional>

namespace tacext {

/// Work on the half-open range [begin, end) of independent units.
using RangeBody = std::function<void(std::int64_t begin, std::int64_t end)>;

/// Calls `body` on disjoint ranges that cover [0, count), each of about `grain` units or more, on
/// as many threads as the caller likes. Results never depend on how the range was cut.
using ParallelFor =
    std::function<void(std::int64_t count, std::int64_t grain, const RangeBody& body)>;

/// The ParallelFor that stays on the calling thread.
inline void serial_for(std::int64_t count, std::int64_t /*grain*/, const RangeBody& body) {
  if (count > 0) body(0, count);
}

}  // namespace tacext
