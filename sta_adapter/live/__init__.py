"""Video that does not end: the encoder goes on where its last call ended, with the frames of a window behind it."""
