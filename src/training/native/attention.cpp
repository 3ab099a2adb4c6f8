// Attention of many queries on a CPU: products of whole blocks of queries with all the keys that they may see, and single
// passes over the scores between. Keys are gathered once for each sequence, and shared by the heads of a group without being
// repeated. Nothing but the sums of exponentials is kept for the gradient, which computes the scores again (FlashAttention,
// arXiv 2205.14135).
//
// Tensors cross as in ops.cpp.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <cmath>
#include <cstring>
#include <vector>

#include "calls.h"
#include "guarded.h"
#include "numbers.h"
#include "products.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Queries that meet their keys at a time.
constexpr int64_t kBlock = 128;
// Sizes of products are multiples of these, since each size is a new one for oneDNN, which generates code for it.
constexpr int64_t kRows = 32, kColumns = 64;

int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// A sequence whose first `shared` tokens stand elsewhere, and are no queries.
struct Sequence {
    int64_t shared_at, shared, own_at, own;

    int64_t keys() const { return shared + own; }
    // Where its key number `index` stands.
    int64_t at(int64_t index) const { return index < shared ? shared_at + index : own_at + index - shared; }
};

// Pairs (pairs, 3) of tokens: shared, of the first sequence, and of the second without the shared ones.
std::vector<Sequence> sequences(const at::Tensor& pairs, int64_t tokens) {
    TORCH_CHECK(pairs.dim() == 2 && pairs.size(1) == 3 && pairs.is_contiguous(), "attend: expected pairs (pairs, 3)");
    std::vector<Sequence> found;
    int64_t at = 0;
    const auto* numbers = static_cast<const int64_t*>(pairs.data_ptr());
    for (int64_t pair = 0; pair < pairs.size(0); ++pair, numbers += 3) {
        const int64_t shared = numbers[0], first = numbers[1], second = numbers[2];
        TORCH_CHECK(0 <= shared && shared <= first && second >= 0, "attend: no pair has such parts");
        found.push_back({at, 0, at, first});
        if (second > 0) found.push_back({at, shared, at + first, second});
        at += first + second;
    }
    TORCH_CHECK(at == tokens, "attend: pairs of ", at, " tokens for ", tokens);
    return found;
}

// Some of a sequence's queries, and the keys that any of them sees.
struct Block {
    const Sequence& sequence;
    int64_t begin, count;  // own tokens
    int64_t first_key, keys;
    int64_t window;  // 0: none

    Block(const Sequence& sequence, int64_t begin, int64_t window) : sequence(sequence), begin(begin), window(window) {
        count = std::min(kBlock, sequence.own - begin);
        const int64_t at = sequence.shared + begin;
        first_key = window > 0 ? std::max<int64_t>(0, at + 1 - window) / kColumns * kColumns : 0;
        keys = rounded_up(at + count, kColumns) - first_key;
    }
    int64_t rows() const { return rounded_up(count, kRows); }
    // Place of a query, and of the last key that it sees among the block's.
    int64_t at(int64_t row) const { return sequence.own_at + begin + row; }
    int64_t last_key(int64_t row) const { return sequence.shared + begin + row - first_key; }
    at::Tensor columns(const at::Tensor& of_all) const { return of_all.narrow(1, first_key, keys); }
};

// All queries, keys and values: (tokens, heads, width) or (tokens, key heads, width), float32.
struct Inputs {
    at::Tensor query, key, value;
    int64_t tokens, heads, key_heads, width;

    Inputs(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_)
        : query(query_.contiguous()), key(key_.contiguous()), value(value_.contiguous()), heads(query.size(-2)),
          key_heads(key.size(-2)), width(query.size(-1)) {
        tokens = query.numel() / std::max<int64_t>(1, heads * width);
        TORCH_CHECK(
            key_heads > 0 && heads % key_heads == 0 && key.sizes() == value.sizes() &&
                key.numel() == tokens * key_heads * width,
            "attend: queries, keys and values do not fit each other");
        for (const auto& tensor : {query, key, value})
            TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == at::kFloat, "attend: expected float32 on the CPU");
    }

    float scale() const { return 1.0f / std::sqrt(static_cast<float>(width)); }

    // A sequence's keys or values, (key heads, keys, width), and zeros up to a whole number of columns.
    at::Tensor gathered(const at::Tensor& from, const Sequence& sequence) const {
        const int64_t count = rounded_up(sequence.keys(), kColumns);
        auto into = at::empty({key_heads, count, width}, from.options());
        in_parallel(key_heads * count, kRows, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const int64_t head = row / count, index = row % count;
                float* to = data<float>(into) + row * width;
                if (index < sequence.keys())
                    std::memcpy(to, data<float>(from) + (sequence.at(index) * key_heads + head) * width, width * sizeof(float));
                else
                    std::memset(to, 0, width * sizeof(float));
            }
        });
        return into;
    }

    // A block's rows of `from` (tokens, heads, width) times `scale`, (key heads, heads of a group * rows, width), and zeros.
    template <typename T>
    at::Tensor gathered(const at::Tensor& from, const Block& block, float scale) const {
        const int64_t rows = block.rows();
        auto into = at::empty({key_heads, heads / key_heads * rows, width}, key.options());
        in_parallel(heads * rows, kRows, [&](int64_t begin, int64_t end) {
            for (int64_t line = begin; line < end; ++line) {
                const int64_t head = line / rows, row = line % rows;
                float* to = data<float>(into) + line * width;
                if (row >= block.count) {
                    std::memset(to, 0, width * sizeof(float));
                    continue;
                }
                const T* of = data<T>(from) + (block.at(row) * heads + head) * width;
                for (int64_t i = 0; i < width; ++i) to[i] = read(of[i]) * scale;
            }
        });
        return into;
    }

    // The way back: a block's rows, times `scale`, to their places in `into` (tokens, heads, width).
    template <typename T>
    void scatter(const at::Tensor& from, const at::Tensor& into, const Block& block, float scale) const {
        const int64_t rows = block.rows();
        in_parallel(heads * rows, kRows, [&](int64_t begin, int64_t end) {
            for (int64_t line = begin; line < end; ++line) {
                const int64_t head = line / rows, row = line % rows;
                if (row >= block.count) continue;
                const float* of = data<float>(from) + line * width;
                T* to = data<T>(into) + (block.at(row) * heads + head) * width;
                for (int64_t i = 0; i < width; ++i) write(to + i, of[i] * scale);
            }
        });
    }

    // Adds what was gathered of a sequence's keys to `into` (tokens, key heads, width).
    void add_back(const at::Tensor& from, const at::Tensor& into, const Sequence& sequence) const {
        const int64_t count = from.size(1);
        in_parallel(sequence.keys(), kRows, [&](int64_t begin, int64_t end) {
            for (int64_t index = begin; index < end; ++index)
                for (int64_t head = 0; head < key_heads; ++head) {
                    const float* of = data<float>(from) + (head * count + index) * width;
                    float* to = data<float>(into) + (sequence.at(index) * key_heads + head) * width;
                    for (int64_t i = 0; i < width; ++i) to[i] += of[i];
                }
        });
    }

    // Calls `work(scores' row, place of the normaliser, the row's last key)` for a block's lines; zeros for those that only
    // fill up.
    template <typename F>
    void for_lines(const Block& block, F work) const {
        const int64_t rows = block.rows();
        in_parallel(heads * rows, kRows, [&](int64_t begin, int64_t end) {
            for (int64_t line = begin; line < end; ++line) {
                const int64_t head = line / rows, row = line % rows;
                const bool fills = row >= block.count;
                work(line, fills ? -1 : block.at(row) * heads + head, fills ? -1 : block.last_key(row));
            }
        });
    }
};

struct Attend : torch::autograd::Function<Attend> {
    static at::Tensor forward(
        AutogradContext* context, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
        const at::Tensor& pairs, int64_t window, bool in_bfloat16) {
        const Inputs inputs(query, key, value);
        auto output = at::empty(
            {inputs.tokens, inputs.heads, inputs.width},
            inputs.query.options().dtype(in_bfloat16 ? at::kBFloat16 : at::kFloat));
        auto log_sums = at::empty({inputs.tokens, inputs.heads}, inputs.query.options());
        for (const auto& sequence : sequences(pairs, inputs.tokens)) {
            const auto keys = inputs.gathered(inputs.key, sequence), values = inputs.gathered(inputs.value, sequence);
            for (int64_t begin = 0; begin < sequence.own; begin += kBlock) {
                const Block block(sequence, begin, window);
                const auto queries = inputs.gathered<float>(inputs.query, block, inputs.scale());
                const auto scores = product(queries, block.columns(keys).transpose(1, 2));
                inputs.for_lines(block, [&](int64_t line, int64_t place, int64_t last) {
                    const float sum =
                        kernels().softmax(data<float>(scores) + line * block.keys, block.keys, last, block.window);
                    if (place >= 0) data<float>(log_sums)[place] = sum;
                });
                const auto attended = product(scores, block.columns(values));
                by_kind(output, [&](auto kind) { inputs.scatter<decltype(kind)>(attended, output, block, 1.0f); });
            }
        }
        context->save_for_backward({inputs.query, inputs.key, inputs.value, log_sums, pairs});
        context->saved_data["window"] = window;
        return output;
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        const auto saved = context->get_saved_variables();
        const Inputs inputs(saved[0], saved[1], saved[2]);
        const auto gradient = gradients[0].contiguous();
        const auto window = context->saved_data["window"].toInt();
        auto of_query = at::empty_like(inputs.query);
        auto of_key = at::zeros_like(inputs.key), of_value = at::zeros_like(inputs.value);
        for (const auto& sequence : sequences(saved[4], inputs.tokens)) {
            const auto keys = inputs.gathered(inputs.key, sequence), values = inputs.gathered(inputs.value, sequence);
            const auto of_keys = at::zeros_like(keys), of_values = at::zeros_like(values);
            for (int64_t begin = 0; begin < sequence.own; begin += kBlock) {
                const Block block(sequence, begin, window);
                const auto queries = inputs.gathered<float>(inputs.query, block, inputs.scale());
                at::Tensor upstream;
                by_kind(gradient, [&](auto kind) { upstream = inputs.gathered<decltype(kind)>(gradient, block, 1.0f); });
                const auto shares = product(queries, block.columns(keys).transpose(1, 2));
                const auto of_scores = product(upstream, block.columns(values).transpose(1, 2));
                inputs.for_lines(block, [&](int64_t line, int64_t place, int64_t last) {
                    kernels().softmax_backward(
                        data<float>(shares) + line * block.keys, data<float>(of_scores) + line * block.keys,
                        place < 0 ? 0.0f : data<float>(saved[3])[place], block.keys, last, block.window);
                });
                block.columns(of_values).add_(product(shares.transpose(1, 2), upstream));
                block.columns(of_keys).add_(product(of_scores.transpose(1, 2), queries));
                inputs.scatter<float>(product(of_scores, block.columns(keys)), of_query, block, inputs.scale());
            }
            inputs.add_back(of_keys, of_key, sequence);
            inputs.add_back(of_values, of_value, sequence);
        }
        return {of_query, of_key, of_value, at::Tensor(), at::Tensor(), at::Tensor()};
    }
};

}  // namespace

extern "C" {

// Causal attention within sequences. query (..., heads, width) and key and value (..., key heads, width) are float32, of as
// many tokens, `pairs` of which (pairs, 3), i64, stand one after the other; with a window above 0 a query sees so many keys,
// its own included. The output is (tokens, heads, width), float32 or bfloat16.
char* sapo_attend(
    const at::Tensor* query, const at::Tensor* key, const at::Tensor* value, const at::Tensor* pairs, int64_t window,
    bool in_bfloat16, at::Tensor** output) {
    return guarded([&] { *output = new at::Tensor(Attend::apply(*query, *key, *value, *pairs, window, in_bfloat16)); });
}
}
