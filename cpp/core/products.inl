// The matrix products of linear_algebra.cpp, for one instruction set: kBytes is its vector
// register, kTileRows x kTileVectors the register tile.
//
//              columns of the panel, along the lanes
//   row 0    acc[0][0]  acc[0][1] ..       acc[r][v] += left[r][d] * panel[d][lanes of v]
//   row 1    acc[1][0]  acc[1][1] ..
//   ..
//
// Every value is one sum in the order of d, so the tile's shape changes no bit.

#include "lanes.inl"

using Doubles = Lanes<double>::type;
constexpr std::int64_t kLanes = kBytes / sizeof(double);

TACEXT_INLINE void multiply_tile(const double* const* left, std::int64_t step, const double* right,
                                 std::int64_t stride, std::int64_t count,
                                 Doubles (&acc)[kTileRows][kTileVectors]) {
  for (std::int64_t d = 0; d < count; ++d) {
    Doubles b[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) load(b[v], right + d * stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const double a = left[r][d * step];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] += a * b[v];
    }
  }
}

// out[r, 0..kPanel) = left row r . panel rows, for `height` rows of a tile; kPanel values a step.
inline void multiply_panel(const double* const* left, std::int64_t height, const double* panel,
                           std::int64_t columns, double* out, std::int64_t out_stride,
                           std::int64_t width) {
  constexpr std::int64_t kWidth = kTileVectors * kLanes;
  static_assert(kPanel % kWidth == 0);
  for (std::int64_t begin = 0; begin < height; begin += kTileRows) {
    const double* rows[kTileRows];
    for (int r = 0; r < kTileRows; ++r)
      rows[r] = left[std::min<std::int64_t>(begin + r, height - 1)];
    for (std::int64_t j = 0; j < width; j += kWidth) {
      Doubles acc[kTileRows][kTileVectors] = {};
      multiply_tile(rows, 1, panel + j, kPanel, columns, acc);
      for (std::int64_t r = 0; r < std::min<std::int64_t>(kTileRows, height - begin); ++r)
        __builtin_memcpy(out + (begin + r) * out_stride + j, acc[r],
                         sizeof(double) * std::min(kWidth, width - j));
    }
  }
}

inline void subtract_products(const double* const (&left)[kProductRows], std::int64_t left_step,
                              const double* right, std::int64_t right_stride, std::int64_t count,
                              double* block, std::int64_t block_stride) {
  constexpr std::int64_t kWidth = kTileVectors * kLanes;
  constexpr std::int64_t kHeight = kTileRows < kProductRows ? kTileRows : kProductRows;
  static_assert(kProductColumns % kWidth == 0 && kProductRows % kHeight == 0);
  for (std::int64_t begin = 0; begin < kProductRows; begin += kHeight)
    for (std::int64_t c = 0; c < kProductColumns; c += kWidth) {
      Doubles acc[kHeight][kTileVectors] = {};
      for (std::int64_t i = 0; i < count; ++i) {
        Doubles b[kTileVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v)
          load(b[v], right + i * right_stride + c + v * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kHeight; ++r) {
          const double a = left[begin + r][i * left_step];
#pragma GCC unroll 4
          for (int v = 0; v < kTileVectors; ++v) acc[r][v] += a * b[v];
        }
      }
      for (int r = 0; r < kHeight; ++r)
        for (int v = 0; v < kTileVectors; ++v) {
          double* const at = block + (begin + r) * block_stride + c + v * kLanes;
          Doubles value;
          load(value, at);
          value -= acc[r][v];
          __builtin_memcpy(at, &value, sizeof value);
        }
    }
}
