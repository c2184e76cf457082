"""The demo: tiny base, made clips, the comparison and its report."""
