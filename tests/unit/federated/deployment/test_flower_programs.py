"""What Flower's programs are told: proxies of the environment are for elsewhere."""

import pytest

from federated.deployment.flower_programs import without_proxy


@pytest.mark.parametrize(
    ("upper", "lower", "expected"),
    [
        ("", "", "127.0.0.1,::1,localhost"),
        ("example.org", "", "example.org,127.0.0.1,::1,localhost"),
        ("", "localhost,10.0.0.0/8", "localhost,10.0.0.0/8,127.0.0.1,::1"),
        ("*", "*", "*,127.0.0.1,::1,localhost"),
    ],
)
def test_loopback_addresses_are_never_asked_through_a_proxy(monkeypatch, upper, lower, expected):
    monkeypatch.setenv("NO_PROXY", upper)
    monkeypatch.setenv("no_proxy", lower)
    found = without_proxy()
    assert found == {"NO_PROXY": expected, "no_proxy": expected}
    monkeypatch.setenv("NO_PROXY", expected)
    monkeypatch.setenv("no_proxy", expected)
    assert without_proxy() == found
