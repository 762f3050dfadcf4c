// Deterministic work sharing and aligned memory for the kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> allocate(int64_t count) {
  size_t bytes = ((count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (!p) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

// Runs item(0) ... item(count - 1) on the threads; false if memory ran out in any of them.
// An item's arithmetic must not depend on the number of threads.
template <class F>
bool parallel(int64_t count, int threads, const F& item) {
  bool failed = false;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && count > 1)
  for (int64_t i = 0; i < count; ++i) {
    try {
      item(i);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = true;
    }
  }
  (void)threads;
  return !failed;
}

struct Rows {  // element (b, t, c) is at data[b * batch_stride + t * row_stride + c]
  const float* data;
  int64_t batch_stride, row_stride;

  const float* at(int64_t b, int64_t t) const { return data + b * batch_stride + t * row_stride; }
};
