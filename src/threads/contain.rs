//! User code, and what becomes of its panics.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Runs user code; a panic comes back as its message.
pub(crate) fn contained<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).map_err(panic_message)
}

/// The delay that a user's function should have given is the default one.
pub(crate) fn tell_backoff_panic(panic: &str) {
    log::error!(target: "broadsock", "the back-off function panicked: {panic}");
}

/// A panic that ends its thread instead of being contained: how tests kill a
/// worker.
#[derive(Debug)]
pub(crate) struct Kill;

/// Runs user code on a supervised worker; a panic comes back as its message.
pub(crate) fn contained_user<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    let mut killed = Killed::default();
    let result = killed.contain(run);
    killed.die();
    result
}

/// A kill that waits until its thread has finished what must not stay half done.
#[derive(Default)]
pub(crate) struct Killed(Option<Box<dyn Any + Send>>);

impl Killed {
    /// Runs user code; a panic comes back as its message, also that of a kill.
    pub(crate) fn contain<T>(&mut self, run: impl FnOnce() -> T) -> Result<T, String> {
        catch_unwind(AssertUnwindSafe(run)).map_err(|payload| {
            if payload.is::<Kill>() {
                self.0 = Some(payload);
                return "the thread is killed".to_owned();
            }
            panic_message(payload)
        })
    }

    /// Ends the thread if it was killed.
    #[inline]
    pub(crate) fn die(self) {
        if let Some(payload) = self.0 {
            resume_unwind(payload);
        }
    }
}

/// The message of a panic. Dropping what a user panicked with may panic too.
pub(crate) fn panic_message(payload: Box<dyn Any + Send>) -> String {
    let text = panic_text(&*payload);
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(again);
    }
    text
}

/// The message of a panic.
pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else if payload.is::<Kill>() {
        "killed by a test".to_owned()
    } else {
        "a panic without a message".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            std::panic::panic_any(Bomb);
        }
    }

    #[test]
    fn a_panic_whose_payload_panics_is_contained_too() {
        let end = contained(|| std::panic::panic_any(Bomb));
        assert_eq!(end, Err::<(), _>("a panic without a message".to_owned()));
    }
}
