"""What certificates say: whose they are, and until when.

Nothing here verifies a certificate. Names count only because the engine has shown, in the handshake, that one
of our authorities has signed the certificate and that the caller has its private key. The API keys' roles
(api/auth.py) and the nodes' names (cluster/peer_auth.py) rest on that.

cryptography is imported inside functions: it takes long to import, and only TLS needs it.
"""

from __future__ import annotations

import math
from functools import lru_cache


# A call has its connection's certificate as PEM, and a connection makes many calls. Parsing takes about 8 µs,
# a lookup less than one.
@lru_cache(maxsize=1024)
def names_of(pem: str) -> tuple[str, ...]:
    """Return the names that a certificate is for: its DNS names and addresses, or its common name.

    The common name counts only in a certificate without alternative names, as in RFC 6125. Of a chain, the
    first certificate counts. What is no certificate has no names: a caller is then without a name, and the
    call is refused where a name is needed.
    """
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        attributes = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return tuple(str(attribute.value) for attribute in attributes)
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return ()
    addresses = (str(address) for address in found.get_values_for_type(x509.IPAddress))
    return (*found.get_values_for_type(x509.DNSName), *addresses)


def validity_s(pem: bytes) -> tuple[float, float]:
    """Return when the first certificate of a chain begins and ends, seconds since the epoch.

    Raises:
        ValueError: the bytes do not begin with a certificate.
    """
    from cryptography import x509

    found = x509.load_pem_x509_certificate(pem)
    return found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()


def latest_end_s(pem: bytes) -> float:
    """Return when the last of these certificates ends, seconds since the epoch; without one, infinity.

    OpenSSL reads forms that cryptography does not, so what is not understood here counts as valid.
    """
    from cryptography import x509

    try:
        return max(one.not_valid_after_utc.timestamp() for one in x509.load_pem_x509_certificates(pem))
    except ValueError:
        return math.inf
