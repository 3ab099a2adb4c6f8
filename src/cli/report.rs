//! What is shown at the end of a run, and how numbers are written.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use sapo_flow_engine::Metrics;
use sapo_flow_engine::number::by_name;
use sapo_flow_engine::runtime::RunReport;
use sapo_flow_engine::runtime::event::Completion;
use serde::{Deserialize, Serialize};

use super::directory::{EVALUATIONS, write_whole};

/// Names of held-out metrics for people, in the order shown.
const HELD_OUT: &[(&str, &str)] = &[
    ("eval_nll", "held-out NLL (nats a token)"),
    ("eval_accuracy", "held-out accuracy"),
    ("eval_margin", "held-out margin"),
];

/// Held-out evaluations of a run, kept in its directory so that a resumed run still knows the first one.
#[derive(Debug, Default)]
pub struct Evaluations {
    path: PathBuf,
    /// By node, then by the number of updates the weights had.
    nodes: BTreeMap<String, BTreeMap<u64, Evaluation>>,
}

/// What is known of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Measured on held-out rows.
    pub metrics: Metrics,
    /// What it answers to some of the prompts.
    pub shown: Vec<Completion>,
}

/// One evaluation as stored.
#[derive(Serialize, Deserialize)]
struct Stored {
    node: String,
    version: u64,
    #[serde(with = "by_name")]
    values: BTreeMap<String, f64>,
    #[serde(default)]
    shown: Vec<Completion>,
}

impl Evaluations {
    /// Those in a run directory; none in a fresh one.
    pub fn load(directory: &Path) -> anyhow::Result<Self> {
        let path = directory.join(EVALUATIONS);
        let mut nodes: BTreeMap<String, BTreeMap<u64, Evaluation>> = BTreeMap::new();
        if path.exists() {
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let stored: Vec<Stored> = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
            for Stored { node, version, values, shown } in stored {
                nodes.entry(node).or_default().insert(version, Evaluation { metrics: Metrics { values }, shown });
            }
        }
        Ok(Evaluations { path, nodes })
    }

    /// Add one, and store all.
    pub fn add(&mut self, node: &str, version: u64, evaluation: Evaluation) -> anyhow::Result<()> {
        self.nodes.entry(node.to_owned()).or_default().insert(version, evaluation);
        let stored: Vec<Stored> = self
            .nodes
            .iter()
            .flat_map(|(node, versions)| versions.iter().map(move |(version, evaluation)| (node, version, evaluation)))
            .map(|(node, version, Evaluation { metrics, shown })| Stored {
                node: node.clone(),
                version: *version,
                values: metrics.values.clone(),
                shown: shown.clone(),
            })
            .collect();
        write_whole(&self.path, &(serde_json::to_string_pretty(&stored)? + "\n"))
    }

    /// The first and the last of each node, side by side.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for (node, versions) in &self.nodes {
            let (Some((first, before)), Some((last, after))) = (versions.first_key_value(), versions.last_key_value())
            else {
                continue;
            };
            let (before, after) = (&before.metrics, &after.metrics);
            let mut rows = vec![vec![node.clone(), updates(*first), updates(*last)]];
            for (name, label) in labels(before, after) {
                let value =
                    |metrics: &Metrics| metrics.values.get(&name).map_or("-".to_owned(), |value| number(*value));
                rows.push(vec![label, value(before), value(after)]);
            }
            text += &format!("{}\n", table(&rows));
        }
        text
    }
}

fn updates(version: u64) -> String {
    match version {
        0 => "before".to_owned(),
        version => format!("after {version} updates"),
    }
}

/// Names of metrics and what to call them: those people look for first, then the others.
fn labels(before: &Metrics, after: &Metrics) -> Vec<(String, String)> {
    let names: BTreeSet<&String> = before.values.keys().chain(after.values.keys()).collect();
    let known = HELD_OUT.iter().filter(|(name, _)| names.contains(&(*name).to_owned()));
    let others = names.iter().filter(|name| HELD_OUT.iter().all(|(known, _)| *known != name.as_str()));
    known
        .map(|(name, label)| ((*name).to_owned(), (*label).to_owned()))
        .chain(others.map(|name| ((*name).clone(), (*name).clone())))
        .collect()
}

/// Where the time went: the nodes at work, the engine that leads records to them, and the whole. Nodes on threads of
/// their own work while others do, so that shares may add up to more than all.
pub fn where_time_went(report: &RunReport) -> String {
    let mut rows = vec![vec!["time".to_owned(), "seconds".to_owned(), "of the run".to_owned()]];
    let mut busy: Vec<_> = report.busy.iter().filter(|(_, time)| time.as_millis() > 0).collect();
    busy.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
    // No node can have a name with a blank in it.
    let parts = busy.into_iter().map(|(node, time)| (node.as_str(), *time)).chain([("the engine", report.engine)]);
    for (name, time) in parts {
        let share = 100.0 * time.as_secs_f64() / report.elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        let share = if share < 1.0 { format!("{share:.2}%") } else { format!("{share:.0}%") };
        rows.push(vec![name.to_owned(), seconds(time), share]);
    }
    rows.push(vec!["the run".to_owned(), seconds(report.elapsed), String::new()]);
    table(&rows)
}

/// One decimal, or three where one would say little.
fn seconds(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        format!("{:.3}", time.as_secs_f64())
    } else {
        format!("{:.1}", time.as_secs_f64())
    }
}

/// Rows in aligned columns: the first to the left, those of numbers to the right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let is_number = |cell: &String| cell.is_empty() || cell.starts_with(|c: char| c.is_ascii_digit() || c == '-');
    let to_right: Vec<bool> = (0..columns)
        .map(|column| column > 0 && rows.iter().skip(1).filter_map(|row| row.get(column)).all(is_number))
        .collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .enumerate()
            .map(|(column, cell)| {
                let width = widths[column];
                if to_right[column] { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            })
            .collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// Four decimals, or an exponent where they would say nothing.
pub fn number(value: f64) -> String {
    if value != 0.0 && value.abs() < 0.001 { format!("{value:.2e}") } else { format!("{value:.4}") }
}

/// `134.5M`
pub fn large_number(value: u64) -> String {
    let value_f64 = value as f64;
    match value {
        0..1_000 => value.to_string(),
        1_000..1_000_000 => format!("{:.1}k", value_f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", value_f64 / 1e6),
        _ => format!("{:.2}B", value_f64 / 1e9),
    }
}

/// `1.5 GiB`
pub fn bytes(value: u64) -> String {
    let mut value = value as f64;
    for unit in ["bytes", "KiB", "MiB"] {
        if value < 1024.0 {
            return if unit == "bytes" { format!("{value} {unit}") } else { format!("{value:.0} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} GiB")
}

/// `1h 02m`, `2m 05s`, `7s`
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m {seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h {minutes:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use sapo_flow_engine::runtime::Outcome;

    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(large_number(999), "999");
        assert_eq!(large_number(134_515_008), "134.5M");
        assert_eq!(large_number(7_000_000_000), "7.00B");
        assert_eq!(bytes(1000), "1000 bytes");
        assert_eq!(bytes(540_000_000), "515 MiB");
        assert_eq!(bytes(3 << 30), "3.0 GiB");
        assert_eq!(duration(Duration::from_secs(125)), "2m 05s");
        assert_eq!(duration(Duration::from_secs(3725)), "1h 02m");
        assert_eq!(number(0.00001), "1.00e-5");
        assert_eq!(number(-1.25), "-1.2500");
        assert_eq!(number(0.0), "0.0000");
    }

    #[test]
    fn tables_are_aligned() {
        let rows = [["time", "seconds"], ["learner", "12.5"], ["ema", "0.1"]];
        let rows: Vec<Vec<String>> =
            rows.iter().map(|row| row.iter().map(|cell| (*cell).to_owned()).collect()).collect();
        assert_eq!(table(&rows), "time     seconds\nlearner     12.5\nema          0.1\n");
    }

    /// By hand: 12.5 of 50 s are 25%, 0.04 are 0.08%. What took no millisecond is left out; the engine never is.
    #[test]
    fn the_engine_stands_beside_the_nodes() {
        let ms = Duration::from_millis;
        let busy = [("rows", Duration::from_micros(20)), ("ema", ms(40)), ("learner", ms(12_500))];
        let report = RunReport {
            outcome: Outcome::Completed,
            total_steps: 1,
            steps_done: 1,
            busy: busy.map(|(node, time)| (node.to_owned(), time)).to_vec(),
            engine: ms(5),
            elapsed: ms(50_000),
        };
        assert_eq!(
            where_time_went(&report),
            "time        seconds  of the run\n\
             learner        12.5         25%\n\
             ema           0.040       0.08%\n\
             the engine    0.005       0.01%\n\
             the run        50.0\n"
        );
    }

    #[test]
    fn evaluations_survive_a_resume() {
        let directory = tempfile::tempdir().unwrap();
        let metrics = |nll: f64| Evaluation {
            metrics: Metrics { values: BTreeMap::from([("eval_nll".to_owned(), nll)]) },
            shown: vec![Completion { prompt: "hi".into(), answer: "ho".into() }],
        };
        let mut first = Evaluations::load(directory.path()).unwrap();
        first.add("evaluation", 0, metrics(2.5)).unwrap();
        first.add("evaluation", 100, metrics(2.25)).unwrap();
        let mut second = Evaluations::load(directory.path()).unwrap();
        second.add("evaluation", 100, metrics(2.25)).unwrap();
        second.add("evaluation", 200, metrics(2.0)).unwrap();
        assert_eq!(
            second.to_text(),
            "evaluation                   before  after 200 updates\n\
             held-out NLL (nats a token)  2.5000             2.0000\n\n"
        );
    }
}
