# SPDX-License-Identifier: Apache-2.0
"""What holds for every test."""

import signal

# `make test &` in a script starts with SIGINT ignored, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
