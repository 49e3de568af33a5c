//! Listening, and the bounds of each connection.

use super::{
    Backend, routes,
    socket::{OwnedSocket, SocketError},
};
use crate::config::Api;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

/// How long to leave it be when the system has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What one stranger, or many, can take from us at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// At once, on each of the two listeners by itself: strangers on TCP cannot lock out the
    /// operator.
    pub(super) connections: usize,
    /// Slower clients than this are no clients of ours.
    pub(super) header_timeout: Duration,
    /// From the first byte to the last.
    pub(super) connection_timeout: Duration,
    pub(super) headers: usize,
    pub(super) header_bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: 32,
            header_timeout: Duration::from_secs(5),
            connection_timeout: Duration::from_secs(30),
            headers: 64,
            header_bytes: 16 << 10,
        }
    }
}

/// Who may do what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Over TCP.
    ReadOnly,
    /// Over the unix socket, whose mode decides who gets here.
    Full,
}

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// TCP.
    #[error("cannot listen at {address}: {error}; see `api.listen`")]
    Tcp {
        /// Where.
        address: SocketAddr,
        /// Why not.
        error: io::Error,
    },
    /// The unix socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
}

/// The listening server, not yet answering. Dropped, it removes its socket.
#[derive(Debug)]
pub struct Server {
    tcp: Option<TcpListener>,
    unix: Option<OwnedSocket>,
    bounds: Bounds,
}

impl Server {
    /// Listens where `api` says, so that a wrong address is known before the daemon starts.
    pub async fn bind(api: &Api) -> Result<Self, BindError> {
        let unix = api.socket.as_deref().map(OwnedSocket::bind).transpose()?;
        let tcp = match api.listen {
            Some(address) => {
                let bound = TcpListener::bind(address).await;
                Some(bound.map_err(|error| BindError::Tcp { address, error })?)
            }
            None => None,
        };
        Ok(Self {
            tcp,
            unix,
            bounds: Bounds::default(),
        })
    }

    #[cfg(test)]
    pub(super) fn bounded(self, bounds: Bounds) -> Self {
        Self { bounds, ..self }
    }

    /// The TCP address, with the port that the system chose if 0 was asked for.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref()?.local_addr().ok()
    }

    /// Answers until `shutdown` is done.
    pub async fn run<B: Backend>(self, backend: B, shutdown: impl Future<Output = ()>) {
        let tcp = async {
            if let Some(listener) = &self.tcp {
                let accept = || async { listener.accept().await.map(|(stream, _)| stream) };
                serve(accept, Access::ReadOnly, self.bounds, &backend).await;
            }
        };
        let unix = async {
            if let Some(socket) = &self.unix {
                let accept = || async { socket.listener.accept().await.map(|(stream, _)| stream) };
                serve(accept, Access::Full, self.bounds, &backend).await;
            }
        };
        let both = async { tokio::join!(tcp, unix) };
        tokio::pin!(both);
        tokio::pin!(shutdown);
        tokio::select! {
            // With neither listener there is nothing to serve, but the daemon goes on.
            _ = async { both.await; std::future::pending::<()>().await } => {}
            () = &mut shutdown => {}
        }
    }
}

/// Accepts for ever; ended by dropping, which ends all its connections as well.
async fn serve<B, S, F>(accept: impl Fn() -> F, access: Access, bounds: Bounds, backend: &B)
where
    B: Backend,
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    F: Future<Output = io::Result<S>>,
{
    let places = Arc::new(Semaphore::new(bounds.connections));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match accept().await {
            Ok(stream) => {
                let connection = connection(stream, access, bounds, backend.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept an API connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn connection<B: Backend>(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    access: Access,
    bounds: Bounds,
    backend: B,
) {
    let service = service_fn(move |request| {
        let backend = backend.clone();
        async move { Ok::<_, std::convert::Infallible>(routes::answer(&backend, access, request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(bounds.header_timeout)
        .max_headers(bounds.headers)
        .max_buf_size(bounds.header_bytes)
        // One request a connection: nobody holds a place without asking for something.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(bounds.connection_timeout, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "API connection ended"),
        Err(_) => debug!("API connection took too long"),
    }
}
