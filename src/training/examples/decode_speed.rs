//! How fast a model decodes on this machine, and what share that is of reading its weights once for each token:
//! `decode_speed MODEL [ROWS [THREADS [DEVICE [recorded]]]]`.
//!
//! On a GPU weights are in bfloat16, and of the layouts there is the plain one; `recorded` launches a token's work as a whole.

use std::path::Path;
use std::time::Instant;

use sapo_flow_training::device;
use sapo_flow_training::generate::{Choice, Decoding, Recording, Request, Sampling, Warpers, generate};
use sapo_flow_training::model::{Compute, Model};
use tch::{Device, Kind, Tensor};

/// Tokens of the two answers whose difference in time is that of decoding alone.
const FEW: usize = 16;
const MANY: usize = 80;
/// Tokens of the longest prompt on a CPU, where work is not recorded.
const LONGEST: u32 = 200;
/// Tokens of the longest prompt where work is recorded, and of what is compared with it. A recording serves up to 256 slots of
/// the cache (`KEYS` in generate/recorded.rs): with MANY tokens after a longer prompt there would be a second recording, with
/// FEW not, and the difference of the two would hold its time.
const LONGEST_RECORDED: u32 = 256 - MANY as u32;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    device::keep_memory();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let directory = arguments.first().ok_or("expected a model's directory")?;
    let rows: u32 = arguments.get(1).map_or(Ok(4), |rows| rows.parse())?;
    let threads: usize = arguments.get(2).map_or(Ok(2), |threads| threads.parse())?;
    let device = arguments.get(3).map_or(Ok(Device::Cpu), |name| device::parse(name))?;
    let is_recorded = match arguments.get(4).map(String::as_str) {
        None => false,
        Some("recorded") => true,
        Some(other) => return Err(format!("layout `{other}`: expected `recorded`, or none").into()),
    };
    device::set_threads(threads);

    // 512 MiB, or 4 GiB, far above any cache.
    let numbers = if device == Device::Cpu { 1 << 27 } else { 1 << 30 };
    let memory = Tensor::ones([numbers], (Kind::Float, device));
    let longest = if device == Device::Cpu && !is_recorded { LONGEST } else { LONGEST_RECORDED };
    for (stored, kind) in kinds(device) {
        let model = Model::load(Path::new(directory), device, stored)?;
        let linear = |name: &str| name.ends_with("proj.weight") || name == model.decoder.head_name();
        let weights: usize = model.parameters.iter().filter(|(name, _)| linear(name)).map(|(_, t)| t.numel()).sum();
        for (what, lengths) in [("equal", [longest; 4]), ("unequal", [longest, 150, longest - 10, 120])] {
            for (layout, decoding) in layouts(device, is_recorded) {
                let time = |new_tokens: usize| {
                    let requests: Vec<Request> = (0..rows)
                        .map(|row| Request {
                            prompt_ids: (0..lengths[row as usize % 4]).map(|id| 100 + 7 * id + row).collect(),
                            max_new_tokens: new_tokens,
                            seed: u64::from(row),
                        })
                        .collect();
                    let warpers = Warpers { temperature: 0.7, top_k: Some(50), top_p: Some(0.95) };
                    let choice = Choice::Sample(warpers);
                    let sampling = Sampling { choice, eos_ids: vec![], compute: Compute::new(kind), decoding };
                    fastest(3, || Ok(generate(&model.decoder, &model.parameters, &requests, &sampling)?.len()))
                };
                let bytes = if decoding.int8_weights { 1 } else { kind.elt_size_in_bytes() };
                // What can be read in a second changes from one second to the next where others use the memory too.
                let before = bytes_read(&memory)?;
                let (few, many) = (time(FEW)?, time(MANY)?);
                let bandwidth = before.max(bytes_read(&memory)?);
                let limit = (weights * bytes) as f64 / bandwidth;
                let step = (many - few) / (MANY - FEW) as f64;
                println!(
                    "{kind:?}, {what} prompts, {layout}: {MANY} tokens in {many:.3} s, {:.2} ms a step, \
                     {:.0} tokens/s, {:.0}% of the limit at {:.1} GB/s",
                    1e3 * step,
                    f64::from(rows) / step,
                    100.0 * limit / step,
                    bandwidth / 1e9,
                );
            }
        }
    }
    Ok(())
}

/// Types of the weights as they are kept, and of the computation: a learner's float32, or what a GPU has room for.
fn kinds(device: Device) -> Vec<(Kind, Kind)> {
    match device {
        Device::Cpu => vec![(Kind::Float, Kind::Float), (Kind::Float, Kind::BFloat16)],
        _ => vec![(Kind::BFloat16, Kind::BFloat16)],
    }
}

/// The ways of decoding that a device has, by name.
fn layouts(device: Device, is_recorded: bool) -> Vec<(&'static str, Decoding)> {
    let plain = Decoding { pack_weights: false, ..Decoding::default() };
    let int8 = Decoding { int8_weights: true, ..Decoding::default() };
    match (device, is_recorded) {
        (_, true) => vec![("recorded", Decoding { recording: Recording::CudaGraph, ..plain })],
        (Device::Cpu, false) => vec![("plain", plain), ("packed", Decoding::default()), ("int8", int8)],
        (_, false) => vec![("plain", plain)],
    }
}

/// Bytes a second that are read from memory, at best.
fn bytes_read(memory: &Tensor) -> Outcome<f64> {
    let bytes = (memory.numel() * 4) as f64;
    Ok(bytes / fastest(10, || Ok(memory.f_sum(Kind::Float)?.f_double_value(&[])?))?)
}

/// Least time of a call in seconds, of so many. What is called reads its result from the device, which is when that is done.
fn fastest<T>(times: usize, mut work: impl FnMut() -> Outcome<T>) -> Outcome<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..times {
        let began = Instant::now();
        let _ = work()?;
        least = least.min(began.elapsed().as_secs_f64());
    }
    Ok(least)
}
