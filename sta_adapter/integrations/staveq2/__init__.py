"""Checkpoints of the published STAVEQ2 code: as adapters of ours, and back."""
