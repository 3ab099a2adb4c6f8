//! What `replay_buffer` tells of its state: sizes, ages and draw counts, maintained incrementally from its changes.

use std::collections::BTreeMap;
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

/// Ages and draw counts of the buffer's pairs, counted by differential dataflow and summed up once a step.
pub fn statistics(changes: RecordStream<'_>) -> RecordStream<'_> {
    let (entries, retracted) = {
        let all = view::collection(changes.clone());
        (all.clone().filter(|element| !element.is_empty()), all.filter(|element| element.is_empty()))
    };
    let retracted = retracted.map(|_| 0).count_total().map(|(_, count)| (Histogram::Retracted, 0, count));
    let by_step =
        entries.clone().map(|entry| entry[0]).count_total().map(|(step, count)| (Histogram::Inserted, step, count));
    let by_draws = entries.map(|entry| entry[1]).count_total().map(|(drawn, count)| (Histogram::Drawn, drawn, count));
    view::running(changes, by_step.concat(by_draws).concat(retracted), |step, bars| {
        Record::Metrics(Arc::new(summary(step, bars)))
    })
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
enum Histogram {
    /// Pairs by the step they came in.
    Inserted,
    /// Pairs by how often they were drawn.
    Drawn,
    /// One bar: pairs taken back so far.
    Retracted,
}

/// The histograms as metrics. Ages are in steps.
fn summary(step: u64, bars: &BTreeMap<(Histogram, u64, isize), isize>) -> Metrics {
    let mut metrics = Metrics::default();
    let mut set = |name: String, value: f64| metrics.values.insert(format!("buffer/{name}"), value);
    let bars_of = |wanted: Histogram| {
        bars.keys().filter(move |(histogram, ..)| *histogram == wanted).map(|(_, value, count)| (*value, *count as u64))
    };
    let size: u64 = bars_of(Histogram::Inserted).map(|(_, count)| count).sum();
    set("size".into(), size as f64);
    set("retracted".into(), bars_of(Histogram::Retracted).map(|(_, count)| count).sum::<u64>() as f64);
    if size > 0 {
        let mean = |histogram| bars_of(histogram).map(|(value, count)| value * count).sum::<u64>() as f64 / size as f64;
        let oldest = bars_of(Histogram::Inserted).map(|(inserted, _)| inserted).min().unwrap_or(step);
        set("age_mean".into(), step as f64 - mean(Histogram::Inserted));
        set("age_max".into(), (step - oldest) as f64);
        set("drawn_mean".into(), mean(Histogram::Drawn));
    }
    // A histogram with bars for 0, 1, 2 and 3 or more draws, and for ages by powers of two.
    for (name, from, to) in [("0", 0, 0), ("1", 1, 1), ("2", 2, 2), ("3_or_more", 3, u64::MAX)] {
        let count: u64 =
            bars_of(Histogram::Drawn).filter(|(drawn, _)| (from..=to).contains(drawn)).map(|bar| bar.1).sum();
        set(format!("drawn/{name}"), count as f64);
    }
    for (name, from, to) in [("0", 0, 0), ("1_to_7", 1, 7), ("8_to_63", 8, 63), ("64_or_more", 64, u64::MAX)] {
        let bars = bars_of(Histogram::Inserted).filter(|(inserted, _)| (from..=to).contains(&(step - inserted)));
        set(format!("age/{name}"), bars.map(|bar| bar.1).sum::<u64>() as f64);
    }
    metrics
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_sum_up_by_hand() {
        // At step 10: two pairs from step 10, drawn 0 times; one from step 4, drawn 5 times; one from step 0, twice.
        let bars = [
            (Histogram::Inserted, 0, 1),
            (Histogram::Inserted, 4, 1),
            (Histogram::Inserted, 10, 2),
            (Histogram::Drawn, 0, 2),
            (Histogram::Drawn, 2, 1),
            (Histogram::Drawn, 5, 1),
        ];
        let metrics = summary(10, &bars.into_iter().map(|bar| (bar, 1)).collect());
        for (name, value) in [
            ("size", 4.0),
            ("age_mean", 4.0),
            ("age_max", 10.0),
            ("drawn_mean", 1.75),
            ("drawn/0", 2.0),
            ("drawn/2", 1.0),
            ("drawn/3_or_more", 1.0),
            ("age/0", 2.0),
            ("age/1_to_7", 1.0),
            ("age/8_to_63", 1.0),
        ] {
            assert_eq!(metrics.values[&format!("buffer/{name}")], value, "{name}");
        }
    }
}
