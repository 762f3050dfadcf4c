// Residual addition and RMS normalisation in one pass on the CPU.
//
//   stream = residual + h      rstd = (mean stream^2 + eps)^(-1/2)      normed = stream rstd weight
#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "vec.h"

extern "C" {

struct Norm {
  int64_t rows, width;
  float eps;
  const float *h, *residual, *weight;  // (rows, width) both, residual or null; (width)
  float *stream, *normed, *rstd;       // (rows, width), (rows, width), (rows)
  const float *dnormed, *dstream;      // dstream or null
  float *dx, *dweight;                 // of h and of residual alike
};

}  // extern "C"

namespace {

constexpr int64_t ROWS = 32;  // of one item

template <class F>
INLINE void for_vectors(int64_t width, const F& work) {
  int64_t c = 0;
  for (; c + W <= width; c += W) work(c, W);
  if (c < width) work(c, (int)(width - c));
}

void forward_row(const Norm& s, int64_t row) {
  const float *h = s.h + row * s.width, *residual = s.residual ? s.residual + row * s.width : nullptr;
  float *stream = s.stream + row * s.width, *normed = s.normed + row * s.width;
  vf squares{};
  for_vectors(s.width, [&](int64_t c, int n) {
    vf x = load(h + c, n);
    if (residual) x += load(residual + c, n);
    store(stream + c, x, n);
    squares += x * x;
  });
  float rstd = 1.0f / std::sqrt(sum<W>(squares) / s.width + s.eps);
  s.rstd[row] = rstd;
  for_vectors(s.width, [&](int64_t c, int n) {
    store(normed + c, load(stream + c, n) * rstd * load(s.weight + c, n), n);
  });
}

// With g = dnormed weight: dx = dstream + rstd (g - stream rstd^2 mean(g stream)).
void backward_row(const Norm& s, int64_t row, float* dweight) {
  const float *stream = s.stream + row * s.width, *dnormed = s.dnormed + row * s.width;
  const float* dstream = s.dstream ? s.dstream + row * s.width : nullptr;
  float *dx = s.dx + row * s.width, rstd = s.rstd[row];
  vf products{};
  for_vectors(s.width, [&](int64_t c, int n) {
    vf x = load(stream + c, n), d = load(dnormed + c, n);
    products += x * d * load(s.weight + c, n);
    store(dweight + c, load(dweight + c, n) + x * d * rstd, n);
  });
  float slope = sum<W>(products) / s.width * rstd * rstd;
  for_vectors(s.width, [&](int64_t c, int n) {
    vf d = rstd * (load(dnormed + c, n) * load(s.weight + c, n) - load(stream + c, n) * slope);
    store(dx + c, dstream ? d + load(dstream + c, n) : d, n);
  });
}

template <class F>
bool for_rows(const Norm& s, int threads, const F& work) {
  return parallel((s.rows + ROWS - 1) / ROWS, threads, [&](int64_t i) {
    for (int64_t row = i * ROWS; row < std::min((i + 1) * ROWS, s.rows); ++row) work(row, i);
  });
}

}  // namespace

extern "C" {

// Both return 0, or 1 if memory ran out.
int dis_ssm_norm_forward(const Norm* s, int threads) {
  return !for_rows(*s, threads, [&](int64_t row, int64_t) { forward_row(*s, row); });
}

int dis_ssm_norm_backward(const Norm* s, int threads) try {
  int64_t items = (s->rows + ROWS - 1) / ROWS;
  auto sums = allocate<float>(items * s->width);
  std::fill(&sums[0], &sums[0] + items * s->width, 0.0f);
  bool ok = for_rows(*s, threads, [&](int64_t row, int64_t i) { backward_row(*s, row, &sums[i * s->width]); });
  std::fill(s->dweight, s->dweight + s->width, 0.0f);
  for (int64_t i = 0; i < items; ++i)
    for (int64_t c = 0; c < s->width; ++c) s->dweight[c] += sums[i * s->width + c];
  return !ok;
} catch (const std::bad_alloc&) {
  return 1;
}

}  // extern "C"
