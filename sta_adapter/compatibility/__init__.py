"""What differs between releases of the packages that STA leans on, each in one place."""
