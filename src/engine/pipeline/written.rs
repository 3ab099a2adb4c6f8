//! What nodes write into the run directory: each has a place of its own.

use std::path::PathBuf;

use serde_yaml::Value;

use super::diagnostic::Report;
use super::wiring::Draft;

/// Report nodes that write where one before them writes, or inside of what it writes.
pub(crate) fn check(drafts: &[Draft], report: &mut Report) {
    let mut taken: Vec<(PathBuf, usize)> = Vec::new();
    for (index, draft) in drafts.iter().enumerate() {
        let Some(op) = draft.op.as_ref().filter(|_| draft.config_is_valid) else { continue };
        let config = draft.with.as_ref().map_or(Value::Null, |with| with.value.to_value());
        let writes = (op.writes)(&config, &draft.name);
        let clash = writes.iter().find_map(|path| {
            let (other, by) = taken.iter().find(|(other, _)| path.starts_with(other) || other.starts_with(path))?;
            Some((if other.starts_with(path) { path } else { other }, &drafts[*by]))
        });
        if let Some((place, by)) = clash {
            let message =
                format!("`{}` and `{}` both write `{}` of the run directory", by.name, draft.name, place.display());
            let note = format!("`{}` is at {}", by.name, report.place(by.span));
            report.set_context(&draft.uses);
            report.error(draft.span, message).note(note).help("give one of them another name, or another `file`");
        }
        taken.extend(writes.into_iter().map(|path| (path, index)));
    }
    report.set_context(&[]);
}
