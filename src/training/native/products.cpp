// Linear layers in float32 on a CPU. libtorch has MKL for these products, whose float32 kernels reach half the speed of
// oneDNN's on processors that are not Intel's; for bfloat16 it goes to oneDNN itself.
//
// Tensors cross as in ops.cpp.

#include "products.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <optional>
#include <vector>

#include "guarded.h"

namespace at::native {
// result = alpha mat1 mat2 + beta result. libtorch exports it, and declares it in a header that it does not install; weak,
// so that a libtorch without it will do, too.
__attribute__((weak)) void mkldnn_matmul(const Tensor& mat1, const Tensor& mat2, const Tensor& result, float beta, float alpha);
}  // namespace at::native

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool faster_by_onednn() {
#if defined(SAPO_X86_64)
    static const bool faster = at::native::mkldnn_matmul != nullptr && !__builtin_cpu_is("intel");
    return faster;
#else
    return false;
#endif
}

bool by_onednn(const at::Tensor& a, const at::Tensor& b) {
    return faster_by_onednn() && a.is_cpu() && a.scalar_type() == at::kFloat && a.numel() > 0 && b.numel() > 0;
}

// input (..., in) and weight (out, in).
struct Linear : torch::autograd::Function<Linear> {
    static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight) {
        TORCH_CHECK(
            weight.dim() == 2 && input.size(-1) == weight.size(1), "linear: expected inputs of ", weight.size(-1),
            " numbers, found ", input.size(-1));
        auto sizes = input.sizes().vec();
        sizes.back() = weight.size(0);
        context->save_for_backward({input, weight});
        return product(input.reshape({-1, weight.size(1)}), weight.t()).view(sizes);
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        const auto saved = context->get_saved_variables();
        const auto &input = saved[0], &weight = saved[1];
        const auto gradient = gradients[0].reshape({-1, weight.size(0)});
        at::Tensor of_input, of_weight;
        if (context->needs_input_grad(0)) of_input = product(gradient, weight).view(input.sizes());
        if (context->needs_input_grad(1)) of_weight = product(gradient.t(), input.reshape({-1, weight.size(1)}));
        return {of_input, of_weight};
    }
};

}  // namespace

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
    if (!by_onednn(a, b)) return at::matmul(a, b);
    auto sizes = a.sizes().vec();
    sizes.back() = b.size(-1);
    auto result = at::empty(sizes, a.options());
    at::native::mkldnn_matmul(a, b, result, /*beta=*/0.0f, /*alpha=*/1.0f);
    return result;
}

void add_product(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
    if (!by_onednn(a, b)) {
        sum.addmm_(a, b);
        return;
    }
    at::native::mkldnn_matmul(a, b, sum, /*beta=*/1.0f, /*alpha=*/1.0f);
}

extern "C" {

// Whether products in float32 on this machine's CPU go to oneDNN.
bool sapo_faster_by_onednn() { return faster_by_onednn(); }

// input (..., in) times weight (out, in), plus bias (out,) where it is not null: (..., out), with its gradient.
char* sapo_linear(const at::Tensor* input, const at::Tensor* weight, const at::Tensor* bias, at::Tensor** output) {
    return guarded([&] {
        if (by_onednn(*input, *weight)) {
            const auto product = Linear::apply(*input, *weight);
            *output = new at::Tensor(bias ? product.add(*bias) : product);
        } else {
            *output = new at::Tensor(at::linear(*input, *weight, bias ? std::optional<at::Tensor>(*bias) : std::nullopt));
        }
    });
}

// a (m, k) times b (k, n).
char* sapo_product(const at::Tensor* a, const at::Tensor* b, at::Tensor** output) {
    return guarded([&] { *output = new at::Tensor(product(*a, *b)); });
}

// sum (m, n) += a (m, k) times b (k, n).
char* sapo_add_product(const at::Tensor* sum, const at::Tensor* a, const at::Tensor* b) {
    return guarded([&] { add_product(*sum, *a, *b); });
}
}
