//! The real binary, as an operator or a script meets it: what it prints, and its exit status.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    process::{Command, Output, Stdio},
};

fn esplane(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_esplane"));
    command.args(arguments);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn from_a_fresh_key_to_a_checked_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let made = esplane(&["keygen", "-o", &path("node.key")]);
    assert!(made.status.success(), "{made:?}");
    let mode = fs::metadata(path("node.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(esplane(&["pubkey", &path("node.key")]).stdout, made.stdout);

    fs::write(
        path("esplane.yaml"),
        include_str!("../examples/esplane.yaml"),
    )
    .unwrap();
    let checked = esplane(&["check", "-c", &path("esplane.yaml")]);
    assert_eq!(checked.status.code(), Some(0), "{checked:?}");
    assert!(
        text(&checked.stdout).contains(text(&made.stdout).trim()),
        "{checked:?}"
    );

    let again = esplane(&["keygen", "-o", &path("node.key")]);
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("exists already"), "{again:?}");
}

#[test]
fn a_key_travels_through_a_pipe() {
    let secret = esplane(&["keygen"]).stdout;
    let mut pubkey = command(&["pubkey"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    pubkey.stdin.take().unwrap().write_all(&secret).unwrap();
    let public = pubkey.wait_with_output().unwrap();
    assert!(public.status.success());
    assert_eq!((public.stdout.len(), public.stdout == secret), (45, false));
    assert_eq!(esplane(&["genpsk"]).stdout.len(), 45);
}

#[test]
fn a_wrong_configuration_stops_check_and_run_with_status_2_before_anything_happens() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("esplane.yaml").display().to_string();
    fs::write(
        &file,
        "name: n\ninterface: { name: esp0 }\nlisten: somewhere\n",
    )
    .unwrap();
    for verb in ["check", "run"] {
        let refused = esplane(&[verb, "-c", &file]);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        let shown = text(&refused.stderr);
        assert!(
            shown.starts_with(&format!("{file}:3:9: `somewhere` is no ADDRESS:PORT")),
            "{shown}"
        );
    }
}

#[test]
fn wrong_usage_is_status_2_and_an_absent_daemon_status_1() {
    assert_eq!(esplane(&["fly"]).status.code(), Some(2));
    assert_eq!(esplane(&["run"]).status.code(), Some(2));
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("none.sock").display().to_string();
    let absent = esplane(&["show", "--api", &socket]);
    assert_eq!(absent.status.code(), Some(1));
    assert!(
        text(&absent.stderr).contains("is it running?"),
        "{absent:?}"
    );
    assert_eq!(esplane(&["--help"]).status.code(), Some(0));
}
