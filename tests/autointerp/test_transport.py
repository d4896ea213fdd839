"""The transport against sockets that answer as HTTP allows, and as it does not."""

import asyncio
import time

import httpx2
import pytest

from autointerp.transport import Direct

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n"
INFORMED = b"HTTP/1.1 102 Processing\r\n\r\n" + WHOLE
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok"
OLD = b"HTTP/1.0 200 OK\r\n\r\nok"
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno"


def answers_of(replies, *, pauses=(), timeout=5.0, gap=0.0):
    """What requests in turn get of a server whose n-th request meets ``replies[n]``.

    A reply is bytes, and whether the server hangs up after them.
    """
    connections = 0
    left = iter(replies)

    async def serve(reader, writer):
        nonlocal connections
        connections += 1
        while head := await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b"":
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            assert await reader.readexactly(length) == b"question"
            reply, hang_up = next(left)
            for i in range(0, len(reply), 7):  # in pieces, as networks may
                writer.write(reply[i : i + 7])
                await writer.drain()
            if hang_up:
                break
            await asyncio.sleep(pauses[connections - 1] if pauses else 0)
        writer.close()

    async def run():
        async def guarded(reader, writer):
            try:
                await serve(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()

        server = await asyncio.start_server(guarded, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/ask"
        found = []
        async with httpx2.AsyncClient(transport=Direct(), timeout=timeout) as client:
            for _ in replies:
                try:
                    reply = await client.post(url, content=b"question")
                    found.append((reply.status_code, reply.text))
                except httpx2.RequestError as error:
                    found.append(type(error))
                await asyncio.sleep(gap)
        server.close()
        return found

    return asyncio.run(run()), connections


@pytest.mark.parametrize("reply", [WHOLE, CHUNKED, INFORMED])
def test_a_connection_is_used_again_after_a_whole_reply(reply):
    replies, connections = answers_of([(reply, False)] * 3)
    assert replies == [(200, "ok")] * 3 and connections == 1


@pytest.mark.parametrize("reply", [UNTIL_CLOSED, OLD])
def test_a_reply_may_end_with_the_connection(reply):
    replies, connections = answers_of([(reply, True), (WHOLE, False)])
    assert replies == [(200, "ok")] * 2 and connections == 2


def test_a_connection_that_was_hung_up_while_it_was_free_is_not_used():
    replies, connections = answers_of([(WHOLE, True)] * 3, gap=0.05)
    assert replies == [(200, "ok")] * 3 and connections == 3


def test_a_status_is_told_and_keeps_the_connection():
    replies, connections = answers_of([(NOT_FOUND, False), (WHOLE, False)])
    assert replies == [(404, "no"), (200, "ok")] and connections == 1


@pytest.mark.parametrize("torn", [b"", WHOLE[:20], WHOLE[:-1], CHUNKED[:-3], b"nonsense\r\n\r\n"])
def test_a_torn_reply_is_an_error_and_ends_its_connection(torn):
    replies, connections = answers_of([(torn, True), (WHOLE, False)])
    assert replies == [httpx2.RemoteProtocolError, (200, "ok")] and connections == 2


def test_silence_is_a_timeout_and_ends_its_connection():
    start = time.monotonic()
    replies, connections = answers_of([(WHOLE[:30], False), (WHOLE, False)], timeout=0.2)
    assert replies == [httpx2.ReadTimeout, (200, "ok")] and connections == 2
    assert 0.2 <= time.monotonic() - start < 2


def test_nobody_listens():
    async def run():
        async with httpx2.AsyncClient(transport=Direct()) as client:
            await client.post("http://127.0.0.1:9/v1", content=b"question")

    with pytest.raises(httpx2.ConnectError):
        asyncio.run(run())
