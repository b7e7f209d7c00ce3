//! Certificates for tests, made by `openssl`.

use std::path::Path;
use std::process::{Command, Stdio};

fn openssl(folder: &Path, args: &[&str]) {
    let out = Command::new("openssl").args(args).current_dir(folder).stdin(Stdio::null()).output();
    let out = out.expect("openssl is installed");
    assert!(out.status.success(), "openssl {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

const KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];

/// Puts an authority's certificate into a folder, and those of a server on 127.0.0.1 and of a client
/// that it has signed.
pub(crate) fn make(folder: &Path) {
    let mut ca = vec!["req", "-x509", "-days", "2", "-subj", "/CN=authority"];
    ca.extend(KEY);
    ca.extend(["-keyout", "ca-key.pem", "-out", "ca-cert.pem"]);
    ca.extend(["-addext", "keyUsage=critical,keyCertSign"]);
    openssl(folder, &ca);
    for who in ["server", "client"] {
        let (key, request) = (format!("{who}-key.pem"), format!("{who}.csr"));
        let mut ask = vec!["req", "-subj", "/CN=localhost", "-keyout", &key, "-out", &request];
        ask.extend(KEY);
        ask.extend(["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]);
        openssl(folder, &ask);
        let cert = format!("{who}-cert.pem");
        let sign = ["x509", "-req", "-days", "2", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"];
        let files = ["-CAcreateserial", "-copy_extensions", "copy", "-in", &request, "-out", &cert];
        openssl(folder, &[&sign[..], &files].concat());
    }
}
