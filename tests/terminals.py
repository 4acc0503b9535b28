"""A terminal for tests: a pseudo-terminal, and pyte, which shows what a person would see on it."""

import fcntl
import os
import struct
import termios
import threading

import pyte

ROWS = 200


class Terminal:
    """A pseudo-terminal of some columns; a thread reads what is written, and keeps what the screen shows.

    Attributes:
        slave: file descriptor for the program.
        text: everything that was written.
        seen: the rows of the screen after every piece of text.
    """

    def __init__(self, columns):
        self.master, self.slave = os.openpty()
        self.screen = pyte.Screen(columns, ROWS)
        self.stream = pyte.ByteStream(self.screen)
        self.text, self.seen = b"", []
        self.lock = threading.Lock()
        self._set_size(columns)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _set_size(self, columns):
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))

    def resize(self, columns):
        self._set_size(columns)
        with self.lock:
            self.screen.resize(ROWS, columns)

    def _read(self):
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                # no program has it open any more
                return
            with self.lock:
                self.text += data
                self.stream.feed(data)
                self.seen.append(self.rows())

    def rows(self):
        """The rows of the screen that are not empty."""
        return [row.rstrip() for row in self.screen.display if row.strip()]

    def close(self):
        """Wait until everything is read; returns the last rows."""
        os.close(self.slave)
        self.thread.join(30)
        os.close(self.master)
        return self.rows()
