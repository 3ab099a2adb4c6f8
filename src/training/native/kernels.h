// Arithmetic of native/kernels.cpp, which is compiled once for each set of instructions: see `kernels()`.
#pragma once

#include <cstdint>

// The bits of a bfloat16: a float's upper half.
struct Bf16 {
    uint16_t bits;
};

// The same operations for one kind of number. Pointers are to contiguous rows, and never overlap unless said so.
template <typename T>
struct Elementwise {
    // output = input / sqrt(mean(input^2) + eps) * weight, for `rows` rows of `width`; `inverse` keeps 1 / sqrt(...), (rows,).
    void (*norm)(const T* input, const float* weight, float eps, T* output, float* inverse, int64_t rows, int64_t width);
    // The gradients with respect to input and weight; the latter, (width,), is added to.
    void (*norm_backward)(
        const T* input, const float* weight, const float* inverse, const T* gradient, T* of_input, float* of_weight,
        int64_t rows, int64_t width);
    // output = gate / (1 + exp(-gate)) * up.
    void (*gated)(const T* gate, const T* up, T* output, int64_t count);
    void (*gated_backward)(const T* gate, const T* up, const T* gradient, T* of_gate, T* of_up, int64_t count);
    // Rotary embedding of (tokens, heads, width) to float: dimension i pairs with i + width / 2; cosine and sine are
    // (tokens, width / 2).
    void (*rotate)(
        const T* input, const float* cosine, const float* sine, float* output, int64_t tokens, int64_t heads, int64_t width);
    // Its gradient, which is the rotation back.
    void (*rotate_back)(
        const float* gradient, const float* cosine, const float* sine, T* of_input, int64_t tokens, int64_t heads,
        int64_t width);
    // For each row of logits (rows, width): its target's log-probability, the log of its sum of exponentials, and 1 where no
    // logit is above the target's, else 0.
    void (*score)(
        const T* logits, const int64_t* targets, float* logps, float* log_sums, float* correct, int64_t rows, int64_t width);
    // Puts gradient * (onehot(target) - softmax(logits)) in the logits' place.
    void (*score_backward)(
        T* logits, const int64_t* targets, const float* log_sums, const float* gradient, int64_t rows, int64_t width);
};

struct Kernels {
    Elementwise<float> float32;
    Elementwise<Bf16> bfloat16;
    // A query's scores (keys,) become their softmax, over keys up to number `last`, and not more than `window` of them if
    // that is above 0; zeros for the others, and for all where `last` is -1. Returns the log of the sum of exponentials.
    float (*softmax)(float* scores, int64_t keys, int64_t last, int64_t window);
    // Scores become their softmax, which has that sum, and its gradients those with respect to the scores.
    void (*softmax_backward)(
        float* scores, float* gradients, float log_sum, int64_t keys, int64_t last, int64_t window);
};

// output (rows, outputs) = input (rows, width) times a weight's rows (outputs, width), each of these times its scale if
// there are scales, plus bias (outputs,) if there is one; or that is added to the output.
template <typename W>
struct Product {
    const float* input;
    const W* weight;
    const float* scales;
    const float* bias;
    float* output;
    int64_t rows, width;
    // From one row of the output to the next.
    int64_t stride;
    bool adds;
};

// The queries of some heads at one token, (heads, width), and the keys and values that they have in common: the first of
// each, numbers from one to the next, and how many.
struct Attention {
    const float* queries;
    const float* keys;
    const float* values;
    int64_t heads, width, stride, count;
    float* output;  // (heads, width)
    float* scores;  // memory for `count` numbers
};

// What decodes, native/decoding.cpp: outputs begin..end of products; scaled dot-product attention; and a weight in 8 bits
// with a scale for each row, which is about output * scale: the largest number of a row becomes 127 or -127.
struct Decoding {
    void (*float32)(const Product<float>& product, int64_t begin, int64_t end);
    void (*bfloat16)(const Product<Bf16>& product, int64_t begin, int64_t end);
    void (*int8)(const Product<int8_t>& product, int64_t begin, int64_t end);
    void (*attend)(const Attention& attention);
    void (*quantize_float32)(const float* weight, int8_t* output, float* scales, int64_t rows, int64_t width);
    void (*quantize_bfloat16)(const Bf16* weight, int8_t* output, float* scales, int64_t rows, int64_t width);
};

// One for each compilation.
extern const Kernels kernels_baseline;
extern const Decoding decoding_baseline;
#if defined(SAPO_X86_64)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Decoding decoding_avx2;
extern const Decoding decoding_avx512;
#endif
