#pragma once

#include "cuda_block.cuh"
#include "launch.cuh"

// What all classes of one head share, as cpp/core/head_geometry.cpp: the rows, centred where that
// is exact and then scaled, and products of rows. Unlike there, rows are not brought near 1 by a
// power of two: a head whose squares overflow or underflow is not certified here and goes to the
// CPU. For minimal_perturbation.cu alone.
namespace tacext::cuda {
namespace {

constexpr int kHeadThreads = 256;

/// Arrays that centre_and_scale fills.
struct ScaledHead {
  double *rows, *mean;
};

// Thread d averages column d, row after row. The mean is kept where all entries lie between half
// and twice of it, so that taking it off rounds nothing, and is 0 elsewhere.
__global__ void __launch_bounds__(kHeadThreads)
    column_mean_kernel(const double* __restrict__ weight, std::int64_t classes,
                       std::int64_t latents, ScaledHead head) {
  const std::int64_t d = static_cast<std::int64_t>(blockIdx.x) * kHeadThreads + threadIdx.x;
  if (d >= latents) return;
  double sum = 0, low = kInfinity, high = -kInfinity;
  for (std::int64_t j = 0; j < classes; ++j) {
    const double value = weight[j * latents + d];
    sum += value;
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  const double mean = sum / static_cast<double>(classes);
  const double near = mean > 0 ? 0.5 * mean : 2 * mean, far = mean > 0 ? 2 * mean : 0.5 * mean;
  head.mean[d] = near <= low && high <= far ? mean : 0.0;
}

// Block j centres and scales row j, its threads side by side along the latents. The scale comes
// last: it would round the common component and with it the small differences.
__global__ void __launch_bounds__(kHeadThreads)
    scale_row_kernel(const double* __restrict__ weight, const double* __restrict__ scale,
                     std::int64_t latents, ScaledHead head) {
  const std::int64_t j = blockIdx.x;
  for (std::int64_t d = threadIdx.x; d < latents; d += kHeadThreads)
    head.rows[j * latents + d] =
        (weight[j * latents + d] - head.mean[d]) * (scale != nullptr ? scale[d] : 1.0);
}

void centre_and_scale(Launcher& launcher, const double* weight, const double* scale,
                      std::int64_t classes, std::int64_t latents, const ScaledHead& head) {
  const dim3 threads(kHeadThreads);
  launcher.run(column_mean_kernel, grid(ceil_div(latents, kHeadThreads)), threads, weight, classes,
               latents, head);
  launcher.run(scale_row_kernel, grid(classes), threads, weight, scale, latents, head);
}

constexpr int kProductSide = 16;  // kProductSide x kProductSide threads
constexpr int kProductEach = 4;   // each with kProductEach x kProductEach values
constexpr int kProductTile = kProductSide * kProductEach;
constexpr int kProductDepth = 16;

// out[i, j] = left[i, :] . right[j, :]. A block computes one tile; thread (x, y) holds
//
//                        j: x       x + kProductSide   ...
//   i: y                 sum[0][0]  sum[0][1]              one sequential sum over the latents
//      y + kProductSide  sum[1][0]  ...
//
// with kProductDepth latents of the tile's rows staged in shared memory at a time. Where left and
// right are the same, tiles above the diagonal are left out and mirrored from below.
template <bool kSymmetric>
__global__ void __launch_bounds__(kProductSide* kProductSide)
    product_kernel(const double* __restrict__ left, std::int64_t left_rows,
                   const double* __restrict__ right, std::int64_t right_rows, std::int64_t latents,
                   double* __restrict__ out) {
  if (kSymmetric && blockIdx.x > blockIdx.y) return;
  __shared__ double left_tile[kProductDepth][kProductTile + 1];
  __shared__ double right_tile[kProductDepth][kProductTile + 1];
  const int x = threadIdx.x, y = threadIdx.y;
  const std::int64_t i0 = static_cast<std::int64_t>(blockIdx.y) * kProductTile;
  const std::int64_t j0 = static_cast<std::int64_t>(blockIdx.x) * kProductTile;
  double sum[kProductEach][kProductEach] = {};
  for (std::int64_t d0 = 0; d0 < latents; d0 += kProductDepth) {
    const std::int64_t d = d0 + x;  // neighbouring threads read neighbouring latents
#pragma unroll
    for (int r = 0; r < kProductEach; ++r) {
      const int place = y + r * kProductSide;
      const std::int64_t i = i0 + place, j = j0 + place;
      left_tile[x][place] = d < latents && i < left_rows ? left[i * latents + d] : 0.0;
      right_tile[x][place] = d < latents && j < right_rows ? right[j * latents + d] : 0.0;
    }
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kProductDepth; ++depth) {
      double a[kProductEach], b[kProductEach];
#pragma unroll
      for (int r = 0; r < kProductEach; ++r) {
        a[r] = left_tile[depth][y + r * kProductSide];
        b[r] = right_tile[depth][x + r * kProductSide];
      }
#pragma unroll
      for (int r = 0; r < kProductEach; ++r)
#pragma unroll
        for (int c = 0; c < kProductEach; ++c) sum[r][c] += a[r] * b[c];
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kProductEach; ++r)
#pragma unroll
    for (int c = 0; c < kProductEach; ++c) {
      const std::int64_t i = i0 + y + r * kProductSide, j = j0 + x + c * kProductSide;
      if (i >= left_rows || j >= right_rows) continue;
      out[i * right_rows + j] = sum[r][c];
      if (kSymmetric && blockIdx.x < blockIdx.y) out[j * right_rows + i] = sum[r][c];
    }
}

void multiply_transposed(Launcher& launcher, const double* left, std::int64_t left_rows,
                         const double* right, std::int64_t right_rows, std::int64_t latents,
                         double* out) {
  launcher.run(product_kernel<false>,
               grid(ceil_div(right_rows, kProductTile), ceil_div(left_rows, kProductTile)),
               dim3(kProductSide, kProductSide), left, left_rows, right, right_rows, latents, out);
}

/// K = W W^T, exactly symmetric: w_i . w_j sums the same products in one order.
void gram(Launcher& launcher, const double* rows, std::int64_t classes, std::int64_t latents,
          double* out) {
  const std::int64_t tiles = ceil_div(classes, kProductTile);
  launcher.run(product_kernel<true>, grid(tiles, tiles), dim3(kProductSide, kProductSide), rows,
               classes, rows, classes, latents, out);
}

}  // namespace
}  // namespace tacext::cuda
