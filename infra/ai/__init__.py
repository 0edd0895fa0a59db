"""The models' services of a host of their own: the detector's and the LLM's, kept running in the background."""
