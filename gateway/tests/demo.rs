//! `esplane demo` from outside: what it prints, how it ends, and that nothing of it stays.

use serde_json::Value;
use std::{
    fs,
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(60);

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

fn demo(seconds: u32) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_esplane"));
    command.args(["demo", "--json", "--seconds", &seconds.to_string()]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The processes that were started for the demo with this number: its gateways name its directory.
fn gateways_of(demo: u32) -> Vec<u32> {
    let directory = format!("esplane-demo-{demo}/");
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers
        .filter(|number| {
            let line = fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&directory)
        })
        .collect()
}

fn directories_of(demo: u32) -> Vec<PathBuf> {
    let places = [
        std::env::temp_dir(),
        "/mnt".into(),
        "/media".into(),
        "/srv".into(),
    ];
    let paths = places.map(|place| place.join(format!("esplane-demo-{demo}")));
    paths.into_iter().filter(|path| path.exists()).collect()
}

fn assert_nothing_is_left(demo: u32) {
    // A killed process may take a moment to die.
    let since = Instant::now();
    while !gateways_of(demo).is_empty() && since.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(gateways_of(demo), Vec::<u32>::new());
    assert_eq!(directories_of(demo), Vec::<PathBuf>::new());
    let links = fs::read_to_string("/proc/net/dev").unwrap();
    for name in ["inside:", "outside:", "esplane0:"] {
        assert!(!links.contains(name), "{name} is left\n{links}");
    }
}

/// Starts a demo and waits until both gateways run.
fn demo_under_way() -> Child {
    let child = demo(600).spawn().unwrap();
    let since = Instant::now();
    while gateways_of(child.id()).len() < 2 {
        assert!(since.elapsed() < PATIENCE, "no gateways");
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

fn signal(child: &Child, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_demo_rekeys_under_load_and_loses_nothing() {
    if !is_root() {
        return;
    }
    let child = demo(6).spawn().unwrap();
    let number = child.id();
    let output = child.wait_with_output().unwrap();
    let (stdout, stderr) = texts(&output);
    println!("{stdout}{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["problems"], serde_json::json!([]));
    assert_eq!(report["ok"], true);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(report["ping"]["sent"], report["ping"]["received"]);
    assert_eq!(report["udp"]["sent"], report["udp"]["received"]);
    assert!(report["udp"]["sent"].as_u64() > Some(1000));
    assert!(report["rekeys"].as_u64() >= Some(1));
    assert_eq!(report["drops"], serde_json::json!({}));
    assert_nothing_is_left(number);
}

#[test]
fn ctrl_c_in_the_middle_leaves_nothing() {
    if !is_root() {
        return;
    }
    let child = demo_under_way();
    let number = child.id();
    signal(&child, rustix::process::Signal::INT);
    let output = child.wait_with_output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert_eq!(output.status.code(), Some(130), "{stdout}{stderr}");
    assert!(stderr.contains("interrupted"), "{stderr}");
    assert_nothing_is_left(number);
}

#[test]
fn even_sigkill_leaves_nothing() {
    if !is_root() {
        return;
    }
    let child = demo_under_way();
    let number = child.id();
    signal(&child, rustix::process::Signal::KILL);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(9));
    assert_nothing_is_left(number);
}

#[test]
fn without_root_it_works_or_says_what_is_missing() {
    if !is_root() {
        return;
    }
    // Somewhere nobody may read it.
    let place = std::env::temp_dir().join(format!("esplane-test-{}", std::process::id()));
    let program = place.join("esplane");
    fs::create_dir(&place).unwrap();
    fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_esplane"), &program).unwrap();
    let output = as_nobody(&program);
    fs::remove_dir_all(&place).unwrap();
    let (stdout, stderr) = texts(&output);
    println!("{stdout}{stderr}");
    match output.status.code() {
        Some(0) => assert!(stdout.contains("\"ok\":true"), "{stdout}"),
        Some(1) => assert!(stderr.contains("as root"), "{stderr}"),
        other => panic!("ended with {other:?}: {stderr}"),
    }
}

fn as_nobody(program: &Path) -> Output {
    const NOBODY: u32 = 65534;
    Command::new(program)
        .args(["demo", "--json", "--seconds", "1"])
        .current_dir("/")
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap()
}
