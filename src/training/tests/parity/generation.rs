//! Generation by the golden models.

use sapo_flow_training::generate::{Choice, Decoding, Generation, Recording, Request, Sampling, Warpers, generate};
use sapo_flow_training::model::rope::RopeScaling;
use sapo_flow_training::model::{Compute, Decoder, Model};
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
    // Not 0: one of its draws falls on two of qwen2's tokens whose logits differ by 8e-7, so that the order of sums decides.
    prompts.iter().zip(100..).map(request).collect()
}

fn run(model: &Model, requests: &[Request], choice: Choice, eos_ids: &[u32]) -> Vec<Generation> {
    run_by(model, requests, choice, eos_ids, Decoding::default())
}

fn run_by(model: &Model, requests: &[Request], choice: Choice, eos_ids: &[u32], decoding: Decoding) -> Vec<Generation> {
    let sampling = Sampling { choice, eos_ids: eos_ids.to_vec(), compute: F32, decoding };
    generate(&model.decoder, &model.parameters, requests, &sampling).unwrap()
}

/// The plain way, and every way to be faster.
fn ways() -> Vec<Decoding> {
    let plain = Decoding { share_prompts: false, look_every: Some(1), pack_weights: false, ..Decoding::default() };
    let mut ways = vec![plain, Decoding { share_prompts: true, ..plain }, Decoding { pack_weights: true, ..plain }];
    for (look_every, concurrent_responses) in
        [(1, Some(1)), (1, Some(2)), (1, None), (5, Some(2)), (2, None), (100, Some(1)), (100, None)]
    {
        ways.push(Decoding { concurrent_responses, look_every: Some(look_every), ..Decoding::default() });
    }
    // Rows that leave, that others take the place of, and that all come to their end between two looks.
    for (look_every, concurrent_responses) in [(2, None), (5, Some(2)), (100, None)] {
        let decoding = Decoding { concurrent_responses, look_every: Some(look_every), ..Decoding::default() };
        ways.push(Decoding { recording: Recording::Repeated, ..decoding });
    }
    ways
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

/// Rows end at different steps, by an end token and by their own max_new_tokens, and the others go on undisturbed. With
/// fewer rows than requests, others take their place.
#[test]
fn rows_that_end_leave_the_batch_or_make_room() {
    for (model, prompts, expected) in cases() {
        let eos_ids = [expected[0][2], expected[1][7]];
        let mut requests = requests(&prompts, 12);
        requests[2].max_new_tokens = 5;
        requests.push(Request { max_new_tokens: 0, ..requests[0].clone() });
        for way in ways() {
            let generations = run_by(&model, &requests, Choice::Greedy, &eos_ids, way);
            for (index, generation) in generations.iter().enumerate().take(3) {
                let whole = &expected[index][..requests[index].max_new_tokens];
                assert_eq!(generation.tokens, until_end(whole, &eos_ids), "{way:?}");
                assert_eq!(generation.ended, whole.iter().any(|token| eos_ids.contains(token)));
                assert_eq!(generation.logps.len(), generation.tokens.len());
            }
            assert_eq!(generations[3], Generation::default());
        }
    }
}

/// Every golden prompt with its greedy tokens, cut after each of the first of these, is to be continued by the others:
/// prompts that begin like others, that are equal, and that are one token long.
#[test]
fn every_way_gives_the_greedy_tokens() {
    for (model, prompts, expected) in cases() {
        let mut requests = Vec::new();
        let mut continuations = Vec::new();
        for (prompt, expected) in prompts.iter().zip(&expected) {
            for cut in [0, 0, 3, 1] {
                let prompt_ids = [prompt, &expected[..cut]].concat();
                // Until the same last token, and so for different numbers of steps.
                let max_new_tokens = expected.len() - cut;
                requests.push(Request { prompt_ids, max_new_tokens, seed: 0 });
                continuations.push(expected[cut..].to_vec());
            }
        }
        let whole = model.decoder.config.eos_token_ids.clone();
        for way in ways() {
            let generations = run_by(&model, &requests, Choice::Greedy, &[], way);
            for (generation, expected) in generations.iter().zip(&continuations) {
                let expected = until_end(expected, &whole);
                assert_eq!(generation.tokens[..expected.len()], expected, "{way:?}");
            }
        }
    }
}

/// Draws belong to a request and an index, so that neither its neighbours nor who draws decide.
#[test]
fn every_way_draws_the_same_tokens() {
    for (model, prompts, _) in cases() {
        let mut requests = requests(&prompts, 16);
        // Several responses to a prompt, and a prompt of one token.
        requests.extend(requests.clone().into_iter().map(|request| Request { seed: request.seed + 10, ..request }));
        requests.push(Request { prompt_ids: vec![prompts[0][0]], max_new_tokens: 9, seed: 5 });
        let expected = run_by(&model, &requests, Choice::Sample(WARPERS), &[], ways()[0]);
        for way in ways() {
            let found = run_by(&model, &requests, Choice::Sample(WARPERS), &[], way);
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found.tokens, expected.tokens, "{way:?}");
                let pairs = found.logps.iter().zip(&expected.logps);
                assert!(pairs.clone().all(|(left, right)| (left - right).abs() < 1e-4), "{way:?}");
            }
        }
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

/// More tokens tie than the device looks at first: it looks again, and draws as the host does.
#[test]
fn more_ties_than_looked_at_are_drawn_from() {
    for (mut model, prompts, _) in cases() {
        for (name, tensor) in model.parameters.iter_mut() {
            if name == model.decoder.head_name() {
                *tensor = tensor.zeros_like();
            }
        }
        let choice = Choice::Sample(Warpers { top_k: Some(3), ..WARPERS });
        let ways = [1, 4].map(|tokens| Decoding { look_every: Some(tokens), ..Decoding::default() });
        let [host, device] = ways.map(|way| run_by(&model, &requests(&prompts, 16), choice, &[], way));
        assert!(device.iter().flat_map(|generation| &generation.tokens).any(|&token| token > 100));
        assert_eq!(device, host);
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
        let sampling = Sampling { choice, eos_ids: vec![], compute: F32, decoding: Decoding::default() };
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

/// Weights in bfloat16 with activations in float32, and in 8 bits, are other models than float32's, but near: the tokens that
/// they draw alike have about the same log-probabilities, and most are alike.
#[test]
fn fewer_bits_are_near() {
    let near = |compute: Compute, decoding: Decoding, tolerance: f32| {
        let (mut alike, mut all) = (0, 0);
        for (model, prompts, _) in cases() {
            let requests = requests(&prompts, 12);
            let exact = run(&model, &requests, Choice::Greedy, &[]);
            let sampling = Sampling { choice: Choice::Greedy, eos_ids: vec![], compute, decoding };
            let found = generate(&model.decoder, &model.parameters, &requests, &sampling).unwrap();
            for (exact, found) in exact.iter().zip(&found) {
                assert_ne!(exact.logps, found.logps, "{decoding:?} does something");
                let same = exact.tokens.iter().zip(&found.tokens).take_while(|(exact, found)| exact == found).count();
                for (exact, found) in exact.logps.iter().zip(&found.logps).take(same) {
                    assert!((exact - found).abs() < tolerance, "{decoding:?}: {exact} {found}");
                }
                (alike, all) = (alike + same, all + exact.tokens.len());
            }
        }
        assert!(alike * 2 > all, "{decoding:?}: {alike} of {all}");
    };
    let int8 = Decoding { int8_weights: true, ..Decoding::default() };
    near(Compute::new(Kind::BFloat16), Decoding::default(), 0.1);
    near(F32, int8, 0.1);
    near(Compute::new(Kind::BFloat16), int8, 0.1);
    near(F32, Decoding { pack_weights: false, concurrent_responses: Some(1), ..int8 }, 0.1);
}

/// Over more slots than one recording has.
#[test]
fn recorded_work_serves_long_responses() {
    let (model, prompts, _) = cases().next().unwrap();
    let requests = requests(&prompts, 300);
    let plain = run(&model, &requests, Choice::Greedy, &[]);
    let decoding = Decoding { recording: Recording::Repeated, look_every: Some(64), ..Decoding::default() };
    let recorded = run_by(&model, &requests, Choice::Greedy, &[], decoding);
    for (plain, recorded) in plain.iter().zip(&recorded) {
        assert_eq!(plain.tokens, recorded.tokens);
    }
}

#[test]
fn ways_that_a_model_cannot_go_are_refused() {
    let (model, prompts, _) = cases().next().unwrap();
    let refused = |decoder: Decoder, decoding: Decoding| {
        let sampling = Sampling { choice: Choice::Greedy, eos_ids: vec![], compute: F32, decoding };
        generate(&decoder, &model.parameters, &requests(&prompts, 1), &sampling).unwrap_err().to_string()
    };
    let mut config = model.decoder.config.clone();
    let on_gpu = Decoder::new(config.clone(), Device::Cuda(0)).unwrap();
    let error = refused(on_gpu, Decoding { int8_weights: true, ..Decoding::default() });
    assert!(error.contains("int8_weights: expected a model on a CPU, found one on cuda:0"), "{error}");
    let graphs = Decoding { recording: Recording::CudaGraph, ..Decoding::default() };
    let error = refused(Decoder::new(config.clone(), Device::Cpu).unwrap(), graphs);
    assert!(error.contains("cuda_graphs: expected a model on a GPU, found one on cpu"), "{error}");
    config.rope.scaling = RopeScaling::Dynamic { factor: 2.0 };
    let error = refused(Decoder::new(config, Device::Cuda(0)).unwrap(), graphs);
    assert!(error.contains("cuda_graphs: expected rotary embeddings that are the same for sequences"), "{error}");
}
