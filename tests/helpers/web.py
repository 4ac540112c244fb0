"""The page of `trainers.show --serve`, really served on this machine, for as long as a test needs it."""

import threading
from contextlib import contextmanager

from trainers.evaluation.web import application, listen, server_of


@contextmanager
def serving(page, hosts=()):
    """Address of a server with this page."""
    with listen(0) as socket:
        server = server_of(application(page, hosts))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
