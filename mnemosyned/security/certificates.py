"""What certificates say: whose they are, and until when."""

from __future__ import annotations

from functools import lru_cache

from cryptography import x509
from cryptography.x509.oid import NameOID


@lru_cache(maxsize=1024)
def names_of(pem: str) -> tuple[str, ...]:
    """Return the names a certificate is for: DNS names and addresses, or the common name if it has none.

    Of a chain, the first certificate counts. What is no certificate has no names.
    """
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


def expires_at_s(pem: bytes) -> float:
    """Return when the first certificate of a chain ends, seconds since the epoch.

    Raises:
        ValueError: there is none.
    """
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
