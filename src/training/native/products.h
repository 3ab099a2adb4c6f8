// Matrix products in float32 on a CPU, by the library that is fastest there.
#pragma once

#include <ATen/core/Tensor.h>

// a (m, k) times b (k, n), or batches of them, (batch, m, k) and (batch, k, n). No gradient flows.
at::Tensor product(const at::Tensor& a, const at::Tensor& b);

// The same added to `sum`, (m, n).
void add_product(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);
