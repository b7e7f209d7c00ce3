//! [`Clock`]: how the blocking calls of a control thread tell the time and wait.

/// Time for the calls that wait. Everything that does not wait takes the time as an argument.
pub trait Clock {
    /// Nanoseconds since some fixed moment; never runs backwards.
    fn now(&mut self) -> u64;

    /// Lets a little time pass: sleeps for some microseconds, or, on one thread with a model,
    /// turns the model and moves the virtual time.
    fn pause(&mut self);
}
