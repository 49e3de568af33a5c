//! What is wrong with a configuration, and where: `FILE:LINE:COLUMN: what is wrong; what would be right`.

use serde_saphyr::Location;
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// One thing that is wrong at one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// From 1; 0 where the place is not known.
    pub line: usize,
    /// From 1, in characters; 0 where the place is not known.
    pub column: usize,
    /// The value's name, such as `peers[0].endpoint`; empty for the whole document.
    pub path: String,
    /// What is wrong and what would be right.
    pub message: String,
    /// What is shown of its line, with keys masked.
    quote: String,
    /// Where in `quote` the carets start, and how many.
    caret: usize,
    width: usize,
}

/// Why there is no configuration.
#[derive(Clone, Debug)]
pub enum ConfigError {
    /// The file could not be read at all.
    Unreadable {
        /// Which.
        file: PathBuf,
        /// What is wrong and what would be right.
        message: String,
    },
    /// The file was read and is wrong.
    Wrong {
        /// Which.
        file: PathBuf,
        /// Everything found, in the order of the file.
        problems: Vec<Problem>,
    },
}

impl ConfigError {
    /// Everything found; empty if the file could not be read.
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Unreadable { .. } => &[],
            Self::Wrong { problems, .. } => problems,
        }
    }
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { file, message } => write!(f, "{}: {message}", file.display()),
            Self::Wrong { file, problems } => {
                for (index, problem) in problems.iter().enumerate() {
                    if index > 0 {
                        f.write_str("\n")?;
                    }
                    problem.write(f, file)?;
                }
                Ok(())
            }
        }
    }
}

impl Problem {
    fn write(&self, f: &mut fmt::Formatter<'_>, file: &Path) -> fmt::Result {
        if self.line == 0 {
            return write!(f, "{}: {}", file.display(), self.message);
        }
        let (line, column) = (self.line, self.column);
        write!(f, "{}:{line}:{column}: {}", file.display(), self.message)?;
        let number = line.to_string();
        let gutter = " ".repeat(number.len());
        write!(f, "\n {gutter} |\n {number} | {}", self.quote)?;
        let indent = " ".repeat(self.caret);
        write!(f, "\n {gutter} | {indent}{}", "^".repeat(self.width))
    }
}

/// Nobody reads more, and whoever sends nonsense to the API must not keep us busy.
const MAX_PROBLEMS: usize = 50;

/// Gathers problems while a document is resolved.
pub(super) struct Problems<'a> {
    source: &'a str,
    found: Vec<Problem>,
}

impl<'a> Problems<'a> {
    pub(super) fn new(source: &'a str) -> Self {
        Self {
            source,
            found: Vec::new(),
        }
    }

    pub(super) fn add(
        &mut self,
        at: Location,
        path: impl Into<String>,
        message: impl fmt::Display,
    ) {
        if self.found.len() == MAX_PROBLEMS {
            return;
        }
        let (line, column) = (at.line() as usize, at.column() as usize);
        let source_line = self.source.lines().nth(line.wrapping_sub(1));
        let (quote, caret) = quote(source_line.unwrap_or_default(), column);
        let room = quote.trim_end().chars().count().saturating_sub(caret);
        self.found.push(Problem {
            line,
            column,
            path: path.into(),
            message: masked(&message.to_string()),
            width: (at.span().len() as usize).clamp(1, room.max(1)),
            caret,
            quote,
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// In the order of the file.
    pub(super) fn into_vec(mut self) -> Vec<Problem> {
        self.found
            .sort_by_key(|problem| (problem.line, problem.column));
        self.found
    }
}

/// The part of a line around `column`, fit for a terminal: bounded, no control characters, keys
/// masked; and where `column` is in it, from 0.
fn quote(line: &str, column: usize) -> (String, usize) {
    const CHARS: usize = 160;
    const CHARS_BEFORE: usize = 120;
    let column = column.saturating_sub(1);
    let skipped = column.saturating_sub(CHARS_BEFORE);
    // Masked as a whole: half a key is a secret too.
    let quote = masked(line)
        .chars()
        .skip(skipped)
        .take(CHARS)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    (quote, column - skipped)
}

/// Replaces each run of 32 or more hexadecimal digits, which may be a key, by as many stars.
fn masked(text: &str) -> String {
    const KEY_DIGITS: usize = 32;
    let mut shown = String::with_capacity(text.len());
    let mut run = String::new();
    for c in text.chars().map(Some).chain([None]) {
        if let Some(digit) = c.filter(char::is_ascii_hexdigit) {
            run.push(digit);
            continue;
        }
        match run.len() {
            KEY_DIGITS.. => shown.extend(std::iter::repeat_n('*', run.len())),
            _ => shown.push_str(&run),
        }
        run.clear();
        shown.extend(c);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_never_show_in_a_quoted_line() {
        let line = format!("key: 0x{}, end", "ab".repeat(20));
        assert_eq!(masked(&line), format!("key: 0x{}, end", "*".repeat(40)));
        assert_eq!(masked("spi: 0xc0ffee01"), "spi: 0xc0ffee01");
    }

    #[test]
    fn an_escape_sequence_in_the_file_does_not_reach_the_terminal() {
        assert_eq!(quote("name: \u{1b}[2Jx", 7), ("name:  [2Jx".to_owned(), 6));
    }

    #[test]
    fn a_long_line_is_quoted_around_its_problem_and_no_key_is_cut_in_half() {
        let line = format!("{}{}{}", "x".repeat(500), "ab".repeat(32), "y".repeat(500));
        let (shown, caret) = quote(&line, 565);
        assert_eq!((shown.len(), caret), (160, 120));
        assert!(
            !shown.contains("ab") && shown.contains("x***") && shown.contains("*yy"),
            "{shown}"
        );
    }
}
