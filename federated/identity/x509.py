"""X.509 for TLS: each coordinator and each silo has a small authority of its own, and trusts no other.

An authority is valid for ten years, what it signs for a bit more than one; ``issue`` is called at every start and
renews in time.
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from configs.errors import InputError
from configs.storage.files import write_atomic
from federated.identity.keys import load_or_create_key

AUTHORITY_DAYS, CERTIFICATE_DAYS, RENEW_DAYS = 3650, 398, 30
SKEW = timedelta(minutes=5)  # machines' clocks differ
CURVE = ec.SECP256R1()
Purpose = Literal["server", "client"]
_USAGE = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}


class Authority:
    """A certificate authority: its key, which never leaves its machine, and its certificate.

    Args:
        key: the key's file.
        path: the certificate's file.
        name: its common name, used when it is made.
    """

    def __init__(self, key: Path, path: Path, name: str) -> None:
        self._key, self.path = load_or_create_key(key, CURVE), path
        if not self.path.exists():
            write_atomic(self.path, _pem(self._sign_itself(name)))
        self.certificate = read_certificate(self.path)
        if self.certificate.public_key() != self._key.public_key():
            raise InputError(f"{self.path}: is not the certificate of {key}; put the backup of both back")

    def _sign_itself(self, name: str) -> x509.Certificate:
        builder = _builder(_name(name), _name(name), self._key.public_key(), AUTHORITY_DAYS)
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        return (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def issue(
        self, path: Path, public_key: ec.EllipticCurvePublicKey, name: str, hosts: Sequence[str], purpose: Purpose
    ) -> None:
        """Writes a certificate for a key, unless a good one is there that holds for another month.

        Args:
            path: the certificate's file.
            public_key: the key's public half.
            name: common name, for people.
            hosts: names and addresses that the certificate is for.
            purpose: of a server or of a client.
        """
        if path.exists() and self._still_good(path, public_key, hosts):
            return
        builder = _builder(_name(name), self.certificate.subject, public_key, CERTIFICATE_DAYS)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([_USAGE[purpose]]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        write_atomic(path, _pem(certificate))

    def _still_good(self, path: Path, public_key: ec.EllipticCurvePublicKey, hosts: Sequence[str]) -> bool:
        certificate, soon = read_certificate(path), datetime.now(UTC) + timedelta(days=RENEW_DAYS)
        if certificate.public_key() != public_key or _hosts(certificate) != {str(_host(h).value) for h in hosts}:
            return False
        try:
            check_x509(certificate, self.certificate, str(path), now=soon)
        except InputError:
            return False
        return True


def certificate_request(key: ec.EllipticCurvePrivateKey, name: str) -> str:
    """A request for a certificate, PEM: how a key gets one without travelling."""
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(name)).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def requested_key(request: str, origin: str) -> ec.EllipticCurvePublicKey:
    """The key that a request was made with.

    Raises:
        InputError: it is no request, or not signed by its own key.
    """
    try:
        parsed = x509.load_pem_x509_csr(request.encode())
        key = parsed.public_key()
    except ValueError:
        raise InputError(f"{origin}: holds no certificate request; make it again where the key is") from None
    if not parsed.is_signature_valid or not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError(f"{origin}: its certificate request is not signed by an elliptic-curve key of its own")
    return key


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate from its PEM file.

    Raises:
        InputError: it is missing or no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); give the certificate's file") from None
    except ValueError:
        raise InputError(f"{path}: no certificate in PEM; give the certificate's file") from None


def check_x509(
    certificate: x509.Certificate,
    authority: x509.Certificate,
    origin: str,
    host: str | None = None,
    now: datetime | None = None,
) -> None:
    """What TLS checks too, said in one clear line before a process runs into it.

    Args:
        certificate: to check.
        authority: whose signature it must bear.
        origin: the file or address, for the message.
        host: name or address that it must be for.
        now: the time that it must hold at.

    Raises:
        InputError: it is of another authority, not valid at that time, or for another host.
    """
    now = now or datetime.now(UTC)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        issuer, expected = certificate.issuer.rfc4514_string(), authority.subject.rfc4514_string()
        raise InputError(
            f"{origin}: the certificate is of another authority ({issuer}) than the one that was confirmed "
            f"({expected}); ask for the coordinator.json of today and its fingerprint"
        ) from None
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise InputError(
            f"{origin}: the certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}, and it is {now:%Y-%m-%d}; "
            "renew it, or set this machine's clock"
        )
    if host is not None and str(_host(host).value) not in _hosts(certificate):
        raise InputError(
            f"{origin}: the certificate is for {', '.join(sorted(_hosts(certificate))) or 'no host'}, not for {host}; "
            "reach it by a name that it is for, or add this one to its hosts"
        )


def days_left(certificate: x509.Certificate) -> int:
    """Whole days until the certificate ends; negative when it has."""
    return (certificate.not_valid_after_utc - datetime.now(UTC)).days


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _host(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _hosts(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)}


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
