//! What an operator finds on its inputs at a step, and what it puts on its outputs.

use std::sync::Arc;

use crate::record::{Batch, Metrics, Pair, Prompt, Record, Retraction, Sample, Weights};

/// The records of one step, by input port.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    ports: Vec<(&'static str, Vec<Record>)>,
}

impl Inputs {
    /// Inputs holding these records.
    pub fn new(ports: Vec<(&'static str, Vec<Record>)>) -> Self {
        Inputs { ports }
    }

    /// Take all records of a port, in order; none where it is unconnected.
    pub fn take(&mut self, port: &str) -> Vec<Record> {
        self.ports
            .iter_mut()
            .find(|(name, _)| *name == port)
            .map(|(_, records)| std::mem::take(records))
            .unwrap_or_default()
    }

    /// Take the retractions of a port, and leave its other records. They concern earlier steps: apply them first.
    pub fn retractions(&mut self, port: &str) -> Vec<Retraction> {
        let mut retractions = Vec::new();
        if let Some((_, records)) = self.ports.iter_mut().find(|(name, _)| *name == port) {
            records.retain(|record| match record {
                Record::Retraction(retraction) => {
                    retractions.push(retraction.clone());
                    false
                }
                _ => true,
            });
        }
        retractions
    }

    /// Take the prompts of a port.
    pub fn prompts(&mut self, port: &str) -> Vec<Arc<Prompt>> {
        self.take(port)
            .into_iter()
            .filter_map(|record| if let Record::Prompt(prompt) = record { Some(prompt) } else { None })
            .collect()
    }

    /// Take the samples of a port.
    pub fn samples(&mut self, port: &str) -> Vec<Arc<Sample>> {
        self.take(port)
            .into_iter()
            .filter_map(|record| if let Record::Sample(sample) = record { Some(sample) } else { None })
            .collect()
    }

    /// Take the pairs of a port.
    pub fn pairs(&mut self, port: &str) -> Vec<Arc<Pair>> {
        self.take(port)
            .into_iter()
            .filter_map(|record| if let Record::Pair(pair) = record { Some(pair) } else { None })
            .collect()
    }

    /// Take the batches of a port.
    pub fn batches(&mut self, port: &str) -> Vec<Arc<Batch>> {
        self.take(port)
            .into_iter()
            .filter_map(|record| if let Record::Batch(batch) = record { Some(batch) } else { None })
            .collect()
    }

    /// Take the newest weights of a port.
    pub fn weights(&mut self, port: &str) -> Option<Weights> {
        self.take(port)
            .into_iter()
            .rev()
            .find_map(|record| if let Record::Weights(weights) = record { Some(weights) } else { None })
    }

    /// Take the metrics of a port, one set for each edge that sent one.
    pub fn metrics(&mut self, port: &str) -> Vec<Arc<Metrics>> {
        self.take(port)
            .into_iter()
            .filter_map(|record| if let Record::Metrics(metrics) = record { Some(metrics) } else { None })
            .collect()
    }
}

/// What an operator emits at one step, by output port.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    /// Records in order of emission, each with its port.
    pub records: Vec<(&'static str, Record)>,
}

impl Outputs {
    /// Nothing emitted yet.
    pub fn new() -> Self {
        Outputs::default()
    }

    /// Emit a record on a port.
    pub fn push(&mut self, port: &'static str, record: Record) {
        self.records.push((port, record));
    }
}
