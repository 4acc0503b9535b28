"""Web servers on this machine, for as long as a test needs them."""

import contextlib
import functools
import http.server
import threading


@contextlib.contextmanager
def served(handler):
    """The address of a server that answers by this handler, without its log."""

    class Quiet(handler):
        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def folder_of(root, asked=None):
    """Handler that sends the files of a folder, and appends the names of those that were asked for."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        __init__ = functools.partialmethod(http.server.SimpleHTTPRequestHandler.__init__, directory=str(root))

        def do_GET(self):
            if asked is not None:
                asked.append(self.path.rpartition("/")[2])
            super().do_GET()

    return Handler


def answering(answer):
    """Handler whose GET is this function."""

    class Handler(http.server.BaseHTTPRequestHandler):
        do_GET = answer

    return Handler


def sends(content, length=True):
    """The function that answers with these bytes, and says how many they are."""

    def answer(self):
        self.send_response(200)
        if length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    return answer
