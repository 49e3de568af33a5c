//! Stories of the HTTP server on real sockets, with a fake daemon behind it.

use super::{
    server::{Bounds, Server},
    socket::SocketError,
    *,
};
use crate::{
    config::Api,
    show::{self, ShowError, Target},
    status::PeerRow,
};
use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Duration,
};
use tempfile::TempDir;
use tokio::sync::oneshot;

mod daemon;
use daemon::*;

#[test]
fn everything_readable_is_readable_over_both_sockets() {
    let daemon = Daemon::start();
    daemon.fake.0.lock().unwrap().status = Status {
        node: "berlin".to_owned(),
        ready: true,
        peers: vec![PeerRow {
            name: "paris".to_owned(),
            ..PeerRow::default()
        }],
        ..Status::default()
    };
    for (path, phrase) in [
        ("/metrics", "esplane_peer_up{peer=\"paris\"} 0"),
        ("/healthz", "ok"),
        ("/readyz", "ready"),
        ("/v1/status", "\"node\":\"berlin\""),
        ("/v1/peers", "\"name\":\"paris\""),
        ("/v1/sas", "[]"),
        ("/v1/routes", "[]"),
        (
            "/v1/drops",
            "\"reason\":\"replay_duplicate\",\"stage\":\"inbound\",\"packets\":0",
        ),
    ] {
        for reply in [daemon.tcp(&get(path)), daemon.unix(&get(path))] {
            assert_eq!(reply.status, 200, "{path}: {reply:?}");
            assert!(reply.body.contains(phrase), "{path}: {reply:?}");
        }
    }
    let metrics = daemon.tcp(&get("/metrics"));
    assert!(
        metrics
            .head
            .contains("content-type: text/plain; version=0.0.4"),
        "{metrics:?}"
    );
    let head = daemon.tcp(&get("/v1/status").replace("GET", "HEAD"));
    assert_eq!((head.status, head.body.as_str()), (200, ""));
}

#[test]
fn readyz_says_why_not_until_it_is() {
    let daemon = Daemon::start();
    daemon.fake.0.lock().unwrap().status.not_ready_because = Some("no interface yet".to_owned());
    let reply = daemon.tcp(&get("/readyz"));
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (503, "not ready: no interface yet\n")
    );
    assert_eq!(
        daemon.tcp(&get("/healthz")).status,
        200,
        "alive all the same"
    );
    daemon.fake.0.lock().unwrap().status.ready = true;
    assert_eq!(daemon.tcp(&get("/readyz")).status, 200);
}

#[test]
fn a_stopping_daemon_is_neither_healthy_nor_ready() {
    let daemon = Daemon::start();
    daemon.fake.0.lock().unwrap().gone = true;
    for path in ["/healthz", "/readyz", "/metrics", "/v1/status"] {
        let reply = daemon.tcp(&get(path));
        assert_eq!(reply.status, 503, "{path}");
        assert!(reply.body.contains("the daemon is stopping"), "{reply:?}");
    }
}

#[test]
fn a_lost_caller_is_told_the_way() {
    let daemon = Daemon::start();
    for path in [
        "/",
        "/v2",
        "/v1/static-sasx",
        "/metrics/",
        "/../etc/passwd",
        "/v1/static-sas-x/y",
    ] {
        let reply = daemon.unix(&get(path));
        assert_eq!(reply.status, 404, "{path}: {reply:?}");
        assert!(reply.body.contains("/v1/drops") && reply.body.contains("/v1/static-sas/NAME"));
    }
    for (request, allow) in [
        (get("/metrics").replace("GET", "PUT"), "allow: get, head"),
        (get("/v1/static-sas"), "allow: post"),
        (get("/v1/static-sas/lab"), "allow: delete"),
    ] {
        let reply = daemon.unix(&request);
        assert_eq!(reply.status, 405, "{request}");
        assert!(reply.head.contains(allow), "{reply:?}");
    }
}

#[test]
fn a_static_sa_comes_and_goes_over_the_unix_socket() {
    let daemon = Daemon::start();
    let body = document("lab").to_string();
    let reply = daemon.unix(&post(&body));
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (201, "{\"name\":\"lab\"}\n")
    );
    assert_eq!(daemon.fake.installed(), ["lab"]);

    let again = daemon.unix(&post(&body));
    assert_eq!(again.status, 409);
    assert_eq!(
        again.body,
        "{\"error\":\"`lab` is installed already\",\"path\":\"name\"}\n"
    );

    let delete = |name: &str| get(&format!("/v1/static-sas/{name}")).replace("GET", "DELETE");
    assert_eq!(daemon.unix(&delete("other")).status, 404);
    assert_eq!(daemon.unix(&delete("lab")).status, 204);
    assert!(daemon.fake.installed().is_empty());
}

#[test]
fn nobody_changes_anything_over_tcp() {
    let daemon = Daemon::start();
    let reply = daemon.tcp(&post(&document("lab").to_string()));
    assert_eq!(reply.status, 403, "{reply:?}");
    assert!(reply.body.contains("unix socket only"), "{reply:?}");
    let delete = get("/v1/static-sas/lab").replace("GET", "DELETE");
    assert_eq!(daemon.tcp(&delete).status, 403);
    assert!(daemon.fake.installed().is_empty());
}

#[test]
fn a_wrong_document_gets_its_path_and_no_key_back() {
    let daemon = Daemon::start();
    let wrong = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut document = document("lab");
        change(&mut document);
        daemon.unix(&post(&document.to_string()))
    };
    for (reply, path, phrase) in [
        (
            wrong(&|d| d["inbound"]["spi"] = "12".into()),
            "inbound.spi",
            "reserved",
        ),
        (
            wrong(&|d| d["outbound"]["key"] = KEY.into()),
            "outbound.key",
            "same key",
        ),
        (
            wrong(&|d| d["inbound"]["key"] = KEY.repeat(2).into()),
            "inbound.key",
            "takes 20 bytes",
        ),
        (
            wrong(&|d| d["routes"] = serde_json::json!(["10.0.0.1/8"])),
            "routes[0]",
            "write 10.0.0.0/8",
        ),
        (
            wrong(&|d| d["suit"] = "x".into()),
            "",
            "did you mean `suite`?",
        ),
        (
            wrong(&|d| drop(d.as_object_mut().unwrap().remove("remote"))),
            "",
            "`remote` is missing",
        ),
        (daemon.unix(&post("")), "", ""),
        (
            daemon.unix(&post("[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[")),
            "",
            "",
        ),
        (daemon.unix(&post("{\"name\": \"x\"")), "", ""),
    ] {
        assert_eq!(reply.status, 400, "{reply:?}");
        let fault: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
        assert_eq!(fault["path"], path, "{reply:?}");
        assert!(
            fault["error"].as_str().unwrap().contains(phrase),
            "{reply:?}"
        );
        assert!(!reply.body.contains(KEY), "a key shows in {reply:?}");
    }
    assert!(daemon.fake.installed().is_empty());
}

#[test]
fn a_body_is_bounded_however_it_announces_itself() {
    let daemon = Daemon::start();
    let large = " ".repeat((64 << 10) + 1);
    assert_eq!(daemon.unix(&post(&large)).status, 413);
    let chunk = format!("{:x}\r\n{large}\r\n0\r\n\r\n", large.len());
    let chunked = format!(
        "POST /v1/static-sas HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}"
    );
    assert_eq!(daemon.unix(&chunked).status, 413);
}

#[test]
fn garbage_is_refused_and_the_next_caller_is_served() {
    let daemon = Daemon::start();
    let many = (0..100)
        .map(|i| format!("X-{i}: y\r\n"))
        .collect::<String>();
    for garbage in [
        "\0\0\0\0\r\n\r\n".to_owned(),
        "GET\r\n\r\n".to_owned(),
        "GET / HTTP/9.9\r\n\r\n".to_owned(),
        "GET /\u{1} HTTP/1.1\r\n\r\n".to_owned(),
        "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{fc}\u{3}\u{3}\r\n\r\n".to_owned(),
        format!("GET / HTTP/1.1\r\n{many}\r\n"),
        format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(64 << 10)),
        "POST /v1/static-sas HTTP/1.1\r\nContent-Length: -1\r\n\r\n".to_owned(),
        "POST /v1/static-sas HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".to_owned(),
    ] {
        let reply = daemon.unix(&garbage);
        assert!(
            !(200..400).contains(&reply.status),
            "{garbage:?}: {reply:?}"
        );
        assert_eq!(
            daemon.unix(&get("/healthz")).status,
            200,
            "after {garbage:?}"
        );
    }
    // Hanging up half-way.
    for end in [1, 10, 30] {
        let request = post(&document("lab").to_string());
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        stream.write_all(&request.as_bytes()[..end]).unwrap();
    }
    assert_eq!(daemon.unix(&get("/healthz")).status, 200);
}

#[test]
fn one_connection_carries_one_request() {
    let daemon = Daemon::start();
    let reply = daemon.tcp(&get("/healthz").repeat(3));
    assert_eq!((reply.status, reply.body.as_str()), (200, "ok\n"));
    assert!(reply.head.contains("connection: close"), "{reply:?}");
}

#[test]
fn strangers_who_hold_every_tcp_place_do_not_lock_out_the_operator() {
    let bounds = Bounds {
        connections: 4,
        ..Bounds::default()
    };
    let daemon = Daemon::start_with(bounds);
    let idle: Vec<TcpStream> = (0..8)
        .map(|_| TcpStream::connect(daemon.address).unwrap())
        .collect();
    assert_eq!(daemon.unix(&get("/healthz")).status, 200);
    drop(idle);
    assert_eq!(daemon.tcp(&get("/healthz")).status, 200);
}

#[test]
fn a_client_that_never_finishes_its_headers_is_let_go() {
    let bounds = Bounds {
        header_timeout: Duration::from_millis(50),
        ..Bounds::default()
    };
    let daemon = Daemon::start_with(bounds);
    for start in ["", "GET / HT", "GET /healthz HTTP/1.1\r\nX: y\r\n"] {
        // Returns at all only if the server hangs up.
        let reply = daemon.tcp(start);
        assert!(matches!(reply.status, 0 | 400..500), "{start:?}: {reply:?}");
    }
}

#[test]
fn a_client_that_never_finishes_its_body_is_let_go() {
    let bounds = Bounds {
        connection_timeout: Duration::from_millis(100),
        ..Bounds::default()
    };
    let daemon = Daemon::start_with(bounds);
    let reply =
        daemon.unix("POST /v1/static-sas HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{");
    assert!(matches!(reply.status, 0 | 400..500), "{reply:?}");
    assert!(daemon.fake.installed().is_empty());
}

#[test]
fn the_socket_is_private_and_goes_with_the_daemon() {
    let mut daemon = Daemon::start();
    let mode = fs::metadata(daemon.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let left = |daemon: &Daemon| {
        fs::read_dir(daemon.directory.path().join("run"))
            .unwrap()
            .count()
    };
    assert_eq!(left(&daemon), 1, "nothing but the socket");
    daemon.stop();
    assert_eq!(left(&daemon), 0);
}

fn bind(path: &Path) -> Result<Server, BindError> {
    let api = Api {
        listen: None,
        socket: Some(path.to_owned()),
    };
    runtime().block_on(async { Server::bind(&api).await })
}

#[test]
fn a_second_daemon_leaves_the_first_ones_socket_alone() {
    let daemon = Daemon::start();
    let error = bind(&daemon.socket()).unwrap_err();
    assert!(
        matches!(error, BindError::Socket(SocketError::InUse(_))),
        "{error}"
    );
    assert_eq!(daemon.unix(&get("/healthz")).status, 200);
}

#[test]
fn a_socket_left_by_a_crash_is_replaced() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("api.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "std leaves the file behind, like a crash");
    drop(bind(&path).unwrap());
    assert!(!path.exists());
}

#[test]
fn a_file_in_the_sockets_place_is_not_touched() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("precious");
    fs::write(&path, "data").unwrap();
    let error = bind(&path).unwrap_err();
    assert!(error.to_string().contains("is no socket"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "data");
}

#[test]
fn a_socket_that_a_later_daemon_took_over_is_not_removed() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("api.sock");
    let first = bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let second = bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
}

#[test]
fn a_taken_tcp_address_is_an_error_that_names_the_setting() {
    let daemon = Daemon::start();
    let api = Api {
        listen: Some(daemon.address),
        socket: None,
    };
    let error = runtime()
        .block_on(async { Server::bind(&api).await })
        .unwrap_err();
    assert!(error.to_string().contains("api.listen"), "{error}");
}

#[test]
fn show_reads_the_status_over_both_sockets() {
    let daemon = Daemon::start();
    daemon.fake.0.lock().unwrap().status.node = "berlin".to_owned();
    for target in [
        Target::Tcp(daemon.address.to_string()),
        Target::Socket(daemon.socket()),
    ] {
        assert_eq!(show::fetch(&target).unwrap().node, "berlin");
    }
    daemon.fake.0.lock().unwrap().gone = true;
    let error = show::fetch(&Target::Socket(daemon.socket())).unwrap_err();
    assert!(
        matches!(&error, ShowError::Refused { answer, .. } if answer.contains("503")),
        "{error}"
    );
}

#[test]
fn show_says_so_when_nobody_answers() {
    let mut daemon = Daemon::start();
    daemon.stop();
    for target in [
        Target::Tcp(daemon.address.to_string()),
        Target::Socket(daemon.socket()),
    ] {
        let error = show::fetch(&target).unwrap_err();
        assert!(error.to_string().contains("is it running?"), "{error}");
    }
}
