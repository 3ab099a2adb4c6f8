//! What `replay_buffer` tells of its state: sizes, ages and draw counts, maintained incrementally from its changes.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use differential_dataflow::operators::count::CountTotal;
use sapo_flow_engine::operator::RecordStream;
use sapo_flow_engine::record::{Change, Metrics, Record};
use sapo_flow_engine::runtime::view;
use serde::{Deserialize, Serialize};

/// So many pairs taken back, for the view.
pub fn retracted_change(pairs: u64) -> Record {
    Record::Change(Change { element: Vec::new(), diff: pairs as i64 })
}

/// Ages and draw counts of the buffer's pairs, counted by differential dataflow and summed up once a step. What a step
/// takes depends on what changed, and hardly on how many pairs there are.
pub fn statistics(changes: RecordStream<'_>) -> RecordStream<'_> {
    let counted = view::collection(changes.clone()).explode(|element| match element[..] {
        [inserted, drawn] => vec![
            ((Bar::Inserted, inserted), 1),
            ((Bar::Drawn, drawn), 1),
            ((Bar::Size, 0), 1),
            ((Bar::Steps, 0), inserted as isize),
        ],
        _ => vec![((Bar::Retracted, 0), 1)],
    });
    let bars = counted.count_total().map(|((bar, value), count)| (bar, value, count));
    view::running(changes, bars, |step, bars| Record::Metrics(Arc::new(summary(step, bars))))
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
enum Bar {
    /// Pairs by the step they came in.
    Inserted,
    /// Pairs by how often they were drawn.
    Drawn,
    /// One bar: pairs taken back so far.
    Retracted,
    /// One bar: pairs in the buffer.
    Size,
    /// One bar: the sum of the steps they came in.
    Steps,
}

/// The bars that there are, each as what is counted, its value, and how many there are of it.
type Bars = BTreeMap<(Bar, u64, isize), isize>;

/// The bars of a kind with values in a range.
fn within(bars: &Bars, kind: Bar, values: RangeInclusive<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
    let range = (kind, *values.start(), isize::MIN)..=(kind, *values.end(), isize::MAX);
    bars.range(range).map(|((_, value, count), _)| (*value, *count as u64))
}

/// The histograms as metrics. Ages are in steps.
fn summary(step: u64, bars: &Bars) -> Metrics {
    let mut metrics = Metrics::default();
    let mut set = |name: String, value: f64| metrics.values.insert(format!("buffer/{name}"), value);
    let total = |kind| within(bars, kind, 0..=0).map(|(_, count)| count).sum::<u64>();
    let size = total(Bar::Size);
    set("size".into(), size as f64);
    set("retracted".into(), total(Bar::Retracted) as f64);
    if size > 0 {
        let drawn: u64 = within(bars, Bar::Drawn, 0..=u64::MAX).map(|(drawn, count)| drawn * count).sum();
        let oldest = within(bars, Bar::Inserted, 0..=u64::MAX).next().map_or(step, |(inserted, _)| inserted);
        set("age_mean".into(), step as f64 - total(Bar::Steps) as f64 / size as f64);
        set("age_max".into(), (step - oldest) as f64);
        set("drawn_mean".into(), drawn as f64 / size as f64);
    }
    // A histogram with bars for 0, 1, 2 and 3 or more draws, and for ages by powers of two.
    let sum = |kind, values| within(bars, kind, values).map(|(_, count)| count).sum::<u64>();
    for (name, from, to) in [("0", 0, 0), ("1", 1, 1), ("2", 2, 2), ("3_or_more", 3, u64::MAX)] {
        set(format!("drawn/{name}"), sum(Bar::Drawn, from..=to) as f64);
    }
    // Old pairs are the rest: there may be as many bars of them as steps that the buffer goes back.
    let mut others = size;
    for (name, from, to) in [("0", 0, 0), ("1_to_7", 1, 7), ("8_to_63", 8, 63)] {
        let count = if from > step { 0 } else { sum(Bar::Inserted, step.saturating_sub(to)..=step - from) };
        others -= count;
        set(format!("age/{name}"), count as f64);
    }
    set("age/64_or_more".into(), others as f64);
    metrics
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use timely::dataflow::operators::{Input, Inspect};

    use super::*;

    /// Of pairs: the step each came in, times drawn, and 1 or -1.
    type Changes = Vec<([u64; 2], i64)>;

    /// The metrics after each step, from the changes of each.
    fn metrics(steps: Vec<(u64, Changes)>) -> Vec<Record> {
        let found = Arc::new(Mutex::new(Vec::new()));
        let sink = found.clone();
        timely::execute_directly(move |worker| {
            let mut input = worker.dataflow::<u64, _, _>(|scope| {
                let (input, stream) = scope.new_input::<Vec<Record>>();
                statistics(stream).inspect(move |record| sink.lock().unwrap().push(record.clone()));
                input
            });
            for (step, changes) in steps {
                input.advance_to(step);
                input.send(Record::Change(Change { element: Vec::new(), diff: 0 }));
                for (element, diff) in changes {
                    input.send(Record::Change(Change { element: element.to_vec(), diff }));
                }
            }
        });
        found.lock().unwrap().clone()
    }

    #[test]
    fn histograms_sum_up_by_hand() {
        // A pair from step 0, one from step 4; two from step 10, when the first had been drawn twice, the second five times.
        let steps = vec![
            (0, vec![([0, 0], 1)]),
            (4, vec![([4, 0], 1), ([0, 0], -1), ([0, 2], 1)]),
            (10, vec![([10, 0], 1), ([10, 0], 1), ([4, 0], -1), ([4, 5], 1)]),
            // The first one leaves.
            (70, vec![([0, 2], -1)]),
        ];
        let found = metrics(steps);
        let expected: [&[(&str, f64)]; 4] = [
            &[
                ("size", 1.0),
                ("age_mean", 0.0),
                ("age_max", 0.0),
                ("drawn_mean", 0.0),
                ("drawn/0", 1.0),
                ("age/0", 1.0),
            ],
            &[("size", 2.0), ("age_mean", 2.0), ("age_max", 4.0), ("drawn_mean", 1.0), ("age/1_to_7", 1.0)],
            &[
                ("size", 4.0),
                ("retracted", 0.0),
                ("age_mean", 4.0),
                ("age_max", 10.0),
                ("drawn_mean", 1.75),
                ("drawn/0", 2.0),
                ("drawn/1", 0.0),
                ("drawn/2", 1.0),
                ("drawn/3_or_more", 1.0),
                ("age/0", 2.0),
                ("age/1_to_7", 1.0),
                ("age/8_to_63", 1.0),
                ("age/64_or_more", 0.0),
            ],
            &[("size", 3.0), ("age_mean", 62.0), ("age_max", 66.0), ("age/8_to_63", 2.0), ("age/64_or_more", 1.0)],
        ];
        assert_eq!(found.len(), expected.len());
        for (place, (record, values)) in found.iter().zip(expected).enumerate() {
            let Record::Metrics(metrics) = record else { panic!("expected metrics, found {record:?}") };
            for (name, value) in values {
                assert_eq!(metrics.values[&format!("buffer/{name}")], *value, "{name} in report {place}");
            }
        }
    }
}
