//! The client against a charon of our own on a real socket, which says what the test tells it to. The clock is
//! tokio's simulated one: it moves when all wait, so that no load on the machine makes anything late.

use super::*;
use crate::vici::{Packet, PacketReader};
use std::{collections::HashMap, path::Path};
use tokio::net::{UnixListener, UnixStream};

/// What charon does when it is asked.
#[derive(Clone, Default)]
struct Charon {
    /// IKE_SAs it has, by name.
    sas: Vec<(&'static str, Message)>,
    /// Children on demand.
    traps: Vec<Message>,
    /// Events it does not have.
    lacks: Vec<&'static str>,
    /// Events it tells in the middle of a dump.
    during_dump: Vec<(&'static str, Message)>,
    /// Commands it refuses.
    refuses: HashMap<&'static str, &'static str>,
    /// Commands it never answers.
    ignores: Vec<&'static str>,
}

/// One connection of charon's.
struct Served {
    stream: UnixStream,
    reader: PacketReader,
}

impl Served {
    async fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().await.unwrap();
        Self {
            stream,
            reader: PacketReader::default(),
        }
    }

    async fn say(&mut self, packet: Packet) {
        let bytes = packet.encode().unwrap();
        let mut bytes = &bytes[..];
        while !bytes.is_empty() {
            self.stream.writable().await.unwrap();
            // In small pieces, so that the client's reader has to wait within packets.
            let piece = &bytes[..bytes.len().min(7)];
            match self.stream.try_write(piece) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
    }

    /// `None` once the client has gone.
    async fn hear(&mut self) -> Option<Packet> {
        let mut received = [0; 4096];
        loop {
            if let Some(packet) = self.reader.next_packet().unwrap() {
                return Some(packet);
            }
            self.stream.readable().await.unwrap();
            match self.stream.try_read(&mut received) {
                Ok(0) => return None,
                Ok(bytes) => self.reader.push(&received[..bytes]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return None,
            }
        }
    }

    /// Answers as charon would until `last` was asked and answered; gives all commands.
    async fn serve_until(&mut self, charon: &Charon, last: &str) -> Vec<(String, Message)> {
        let mut commands = Vec::new();
        while let Some(packet) = self.hear().await {
            match packet {
                Packet::Register(event) if charon.lacks.contains(&&*event) => {
                    self.say(Packet::UnknownEvent).await;
                }
                Packet::Register(_) => self.say(Packet::Confirmed).await,
                Packet::Request(command, arguments) => {
                    self.answer(charon, &command).await;
                    let done = command == last;
                    commands.push((command, arguments));
                    if done {
                        break;
                    }
                }
                other => panic!("charon does not expect {other:?}"),
            }
        }
        commands
    }

    async fn answer(&mut self, charon: &Charon, command: &str) {
        if charon.ignores.contains(&command) {
            return;
        }
        let event = |name: &str, message| Packet::Event(name.to_owned(), message);
        match command {
            "list-sas" => {
                for (index, (name, sa)) in charon.sas.iter().enumerate() {
                    let sa = Message::new().with_section(name, sa.clone());
                    self.say(event("list-sa", sa)).await;
                    for (name, message) in charon.during_dump.iter().filter(|_| index == 0) {
                        self.say(event(name, message.clone())).await;
                    }
                }
            }
            "list-policies" => {
                for trap in &charon.traps {
                    self.say(event("list-policy", trap.clone())).await;
                }
            }
            _ => {}
        }
        let answer = match (command, charon.refuses.get(command)) {
            ("version", _) => Message::new()
                .with("daemon", "charon")
                .with("version", "6.0.1"),
            (_, Some(reason)) => Message::new().with("success", "no").with("errmsg", reason),
            ("list-sas" | "list-policies", None) => Message::new(),
            _ => Message::new().with("success", "yes"),
        };
        self.say(Packet::Response(answer)).await;
    }
}

/// A client and the socket it talks to.
struct Scene {
    listener: UnixListener,
    requests: mpsc::Sender<ViciRequest>,
    events: mpsc::Receiver<ViciEvent>,
    _directory: tempfile::TempDir,
}

impl Scene {
    fn new(change: impl FnOnce(&mut ViciSettings)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("charon.vici");
        let listener = UnixListener::bind(&socket).unwrap();
        let (requests, events) = start(&socket, change);
        Self {
            listener,
            requests,
            events,
            _directory: directory,
        }
    }

    async fn event(&mut self) -> ViciEvent {
        self.events.recv().await.expect("an event")
    }

    /// Serves a whole beginning, and takes its snapshot and traps.
    async fn begin(&mut self, charon: &Charon) -> (Served, Vec<String>) {
        let mut served = Served::accept(&self.listener).await;
        served.serve_until(charon, "list-policies").await;
        let ViciEvent::Snapshot(sas) = self.event().await else {
            panic!("a snapshot comes first");
        };
        let traps = self.event().await;
        assert!(matches!(traps, ViciEvent::Traps(_)), "{traps:?}");
        (served, sas.into_iter().map(|sa| sa.name).collect())
    }
}

fn start(
    socket: &Path,
    change: impl FnOnce(&mut ViciSettings),
) -> (mpsc::Sender<ViciRequest>, mpsc::Receiver<ViciEvent>) {
    let mut settings = ViciSettings {
        socket: socket.to_owned(),
        retry: (Duration::from_millis(1), Duration::from_millis(4)),
        ..ViciSettings::default()
    };
    change(&mut settings);
    let (requests, asked) = mpsc::channel(8);
    let (told, events) = mpsc::channel(2);
    tokio::spawn(run(settings, asked, told));
    (requests, events)
}

fn sa(unique_id: u32) -> Message {
    Message::new()
        .with("uniqueid", unique_id)
        .with("state", "ESTABLISHED")
}

fn up(name: &str, unique_id: u32) -> Message {
    Message::new()
        .with("up", "yes")
        .with_section(name, sa(unique_id))
}

#[tokio::test(start_paused = true)]
async fn what_happens_during_the_dump_is_told_behind_it() {
    let mut scene = Scene::new(|_| {});
    let charon = Charon {
        sas: vec![("berlin", sa(1)), ("paris", sa(2))],
        during_dump: vec![("ike-updown", up("oslo", 3)), ("ike-updown", up("rome", 4))],
        lacks: vec!["ike-update"],
        ..Charon::default()
    };
    let mut served = Served::accept(&scene.listener).await;
    let server = async { served.serve_until(&charon, "list-policies").await };
    let client = async {
        let snapshot = scene.event().await;
        let ViciEvent::Snapshot(sas) = &snapshot else {
            panic!("{snapshot:?}");
        };
        assert_eq!(
            sas.iter().map(|sa| sa.unique_id).collect::<Vec<_>>(),
            [1, 2]
        );
        assert_eq!(scene.event().await, ViciEvent::Traps(Vec::new()));
        for name in ["oslo", "rome"] {
            let event = scene.event().await;
            assert!(
                matches!(&event, ViciEvent::IkeUpDown { up: true, ike } if ike.name == name),
                "{event:?}"
            );
        }
    };
    let (commands, ()) = tokio::join!(server, client);
    let commands: Vec<_> = commands.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(commands, ["version", "list-sas", "list-policies"]);
}

#[tokio::test(start_paused = true)]
async fn a_restarted_charon_is_followed_from_a_fresh_snapshot() {
    let mut scene = Scene::new(|_| {});
    let mut charon = Charon {
        sas: vec![("berlin", sa(1))],
        ..Charon::default()
    };
    let (served, names) = scene.begin(&charon).await;
    assert_eq!(names, ["berlin"]);
    drop(served);
    assert_eq!(scene.event().await, ViciEvent::Lost);
    // It dies once more while it is asked: no snapshot, so nothing to be lost.
    let mut served = Served::accept(&scene.listener).await;
    charon.ignores = vec!["list-sas"];
    served.serve_until(&charon, "list-sas").await;
    drop(served);
    charon = Charon {
        sas: vec![("oslo", sa(2))],
        ..Charon::default()
    };
    assert_eq!(scene.begin(&charon).await.1, ["oslo"]);
}

#[tokio::test(start_paused = true)]
async fn bytes_that_are_no_vici_end_the_conversation_and_the_next_begins() {
    let mut scene = Scene::new(|_| {});
    let (served, _) = scene.begin(&Charon::default()).await;
    served.stream.writable().await.unwrap();
    served.stream.try_write(b"HTTP/1.1 400\r\n").unwrap();
    assert_eq!(scene.event().await, ViciEvent::Lost);
    scene.begin(&Charon::default()).await;
}

#[tokio::test(start_paused = true)]
async fn an_unreadable_event_is_made_up_for_by_a_dump() {
    let mut scene = Scene::new(|settings| settings.look_every = Duration::from_millis(5));
    let (mut served, names) = scene.begin(&Charon::default()).await;
    assert!(names.is_empty());
    let unreadable = Message::new().with_section("berlin", Message::new());
    served
        .say(Packet::Event("ike-updown".into(), unreadable))
        .await;
    let charon = Charon {
        sas: vec![("berlin", sa(1))],
        ..Charon::default()
    };
    let server = served.serve_until(&charon, "list-sas");
    let client = scene.event();
    let (_, snapshot) = tokio::join!(server, client);
    assert!(
        matches!(&snapshot, ViciEvent::Snapshot(sas) if sas[0].name == "berlin"),
        "{snapshot:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_silent_charon_is_left_and_found_again() {
    let mut scene = Scene::new(|settings| settings.answer_within = Duration::from_millis(50));
    let mut served = Served::accept(&scene.listener).await;
    let deaf = Charon {
        ignores: vec!["list-sas"],
        ..Charon::default()
    };
    served.serve_until(&deaf, "list-sas").await;
    assert_eq!(served.hear().await, None);
    scene.begin(&Charon::default()).await;
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_sleeps_gets_a_snapshot_in_place_of_what_it_missed() {
    let mut scene = Scene::new(|settings| settings.answer_within = Duration::from_millis(200));
    let (mut served, _) = scene.begin(&Charon::default()).await;
    // More than the two that find room in the queue.
    for unique_id in 0..4 {
        served
            .say(Packet::Event("ike-updown".into(), up("berlin", unique_id)))
            .await;
    }
    assert_eq!(served.hear().await, None);
    for unique_id in 0..2 {
        let event = scene.event().await;
        assert!(
            matches!(&event, ViciEvent::IkeUpDown { ike, .. } if ike.unique_id == unique_id),
            "{event:?}"
        );
    }
    assert_eq!(scene.event().await, ViciEvent::Lost);
    scene.begin(&Charon::default()).await;
}

#[tokio::test(start_paused = true)]
async fn commands_are_carried_out_and_a_refusal_harms_nothing() {
    let mut scene = Scene::new(|_| {});
    let charon = Charon {
        refuses: HashMap::from([("rekey", "no matching SAs to rekey found")]),
        ..Charon::default()
    };
    let (mut served, _) = scene.begin(&charon).await;
    let requests = scene.requests.clone();
    requests
        .send(ViciRequest::RekeyChild { unique_id: 6 })
        .await
        .unwrap();
    requests
        .send(ViciRequest::TerminateChild { unique_id: 7 })
        .await
        .unwrap();
    let commands = served.serve_until(&charon, "terminate").await;
    assert_eq!(
        commands,
        [
            ("rekey".to_owned(), Message::new().with("child-id", 6)),
            (
                "terminate".to_owned(),
                Message::new().with("child-id", 7).with("timeout", -1)
            ),
        ]
    );
    served
        .say(Packet::Event("ike-updown".into(), up("berlin", 1)))
        .await;
    assert!(matches!(scene.event().await, ViciEvent::IkeUpDown { .. }));
}

#[tokio::test(start_paused = true)]
async fn an_initiate_waits_aside_and_tells_its_outcome() {
    let mut scene = Scene::new(|_| {});
    let (mut served, _) = scene.begin(&Charon::default()).await;
    let initiate = |child: &str| ViciRequest::Initiate {
        ike: "site".to_owned(),
        child: child.to_owned(),
    };
    scene.requests.send(initiate("net")).await.unwrap();
    let mut aside = Served::accept(&scene.listener).await;
    let slow = Charon {
        ignores: vec!["initiate"],
        ..Charon::default()
    };
    let commands = aside.serve_until(&slow, "initiate").await;
    assert_eq!(commands[0].1.text("child").unwrap(), "net");
    assert_eq!(commands[0].1.text("timeout").unwrap(), "180000");
    // Events go on while it waits.
    served
        .say(Packet::Event("ike-updown".into(), up("berlin", 1)))
        .await;
    assert!(matches!(scene.event().await, ViciEvent::IkeUpDown { .. }));
    for (success, child) in [("yes", "net"), ("no", "web")] {
        if child == "web" {
            scene.requests.send(initiate(child)).await.unwrap();
            aside = Served::accept(&scene.listener).await;
            aside.serve_until(&slow, "initiate").await;
        }
        aside
            .say(Packet::Response(Message::new().with("success", success)))
            .await;
        let expected = ViciEvent::InitiateEnded {
            ike: "site".to_owned(),
            child: child.to_owned(),
            done: success == "yes",
        };
        assert_eq!(scene.event().await, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn without_charon_it_waits_refuses_initiates_and_ends_when_told() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("charon.vici");
    let (requests, mut events) = start(&socket, |_| {});
    let (ike, child) = ("site".to_owned(), "net".to_owned());
    let initiate = ViciRequest::Initiate {
        ike: ike.clone(),
        child: child.clone(),
    };
    requests.send(initiate).await.unwrap();
    let done = false;
    assert_eq!(
        events.recv().await,
        Some(ViciEvent::InitiateEnded { ike, child, done })
    );
    drop(requests);
    assert_eq!(events.recv().await, None);
}

#[tokio::test(start_paused = true)]
async fn traps_are_told_when_they_change_and_only_then() {
    let mut scene = Scene::new(|settings| settings.look_every = Duration::from_millis(5));
    let trap = Message::new().with_section(
        "site/net",
        Message::new()
            .with("ike", "site")
            .with("child", "net")
            .with_list("local-ts", ["10.1.0.0/16"])
            .with_list("remote-ts", ["10.2.0.0/16"]),
    );
    let mut charon = Charon::default();
    let (mut served, _) = scene.begin(&charon).await;
    for _ in 0..3 {
        served.serve_until(&charon, "list-policies").await;
    }
    charon.traps = vec![trap];
    let (_, event) = tokio::join!(served.serve_until(&charon, "list-policies"), scene.event());
    assert!(
        matches!(&event, ViciEvent::Traps(traps) if traps[0].child == "net"),
        "{event:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_command_that_ran_out_of_time_spoils_the_channel() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut channel = Channel::over(ours);
    let limit = Duration::from_millis(5);
    let error = channel
        .request("stats", Message::new(), limit)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("`stats` within 0.005 s"),
        "{error}"
    );
    let error = channel
        .request("version", Message::new(), limit)
        .await
        .unwrap_err();
    assert!(matches!(error, ViciError::Spoilt), "{error}");
    drop(theirs);
    let error = channel.next_event().await.unwrap_err();
    assert!(error.to_string().contains("has closed"), "{error}");
}
