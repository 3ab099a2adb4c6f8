//! Work on long tensors in blocks.
//!
//! On a CPU threads share out the elements, and each takes its own in blocks that stay in its core's cache while
//! elementwise operations pass over them in place: memory is worked through once. On other devices blocks bound what
//! operations with results in memory of their own take besides.

use tch::{Device, no_grad};

use crate::Result;

/// Elements that a thread works on at a time: four such blocks of f32 fit a core's cache, and libtorch, which divides
/// longer ones among threads of its own, leaves them whole.
const CPU_BLOCK: i64 = 1 << 15;
/// Elements at a time on another device: 64 MiB of f32, which keeps it busy for longer than it takes to ask.
pub(crate) const DEVICE_BLOCK: i64 = 1 << 24;
/// Blocks begin at multiples of so many elements.
const ALIGNMENT: i64 = 256;

/// Flat tensors of equal length that are worked on together.
pub(crate) trait Blockwise: Sized + Send {
    /// How long they are.
    fn elements(&self) -> i64;
    /// A view of `length` elements from `start` on.
    fn narrow(&self, start: i64, length: i64) -> Result<Self>;
}

/// Do the work on every block of all of these, without gradients. Blocks begin at multiples of 256 elements.
pub(crate) fn in_blocks<B: Blockwise>(
    device: Device,
    wholes: Vec<B>,
    work: impl Fn(B) -> Result<()> + Sync,
) -> Result<()> {
    let (threads, block) = match device {
        Device::Cpu => (tch::get_num_threads().max(1) as i64, CPU_BLOCK),
        _ => (1, DEVICE_BLOCK),
    };
    let mut shares: Vec<Vec<B>> = (0..threads).map(|_| Vec::new()).collect();
    for whole in &wholes {
        let share = (whole.elements() as u64).div_ceil(threads as u64).next_multiple_of(ALIGNMENT as u64);
        for (shares, (start, length)) in shares.iter_mut().zip(spans(whole.elements(), share as i64)) {
            shares.push(whole.narrow(start, length)?);
        }
    }
    in_parallel(shares, |share| {
        for part in share {
            for (start, length) in spans(part.elements(), block) {
                work(part.narrow(start, length)?)?;
            }
        }
        Ok(())
    })
}

/// Start and length of every span of at most `length` among so many elements, or rows.
pub(crate) fn spans(elements: i64, length: i64) -> impl Iterator<Item = (i64, i64)> {
    let length = length.max(1);
    (0..elements).step_by(length as usize).map(move |start| (start, length.min(elements - start)))
}

/// Do the work on every share, each on a thread of its own; a single one on this thread.
fn in_parallel<B: Send>(shares: Vec<Vec<B>>, work: impl Fn(Vec<B>) -> Result<()> + Sync) -> Result<()> {
    let work = |share| no_grad(|| work(share));
    if shares.len() == 1 {
        return shares.into_iter().try_for_each(work);
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = shares.into_iter().map(|share| scope.spawn(|| work(share))).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Numbers(i64, i64);

    impl Blockwise for Numbers {
        fn elements(&self) -> i64 {
            self.1
        }

        fn narrow(&self, start: i64, length: i64) -> Result<Self> {
            assert!(start + length <= self.1);
            Ok(Numbers(self.0 + start, length))
        }
    }

    #[test]
    fn blocks_are_aligned_and_cover_everything_once() {
        for (threads, elements) in [(1, 0), (1, 100_000), (3, 1), (3, 255), (3, 100_000), (2, 65_536)] {
            tch::set_num_threads(threads);
            let found = Mutex::new(Vec::new());
            let work = |Numbers(start, length)| {
                found.lock().expect("no thread panicked").push((start, length));
                Ok(())
            };
            in_blocks(Device::Cpu, vec![Numbers(0, elements)], work).unwrap();
            let mut found = found.into_inner().unwrap();
            found.sort();
            let mut end = 0;
            for (start, length) in found {
                assert!(start == end && start % ALIGNMENT == 0 && (1..=CPU_BLOCK).contains(&length));
                end += length;
            }
            assert_eq!(end, elements);
        }
    }
}
