// Single passes over memory for what libtorch does in many. Compiled with SAPO_KERNELS naming the table that it defines, for
// instructions that the compiler is told of. No libtorch here, and no threads: callers divide the rows.
//
// All arithmetic is in float; bfloat16 is read and rounded (to nearest, ties to even) as libtorch does.

#include "kernels.h"
#include "numbers.h"

#include <cmath>

namespace {

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <typename T>
void norm(const T* input, const float* weight, float eps, T* output, float* inverse, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row, input += width, output += width) {
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) squares += read(input[i]) * read(input[i]);
        const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
        inverse[row] = scale;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) write(output + i, read(input[i]) * scale * weight[i]);
    }
}

// With n = x / rms: d loss / dx = (g w - n mean(g w n)) / rms, and d loss / dw = g n summed over rows.
template <typename T>
void norm_backward(
    const T* input, const float* weight, const float* inverse, const T* gradient, T* of_input, float* of_weight,
    int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row, input += width, gradient += width, of_input += width) {
        const float scale = inverse[row];
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < width; ++i) along += read(gradient[i]) * weight[i] * read(input[i]);
        const float mean = along * scale / static_cast<float>(width);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            const float normed = read(input[i]) * scale;
            const float upstream = read(gradient[i]);
            write(of_input + i, scale * (upstream * weight[i] - normed * mean));
            of_weight[i] += upstream * normed;
        }
    }
}

template <typename T>
void gated(const T* gate, const T* up, T* output, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const float value = read(gate[i]);
        write(output + i, value * sigmoid(value) * read(up[i]));
    }
}

template <typename T>
void gated_backward(const T* gate, const T* up, const T* gradient, T* of_gate, T* of_up, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const float value = read(gate[i]);
        const float share = sigmoid(value);
        const float upstream = read(gradient[i]);
        write(of_gate + i, upstream * read(up[i]) * share * (1.0f + value * (1.0f - share)));
        write(of_up + i, upstream * value * share);
    }
}

// `direction` is 1, or -1 for the rotation back.
template <typename From, typename To>
void rotate_by(
    const From* input, const float* cosine, const float* sine, float direction, To* output, int64_t tokens, int64_t heads,
    int64_t width) {
    const int64_t half = width / 2;
    for (int64_t token = 0; token < tokens; ++token, cosine += half, sine += half) {
        for (int64_t head = 0; head < heads; ++head, input += width, output += width) {
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float left = read(input[i]), right = read(input[i + half]);
                const float turned = direction * sine[i];
                write(output + i, left * cosine[i] - right * turned);
                write(output + i + half, right * cosine[i] + left * turned);
            }
        }
    }
}

template <typename T>
void rotate(
    const T* input, const float* cosine, const float* sine, float* output, int64_t tokens, int64_t heads, int64_t width) {
    rotate_by(input, cosine, sine, 1.0f, output, tokens, heads, width);
}

template <typename T>
void rotate_back(
    const float* gradient, const float* cosine, const float* sine, T* of_input, int64_t tokens, int64_t heads,
    int64_t width) {
    rotate_by(gradient, cosine, sine, -1.0f, of_input, tokens, heads, width);
}

template <typename T>
void score(
    const T* logits, const int64_t* targets, float* logps, float* log_sums, float* correct, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row, logits += width) {
        float largest = read(logits[0]);
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < width; ++i) largest = largest > read(logits[i]) ? largest : read(logits[i]);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; ++i) sum += exponential(read(logits[i]) - largest);
        const float target = read(logits[targets[row]]);
        log_sums[row] = std::log(sum) + largest;
        logps[row] = target - log_sums[row];
        correct[row] = target >= largest ? 1.0f : 0.0f;
    }
}

template <typename T>
void score_backward(
    T* logits, const int64_t* targets, const float* log_sums, const float* gradient, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row, logits += width) {
        const float log_sum = log_sums[row], scale = gradient[row];
        const float of_target = scale * (1.0f - exponential(read(logits[targets[row]]) - log_sum));
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) write(logits + i, -scale * exponential(read(logits[i]) - log_sum));
        write(logits + targets[row], of_target);
    }
}

// Zeros for keys that are out of sight; the first of those that are not.
inline int64_t hide(float* numbers, int64_t keys, int64_t last, int64_t window) {
    const int64_t first = window > 0 && last >= window ? last + 1 - window : 0;
    for (int64_t i = 0; i < first; ++i) numbers[i] = 0.0f;
    for (int64_t i = last + 1; i < keys; ++i) numbers[i] = 0.0f;
    return first;
}

float softmax(float* scores, int64_t keys, int64_t last, int64_t window) {
    const int64_t first = hide(scores, keys, last, window);
    if (last < 0) return 0.0f;
    float largest = scores[first];
#pragma omp simd reduction(max : largest)
    for (int64_t i = first; i <= last; ++i) largest = largest > scores[i] ? largest : scores[i];
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i <= last; ++i) {
        scores[i] = exponential(scores[i] - largest);
        sum += scores[i];
    }
    const float share = 1.0f / sum;
#pragma omp simd
    for (int64_t i = first; i <= last; ++i) scores[i] *= share;
    return std::log(sum) + largest;
}

// With p the softmax and g the gradient: d loss / d score = p (g - sum of p g).
void softmax_backward(float* scores, float* gradients, float log_sum, int64_t keys, int64_t last, int64_t window) {
    hide(gradients, keys, last, window);
    const int64_t first = hide(scores, keys, last, window);
    float along = 0.0f;
#pragma omp simd reduction(+ : along)
    for (int64_t i = first; i <= last; ++i) {
        scores[i] = exponential(scores[i] - log_sum);
        along += scores[i] * gradients[i];
    }
#pragma omp simd
    for (int64_t i = first; i <= last; ++i) gradients[i] = scores[i] * (gradients[i] - along);
}

template <typename T>
constexpr Elementwise<T> elementwise() {
    return {norm<T>,   norm_backward<T>, gated<T>, gated_backward<T>,
            rotate<T>, rotate_back<T>,   score<T>, score_backward<T>};
}

}  // namespace

extern const Kernels SAPO_KERNELS = {elementwise<float>(), elementwise<Bf16>(), softmax, softmax_backward};
