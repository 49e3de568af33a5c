//! Which implementation: the fastest this CPU has, or the one that somebody asks for by its name.

use super::Aead;
#[cfg(target_arch = "x86_64")]
use super::x86;
use std::fmt;

/// What can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Implementation {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Vaes256,
    #[cfg(target_arch = "x86_64")]
    AesNi,
    Portable,
}

impl Implementation {
    /// The fastest first.
    const ALL: &[Self] = &[
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "x86_64")]
        Self::Vaes256,
        #[cfg(target_arch = "x86_64")]
        Self::AesNi,
        Self::Portable,
    ];

    fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Vaes256 => "vaes256",
            #[cfg(target_arch = "x86_64")]
            Self::AesNi => "aesni",
            Self::Portable => "portable",
        }
    }

    /// The CPU features it needs and this CPU lacks.
    fn missing(self) -> Vec<&'static str> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => x86::missing::<4>(),
            #[cfg(target_arch = "x86_64")]
            Self::Vaes256 => x86::missing::<2>(),
            #[cfg(target_arch = "x86_64")]
            Self::AesNi => x86::missing::<1>(),
            Self::Portable => Vec::new(),
        }
    }
}

impl Aead {
    /// The fastest implementation this CPU has.
    pub fn detect() -> Self {
        Self::all().first().copied().unwrap_or(Self::portable())
    }

    /// The one that runs on every CPU.
    pub fn portable() -> Self {
        Self {
            implementation: Implementation::Portable,
        }
    }

    /// Every implementation that this CPU can run, the fastest first.
    pub fn all() -> Vec<Self> {
        let implementations = Implementation::ALL.iter().copied();
        implementations
            .filter(|implementation| implementation.missing().is_empty())
            .map(|implementation| Self { implementation })
            .collect()
    }

    /// The implementation of this name, if this CPU can run it.
    pub fn named(name: &str) -> Result<Self, ChoiceError> {
        let mut all = Implementation::ALL.iter().copied();
        let problem = match all.find(|implementation| implementation.name() == name) {
            None => ChoiceProblem::Unknown,
            Some(implementation) => match implementation.missing() {
                missing if missing.is_empty() => return Ok(Self { implementation }),
                missing => ChoiceProblem::Lacks(missing),
            },
        };
        Err(ChoiceError {
            name: name.to_owned(),
            problem,
        })
    }

    /// Its name, for logs and status, and for [`Aead::named`].
    pub fn name(&self) -> &'static str {
        self.implementation.name()
    }
}

/// A name that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChoiceError {
    /// What was asked for.
    pub name: String,
    /// Why not.
    pub problem: ChoiceProblem,
}

/// Why an implementation cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChoiceProblem {
    /// There is none of this name.
    Unknown,
    /// The CPU lacks these features.
    Lacks(Vec<&'static str>),
}

impl fmt::Display for ChoiceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.problem {
            ChoiceProblem::Unknown => write!(f, "there is no AEAD implementation `{}`", self.name)?,
            ChoiceProblem::Lacks(features) => write!(
                f,
                "the AEAD implementation `{}` needs CPU features that are missing here: {}",
                self.name,
                features.join(", ")
            )?,
        }
        let names: Vec<_> = Aead::all().iter().map(Aead::name).collect();
        write!(f, "; this CPU can run {}", names.join(", "))
    }
}

impl std::error::Error for ChoiceError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_that_runs_here_is_found_by_its_name_and_the_fastest_is_the_default() {
        for aead in Aead::all() {
            assert_eq!(Aead::named(aead.name()).unwrap().name(), aead.name());
        }
        assert_eq!(Aead::detect().name(), Aead::all()[0].name());
        assert_eq!(Aead::all().last().unwrap().name(), "portable");
    }

    #[test]
    fn an_unknown_name_is_refused_with_those_that_would_do() {
        let error = Aead::named("AVX512").unwrap_err();
        assert_eq!(error.problem, ChoiceProblem::Unknown);
        let text = error.to_string();
        assert!(
            text.starts_with("there is no AEAD implementation `AVX512`; this CPU can run "),
            "{text}"
        );
        assert!(text.ends_with("portable"), "{text}");
    }

    #[test]
    fn a_cpu_that_cannot_is_told_what_it_lacks() {
        let text = ChoiceError {
            name: "vaes256".to_owned(),
            problem: ChoiceProblem::Lacks(vec!["vaes", "vpclmulqdq"]),
        }
        .to_string();
        assert!(
            text.starts_with(
                "the AEAD implementation `vaes256` needs CPU features that are missing here: vaes, vpclmulqdq; this"
            ),
            "{text}"
        );
    }
}
