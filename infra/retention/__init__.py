"""What is deleted and what stays: retention, holds on events, and the collector that obeys both."""
