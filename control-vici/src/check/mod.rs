//! What is missing before Esplane can carry what charon has loaded, child by child, and how to get there. Pure.
//!
//! ```text
//!   VICI: connections, SAs, plugins ┐
//!   swanctl.conf, strongswan.conf   ├─▶ Survey ─▶ check() ─▶ Report ─▶ text or JSON
//!   kernel: SAs, policies, ESP      ┘             host.rs   lines, steps
//!                                                 children.rs
//! ```
//!
//! VICI does not tell of a loaded child's marks, `policies`, proposals or `inactivity`. They are read from swanctl.conf
//! (`settings.rs`); and what is true of SAs that are up is taken from the kernel, whatever the file says. Each finding
//! says what it was seen in; what could not be seen is called unknown, never fine.

mod children;
mod host;
mod proposals;
mod report;
pub mod settings;
mod steps;
mod survey;
#[cfg(test)]
mod tests;

pub use report::{Addition, ChildReport, ChildVerdict, Finding, Report, Step, Verdict};
pub use survey::{EspSupport, Lockdown, Looked, Survey, Way};

/// Looks at everything that was found.
pub fn check(survey: &Survey) -> Report {
    let way = survey.way.unwrap_or_else(|| host::way(survey));
    let host = host::findings(survey, way);
    let children: Vec<_> = children::all(survey, way);
    let fine = |verdict| matches!(verdict, ChildVerdict::Ready | ChildVerdict::Left);
    let ready = host
        .iter()
        .all(|finding| !matches!(finding.verdict, Verdict::Missing | Verdict::Unknown))
        && children.iter().all(|child| fine(child.report.state))
        && children
            .iter()
            .any(|child| child.report.state == ChildVerdict::Ready);
    let steps = steps::steps(survey, way, &host, &children, ready);
    Report {
        ready,
        mode: way.to_string(),
        charon: host::headline(survey),
        host,
        children: children.into_iter().map(|child| child.report).collect(),
        steps,
    }
}

fn finding(verdict: Verdict, topic: &str, text: impl Into<String>) -> Finding {
    Finding {
        verdict,
        topic: topic.to_owned(),
        text: text.into(),
    }
}
