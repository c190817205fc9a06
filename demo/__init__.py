"""The demo, `python -m demo`, and the harness of real vLLM engines that it shares with the tests."""
