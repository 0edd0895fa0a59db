"""What rewatch runs on one machine with nothing installed: the broker, the store, the LLM server, supervised.

`LocalStack` (stack.py) brings all three up; `Supervisor` (supervisor.py) runs them and the stages. Each speaks
the protocol of its production counterpart, so nothing outside this folder knows that it is embedded.
"""
