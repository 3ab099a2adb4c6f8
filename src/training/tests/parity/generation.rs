//! Generation by the golden models.

use sapo_flow_training::generate::{Choice, Generation, Request, Sampling, Warpers, generate};
use sapo_flow_training::model::{Compute, Model};
use tch::{Device, Kind};

use crate::golden;

const F32: Compute = Compute::new(Kind::Float);
const WARPERS: Warpers = Warpers { temperature: 0.9, top_k: Some(20), top_p: Some(0.95) };

/// The golden models with their prompts and 12 greedy tokens.
fn cases() -> impl Iterator<Item = (Model, Vec<Vec<u32>>, Vec<Vec<u32>>)> {
    golden::models().into_iter().map(|directory| {
        let expected = golden::json(directory.join("expected.json"));
        let rows = |key: &str| expected[key].as_array().unwrap().iter().map(golden::tokens).collect::<Vec<_>>();
        let lengths = golden::floats(&expected["lengths"]);
        let prompts = rows("input_ids").into_iter().zip(lengths).map(|(row, length)| row[..length as usize].to_vec());
        (Model::load(&directory, Device::Cpu, Kind::Float).unwrap(), prompts.collect(), rows("greedy_12"))
    })
}

fn requests(prompts: &[Vec<u32>], max_new_tokens: usize) -> Vec<Request> {
    let request = |(prompt, seed): (&Vec<u32>, u64)| Request { prompt_ids: prompt.clone(), max_new_tokens, seed };
    prompts.iter().zip(0..).map(request).collect()
}

fn run(model: &Model, requests: &[Request], choice: Choice, eos_ids: &[u32]) -> Vec<Generation> {
    let sampling = Sampling { choice, eos_ids: eos_ids.to_vec(), compute: F32, pack_weights: true };
    generate(&model.decoder, &model.parameters, requests, &sampling).unwrap()
}

/// The first `tokens` up to the first end token.
fn until_end(tokens: &[u32], eos_ids: &[u32]) -> Vec<u32> {
    let end = tokens.iter().position(|token| eos_ids.contains(token));
    tokens[..end.map_or(tokens.len(), |end| end + 1)].to_vec()
}

#[test]
fn greedy_tokens_alone_and_in_a_batch() {
    for (model, prompts, expected) in cases() {
        let requests = requests(&prompts, expected[0].len());
        let eos_ids = &model.decoder.config.eos_token_ids;
        let together = run(&model, &requests, Choice::Greedy, eos_ids);
        for ((request, generation), expected) in requests.iter().zip(&together).zip(&expected) {
            let expected = until_end(expected, eos_ids);
            assert_eq!(generation.tokens, expected);
            let alone = run(&model, std::slice::from_ref(request), Choice::Greedy, eos_ids);
            assert_eq!(alone[0].tokens, expected);
        }
    }
}

/// Rows end at different steps, by an end token and by their own max_new_tokens, and the others go on undisturbed.
#[test]
fn rows_that_end_leave_the_batch() {
    for (model, prompts, expected) in cases() {
        let eos_ids = [expected[0][2], expected[1][7]];
        let mut requests = requests(&prompts, 12);
        requests[2].max_new_tokens = 5;
        requests.push(Request { max_new_tokens: 0, ..requests[0].clone() });
        let generations = run(&model, &requests, Choice::Greedy, &eos_ids);
        for (index, generation) in generations.iter().enumerate().take(3) {
            let whole = &expected[index][..requests[index].max_new_tokens];
            assert_eq!(generation.tokens, until_end(whole, &eos_ids));
            assert_eq!(generation.ended, whole.iter().any(|token| eos_ids.contains(token)));
            assert_eq!(generation.logps.len(), generation.tokens.len());
        }
        assert_eq!(generations[3], Generation::default());
    }
}

#[test]
fn sampled_tokens_depend_on_the_seed_alone() {
    for (model, prompts, _) in cases() {
        let requests = requests(&prompts, 16);
        let together = run(&model, &requests, Choice::Sample(WARPERS), &[]);
        let again = run(&model, &requests, Choice::Sample(WARPERS), &[]);
        assert_eq!(together, again);
        for (request, generation) in requests.iter().zip(&together) {
            let alone = run(&model, std::slice::from_ref(request), Choice::Sample(WARPERS), &[]);
            assert_eq!(alone[0].tokens, generation.tokens);
        }
        let other_seed = Request { seed: 1234, ..requests[0].clone() };
        assert_ne!(run(&model, &[other_seed], Choice::Sample(WARPERS), &[])[0].tokens, together[0].tokens);
    }
}

#[test]
fn logps_are_those_of_a_pass_over_the_whole_sequence() {
    let _guard = tch::no_grad_guard();
    for (model, prompts, _) in cases() {
        let generations = run(&model, &requests(&prompts, 16), Choice::Sample(WARPERS), &[]);
        for (prompt, generation) in prompts.iter().zip(&generations) {
            let whole = [prompt.as_slice(), &generation.tokens].concat();
            let input = model.decoder.input(&[&whole]).unwrap();
            let hidden = model.decoder.hidden_states(&model.parameters, &input, None, &F32).unwrap();
            let logits = model.decoder.logits(&model.parameters, &hidden, &F32).unwrap();
            let logps = logits.get(0).log_softmax(-1, Kind::Float);
            for (index, (&token, &logp)) in generation.tokens.iter().zip(&generation.logps).enumerate() {
                let expected = logps.double_value(&[(prompt.len() + index - 1) as i64, i64::from(token)]);
                assert!((f64::from(logp) - expected).abs() < 1e-4, "token {index}: {logp}, expected {expected}");
            }
        }
    }
}

#[test]
fn requests_that_cannot_be_continued_are_errors() {
    let (model, prompts, _) = cases().next().unwrap();
    let error = |request: Request, choice: Choice| {
        let sampling = Sampling { choice, eos_ids: vec![], compute: F32, pack_weights: true };
        generate(&model.decoder, &model.parameters, &[request], &sampling).unwrap_err().to_string()
    };
    let fine = requests(&prompts, 1).remove(0);
    let empty = Request { prompt_ids: vec![], ..fine.clone() };
    assert_eq!(error(empty, Choice::Greedy), "request 0: expected a prompt of at least one token, found none");
    let unknown = Request { prompt_ids: vec![1, u32::MAX], ..fine.clone() };
    let message = error(unknown, Choice::Greedy);
    assert!(message.starts_with("request 0: token 4294967295 is not in the vocabulary of "), "{message}");
    let cold = Warpers { temperature: -1.0, ..WARPERS };
    assert!(error(fine, Choice::Sample(cold)).starts_with("temperature: "));
}
