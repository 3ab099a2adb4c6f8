//! What an evaluation may spend: operations, and data.
//!
//! Rhai counts the operations of its interpreter, each of which may take work in proportion to what it touches: reading a
//! list copies it, searching a text looks at all of it. That work is counted here too, in the same unit, and so is the
//! data that functions make. Counts depend on the expression and its values alone: what is stopped is stopped everywhere.

use std::cell::Cell;

use rhai::Dynamic;

/// Operations one evaluation may take, work on data included.
pub const MAX_OPERATIONS: u64 = 1_000_000;
/// Bytes that the functions of one evaluation may make.
pub const MAX_DATA: u64 = 32 << 20;

/// Bytes of text that can be searched in the time of an operation.
const BYTES_PER_OPERATION: u64 = 256;
/// Items that can be copied in the time of an operation.
const ITEMS_PER_OPERATION: u64 = 64;
/// Items of a list that can be copied in the time of an entry of a mapping.
const ITEMS_PER_ENTRY: usize = 8;
/// Bytes that an item takes in memory, those of its text aside.
const BYTES_PER_ITEM: u64 = 48;

/// How large a value is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Bytes of its texts.
    pub bytes: u64,
    /// Items of its lists, and entries of its mappings, each of which is several.
    pub items: u64,
}

impl Size {
    /// Of a text.
    pub fn text(text: &str) -> Self {
        Size { bytes: text.len() as u64, items: 0 }
    }

    /// Of so many items without texts.
    pub fn items(items: usize) -> Self {
        Size { bytes: 0, items: items as u64 }
    }

    /// Of a value with all that is in it.
    pub fn of(value: &Dynamic) -> Self {
        // Most are numbers, and this is quicker than asking for a reference.
        if !value.is_string() && !value.is_array() && !value.is_map() {
            return Size::default();
        }
        if let Ok(text) = value.as_immutable_string_ref() {
            return Size::text(&text);
        }
        if let Ok(list) = value.as_array_ref() {
            return list.iter().fold(Size::items(list.len()), |size, item| size.and(Size::of(item)));
        }
        if let Ok(map) = value.as_map_ref() {
            return map.values().fold(Size::items(map.len() * ITEMS_PER_ENTRY), |size, item| size.and(Size::of(item)));
        }
        Size::default()
    }

    /// Both together.
    pub fn and(self, other: Size) -> Self {
        Size { bytes: self.bytes + other.bytes, items: self.items + other.items }
    }
}

#[derive(Clone, Copy, Default)]
struct Spent {
    operations: u64,
    data: u64,
}

thread_local! {
    // An evaluation stays on its thread, and none begins within another.
    static SPENT: Cell<Spent> = const { Cell::new(Spent { operations: 0, data: 0 }) };
}

/// A new evaluation has spent nothing yet.
pub fn begin() {
    SPENT.set(Spent::default());
}

/// Data of this size are looked at, or copied.
pub fn work(size: Size) {
    operations(size.bytes / BYTES_PER_OPERATION + size.items / ITEMS_PER_OPERATION);
}

/// Data of this size are made, which is work too.
pub fn make(size: Size) {
    work(size);
    let Spent { operations, data } = SPENT.get();
    SPENT.set(Spent { operations, data: data + size.bytes + size.items * BYTES_PER_ITEM });
}

/// So many operations' time passes in one.
pub fn operations(number: u64) {
    let Spent { operations, data } = SPENT.get();
    SPENT.set(Spent { operations: operations + number, data });
}

/// Why the evaluation must stop after this many operations of the interpreter, if it must.
pub fn exceeded(interpreted: u64) -> Option<String> {
    let Spent { operations, data } = SPENT.get();
    if interpreted + operations > MAX_OPERATIONS {
        return Some(format!("stopped after {MAX_OPERATIONS} operations: an expression must be short"));
    }
    (data > MAX_DATA)
        .then(|| format!("stopped after making {} MiB of data: an expression must be short", MAX_DATA >> 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_count_what_is_inside() {
        let inner: Dynamic = rhai::Array::from(["ab".into(), 1_i64.into()]).into();
        let map: rhai::Map = [("key".into(), inner.clone()), ("other".into(), true.into())].into();
        let list: Dynamic = rhai::Array::from([inner, map.into(), 2.5.into()]).into();
        // 3 items, of which the list has 2 more, and the mapping 2 entries with 2 more in the list that it holds.
        assert_eq!(Size::of(&list), Size { bytes: 4, items: 7 + 2 * ITEMS_PER_ENTRY as u64 });
    }

    #[test]
    fn work_on_data_counts_as_operations() {
        begin();
        assert_eq!(exceeded(MAX_OPERATIONS), None);
        work(Size { bytes: 512, items: 64 });
        assert_eq!(exceeded(MAX_OPERATIONS - 3), None);
        assert!(exceeded(MAX_OPERATIONS - 2).is_some_and(|why| why.starts_with("stopped after 1000000 operations")));
        make(Size { bytes: MAX_DATA + 1, items: 0 });
        assert!(exceeded(0).is_some_and(|why| why.starts_with("stopped after making 32 MiB of data")));
        begin();
        assert_eq!(exceeded(0), None);
    }
}
