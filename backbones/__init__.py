"""One file per backbone; each is registered under the entry-point group `sta_adapter.backbones`."""
