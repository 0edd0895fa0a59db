"""`make test-containers`: stacks in real containers, so it is no part of `make test` and asks to be named."""

import os

if not os.environ.get("TEST_CONTAINERS"):
    collect_ignore_glob = ["test_*.py"]
