//! From a file to a [`Document`]: reading, the limits against YAML bombs, and errors of form.

use super::{
    document::{Document, StaticSaDocument},
    problem::{ConfigError, Problem, Problems},
};
use serde::de::DeserializeOwned;
use serde_saphyr::{Error, Location, Options, UserMessageFormatter};
use std::{fs::File, io::Read, path::Path};
use zeroize::Zeroizing;

/// Thousands of peers fit; nothing larger is a configuration.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// The document itself is six deep.
const MAX_DEPTH: usize = 16;

/// Reads a bounded UTF-8 file. It may hold keys, so the text is wiped on drop.
pub(super) fn read(file: &Path) -> Result<Zeroizing<String>, ConfigError> {
    let unreadable = |message: String| ConfigError::Unreadable {
        file: file.to_owned(),
        message,
    };
    let cannot =
        |error: std::io::Error| unreadable(format!("cannot read the configuration: {error}"));
    let opened = File::open(file).map_err(cannot)?;
    if opened.metadata().map_err(cannot)?.is_dir() {
        return Err(unreadable(
            "this is a directory; name the configuration file in it".into(),
        ));
    }
    let mut bytes = Zeroizing::new(Vec::new());
    opened
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(cannot)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(unreadable(format!(
            "the file is larger than {} MiB; this can be no configuration",
            MAX_FILE_BYTES >> 20
        )));
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(Zeroizing::new(text.to_owned())),
        Err(error) => {
            let line = 1 + bytes[..error.valid_up_to()]
                .iter()
                .filter(|byte| **byte == b'\n')
                .count();
            Err(unreadable(format!(
                "not UTF-8 at byte {} (line {line}); save the file as UTF-8",
                error.valid_up_to()
            )))
        }
    }
}

/// A whole configuration.
pub(super) fn parse(file: &Path, text: &str) -> Result<Document, ConfigError> {
    let wrong = |problems| ConfigError::Wrong {
        file: file.to_owned(),
        problems,
    };
    if text
        .lines()
        .all(|line| matches!(line.trim(), "" | "---") || line.trim_start().starts_with('#'))
    {
        let mut problems = Problems::new(text);
        problems.add(
            Location::UNKNOWN,
            "",
            "the file holds no settings; at least `name` and `interface` are needed",
        );
        return Err(wrong(problems.into_vec()));
    }
    bounded(text).map_err(wrong)
}

/// The body of a request for one static SA: JSON, which is YAML as well.
pub(super) fn parse_static_sa(text: &str) -> Result<StaticSaDocument, Vec<Problem>> {
    bounded(text)
}

fn bounded<T: DeserializeOwned>(text: &str) -> Result<T, Vec<Problem>> {
    serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
        let mut problems = Problems::new(text);
        let at = error.location().unwrap_or(Location::UNKNOWN);
        problems.add(at, "", explain(&error));
        problems.into_vec()
    })
}

fn options() -> Options {
    serde_saphyr::options! {
        with_snippet: false,
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_nodes: 500_000,
            max_events: 1_000_000,
            max_aliases: 1_000,
            max_anchors: 100,
            max_documents: 2,
            max_merge_keys: 100,
            max_total_scalar_bytes: MAX_FILE_BYTES as usize,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 100_000,
            max_replay_stack_depth: 8,
        },
    }
}

/// The parser's errors in the words of a configuration's author.
fn explain(error: &Error) -> String {
    match error.without_snippet() {
        Error::SerdeUnknownField {
            field, expected, ..
        } => {
            let nearest = expected.iter().min_by_key(|name| edits(field, name));
            match nearest {
                Some(name) if edits(field, name) <= 1 + field.len() / 4 => {
                    format!("unknown key `{field}`; did you mean `{name}`?")
                }
                _ => format!("unknown key `{field}`; known here: {}", expected.join(", ")),
            }
        }
        Error::SerdeMissingField { field, .. } => {
            format!("the key `{field}` is missing here; add `{field}: …`")
        }
        Error::DuplicateMappingKey { key, .. } => match key {
            Some(key) => format!("the key `{key}` stands here a second time; keep one"),
            None => "this key stands here a second time; keep one".to_owned(),
        },
        Error::MultipleDocuments { .. } => {
            "a second YAML document starts here; a configuration is one document".to_owned()
        }
        Error::Unexpected { expected, .. } => expectation(expected),
        Error::InvalidScalar { ty, .. } => expectation(ty),
        Error::NullIntoString { .. } => "the value is missing here; write one".to_owned(),
        Error::UnknownAnchor { .. } => {
            "this alias has no anchor; quote the text if it shall start with `*`".to_owned()
        }
        Error::Budget { .. }
        | Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. } => format!(
            "too deep, too large or too many aliases for a configuration ({})",
            text_of(error)
        ),
        other => match text_of(other) {
            text if text.contains("tab") => format!("{text}; YAML is indented with spaces only"),
            text => text,
        },
    }
}

/// What should stand there, by the parser's name for it.
fn expectation(expected: &str) -> String {
    match expected {
        "string scalar" => "a single value is expected here, no list and no keys".to_owned(),
        "sequence start" => {
            "a list is expected here; write [A, B], or lines that start with `-`".to_owned()
        }
        "mapping start" => "keys with values are expected here; write KEY: VALUE".to_owned(),
        "boolean" => "use true or false here".to_owned(),
        "u64" => "a whole number of at least 0 is expected here".to_owned(),
        other => format!("expected {other} here"),
    }
}

/// The parser's own words, without the place, which is printed in front already.
fn text_of(error: &Error) -> String {
    use serde_saphyr::MessageFormatter;
    UserMessageFormatter
        .format_message(error.without_snippet())
        .into_owned()
}

/// Levenshtein's distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
