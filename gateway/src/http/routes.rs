//! One request, one answer.

use super::{ApplyError, Backend, server::Access};
use crate::{
    config::{Problem, SHOWN_PROBLEMS, StaticSa},
    status::Status,
    telemetry::metrics,
};
use esplane_api::DropReason;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes},
    header,
};
use serde::Serialize;
use std::{future::Future, time::Duration};
use tokio::time::timeout;
use zeroize::Zeroizing;

const MAX_BODY_BYTES: usize = 64 << 10;
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
const BACKEND_TIMEOUT: Duration = Duration::from_secs(5);

const STATIC_SAS: &str = "/v1/static-sas";
const READABLE: [&str; 8] = [
    "/metrics",
    "/healthz",
    "/readyz",
    "/v1/status",
    "/v1/peers",
    "/v1/sas",
    "/v1/routes",
    "/v1/drops",
];

type Answer = Response<Full<Bytes>>;

pub(super) async fn answer<B, R>(backend: &B, access: Access, request: Request<R>) -> Answer
where
    B: Backend,
    R: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send,
{
    let path = request.uri().path().to_owned();
    if READABLE.contains(&path.as_str()) {
        return match *request.method() {
            Method::GET | Method::HEAD => read(backend, &path).await,
            _ => wrong_method("GET, HEAD"),
        };
    }
    let name = path.strip_prefix(STATIC_SAS);
    match name.map(|rest| rest.strip_prefix('/').unwrap_or(rest)) {
        Some("") => match *request.method() {
            Method::POST if access == Access::Full => install(backend, request).await,
            Method::POST => read_only(),
            _ => wrong_method("POST"),
        },
        Some(name) if path.starts_with("/v1/static-sas/") => match *request.method() {
            Method::DELETE if access == Access::Full => remove(backend, name).await,
            Method::DELETE => read_only(),
            _ => wrong_method("DELETE"),
        },
        _ => not_found(),
    }
}

/// What is shown to everybody.
async fn read<B: Backend>(backend: &B, path: &str) -> Answer {
    let status = match within(backend.status()).await {
        Some(Ok(status)) => status,
        Some(Err(gone)) => return fault(StatusCode::SERVICE_UNAVAILABLE, "", gone),
        None => {
            let stuck = "the control loop does not answer";
            return fault(StatusCode::SERVICE_UNAVAILABLE, "", stuck);
        }
    };
    match path {
        "/metrics" => match metrics::render(&status) {
            Ok(text) => reply(StatusCode::OK, metrics::CONTENT_TYPE, text),
            Err(error) => fault(StatusCode::INTERNAL_SERVER_ERROR, "", error),
        },
        "/healthz" => plain(StatusCode::OK, "ok\n"),
        "/readyz" if status.ready => plain(StatusCode::OK, "ready\n"),
        "/readyz" => {
            let reason = status.not_ready_because.as_deref();
            let reason = reason.unwrap_or("not started yet");
            plain(
                StatusCode::SERVICE_UNAVAILABLE,
                &format!("not ready: {reason}\n"),
            )
        }
        "/v1/peers" => json(StatusCode::OK, &status.peers),
        "/v1/sas" => json(StatusCode::OK, &status.sas),
        "/v1/routes" => json(StatusCode::OK, &status.routes),
        "/v1/drops" => json(StatusCode::OK, &drops(&status)),
        _ => json(StatusCode::OK, &status),
    }
}

/// One reason with its count and meaning.
#[derive(Serialize)]
struct DropRow {
    reason: &'static str,
    stage: esplane_api::DropStage,
    packets: u64,
    expected: bool,
    meaning: &'static str,
}

fn drops(status: &Status) -> Vec<DropRow> {
    let row = |reason: &DropReason| DropRow {
        reason: reason.name(),
        stage: reason.stage(),
        packets: status.dropped(*reason),
        expected: reason.is_expected(),
        meaning: reason.meaning(),
    };
    DropReason::ALL.iter().map(row).collect()
}

async fn install<B, R>(backend: &B, request: Request<R>) -> Answer
where
    B: Backend,
    R: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send,
{
    let body = match body(request).await {
        Ok(body) => body,
        Err(answer) => return *answer,
    };
    let Ok(text) = std::str::from_utf8(&body) else {
        return fault(
            StatusCode::BAD_REQUEST,
            "",
            "the body is not UTF-8; send JSON",
        );
    };
    let sa = match StaticSa::from_request(&backend.static_sa_context(), text) {
        Ok(sa) => sa,
        Err(problems) => return problems_answer(&problems),
    };
    let name = sa.name.clone();
    match applied(within(backend.install_static(sa)).await) {
        Ok(()) => json(StatusCode::CREATED, &serde_json::json!({ "name": name })),
        Err(answer) => *answer,
    }
}

async fn remove<B: Backend>(backend: &B, name: &str) -> Answer {
    match applied(within(backend.remove_static(name.to_owned())).await) {
        Ok(()) => reply(StatusCode::NO_CONTENT, "application/json", ""),
        Err(answer) => *answer,
    }
}

fn applied(result: Option<Result<(), ApplyError>>) -> Result<(), Box<Answer>> {
    let Some(result) = result else {
        let stuck =
            "the control loop does not answer; whether the change was made shows /v1/status";
        return Err(Box::new(fault(StatusCode::SERVICE_UNAVAILABLE, "", stuck)));
    };
    result.map_err(|error| {
        let (status, path) = match &error {
            ApplyError::Gone => (StatusCode::SERVICE_UNAVAILABLE, ""),
            ApplyError::Unknown(_) => (StatusCode::NOT_FOUND, "name"),
            ApplyError::Conflict { path, .. } => (StatusCode::CONFLICT, path.as_str()),
            ApplyError::Failed(_) => (StatusCode::INTERNAL_SERVER_ERROR, ""),
        };
        Box::new(fault(status, path, &error))
    })
}

/// It may hold keys, so it is wiped on drop.
async fn body<R>(request: Request<R>) -> Result<Zeroizing<Vec<u8>>, Box<Answer>>
where
    R: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send,
{
    let limited = Limited::new(request.into_body(), MAX_BODY_BYTES);
    let collected = match timeout(BODY_TIMEOUT, Box::pin(limited).collect()).await {
        Ok(Ok(collected)) => collected,
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let message = format!("the body is larger than {MAX_BODY_BYTES} bytes");
            return Err(Box::new(fault(StatusCode::PAYLOAD_TOO_LARGE, "", message)));
        }
        Ok(Err(error)) => return Err(Box::new(fault(StatusCode::BAD_REQUEST, "", error))),
        Err(_) => {
            let message = "the body did not arrive in time";
            return Err(Box::new(fault(StatusCode::REQUEST_TIMEOUT, "", message)));
        }
    };
    Ok(Zeroizing::new(collected.to_bytes().to_vec()))
}

async fn within<T>(answer: impl Future<Output = T>) -> Option<T> {
    timeout(BACKEND_TIMEOUT, answer).await.ok()
}

/// The shape of every error: what is wrong and which of the body's keys is to blame.
#[derive(Serialize)]
struct Fault<'a> {
    error: &'a str,
    path: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    problems: Vec<Place<'a>>,
    /// Problems beyond those listed.
    #[serde(skip_serializing_if = "is_none")]
    more: usize,
}

fn is_none(more: &usize) -> bool {
    *more == 0
}

/// One of several problems of a body.
#[derive(Serialize)]
struct Place<'a> {
    line: usize,
    column: usize,
    path: &'a str,
    error: &'a str,
}

fn problems_answer(problems: &[Problem]) -> Answer {
    let listed = problems.iter().take(SHOWN_PROBLEMS);
    let places = listed.map(|problem| Place {
        line: problem.line,
        column: problem.column,
        path: &problem.path,
        error: &problem.message,
    });
    let first = problems.first();
    let body = Fault {
        error: first.map_or("wrong", |problem| &problem.message),
        path: first.map_or("", |problem| &problem.path),
        problems: places.collect(),
        more: problems.len().saturating_sub(SHOWN_PROBLEMS),
    };
    json(StatusCode::BAD_REQUEST, &body)
}

fn fault(status: StatusCode, path: &str, error: impl ToString) -> Answer {
    let error = error.to_string();
    let body = Fault {
        error: &error,
        path,
        problems: Vec::new(),
        more: 0,
    };
    json(status, &body)
}

fn wrong_method(allowed: &'static str) -> Answer {
    let mut answer = fault(
        StatusCode::METHOD_NOT_ALLOWED,
        "",
        format!("this path takes {allowed}"),
    );
    let headers = answer.headers_mut();
    headers.insert(header::ALLOW, header::HeaderValue::from_static(allowed));
    answer
}

fn read_only() -> Answer {
    fault(
        StatusCode::FORBIDDEN,
        "",
        "changes are made over the unix socket only (`api.socket`)",
    )
}

fn not_found() -> Answer {
    let paths = READABLE
        .iter()
        .copied()
        .chain([STATIC_SAS, "/v1/static-sas/NAME"]);
    let paths: Vec<&str> = paths.collect();
    let body = serde_json::json!({ "error": "no such path", "path": "", "paths": paths });
    json(StatusCode::NOT_FOUND, &body)
}

fn plain(status: StatusCode, text: &str) -> Answer {
    reply(status, "text/plain; charset=utf-8", text.to_owned())
}

fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(mut body) => {
            body.push(b'\n');
            reply(status, "application/json", body)
        }
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let value = header::HeaderValue::from_static(content_type);
    answer.headers_mut().insert(header::CONTENT_TYPE, value);
    answer
}
