// What calls of kernels have in common: the compilation for this processor, tensors as memory, and libtorch's threads.
#pragma once

#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <algorithm>

#include "kernels.h"

// The sets of instructions that arithmetic is compiled for.
enum Instructions { kBaseline, kAvx2, kAvx512 };

// The last that the calls of a thread may use: see sapo_limit_instructions.
extern thread_local int instructions_limit;

namespace {

#if defined(SAPO_X86_64)
// The last set that this processor has.
inline int processor_instructions() {
    static const int found = [] {
        if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512cd"))
            return kAvx512;
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? kAvx2 : kBaseline;
    }();
    return found;
}

// Of three compilations the one to use.
template <typename Table>
const Table& best(const Table& baseline, const Table& avx2, const Table& avx512) {
    switch (std::min(processor_instructions(), instructions_limit)) {
        case kAvx512: return avx512;
        case kAvx2: return avx2;
        default: return baseline;
    }
}

inline const Kernels& kernels() { return best(kernels_baseline, kernels_avx2, kernels_avx512); }
inline const Decoding& decoding() { return best(decoding_baseline, decoding_avx2, decoding_avx512); }
#else
inline int processor_instructions() { return kBaseline; }
inline const Kernels& kernels() { return kernels_baseline; }
inline const Decoding& decoding() { return decoding_baseline; }
#endif

template <typename T>
T* data(const at::Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }

// Calls `work` with a value of the tensor's kind of number.
template <typename F>
void by_kind(const at::Tensor& tensor, F work) {
    TORCH_CHECK(tensor.device().is_cpu(), "expected a tensor on the CPU, found one on ", tensor.device());
    switch (tensor.scalar_type()) {
        case at::kFloat: return work(float{});
        case at::kBFloat16: return work(Bf16{});
        default: TORCH_CHECK(false, "expected float32 or bfloat16, found ", tensor.scalar_type());
    }
}

// Calls `work(begin, end)` for pieces of 0..count on libtorch's own threads. TensorIterator is the way to those that needs no
// OpenMP here: at::parallel_for is a header.
template <typename F>
void in_parallel(int64_t count, int64_t piece, F work) {
    const int64_t pieces = (count + piece - 1) / piece;
    if (pieces <= 1) return work(int64_t{0}, count);
    auto numbers = at::arange(pieces, at::kLong);
    auto iterator = at::TensorIterator::nullary_op(numbers);
    const int limit = instructions_limit;
    iterator.for_each(
        [&](char** pointers, const int64_t* strides, int64_t size) {
            instructions_limit = limit;
            for (int64_t i = 0; i < size; ++i) {
                const int64_t number = *reinterpret_cast<int64_t*>(pointers[0] + i * strides[0]);
                work(number * piece, std::min(count, (number + 1) * piece));
            }
        },
        /*grain_size=*/1);
}

// Rows in a piece: enough work to be worth a thread's while.
int64_t rows_in_piece(int64_t width) { return std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, width)); }

}  // namespace
