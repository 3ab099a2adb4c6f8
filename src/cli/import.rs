//! `sapo-flow import`: a GGUF file as a Hugging Face directory.

use sapo_flow_training::gguf::{self, WeightType};

use super::args::{DtypeArg, ImportArgs};
use super::{Outcome, report, terminal};

/// Import a model.
pub fn import(args: &ImportArgs) -> Outcome {
    let weight_type = match args.dtype {
        DtypeArg::Float32 => WeightType::Float32,
        DtypeArg::Bfloat16 => WeightType::BFloat16,
    };
    let summary = gguf::import(&args.gguf, &args.out_dir, weight_type)?;
    let types: Vec<String> = summary.tensor_types.iter().map(|(name, tensors)| format!("{tensors} {name}")).collect();
    let template = if summary.has_chat_template { "with" } else { "without" };
    terminal::print(&format!(
        "{}: {}, {} parameters ({} tensors), {} tokens, {template} a chat template",
        summary.directory.display(),
        summary.model_type,
        report::large_number(summary.parameters),
        types.join(", "),
        summary.vocabulary,
    ))?;
    Ok(())
}
