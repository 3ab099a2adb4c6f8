//! Streams: the queues in which a CUDA device does what threads ask of it.
//!
//! libtorch's threads all send their work to a device's default stream, where it is done in the order of asking: two nodes on one
//! GPU never work at a time. A thread that wants to ([`begin`]) has a stream of its own on each device that it enters. Then
//! nothing orders its work after that of other threads but [`finish`]: who hands a tensor on finishes first, and who has read
//! one that another thread may write to, or free, finishes before letting go of it. Memory that a thread frees is free for
//! tensors of the stream that it was made in, and only when a device has none left for those of others.

use std::cell::RefCell;
use std::ffi::c_char;

use tch::Device;

use super::check;
use crate::Result;

unsafe extern "C" {
    fn sapo_device_enter(index: i64) -> *mut c_char;
    fn sapo_stream_take(index: i64) -> *mut c_char;
    fn sapo_stream_finish(index: i64) -> *mut c_char;
}

/// A thread's streams.
#[derive(Default)]
struct Streams {
    /// Whether the thread is to have its own.
    wanted: bool,
    /// Devices of CUDA on which it has one.
    on: Vec<usize>,
}

thread_local! {
    static STREAMS: RefCell<Streams> = RefCell::default();
}

/// Says whether the calling thread takes a stream of its own on each device that it [`enter`]s from now on.
pub fn begin(own: bool) {
    STREAMS.with_borrow_mut(|streams| streams.wanted = own);
}

/// Makes a device the calling thread's current one, for what libtorch makes of a GPU without being told which. Nothing for
/// other devices.
///
/// # Errors
/// When there is no such device.
pub fn enter(device: Device) -> Result<()> {
    let Device::Cuda(index) = device else { return Ok(()) };
    // Safety: only numbers go there; here and below.
    check(unsafe { sapo_device_enter(index as i64) })?;
    STREAMS.with_borrow_mut(|streams| {
        if streams.wanted && !streams.on.contains(&index) {
            check(unsafe { sapo_stream_take(index as i64) })?;
            streams.on.push(index);
        }
        Ok(())
    })
}

/// Waits until the calling thread's own streams are empty. Nothing for a thread that has none: the default stream keeps order.
///
/// # Errors
/// Those of anything asked of a device before, which are often told only now. All streams are waited for all the same.
pub fn finish() -> Result<()> {
    STREAMS.with_borrow(|streams| {
        let waited = streams.on.iter().map(|index| wait_for(Device::Cuda(*index)));
        waited.fold(Ok(()), Result::and)
    })
}

/// Waits until a device has done what the calling thread sent it: to tell how long that took, one has to. Nothing for devices
/// that are not CUDA's, which are done when they return.
///
/// # Errors
/// Those of anything asked of the device before.
pub fn wait_for(device: Device) -> Result<()> {
    match device {
        Device::Cuda(index) => check(unsafe { sapo_stream_finish(index as i64) }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device;

    #[test]
    fn without_a_gpu_there_is_nothing_to_wait_for_and_entering_one_is_an_error() {
        begin(true);
        enter(Device::Cpu).unwrap();
        finish().unwrap();
        if device::parse("cuda").is_err() {
            enter(Device::Cuda(0)).unwrap_err();
            // What failed is not waited for.
            finish().unwrap();
        }
    }
}
