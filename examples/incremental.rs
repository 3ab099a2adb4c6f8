//! How much work one insertion makes for the relational operators: the records that their functions look at, with 1000,
//! 10,000 and 100,000 rows already there. Work is proportional to the change, not to the rows.
//!
//! ```sh
//! cargo run --release --example incremental
//! ```

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use differential_dataflow::input::InputSession;
use sapo_flow_engine::operator::config_of;
use sapo_flow_engine::record::{Record, Sample};
use sapo_flow_engine::relation::{Arrival, Element};
use sapo_flow_operators::relational::{
    Shape, antijoin::Antijoin, best_worst::BestWorst, count_by::CountBy, distinct::Distinct, join::Join,
    records_touched, semijoin::Semijoin, top_k::TopK, window::Window,
};
use timely::dataflow::operators::probe::Handle;

/// Samples of each prompt.
const GROUP: u64 = 10;

/// The n-th sample, with a score of its own. Of two inputs, every tenth sample arrives at the second.
fn element(n: u64, inputs: usize) -> Element {
    let row = n / GROUP;
    let score = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) as f64 / u64::MAX as f64;
    let sample = Sample {
        step: 0,
        position: n as u32,
        origin: "samples".into(),
        source: "prompts".into(),
        row,
        prompt_ids: vec![row as u32],
        response_ids: vec![n as u32],
        weights_version: None,
        seed: None,
        values: [("score".to_owned(), score)].into(),
    };
    let port = u32::from(inputs > 1 && n.is_multiple_of(GROUP));
    Element { arrival: Arrival { step: 0, port, index: n as u32 }, record: Record::Sample(Arc::new(sample)) }
}

/// Records looked at for one insertion among so many rows, and results that came or went.
fn one_insertion<S: Shape>(with: &str, rows: u64) -> (u64, u64) {
    let with: serde_yaml::Value = serde_yaml::from_str(with).expect("this program's own YAML");
    timely::execute_directly(move |worker| {
        let config: S::Config = config_of(&with).expect("this program's own configuration");
        let probe = Handle::new();
        let changed = Rc::new(Cell::new(0));
        let mut input = InputSession::<u64, Element, isize>::new();
        worker.dataflow::<u64, _, _>(|scope| {
            let count = changed.clone();
            let results = S::relate(&config, input.to_collection(scope));
            results.consolidate().inspect(move |_| count.set(count.get() + 1)).probe_with(&probe);
        });
        let mut at_step = |step: u64, numbers: std::ops::Range<u64>| {
            let (touched, before) = (records_touched(), changed.get());
            numbers.for_each(|n| input.insert(element(n, S::INPUTS.len())));
            input.advance_to(step + 1);
            input.flush();
            worker.step_while(|| probe.less_than(&(step + 1)));
            (records_touched() - touched, changed.get() - before)
        };
        at_step(0, 0..rows - 1);
        at_step(1, rows - 1..rows)
    })
}

fn main() {
    println!("| operator | looked at with 1000 rows | 10,000 | 100,000 | results that changed |");
    println!("|---|---|---|---|---|");
    type Measure = fn(&str, u64) -> (u64, u64);
    let operators: [(&str, &str, Measure); 8] = [
        ("window", "steps: 5", one_insertion::<Window>),
        ("distinct", "by: row", one_insertion::<Distinct>),
        ("count_by", "by: row", one_insertion::<CountBy>),
        ("top_k", "{k: 10, score: values.score}", one_insertion::<TopK>),
        ("join", "by: row", one_insertion::<Join>),
        ("semijoin", "by: row", one_insertion::<Semijoin>),
        ("antijoin", "by: row", one_insertion::<Antijoin>),
        ("best_worst", "{score: values.score, candidates: 4}", one_insertion::<BestWorst>),
    ];
    for (name, with, measure) in operators {
        let [small, middle, large] = [1_000, 10_000, 100_000].map(|rows| measure(with, rows));
        let looked_at = format!("{} | {} | {}", small.0, middle.0, large.0);
        println!("| `{name}` | {looked_at} | {}, {}, {} |", small.1, middle.1, large.1);
    }
}
