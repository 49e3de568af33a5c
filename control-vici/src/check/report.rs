//! What `esplane strongswan check` says, for people and as JSON.

use serde::Serialize;
use std::fmt;

/// What is missing for the takeover, and the way there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether nothing is missing: what is negotiated now or next is carried by Esplane.
    pub ready: bool,
    /// How Esplane gets the keys: `kernel` or `preload`.
    pub mode: String,
    /// Which charon, on which kernel.
    pub charon: String,
    /// What holds for all children.
    pub host: Vec<Finding>,
    /// One for each child of each loaded connection.
    pub children: Vec<ChildReport>,
    /// What to do, in order.
    pub steps: Vec<Step>,
}

/// One child.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChildReport {
    /// Its connection.
    pub connection: String,
    /// Its name.
    pub child: String,
    /// Our networks, in charon's words.
    pub local: Vec<String>,
    /// The peer's.
    pub remote: Vec<String>,
    /// In a word.
    pub state: ChildVerdict,
    /// In detail.
    pub findings: Vec<Finding>,
    /// What to write into swanctl.conf.
    pub add: Option<Addition>,
}

/// One child in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChildVerdict {
    /// Nothing is missing.
    Ready,
    /// Configured rightly, but its SAs were negotiated before.
    OldSas,
    /// Lines are missing.
    Change,
    /// Not enough could be seen.
    Unknown,
    /// Not of the kind that Esplane carries; stays with the kernel.
    Left,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How it is.
    pub verdict: Verdict,
    /// What was looked at.
    pub topic: String,
    /// What was seen, and where.
    pub text: String,
}

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it has to be.
    Ok,
    /// Not as it has to be.
    Missing,
    /// Could not be seen.
    Unknown,
    /// Good to know.
    Note,
}

/// Lines for swanctl.conf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Addition {
    /// The section: `connections.site.children.net`.
    pub section: String,
    /// Where it begins, if it was found.
    pub place: Option<String>,
    /// The lines; the last of two with one name counts, so all go to the section's end.
    pub lines: Vec<String>,
    /// Lines there that have to go.
    pub remove: Vec<String>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What and why.
    pub text: String,
    /// Commands, or lines of a file.
    pub lines: Vec<String>,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Missing => "MISSING",
            Self::Unknown => "unknown",
            Self::Note => "note",
        }
    }
}

impl ChildVerdict {
    fn words(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::OldSas => "configured, but its SAs are not yet",
            Self::Change => "something is missing",
            Self::Unknown => "cannot tell",
            Self::Left => "not for Esplane",
        }
    }
}

/// Room for the words before a finding's text.
const INDENT: usize = 24;
const WIDTH: usize = 100;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.charon)?;
        writeln!(f, "\nHost")?;
        for finding in &self.host {
            write!(f, "{finding}")?;
        }
        for child in &self.children {
            write!(f, "\n{child}")?;
        }
        match self.ready {
            true => writeln!(f, "\nREADY: what is negotiated is Esplane's to carry.")?,
            false => writeln!(f, "\nNOT READY. Do this, in this order:")?,
        }
        for (index, step) in self.steps.iter().enumerate() {
            writeln!(f)?;
            let number = format!("  {}. ", index + 1);
            wrapped(f, &number, &step.text)?;
            for line in &step.lines {
                writeln!(f, "         {line}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for ChildReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (local, remote) = (self.local.join(", "), self.remote.join(", "));
        let Self {
            connection,
            child,
            state,
            ..
        } = self;
        writeln!(
            f,
            "{connection}/{child}   {local} === {remote}   [{}]",
            state.words()
        )?;
        for finding in &self.findings {
            write!(f, "{finding}")?;
        }
        let Some(add) = &self.add else {
            return Ok(());
        };
        for line in &add.remove {
            writeln!(f, "    delete {line}")?;
        }
        if add.lines.is_empty() {
            return Ok(());
        }
        match &add.place {
            Some(place) => writeln!(
                f,
                "    add at the end of the section `{child}` that begins at {place}:"
            )?,
            None => writeln!(f, "    add to {}, wherever that is written:", add.section)?,
        }
        writeln!(f)?;
        for line in &add.lines {
            writeln!(f, "        {line}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = format!("  {:<8} {:<12} ", self.verdict.word(), self.topic);
        wrapped(f, &head, &self.text)
    }
}

/// The text behind its head, further lines below it.
fn wrapped(f: &mut fmt::Formatter<'_>, head: &str, text: &str) -> fmt::Result {
    let indent = head.chars().count().min(INDENT);
    let mut line = head.to_owned();
    let mut fresh = true;
    for word in text.split(' ') {
        if !fresh && line.chars().count() + 1 + word.chars().count() > WIDTH {
            writeln!(f, "{line}")?;
            line = " ".repeat(indent);
            fresh = true;
        }
        if !fresh {
            line.push(' ');
        }
        line.push_str(word);
        fresh = false;
    }
    writeln!(f, "{line}")
}
