// The elementwise parts of a decoder layer and of its loss on a CPU, each as a single pass over memory with a gradient of its
// own: libtorch composes them of many passes there, forward and backward, and keeps what lies between.
//
// Tensors cross as in ops.cpp. Gradients do not depend on the number of threads: rows are divided in pieces of fixed size.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include "calls.h"
#include "guarded.h"

thread_local int instructions_limit = kAvx512;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The kernels for a kind of number.
template <typename T>
const Elementwise<T>& of_kind();
template <>
const Elementwise<float>& of_kind() { return kernels().float32; }
template <>
const Elementwise<Bf16>& of_kind() { return kernels().bfloat16; }

struct Norm : torch::autograd::Function<Norm> {
    static at::Tensor forward(AutogradContext* context, const at::Tensor& any_input, const at::Tensor& weight, double eps) {
        const auto input = any_input.contiguous();
        const auto wide = weight.to(at::kFloat).contiguous();
        const int64_t width = input.size(-1), rows = input.numel() / width;
        TORCH_CHECK(wide.dim() == 1 && wide.size(0) == width, "norm: expected a weight of ", width, " numbers");
        auto output = at::empty_like(input);
        auto inverse = at::empty({rows}, wide.options());
        by_kind(input, [&](auto kind) {
            using T = decltype(kind);
            in_parallel(rows, rows_in_piece(width), [&](int64_t begin, int64_t end) {
                of_kind<T>().norm(
                    data<T>(input) + begin * width, data<float>(wide), static_cast<float>(eps),
                    data<T>(output) + begin * width, data<float>(inverse) + begin, end - begin, width);
            });
        });
        context->save_for_backward({input, weight, inverse});
        return output;
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        const auto saved = context->get_saved_variables();
        const auto& input = saved[0];
        const auto gradient = gradients[0].contiguous();
        const auto wide = saved[1].to(at::kFloat).contiguous();
        const int64_t width = input.size(-1), rows = input.numel() / width, piece = rows_in_piece(width);
        auto of_input = at::empty_like(input);
        auto of_weight = at::zeros({(rows + piece - 1) / piece, width}, wide.options());
        by_kind(input, [&](auto kind) {
            using T = decltype(kind);
            in_parallel(rows, piece, [&](int64_t begin, int64_t end) {
                of_kind<T>().norm_backward(
                    data<T>(input) + begin * width, data<float>(wide), data<float>(saved[2]) + begin,
                    data<T>(gradient) + begin * width, data<T>(of_input) + begin * width,
                    data<float>(of_weight) + begin / piece * width, end - begin, width);
            });
        });
        return {of_input, of_weight.sum(0).to(saved[1].scalar_type()), at::Tensor()};
    }
};

struct Gated : torch::autograd::Function<Gated> {
    static at::Tensor forward(AutogradContext* context, const at::Tensor& any_gate, const at::Tensor& any_up) {
        const auto gate = any_gate.contiguous(), up = any_up.contiguous();
        TORCH_CHECK(gate.sizes() == up.sizes() && gate.scalar_type() == up.scalar_type(), "gated: gate and up differ");
        auto output = at::empty_like(gate);
        by_kind(gate, [&](auto kind) {
            using T = decltype(kind);
            in_parallel(gate.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
                of_kind<T>().gated(
                    data<T>(gate) + begin, data<T>(up) + begin, data<T>(output) + begin, end - begin);
            });
        });
        context->save_for_backward({gate, up});
        return output;
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        const auto saved = context->get_saved_variables();
        const auto gradient = gradients[0].contiguous();
        auto of_gate = at::empty_like(saved[0]), of_up = at::empty_like(saved[1]);
        by_kind(of_gate, [&](auto kind) {
            using T = decltype(kind);
            in_parallel(gradient.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
                of_kind<T>().gated_backward(
                    data<T>(saved[0]) + begin, data<T>(saved[1]) + begin, data<T>(gradient) + begin,
                    data<T>(of_gate) + begin, data<T>(of_up) + begin, end - begin);
            });
        });
        return {of_gate, of_up};
    }
};

struct Rotate : torch::autograd::Function<Rotate> {
    static at::Tensor forward(
        AutogradContext* context, const at::Tensor& any_input, const at::Tensor& cosine, const at::Tensor& sine) {
        const auto input = any_input.contiguous();
        const int64_t width = input.size(-1), heads = input.size(-2), tokens = input.numel() / (heads * width);
        TORCH_CHECK(
            cosine.is_contiguous() && sine.is_contiguous() && cosine.numel() * 2 == tokens * width &&
                sine.numel() == cosine.numel() && cosine.scalar_type() == at::kFloat && sine.scalar_type() == at::kFloat,
            "rotate: expected a float32 cosine and sine for each of ", tokens, " tokens and ", width / 2, " dimensions");
        auto output = at::empty(input.sizes(), cosine.options());
        by_kind(input, [&](auto kind) {
            using T = decltype(kind);
            in_parallel(tokens, rows_in_piece(heads * width), [&](int64_t begin, int64_t end) {
                of_kind<T>().rotate(
                    data<T>(input) + begin * heads * width, data<float>(cosine) + begin * width / 2,
                    data<float>(sine) + begin * width / 2, data<float>(output) + begin * heads * width, end - begin, heads,
                    width);
            });
        });
        context->save_for_backward({cosine, sine});
        context->saved_data["kind"] = static_cast<int64_t>(input.scalar_type());
        return output;
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        const auto saved = context->get_saved_variables();
        const auto gradient = gradients[0].contiguous();
        const int64_t width = gradient.size(-1), heads = gradient.size(-2), tokens = gradient.numel() / (heads * width);
        const auto kind = static_cast<at::ScalarType>(context->saved_data["kind"].toInt());
        auto of_input = at::empty(gradient.sizes(), gradient.options().dtype(kind));
        by_kind(of_input, [&](auto kind) {
            using T = decltype(kind);
            in_parallel(tokens, rows_in_piece(heads * width), [&](int64_t begin, int64_t end) {
                of_kind<T>().rotate_back(
                    data<float>(gradient) + begin * heads * width, data<float>(saved[0]) + begin * width / 2,
                    data<float>(saved[1]) + begin * width / 2, data<T>(of_input) + begin * heads * width, end - begin,
                    heads, width);
            });
        });
        return {of_input, at::Tensor(), at::Tensor()};
    }
};

// Logits (rows, vocabulary) in one piece of memory, and for each row a target that is in the vocabulary.
void check_scored(const at::Tensor& logits, const at::Tensor& targets) {
    TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) > 0, "expected contiguous logits (rows, vocabulary)");
    TORCH_CHECK(
        targets.is_contiguous() && targets.numel() == logits.size(0) && targets.scalar_type() == at::kLong,
        "expected a target for each of ", logits.size(0), " rows of logits");
    const auto* target = data<int64_t>(targets);
    for (int64_t row = 0; row < targets.numel(); ++row)
        TORCH_CHECK(target[row] >= 0 && target[row] < logits.size(1), "target ", target[row], " is not in the vocabulary");
}

}  // namespace

extern "C" {

// RMSNorm of input (..., width) with weight (width,), in the input's kind.
char* sapo_norm(const at::Tensor* input, const at::Tensor* weight, double eps, at::Tensor** output) {
    return guarded([&] { *output = new at::Tensor(Norm::apply(*input, *weight, eps)); });
}

// silu(gate) * up.
char* sapo_gated(const at::Tensor* gate, const at::Tensor* up, at::Tensor** output) {
    return guarded([&] { *output = new at::Tensor(Gated::apply(*gate, *up)); });
}

// Rotary embedding of input (batch, tokens, heads, width), as float32; cosine and sine are (batch, tokens, 1, width / 2).
char* sapo_rotate(const at::Tensor* input, const at::Tensor* cosine, const at::Tensor* sine, at::Tensor** output) {
    return guarded([&] { *output = new at::Tensor(Rotate::apply(*input, *cosine, *sine)); });
}

// Of logits (rows, vocabulary) and targets (rows,): fills logps, log_sums and correct, contiguous f32 (rows,).
char* sapo_score(
    const at::Tensor* logits, const at::Tensor* targets, const at::Tensor* logps, const at::Tensor* log_sums,
    const at::Tensor* correct) {
    return guarded([&] {
        check_scored(*logits, *targets);
        const int64_t rows = logits->size(0), width = logits->size(1);
        by_kind(*logits, [&](auto kind) {
            using T = decltype(kind);
            in_parallel(rows, 1, [&](int64_t begin, int64_t end) {
                of_kind<T>().score(
                    data<T>(*logits) + begin * width, data<int64_t>(*targets) + begin, data<float>(*logps) + begin,
                    data<float>(*log_sums) + begin, data<float>(*correct) + begin, end - begin, width);
            });
        });
    });
}

// Puts gradient (rows,) times the derivative of each row's log-probability with respect to its logits in their place.
char* sapo_score_backward(
    const at::Tensor* logits, const at::Tensor* targets, const at::Tensor* log_sums, const at::Tensor* gradient) {
    return guarded([&] {
        check_scored(*logits, *targets);
        const int64_t rows = logits->size(0), width = logits->size(1);
        by_kind(*logits, [&](auto kind) {
            using T = decltype(kind);
            in_parallel(rows, 1, [&](int64_t begin, int64_t end) {
                of_kind<T>().score_backward(
                    data<T>(*logits) + begin * width, data<int64_t>(*targets) + begin, data<float>(*log_sums) + begin,
                    data<float>(*gradient) + begin, end - begin, width);
            });
        });
    });
}

// From now on the calls of this thread use no instructions beyond that set, numbered as in calls.h, for tests; returns the last
// set that they do use.
int sapo_limit_instructions(int limit) {
    instructions_limit = limit;
    return std::min(processor_instructions(), limit);
}
}
