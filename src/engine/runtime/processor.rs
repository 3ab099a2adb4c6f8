//! Processor time of threads: what the engine itself takes is told by it, since time on a clock counts others' work too.

use std::time::Duration;

/// Processor time that the calling thread has had since it began.
pub fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // Safety: the pointer is to a timespec of ours. The call fails only for clocks that there are not.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_that_of_this_thread_alone() {
        let before = thread_time();
        std::thread::spawn(|| while thread_time() < Duration::from_millis(50) {}).join().expect("it ends");
        let slept = thread_time() - before;
        while thread_time() < before + slept + Duration::from_millis(20) {}
        assert!(slept < Duration::from_millis(50), "another thread's time counts: {slept:?}");
    }
}
