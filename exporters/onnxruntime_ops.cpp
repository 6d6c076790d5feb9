// `latentize::LatentExperts` for onnxruntime on the CPU, by the kernels that serve PyTorch.
//
// A library that onnxruntime loads with RegisterCustomOpsLibrary: a session that it was registered in runs this instead of
// the standard operators in the node's body. The work is done by the session's own threads. Compiled on demand by
// onnxruntime_ops.py.

#include <atomic>
#include <climits>
#include <cmath>
#include <cstdio>
#include <mutex>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels_native_packed.h"
#include "onnxruntime_abi.h"

namespace {

constexpr const char *DOMAIN = "latentize", *NAME = "LatentExperts";
// As in latentize/activations.py, in the order of `Name`.
constexpr const char* ACTIVATIONS[] = {"silu", "gelu", "gelu_tanh", "relu", "relu_squared", "sigmoid", "tanh", "leaky_relu",
                                       "elu", "selu", "mish", "softplus", "hardswish", "relu6", "identity"};
enum Input { HIDDEN, INDICES, WEIGHTS, GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS, INPUTS };
constexpr const char* INPUT_NAMES[INPUTS] = {"hidden", "indices", "weights", "gate", "up", "down", "gate_bias", "up_bias",
                                             "down_bias"};
constexpr bool optional(size_t input) { return input == GATE || input >= GATE_BIAS; }

template <class W> struct Type;
template <> struct Type<float> { using Sum = float; static constexpr int element = ort::FLOAT; };
template <> struct Type<double> { using Sum = double; static constexpr int element = ort::DOUBLE; };
template <> struct Type<fp16> { using Sum = float; static constexpr int element = ort::FLOAT16; };
template <> struct Type<bf16> { using Sum = float; static constexpr int element = ort::BFLOAT16; };

// The threads of a session. How many it has is not told, so regions are cut for all that the process may use: what is cut
// finer than needed costs little, since a thread that comes by takes whatever is left.
struct SessionTeam {
  const ort::Api& api;
  const OrtKernelContext* context;
  int count;
  OrtStatus** status;
  template <class F> void run(int threads, const F& f) const {
    if (threads == 1) return f(0);
    const auto call = [](void* data, size_t number) { (*static_cast<const F*>(data))(int64_t(number)); };
    *status = api.parallel_for(context, call, size_t(threads), const_cast<F*>(&f));
  }
};

int usable_threads() {
  static const int count = int(std::max(1u, std::min(64u, std::thread::hardware_concurrency())));
  return count;
}

struct Tensor {
  const void* data = nullptr;
  int64_t sizes[3] = {};
};

// Bytes of weights in panels that the process may hold: they come on top of those that onnxruntime keeps.
constexpr int64_t MOST_PANELS = int64_t(1) << 30;
std::atomic<int64_t> bytes_in_panels{0};

// What one node keeps: its attributes, and its weights in panels where they are constant and not too large.
struct Kernel {
  ort::Api api;
  Activation activation;
  bool on_input;
  void* memory = nullptr;  // `Panels`
  int64_t bytes = 0;
  int64_t gated = 0, experts = 0, inner = 0, width = 0;

  ~Kernel() {
    std::free(memory);
    bytes_in_panels -= bytes;
  }
};

template <class... Args> OrtStatus* fault(const ort::Api& api, const char* format, Args... args) {
  char message[256];
  std::snprintf(message, sizeof message, format, args...);
  return api.fault(ort::INVALID_ARGUMENT, message);
}

// An attribute of the node, or `otherwise`.
template <class V> V attribute(const ort::Api& api, const OrtKernelInfo* info, const char* name, V otherwise) {
  V value = otherwise;
  OrtStatus* status = api.attribute(info, name, &value);
  if (!status) return value;
  api.release(status);
  return otherwise;
}

OrtStatus* activation_of(const ort::Api& api, const OrtKernelInfo* info, Activation* to) {
  char text[32] = "silu";
  size_t size = 0;
  OrtStatus* status = api.attribute(info, "activation", nullptr, &size);
  if (!status) {
    if (size > sizeof text) return fault(api, "%s: its activation has a name of %zu letters, which is none of ours", NAME, size);
    if ((status = api.attribute(info, "activation", text, &size))) return status;
  } else {
    api.release(status);  // absent
  }
  int32_t number = -1;
  for (int32_t i = 0; i <= IDENTITY; ++i)
    if (!std::strcmp(text, ACTIVATIONS[i])) number = i;
  if (number < 0) return fault(api, "%s: activation %s is not known", NAME, text);
  const auto scalar = [&](const char* name, float otherwise) { return double(attribute(api, info, name, otherwise)); };
  *to = {number, scalar("alpha", 1), scalar("gate_min", -INFINITY), scalar("gate_max", INFINITY),
         scalar("up_min", -INFINITY), scalar("up_max", INFINITY), scalar("up_offset", 0)};
  return nullptr;
}

// Reads input `number` from `value`; one that is absent has no data.
OrtStatus* read(const ort::Api& api, const OrtValue* value, size_t number, int element, Tensor* to) {
  const char* name = INPUT_NAMES[number];
  if (!value) return optional(number) ? nullptr : fault(api, "%s: %s is missing", NAME, name);
  OrtTensorTypeAndShapeInfo* shape = nullptr;
  if (OrtStatus* status = api.shape(value, &shape)) return status;
  const size_t expected = number >= GATE && number <= DOWN ? 3 : 2;
  size_t rank = 0;
  int found = 0;
  OrtStatus* status = api.rank(shape, &rank);
  if (!status) status = api.element(shape, &found);
  if (!status && rank != expected)
    status = fault(api, "%s: %s expected %zu dimensions, found %zu", NAME, name, expected, rank);
  if (!status && found != element) status = fault(api, "%s: %s expected element type %d, found %d", NAME, name, element, found);
  if (!status) status = api.sizes(shape, to->sizes, rank);
  api.release(shape);
  if (status) return status;
  void* data = nullptr;
  status = api.data(const_cast<OrtValue*>(value), &data);
  static const char nothing = 0;
  to->data = data ? data : &nothing;  // a tensor without elements is there all the same
  return status;
}

// Reads a matrix of all experts that is the same in every call; without data where it is not.
template <class W> OrtStatus* read_constant(const ort::Api& api, const OrtKernelInfo* info, size_t number, Tensor* to) {
  int constant = 0;
  const OrtValue* value = nullptr;
  if (OrtStatus* status = api.constant_input(info, number, &constant, &value)) return status;
  return constant && value ? read(api, value, number, Type<W>::element, to) : nullptr;
}

// Memory that is read from one end to the other, in large pages where the system has them.
void* large_pages(int64_t bytes) {
  constexpr size_t PAGE = size_t(2) << 20;
  const size_t align = size_t(bytes) < PAGE ? 64 : PAGE, size = (size_t(bytes) + align - 1) / align * align;
  void* memory = std::aligned_alloc(align, size);
#if defined(MADV_HUGEPAGE)
  if (memory && align == PAGE) madvise(memory, size, MADV_HUGEPAGE);
#endif
  return memory;
}

// Lays a node's weights out in panels; leaves it where they are not constant, do not fit together or are too large.
template <class W> OrtStatus* keep_panels(const OrtKernelInfo* info, Kernel* kernel) {
  using S = typename Type<W>::Sum;
  Tensor gate, up, down;
  size_t inputs = 0;
  if (OrtStatus* status = kernel->api.info_input_count(info, &inputs)) return status;
  if (inputs <= DOWN) return nullptr;
  if (OrtStatus* status = read_constant<W>(kernel->api, info, UP, &up)) return status;
  if (OrtStatus* status = read_constant<W>(kernel->api, info, DOWN, &down)) return status;
  if (OrtStatus* status = read_constant<W>(kernel->api, info, GATE, &gate)) return status;
  const int64_t n = up.sizes[0], m = up.sizes[1], l = up.sizes[2], expected[3] = {n, l, m};
  if (!up.data || !down.data || n * m * l == 0 || std::memcmp(down.sizes, expected, sizeof expected)) return nullptr;
  if (gate.data && std::memcmp(gate.sizes, up.sizes, sizeof up.sizes)) return nullptr;
  const Panels<S, W> panels{nullptr, m, l, gate.data != nullptr};
  const int64_t bytes = n * panels.expert_size() * int64_t(sizeof(W));
  if (bytes_in_panels.fetch_add(bytes) + bytes > MOST_PANELS) {
    bytes_in_panels -= bytes;
    return nullptr;
  }
  kernel->bytes = bytes;
  kernel->memory = large_pages(bytes);
  if (!kernel->memory) return nullptr;  // computed without panels
  const auto at = [](const Tensor& t) { return static_cast<const W*>(t.data); };
  pack(panels, n, at(gate), at(up), at(down), static_cast<W*>(kernel->memory));
  kernel->gated = panels.gated, kernel->experts = n, kernel->inner = m, kernel->width = l;
  return nullptr;
}

// Attributes are fp32: whether one that fp64 is to be computed with may have been rounded.
bool rounded(double value) { return std::isfinite(value) && std::floor(value * 4096) != value * 4096; }

template <class W>
OrtStatus* create_kernel(const OrtCustomOp*, const OrtApi* table, const OrtKernelInfo* info, void** kernel) noexcept {
  const ort::Api api(table);
  Activation activation;
  if (OrtStatus* status = activation_of(api, info, &activation)) return status;
  const Activation& a = activation;
  for (double value : {a.alpha, a.gate_min, a.gate_max, a.up_min, a.up_max, a.up_offset})
    if (std::is_same_v<W, double> && rounded(value))
      return fault(api, "%s: the scalar %g of a float64 node was rounded to float32; run it without latentize's operator", NAME,
                   value);
  const bool on_input = attribute(api, info, "weights_on_input", int64_t(0)) != 0;
  Kernel* made = new (std::nothrow) Kernel{api, activation, on_input};
  if (!made) return api.fault(ort::FAIL, "LatentExperts: no memory");
  *kernel = made;
  return keep_panels<W>(info, made);
}

OrtStatus* check_sizes(const ort::Api& api, const Tensor* in) {
  const int64_t tokens = in[HIDDEN].sizes[0], width = in[HIDDEN].sizes[1], k = in[INDICES].sizes[1];
  const int64_t n = in[UP].sizes[0], inner = in[UP].sizes[1];
  const int64_t expected[INPUTS][3] = {{tokens, width}, {tokens, k}, {tokens, k}, {n, inner, width}, {n, inner, width},
                                       {n, width, inner}, {n, inner}, {n, inner}, {n, width}};
  for (int i = 0; i < INPUTS; ++i)
    if (in[i].data && std::memcmp(expected[i], in[i].sizes, sizeof expected[i]))
      return fault(api, "%s: %s expected shape [%lld, %lld, %lld], found [%lld, %lld, %lld] (0 past the last)", NAME,
                   INPUT_NAMES[i], (long long)expected[i][0], (long long)expected[i][1], (long long)expected[i][2],
                   (long long)in[i].sizes[0], (long long)in[i].sizes[1], (long long)in[i].sizes[2]);
  if (in[GATE_BIAS].data && !in[GATE].data) return fault(api, "%s: gate_bias without gate", NAME);
  return nullptr;
}

template <class W> int run(const Kernel& kernel, const Call<W>& c, W* out, const SessionTeam& team) {
  using S = typename Type<W>::Sum;
  // A gate that is not constant is not in panels.
  const bool packed = kernel.experts && kernel.gated == (c.gate != nullptr);
  if (!packed) return forward<S, W>(c, out, team);
  const Panels<S, W> panels{static_cast<const W*>(kernel.memory), kernel.inner, kernel.width, kernel.gated};
  return forward_packed<S, W>(c, panels, out, team);
}

template <class W> OrtStatus* compute(void* data, OrtKernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(data);
  const ort::Api& api = kernel.api;
  Tensor in[INPUTS];
  size_t inputs = 0;
  if (OrtStatus* status = api.input_count(context, &inputs)) return status;
  if (inputs <= DOWN || inputs > INPUTS) return fault(api, "%s: expected 6 to 9 inputs, found %zu", NAME, inputs);
  for (size_t i = 0; i < inputs; ++i) {
    const OrtValue* value = nullptr;
    if (OrtStatus* status = api.input(context, i, &value)) return status;
    if (OrtStatus* status = read(api, value, i, i == INDICES ? ort::INT64 : Type<W>::element, in + i)) return status;
  }
  if (OrtStatus* status = check_sizes(api, in)) return status;
  OrtValue* output = nullptr;
  void* out = nullptr;
  if (OrtStatus* status = api.output(context, 0, in[HIDDEN].sizes, 2, &output)) return status;
  if (OrtStatus* status = api.data(output, &out)) return status;
  const int64_t tokens = in[HIDDEN].sizes[0], width = in[HIDDEN].sizes[1];
  if (!tokens || !width) return nullptr;
  const auto at = [&](int i) { return static_cast<const W*>(in[i].data); };
  const Call<W> call{tokens, in[INDICES].sizes[1], in[UP].sizes[0], width, in[UP].sizes[1], at(HIDDEN), at(WEIGHTS), at(GATE),
                     at(UP), at(DOWN), at(GATE_BIAS), at(UP_BIAS), at(DOWN_BIAS),
                     static_cast<const int64_t*>(in[INDICES].data), kernel.on_input, kernel.activation};
  OrtStatus* status = nullptr;
  const SessionTeam team{api, context, usable_threads(), &status};
  const int code = run(kernel, call, static_cast<W*>(out), team);
  if (status) return status;
  if (code == 1) return fault(api, "%s: an index is negative", NAME);
  return code ? api.fault(ort::FAIL, "LatentExperts: no memory for the pairs of tokens and experts") : nullptr;
}

// The operator for one element type.
template <class W> const OrtCustomOp* operator_of() {
  static const OrtCustomOp op = [] {
    OrtCustomOp op{};
    op.version = ort::VERSION;
    op.create_kernel_v1 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*) -> void* { return nullptr; };
    op.name = [](const OrtCustomOp*) { return NAME; };
    op.execution_provider = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
    op.input_type = [](const OrtCustomOp*, size_t i) { return i == INDICES ? int(ort::INT64) : Type<W>::element; };
    op.input_count = [](const OrtCustomOp*) { return size_t(INPUTS); };
    op.output_type = [](const OrtCustomOp*, size_t) { return Type<W>::element; };
    op.output_count = [](const OrtCustomOp*) { return size_t(1); };
    op.compute_v1 = [](void*, OrtKernelContext*) {};
    op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.input_characteristic = [](const OrtCustomOp*, size_t i) { return int(optional(i) ? ort::OPTIONAL : ort::REQUIRED); };
    op.output_characteristic = [](const OrtCustomOp*, size_t) { return int(ort::REQUIRED); };
    op.input_memory = [](const OrtCustomOp*, size_t) { return 0; };
    op.variadic_input_min_arity = op.variadic_output_min_arity = [](const OrtCustomOp*) { return 1; };
    op.variadic_input_homogeneity = op.variadic_output_homogeneity = [](const OrtCustomOp*) { return 1; };
    op.create_kernel = create_kernel<W>;
    op.compute = compute<W>;
    op.start_version = [](const OrtCustomOp*) { return 1; };
    op.end_version = [](const OrtCustomOp*) { return INT_MAX; };
    return op;
  }();
  return &op;
}

// The domain with our operator, made once: whoever it was added to keeps a pointer to it.
OrtStatus* domain_of(const ort::Api& api, OrtCustomOpDomain** domain) {
  static std::mutex lock;
  static OrtCustomOpDomain* made = nullptr;
  const std::lock_guard<std::mutex> held(lock);
  if (!made) {
    OrtCustomOpDomain* fresh = nullptr;
    if (OrtStatus* status = api.create_domain(DOMAIN, &fresh)) return status;
    for (const OrtCustomOp* op : {operator_of<float>(), operator_of<double>(), operator_of<fp16>(), operator_of<bf16>()})
      if (OrtStatus* status = api.add_operator(fresh, op)) return status;
    made = fresh;
  }
  *domain = made;
  return nullptr;
}

// Whether this processor has the instructions that the library was compiled for.
bool runs_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
  return true;
#endif
}

}  // namespace

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) noexcept {
  if (const OrtApi* table = base->table(ort::VERSION)) {
    const ort::Api api(table);
    if (!runs_here())
      return api.fault(ort::FAIL, "latentize's operator was compiled for a newer processor than this one; build it here");
    OrtCustomOpDomain* domain = nullptr;
    if (OrtStatus* status = domain_of(api, &domain)) return status;
    return api.add_domain(options, domain);
  }
  // Every onnxruntime knows version 1, whose first entry makes a status.
  const OrtApi* oldest = base->table(1);
  return oldest ? ort::Api(oldest).fault(ort::FAIL, "latentize's operator needs onnxruntime 1.17 or newer") : nullptr;
}
