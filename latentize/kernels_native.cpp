// The routed experts on CPU: one fused pass over the weights of the experts that were hit.
//
// Pairs (token, slot) are sorted by expert; nothing is packed or copied but tokens. Every output is summed in the order
// of the slots, whatever the number of threads. S is the arithmetic type (float, double), W the storage type (S, bf16,
// fp16). Compiled on demand by kernels_native.py.

#include "kernels_native_backward.h"
#include "kernels_native_block.h"

namespace {

template <class W> Call<W> call_of(const int64_t* sizes, const void* const* in, const double* scalars) {
  auto at = [&](int i) { return static_cast<const W*>(in[i]); };
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], at(0), at(2), at(3), at(4), at(5), at(6), at(7), at(8),
          static_cast<const int64_t*>(in[1]), sizes[5] != 0,
          {int32_t(sizes[6]), scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5]}};
}

}  // namespace

// sizes: T, k, N, l, m, weights on the input, activation. in: hidden, indices, weights, gate, up, down, gate_bias, up_bias,
// down_bias. scalars: alpha, gate_min, gate_max, up_min, up_max, up_offset. All tensors contiguous; absent ones null.
// Returns 0, 1 at a negative index, 2 without memory.
#define FORWARD(suffix, S, W)                                                                                         \
  extern "C" int latent_experts_##suffix(const int64_t* sizes, const void* const* in, const double* scalars, void* out, \
                                         int threads) {                                                               \
    return forward<S, W>(call_of<W>(sizes, in, scalars), static_cast<W*>(out), Team{threads});                        \
  }
FORWARD(float32, float, float)
FORWARD(float64, double, double)
FORWARD(bfloat16, float, bf16)
FORWARD(float16, float, fp16)

// in[9] is the gradient of the output. out: gradients of hidden, weights, gate, up, down, gate_bias, up_bias, down_bias.
#define BACKWARD(suffix, S)                                                                                            \
  extern "C" int latent_experts_backward_##suffix(const int64_t* sizes, const void* const* in, const double* scalars,  \
                                                  void* const* out, int threads) {                                     \
    auto at = [&](int i) { return static_cast<S*>(out[i]); };                                                          \
    Grads<S> grads{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};                                            \
    return backward<S>(call_of<S>(sizes, in, scalars), static_cast<const S*>(in[9]), grads, threads);                  \
  }
BACKWARD(float32, float)
BACKWARD(float64, double)

// A whole block, or a part of it: see kernels_native_block.h. Returns as above.
#define BLOCK(suffix, S, W)                                                                                            \
  extern "C" int latent_block_##suffix(int64_t tokens, const void* hidden, const void* seen, const RouterPlan* router, \
                                       const ExpertsPlan* experts, void* out, const Others* others, int threads) {     \
    return block<S, W>(block_of<S, W>(tokens, hidden, seen, router, experts, out, others), threads);                   \
  }
BLOCK(float32, float, float)
BLOCK(float64, double, double)
BLOCK(bfloat16, float, bf16)
BLOCK(float16, float, fp16)
