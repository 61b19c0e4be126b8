# SPDX-License-Identifier: Apache-2.0
"""`python -m multilora_backend.engine`: the engine process, started by a front end."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

from multilora_backend.config import Config
from multilora_backend.errors import MultiloraError

EXIT_CONFIGURATION = 2
"""Starting again will not help: the message says what to change."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="multilora engine", description=__doc__)
    parser.add_argument("--address", required=True, help="ZeroMQ address to bind, e.g. ipc:///tmp/x/engine.sock")
    parser.add_argument("--config", required=True, type=Path, help="JSON file with the configuration")
    parser.add_argument("--parent", type=int, default=0, help="pid of the front end that starts the engine")
    parser.add_argument("--server", type=int, default=0, help="pid of tritonserver")
    arguments = parser.parse_args()
    # Ctrl-C reaches the whole process group; the engine leaves when its front ends have left.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        config = Config.from_json(arguments.config.read_text())
        logging.basicConfig(level=config.log_level.upper(), format="multilora engine: %(levelname)s %(message)s")
        from multilora_backend.engine.server import EngineServer  # after the arguments: torch takes seconds

        server = EngineServer(config, arguments.address, arguments.parent, arguments.server)
    except MultiloraError as error:
        print(f"multilora engine: {error.message}", file=sys.stderr, flush=True)
        return EXIT_CONFIGURATION
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
