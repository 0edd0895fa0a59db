"""detect: a frame in, everything the detector saw in it out, also when it saw nothing."""
