"""Tells a guest on its second serial line what to do, and waits until that is done.

python guest_console.py SOCKET freeze NAME…      a hook for `lmdbitmap backup --hook`
python guest_console.py SOCKET thaw NAME…
"""

from __future__ import annotations

import re
import socket
import sys

PATIENCE_SECONDS = 20.0
DEEDS = {"freeze": "fsfreeze --freeze /mnt", "thaw": "fsfreeze --unfreeze /mnt"}


def tell(path: str, script: str) -> int:
    """The exit code of a line of shell."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(PATIENCE_SECONDS)
        line.connect(path)
        line.sendall(f'{script}; echo "<$?>"\n'.encode())
        said = b""
        while (ended := re.search(rb"<(\d+)>", said)) is None:
            news = line.recv(4096)
            if not news:
                raise ConnectionError(f"the guest hung up after {said!r}")
            said += news
        return int(ended[1])


if __name__ == "__main__":
    sys.exit(tell(sys.argv[1], DEEDS[sys.argv[2]]))
