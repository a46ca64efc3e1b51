"""The paper and nothing else: Algorithm 1 and its values. Knows of no versions, no processes and no
time."""
