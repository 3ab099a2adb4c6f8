//! Work that a CUDA device records once and launches again as a whole, without the host's time for each of its parts.

use std::ffi::{c_char, c_void};
use std::ptr::{self, NonNull};

use tch::Device;

use super::check;
use crate::{Error, Result, device};

unsafe extern "C" {
    fn sapo_graph_begin(device: i64, graph: *mut *mut c_void) -> *mut c_char;
    fn sapo_graph_end(graph: *mut c_void) -> *mut c_char;
    fn sapo_graph_replay(graph: *mut c_void) -> *mut c_char;
    fn sapo_graph_free(graph: *mut c_void) -> *mut c_char;
}

/// A CUDA graph: kernels with the places in memory that they read and write.
#[derive(Debug)]
pub struct Graph(NonNull<c_void>);

impl Graph {
    /// Records what `work` launches on a CUDA device. None of it is done: tensors that it returns get their contents with
    /// the first [`replay`](Self::replay). What it reads must outlive the graph, in the same place; it must not wait for the
    /// device, or bring anything from the host. Done once before, it finds the libraries' handles and kernels loaded.
    ///
    /// Graphs that a thread records on a device share memory: what comes of a replay is to be copied before another graph
    /// is replayed, and none may be while another is at work.
    ///
    /// # Errors
    /// Those of `work`, among them that something cannot be recorded; and when the device is none of CUDA's.
    pub fn record<T>(device: Device, work: impl FnOnce() -> Result<T>) -> Result<(Self, T)> {
        let Device::Cuda(index) = device else {
            let name = device::name(device);
            return Err(Error::Argument(format!("CUDA graphs: expected a CUDA device, found {name}")));
        };
        let mut graph = ptr::null_mut();
        // Safety: the handle is written on success, and valid until it is freed; here and below.
        check(unsafe { sapo_graph_begin(index as i64, &mut graph) })?;
        let graph =
            NonNull::new(graph).map(Graph).ok_or_else(|| Error::Argument("CUDA graphs: none was made".into()))?;
        let made = work();
        let ended = check(unsafe { sapo_graph_end(graph.0.as_ptr()) });
        let made = made?;
        ended?;
        Ok((graph, made))
    }

    /// Does what was recorded, on this thread's stream.
    pub fn replay(&self) -> Result<()> {
        check(unsafe { sapo_graph_replay(self.0.as_ptr()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Err(error) = check(unsafe { sapo_graph_free(self.0.as_ptr()) }) {
            tracing::warn!("a CUDA graph could not be freed: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_records_nothing() {
        let error = Graph::record(Device::Cpu, || Ok(())).unwrap_err().to_string();
        assert_eq!(error, "CUDA graphs: expected a CUDA device, found cpu");
    }
}
