// ATen operators that tch does not bind. Tensors cross as pointers to at::Tensor, which is what tch's own handles are.
// Every function returns null, or the message of what was thrown, for the caller to free.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/_foreach_lerp.h>
#include <ATen/ops/_fused_adamw.h>
#include <optional>
#include <vector>

#include "guarded.h"

namespace {

at::Tensor call(const char* name, torch::jit::Stack stack) {
    c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
    return torch::jit::pop(stack).toTensor();
}

std::vector<at::Tensor> list(at::Tensor** tensors, size_t count) {
    std::vector<at::Tensor> list;
    list.reserve(count);
    for (size_t index = 0; index < count; ++index) list.push_back(*tensors[index]);
    return list;
}

}  // namespace

extern "C" {

// oneDNN's own layout of a weight (out, in) for products with `rows` rows.
char* sapo_pack_linear(const at::Tensor* weight, int64_t rows, at::Tensor** packed) {
    return guarded([&] {
        *packed = new at::Tensor(call("mkldnn::_reorder_linear_weight", {*weight, rows}));
    });
}

// input (..., in) times a packed weight, plus bias (out,) where it is not null.
char* sapo_packed_linear(const at::Tensor* input, const at::Tensor* packed, const at::Tensor* bias, at::Tensor** output) {
    return guarded([&] {
        const auto added = bias ? std::optional<at::Tensor>(*bias) : std::nullopt;
        const c10::List<std::optional<at::Scalar>> scalars;
        *output = new at::Tensor(call("mkldnn::_linear_pointwise", {*input, *packed, added, "none", scalars, ""}));
    });
}

// One AdamW update of all parameters in one pass, in place. Gradients are divided by `gradient_divisor`, a scalar
// tensor, where it is not null. `steps` are scalar f32 tensors that count updates, this one included.
char* sapo_fused_adamw(
    at::Tensor** parameters, at::Tensor** gradients, at::Tensor** means, at::Tensor** mean_squares, at::Tensor** steps,
    size_t count, double learning_rate, double beta1, double beta2, double weight_decay, double eps,
    const at::Tensor* gradient_divisor) {
    return guarded([&] {
        const auto divisor = gradient_divisor ? std::optional<at::Tensor>(*gradient_divisor) : std::nullopt;
        at::_fused_adamw_(
            list(parameters, count), list(gradients, count), list(means, count), list(mean_squares, count),
            {}, list(steps, count), learning_rate, beta1, beta2, weight_decay, eps,
            /*amsgrad=*/false, /*maximize=*/false, divisor, /*found_inf=*/std::nullopt);
    });
}

// start += weight * (end - start) for all tensors, in place.
char* sapo_foreach_lerp(at::Tensor** starts, at::Tensor** ends, size_t count, double weight) {
    return guarded([&] { at::_foreach_lerp_(list(starts, count), list(ends, count), weight); });
}

// From now on attention is not computed by cuDNN, in the whole process.
char* sapo_disable_cudnn_attention() {
    return guarded([] { at::globalContext().setSDPUseCuDNN(false); });
}
}
