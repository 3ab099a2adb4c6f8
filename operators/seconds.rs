//! Waits and time limits that settings give in seconds.

/// The longest, some thirty years: a clock need not know of times much further away.
pub const LONGEST: f64 = 1e9;

/// What is wrong with a time limit; nothing where it can be kept.
pub fn limit_issue(seconds: f64) -> Option<String> {
    match seconds {
        _ if seconds > LONGEST => Some(format!("expected at most {LONGEST} seconds, found {seconds}")),
        _ if seconds > 0.0 => None,
        _ => Some(format!("expected a number of seconds above 0, found {seconds}")),
    }
}

/// What is wrong with a wait, which may be none at all.
pub fn wait_issue(seconds: f64) -> Option<String> {
    match seconds {
        _ if seconds > LONGEST => limit_issue(seconds),
        _ if seconds >= 0.0 => None,
        _ => Some(format!("expected a number of seconds, 0 or more, found {seconds}")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn what_is_accepted_can_be_waited_for() {
        for seconds in [1e-300, 0.5, LONGEST] {
            assert_eq!((limit_issue(seconds), wait_issue(seconds)), (None, None));
            assert!(Instant::now().checked_add(Duration::from_secs_f64(seconds)).is_some());
        }
        assert_eq!((limit_issue(0.0).is_some(), wait_issue(0.0)), (true, None));
        for seconds in [-1.0, f64::NAN, 1e10, 1e19, f64::INFINITY] {
            assert!(limit_issue(seconds).is_some() && wait_issue(seconds).is_some(), "{seconds}");
        }
    }
}
