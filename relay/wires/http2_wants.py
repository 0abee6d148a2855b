"""What the two ends of an HTTP/2 connection say of themselves in their settings (RFC 9113, 6.5.2)."""

from __future__ import annotations

from relay.wires import http2
from relay.wires.http2 import Code, Http2Error, Setting
from relay.wires.http2_reader import MOST_FRAME
from relay.wires.http2_stream import UNASKED

#: Calls at a time; further ones are put off by the client itself.
STREAMS = 1000
#: Bytes that may be on their way to us; of what has come, each stream bounds its own.
WINDOW = 16 * 1024 * 1024


def welcome(most_head: int) -> bytes:
    """Return what the server says first; heads of up to `most_head` bytes are taken.

    That is more than the limit, so that the answer is ours: a client refuses by itself what is longer.
    """
    values = {
        Setting.MAX_CONCURRENT_STREAMS: STREAMS,
        Setting.INITIAL_WINDOW_SIZE: UNASKED,
        Setting.MAX_FRAME_SIZE: MOST_FRAME,
        Setting.MAX_HEADER_LIST_SIZE: most_head,
        Setting.GRPC_ALLOW_TRUE_BINARY_METADATA: 1,
    }
    return http2.settings(values) + http2.window_update(0, WINDOW - http2.FIRST_WINDOW)


class Wants:
    """What the client has said.

    Attributes:
        window: bytes that it takes of each answer unasked.
        frame: longest payload of a frame that it takes.
        smaller_table: whether it wants the table of header blocks smaller, which the next one must confirm.
    """

    __slots__ = ("frame", "smaller_table", "window")

    def __init__(self) -> None:
        """Begin with what holds before a client has said anything."""
        self.window = http2.FIRST_WINDOW
        self.frame = http2.FIRST_FRAME
        self.smaller_table = False

    def take(self, payload: bytes) -> int:
        """Take what a SETTINGS frame says; return by how much `window` has grown. Raises Http2Error."""
        before = self.window
        for name, value in http2.read_settings(payload):
            if name == Setting.INITIAL_WINDOW_SIZE:
                if value > http2.MOST_WINDOW:
                    raise Http2Error(Code.FLOW_CONTROL_ERROR, f"a window of {value}")
                self.window = value
            elif name == Setting.MAX_FRAME_SIZE:
                if not http2.FIRST_FRAME <= value < 2**24:
                    raise Http2Error(Code.PROTOCOL_ERROR, f"frames of {value}")
                self.frame = value
            elif name == Setting.HEADER_TABLE_SIZE:
                self.smaller_table = self.smaller_table or value < http2.FIRST_TABLE
            elif name == Setting.ENABLE_PUSH and value > 1:
                raise Http2Error(Code.PROTOCOL_ERROR, f"push set to {value}")
        return self.window - before
