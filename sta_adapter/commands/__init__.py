"""The sub-commands of `sta-adapter`, one file each."""
