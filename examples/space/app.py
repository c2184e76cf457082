"""A Space that answers questions about videos with and without an adapter; its settings are the Space's variables."""

import os

from sta_adapter.visualization.app import serve

serve(os.environ.get("STA_MODEL"), os.environ.get("STA_ADAPTER"), longest=float(os.environ.get("STA_LONGEST", "120")))
