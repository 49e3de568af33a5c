//! swanctl.conf and strongswan.conf, read as charon reads them (strongswan.conf(5)).
//!
//! VICI does not tell all that a child is configured with: marks and `policies` can only be read here. Sections merge,
//! later values win, `name : other` inherits, `include` takes other files in; every value remembers its file and line.
//! Nothing is read from a disk: includes are asked of a function.

use std::{fmt, sync::Arc};

/// Sections in sections; far more than anybody writes.
const DEPTH_MAX: usize = 32;
/// Files in files.
const INCLUDE_DEPTH_MAX: usize = 10;
/// All files together; a file that includes itself twice would be read a thousand times.
const FILES_MAX: usize = 4096;
/// Sections that inherit from sections.
const REFERENCE_DEPTH_MAX: usize = 10;
/// All sections that one inherits from.
const INHERITED_MAX: usize = 1000;

/// Where something is written.
#[derive(Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: Arc<str>,
    /// The line, from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a file cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct SettingsError {
    /// Where.
    pub place: Place,
    /// What is wrong.
    pub problem: SettingsProblem,
}

/// What is wrong with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsProblem {
    /// Something else than a name, `include` or `}`.
    #[error("expected a name, `include` or `}}`")]
    Statement,
    /// A name and nothing behind it.
    #[error("expected `{{`, `:` or `=` behind a name")]
    BehindName,
    /// `name :` without a name behind.
    #[error("expected the name of a section behind `:` or `,`")]
    Reference,
    /// A text without its end.
    #[error("the quoted text that begins here has no end")]
    Quote,
    /// A section without its end.
    #[error("the section that begins here has no `}}`")]
    Open,
    /// An end without its section.
    #[error("a `}}` too many")]
    Close,
    /// An include without a file.
    #[error("expected a file behind `include`")]
    Include,
    /// Nested too deep.
    #[error("sections or includes nested too deep")]
    Depth,
    /// More files than anybody has.
    #[error("more than {FILES_MAX} files are included in all")]
    Files,
}

/// One value and where it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The value; empty is unset.
    pub text: String,
    /// Where.
    pub place: Place,
}

#[derive(Debug, Default)]
struct Section {
    /// Where it begins last, which is where lines are best added.
    place: Option<Place>,
    references: Vec<String>,
    values: Vec<(String, Setting)>,
    sections: Vec<(String, Section)>,
}

/// What one file and all it includes say.
#[derive(Debug, Default)]
pub struct Settings {
    root: Section,
}

/// A file that an include names: its name and its text.
pub type Included = (String, String);

impl Settings {
    /// Reads `text`; `include` is given each pattern and the file that it stands in.
    pub fn parse(
        file: &str,
        text: &str,
        include: &mut dyn FnMut(&str, &str) -> Vec<Included>,
    ) -> Result<Self, SettingsError> {
        let mut settings = Self::default();
        let include = &mut Includes {
            load: include,
            left: FILES_MAX,
        };
        Parser::new(file, text).file(&mut settings.root, 0, include)?;
        Ok(settings)
    }

    /// The section of this path, with what it inherits.
    pub fn section(&self, path: &[&str]) -> Option<View<'_>> {
        let top = View {
            settings: self,
            parts: vec![&self.root],
        };
        path.iter().try_fold(top, |view, name| view.section(name))
    }
}

/// A section with what it inherits: its own first.
#[derive(Clone, Debug)]
pub struct View<'a> {
    settings: &'a Settings,
    parts: Vec<&'a Section>,
}

impl<'a> View<'a> {
    /// The section of this name within.
    pub fn section(&self, name: &str) -> Option<View<'a>> {
        let mut parts = Vec::new();
        for part in &self.parts {
            if let Some(section) = part.child(name) {
                self.settings.inherit(section, 0, &mut parts);
            }
        }
        let settings = self.settings;
        (!parts.is_empty()).then_some(View { settings, parts })
    }

    /// What this key is set to, if it is.
    pub fn value(&self, key: &str) -> Option<&'a Setting> {
        let values = self.parts.iter().flat_map(|part| &part.values);
        let mut found = values.filter(|(name, _)| name == key);
        let (_, setting) = found.next()?;
        (!setting.text.is_empty()).then_some(setting)
    }

    /// Where it is written itself, not what it inherits.
    pub fn place(&self) -> Option<&'a Place> {
        self.parts.first()?.place.as_ref()
    }
}

impl Settings {
    fn inherit<'a>(&'a self, section: &'a Section, depth: usize, parts: &mut Vec<&'a Section>) {
        // Both bounds are needed: ten sections that each name the next ten times are ten thousand millions.
        if parts.len() == INHERITED_MAX {
            return;
        }
        parts.push(section);
        if depth == REFERENCE_DEPTH_MAX {
            return;
        }
        for reference in &section.references {
            let mut names = reference.split('.');
            let found = names.try_fold(&self.root, |section, name| section.child(name));
            if let Some(found) = found {
                self.inherit(found, depth + 1, parts);
            }
        }
    }
}

impl Section {
    fn child(&self, name: &str) -> Option<&Section> {
        let mut sections = self.sections.iter();
        sections.find_map(|(key, section)| (key == name).then_some(section))
    }

    fn child_mut(&mut self, name: &str) -> &mut Section {
        let at = self.sections.iter().position(|(key, _)| key == name);
        let at = at.unwrap_or_else(|| {
            self.sections.push((name.to_owned(), Section::default()));
            self.sections.len() - 1
        });
        &mut self.sections[at].1
    }

    /// A later value takes the place of an earlier.
    fn set(&mut self, key: &str, setting: Setting) {
        match self.values.iter_mut().find(|(name, _)| name == key) {
            Some((_, value)) => *value = setting,
            None => self.values.push((key.to_owned(), setting)),
        }
    }
}

/// Where the text of other files comes from.
struct Includes<'a> {
    load: &'a mut dyn FnMut(&str, &str) -> Vec<Included>,
    left: usize,
}

struct Parser<'a> {
    file: Arc<str>,
    rest: &'a str,
    line: usize,
}

impl<'a> Parser<'a> {
    fn new(file: &str, text: &'a str) -> Self {
        Self {
            file: file.into(),
            rest: text,
            line: 1,
        }
    }

    fn file(
        &mut self,
        root: &mut Section,
        depth: usize,
        include: &mut Includes<'_>,
    ) -> Result<(), SettingsError> {
        self.statements(root, depth, 0, include)?;
        match self.rest.is_empty() {
            true => Ok(()),
            false => Err(self.error(SettingsProblem::Close)),
        }
    }

    /// Up to the end of the section or file, which is left for the caller.
    fn statements(
        &mut self,
        section: &mut Section,
        files: usize,
        depth: usize,
        include: &mut Includes<'_>,
    ) -> Result<(), SettingsError> {
        loop {
            self.skip_space(true);
            if self.rest.is_empty() || self.rest.starts_with('}') {
                return Ok(());
            }
            let place = self.place();
            let name = self.name(SettingsProblem::Statement)?;
            if name == "include" && !self.peeks(&['=', '{', ':']) {
                self.include(section, files, depth, include)?;
                continue;
            }
            self.skip_space(true);
            match self.rest.chars().next() {
                Some('=') => {
                    self.advance(1);
                    let text = self.value()?;
                    section.set(&name, Setting { text, place });
                }
                Some(next @ ('{' | ':')) => {
                    let child = section.child_mut(&name);
                    child.place = Some(place.clone());
                    if next == ':' {
                        self.references(child)?;
                    }
                    self.advance(1);
                    if depth == DEPTH_MAX {
                        return Err(self.error(SettingsProblem::Depth));
                    }
                    self.statements(child, files, depth + 1, include)?;
                    if self.rest.is_empty() {
                        let problem = SettingsProblem::Open;
                        return Err(SettingsError { place, problem });
                    }
                    self.advance(1);
                }
                _ => return Err(self.error(SettingsProblem::BehindName)),
            }
        }
    }

    /// `: a, b.c {`, up to the brace.
    fn references(&mut self, section: &mut Section) -> Result<(), SettingsError> {
        while self.rest.starts_with([':', ',']) {
            self.advance(1);
            self.skip_space(true);
            let name = self.name(SettingsProblem::Reference)?;
            section.references.push(name);
            self.skip_space(true);
        }
        match self.rest.starts_with('{') {
            true => Ok(()),
            false => Err(self.error(SettingsProblem::BehindName)),
        }
    }

    fn include(
        &mut self,
        section: &mut Section,
        files: usize,
        depth: usize,
        include: &mut Includes<'_>,
    ) -> Result<(), SettingsError> {
        self.skip_space(false);
        let place = self.place();
        let pattern = match self.rest.starts_with('"') {
            true => self.quoted()?,
            false => {
                let end = self
                    .rest
                    .find(|c: char| c.is_whitespace() || "#{}".contains(c));
                let pattern = &self.rest[..end.unwrap_or(self.rest.len())];
                self.advance(pattern.len());
                pattern.to_owned()
            }
        };
        let wrong = |problem| Err(SettingsError { place, problem });
        if pattern.is_empty() {
            return wrong(SettingsProblem::Include);
        }
        if files == INCLUDE_DEPTH_MAX {
            return wrong(SettingsProblem::Depth);
        }
        for (file, text) in (include.load)(&pattern, &self.file) {
            if include.left == 0 {
                return wrong(SettingsProblem::Files);
            }
            include.left -= 1;
            let mut parser = Parser::new(&file, &text);
            parser.statements(section, files + 1, depth, include)?;
            if !parser.rest.is_empty() {
                return Err(parser.error(SettingsProblem::Close));
            }
        }
        Ok(())
    }

    fn name(&mut self, otherwise: SettingsProblem) -> Result<String, SettingsError> {
        if self.rest.starts_with('"') {
            return self.quoted();
        }
        let end = self
            .rest
            .find(|c: char| c.is_whitespace() || "#{}:,=\"".contains(c));
        let name = &self.rest[..end.unwrap_or(self.rest.len())];
        if name.is_empty() {
            return Err(self.error(otherwise));
        }
        self.advance(name.len());
        Ok(name.to_owned())
    }

    /// Up to the end of the line, a comment or the end of the section.
    fn value(&mut self) -> Result<String, SettingsError> {
        let mut value = String::new();
        self.skip_space(false);
        loop {
            let end = self
                .rest
                .find(['\n', '#', '}', '"'])
                .unwrap_or(self.rest.len());
            value.push_str(&self.rest[..end]);
            self.advance(end);
            if !self.rest.starts_with('"') {
                return Ok(value.trim_end().to_owned());
            }
            value.push_str(&self.quoted()?);
        }
    }

    fn quoted(&mut self) -> Result<String, SettingsError> {
        let place = self.place();
        let mut text = String::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.advance(at + 1);
                    return Ok(text);
                }
                '\\' => match chars.next() {
                    Some((_, 'n')) => text.push('\n'),
                    Some((_, 'r')) => text.push('\r'),
                    Some((_, 't')) => text.push('\t'),
                    // A line that goes on.
                    Some((_, '\n')) | None => {}
                    Some((_, other)) => text.push(other),
                },
                other => text.push(other),
            }
        }
        let problem = SettingsProblem::Quote;
        Err(SettingsError { place, problem })
    }

    fn peeks(&self, wanted: &[char]) -> bool {
        self.rest.trim_start().starts_with(wanted)
    }

    fn skip_space(&mut self, lines: bool) {
        loop {
            let space = |c: char| c.is_whitespace() && (lines || c != '\n');
            let end = self.rest.find(|c| !space(c)).unwrap_or(self.rest.len());
            self.advance(end);
            if !(lines && self.rest.starts_with('#')) {
                return;
            }
            self.advance(self.rest.find('\n').unwrap_or(self.rest.len()));
        }
    }

    fn advance(&mut self, bytes: usize) {
        let (passed, rest) = self.rest.split_at(bytes);
        self.line += passed.matches('\n').count();
        self.rest = rest;
    }

    fn place(&self) -> Place {
        Place {
            file: self.file.clone(),
            line: self.line,
        }
    }

    fn error(&self, problem: SettingsProblem) -> SettingsError {
        let place = self.place();
        SettingsError { place, problem }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, SettingsError> {
        Settings::parse("swanctl.conf", text, &mut |_, _| Vec::new())
    }

    fn value(settings: &Settings, path: &[&str], key: &str) -> String {
        let section = settings.section(path).expect("a section");
        section.value(key).map_or_else(
            || "unset".to_owned(),
            |value| format!("{} @{}", value.text, value.place),
        )
    }

    #[test]
    fn a_configuration_is_read_with_the_line_of_everything() {
        let settings = parse(
            "# comment\nconnections {\n  site { # here\n    children {\n      net {\n        local_ts = 10.1.0.0/16[tcp/80], 10.3.0.0/16 # ours\n        updown = \"/bin/a b\" -x\n        esp_proposals=aes128gcm16}\n      empty { }\n      }\n  }\n}\n",
        )
        .unwrap();
        let net = ["connections", "site", "children", "net"];
        assert_eq!(
            value(&settings, &net, "local_ts"),
            "10.1.0.0/16[tcp/80], 10.3.0.0/16 @swanctl.conf:6"
        );
        assert_eq!(
            value(&settings, &net, "updown"),
            "/bin/a b -x @swanctl.conf:7"
        );
        assert_eq!(
            value(&settings, &net, "esp_proposals"),
            "aes128gcm16 @swanctl.conf:8"
        );
        assert_eq!(value(&settings, &net, "mark_in"), "unset");
        assert_eq!(
            settings.section(&net).unwrap().place().unwrap().to_string(),
            "swanctl.conf:5"
        );
        assert!(
            settings
                .section(&["connections", "site", "children", "empty"])
                .is_some()
        );
        assert!(settings.section(&["connections", "other"]).is_none());
    }

    #[test]
    fn later_values_win_and_sections_merge() {
        let settings = parse("a { x = 1 \n y = 1 }\na { x = 2\n x = 3\n y =\n z = 1 }").unwrap();
        assert_eq!(value(&settings, &["a"], "x"), "3 @swanctl.conf:4");
        assert_eq!(value(&settings, &["a"], "y"), "unset");
        assert_eq!(value(&settings, &["a"], "z"), "1 @swanctl.conf:6");
    }

    #[test]
    fn sections_inherit_from_what_they_name() {
        let settings = parse(
            "defaults { policies = no\n mode = transport\n children { all { ipcomp = yes } } }\nmore : defaults { mark_in = 7 }\nconnections { site : more, missing { mode = tunnel\n children { all { } } } }\nloop : loop { x = 1 }",
        )
        .unwrap();
        let site = ["connections", "site"];
        assert_eq!(value(&settings, &site, "mode"), "tunnel @swanctl.conf:5");
        assert_eq!(value(&settings, &site, "mark_in"), "7 @swanctl.conf:4");
        assert_eq!(value(&settings, &site, "policies"), "no @swanctl.conf:1");
        assert_eq!(
            value(
                &settings,
                &["connections", "site", "children", "all"],
                "ipcomp"
            ),
            "yes @swanctl.conf:3"
        );
        let many = (0..10).fold(String::from("s10 { x = 1 }\n"), |text, n| {
            text + &format!(
                "s{n} : s{0}, s{0}, s{0}, s{0}, s{0}, s{0}, s{0}, s{0} {{ }}\n",
                n + 1
            )
        });
        assert_eq!(
            value(&parse(&many).unwrap(), &["s0"], "x"),
            "1 @swanctl.conf:1"
        );
        assert_eq!(value(&settings, &["loop"], "x"), "1 @swanctl.conf:7");
    }

    #[test]
    fn includes_stand_where_they_are_written() {
        let mut asked = Vec::new();
        let settings = Settings::parse(
            "/etc/swanctl/swanctl.conf",
            "include conf.d/*.conf\nconnections { include \"a b.conf\" }",
            &mut |pattern, from| {
                asked.push(format!("{pattern} from {from}"));
                match pattern {
                    "conf.d/*.conf" => vec![
                        ("1.conf".into(), "connections { one { x = 1 } }".into()),
                        ("2.conf".into(), "\nconnections { one { x = 2 } }".into()),
                    ],
                    _ => vec![("a b.conf".into(), "two { x = 3 }".into())],
                }
            },
        )
        .unwrap();
        assert_eq!(
            asked,
            [
                "conf.d/*.conf from /etc/swanctl/swanctl.conf",
                "a b.conf from /etc/swanctl/swanctl.conf"
            ]
        );
        assert_eq!(
            value(&settings, &["connections", "one"], "x"),
            "2 @2.conf:2"
        );
        assert_eq!(
            value(&settings, &["connections", "two"], "x"),
            "3 @a b.conf:1"
        );
        // A file that includes itself ends.
        let error = Settings::parse("a", "include a", &mut |_, _| {
            vec![("a".into(), "include a".into())]
        });
        assert_eq!(error.unwrap_err().problem, SettingsProblem::Depth);
    }

    #[test]
    fn wrong_texts_are_refused_with_their_line() {
        for (text, says) in [
            (
                "a {\n b = 1\n",
                "swanctl.conf:1: the section that begins here has no `}`",
            ),
            ("a { }\n}\n", "swanctl.conf:2: a `}` too many"),
            ("a = \"x\n", "swanctl.conf:1: the quoted text"),
            ("a\n\nb = 1", "swanctl.conf:3: expected `{`, `:` or `=`"),
            ("a {\n = 1 }", "swanctl.conf:2: expected a name"),
            ("a : {", "expected the name of a section"),
            ("include\n", "expected a file behind `include`"),
            (&"a {".repeat(40), "nested too deep"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        // `include` as a key is a key.
        assert_eq!(
            value(&parse("a { include = 1 }").unwrap(), &["a"], "include"),
            "1 @swanctl.conf:1"
        );
    }
}
