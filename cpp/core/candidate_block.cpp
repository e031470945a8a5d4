#include "candidate_block.h"

#include <algorithm>
#include <cmath>

#include "linear_algebra.h"

namespace tacext {
namespace {

constexpr int kAttempts = 8;  // to leave out what makes a multiplier negative

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

void CandidateBlock::reserve(std::int64_t active) {
  stride_ = round_up(size(), kProductColumns);
  rows_.assign(static_cast<std::size_t>(round_up(active, kProductRows) * stride_), 0.0);
  gram_.assign(static_cast<std::size_t>(round_up(size(), kProductRows) * stride_), 0.0);
}

/// Y = L^-1 G[active, block], kProductRows rows at a time.
void CandidateBlock::eliminate_active() {
  const std::int64_t active = factor_.size();
  for (std::int64_t i0 = 0; i0 < active; i0 += kProductRows) {
    const std::int64_t height = std::min(kProductRows, active - i0);
    const double* left[kProductRows];
    for (std::int64_t r = 0; r < kProductRows; ++r)
      left[r] = factor_.lower.row(i0 + std::min(r, height - 1));
    for (std::int64_t c = 0; c < stride_; c += kProductColumns)
      subtract_products(left, 1, rows_.data() + c, stride_, i0, row(i0) + c, stride_);
    for (std::int64_t r = 0; r < height; ++r) {
      for (std::int64_t i = 0; i < r; ++i)
        add_scaled(-left[r][i0 + i], row(i0 + i), size(), row(i0 + r));
      const double diagonal = left[r][i0 + r];
      for (std::int64_t b = 0; b < size(); ++b) row(i0 + r)[b] /= diagonal;
    }
  }
}

bool CandidateBlock::add_together(const double* margins, std::int64_t most, ActiveSet& set) {
  const std::int64_t active = factor_.size();
  // S = G[block, block] - Y^T Y: the block's Gram matrix beside the active constraints' span.
  std::vector<double> schur = gram_;
  for (std::int64_t b = 0; active > 0 && b < size(); b += kProductRows) {
    const double* left[kProductRows];
    for (std::int64_t r = 0; r < kProductRows; ++r)
      left[r] = rows_.data() + std::min(b + r, size() - 1);
    for (std::int64_t c = 0; c < b + kProductRows && c < stride_; c += kProductColumns)
      subtract_products(left, stride_, rows_.data() + c, stride_, active,
                        schur.data() + b * stride_ + c, stride_);
  }

  std::vector<double> rest;  // m_block - Y^T z
  for (std::int64_t j : constraints_) rest.push_back(margins[j]);
  for (std::int64_t i = 0; i < active; ++i) add_scaled(-factor_.z[i], row(i), size(), rest.data());

  std::vector<bool> left_out(static_cast<std::size_t>(size()), false);
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    PackedCholesky lower;
    std::vector<std::int64_t> kept;
    std::vector<double> z, entries;
    for (std::int64_t b = 0; b < size() && static_cast<std::int64_t>(kept.size()) < most; ++b) {
      if (left_out[b]) continue;
      entries.clear();
      for (std::int64_t c : kept) entries.push_back(schur[b * stride_ + c]);
      lower.solve_lower(entries.data());
      const double pivot =
          schur[b * stride_ + b] - dot(entries.data(), entries.data(), lower.size());
      if (!(pivot > kDependent * squared_length(b))) {  // NaN, too
        left_out[b] = true;
        continue;
      }
      const double along = dot(entries.data(), z.data(), lower.size());
      lower.append(entries.data(), std::sqrt(pivot));
      z.push_back((rest[b] - along) / std::sqrt(pivot));
      kept.push_back(b);
    }
    if (kept.empty()) return false;

    std::vector<double> multipliers = z;
    lower.solve_upper(multipliers.data());
    bool negative = false;
    for (std::size_t b = 0; b < kept.size(); ++b)
      if (!(multipliers[b] >= 0)) negative = left_out[kept[b]] = true;
    if (negative) continue;

    // l_active = L^-T (z - Y l_block)
    std::vector<double> all = factor_.z;
    std::vector<double> of_block(static_cast<std::size_t>(size()), 0.0);
    for (std::size_t b = 0; b < kept.size(); ++b) of_block[kept[b]] = multipliers[b];
    for (std::int64_t i = 0; i < active; ++i) all[i] -= dot(row(i), of_block.data(), size());
    factor_.lower.solve_upper(all.data());
    if (std::any_of(all.begin(), all.end(), [](double l) { return !(l >= 0); })) return false;

    std::vector<double> column(static_cast<std::size_t>(active));
    for (std::size_t b = 0; b < kept.size(); ++b) {
      column.resize(static_cast<std::size_t>(active));
      for (std::int64_t i = 0; i < active; ++i) column[i] = row(i)[kept[b]];
      const double* const own = lower.row(static_cast<std::int64_t>(b));
      column.insert(column.end(), own, own + b);
      factor_.lower.append(column.data(), own[b]);
      set.active.push_back(constraints_[kept[b]]);
    }
    factor_.z.insert(factor_.z.end(), z.begin(), z.end());
    set.multipliers = std::move(all);
    set.multipliers.insert(set.multipliers.end(), multipliers.begin(), multipliers.end());
    set.iterations += static_cast<std::int64_t>(kept.size());
    return true;
  }
  return false;
}

Ending CandidateBlock::add_in_turn(const double* margins, const double* slack,
                                   const double* rounding, std::int64_t max_iterations,
                                   ActiveSet& set) {
  std::vector<double> lengths, allowed;
  for (std::int64_t b = 0; b < size(); ++b) {
    margins_.push_back(margins[constraints_[b]]);
    slack_.push_back(slack[constraints_[b]]);
    allowed.push_back(active_set::kViolated * rounding[constraints_[b]]);
    lengths.push_back(std::sqrt(squared_length(b)));
  }
  for (;;) {
    std::int64_t worst = active_set::kNone;
    double furthest = 0;
    for (std::int64_t b = 0; b < size(); ++b)
      if (slack_[b] > allowed[b] && slack_[b] > furthest * lengths[b]) {
        furthest = slack_[b] / lengths[b];
        worst = b;
      }
    if (worst == active_set::kNone) return Ending::kSolved;
    const Ending ending = satisfy(*this, worst, max_iterations, set);
    if (ending != Ending::kSolved) return ending;
    slack_[worst] = -std::numeric_limits<double>::infinity();  // active: no candidate any more
  }
}

double CandidateBlock::project(std::int64_t p, std::vector<double>& coefficients) {
  const std::int64_t active = factor_.size();
  candidate_ = p;
  projection_.clear();
  for (std::int64_t i = 0; i < active; ++i) projection_.push_back(row(i)[p]);
  residual_ = squared_length(p) - dot(projection_.data(), projection_.data(), active);
  coefficients = projection_;
  factor_.lower.solve_upper(coefficients.data());
  // a_b . z = G[b, p] - Y_b . Y_p
  rates_.assign(gram_.begin() + p * stride_, gram_.begin() + p * stride_ + size());
  for (std::int64_t i = 0; i < active; ++i)
    add_scaled(-projection_[i], row(i), size(), rates_.data());
  return residual_;
}

void CandidateBlock::advance(double step) {
  add_scaled(-step, rates_.data(), size(), slack_.data());
}

void CandidateBlock::append_projected() {
  const std::int64_t active = factor_.size();
  const double length = std::sqrt(residual_);
  factor_.z.push_back((margins_[candidate_] - dot(projection_.data(), factor_.z.data(), active)) /
                      length);
  factor_.lower.append(projection_.data(), length);
  if (static_cast<std::int64_t>(rows_.size()) < (active + 1) * stride_)
    rows_.resize(static_cast<std::size_t>((active + 1) * stride_));
  for (std::int64_t b = 0; b < size(); ++b) row(active)[b] = rates_[b] / length;
}

void CandidateBlock::remove(std::int64_t index) {
  factor_.lower.remove(index, [this](std::int64_t i, double cosine, double sine) {
    const auto turn = [&](double& left, double& right) {
      const double turned = cosine * left + sine * right;
      right = cosine * right - sine * left;
      left = turned;
    };
    turn(factor_.z[i], factor_.z[i + 1]);
    for (std::int64_t b = 0; b < size(); ++b) turn(row(i)[b], row(i + 1)[b]);
  });
  factor_.z.pop_back();
}

}  // namespace tacext
