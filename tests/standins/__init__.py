"""Small stand-ins of towers that are published as remote code: the same class and module names, the same arithmetic."""
