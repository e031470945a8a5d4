#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// For functions that leave their stack: their callers may count on no register that they seem to
// spare, and the sanitizer would take a jump for the end of every frame and check none any longer.
#ifdef __clang__
#define CHANGES_STACK __attribute__((noinline, no_sanitize_address))
#else
#define CHANGES_STACK __attribute__((noipa, no_sanitize_address))
#endif

namespace cuda_on_host {
namespace {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 128 * 1024;

struct Barrier {
  unsigned waiting = 0;
  std::uint64_t phase = 0;
};

// Where a fiber or the scheduler left off. GCC's and Clang's own setjmp changes stacks in a few
// instructions; swapcontext asks the kernel for the signal mask every time.
using Point = void* [5];

struct Fiber {
  Point point;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* sanitizer_state = nullptr;
  const Barrier* waits_at = nullptr;
  std::uint64_t phase = 0;  // of that barrier when it was reached
  bool started = false;
  bool done = false;

  bool can_run() const { return !done && (waits_at == nullptr || waits_at->phase != phase); }
};

struct Block {
  std::vector<Fiber> fibers;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<std::uint64_t> exchanged;
};

Order order = Order::kForward;
Point scheduler;
void* scheduler_sanitizer_state = nullptr;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;
const std::function<void()>* body = nullptr;
Block block;
unsigned current = 0;  // the running fiber
unsigned alive = 0;
std::uint64_t progress = 0;

// The sanitizer must know which stack it looks at.
void leave_for(void** own_state, const void* stack, std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(own_state, stack, bytes);
#else
  (void)own_state, (void)stack, (void)bytes;
#endif
}

void arrive(void* own_state, const void** from_stack, std::size_t* from_bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(own_state, from_stack, from_bytes);
#else
  (void)own_state, (void)from_stack, (void)from_bytes;
#endif
}

[[noreturn]] CHANGES_STACK void jump(Point& point) { __builtin_longjmp(point, 1); }

CHANGES_STACK void yield() {
  Fiber& fiber = block.fibers[current];
  leave_for(&fiber.sanitizer_state, scheduler_stack, scheduler_stack_bytes);
  if (__builtin_setjmp(fiber.point) == 0) jump(scheduler);
  arrive(block.fibers[current].sanitizer_state, &scheduler_stack, &scheduler_stack_bytes);
}

// A fiber outlives its block and runs the thread of the same number in the next one.
void run_fiber() {
  arrive(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    (*body)();
    block.fibers[current].done = true;
    --alive;
    ++progress;
    yield();
  }
}

[[noreturn]] CHANGES_STACK void start(Fiber& fiber) {
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
  std::abort();
}

CHANGES_STACK void resume(unsigned thread) {
  current = thread;
  threadIdx = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y,
                   thread / (blockDim.x * blockDim.y));
  Fiber& fiber = block.fibers[thread];
  leave_for(&scheduler_sanitizer_state, fiber.stack.get(), kStackBytes);
  if (__builtin_setjmp(scheduler) == 0) fiber.started ? jump(fiber.point) : start(fiber);
  arrive(scheduler_sanitizer_state, nullptr, nullptr);
}

void wait(Barrier& barrier, unsigned members) {
  ++progress;
  if (++barrier.waiting == members) {
    barrier.waiting = 0;
    ++barrier.phase;
    return;
  }
  Fiber& fiber = block.fibers[current];
  fiber.waits_at = &barrier;
  fiber.phase = barrier.phase;
  yield();  // until can_run()
  fiber.waits_at = nullptr;
}

// Lets a warp run as far as it can while the others stand still: what it overwrites too early, they
// will read.
void run_warp(unsigned warp, unsigned threads) {
  const unsigned begin = warp * kWarp, end = std::min(begin + kWarp, threads);
  for (std::uint64_t before = progress - 1; before != progress;) {
    before = progress;
    for (unsigned t = begin; t < end; ++t) {
      const unsigned thread = order == Order::kForward ? t : begin + end - 1 - t;
      if (block.fibers[thread].can_run()) resume(thread);
    }
  }
}

void run_block(unsigned threads) {
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  block.barrier = {};
  block.warps.assign((threads + kWarp - 1) / kWarp, {});
  block.exchanged.assign(threads, 0);
  alive = threads;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.done = false;
    fiber.waits_at = nullptr;
  }
  while (alive > 0) {
    const std::uint64_t before = progress;
    const unsigned warps = static_cast<unsigned>(block.warps.size());
    for (unsigned w = 0; w < warps; ++w)
      run_warp(order == Order::kForward ? w : warps - 1 - w, threads);
    if (progress == before) {
      std::fputs("cuda_on_host: the threads of a block wait at a barrier that not all reach\n",
                 stderr);
      std::abort();
    }
  }
}

}  // namespace

void set_order(Order wanted) { order = wanted; }

void block_barrier() { wait(block.barrier, blockDim.x * blockDim.y * blockDim.z); }

std::uint64_t exchange(std::uint64_t value, int mask) {
  Barrier& warp = block.warps[current / kWarp];
  block.exchanged[current] = value;
  wait(warp, kWarp);
  const std::uint64_t other = block.exchanged[current ^ static_cast<unsigned>(mask)];
  wait(warp, kWarp);
  return other;
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const dim3 grid = config.gridDim, size = config.blockDim;
  const std::uint64_t threads = std::uint64_t{size.x} * size.y * size.z;
  const bool valid = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu &&
                     grid.y <= 65535 && grid.z <= 65535 && threads > 0 && threads <= 1024;
  if (!valid) return cudaErrorInvalidConfiguration;
  body = &kernel;
  gridDim = grid;
  blockDim = size;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(static_cast<unsigned>(threads));
      }
  return cudaSuccess;
}

}  // namespace cuda_on_host
