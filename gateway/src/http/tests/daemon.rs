//! A server on real sockets with a fake daemon behind it, and what its callers say.

use super::*;

/// What the fake daemon knows.
#[derive(Default)]
pub(super) struct State {
    pub(super) status: Status,
    pub(super) installed: Vec<String>,
    pub(super) gone: bool,
}

#[derive(Clone, Default)]
pub(super) struct Fake(pub(super) Arc<Mutex<State>>);

impl Fake {
    pub(super) fn installed(&self) -> Vec<String> {
        self.0.lock().unwrap().installed.clone()
    }
}

impl Backend for Fake {
    async fn status(&self) -> Result<Status, Gone> {
        let state = self.0.lock().unwrap();
        if state.gone {
            Err(Gone)
        } else {
            Ok(state.status.clone())
        }
    }

    fn static_sa_context(&self) -> StaticSaContext {
        StaticSaContext {
            listen_port: 4500,
            directory: Some("/".into()),
        }
    }

    async fn install_static(&self, sa: StaticSa) -> Result<(), ApplyError> {
        let installed = &mut self.0.lock().unwrap().installed;
        if installed.contains(&sa.name) {
            return Err(ApplyError::Conflict {
                path: "name".to_owned(),
                message: format!("`{}` is installed already", sa.name),
            });
        }
        installed.push(sa.name);
        Ok(())
    }

    async fn remove_static(&self, name: String) -> Result<(), ApplyError> {
        let installed = &mut self.0.lock().unwrap().installed;
        match installed.iter().position(|other| *other == name) {
            Some(index) => {
                installed.remove(index);
                Ok(())
            }
            None => Err(ApplyError::Unknown(name)),
        }
    }
}

/// A server in a thread of its own; stopped and joined when the story ends.
pub(super) struct Daemon {
    pub(super) directory: TempDir,
    pub(super) address: SocketAddr,
    pub(super) fake: Fake,
    pub(super) stop: Option<oneshot::Sender<()>>,
    pub(super) thread: Option<JoinHandle<()>>,
}

impl Daemon {
    pub(super) fn start() -> Self {
        Self::start_with(Bounds::default())
    }

    pub(super) fn start_with(bounds: Bounds) -> Self {
        let directory = TempDir::new().unwrap();
        let api = Api {
            listen: Some("127.0.0.1:0".parse().unwrap()),
            socket: Some(directory.path().join("run/api.sock")),
        };
        let fake = Fake::default();
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let backend = fake.clone();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async {
                let server = Server::bind(&api).await.unwrap().bounded(bounds);
                tell.send(server.tcp_address().unwrap()).unwrap();
                server.run(backend, async { drop(stopped.await) }).await;
            });
        });
        Self {
            directory,
            address: told.recv().unwrap(),
            fake,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory.path().join("run/api.sock")
    }

    pub(super) fn tcp(&self, request: &str) -> Reply {
        talk(
            TcpStream::connect(self.address).unwrap(),
            request.as_bytes(),
        )
    }

    pub(super) fn unix(&self, request: &str) -> Reply {
        talk(
            UnixStream::connect(self.socket()).unwrap(),
            request.as_bytes(),
        )
    }

    pub(super) fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}

pub(super) fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

/// An answer, taken apart.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

/// Sends and reads to the end; a server that hangs up early is an answer as well (status 0).
pub(super) fn talk(mut stream: impl Read + Write, request: &[u8]) -> Reply {
    let _ = stream.write_all(request);
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    Reply {
        status: head
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .unwrap_or(0),
        head: head.to_ascii_lowercase(),
        body: body.to_owned(),
    }
}

pub(super) fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
}

pub(super) fn post(body: &str) -> String {
    format!(
        "POST /v1/static-sas HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

pub(super) const KEY: &str = "a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1";

pub(super) fn document(name: &str) -> serde_json::Value {
    serde_json::json!({
        "name": name,
        "remote": "192.0.2.2",
        "suite": "aes128gcm16",
        "inbound": { "spi": "0x1001", "key": KEY },
        "outbound": { "spi": "0x2001", "key": KEY.replace('a', "b") },
        "routes": ["10.9.0.0/16"],
    })
}
