//! Operators of libtorch that tch does not bind, by way of `native/ops.cpp`; single passes over memory for what it does in
//! many on a CPU, by way of `native/fused.cpp`; float32 products and attention there, by way of `native/products.cpp` and
//! `native/attention.cpp`; decoding there, by way of `native/decode.cpp`; and CUDA graphs and streams, by way of
//! `native/graph.cpp` and `native/stream.cpp`.

pub mod decode;
pub mod fused;
pub mod graph;
pub mod products;
pub mod stream;
#[cfg(test)]
pub mod testing;

use std::ffi::{CStr, c_char};
use std::ptr;

use tch::Tensor;
use torch_sys::C_tensor;

use crate::{Error, Result};

// Shared ownership of the tensors' contents stays with libtorch: only handles are passed.
unsafe extern "C" {
    fn sapo_pack_linear(weight: *const C_tensor, rows: i64, packed: *mut *mut C_tensor) -> *mut c_char;
    fn sapo_packed_linear(
        input: *const C_tensor,
        packed: *const C_tensor,
        bias: *const C_tensor,
        output: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn sapo_fused_adamw(
        parameters: *const *const C_tensor,
        gradients: *const *const C_tensor,
        means: *const *const C_tensor,
        mean_squares: *const *const C_tensor,
        steps: *const *const C_tensor,
        count: usize,
        learning_rate: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        gradient_divisor: *const C_tensor,
    ) -> *mut c_char;
    fn sapo_foreach_lerp(
        starts: *const *const C_tensor,
        ends: *const *const C_tensor,
        count: usize,
        weight: f64,
    ) -> *mut c_char;
    fn sapo_disable_cudnn_attention() -> *mut c_char;
}

/// The weight (out, in) of a linear layer on a CPU in oneDNN's own layout, chosen for inputs of `rows` rows.
///
/// Products with few rows read every weight once and compute little: libtorch's plain way reads it at half the speed or
/// less, since it lays the weight out anew each time.
#[derive(Debug)]
pub struct PackedLinear(Tensor);

// Safety: as for any tensor that nobody writes to.
unsafe impl Sync for PackedLinear {}

impl PackedLinear {
    /// Lays `weight` out.
    ///
    /// # Errors
    /// When this libtorch was built without oneDNN.
    pub fn new(weight: &Tensor, rows: i64) -> Result<Self> {
        // Safety: the handle is valid for the call.
        made(|packed| unsafe { sapo_pack_linear(weight.as_ptr(), rows, packed) }).map(PackedLinear)
    }

    /// `input` (..., in) times the weight, plus `bias` (out,): (..., out). No gradient flows.
    pub fn apply(&self, input: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let bias = bias.map_or(ptr::null(), Tensor::as_ptr);
        // Safety: as above; a null bias is allowed.
        made(|output| unsafe { sapo_packed_linear(input.as_ptr(), self.0.as_ptr(), bias, output) })
    }
}

/// Settings of [`fused_adamw`].
#[derive(Clone, Copy, Debug)]
pub struct FusedAdamw {
    /// Step length.
    pub learning_rate: f64,
    /// Decay of the running mean of gradients.
    pub beta1: f64,
    /// Decay of the running mean of squared gradients.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the denominator.
    pub eps: f64,
}

/// What [`fused_adamw`] updates: as many tensors in each list, those of one index alike in shape, kind and device.
#[derive(Debug, Default)]
pub struct FusedTensors {
    /// Updated in place.
    pub parameters: Vec<Tensor>,
    /// Their gradients.
    pub gradients: Vec<Tensor>,
    /// Running means of gradients, updated in place.
    pub means: Vec<Tensor>,
    /// Running means of squared gradients, updated in place.
    pub mean_squares: Vec<Tensor>,
    /// Updates done, this one included; scalars, f32.
    pub steps: Vec<Tensor>,
}

/// One AdamW update of all tensors in one pass over memory (ATen's `_fused_adamw_`), with gradients divided by
/// `gradient_divisor`, a scalar f32 tensor on their device, where there is one.
pub fn fused_adamw(tensors: &FusedTensors, settings: FusedAdamw, gradient_divisor: Option<&Tensor>) -> Result<()> {
    let count = tensors.parameters.len();
    let lists = [&tensors.parameters, &tensors.gradients, &tensors.means, &tensors.mean_squares, &tensors.steps];
    if lists.iter().any(|list| list.len() != count) {
        return Err(Error::Argument("fused AdamW: expected as many tensors in each list".into()));
    }
    let [parameters, gradients, means, mean_squares, steps] = lists.map(|list| handles(list));
    // Safety: `count` valid handles in each list, for the length of the call.
    unsafe {
        check(sapo_fused_adamw(
            parameters.as_ptr(),
            gradients.as_ptr(),
            means.as_ptr(),
            mean_squares.as_ptr(),
            steps.as_ptr(),
            count,
            settings.learning_rate,
            settings.beta1,
            settings.beta2,
            settings.weight_decay,
            settings.eps,
            gradient_divisor.map_or(ptr::null(), Tensor::as_ptr),
        ))
    }
}

/// The tensor that a call of the other side makes, ours to own.
fn made(call: impl FnOnce(*mut *mut C_tensor) -> *mut c_char) -> Result<Tensor> {
    let mut output = ptr::null_mut();
    check(call(&mut output))?;
    // Safety: without a message there is a new handle.
    Ok(unsafe { Tensor::from_ptr(output) })
}

/// start += weight (end - start) for all tensors of two lists, those of one index alike in shape, kind and device: in a few
/// kernels where ATen has such for the device.
pub fn foreach_lerp(starts: &[Tensor], ends: &[Tensor], weight: f64) -> Result<()> {
    if starts.len() != ends.len() {
        return Err(Error::Argument("lerp: expected as many tensors in each list".into()));
    }
    let (starts, ends) = (handles(starts), handles(ends));
    // Safety: as many valid handles in each list, for the length of the call.
    unsafe { check(sapo_foreach_lerp(starts.as_ptr(), ends.as_ptr(), starts.len(), weight)) }
}

/// Keeps cuDNN out of attention, in the whole process; on a CPU that changes nothing.
///
/// libtorch prefers it on GPUs of compute capability 9 and 10. But it makes a plan for each new shape, which takes tens of
/// milliseconds and is kept for good (pytorch/pytorch#155958), and here shapes change with every pair and every token. The
/// other kernels take any shape as it comes.
pub fn disable_cudnn_attention() -> Result<()> {
    // Safety: nothing is passed.
    check(unsafe { sapo_disable_cudnn_attention() })
}

fn handles(list: &[Tensor]) -> Vec<*const C_tensor> {
    list.iter().map(Tensor::as_ptr).collect()
}

/// Takes over a message from the other side; none means that all went well.
fn check(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // Safety: a C string from strdup, ours to free.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        libc::free(message.cast());
        text
    };
    Err(tch::TchError::Torch(text).into())
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use tch::{Device, Kind, Tensor};

    use super::*;

    fn numbers(rows: i64, columns: i64, step: f64) -> Tensor {
        (Tensor::arange(rows * columns, (Kind::Float, Device::Cpu)) * step).sin().view([rows, columns])
    }

    #[test]
    fn packed_products_are_the_plain_ones() {
        let (weight, bias) = (numbers(48, 32, 1.7), numbers(1, 48, 0.3).view(-1));
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 3e-2)] {
            let weight = weight.to_kind(kind);
            let packed = PackedLinear::new(&weight, 4).unwrap();
            // Also for other numbers of rows than it was laid out for.
            for rows in [1, 4, 9] {
                let input = numbers(rows, 32, 2.3).to_kind(kind);
                for bias in [None, Some(bias.to_kind(kind))] {
                    let expected = input.linear(&weight, bias.as_ref());
                    let found = packed.apply(&input.unsqueeze(0), bias.as_ref()).unwrap().squeeze_dim(0);
                    assert!(found.allclose(&expected, tolerance, tolerance, false), "{kind:?} {rows}");
                }
            }
        }
    }

    #[test]
    fn errors_of_libtorch_arrive() {
        let error = PackedLinear::new(&numbers(4, 4, 1.0), 1).unwrap().apply(&numbers(1, 3, 1.0), None).unwrap_err();
        assert!(!error.to_string().is_empty());
    }

    unsafe extern "C" {
        #[link_name = "_ZN2at13globalContextEv"]
        fn global_context() -> *const c_void;
        #[link_name = "_ZNK2at7Context19userEnabledCuDNNSDPEv"]
        fn cudnn_attention_is_enabled(context: *const c_void) -> bool;
    }

    #[test]
    fn cudnn_is_kept_out_of_attention() {
        disable_cudnn_attention().unwrap();
        // Safety: the context lives as long as the process.
        assert!(!unsafe { cudnn_attention_is_enabled(global_context()) });
    }

    /// By hand, first update from zero moments with beta1 = beta2 = 0: mean = gradient, mean square = gradient^2, both
    /// without correction, so p = p (1 - lr wd) - lr g / (|g| + eps).
    #[test]
    fn a_fused_update_by_hand() {
        let one = |value: f32| vec![Tensor::from_slice(&[value])];
        let tensors = FusedTensors {
            parameters: one(2.0),
            gradients: one(-12.0),
            means: one(0.0),
            mean_squares: one(0.0),
            steps: vec![Tensor::from(1.0f32)],
        };
        let settings = FusedAdamw { learning_rate: 0.5, beta1: 0.0, beta2: 0.0, weight_decay: 0.5, eps: 1.0 };
        fused_adamw(&tensors, settings, Some(&Tensor::from(4.0f32))).unwrap();
        // g = -12 / 4 = -3; 2 * 0.75 + 0.5 * 3 / (3 + 1) = 1.875
        assert_eq!(tensors.parameters[0].double_value(&[0]), 1.875);
        assert_eq!(tensors.means[0].double_value(&[0]), -3.0);
    }
}
