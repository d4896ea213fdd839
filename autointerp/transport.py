"""HTTP/1.1 to a server on this machine, for many small requests at once.

The SDK's own transport serves proxies, TLS, HTTP/2 and several event loops, and spends on each
request more processor time than the rest of it costs. Here a request is one write and, as a rule,
one read, on a connection that goes back to a stack.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import h11
import httpx2

READ_BYTES = 1 << 16


class _Connection:
    """A socket and the state of HTTP on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.http = h11.Connection(h11.CLIENT)

    @property
    def usable(self) -> bool:
        """Whether a request may be sent on it: the last one is over, and nobody hung up."""
        over = self.http.our_state is h11.IDLE and self.http.their_state is h11.IDLE
        return over and not self.reader.at_eof() and not self.writer.is_closing()

    async def exchange(self, head: h11.Request, body: bytes) -> tuple[h11.Response, bytes]:
        """Send a request and read what comes back.

        Raises
        ------
        h11.ProtocolError
            If what comes is no complete reply.
        """
        events = (head, h11.Data(data=body), h11.EndOfMessage())
        self.writer.write(b"".join(self.http.send(event) or b"" for event in events))
        await self.writer.drain()
        answer: h11.Response | None = None
        parts: list[bytes] = []
        while not isinstance(event := self.http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                data = await self.reader.read(READ_BYTES)
                if not data and answer is None:
                    break
                self.http.receive_data(data)
            elif isinstance(event, h11.Response):
                answer = event
            elif isinstance(event, h11.Data):
                parts.append(bytes(event.data))
            elif not isinstance(event, h11.InformationalResponse):
                break
        if answer is None:
            raise h11.RemoteProtocolError("the connection was closed before a reply came")
        if self.http.our_state is h11.DONE and self.http.their_state is h11.DONE:
            self.http.start_next_cycle()
        return answer, b"".join(parts)


class Direct(httpx2.AsyncBaseTransport):
    """Plain connections to one host; as many as requests are under way at once.

    The timeout of a read is that of the whole request, connecting included.
    """

    def __init__(self) -> None:
        self._free: list[_Connection] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """As httpx has it; the whole reply is read."""
        body = await request.aread()
        head = h11.Request(
            method=request.method, target=request.url.raw_path, headers=request.headers.raw
        )
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(request.extensions["timeout"]["read"]):
                connection = await self._connection(request.url)
                answer, content = await connection.exchange(head, body)
        except TimeoutError:
            self._close(connection)
            raise httpx2.ReadTimeout("no reply in time", request=request) from None
        except (OSError, h11.ProtocolError) as error:
            self._close(connection)
            kind = httpx2.ConnectError if connection is None else httpx2.RemoteProtocolError
            raise kind(str(error), request=request) from error
        except BaseException:  # cancelled
            self._close(connection)
            raise
        if connection.usable:
            self._free.append(connection)
        else:
            self._close(connection)
        return httpx2.Response(
            answer.status_code, headers=answer.headers.raw_items(), content=content
        )

    async def _connection(self, url: httpx2.URL) -> _Connection:
        while self._free:
            connection = self._free.pop()
            if connection.usable:
                return connection
            self._close(connection)
        return _Connection(*await asyncio.open_connection(url.host, url.port or 80))

    @staticmethod
    def _close(connection: _Connection | None) -> None:
        if connection is not None:
            connection.writer.close()

    async def aclose(self) -> None:
        """Close what is open."""
        for connection in self._free:
            connection.writer.close()
            with suppress(OSError):
                await connection.writer.wait_closed()
        self._free = []
