//! As much of HTTP/1.1 (RFC 9112) as one page needs: one request a connection, by GET or HEAD, without a
//! body.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use httparse::{EMPTY_HEADER, Request, Status};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use reactor::Clock;

/// The largest request, with all of its headers, in bytes.
const LARGEST: usize = 8192;

/// Most headers of a request.
const HEADERS: usize = 64;

/// How long a connection may be there, in nanoseconds.
const DEADLINE_NS: u64 = 5_000_000_000;

/// How long what a client sends after its request is taken, in nanoseconds.
const LINGER_NS: u64 = 500_000_000;

/// Between two looks whether the daemon ends.
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// The one page.
const PATH: &str = "/metrics";

/// The text format of Prometheus, as its documentation names it.
const TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A page that is answered.
#[derive(PartialEq, Eq, Debug)]
struct Answer {
    status: &'static str,
    /// Further headers.
    more: &'static str,
    kind: &'static str,
    body: String,
}

impl Answer {
    fn error(status: &'static str, more: &'static str) -> Answer {
        let kind = "text/plain; charset=utf-8";
        Answer { status, more, kind, body: format!("{status}. There is {PATH}.\n") }
    }

    /// All of it, or for `head` only what comes before the body.
    fn bytes(&self, head: bool) -> Vec<u8> {
        let (Answer { status, more, kind, body }, len) = (self, self.body.len());
        let text = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\n{more}\
             Connection: close\r\n\r\n"
        );
        [text.as_bytes(), if head { b"" } else { body.as_bytes() }].concat()
    }
}

/// What the bytes of a request ask for.
#[derive(PartialEq, Eq, Debug)]
enum Asked {
    /// They are not all there.
    More,
    Page {
        head: bool,
    },
    Wrong(Answer),
}

fn asked(bytes: &[u8]) -> Asked {
    let mut headers = [EMPTY_HEADER; HEADERS];
    let mut request = Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(Status::Complete(_)) => {}
        Ok(Status::Partial) if bytes.len() < LARGEST => return Asked::More,
        Ok(Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Asked::Wrong(Answer::error("431 Request Header Fields Too Large", ""));
        }
        Err(_) => return Asked::Wrong(Answer::error("400 Bad Request", "")),
    }
    let path = request.path.unwrap_or_default();
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    match (path, request.method) {
        (PATH, Some("GET")) => Asked::Page { head: false },
        (PATH, Some("HEAD")) => Asked::Page { head: true },
        (PATH, _) => Asked::Wrong(Answer::error("405 Method Not Allowed", "Allow: GET, HEAD\r\n")),
        _ => Asked::Wrong(Answer::error("404 Not Found", "")),
    }
}

/// A connection that does not block, with the time that it may take.
struct Connection<'a> {
    stream: &'a File,
    clock: &'a Clock,
    stop: &'a AtomicBool,
    until: u64,
}

impl Connection<'_> {
    /// Does something as soon as it can be done.
    fn ready<T>(&self, what: PollFlags, mut f: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            // Also before the first try: who sends a byte at a time must come to an end as well.
            if self.stop.load(Ordering::Acquire) {
                return Err(io::Error::other("the daemon ends"));
            }
            if self.clock.now() >= self.until {
                return Err(ErrorKind::TimedOut.into());
            }
            let mut fds = [PollFd::new(self.stream.as_fd(), what)];
            let wait = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
            if poll(&mut fds, wait) == Ok(0) {
                continue;
            }
            match f() {
                Err(e) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&e.kind()) => {}
                done => return done,
            }
        }
    }

    fn receive(&self, to: &mut [u8]) -> io::Result<usize> {
        let mut stream = self.stream;
        self.ready(PollFlags::POLLIN, || stream.read(to))
    }

    fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        let mut stream = self.stream;
        while !bytes.is_empty() {
            let n = self.ready(PollFlags::POLLOUT, || stream.write(bytes))?;
            if n == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
            bytes = &bytes[n..];
        }
        Ok(())
    }
}

/// Answers the one request of a connection; `page` makes the page.
pub(super) fn serve(
    stream: &File,
    clock: &Clock,
    stop: &AtomicBool,
    page: impl FnOnce() -> String,
) -> io::Result<()> {
    let mut connection = Connection { stream, clock, stop, until: clock.now() + DEADLINE_NS };
    let mut bytes = [0; LARGEST];
    let mut len = 0;
    let answer = loop {
        let n = connection.receive(&mut bytes[len..])?;
        if n == 0 {
            return Ok(());
        }
        len += n;
        match asked(&bytes[..len]) {
            Asked::More => {}
            Asked::Page { head } => {
                let body = page();
                break Answer { status: "200 OK", more: "", kind: TYPE, body }.bytes(head);
            }
            Asked::Wrong(answer) => break answer.bytes(false),
        }
    };
    connection.send(&answer)?;
    shutdown(stream.as_raw_fd(), Shutdown::Write)?;
    // What the client still sends is taken for a while: a close before that would take the answer away
    // from it.
    connection.until = connection.until.min(clock.now() + LINGER_NS);
    while connection.receive(&mut bytes)? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(request: &[u8]) -> String {
        match asked(request) {
            Asked::More => "more".to_owned(),
            Asked::Page { head } => format!("page {head}"),
            Asked::Wrong(answer) => answer.status.to_owned(),
        }
    }

    #[test]
    fn one_page_is_known() {
        for (request, expected) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "page false"),
            ("GET /metrics HTTP/1.0\r\n\r\n", "page false"),
            ("HEAD /metrics?a=b HTTP/1.1\r\n\r\n", "page true"),
            ("POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n", "405 Method Not Allowed"),
            ("GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
            ("GET /metrics/ HTTP/1.1\r\n\r\n", "404 Not Found"),
            ("GET http://x/metrics HTTP/1.1\r\n\r\n", "404 Not Found"),
            ("GET /metrics HTTP/2.0\r\n\r\n", "400 Bad Request"),
            ("GET /metrics\r\n\r\n", "400 Bad Request"),
            ("\u{16}\u{3}\u{1}", "400 Bad Request"),
            ("GET /met", "more"),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n", "more"),
            ("", "more"),
        ] {
            assert_eq!(status(request.as_bytes()), expected, "{request:?}");
        }
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(LARGEST));
        assert_eq!(status(&long.as_bytes()[..LARGEST - 1]), "more");
        assert!(status(&long.as_bytes()[..LARGEST]).starts_with("431"));
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS + 1));
        assert!(status(many.as_bytes()).starts_with("431"));
    }
}
