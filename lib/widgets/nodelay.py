"""JupyterLab without Nagle's delay: `--ServerApp.kernel_websocket_connection_class`.

The stock server leaves Nagle's algorithm on for the websocket between browser and kernel. An answer
of the kernel is several small messages, and the second one then waits until the browser's system
has confirmed the first, which it delays by some 40 ms. For a brush stroke that is most of the time
until the scores move.

    jupyter lab --ServerApp.kernel_websocket_connection_class=lib.widgets.nodelay.NoDelayConnection
"""

from __future__ import annotations

from collections.abc import Awaitable

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection


class NoDelayConnection(ZMQChannelsWebsocketConnection):
    """The stock connection between a browser and a kernel, on a socket with TCP_NODELAY."""

    def connect(self) -> Awaitable[None] | None:
        """Connects as the stock class does; the future says when the kernel answers."""
        self.websocket_handler.set_nodelay(True)
        return super().connect()
