//! `replay_buffer`: contents and draws as the SAPO authors' code has them, and what is taken back.

use super::*;
use crate::testing::golden;

fn buffer(capacity: usize, sampling: Sampling, draws: usize) -> ReplayBuffer {
    let config = ReplayBufferConfig { capacity, sampling, draws };
    let mut buffer = ReplayBuffer {
        config,
        random: Draws::new(1, "replay"),
        entries: VecDeque::new(),
        shares: None,
        retracted: 0,
        node: "replay".into(),
        events: EventSender::sink(),
        unannounced: false,
    };
    buffer.weigh();
    buffer
}

fn pair(id: u64) -> Arc<Pair> {
    Arc::new(Pair {
        step: 0,
        position: 0,
        origin: "test".into(),
        source: "data".into(),
        row: id,
        prompt_ids: vec![1],
        chosen_ids: vec![2],
        rejected_ids: Some(vec![3]),
        segment: None,
        weights_version: None,
        seed: None,
        values: Default::default(),
    })
}

#[test]
fn contents_and_probabilities_are_the_authors_own() {
    let golden = golden("replay_buffer.json");
    let capacity = golden["capacity"].as_u64().expect("a number") as usize;
    let trace = golden["trace"].as_array().expect("a list");
    assert!(!trace.is_empty());
    let mut buffer = buffer(capacity, Sampling::InverseCount, 1);
    let mut next = 0;
    let mut outputs = Outputs::new();
    for moment in trace {
        for _ in 0..moment["add"].as_u64().expect("a number") {
            buffer.insert(0, pair(next), &mut outputs);
            next += 1;
        }
        let contents: Vec<u64> = buffer.entries.iter().map(|entry| entry.pair.row).collect();
        assert_eq!(serde_json::json!(contents), moment["contents"]);
        let expected: Vec<f64> = serde_json::from_value(moment["probabilities"].clone()).expect("numbers");
        let found = buffer.probabilities();
        assert_eq!(found.len(), expected.len(), "{moment}");
        for (ours, theirs) in found.iter().zip(&expected) {
            assert!((ours - theirs).abs() < 1e-12, "{ours} {theirs}");
        }
        let sampled: Vec<u64> = serde_json::from_value(moment["sampled"].clone()).expect("ids");
        // Theirs draws a batch, or as many as there are.
        buffer.config.draws = moment["batch"].as_u64().expect("a number") as usize;
        assert_eq!(buffer.draw(0).len(), sampled.len(), "{moment}");
        assert_eq!(sampled.len(), buffer.config.draws.min(contents.len()), "{moment}");
        let index = |id: &u64| contents.iter().position(|kept| kept == id).expect("drawn from the contents");
        buffer.emit(sampled.iter().map(index).collect(), &mut outputs);
    }
}

#[test]
fn draws_follow_the_rule() {
    // Pair 0 drawn nine times before: weights 1/10, 1, 1, so shares 1/21, 10/21, 10/21.
    let mut buffer = buffer(10, Sampling::InverseCount, 3);
    (0..3).for_each(|id| buffer.insert(0, pair(id), &mut Outputs::new()));
    buffer.entries[0].drawn = 9;
    buffer.weigh();
    let mut counts = [0; 3];
    for step in 0..7000 {
        buffer.draw(step).into_iter().for_each(|index| counts[index] += 1);
    }
    for (count, share) in counts.iter().zip([1.0, 10.0, 10.0]) {
        let (expected, deviation) = (1000.0 * share, (1000.0f64 * share).sqrt());
        assert!((f64::from(*count) - expected).abs() < 5.0 * deviation, "{counts:?}");
    }
}

#[test]
fn uniform_draws_forget_what_was_drawn() {
    let mut buffer = buffer(10, Sampling::Uniform, 4);
    (0..4).for_each(|id| buffer.insert(0, pair(id), &mut Outputs::new()));
    buffer.entries[0].drawn = 9;
    let mut counts = [0; 4];
    for step in 0..4000 {
        buffer.draw(step).into_iter().for_each(|index| counts[index] += 1);
    }
    // Chi-square with three degrees of freedom is above 21.1 once in ten thousand times.
    let statistic: f64 = counts.iter().map(|count| (f64::from(*count) - 4000.0).powi(2) / 4000.0).sum();
    assert!(statistic < 21.1, "{counts:?}");
}

#[test]
fn fifo_is_a_queue() {
    let mut buffer = buffer(10, Sampling::Fifo, 2);
    (0..5).for_each(|id| buffer.insert(0, pair(id), &mut Outputs::new()));
    let rows = |buffer: &mut ReplayBuffer, step| -> Vec<u64> {
        let outputs = buffer.step(step, Inputs::default()).expect("it cannot fail");
        let mut inputs = Inputs::new(vec![("pairs", outputs.records.into_iter().map(|(_, record)| record).collect())]);
        inputs.pairs("pairs").iter().map(|pair| pair.row).collect()
    };
    assert_eq!(rows(&mut buffer, 0), [0, 1]);
    assert_eq!(rows(&mut buffer, 1), [2, 3]);
    assert_eq!(rows(&mut buffer, 2), [4]);
    assert_eq!(rows(&mut buffer, 3), [0; 0]);
}

/// Rows and draw counts, and the notes of a step with these retractions.
fn after(of: Vec<(Retracted, Option<&str>)>) -> (Vec<(u64, u64)>, Vec<String>, u64) {
    let (sender, receiver) = EventSender::channel();
    let mut buffer = ReplayBuffer { events: sender, ..buffer(10, Sampling::Uniform, 1) };
    for id in [4, 5, 4, 6] {
        buffer.insert(0, pair(id), &mut Outputs::new());
    }
    (0..4).for_each(|index| buffer.entries[index].drawn = 10 * index as u64);
    let retraction = |(of, because): (Retracted, Option<&str>)| Retraction {
        port_type: PortType::Pairs,
        of,
        because: because.map(Into::into),
    };
    buffer.honour(of.into_iter().map(retraction).collect(), &mut Outputs::new());
    let left = buffer.entries.iter().map(|entry| (entry.pair.row, entry.drawn)).collect();
    let note = |event| if let Event::Note { message, .. } = event { Some(message) } else { None };
    (left, receiver.try_iter().filter_map(note).collect(), buffer.retracted)
}

#[test]
fn what_is_taken_back_leaves_with_its_draws() {
    let row = |row| Retracted::Row { source: "data".into(), row };
    let (left, notes, retracted) = after(vec![(row(4), Some("a.jsonl:5 was removed")), (row(9), Some("b"))]);
    assert_eq!((left, retracted), (vec![(5, 10), (6, 30)], 2));
    assert_eq!(notes, ["2 pairs left the buffer: a.jsonl:5 was removed", "0 pairs left the buffer: b"]);
    // Rows of other sources have the same numbers. A record that came several times leaves once, the newest first.
    let other = Retracted::Row { source: "other".into(), row: 4 };
    let record = Retracted::Record { origin: "test".into(), step: 0, position: 0 };
    let (left, notes, retracted) = after(vec![(other, None), (record, None)]);
    assert_eq!((left, retracted), (vec![(4, 0), (5, 10), (4, 20)], 1));
    assert!(notes.is_empty());
}

/// As if the retractions of a step came one after the other.
#[test]
fn of_several_retractions_the_first_takes_what_it_concerns() {
    let row = || Retracted::Row { source: "data".into(), row: 4 };
    let record = || Retracted::Record { origin: "test".into(), step: 0, position: 0 };
    let left = |pairs: usize, because: &str| {
        format!("{pairs} pair{} left the buffer: {because}", if pairs == 1 { "" } else { "s" })
    };
    let (kept, notes, retracted) = after(vec![(record(), Some("a")), (record(), Some("b")), (row(), Some("c"))]);
    assert_eq!((kept, retracted), (vec![(5, 10)], 3));
    assert_eq!(notes, [left(1, "a"), left(1, "b"), left(1, "c")]);
    let (kept, notes, retracted) = after(vec![(row(), Some("a")), (row(), Some("b")), (record(), Some("c"))]);
    assert_eq!((kept, retracted), (vec![(5, 10)], 3));
    assert_eq!(notes, [left(2, "a"), left(0, "b"), left(1, "c")]);
}

#[test]
fn restored_buffers_draw_alike() {
    let mut original = buffer(4, Sampling::InverseCount, 3);
    (0..6).for_each(|id| original.insert(id, pair(id), &mut Outputs::new()));
    original.step(6, Inputs::default()).expect("it cannot fail");
    let directory = tempfile::tempdir().expect("a temporary directory");
    original.snapshot(directory.path()).expect("writable");
    let mut restored = buffer(4, Sampling::InverseCount, 3);
    restored.restore(directory.path()).expect("readable");
    assert_eq!(restored.draw(7), original.draw(7));
    assert_eq!(restored.probabilities(), original.probabilities());
}
