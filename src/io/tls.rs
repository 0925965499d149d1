//! TLS by the platform's library: the connector, its handshake, its errors.

#[cfg(feature = "tls")]
mod native {
    use std::error::Error as StdError;
    use std::io;
    use std::sync::{Arc, OnceLock};

    use native_tls::{Certificate, HandshakeError, MidHandshakeTlsStream, TlsConnector, TlsStream};

    use crate::error::{Error, ErrorKind};
    use crate::io::socket::Socket;

    /// Makes TLS sessions. Built once for each client: loading the system's
    /// roots anew takes 40 ms and 1.5 MiB.
    #[derive(Clone)]
    pub(crate) struct Tls(TlsConnector);

    /// Where a client's connector comes from: given, or made when first needed.
    #[derive(Clone, Default)]
    pub(crate) struct TlsSource {
        pub(crate) roots: Vec<Vec<u8>>,
        made: Arc<OnceLock<Result<Tls, Error>>>,
    }

    impl TlsSource {
        /// Always `connector`.
        pub(crate) fn given(connector: TlsConnector) -> Self {
            let made = Arc::new(OnceLock::from(Ok(Tls(connector))));
            Self { roots: Vec::new(), made }
        }

        pub(crate) fn get(&self) -> Result<&Tls, Error> {
            self.made.get_or_init(|| Tls::new(&self.roots)).as_ref().map_err(Clone::clone)
        }
    }

    impl std::fmt::Debug for TlsSource {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("TlsSource")
        }
    }

    /// A handshake that has to wait for its socket.
    pub(crate) struct Pending(MidHandshakeTlsStream<Socket>);

    /// How far a handshake came.
    pub(crate) enum Handshake {
        Done(Box<TlsStream<Socket>>),
        Waiting(Pending),
    }

    impl Tls {
        /// Trusts the system's roots and `extra`, each a PEM or DER certificate.
        pub(crate) fn new(extra: &[Vec<u8>]) -> Result<Self, Error> {
            let unusable = |error| {
                Error::caused(
                    ErrorKind::Setting("root_certificate"),
                    "setting `root_certificate`: it is not a PEM or DER certificate",
                    error,
                )
            };
            let mut builder = TlsConnector::builder();
            for bytes in extra {
                let certificate = Certificate::from_pem(bytes)
                    .or_else(|_| Certificate::from_der(bytes))
                    .map_err(unusable)?;
                builder.add_root_certificate(certificate);
            }
            builder.build().map(Self).map_err(|error| {
                Error::caused(ErrorKind::Tls, "the platform's TLS could not be set up", error)
            })
        }

        pub(crate) fn start(&self, host: &str, socket: Socket) -> Result<Handshake, Error> {
            progress(self.0.connect(host, socket), host)
        }
    }

    impl Pending {
        pub(crate) fn socket_mut(&mut self) -> &mut Socket {
            self.0.get_mut()
        }

        pub(crate) fn resume(self, host: &str) -> Result<Handshake, Error> {
            progress(self.0.handshake(), host)
        }
    }

    fn progress(
        result: Result<TlsStream<Socket>, HandshakeError<Socket>>,
        host: &str,
    ) -> Result<Handshake, Error> {
        match result {
            Ok(stream) => Ok(Handshake::Done(Box::new(stream))),
            Err(HandshakeError::WouldBlock(mid)) => Ok(Handshake::Waiting(Pending(mid))),
            Err(HandshakeError::Failure(error)) => Err(failure(error, host)),
        }
    }

    /// A distrusted certificate is a matter for a person; anything else may
    /// pass. native-tls has no kinds: an I/O error in the chain tells a cut,
    /// and each platform's words tell a certificate.
    fn failure(error: native_tls::Error, host: &str) -> Error {
        let mut text = error.to_string().to_lowercase();
        let mut cause = error.source();
        while let Some(inner) = cause {
            if let Some(io) = inner.downcast_ref::<io::Error>() {
                let phrase = format!("TLS handshake with {host} was cut: {}", io.kind());
                return Error::caused(ErrorKind::Tls, phrase, error);
            }
            text.push_str(&inner.to_string().to_lowercase());
            cause = inner.source();
        }
        let distrusted = [
            "certificate verif",
            "not trusted",
            "hostname mismatch",
            "cn name",
            "self-signed",
            "self signed",
            "unknown ca",
            "certificate has expired",
            "expired certificate",
        ];
        if distrusted.iter().any(|words| text.contains(words)) {
            let phrase = format!("the certificate of {host} is not trusted");
            return Error::caused(ErrorKind::Certificate, phrase, error);
        }
        Error::caused(ErrorKind::Tls, format!("TLS handshake with {host} failed"), error)
    }

    impl std::fmt::Debug for Tls {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Tls")
        }
    }
}

#[cfg(feature = "tls")]
pub(crate) use native::{Handshake, Pending, TlsSource};

/// Stands in for TLS where the feature is off; `wss` is refused at build time.
#[cfg(not(feature = "tls"))]
#[derive(Debug, Clone, Default)]
pub(crate) struct TlsSource(());
