"""What differs between releases of the packages that STA leans on, each in one place; an unknown shape is a `CompatibilityError`."""
