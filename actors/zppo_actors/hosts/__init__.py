"""What runs on the further hosts of a run: `zppo join` and the host agent that it becomes."""
