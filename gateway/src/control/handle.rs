//! How HTTP and signals ask the control side.

use crate::{
    config::{StaticSa, StaticSaContext},
    http::{ApplyError, Backend, Gone},
    status::Status,
};
use tokio::sync::{mpsc, oneshot};

/// Requests that may wait.
const REQUESTS: usize = 64;

/// What may be asked.
pub(crate) enum Request {
    Status(oneshot::Sender<Status>),
    InstallStatic(Box<StaticSa>, oneshot::Sender<Result<(), ApplyError>>),
    RemoveStatic(String, oneshot::Sender<Result<(), ApplyError>>),
    Reload,
    Stop,
}

/// Asks the control side. Cheap to clone.
#[derive(Clone)]
pub struct ControlHandle {
    requests: mpsc::Sender<Request>,
    static_sa_context: StaticSaContext,
}

pub(crate) fn channel(
    static_sa_context: StaticSaContext,
) -> (ControlHandle, mpsc::Receiver<Request>) {
    let (requests, receiver) = mpsc::channel(REQUESTS);
    let handle = ControlHandle {
        requests,
        static_sa_context,
    };
    (handle, receiver)
}

impl ControlHandle {
    /// Reads the configuration file again (SIGHUP). What comes of it is logged and counted.
    pub async fn reload(&self) {
        let _ = self.requests.send(Request::Reload).await;
    }

    /// Ends the daemon in good order.
    pub async fn stop(&self) {
        let _ = self.requests.send(Request::Stop).await;
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, Gone> {
        let (answer, answered) = oneshot::channel();
        self.requests
            .send(request(answer))
            .await
            .map_err(|_| Gone)?;
        answered.await.map_err(|_| Gone)
    }
}

impl Backend for ControlHandle {
    async fn status(&self) -> Result<Status, Gone> {
        self.ask(Request::Status).await
    }

    fn static_sa_context(&self) -> StaticSaContext {
        self.static_sa_context.clone()
    }

    async fn install_static(&self, sa: StaticSa) -> Result<(), ApplyError> {
        self.ask(|answer| Request::InstallStatic(Box::new(sa), answer))
            .await
            .map_err(|Gone| ApplyError::Gone)?
    }

    async fn remove_static(&self, name: String) -> Result<(), ApplyError> {
        self.ask(|answer| Request::RemoveStatic(name, answer))
            .await
            .map_err(|Gone| ApplyError::Gone)?
    }
}
