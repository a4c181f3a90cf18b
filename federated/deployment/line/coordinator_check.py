"""Looks at the way to the coordinator, and says in one line what Flower's programs would say in many."""

import ssl
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from configs.errors import InputError
from federated.deployment.line.site_proxy import SiteProxy, UnreachableError, connected, reason, split
from federated.identity.cards import CoordinatorCard
from federated.identity.x509 import check_x509, days_left
from federated.protocol.clocks import ahead_of, clock_problem

_LONGEST_NAME = 200  # of an issuer, which a stranger chooses
# OpenSSL's X509_V_ERR_ for a time too early or too late, a host and an address: the authority was found good before.
_OF_THE_AUTHORITY = (9, 10, 62, 64)


@dataclass(frozen=True)
class Way:
    """What was found on the way to the coordinator.

    Attributes:
        certificate_days_left: of the certificate that was shown.
        ahead_s: seconds that this machine's clock is ahead of the coordinator's, to a second; None: it told none.
    """

    certificate_days_left: int
    ahead_s: float | None


def check_coordinator(coordinator: CoordinatorCard, proxy: SiteProxy | None) -> Way:
    """Connects as the SuperNode will.

    Raises:
        InputError: what answers shows a certificate that is not good, the proxy refuses or inspects TLS, or the clocks
            differ by more than Flower allows.
        UnreachableError: nobody answers, which may change by itself.
    """
    address, host = coordinator.address, split(coordinator.address)[0]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=coordinator.root_certificate)
    except (ssl.SSLError, ValueError):
        raise InputError(
            f"coordinator {coordinator.name}: its root_certificate is none in PEM; ask for its coordinator.json again"
        ) from None
    with closing(connected(address, proxy)) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as connection:
                certificate = _shown(connection)
                ahead_s = _ahead_s(connection, host)
        except ssl.SSLCertVerificationError as error:
            failed = error
        except OSError as error:
            raise UnreachableError(f"{address}: the coordinator does not answer by TLS ({_said(error)})") from None
        else:
            if problem := clock_problem(ahead_s):
                raise InputError(problem)
            return Way(days_left(certificate), ahead_s)
    raise _explained(failed, coordinator, proxy)


def _explained(
    error: ssl.SSLCertVerificationError, coordinator: CoordinatorCard, proxy: SiteProxy | None
) -> InputError:
    """Why the certificate that was shown is not good; it is fetched again, from whoever it is."""
    address, host = coordinator.address, split(coordinator.address)[0]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        authority = x509.load_pem_x509_certificate(coordinator.root_certificate.encode())
        with closing(connected(address, proxy)) as plain, context.wrap_socket(plain, server_hostname=host) as again:
            certificate = _shown(again)
        direct = _is_direct(certificate, authority)
        foreign = not direct and error.verify_code not in _OF_THE_AUTHORITY
        if foreign and proxy is not None:
            return _inspected(certificate, authority, address, proxy)
        if foreign or direct:
            check_x509(certificate, authority, address, host)
    except InputError as found:
        return found
    except (OSError, ValueError, UnreachableError):
        pass
    return InputError(f"{address}: the certificate is not good: {error.verify_message}; tell the coordinator's people")


def _inspected(
    certificate: x509.Certificate, authority: x509.Certificate, address: str, proxy: SiteProxy
) -> InputError:
    issuer, expected = (name.rfc4514_string()[:_LONGEST_NAME] for name in (certificate.issuer, authority.subject))
    return InputError(
        f"proxy {proxy}: inspects TLS: the certificate that comes back for {address} is by {issuer}, not by the "
        f"confirmed authority ({expected}); have whoever runs it pass {address} on as it is"
    )


def _is_direct(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _shown(connection: ssl.SSLSocket) -> x509.Certificate:
    return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True) or b"")


def _ahead_s(connection: ssl.SSLSocket, host: str) -> float | None:
    """By the answer to a request that the coordinator's proxy turns away; None where it has no readable date."""
    request = f"HEAD / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: siloweave-relay\r\nConnection: close\r\n\r\n"
    try:
        connection.sendall(request.encode())
        answer = HTTPResponse(connection, method="HEAD")
        answer.begin()
        return ahead_of(answer.headers["Date"])
    except (OSError, HTTPException):
        return None


def _said(error: OSError) -> str:
    return error.reason if isinstance(error, ssl.SSLError) and error.reason else reason(error)
