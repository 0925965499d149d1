//! A certificate authority and a server certificate, made when a server starts.

use std::io;

use native_tls::{Identity, TlsAcceptor};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use super::peer::{End, Peer};

/// What `wss://` needs on the server's side, and the root that clients trust.
pub(super) struct Authority {
    pub(super) acceptor: TlsAcceptor,
    pub(super) ca_pem: String,
}

impl Authority {
    /// A certificate for these host names and addresses, signed by a root that
    /// nobody trusts yet.
    pub(super) fn new(names: &[String]) -> io::Result<Self> {
        let (ca_pem, chain, key) = certify(names).map_err(io::Error::other)?;
        let identity = Identity::from_pkcs8(chain.as_bytes(), key.as_bytes());
        let acceptor = identity.and_then(TlsAcceptor::new).map_err(io::Error::other)?;
        Ok(Authority { acceptor, ca_pem })
    }
}

/// The root, the server's chain and the server's key, all in PEM.
fn certify(names: &[String]) -> Result<(String, String, String), rcgen::Error> {
    let mut root = CertificateParams::new([])?;
    root.distinguished_name.push(DnType::CommonName, "broadsock testing root");
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = CertifiedIssuer::self_signed(root, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let mut leaf = CertificateParams::new(names)?;
    leaf.distinguished_name.push(DnType::CommonName, "broadsock testing server");
    let leaf = leaf.signed_by(&key, &root)?;
    Ok((root.pem(), leaf.pem() + &root.pem(), key.serialize_pem()))
}

impl Peer {
    /// The TLS handshake, waited for like everything else.
    pub(super) fn shake_hands(&mut self, acceptor: &native_tls::TlsAcceptor) -> Result<(), End> {
        use native_tls::HandshakeError::{Failure, WouldBlock};
        let mut attempt = acceptor.accept(self.stream.socket().clone());
        loop {
            match attempt {
                Ok(tls) => {
                    self.stream.use_tls(tls);
                    return Ok(());
                }
                Err(Failure(error)) => {
                    log::debug!("testing server, connection {}: {error}", self.id);
                    return Err(End::Gone);
                }
                Err(WouldBlock(waiting)) => {
                    let roll_call = self.take_orders()?;
                    self.handle.answer(roll_call);
                    self.wait(None)?;
                    attempt = waiting.handshake();
                }
            }
        }
    }
}
