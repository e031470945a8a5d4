// What one core can do at most: pairs of a subtraction and a maximum a second, in registers alone,
// in float32 and in 8-bit integers, and bytes a second of a streaming copy. Prints JSON.
//
// Usage: ceiling [seconds of each loop]

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512BW__)
constexpr std::size_t kBytes = 64;
#elif defined(__AVX2__)
constexpr std::size_t kBytes = 32;
#else
constexpr std::size_t kBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kBytes)));
typedef std::int8_t Bytes __attribute__((vector_size(kBytes)));

// Enough independent chains to hide the latency of either instruction.
constexpr int kChains = 8;

// Keeps a value in a register and from being known, so that nothing is computed ahead or left out.
template <class Vector>
inline void opaque(Vector& value) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(value));
#else
  asm volatile("" : "+w"(value));
#endif
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Calls `pass` until `seconds` have gone by; returns the best rate of ten stretches.
template <class Pass>
double best_rate(double seconds, double work_of_a_pass, Pass pass) {
  double best = 0;
  for (int stretch = 0; stretch < 10; ++stretch) {
    const double begin = now();
    double end = begin, done = 0;
    while (end - begin < seconds / 10) {
      pass();
      done += work_of_a_pass;
      end = now();
    }
    const double rate = done / (end - begin);
    best = rate > best ? rate : best;
  }
  return best;
}

// One link of a chain. Its difference is opaque, so that the subtraction is done every time.
template <bool kMinimum, class Vector>
inline void link(Vector& top, Vector& bottom, Vector left, const Vector& right) {
  opaque(left);
  Vector difference = left - right;
  top = top > difference ? top : difference;
  if (kMinimum) bottom = bottom < difference ? bottom : difference;
}

template <class Vector, bool kMinimum>
double pairs_a_second(double seconds) {
  using Element = typename std::remove_reference<decltype(Vector{}[0])>::type;
  constexpr int kRounds = 4096;
  constexpr double kPairs = double(kRounds) * kChains * (kBytes / sizeof(Element));
  return best_rate(seconds, kPairs, [] {
    // Named one by one: compilers keep an array of them in memory.
    Vector t0{}, t1{}, t2{}, t3{}, t4{}, t5{}, t6{}, t7{};
    Vector b0{}, b1{}, b2{}, b3{}, b4{}, b5{}, b6{}, b7{}, left{}, right{};
    opaque(right);
    for (int round = 0; round < kRounds; ++round) {
      link<kMinimum>(t0, b0, left, right);
      link<kMinimum>(t1, b1, left, right);
      link<kMinimum>(t2, b2, left, right);
      link<kMinimum>(t3, b3, left, right);
      link<kMinimum>(t4, b4, left, right);
      link<kMinimum>(t5, b5, left, right);
      link<kMinimum>(t6, b6, left, right);
      link<kMinimum>(t7, b7, left, right);
    }
    for (Vector* chain : {&t0, &t1, &t2, &t3, &t4, &t5, &t6, &t7}) opaque(*chain);
    for (Vector* chain : {&b0, &b1, &b2, &b3, &b4, &b5, &b6, &b7}) opaque(*chain);
  });
}

double copied_bytes_a_second(double seconds) {
  constexpr std::size_t kSize = std::size_t(256) << 20;
  std::vector<char> from(kSize, 1), to(kSize, 2);
  return best_rate(seconds, double(kSize), [&] {
    std::memcpy(to.data(), from.data(), kSize);
    char* pointer = to.data();
    asm volatile("" : "+r"(pointer) : : "memory");
  });
}

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 0.5;
  std::printf(
      "{\"vector_bytes\": %zu, \"float32_sub_max\": %.6g, \"int8_sub_max\": %.6g, "
      "\"int8_sub_max_min\": %.6g, \"copy_bytes\": %.6g}\n",
      kBytes, pairs_a_second<Floats, false>(seconds), pairs_a_second<Bytes, false>(seconds),
      pairs_a_second<Bytes, true>(seconds), copied_bytes_a_second(seconds));
  return 0;
}
