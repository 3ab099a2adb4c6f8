//! How fast a model decodes on this machine, and what share that is of reading its weights once for each token:
//! `decode_speed MODEL [ROWS [THREADS]]`.

use std::path::Path;
use std::time::Instant;

use sapo_flow_training::device;
use sapo_flow_training::generate::{Choice, Decoding, Request, Sampling, Warpers, generate};
use sapo_flow_training::model::{Compute, Model};
use tch::{Device, Kind, Tensor};

/// Tokens of the two answers whose difference in time is that of decoding alone.
const FEW: usize = 16;
const MANY: usize = 80;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let directory = arguments.first().ok_or("expected a model's directory")?;
    let rows: u32 = arguments.get(1).map_or(Ok(4), |rows| rows.parse())?;
    let threads: usize = arguments.get(2).map_or(Ok(2), |threads| threads.parse())?;
    device::keep_memory();
    device::set_threads(threads);

    let memory = Tensor::ones([1 << 27], (Kind::Float, Device::Cpu));
    for kind in [Kind::Float, Kind::BFloat16] {
        let model = Model::load(Path::new(directory), Device::Cpu, Kind::Float)?;
        let linear = |name: &str| name.ends_with("proj.weight") || name == model.decoder.head_name();
        let weights: usize = model.parameters.iter().filter(|(name, _)| linear(name)).map(|(_, t)| t.numel()).sum();
        for (what, lengths) in [("equal", [200; 4]), ("unequal", [200, 150, 190, 120])] {
            let plain = Decoding { pack_weights: false, ..Decoding::default() };
            let int8 = Decoding { int8_weights: true, ..Decoding::default() };
            for (layout, decoding) in [("plain", plain), ("packed", Decoding::default()), ("int8", int8)] {
                let time = |new_tokens: usize| -> f64 {
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
                    fastest(3, || generate(&model.decoder, &model.parameters, &requests, &sampling).map(|g| g.len()))
                };
                let bytes = if decoding.int8_weights { 1 } else { kind.elt_size_in_bytes() };
                // What can be read in a second changes from one second to the next where others use the memory too.
                let before = bytes_read(&memory);
                let (few, many) = (time(FEW), time(MANY));
                let bandwidth = before.max(bytes_read(&memory));
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

/// Bytes a second that are read from memory, at best.
fn bytes_read(memory: &Tensor) -> f64 {
    (memory.numel() * 4) as f64 / fastest(10, || memory.sum(Kind::Float).double_value(&[]))
}

/// Least time of a call in seconds, of so many.
fn fastest<T>(times: usize, mut work: impl FnMut() -> T) -> f64 {
    let time = |_| {
        let began = Instant::now();
        let _ = work();
        began.elapsed().as_secs_f64()
    };
    (0..times).map(time).fold(f64::INFINITY, f64::min)
}
