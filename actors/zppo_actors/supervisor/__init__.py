"""The supervisor: every process of a run started, watched, restarted, shown and ended."""
