"""The file for ms-swift's `--external_plugins`; it has a folder of its own, as ms-swift puts that on Python's path."""

import sta_adapter.integrations.ms_swift  # noqa: F401
