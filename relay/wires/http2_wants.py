"""What an HTTP/2 client has said of itself in its settings (RFC 9113, 6.5.2)."""

from __future__ import annotations

from relay.wires import http2
from relay.wires.http2 import Code, Http2Error, Setting


class Wants:
    """See the module.

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
