"""Requests to a service without a network, and what each refusal has to be."""

import asyncio

import httpx

SECRET = "PATIENT-4711"


def ask(service, *requests):
    """The responses to (method, path, options), all sent at once."""

    async def sent():
        transport = httpx.ASGITransport(service.guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await asyncio.gather(*(client.request(*one[:2], **one[2]) for one in requests))

    return asyncio.run(sent())


def refused(response, status, message):
    """The error, which is one line and quotes nothing."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert SECRET not in response.text
    assert set(error) == {"message", "type", "param", "code"}
    return error
