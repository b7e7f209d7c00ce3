//! TLS for connections over a network: certificates, as QEMU and nbdkit lay them out in a folder
//! ([`TlsServer`], [`TlsClient`]), and the thread that seals and opens a connection's bytes ([`pump`]).
//!
//! Versions 1.2 and 1.3, by rustls. Whether it is spoken is agreed by NBD's `STARTTLS` (doc/proto.md,
//! "TLS support"); a side that has certificates goes on with it or not at all.

pub(crate) mod pump;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

/// Whom we believe: the certificate (or several) of the authority.
const CA: &str = "ca-cert.pem";
/// Most certificates of a file: more are a mistake.
const CERTIFICATES: usize = 64;

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", file.display())]
pub struct TlsError {
    file: PathBuf,
    why: String,
}

impl TlsError {
    fn new(file: &Path, why: impl ToString) -> TlsError {
        TlsError { file: file.to_owned(), why: why.to_string() }
    }
}

/// What a server needs to speak TLS.
#[derive(Clone, Debug)]
pub struct TlsServer(Arc<ServerConfig>);

/// What a client needs to speak TLS.
#[derive(Clone, Debug)]
pub struct TlsClient(Arc<ClientConfig>);

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The certificates of a file, at least one.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fail = |why: String| TlsError::new(file, why);
    let all = CertificateDer::pem_file_iter(file).map_err(|e| fail(e.to_string()))?;
    let all: Result<Vec<_>, _> = all.take(CERTIFICATES + 1).collect();
    match all.map_err(|e| fail(e.to_string()))? {
        all if all.is_empty() => Err(fail("holds no certificate".to_owned())),
        all if all.len() > CERTIFICATES => Err(fail("holds too many certificates".to_owned())),
        all => Ok(all),
    }
}

fn authority(folder: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let file = folder.join(CA);
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&file)? {
        roots.add(certificate).map_err(|e| TlsError::new(&file, e))?;
    }
    Ok(Arc::new(roots))
}

/// A certificate and its key: `server-cert.pem` and `server-key.pem`, or those of a client.
fn identity(
    folder: &Path,
    whose: &str,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let chain = certificates(&folder.join(format!("{whose}-cert.pem")))?;
    let file = folder.join(format!("{whose}-key.pem"));
    let key = PrivateKeyDer::from_pem_file(&file).map_err(|e| TlsError::new(&file, e))?;
    Ok((chain, key))
}

impl TlsServer {
    /// With `server-cert.pem` and `server-key.pem` of a folder. With `verify` a client must show a
    /// certificate of the authority whose own is `ca-cert.pem`.
    ///
    /// # Errors
    /// If a file is missing or not understood, or key and certificate do not belong together.
    pub fn load(folder: &Path, verify: bool) -> Result<TlsServer, TlsError> {
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| TlsError::new(folder, e))?;
        let config = match verify {
            false => config.with_no_client_auth(),
            true => {
                let roots = authority(folder)?;
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
                let file = folder.join(CA);
                let verifier = verifier.build().map_err(|e| TlsError::new(&file, e))?;
                config.with_client_cert_verifier(verifier)
            }
        };
        let (chain, key) = identity(folder, "server")?;
        let config = config.with_single_cert(chain, key);
        let config = config.map_err(|e| TlsError::new(&folder.join("server-cert.pem"), e))?;
        Ok(TlsServer(Arc::new(config)))
    }

    pub(crate) fn begin(&self) -> Result<rustls::Connection, String> {
        let session = ServerConnection::new(self.0.clone()).map_err(|e| e.to_string())?;
        Ok(session.into())
    }
}

impl TlsClient {
    /// Believes servers with a certificate of the authority whose own is `ca-cert.pem`; shows
    /// `client-cert.pem` if there is one.
    ///
    /// # Errors
    /// As [`TlsServer::load`].
    pub fn load(folder: &Path) -> Result<TlsClient, TlsError> {
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| TlsError::new(folder, e))?
            .with_root_certificates(authority(folder)?);
        let own = folder.join("client-cert.pem");
        let config = match own.exists() {
            false => config.with_no_client_auth(),
            true => {
                let (chain, key) = identity(folder, "client")?;
                let config = config.with_client_auth_cert(chain, key);
                config.map_err(|e| TlsError::new(&own, e))?
            }
        };
        Ok(TlsClient(Arc::new(config)))
    }

    /// To a server whose certificate must be for this name or address.
    pub(crate) fn begin(&self, name: &str) -> Result<rustls::Connection, String> {
        let name = ServerName::try_from(name.to_owned());
        let name = name.map_err(|_| "no name that a certificate can be for".to_owned())?;
        let session = ClientConnection::new(self.0.clone(), name).map_err(|e| e.to_string())?;
        Ok(session.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = |e: TlsError| e.to_string();
        let missing = text(TlsServer::load(dir.path(), true).unwrap_err());
        assert!(missing.contains("ca-cert.pem"), "{missing}");
        let missing = text(TlsServer::load(dir.path(), false).unwrap_err());
        assert!(missing.contains("server-cert.pem"), "{missing}");
        std::fs::write(dir.path().join(CA), "no certificate").unwrap();
        let none = text(TlsClient::load(dir.path()).unwrap_err());
        assert!(none.ends_with("ca-cert.pem: holds no certificate"), "{none}");
        let pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        std::fs::write(dir.path().join(CA), pem).unwrap();
        assert!(TlsClient::load(dir.path()).is_err());
        std::fs::write(dir.path().join("server-cert.pem"), pem.repeat(CERTIFICATES + 1)).unwrap();
        let many = text(TlsServer::load(dir.path(), false).unwrap_err());
        assert!(many.ends_with("too many certificates"), "{many}");
    }
}
