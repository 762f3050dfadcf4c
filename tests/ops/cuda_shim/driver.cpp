// One kernel source as a library: g++ -DSOURCE='"scan.cu"' -DKERNELS='X(scan_forward) X(...)' driver.cpp
#include "shim.h"

#include SOURCE

template <class Arguments, void (*kernel)(Arguments)>
void call(const void* arguments) {
  kernel(*(const Arguments*)arguments);
}

template <class Arguments>
Arguments argument_of(void (*)(Arguments));

// Runs every block of the grid; order picks the turn in which threads run. Returns what went wrong, or null.
extern "C" const char* shim_run(const char* name, const unsigned* grid, unsigned threads, unsigned shared_bytes,
                                const void* arguments, int order) {
  shim::error.clear();
  shim::body = nullptr;
#define X(kernel) \
  if (!std::strcmp(name, #kernel)) shim::body = call<decltype(argument_of(kernel)), kernel>;
  KERNELS
#undef X
  if (!shim::body) return "no such kernel";
  if (threads % 32) return "a block must have whole warps";
  shim::body_arguments = arguments;
  if (shim::fibres.size() < threads) shim::fibres = std::vector<shim::Fibre>(threads);
  for (auto& slots : shim::slots) slots.resize(threads);
  blockDim = {threads, 1, 1};
  constexpr unsigned guard = 256;
  auto memory = (unsigned char*)std::aligned_alloc(256, (shared_bytes + guard + 255) / 256 * 256);
  shim::shared = (float4*)memory;
  unsigned blocks = grid[0] * grid[1] * grid[2];
  for (unsigned i = 0; i < blocks && shim::error.empty(); ++i) {
    unsigned block = order ? blocks - 1 - i : i;
    blockIdx = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
    std::memset(memory, 0xff, shared_bytes);  // NaN
    std::memset(memory + shared_bytes, shim::CANARY, guard);
    shim::run_block(threads, order);
    for (unsigned j = 0; j < guard; ++j)
      if (memory[shared_bytes + j] != shim::CANARY) shim::error = "wrote past the end of shared memory";
  }
  std::free(memory);
  return shim::error.empty() ? nullptr : shim::error.c_str();
}
