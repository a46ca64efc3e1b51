"""Events in, assignments and windows out: Algorithm 1 as a pipeline, without sockets, clocks or
threads."""
