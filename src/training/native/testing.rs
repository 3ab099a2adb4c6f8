//! What the tests of native functions share.

use tch::{Device, Kind, Tensor};

unsafe extern "C" {
    fn sapo_limit_instructions(limit: i32) -> i32;
}

/// Runs a test with each set of instructions that kernels are compiled for and this processor has: x86-64's first, AVX2's,
/// AVX-512's.
pub fn with_all_instructions(mut test: impl FnMut()) {
    for limit in 0..=2 {
        // Safety: it sets a number of this thread's own.
        if unsafe { sapo_limit_instructions(limit) } == limit {
            println!("instructions of set {limit}");
            test();
        }
    }
}

/// Numbers without a pattern that matters, from -3 to 3.
pub fn numbers(size: &[i64], step: f64) -> Tensor {
    let count: i64 = size.iter().product();
    ((Tensor::arange(count, (Kind::Float, Device::Cpu)) * step).sin() * 3.0).view(size)
}

/// The outputs and all gradients of two functions of the same inputs differ by no more than that share of the largest
/// number, whatever set of instructions the first one goes by. The output's gradient is some other tensor.
pub fn assert_same(
    inputs: &[Tensor],
    tolerance: f64,
    ours: impl Fn(&[Tensor]) -> Tensor,
    theirs: impl Fn(&[Tensor]) -> Tensor,
) {
    let run = |function: &dyn Fn(&[Tensor]) -> Tensor| {
        let leaves: Vec<Tensor> = inputs.iter().map(|input| input.detach().set_requires_grad(true)).collect();
        let output = function(&leaves);
        let upstream = numbers(&output.size(), 0.77).to_kind(output.kind());
        let mut all = Tensor::run_backward(&[(&output * upstream).sum(Kind::Float)], &leaves, false, false);
        all.push(output.detach());
        all.into_iter().map(|tensor| tensor.to_kind(Kind::Float)).collect::<Vec<_>>()
    };
    let expected = run(&theirs);
    with_all_instructions(|| {
        for (place, (found, expected)) in run(&ours).iter().zip(&expected).enumerate() {
            let scale = expected.abs().max().double_value(&[]);
            let differs = (found - expected).abs().max().double_value(&[]);
            assert!(differs <= tolerance * scale, "{:?}, number {place}: {differs} of {scale}", inputs[0].kind());
        }
    });
}
