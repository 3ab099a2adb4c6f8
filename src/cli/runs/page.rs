//! Tables for terminals and for pages.

use serde_json::Value;

use crate::cli::args::PageFormat;
use crate::cli::report;

/// Rows, the first of which has the heads, as text or as markdown.
pub fn rows(rows: &[Vec<String>], format: PageFormat) -> String {
    match format {
        PageFormat::Markdown => markdown(rows),
        PageFormat::Text | PageFormat::Json => report::table(rows),
    }
}

fn markdown(rows: &[Vec<String>]) -> String {
    let line = |cells: &Vec<String>| {
        let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|").replace('\n', " ")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        text += &line(row);
        if index == 0 {
            text += &format!("|{}\n", "---|".repeat(row.len()));
        }
    }
    text
}

/// A value of a parameter on one line, texts without quotes.
pub fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), |text| text.replace('\n', " "))
}
