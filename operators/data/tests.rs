//! Data sets as they are read: what is counted, left out and refused.

use super::*;
use crate::testing::{Harness, all_rows, tiny_tokenizer};

fn load_all(file: &str, change: impl FnOnce(&mut Settings)) -> Result<Loaded, String> {
    load_with_change(file, None, change)
}

fn load_with_change(
    file: &str,
    chat_template: Option<&str>,
    change: impl FnOnce(&mut Settings),
) -> Result<Loaded, String> {
    let tokenizer = tiny_tokenizer();
    let paths = Paths::One(file.into());
    let columns = Columns::default();
    let mut settings = Settings { chat_template, ..all_rows(&paths, &columns, tokenizer.path()) };
    change(&mut settings);
    load(&settings).map_err(|error| error.to_string())
}

fn prompt(row: u64, prompt_ids: &[u32], chosen_ids: &[u32], rejected_ids: Option<&[u32]>) -> Arc<Prompt> {
    let prompt = crate::testing::prompt(row, prompt_ids, chosen_ids, rejected_ids);
    Arc::new(Prompt { source: String::new(), ..prompt })
}

/// Ids by hand, from the vocabulary in `testing`.
#[test]
fn rows_become_tokens_with_one_bos_and_one_eos() {
    let harness = Harness::new();
    let user = r#"{"role": "user", "content": "hi"}"#;
    let a = r#"{"role": "assistant", "content": "a b"}"#;
    let b = r#"{"role": "assistant", "content": "b"}"#;
    let rows = [
        format!(r#"{{"messages": [{user}, {a}]}}"#),
        format!(r#"{{"chosen": [{user}, {a}, {user}, {a}], "rejected": [{user}, {a}, {user}, {b}]}}"#),
        r#"{"prompt": "hi ", "chosen": "a", "rejected": "b </s>"}"#.to_string(),
    ];
    let loaded = load_all(&harness.write("rows.jsonl", &rows.join("\n")), |_| {}).unwrap();
    let expected = [
        prompt(0, &[0, 2, 5, 1, 3], &[6, 7, 1], None),
        prompt(1, &[0, 2, 5, 1, 3, 6, 7, 1, 2, 5, 1, 3], &[6, 7, 1], Some(&[7, 1])),
        prompt(2, &[0, 5], &[6, 1], Some(&[7, 1])),
    ];
    assert_eq!(loaded.rows.all().unwrap(), expected);
    assert_eq!(loaded.report, Report { read: 3, ..Report::default() });
}

const MIXED: &str = r#"{"prompt": "hi", "chosen": "a"}
{"prompt": "hi", "chosen": ""}
{"prompt": "hi hi hi", "chosen": "a"}
{"prompt":
{"prompt": "hi", "chosen": "b"}
"#;

#[test]
fn a_bad_row_stops_with_file_line_and_reason() {
    let harness = Harness::new();
    let file = harness.write("rows.jsonl", MIXED);
    let error = load_all(&file, |_| {}).unwrap_err();
    let expected = format!(
        "2 rows cannot be used (on_error: skip leaves them out):\n  {file}:2: `chosen`: the answer is empty\n  \
         {file}:4: not JSON: EOF while parsing a value (column 10)"
    );
    assert_eq!(error, expected);
}

#[test]
fn bad_and_long_rows_are_counted() {
    let harness = Harness::new();
    let file = harness.write("rows.jsonl", MIXED);
    let change = |settings: &mut Settings| {
        settings.on_error = OnError::Skip;
        settings.max_prompt_tokens = Some(3);
    };
    let loaded = load_all(&file, change).unwrap();
    assert_eq!(loaded.rows.all().unwrap().iter().map(|prompt| prompt.row).collect::<Vec<_>>(), [0, 4]);
    let expected = [
        "5 rows read".to_string(),
        "1 row dropped: prompt over max_prompt_tokens".to_string(),
        format!("2 rows skipped that cannot be used, the first: {file}:2: `chosen`: the answer is empty"),
    ];
    assert_eq!(loaded.report.sentences(), expected);
}

#[test]
fn no_row_left_is_an_error() {
    let harness = Harness::new();
    let file = harness.write("rows.jsonl", "{\"prompt\": \"hi hi\", \"chosen\": \"a\"}");
    let error = load_all(&file, |settings| settings.max_prompt_tokens = Some(1)).unwrap_err();
    let expected = format!("{file}: no row can be used: 1 row read; 1 row dropped: prompt over max_prompt_tokens");
    assert_eq!(error, expected);
}

#[test]
fn training_and_held_out_rows_are_all_rows() {
    let harness = Harness::new();
    let file = harness.write("rows.jsonl", &"{\"prompt\": \"hi\", \"chosen\": \"a\"}\n".repeat(7));
    let rows = |part: Part, limit: Option<usize>| {
        let change = |settings: &mut Settings| (settings.part, settings.limit) = (part, limit);
        let loaded = load_all(&file, change).unwrap();
        assert_eq!(count(&Paths::One(file.clone()), part, limit).unwrap(), loaded.rows.len() as u64);
        Vec::from_iter(loaded.rows.all().unwrap().iter().map(|prompt| prompt.row))
    };
    let (training, held_out) = (Part::Training { hold_out_every: 3 }, Part::HeldOut { hold_out_every: 3 });
    assert_eq!(rows(training, None), [0, 1, 3, 4, 6]);
    assert_eq!(rows(held_out, None), [2, 5]);
    assert_eq!(rows(training, Some(3)), [0, 1, 3]);
}

#[test]
fn a_template_can_be_given() {
    let harness = Harness::new();
    let messages = r#"[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]"#;
    let file = harness.write("rows.json", &format!(r#"[{{"messages": {messages}}}]"#));
    let text = "{% for m in messages %}{{ m.content }} {% endfor %}";
    let template = harness.write("short.jinja", text);
    for given in [text, template.as_str()] {
        let loaded = load_with_change(&file, Some(given), |_| {}).unwrap();
        assert_eq!(loaded.rows.all().unwrap(), [prompt(0, &[0, 5], &[6, 1], None)]);
    }
    let error = load_with_change(&file, Some("missing.jinja"), |_| {}).unwrap_err();
    assert!(error.starts_with("missing.jinja: "), "{error}");
}

/// Loads rows.jsonl with a folder for tokens, whatever its size, and says whether tokens were found there, made, or lost.
fn load_kept(harness: &Harness, columns: &Columns, change: impl FnOnce(&mut Settings)) -> (Loaded, &'static str) {
    let tokenizer = tiny_tokenizer();
    let paths = Paths::One(harness.path("rows.jsonl").display().to_string());
    let mut settings = Settings { on_error: OnError::Skip, ..all_rows(&paths, columns, tokenizer.path()) };
    change(&mut settings);
    let loaded = load_with(&settings, Some(&harness.path("tokens")), 0).unwrap();
    let how = match &loaded.kept {
        Some(kept) if kept.starts_with("tokens of an earlier run") => "found",
        Some(kept) if kept.starts_with("tokens kept for later runs") => "made",
        Some(kept) if kept.starts_with("tokens cannot be kept for later runs") => "lost",
        other => panic!("{other:?}"),
    };
    (loaded, how)
}

fn load_in_memory(file: &str) -> Loaded {
    load_with_change(file, None, |settings| settings.on_error = OnError::Skip).unwrap()
}

#[test]
fn tokens_of_an_earlier_run_are_found_and_the_same() {
    let harness = Harness::new();
    let in_memory = load_in_memory(&harness.write("rows.jsonl", MIXED));
    assert!(matches!(in_memory.rows, Tokens::Memory(_)));
    let (made, how) = load_kept(&harness, &Columns::default(), |_| {});
    assert_eq!(how, "made");
    let (found, how) = load_kept(&harness, &Columns::default(), |_| {});
    assert_eq!(how, "found");
    for loaded in [made, found] {
        assert_eq!(loaded.rows.all().unwrap(), in_memory.rows.all().unwrap());
        assert_eq!((&loaded.report, &loaded.identity), (&in_memory.report, &in_memory.identity));
    }
}

#[test]
fn everything_that_decides_the_tokens_makes_other_ones() {
    let harness = Harness::new();
    harness.write("rows.jsonl", MIXED);
    load_kept(&harness, &Columns::default(), |_| {});
    let changes: [&dyn Fn(&mut Settings); 5] = [
        &|settings| settings.max_prompt_tokens = Some(2),
        &|settings| settings.part = Part::Training { hold_out_every: 3 },
        &|settings| settings.part = Part::HeldOut { hold_out_every: 3 },
        &|settings| settings.limit = Some(ROWS_AT_A_TIME),
        &|settings| settings.chat_template = Some("{{ messages }}"),
    ];
    for (number, change) in changes.iter().enumerate() {
        assert_eq!(load_kept(&harness, &Columns::default(), change).1, "made", "change {number}");
        assert_eq!(load_kept(&harness, &Columns::default(), change).1, "found", "change {number}");
    }
    let renamed = Columns { prompt: Some("chosen".into()), ..Columns::default() };
    assert_eq!(load_kept(&harness, &renamed, |_| {}).1, "made");
    harness.write("rows.jsonl", &MIXED.replace("hi hi hi", "hi"));
    let (loaded, how) = load_kept(&harness, &Columns::default(), |_| {});
    assert_eq!((how, loaded.rows.row(1).unwrap().prompt_ids.len()), ("made", 2));
}

#[test]
fn a_damaged_file_is_made_anew() {
    let harness = Harness::new();
    harness.write("rows.jsonl", MIXED);
    let (made, _) = load_kept(&harness, &Columns::default(), |_| {});
    let Tokens::File(file) = &made.rows else { panic!("expected a file") };
    std::fs::write(file.path(), "cut off").unwrap();
    assert_eq!(load_kept(&harness, &Columns::default(), |_| {}).1, "made");
    assert_eq!(load_kept(&harness, &Columns::default(), |_| {}).1, "found");
}

/// A folder in the file's place cannot be replaced by it, as a full disk cannot take it.
#[test]
fn rows_are_in_memory_where_their_tokens_cannot_be_written() {
    let harness = Harness::new();
    let in_memory = load_in_memory(&harness.write("rows.jsonl", MIXED));
    let (made, _) = load_kept(&harness, &Columns::default(), |_| {});
    let Tokens::File(file) = &made.rows else { panic!("expected a file") };
    std::fs::remove_file(file.path()).unwrap();
    std::fs::create_dir(file.path()).unwrap();
    let (loaded, how) = load_kept(&harness, &Columns::default(), |_| {});
    assert!(matches!(loaded.rows, Tokens::Memory(_)));
    assert_eq!(how, "lost");
    assert_eq!(loaded.rows.all().unwrap(), in_memory.rows.all().unwrap());
    assert_eq!((&loaded.report, &loaded.identity), (&in_memory.report, &in_memory.identity));
    assert_eq!(std::fs::read_dir(harness.path("tokens")).unwrap().count(), 1);
}

#[test]
fn rows_that_cannot_be_used_leave_no_file() {
    let harness = Harness::new();
    let file = harness.write("rows.jsonl", MIXED);
    let (tokenizer, paths, columns) = (tiny_tokenizer(), Paths::One(file), Columns::default());
    let settings = all_rows(&paths, &columns, tokenizer.path());
    load_with(&settings, Some(&harness.path("tokens")), 0).unwrap_err();
    assert_eq!(std::fs::read_dir(harness.path("tokens")).unwrap().count(), 0);
}

/// What ends an answer may stand in a model's configuration alone.
#[test]
fn configurations_are_among_the_files_of_a_tokenizer() {
    let tokenizer = tiny_tokenizer();
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        std::fs::write(tokenizer.path().join(name), "{}").unwrap();
    }
    let found = tokenizer_files(tokenizer.path());
    let expected = ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"];
    assert_eq!(found, expected.map(|name| tokenizer.path().join(name)));
}
