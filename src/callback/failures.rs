//! From the errors of sockets and libraries to failures: a class, and a text a person can act on.
//!
//! Libraries wrap what happened several times over. What counts is at the bottom: an error of the system, of TLS or of
//! the look-up of a name.

use std::error::Error;
use std::io::{self, ErrorKind};
use std::time::Duration;

use super::connect::Late;
use super::guard::Forbidden;
use super::names::Unresolved;
use crate::task::{Failure, FailureClass};

/// No way to the receiver at all: what `error` says about that.
pub fn cannot_connect(place: &str, error: &(dyn Error + 'static)) -> Failure {
    if let Some(Late(within)) = found(error) {
        return no_connection(place, *within);
    }
    let (class, why) = cause(error).unwrap_or((FailureClass::Unreachable, bottom(error).to_string()));
    // A connection that broke before it was one.
    let class = if class == FailureClass::Broken { FailureClass::Unreachable } else { class };
    Failure::new(class, format!("{place}: cannot connect: {why}"))
}

/// There was a connection.
pub fn broken(place: &str, error: &(dyn Error + 'static)) -> Failure {
    let why = cause(error).map_or_else(|| bottom(error).to_string(), |(_, why)| why);
    Failure::new(FailureClass::Broken, format!("{place}: the connection broke before the answer: {why}"))
}

pub fn no_connection(place: &str, within: Duration) -> Failure {
    Failure::new(FailureClass::Timeout, format!("{place}: no connection within {} ms", within.as_millis()))
}

pub fn no_answer(place: &str, within: Duration) -> Failure {
    Failure::new(FailureClass::Timeout, format!("{place}: no answer within {} ms", within.as_millis()))
}

/// What is at the bottom of `error`, if it is one of those that say more than the rest.
fn cause(error: &(dyn Error + 'static)) -> Option<(FailureClass, String)> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<Unresolved>() {
            return Some((FailureClass::Unreachable, error.to_string()));
        }
        if let Some(error) = error.downcast_ref::<Forbidden>() {
            return Some((FailureClass::Forbidden, error.to_string()));
        }
        if let Some(error) = error.downcast_ref::<rustls::Error>() {
            return Some((FailureClass::Unreachable, no_tls(error)));
        }
        if let Some(error) = error.downcast_ref::<io::Error>() {
            // An error of the system that holds another one does not name it as its source.
            return match error.get_ref() {
                Some(inner) => cause(inner).or_else(|| Some((io_class(error.kind()), error.to_string()))),
                None => Some((io_class(error.kind()), error.to_string())),
            };
        }
        next = error.source();
    }
    None
}

/// The first error of this kind, among those that `error` came from.
fn found<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

fn io_class(kind: ErrorKind) -> FailureClass {
    match kind {
        ErrorKind::ConnectionRefused => FailureClass::Refused,
        ErrorKind::TimedOut => FailureClass::Timeout,
        ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe
        | ErrorKind::NotConnected
        | ErrorKind::UnexpectedEof => FailureClass::Broken,
        _ => FailureClass::Unreachable,
    }
}

fn no_tls(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(_) => format!("its certificate is not accepted: {error}"),
        _ => format!("no TLS with it: {error}"),
    }
}

fn bottom<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    let mut bottom = error;
    while let Some(source) = bottom.source() {
        bottom = source;
    }
    bottom
}
