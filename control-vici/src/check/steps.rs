//! What to do, in order, so that following it literally leads to the takeover.

use super::{ChildVerdict, Finding, Looked, Step, Survey, Verdict, Way, children::Examined, host};

/// More are cut short.
const COMMANDS_MAX: usize = 24;
/// Where the packages put the library.
const LIBRARY: &str = "/usr/lib/esplane/libesplane_preload.so";

/// What to do, in order; nothing if all is ready.
pub fn steps(
    survey: &Survey,
    way: Way,
    host: &[Finding],
    children: &[Examined<'_>],
    ready: bool,
) -> Vec<Step> {
    let mut steps = Vec::new();
    if ready {
        return steps;
    }
    if survey.connections.is_empty() {
        let text = "charon has no connections loaded; load them, and run this again:";
        return vec![step(text, ["swanctl --load-all".to_owned()])];
    }
    if children.is_empty() {
        let loaded = survey.connections.iter().flat_map(|connection| {
            let children = connection.children.iter();
            children.map(|child| format!("{}/{}", connection.name, child.name))
        });
        let text = "charon has loaded nothing of that name; it has:";
        return vec![step(text, bounded(loaded))];
    }
    let missing: Vec<&str> = host
        .iter()
        .filter(|finding| finding.verdict == Verdict::Missing)
        .map(|finding| finding.topic.as_str())
        .collect();
    if !missing.is_empty() {
        let text = format!("Put the host right first: {} (above).", missing.join(", "));
        steps.push(step(&text, []));
    }
    let unloaded = way == Way::Preload && survey.preloaded != Looked::Found(true);
    if unloaded {
        steps.extend(preload());
    }
    let any = |state| children.iter().any(|child| child.report.state == state);
    if any(ChildVerdict::Change) {
        let text = "Write the lines above into swanctl.conf, then load it. Tunnels that are up go on as they are:";
        steps.push(step(text, ["swanctl --load-conns".to_owned()]));
    } else if any(ChildVerdict::OldSas) {
        let text = "If swanctl.conf was not loaded since it was changed, load it:";
        steps.push(step(text, ["swanctl --load-conns".to_owned()]));
    }
    if unloaded || any(ChildVerdict::Change) || any(ChildVerdict::OldSas) {
        steps.push(esplane(survey, way));
    }
    if unloaded {
        let text = "Start charon again; it negotiates its tunnels anew:";
        let commands = ["systemctl daemon-reload", "systemctl restart strongswan"];
        steps.push(step(text, commands.map(str::to_owned)));
    } else {
        steps.extend(hand_over(children));
    }
    if any(ChildVerdict::Unknown) {
        let text = "Where this cannot tell, do what it says there.";
        steps.push(step(text, []));
    }
    if !children
        .iter()
        .any(|child| child.report.state != ChildVerdict::Left)
    {
        let text =
            "Nothing that charon has loaded is in tunnel mode; there is nothing to take over.";
        return vec![step(text, [])];
    }
    steps.push(step(
        "See that all is well:",
        [
            "esplane strongswan check".to_owned(),
            "esplane show tunnels".to_owned(),
        ],
    ));
    steps
}

fn preload() -> [Step; 2] {
    [
        step(
            "Let charon hand its keys to Esplane. Into /etc/systemd/system/strongswan.service.d/esplane.conf:",
            [
                "[Unit]".to_owned(),
                "Wants=esplane.service".to_owned(),
                "After=esplane.service".to_owned(),
                "[Service]".to_owned(),
                format!("Environment=LD_PRELOAD={LIBRARY}"),
            ],
        ),
        step(
            "Keep charon's routes out of the way. Into /etc/strongswan.d/esplane.conf:",
            [
                "charon {".to_owned(),
                "    install_routes = no".to_owned(),
                "}".to_owned(),
            ],
        ),
    ]
}

fn esplane(survey: &Survey, way: Way) -> Step {
    let mut lines = vec!["strongswan:".to_owned()];
    let port = host::nat_port(survey);
    if port != 4500 {
        lines.push(format!("  port: {port}"));
    }
    if way == Way::Preload {
        lines.push("  mode: preload".to_owned());
    }
    if !survey.only.is_empty() {
        let names: Vec<String> = survey.only.iter().map(ToString::to_string).collect();
        lines.push(format!("  connections: [{}]", names.join(", ")));
    }
    let text = "Give /etc/esplane/esplane.yaml this section, and start Esplane: `systemctl start esplane`, or `esplane run -c /etc/esplane/esplane.yaml`.";
    step(text, lines)
}

/// Fresh SAs beside the old ones, then the old ones end: no packet is without an SA.
fn hand_over(children: &[Examined<'_>]) -> Vec<Step> {
    let (ours, theirs): (Vec<_>, Vec<_>) = children
        .iter()
        .filter(|it| matches!(it.report.state, ChildVerdict::Change | ChildVerdict::OldSas))
        .filter(|it| !it.old_sas.is_empty())
        .partition(|it| it.can_initiate);
    let mut steps = Vec::new();
    if !ours.is_empty() {
        let text = "Let fresh SAs come up beside the old ones, then end those. (A rekey would keep the old settings. Packets under way in that moment may be lost, as whenever a tunnel comes up.)";
        let commands = ours.iter().flat_map(|child| {
            let (ike, name) = (&child.report.connection, &child.report.child);
            let initiate = format!("swanctl --initiate --ike {ike} --child {name}");
            let initiate = child.needs_fresh.then_some(initiate);
            initiate.into_iter().chain(terminate(child))
        });
        steps.push(step(text, bounded(commands)));
    }
    if !theirs.is_empty() {
        let text = "Peers that call us come over when they call again. To hurry them, end what they have now:";
        steps.push(step(
            text,
            bounded(theirs.iter().flat_map(|child| terminate(child))),
        ));
    }
    steps
}

fn terminate(child: &Examined<'_>) -> impl Iterator<Item = String> {
    let sas = child.old_sas.iter();
    sas.map(|sa| format!("swanctl --terminate --child-id {}", sa.unique_id))
}

fn bounded(commands: impl Iterator<Item = String>) -> Vec<String> {
    let mut commands: Vec<String> = commands.collect();
    if let Some(more) = commands
        .len()
        .checked_sub(COMMANDS_MAX)
        .filter(|more| *more > 0)
    {
        commands.truncate(COMMANDS_MAX);
        commands.push(format!(
            "and {more} more, by the numbers in `swanctl --list-sas`"
        ));
    }
    commands
}

fn step(text: &str, lines: impl IntoIterator<Item = String>) -> Step {
    Step {
        text: text.to_owned(),
        lines: lines.into_iter().collect(),
    }
}
