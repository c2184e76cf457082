"""Bridges to other tools: one package or file each, imported only where its tool is."""
