// A decoder layer on the next token of a few sequences, on a CPU, and the products of its head: see decoding.cpp. Tensors
// cross as in ops.cpp.

#include <ATen/core/Tensor.h>
#include <vector>

#include "calls.h"
#include "guarded.h"

namespace {

const Elementwise<float>& elementwise() { return kernels().float32; }

void multiply(const Product<float>& product, int64_t begin, int64_t end) { decoding().float32(product, begin, end); }
void multiply(const Product<Bf16>& product, int64_t begin, int64_t end) { decoding().bfloat16(product, begin, end); }
void multiply(const Product<int8_t>& product, int64_t begin, int64_t end) { decoding().int8(product, begin, end); }

// The weight (out, in) of a linear layer, float32, bfloat16, or 8 bits with scales (out,); scales and bias may be null.
struct Linear {
    const at::Tensor* weight;
    const at::Tensor* scales;
    const at::Tensor* bias;

    int64_t outputs() const { return weight->size(0); }

    void check(int64_t width, int64_t outputs) const {
        TORCH_CHECK(
            weight->dim() == 2 && weight->is_contiguous() && weight->device().is_cpu() && weight->size(1) == width &&
                (outputs == 0 || weight->size(0) == outputs),
            "expected a contiguous weight (", outputs, ", ", width, "), found ", weight->sizes());
        const auto kind = weight->scalar_type();
        TORCH_CHECK(
            kind == at::kFloat || kind == at::kBFloat16 || kind == at::kChar,
            "expected a weight in float32, bfloat16 or 8 bits, found ", kind);
        TORCH_CHECK((kind == at::kChar) == (scales != nullptr), "8-bit weights, and no others, have scales");
        for (const auto* numbers : {scales, bias})
            TORCH_CHECK(
                !numbers || (numbers->numel() == weight->size(0) && numbers->is_contiguous() &&
                             numbers->scalar_type() == at::kFloat),
                "expected a contiguous float32 scale or bias for each output");
    }
};

// Outputs in a piece of work: whole tiles.
constexpr int64_t kPiece = 16;

// Pieces that are worth a thread's while, of so many multiplications each.
int64_t pieces_together(int64_t multiplications) {
    return std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, multiplications));
}

// Layers of one input (rows, width) side by side in the output, whose rows are `stride` apart; or added to what is there.
void multiply_all(
    const float* input, int64_t rows, std::initializer_list<Linear> layers, float* output, int64_t stride, bool adds) {
    const int64_t together = pieces_together(rows * kPiece * layers.begin()->weight->size(1));
    int64_t pieces = 0;
    for (const auto& layer : layers) pieces += (layer.outputs() + kPiece - 1) / kPiece;
    const auto part = [&](const Linear& layer, float* to, int64_t from, int64_t until) {
        const auto with = [&](auto* weight) {
            multiply(
                {input, weight, layer.scales ? data<float>(*layer.scales) : nullptr,
                 layer.bias ? data<float>(*layer.bias) : nullptr, to, rows, layer.weight->size(1), stride, adds},
                from, until);
        };
        switch (layer.weight->scalar_type()) {
            case at::kFloat: return with(data<const float>(*layer.weight));
            case at::kBFloat16: return with(data<const Bf16>(*layer.weight));
            default: return with(data<const int8_t>(*layer.weight));
        }
    };
    // Pieces of all layers in turn, so that threads divide them once.
    in_parallel(pieces, together, [&](int64_t begin, int64_t end) {
        int64_t first_piece = 0;
        float* to = output;
        for (const auto& layer : layers) {
            const int64_t outputs = layer.outputs();
            const int64_t from = std::max<int64_t>(0, (begin - first_piece) * kPiece);
            const int64_t until = std::min(outputs, (end - first_piece) * kPiece);
            if (from < until) part(layer, to, from, until);
            first_piece += (outputs + kPiece - 1) / kPiece;
            to += outputs;
        }
    });
}

// Tensors of a layer, by their places in the lists that cross.
enum { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kLinears };
enum { kAttentionNorm, kFeedForwardNorm, kQueryNorm, kKeyNorm };

const float* floats(const at::Tensor* tensor, int64_t count) {
    TORCH_CHECK(
        tensor->is_contiguous() && tensor->scalar_type() == at::kFloat && tensor->numel() >= count,
        "expected ", count, " contiguous float32 numbers, found ", tensor->sizes());
    return data<float>(*tensor);
}

void norm(const float* input, const at::Tensor* weight, double eps, float* output, int64_t rows, int64_t width) {
    std::vector<float> inverse(rows);
    elementwise().norm(input, floats(weight, width), static_cast<float>(eps), output, inverse.data(), rows, width);
}

}  // namespace

extern "C" {

struct SapoLayer {
    // Attention's, feed-forward's, queries' and keys'; the last two may be null.
    const at::Tensor* norms[4];
    // Query, key, value, output, gate, up, down; without 8-bit weights scales are null, biases may be.
    const at::Tensor* weights[kLinears];
    const at::Tensor* scales[kLinears];
    const at::Tensor* biases[kLinears];
    // (rows, capacity, key heads, head_dim) each, float32.
    const at::Tensor* keys;
    const at::Tensor* values;
    int64_t heads, key_heads, head_dim;
    // Tokens attended to at most; 0 for all.
    int64_t window;
    double eps;
};

// Adds to hidden (rows, width), float32, what the layer makes of it; the tokens stand at `positions` (rows,), i64, with the
// rotations cosine and sine (rows, head_dim / 2), and their keys and values are stored there.
char* sapo_decode_layer(
    const SapoLayer* layer, const at::Tensor* hidden, const at::Tensor* positions, const at::Tensor* cosine,
    const at::Tensor* sine) {
    return guarded([&] {
        const int64_t rows = hidden->size(0), width = hidden->size(1), head_dim = layer->head_dim;
        const int64_t queries = layer->heads * head_dim, shared = layer->key_heads * head_dim, joined = queries + 2 * shared;
        const auto linear = [&](int which) {
            return Linear{layer->weights[which], layer->scales[which], layer->biases[which]};
        };
        const int64_t inner = layer->weights[kGate]->size(0), capacity = layer->keys->size(1);
        const int64_t widths[kLinears] = {width, width, width, queries, width, width, inner};
        const int64_t outputs[kLinears] = {queries, shared, shared, width, inner, inner, width};
        for (int which = 0; which < kLinears; ++which) linear(which).check(widths[which], outputs[which]);
        floats(hidden, rows * width);
        floats(layer->keys, rows * capacity * shared);
        floats(layer->values, rows * capacity * shared);
        const float* cosines = floats(cosine, rows * head_dim / 2);
        const float* sines = floats(sine, rows * head_dim / 2);
        TORCH_CHECK(positions->is_contiguous() && positions->numel() == rows && positions->scalar_type() == at::kLong,
            "expected a position for each row");
        const int64_t* at = data<int64_t>(*positions);
        float *stream = data<float>(*hidden), *keys = data<float>(*layer->keys), *values = data<float>(*layer->values);

        std::vector<float> normed(rows * width), projected(rows * joined), rotated(rows * queries), attended(rows * queries);
        norm(stream, layer->norms[kAttentionNorm], layer->eps, normed.data(), rows, width);
        multiply_all(normed.data(), rows, {linear(kQuery), linear(kKey), linear(kValue)}, projected.data(), joined, false);
        for (int64_t row = 0; row < rows; ++row) {
            TORCH_CHECK(at[row] >= 0 && at[row] < capacity, "position ", at[row], " of a cache of ", capacity, " slots");
            float* query = projected.data() + row * joined;
            float* key = query + queries;
            if (layer->norms[kQueryNorm]) norm(query, layer->norms[kQueryNorm], layer->eps, query, layer->heads, head_dim);
            if (layer->norms[kKeyNorm]) norm(key, layer->norms[kKeyNorm], layer->eps, key, layer->key_heads, head_dim);
            const int64_t slot = (row * capacity + at[row]) * shared, half = head_dim / 2;
            elementwise().rotate(
                query, cosines + row * half, sines + row * half, rotated.data() + row * queries, 1, layer->heads, head_dim);
            elementwise().rotate(key, cosines + row * half, sines + row * half, keys + slot, 1, layer->key_heads, head_dim);
            std::copy_n(key + shared, shared, values + slot);
        }
        const int64_t group = layer->heads / layer->key_heads;
        const int64_t most_keys = *std::max_element(at, at + rows) + 1;
        const int64_t together = pieces_together(2 * most_keys * group * head_dim);
        in_parallel(rows * layer->key_heads, together, [&](int64_t begin, int64_t end) {
            std::vector<float> scores(capacity);
            for (int64_t one = begin; one < end; ++one) {
                const int64_t row = one / layer->key_heads, head = one % layer->key_heads;
                const int64_t first = layer->window > 0 ? std::max<int64_t>(0, at[row] + 1 - layer->window) : 0;
                const int64_t slot = (row * capacity + first) * shared + head * head_dim;
                const int64_t own = row * queries + head * group * head_dim;
                decoding().attend({rotated.data() + own, keys + slot, values + slot, group, head_dim, shared,
                                   at[row] + 1 - first, attended.data() + own, scores.data()});
            }
        });
        multiply_all(attended.data(), rows, {linear(kOutput)}, stream, width, true);

        std::vector<float> both(rows * 2 * inner), gated(rows * inner);
        norm(stream, layer->norms[kFeedForwardNorm], layer->eps, normed.data(), rows, width);
        multiply_all(normed.data(), rows, {linear(kGate), linear(kUp)}, both.data(), 2 * inner, false);
        for (int64_t row = 0; row < rows; ++row) {
            const float* gate = both.data() + row * 2 * inner;
            elementwise().gated(gate, gate + inner, gated.data() + row * inner, inner);
        }
        multiply_all(gated.data(), rows, {linear(kDown)}, stream, width, true);
    });
}

// output (rows, out) = input (rows, in) times a weight, both float32; scales as above, or null.
char* sapo_few_rows_linear(
    const at::Tensor* input, const at::Tensor* weight, const at::Tensor* scales, const at::Tensor* output) {
    return guarded([&] {
        const int64_t rows = input->size(0), width = input->size(1);
        const Linear layer{weight, scales, nullptr};
        layer.check(width, output->size(1));
        TORCH_CHECK(output->size(0) == rows, "expected as many rows in the output");
        floats(output, rows * layer.outputs());
        multiply_all(floats(input, rows * width), rows, {layer}, data<float>(*output), layer.outputs(), false);
    });
}

// Fills quantized (out, in), 8 bits, and scales (out,), float32, from a contiguous weight (out, in) in float32 or bfloat16.
char* sapo_quantize_rows(const at::Tensor* weight, const at::Tensor* quantized, const at::Tensor* scales) {
    return guarded([&] {
        const int64_t rows = weight->size(0), width = weight->size(1);
        TORCH_CHECK(
            weight->is_contiguous() && quantized->is_contiguous() && scales->is_contiguous() &&
                quantized->sizes() == weight->sizes() && scales->numel() == rows &&
                quantized->scalar_type() == at::kChar && scales->scalar_type() == at::kFloat,
            "expected 8 bits for each weight and a float32 scale for each row");
        in_parallel(rows, rows_in_piece(width), [&](int64_t begin, int64_t end) {
            auto* output = data<int8_t>(*quantized) + begin * width;
            auto* scale = data<float>(*scales) + begin;
            if (weight->scalar_type() == at::kBFloat16) {
                decoding().quantize_bfloat16(data<Bf16>(*weight) + begin * width, output, scale, end - begin, width);
            } else {
                TORCH_CHECK(weight->scalar_type() == at::kFloat, "expected a weight in float32 or bfloat16");
                decoding().quantize_float32(data<float>(*weight) + begin * width, output, scale, end - begin, width);
            }
        });
    });
}
}
