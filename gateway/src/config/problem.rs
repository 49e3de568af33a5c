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
    /// What is shown of its line, with keys masked; nothing where many stand before.
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

/// The same error with everything found, however much that is.
#[derive(Debug)]
pub struct AtLength(pub ConfigError);

impl std::error::Error for ConfigError {}

impl std::error::Error for AtLength {}

/// Problems shown where nobody has asked for all of them.
pub const SHOWN_PROBLEMS: usize = 20;

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, SHOWN_PROBLEMS)
    }
}

impl fmt::Display for AtLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write(f, usize::MAX)
    }
}

impl ConfigError {
    fn write(&self, f: &mut fmt::Formatter<'_>, shown: usize) -> fmt::Result {
        match self {
            Self::Unreadable { file, message } => write!(f, "{}: {message}", file.display()),
            Self::Wrong { file, problems } => {
                for (index, problem) in problems.iter().take(shown).enumerate() {
                    if index > 0 {
                        f.write_str("\n")?;
                    }
                    problem.write(f, file)?;
                }
                let file = file.display();
                match problems.len().saturating_sub(shown) {
                    0 => Ok(()),
                    more => write!(
                        f,
                        "\n{file}: and {more} more; `esplane check -c {file}` lists them all"
                    ),
                }
            }
        }
    }
}

impl Problem {
    fn quote_from(&mut self, source: &str) {
        let line = source.lines().nth(self.line.wrapping_sub(1));
        (self.quote, self.caret) = quote(line.unwrap_or_default(), self.column);
        let room = self.quote.trim_end().chars().count();
        self.width = self.width.clamp(1, room.saturating_sub(self.caret).max(1));
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, file: &Path) -> fmt::Result {
        if self.line == 0 {
            return write!(f, "{}: {}", file.display(), self.message);
        }
        let (line, column) = (self.line, self.column);
        write!(f, "{}:{line}:{column}: {}", file.display(), self.message)?;
        if self.quote.is_empty() {
            return Ok(());
        }
        let number = line.to_string();
        let gutter = " ".repeat(number.len());
        write!(f, "\n {gutter} |\n {number} | {}", self.quote)?;
        let indent = " ".repeat(self.caret);
        write!(f, "\n {gutter} | {indent}{}", "^".repeat(self.width))
    }
}

/// Problems that come with their line: whoever sends nonsense to the API must not keep us busy.
const QUOTES: usize = 1000;

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
        self.found.push(Problem {
            line: at.line() as usize,
            column: at.column() as usize,
            path: path.into(),
            message: masked(&message.to_string()),
            quote: String::new(),
            caret: 0,
            width: at.span().len() as usize,
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// In the order of the file.
    pub(super) fn into_vec(mut self) -> Vec<Problem> {
        self.found
            .sort_by_key(|problem| (problem.line, problem.column));
        for problem in self.found.iter_mut().take(QUOTES) {
            problem.quote_from(self.source);
        }
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
    // Half a key is a secret too: masked with as much around as tells that a run of digits is one.
    let before = skipped.min(KEY_DIGITS);
    let around = line
        .chars()
        .skip(skipped - before)
        .take(before + CHARS + KEY_DIGITS);
    let quote = masked(&around.collect::<String>())
        .chars()
        .skip(before)
        .take(CHARS)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    (quote, column - skipped)
}

/// Hexadecimal digits in a row that may be a key.
const KEY_DIGITS: usize = 32;

/// Replaces each run of so many or more by as many stars.
fn masked(text: &str) -> String {
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
        // Wherever the quote cuts it.
        for column in 400..800 {
            let (shown, _) = quote(&line, column);
            assert!(!shown.contains('a'), "{column}: {shown}");
        }
    }
}
