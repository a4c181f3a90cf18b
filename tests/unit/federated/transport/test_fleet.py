"""What the relay says of the SuperLink's refusals."""

import time
from email.utils import formatdate

import httpx
import pytest

from federated.transport.fleet import reason


def refused(status: int, ahead_s: float | None) -> str:
    """The line about a refusal whose sender's clock is so far behind this one."""
    dated = {} if ahead_s is None else {"date": formatdate(time.time() - ahead_s, usegmt=True)}
    request = httpx.Request("POST", "https://fed.example.org/v1/fleet/pull-messages")
    response = httpx.Response(status, headers=dated, json={"detail": "refused"}, request=request)
    return reason(httpx.HTTPStatusError("refused", request=request, response=response))


@pytest.mark.parametrize("ahead_s", [-400, 60])
def test_a_node_that_is_turned_away_for_its_clock_says_both_times(ahead_s):
    said = refused(401, ahead_s)
    assert "(401)" in said or "HTTP 401" in said
    assert "set the one that is wrong; Flower turns a SuperNode away that is 5 s ahead" in said


@pytest.mark.parametrize(("status", "ahead_s"), [(401, 0), (401, -200), (401, None), (403, -400), (500, 60)])
def test_a_clock_is_named_where_it_is_the_cause_alone(status, ahead_s):
    assert "clock" not in refused(status, ahead_s)
