//! OpenMP's threads, with which operators' libraries compute.
//!
//! Every thread that calls such a library has a team of its own, which stays. Where teams have more threads than there are
//! cores, GNU's OpenMP lets waiting threads sleep at once instead of spinning for a moment, since they might be in each other's
//! way, and every division of work waits for the kernel. With the teams of other nodes asleep, generating with SmolLM2 on two
//! cores took 1.25 times as long in float32, and 1.5 times in bfloat16. So a team ends with each call of its node.

use std::ffi::c_int;
use std::sync::OnceLock;

/// `omp_pause_soft` of OpenMP 5.0, section 3.7.4: the runtime's own settings are kept.
const SOFT: c_int = 1;

/// Ends the calling thread's team; the next call that divides work makes another, in tens of microseconds. Nothing where
/// there is no OpenMP.
pub fn release_team() {
    static PAUSE: OnceLock<Option<unsafe extern "C" fn(c_int) -> c_int>> = OnceLock::new();
    let pause = PAUSE.get_or_init(|| {
        // Safety: OpenMP gives the function of this name that type.
        unsafe {
            let found = libc::dlsym(libc::RTLD_DEFAULT, c"omp_pause_resource_all".as_ptr());
            std::mem::transmute::<*mut libc::c_void, Option<unsafe extern "C" fn(c_int) -> c_int>>(found)
        }
    });
    if let Some(pause) = pause {
        // Safety: nothing of OpenMP is under way on this thread. It fails without effect.
        unsafe { pause(SOFT) };
    }
}
