//! `sapo-flow generate`: a text continued, or a chat answered, by a model.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use sapo_flow_training::generate::{Choice, Decoding, Request, Sampling, Warpers};
use sapo_flow_training::model::{Compute, Model};
use sapo_flow_training::text::{ChatTemplate, Message, TextTokenizer, encode_prompt};
use sapo_flow_training::{device, generate as decode};
use tch::Kind;

use super::args::{DtypeArg, GenerateArgs};
use super::{Failure, Outcome, terminal};

/// Generate, and print what the model adds.
pub fn generate(args: &GenerateArgs) -> Outcome {
    device::keep_memory();
    let choice = choice(args)?;
    let tokenizer = TextTokenizer::load(&args.model)?;
    let prompt = prompt(args)?;
    let kind = match args.dtype {
        DtypeArg::Float32 => Kind::Float,
        DtypeArg::Bfloat16 => Kind::BFloat16,
    };
    let model = Model::load(&args.model, device::parse(&args.device)?, kind)?;
    let (prompt_ids, seed) = (encode_prompt(&tokenizer, &prompt)?, args.seed.unwrap_or(42));
    let request = Request { prompt_ids, max_new_tokens: args.max_tokens, seed };
    let sampling = Sampling {
        choice,
        eos_ids: tokenizer.eos_ids().to_vec(),
        compute: Compute::new(kind),
        decoding: Decoding::default(),
    };
    let generations = decode::generate(&model.decoder, &model.parameters, &[request], &sampling)?;
    let tokens = generations.first().map(|generation| generation.tokens.as_slice()).unwrap_or_default();
    terminal::print(&tokenizer.decode_without_special_tokens(tokens)?)?;
    Ok(())
}

/// How tokens are chosen. What only draws depend on is refused where there are none.
fn choice(args: &GenerateArgs) -> Result<Choice, Failure> {
    if args.temperature == 0.0 {
        let given =
            [("--top-k", args.top_k.is_some()), ("--top-p", args.top_p.is_some()), ("--seed", args.seed.is_some())];
        return match given.into_iter().find(|(_, given)| *given) {
            Some((name, _)) => {
                Err(Failure::Usage(format!("{name} has no effect with --temperature 0, which draws nothing")))
            }
            None => Ok(Choice::Greedy),
        };
    }
    let top_k = args.top_k.unwrap_or(50);
    Ok(Choice::Sample(Warpers {
        temperature: args.temperature,
        top_k: (top_k > 0).then_some(top_k),
        top_p: Some(args.top_p.unwrap_or(0.95)),
    }))
}

/// The text before what is to be generated.
fn prompt(args: &GenerateArgs) -> anyhow::Result<String> {
    if let Some(prompt) = &args.prompt {
        return Ok(prompt.clone());
    }
    let messages = match &args.chat {
        Some(path) => read_chat(path)?,
        None => args.messages.iter().map(|(role, content)| Message::new(role, content)).collect(),
    };
    match ChatTemplate::load(&args.model)? {
        Some(template) => Ok(template.render_prompt(&messages)?),
        None => bail!("{} has no chat template: give a text with --prompt", args.model.display()),
    }
}

fn read_chat(path: &Path) -> anyhow::Result<Vec<Message>> {
    let name = path.display();
    let text = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
        text
    } else {
        std::fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?
    };
    serde_json::from_str(&text)
        .with_context(|| format!("{name}: expected a JSON list of messages, each with `role` and `content`"))
}
