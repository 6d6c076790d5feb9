// The few entries of onnxruntime's C interface that the operator calls, by their places in its table of functions.
//
// Entries are only ever appended to that table, so these places hold for version 17 (onnxruntime 1.17) and all later ones;
// onnxruntime gives no table for a version that it does not know.

#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtApi;

struct OrtApiBase {
  const OrtApi* (*table)(uint32_t version);  // null where the version is not known
  const char* (*version_string)();
};

// What describes an operator. onnxruntime reads as many members as version `version` has, here those up to `end_version`.
struct OrtCustomOp {
  uint32_t version;
  void* (*create_kernel_v1)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*name)(const OrtCustomOp*);
  const char* (*execution_provider)(const OrtCustomOp*);
  int (*input_type)(const OrtCustomOp*, size_t);
  size_t (*input_count)(const OrtCustomOp*);
  int (*output_type)(const OrtCustomOp*, size_t);
  size_t (*output_count)(const OrtCustomOp*);
  void (*compute_v1)(void*, OrtKernelContext*);
  void (*destroy_kernel)(void*);
  int (*input_characteristic)(const OrtCustomOp*, size_t);
  int (*output_characteristic)(const OrtCustomOp*, size_t);
  int (*input_memory)(const OrtCustomOp*, size_t);
  int (*variadic_input_min_arity)(const OrtCustomOp*);
  int (*variadic_input_homogeneity)(const OrtCustomOp*);
  int (*variadic_output_min_arity)(const OrtCustomOp*);
  int (*variadic_output_homogeneity)(const OrtCustomOp*);
  OrtStatus* (*create_kernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*compute)(void*, OrtKernelContext*);
  OrtStatus* (*infer_shape)(const OrtCustomOp*, void*);
  int (*start_version)(const OrtCustomOp*);
  int (*end_version)(const OrtCustomOp*);
};

namespace ort {

constexpr uint32_t VERSION = 17;

enum Code { FAIL = 1, INVALID_ARGUMENT = 2 };
enum Element { FLOAT = 1, INT64 = 7, FLOAT16 = 10, DOUBLE = 11, BFLOAT16 = 16 };
enum Characteristic { REQUIRED, OPTIONAL };

// Calls by place. A status is null for success, and otherwise whoever gets it releases it or returns it to onnxruntime.
class Api {
 public:
  explicit Api(const OrtApi* table) : entries_(reinterpret_cast<const Entry*>(table)) {}

  OrtStatus* fault(Code code, const char* message) const {
    return at<OrtStatus*(int, const char*)>(0)(code, message);
  }
  OrtStatus* create_domain(const char* name, OrtCustomOpDomain** domain) const {
    return at<OrtStatus*(const char*, OrtCustomOpDomain**)>(26)(name, domain);
  }
  OrtStatus* add_operator(OrtCustomOpDomain* domain, const OrtCustomOp* op) const {
    return at<OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>(27)(domain, op);
  }
  OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return at<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
  }
  OrtStatus* data(OrtValue* value, void** data) const { return at<OrtStatus*(OrtValue*, void**)>(51)(value, data); }
  OrtStatus* element(const OrtTensorTypeAndShapeInfo* shape, int* element) const {
    return at<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int*)>(60)(shape, element);
  }
  OrtStatus* rank(const OrtTensorTypeAndShapeInfo* shape, size_t* rank) const {
    return at<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(shape, rank);
  }
  OrtStatus* sizes(const OrtTensorTypeAndShapeInfo* shape, int64_t* sizes, size_t rank) const {
    return at<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(62)(shape, sizes, rank);
  }
  OrtStatus* shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** shape) const {  // to be released
    return at<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(value, shape);
  }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, float* value) const {
    return at<OrtStatus*(const OrtKernelInfo*, const char*, float*)>(85)(info, name, value);
  }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t* value) const {
    return at<OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, value);
  }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, char* text, size_t* size) const {  // with the final zero
    return at<OrtStatus*(const OrtKernelInfo*, const char*, char*, size_t*)>(87)(info, name, text, size);
  }
  OrtStatus* input_count(const OrtKernelContext* context, size_t* count) const {
    return at<OrtStatus*(const OrtKernelContext*, size_t*)>(88)(context, count);
  }
  OrtStatus* input(const OrtKernelContext* context, size_t number, const OrtValue** value) const {  // null where absent
    return at<OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, number, value);
  }
  OrtStatus* output(OrtKernelContext* context, size_t number, const int64_t* sizes, size_t rank, OrtValue** value) const {
    return at<OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(91)(context, number, sizes, rank, value);
  }
  void release(OrtStatus* status) const { at<void(OrtStatus*)>(93)(status); }
  void release(OrtTensorTypeAndShapeInfo* shape) const { at<void(OrtTensorTypeAndShapeInfo*)>(99)(shape); }
  OrtStatus* info_input_count(const OrtKernelInfo* info, size_t* count) const {
    return at<OrtStatus*(const OrtKernelInfo*, size_t*)>(230)(info, count);
  }
  // Input `number` of a node where it is the same in every call.
  OrtStatus* constant_input(const OrtKernelInfo* info, size_t number, int* constant, const OrtValue** value) const {
    return at<OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>(249)(info, number, constant, value);
  }
  // f(data, i) for i < count on the session's threads, each once, in any order; returns when all have.
  OrtStatus* parallel_for(const OrtKernelContext* context, void (*f)(void*, size_t), size_t count, void* data) const {
    return at<OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(context, f, count, 0, data);
  }

 private:
  using Entry = void (*)();
  template <class F> F* at(size_t place) const { return reinterpret_cast<F*>(entries_[place]); }
  const Entry* entries_;
};

}  // namespace ort
