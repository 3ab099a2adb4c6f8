// Decoding a few sequences by a token each. The products are of a few rows with a large weight: every weight is read once,
// in the order it lies in, and reading it is the work. Compiled like kernels.cpp; no libtorch here, and no threads.

#include <cmath>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "numbers.h"

namespace {

// As wide as the instructions are: GCC and Clang lower operations on vectors for any target.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kTogether = 4;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8, kTogether = 2;
#else
constexpr int64_t kLanes = 4, kTogether = 2;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

// Each number in a word of its own. Where there is one instruction for it GCC has to be told.
#if defined(__AVX512F__)
inline Words widened(const uint16_t* from) {
    return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Integers widened(const int8_t* from) {
    return (Integers)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#elif defined(__AVX2__)
inline Words widened(const uint16_t* from) {
    return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Integers widened(const int8_t* from) {
    return (Integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
#else
inline Words widened(const uint16_t* from) {
    Halves lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return __builtin_convertvector(lanes, Words);
}
inline Integers widened(const int8_t* from) {
    Bytes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return __builtin_convertvector(lanes, Integers);
}
#endif

inline Floats load(const float* from) {
    Floats lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

inline Floats load(const Bf16* from) { return (Floats)(widened(&from->bits) << 16); }

inline Floats load(const int8_t* from) { return __builtin_convertvector(widened(from), Floats); }

#if defined(__AVX512F__)
inline float total(Floats lanes) { return _mm512_reduce_add_ps((__m512)lanes); }
#else
inline float total(Floats lanes) {
    float sums[kLanes];
    std::memcpy(sums, &lanes, sizeof lanes);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
}
#endif

// sums[r][c] = weight row r times input row c; weight rows are `stride` apart. Sums of R * C vectors stay in registers.
template <int R, int C, typename W>
inline void tile(const float* input, const W* weight, int64_t width, int64_t stride, float (*sums)[C]) {
    Floats lanes[R][C] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        Floats inputs[C];
        for (int c = 0; c < C; ++c) inputs[c] = load(input + c * width + i);
        for (int r = 0; r < R; ++r) {
            // Rows further on: the hardware does not look beyond the end of these.
            __builtin_prefetch(weight + (r + 3 * R) * stride + i);
            const Floats weights = load(weight + r * stride + i);
            for (int c = 0; c < C; ++c) lanes[r][c] += weights * inputs[c];
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            float sum = total(lanes[r][c]);
            for (int64_t rest = i; rest < width; ++rest) sum += read(weight[r * stride + rest]) * input[c * width + rest];
            sums[r][c] = sum;
        }
    }
}

// R weight rows from number `first` on with all input rows, four of these at a time while that many are left. An element's
// sum is in the same order whatever the others are.
template <int R, typename W>
inline void block(const Product<W>& product, int64_t first) {
    const int64_t width = product.width;
    const W* weight = product.weight + first * width;
    const auto put = [&product, first](int r, int64_t row, float sum) {
        const int64_t n = first + r;
        if (product.scales) sum *= product.scales[n];
        if (product.bias) sum += product.bias[n];
        float* output = product.output + row * product.stride + n;
        *output = product.adds ? *output + sum : sum;
    };
    int64_t row = 0;
    for (; row + 4 <= product.rows; row += 4) {
        float sums[R][4];
        tile<R, 4>(product.input + row * width, weight, width, width, sums);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < 4; ++c) put(r, row + c, sums[r][c]);
    }
    for (; row < product.rows; ++row) {
        float sums[R][1];
        tile<R, 1>(product.input + row * width, weight, width, width, sums);
        for (int r = 0; r < R; ++r) put(r, row, sums[r][0]);
    }
}

template <typename W>
void multiply(const Product<W>& product, int64_t begin, int64_t end) {
    int64_t n = begin;
    for (; n + kTogether <= end; n += kTogether) block<kTogether>(product, n);
    for (; n < end; ++n) block<1>(product, n);
}

// output = sum of weights times rows of values, `stride` apart, V vectors wide.
template <int V>
inline void mix(const float* weights, const float* values, int64_t stride, int64_t count, float total, float* output) {
    Floats lanes[V] = {};
    for (int64_t row = 0; row < count; ++row)
        for (int v = 0; v < V; ++v) lanes[v] += weights[row] * load(values + row * stride + v * kLanes);
    for (int v = 0; v < V; ++v) lanes[v] /= total;
    std::memcpy(output, lanes, sizeof lanes);
}

// softmax(query keys^T / sqrt(width)) values.
void attend(const Attention& attention) {
    const auto [queries, keys, values, heads, width, stride, count, output, scores] = attention;
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    for (int64_t head = 0; head < heads; ++head) {
        const float* query = queries + head * width;
        float* attended = output + head * width;
        int64_t key = 0;
        for (; key + 4 <= count; key += 4) {
            float sums[4][1];
            tile<4, 1>(query, keys + key * stride, width, stride, sums);
            for (int i = 0; i < 4; ++i) scores[key + i] = sums[i][0] * scale;
        }
        for (; key < count; ++key) {
            float sums[1][1];
            tile<1, 1>(query, keys + key * stride, width, stride, sums);
            scores[key] = sums[0][0] * scale;
        }
        float largest = scores[0];
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < count; ++i) largest = largest > scores[i] ? largest : scores[i];
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; ++i) {
            scores[i] = exponential(scores[i] - largest);
            sum += scores[i];
        }
        int64_t i = 0;
        for (; i + 4 * kLanes <= width; i += 4 * kLanes) mix<4>(scores, values + i, stride, count, sum, attended + i);
        for (; i + kLanes <= width; i += kLanes) mix<1>(scores, values + i, stride, count, sum, attended + i);
        for (; i < width; ++i) {
            float rest = 0.0f;
            for (int64_t row = 0; row < count; ++row) rest += scores[row] * values[row * stride + i];
            attended[i] = rest / sum;
        }
    }
}

// Each row by its own scale: the largest number becomes 127.
template <typename T>
void quantize(const T* weight, int8_t* output, float* scales, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row, weight += width, output += width) {
        float largest = 0.0f;
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < width; ++i) {
            const float size = __builtin_fabsf(read(weight[i]));
            largest = largest > size ? largest : size;
        }
        scales[row] = largest / 127.0f;
        const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
#pragma omp simd
        for (int64_t i = 0; i < width; ++i)
            output[i] = static_cast<int8_t>(static_cast<int32_t>((read(weight[i]) * inverse + shifter) - shifter));
    }
}

}  // namespace

extern const Decoding SAPO_DECODING = {
    multiply<float>, multiply<Bf16>, multiply<int8_t>, attend, quantize<float>, quantize<Bf16>,
};
