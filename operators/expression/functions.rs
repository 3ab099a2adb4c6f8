//! Functions of texts, lists and mappings: all there are, each of which tells the [`budget`] what it costs.
//!
//! Rhai's own packages are left out, as their functions take time and memory that nobody counts.

use std::ops::{Range, RangeInclusive};

use rhai::{Array, Dynamic, Engine, EvalAltResult, ImmutableString, Map, Position};

use super::budget::{self, Size};
use super::{MAX_ITEMS, MAX_TEXT_BYTES, number};

/// Names of functions that expressions over records may call, for messages.
pub const NAMES: &[&str] = &[
    "abs",
    "ceiling",
    "chars",
    "clamp",
    "contains",
    "ends_with",
    "exp",
    "extract",
    "floor",
    "index_of",
    "is_empty",
    "keys",
    "len",
    "log",
    "log1mexp",
    "logsigmoid",
    "max",
    "min",
    "parse_float",
    "parse_int",
    "pop",
    "push",
    "relu",
    "replace",
    "reverse",
    "round",
    "sigmoid",
    "softplus",
    "sort",
    "split",
    "sqrt",
    "square",
    "starts_with",
    "sub_string",
    "tanh",
    "to_float",
    "to_int",
    "to_lower",
    "to_string",
    "to_upper",
    "trim",
    "words",
];

type Fallible<T> = Result<T, Box<EvalAltResult>>;

/// Give texts, lists and mappings their functions.
pub fn register(engine: &mut Engine) {
    engine.register_iterator::<Array>();
    engine.register_iterator::<Range<i64>>();
    engine.register_iterator::<RangeInclusive<i64>>();
    register_texts(engine);
    register_lists(engine);
    for (name, holds) in COMPARISONS {
        engine.register_fn(name, move |left: Dynamic, right: Dynamic| compared(name, holds, &left, &right));
    }
    engine.register_fn("==", |left: Dynamic, right: Dynamic| equal("==", &left, &right));
    engine.register_fn("!=", |left: Dynamic, right: Dynamic| equal("!=", &left, &right).map(|equal| !equal));
}

fn register_texts(engine: &mut Engine) {
    engine.register_fn("len", |text: &str| looked_at(text).chars().count() as i64);
    engine.register_get("len", |text: &mut ImmutableString| looked_at(text).chars().count() as i64);
    engine.register_fn("is_empty", |text: &str| text.is_empty());
    engine.register_fn("contains", |text: &str, part: &str| looked_at(text).contains(part));
    engine.register_fn("starts_with", |text: &str, part: &str| text.starts_with(looked_at(part)));
    engine.register_fn("ends_with", |text: &str, part: &str| text.ends_with(looked_at(part)));
    engine.register_fn("index_of", |text: &str, part: &str| {
        looked_at(text).find(part).map_or(-1, |at| text[..at].chars().count() as i64)
    });
    engine.register_fn("to_lower", |text: &str| made(looked_at(text).to_lowercase()));
    engine.register_fn("to_upper", |text: &str| made(looked_at(text).to_uppercase()));
    engine.register_fn("trim", |text: &str| made(looked_at(text).trim().to_owned()));
    engine.register_fn("replace", |text: &str, from: &str, to: &str| replaced(looked_at(text), from, to));
    engine.register_fn("sub_string", |text: &str, start: i64, len: i64| part_of(text, start, len));
    engine.register_fn("sub_string", |text: &str, start: i64| part_of(text, start, i64::MAX));
    engine.register_fn("words", |text: &str| texts(looked_at(text).split_whitespace()));
    engine.register_fn("split", |text: &str| texts(looked_at(text).split_whitespace()));
    engine.register_fn("split", |text: &str, at: &str| texts(looked_at(text).split(at)));
    engine.register_fn("chars", |text: &str| texts(looked_at(text).split("").filter(|letter| !letter.is_empty())));
    engine.register_fn("+", |left: &str, right: &str| made([looked_at(left), looked_at(right)].concat()));
    engine.register_fn("to_string", |text: ImmutableString| text);
    engine.register_fn("to_string", |number: i64| number.to_string());
    engine.register_fn("to_string", |number: f64| number.to_string());
    engine.register_fn("to_string", |truth: bool| truth.to_string());
}

fn register_lists(engine: &mut Engine) {
    engine.register_fn("len", |list: &mut Array| list.len() as i64);
    engine.register_get("len", |list: &mut Array| list.len() as i64);
    engine.register_fn("is_empty", |list: &mut Array| list.is_empty());
    engine.register_fn("contains", |list: &mut Array, item: Dynamic| Fallible::Ok(position(list, &item)?.is_some()));
    engine.register_fn("index_of", |list: &mut Array, item: Dynamic| {
        Fallible::Ok(position(list, &item)?.map_or(-1, |at| at as i64))
    });
    engine.register_fn("push", |list: &mut Array, item: Dynamic| {
        let size = Size::of(&item).and(Size::items(1));
        let whole = list.iter().fold(size.and(Size::items(list.len())), |size, item| size.and(Size::of(item)));
        if whole.items > MAX_ITEMS as u64 {
            return Err(too_large("Size of list"));
        }
        budget::make(size);
        list.push(item);
        Fallible::Ok(())
    });
    engine.register_fn("pop", |list: &mut Array| list.pop().unwrap_or_default());
    engine.register_fn("reverse", |list: &mut Array| {
        budget::work(Size::items(list.len()));
        list.reverse();
    });
    engine.register_fn("sort", sort);
    engine.register_fn("extract", |list: &mut Array, start: i64, len: i64| {
        let from = usize::try_from(start).map_or(0, |start| start.min(list.len()));
        let most = usize::try_from(len).unwrap_or(0).min(list.len() - from);
        counted(list[from..from + most].to_vec())
    });
    engine.register_fn("+", |left: Array, right: Array| counted([left, right].concat()));
    engine.register_fn("len", |map: &mut Map| map.len() as i64);
    engine.register_fn("is_empty", |map: &mut Map| map.is_empty());
    engine.register_fn("contains", |map: &mut Map, name: &str| map.contains_key(name));
    engine.register_fn("keys", |map: &mut Map| texts(map.keys().map(|key| key.as_str())));
}

/// A text that is gone through.
fn looked_at(text: &str) -> &str {
    budget::work(Size::text(text));
    text
}

/// A text that was made.
fn made(text: String) -> String {
    budget::make(Size::text(&text));
    text
}

/// A list that was made.
fn counted(list: Array) -> Array {
    budget::make(list.iter().fold(Size::items(list.len()), |size, item| size.and(Size::of(item))));
    list
}

/// What Rhai says of a value beyond the limits.
pub fn too_large(what: &str) -> Box<EvalAltResult> {
    EvalAltResult::ErrorDataTooLarge(what.into(), Position::NONE).into()
}

fn texts<'a>(parts: impl Iterator<Item = &'a str>) -> Fallible<Array> {
    let list: Array = parts.take(MAX_ITEMS + 1).map(|part| Dynamic::from(part.to_owned())).collect();
    if list.len() > MAX_ITEMS { Err(too_large("Size of list")) } else { Ok(counted(list)) }
}

fn replaced(text: &str, from: &str, to: &str) -> Fallible<String> {
    let most = text.len().saturating_add(text.matches(from).count().saturating_mul(to.len()));
    if most > MAX_TEXT_BYTES {
        return Err(too_large("Length of text"));
    }
    Ok(made(text.replace(from, to)))
}

/// So many letters of a text from one on.
fn part_of(text: &str, start: i64, len: i64) -> String {
    let count = |number: i64| usize::try_from(number).unwrap_or(0);
    made(looked_at(text).chars().skip(count(start)).take(count(len)).collect())
}

/// Copies of an item that take as long as a comparison.
const COMPARISON: usize = 8;

fn position(list: &[Dynamic], item: &Dynamic) -> Fallible<Option<usize>> {
    budget::work(Size::items(COMPARISON * list.len()));
    for (index, other) in list.iter().enumerate() {
        if equal("==", other, item)? {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

/// Sort numbers, or texts.
fn sort(list: &mut Array) -> Fallible<()> {
    let levels = usize::BITS - list.len().leading_zeros();
    budget::work(Size::items(COMPARISON * list.len() * levels as usize));
    list.iter().for_each(|item| budget::work(Size::of(item)));
    if let Some(numbers) = list.iter().map(number).collect::<Option<Vec<f64>>>() {
        let mut order: Vec<usize> = (0..list.len()).collect();
        order.sort_by(|a, b| numbers[*a].total_cmp(&numbers[*b]));
        *list = order.into_iter().map(|index| list[index].clone()).collect();
        return Ok(());
    }
    let texts = list.iter().map(|item| item.clone().into_immutable_string().ok()).collect::<Option<Vec<_>>>();
    let mut texts = texts.ok_or("`sort` takes numbers, or texts, and not both")?;
    texts.sort();
    *list = texts.into_iter().map(Dynamic::from).collect();
    Ok(())
}

/// What Rhai says where an operator is not there for the types of its operands.
fn no_such(operator: &str, left: &Dynamic, right: &Dynamic) -> Box<EvalAltResult> {
    let signature = format!("{operator} ({}, {})", left.type_name(), right.type_name());
    EvalAltResult::ErrorFunctionNotFound(signature, Position::NONE).into()
}

/// A value that is a text, or a letter of one.
pub fn text_of(value: &Dynamic) -> Option<ImmutableString> {
    let text = || value.clone().into_immutable_string().ok();
    let letter = || value.as_char().ok().map(|letter| letter.to_string().into());
    if value.is_string() { text() } else { letter() }
}

/// Whether two values are the same. Values of different kinds never are, and to compare them is a mistake.
fn equal(operator: &str, left: &Dynamic, right: &Dynamic) -> Fallible<bool> {
    if let (Some(left), Some(right)) = (number(left), number(right)) {
        return Ok(left == right);
    }
    if let (Ok(left), Ok(right)) = (left.as_bool(), right.as_bool()) {
        return Ok(left == right);
    }
    if let (Some(left), Some(right)) = (text_of(left), text_of(right)) {
        return Ok(looked_at(&left) == right.as_str());
    }
    if let (Ok(left), Ok(right)) = (left.as_array_ref(), right.as_array_ref()) {
        if left.len() != right.len() {
            return Ok(false);
        }
        budget::work(Size::items(COMPARISON * left.len()));
        for (left, right) in left.iter().zip(right.iter()) {
            if !equal(operator, left, right)? {
                return Ok(false);
            }
        }
        return Ok(true);
    }
    if left.is_unit() || right.is_unit() {
        return Ok(left.is_unit() && right.is_unit());
    }
    Err(no_such(operator, left, right))
}

type Holds = fn(std::cmp::Ordering) -> bool;

const COMPARISONS: [(&str, Holds); 4] = [
    ("<", std::cmp::Ordering::is_lt),
    ("<=", std::cmp::Ordering::is_le),
    (">", std::cmp::Ordering::is_gt),
    (">=", std::cmp::Ordering::is_ge),
];

fn compared(operator: &str, holds: Holds, left: &Dynamic, right: &Dynamic) -> Fallible<bool> {
    if let (Some(left), Some(right)) = (number(left), number(right)) {
        // Nothing holds of what is not a number.
        return Ok(left.partial_cmp(&right).is_some_and(holds));
    }
    if let (Some(left), Some(right)) = (text_of(left), text_of(right)) {
        return Ok(holds(looked_at(&left).cmp(right.as_str())));
    }
    Err(no_such(operator, left, right))
}
