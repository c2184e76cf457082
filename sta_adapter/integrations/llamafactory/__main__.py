"""`python -m sta_adapter.integrations.llamafactory`; in a folder of its own, as scripts have theirs on Python's path."""

import sys

from sta_adapter.errors import STAError
from sta_adapter.integrations.llamafactory import main

if __name__ == "__main__":
    try:
        main()
    except STAError as error:
        sys.exit(f"error: {error}")
